"""The SQL in `sql/`: functions that CREATE EXTENSION makes, and bodies of the API's functions.

Invariant: a placeholder, ``@{word}``, is replaced by what its caller gives for it, which is not
searched for placeholders again. A file's first comment is about the file, and not part of the SQL.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from typing import Final

_PLACEHOLDER: Final = re.compile(r"@\{(\w+)\}")
_OPENING: Final = re.compile(r"\A(?:--.*\n)+\n")


def sql(name: str, **words: str) -> str:
    """The text of ``sql/<name>.sql``.

    Raises KeyError for a placeholder that is not among the words.
    """
    return _PLACEHOLDER.sub(lambda found: words[found[1]], _text(name))


@functools.cache
def _text(name: str) -> str:
    file = importlib.resources.files("proxy.extension") / "sql" / f"{name}.sql"
    return _OPENING.sub("", file.read_text("utf-8"))
