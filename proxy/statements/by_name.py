"""SQL that uses, by name, a prepared statement or portal made by the protocol.

Invariant: for one with a call, the server has the stand-in. Only the proxy makes the call, and only
for the protocol's Execute; so SQL must not use it, or it would see the stand-in.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from protocol.errors import FEATURE_NOT_SUPPORTED, SQLError
from proxy.sql.tokens import NotRecognizedError, Tokens

_PORTAL: Final = ("fetch", "move")
_STATEMENT: Final = ("execute", "explain", "create")


class Use(NamedTuple):
    """A name that is used: a portal's or a prepared statement's."""

    name: bytes
    is_portal: bool

    def refusal(self) -> SQLError:
        name = self.name.decode("utf-8", "replace")
        what, use, other = (
            ("portal", "fetched from", "DECLARE")
            if self.is_portal
            else ("prepared statement", "executed", "PREPARE")
        )
        return SQLError(
            FEATURE_NOT_SUPPORTED,
            f'{what} "{name}" cannot be {use} by SQL',
            detail="It was made by a message of the protocol, and calls a pg_background function:"
            " the proxy makes the call when a message of the protocol executes it.",
            hint="Execute it by the protocol; or make it by SQL, in a database with the"
            f" extension: CREATE EXTENSION pg_background, then {other}.",
        )


def used(statement: Tokens) -> Use | None:
    """The name that EXECUTE (also in EXPLAIN, CREATE TABLE AS), FETCH or MOVE uses, or None."""
    try:
        return _used(statement)
    except NotRecognizedError:
        return None


def _used(statement: Tokens) -> Use | None:
    first = statement.keyword(0)
    if first in _PORTAL:
        name = statement.name(statement.count - 1)
        return None if name is None else Use(name, is_portal=True)
    if first in _STATEMENT:
        for at in statement.outermost():
            if statement.keyword(at) == "execute":
                name = statement.name(at + 1)
                return None if name is None else Use(name, is_portal=False)
    return None
