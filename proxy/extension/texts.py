"""The SQL files in `sql/`: what CREATE EXTENSION makes, the commands, and queries about it.

Invariant: a placeholder, ``@{word}``, is replaced by the caller's text, which is not searched for
placeholders again, or else by the file of that name, with the same words. A file's first comment is
about the file and not part of the SQL.
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

    Raises FileNotFoundError for a placeholder that is neither a word nor a file.
    """

    def replacement(found: re.Match[str]) -> str:
        word = found[1]
        return words[word] if word in words else sql(word, **words)

    return _PLACEHOLDER.sub(replacement, _text(name))


@functools.cache
def _text(name: str) -> str:
    file = importlib.resources.files("proxy.extension") / "sql" / f"{name}.sql"
    return _OPENING.sub("", file.read_text("utf-8"))
