"""The words that make a statement interesting: it must be read, and may be served or changed."""

from __future__ import annotations

from typing import Final

FUNCTIONS: Final = b"pg_background"
"""Part of the name of each function and view, and of the extension."""

PG_EXTENSION: Final = b"pg_extension"
PG_STAT_ACTIVITY: Final = b"pg_stat_activity"
"""Catalogs that show the extension and its jobs."""

PG_PREPARED_STATEMENTS: Final = b"pg_prepared_statements"
PG_CURSORS: Final = b"pg_cursors"
"""Catalogs that show prepared statements and portals."""

_USE_NAMES: Final = (b"execute", b"fetch", b"move", PG_PREPARED_STATEMENTS, PG_CURSORS)
"""Words of SQL that uses or shows a prepared statement or portal by its name."""

_CHANGE_NAMES: Final = (b"deallocate", b"discard", b"prepare")
"""Words of SQL that creates or removes prepared statements."""


def may_be_ours(text: bytes) -> bool:
    """Whether lower-case SQL mentions us, or a catalog that shows us."""
    return FUNCTIONS in text or PG_EXTENSION in text or PG_STAT_ACTIVITY in text


def may_use_name(text: bytes) -> bool:
    """Whether lower-case SQL may use or show a prepared statement or portal by its name."""
    return any(word in text for word in _USE_NAMES)


def may_change_names(text: bytes) -> bool:
    """Whether lower-case SQL may create or remove a prepared statement."""
    return any(word in text for word in _CHANGE_NAMES)
