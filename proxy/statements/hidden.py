"""Hidden names for stand-ins, and what the server has under the client's names.

Invariant: SQL that uses a client's name for a statement or portal never gets a stand-in's rows. The
stand-in has a hidden name. Under the client's name the server has the client's own text, if it has
the functions; otherwise a *guard*, which can only fail. So the server tells which names are taken,
closed or deallocated, to the protocol and to SQL, even in functions.

Only the protocol can use unnamed ones: a stand-in has no name if the client's has none.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from protocol.values import oids
from proxy.sql import text
from proxy.statements.by_name import Use

PREFIX: Final = "_pg_background_proxy."
"""Prefix of hidden names. The rest differs between sessions, so SQL cannot guess it."""

_HIDDEN: Final = re.compile(re.escape(PREFIX.encode()) + rb"[0-9a-f]{16}_\d+")

GUARD_COLUMN: Final = b"_pg_background_proxy_guard"
"""The only column of a portal's guard, which identifies it."""

TEXT: Final = "pg_background_text_"
TEXT_TAG: Final = f"[$]{TEXT}([0-9a-f]{{16}}_[0-9]+)[$]"
"""A regular expression for what encloses the client's text in a guard; the group in it, behind
`PREFIX`, is the stand-in's hidden name."""


class HiddenNames:
    """The hidden names of one session."""

    def __init__(self) -> None:
        self._prefix = f"{PREFIX}{secrets.token_hex(8)}_".encode()
        self._made = 0
        self._names: dict[bytes, bytes] = {}

    def new(self, name: bytes) -> bytes:
        """A hidden name for one of the client's."""
        self._made += 1
        hidden = self._prefix + b"%d" % self._made
        self._names[hidden] = name
        return hidden

    def forget(self, hidden: bytes) -> None:
        """The name is no longer used."""
        self._names.pop(hidden, None)

    def restored(self, message: bytes) -> bytes:
        """A message of the server, with the client's names."""
        if self._prefix not in message:
            return message
        return _HIDDEN.sub(lambda found: self._names.get(found[0], found[0]), message)


def statement_guard(
    name: bytes, hidden: bytes, sql: bytes, parameters: int
) -> tuple[bytes, tuple[int, ...]]:
    """The text of a statement's guard, which raises `Use.refusal`, and the types of its parameters.

    Args:
        name: of the statement.
        hidden: of its stand-in.
        sql: the client's text, to be shown in pg_prepared_statements.
        parameters: their number. They have type text, to which SQL converts anything.
    """
    shown = b" PERFORM " + _quoted(sql, hidden) + b";"
    guard = text.raise_block(Use(name, is_portal=False).refusal(), shown)
    return guard, (oids.TEXT,) * parameters


def portal_guard(name: bytes, hidden: bytes, sql: bytes) -> bytes:
    """The query of a portal's guard. SQL can FETCH only from the portal of a query, so the guard is
    a SELECT. It calls cursor_to_xml() on a cursor that does not exist, which raises 34000 with our
    text as the cursor's name.

    Args:
        name: of the portal.
        hidden: of its stand-in.
        sql: the client's text, to be shown in pg_cursors.
    """
    cursor = text.literal(name + b" (made by Bind, with a pg_background call)")
    return (
        b"SELECT pg_catalog.cursor_to_xml(CAST(%b AS pg_catalog.refcursor), 1, false, false, '')"
        b' AS "%b" WHERE %b IS NOT NULL'
    ) % (cursor, GUARD_COLUMN, _quoted(sql, hidden))


def _quoted(sql: bytes, hidden: bytes) -> bytes:
    """A text as a constant that nothing in it can end."""
    quote = b"$%b%b$" % (TEXT.encode(), hidden.removeprefix(PREFIX.encode()))
    return quote + sql + quote
