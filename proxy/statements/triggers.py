"""The words that a statement must mention to be of interest: to be read, served or changed."""

from __future__ import annotations

from typing import Final

FUNCTIONS: Final = b"pg_background"
"""In the name of each function and view, and of the extension."""

PG_EXTENSION: Final = b"pg_extension"
PG_STAT_ACTIVITY: Final = b"pg_stat_activity"
"""The catalogs that show the extension and its jobs."""


def may_be_ours(text: bytes) -> bool:
    """Whether SQL in lower case mentions one of them."""
    return FUNCTIONS in text or PG_EXTENSION in text or PG_STAT_ACTIVITY in text
