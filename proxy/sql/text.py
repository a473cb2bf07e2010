"""SQL that the proxy writes itself, in addition to its queries.

Invariant: it is right in any session. Names are schema-qualified, and constants mean the same
whatever standard_conforming_strings and the client encoding are.
"""

from __future__ import annotations

import secrets

from protocol.errors import SQLError

EXECUTOR_ROLE = "pgbackground_role"
"""Members of this role may call the functions; superusers need no membership."""


def literal(text: bytes) -> bytes:
    """A string constant; for non-ASCII text an expression, since a quote or backslash may be part
    of another character (in SJIS, BIG5, GBK and others)."""
    if not text.isascii():
        return (
            b"pg_catalog.convert_from(pg_catalog.decode('%b', 'hex'),"
            b" pg_catalog.current_setting('client_encoding'))" % text.hex().encode()
        )
    quoted = text.replace(b"'", b"''")
    if b"\\" in text:
        return b" E'" + quoted.replace(b"\\", b"\\\\") + b"'"
    return b"'" + quoted + b"'"


def _ascii(text: str) -> bytes:
    return literal(text.replace("\0", "?").encode("ascii", "replace"))


def do_block(body: bytes) -> bytes:
    """A DO statement with an unguessable quote, which therefore is not in the body."""
    quote = b"$pg_background_%b$" % secrets.token_hex(8).encode()
    return b"DO LANGUAGE plpgsql " + quote + body + quote


def raise_block(error: SQLError, behind: bytes = b"") -> bytes:
    """Raises an error of ours in the server, so that the transaction fails and the log says why.

    Non-ASCII characters are replaced: the client gets the error from the proxy, in its encoding.
    `behind`: statements that are not executed.
    """
    options = {
        b"ERRCODE": error.sqlstate,
        b"MESSAGE": error.message,
        b"DETAIL": error.detail,
        b"HINT": error.hint,
    }
    using = [b"%b = %b" % (name, _ascii(text)) for name, text in options.items() if text]
    return do_block(b"BEGIN RAISE EXCEPTION USING " + b", ".join(using) + b";" + behind + b" END")
