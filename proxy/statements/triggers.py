"""The words that a statement must mention to be of interest: to be read, served or changed."""

from __future__ import annotations

from typing import Final

FUNCTIONS: Final = b"pg_background"
"""In the name of each function and view, and of the extension."""

PG_EXTENSION: Final = b"pg_extension"
PG_STAT_ACTIVITY: Final = b"pg_stat_activity"
"""The catalogs that show the extension and its jobs."""

PG_PREPARED_STATEMENTS: Final = b"pg_prepared_statements"
PG_CURSORS: Final = b"pg_cursors"
"""The catalogs that show prepared statements and portals."""

_USE_NAMES: Final = (b"execute", b"fetch", b"move", PG_PREPARED_STATEMENTS, PG_CURSORS)
"""In SQL that uses a prepared statement or portal by its name, or shows it."""

_CHANGE_NAMES: Final = (b"deallocate", b"discard", b"prepare")
"""In SQL that makes prepared statements, or removes them."""


def may_be_ours(text: bytes) -> bool:
    """Whether SQL in lower case mentions one of them."""
    return FUNCTIONS in text or PG_EXTENSION in text or PG_STAT_ACTIVITY in text


def may_use_name(text: bytes) -> bool:
    """Whether SQL in lower case may use or show a prepared statement or portal by its name."""
    return any(word in text for word in _USE_NAMES)


def may_change_names(text: bytes) -> bool:
    """Whether SQL in lower case may make or remove a prepared statement."""
    return any(word in text for word in _CHANGE_NAMES)
