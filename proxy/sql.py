"""SQL that the proxy writes itself, beside its queries.

The rule: it is right in any session. Names are schema-qualified, and constants are written so that
neither standard_conforming_strings nor the client encoding changes what they say.
"""

from __future__ import annotations

import secrets

from protocol.errors import SQLError

EXECUTOR_ROLE = "pgbackground_role"
"""Members of this role may call the functions. Superusers need no membership."""


def literal(text: bytes) -> bytes:
    """A string constant; for text that is not ASCII an expression, since a quote or a backslash may
    be a part of another character (in SJIS, BIG5, GBK and others)."""
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


def _do(body: bytes) -> bytes:
    """A DO statement; the quote cannot be in the body, because nobody can guess it."""
    quote = b"$pg_background_%b$" % secrets.token_hex(8).encode()
    return b"DO LANGUAGE plpgsql " + quote + body + quote


def raise_block(error: SQLError) -> bytes:
    """Fails with an error of ours, so that the transaction fails and the server's log tells why.

    What is not ASCII is replaced: the client gets the error from the proxy, in its own encoding.
    """
    options = {
        b"ERRCODE": error.sqlstate,
        b"MESSAGE": error.message,
        b"DETAIL": error.detail,
        b"HINT": error.hint,
    }
    using = [b"%b = %b" % (name, _ascii(text)) for name, text in options.items() if text]
    return _do(b"BEGIN RAISE EXCEPTION USING " + b", ".join(using) + b"; END")


def privileges_block(verb: str, role: bytes, marker: str, *, print_commands: bool) -> bytes:
    """Lets a role call the functions, or no longer.

    That it went well is said by an INFO message, the marker. What went wrong is a NOTICE.

    Args:
        verb: GRANT or REVOKE.
        role: its name, in the client's encoding.
        marker: a random word.
        print_commands: whether each command is printed as INFO.
    """
    executor = EXECUTOR_ROLE.encode()
    granting = verb == "GRANT"
    template = literal(
        b"GRANT %b TO %%I" % executor if granting else b"REVOKE %b FROM %%I" % executor
    )
    failure = (
        b"Error granting pg_background privileges to"
        if granting
        else b"Error revoking pg_background privileges from"
    )
    show = b"RAISE INFO 'Executed command: %', command; " if print_commands else b""
    create = (
        b"IF NOT EXISTS(SELECT 1 FROM pg_catalog.pg_roles"
        b" WHERE rolname OPERATOR(pg_catalog.=) %b) THEN command := 'CREATE ROLE %b NOLOGIN';"
        b" EXECUTE command; %b END IF; " % (literal(executor), executor, show)
    )
    return _do(
        b"DECLARE command pg_catalog.text; grantee pg_catalog.text := %b; BEGIN %b"
        b"command := pg_catalog.format(%b, grantee); EXECUTE command; %b"
        b"RAISE INFO %b; "
        b"EXCEPTION WHEN OTHERS THEN RAISE NOTICE '%b %%: %%', grantee, SQLERRM; END"
        % (
            literal(role),
            create if granting else b"",
            template,
            show,
            _ascii(marker),
            failure,
        )
    )


def drop_role_block(marker: str) -> bytes:
    """Drops the role whose members may call the functions; says how it went as they do."""
    role = EXECUTOR_ROLE.encode()
    return _do(
        b"BEGIN EXECUTE 'DROP ROLE %b'; RAISE INFO %b; EXCEPTION WHEN OTHERS THEN"
        b" RAISE NOTICE 'Error dropping role %b: %%', SQLERRM; END" % (role, _ascii(marker), role)
    )
