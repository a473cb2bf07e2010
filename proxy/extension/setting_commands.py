"""SET, RESET and ALTER … SET of the settings ``pg_background.*``.

To the server these are custom settings, whose values it can neither check nor format. So a value
is checked and put into the form of SHOW before the server gets it.

Invariant: a statement that is not recognised for certain, to its last token, gives None and goes to
the server unchanged. An invalid value is refused there, so that the transaction fails too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocol.errors import INVALID_NAME, INVALID_PARAMETER_VALUE, SQLError
from proxy.config.gucs import GUCS, Guc
from proxy.sql.lexer import RESERVED, Kind
from proxy.sql.text import do_block, literal, raise_block
from proxy.sql.tokens import NotRecognizedError, Tokens
from proxy.statements.plan import Substitute, substitute

_PREFIX: Final = "pg_background."
_RESERVED_PREFIXES: Final = 150000
"""The version from which on a library can reserve its prefix."""
_WORDS: Final = frozenset({"true", "false", "on"})
"""Reserved words that can be values."""
_OTHER_NUMBERS: Final = 160000
"""The version from which on 0x10, 0o20, 0b1 and 1_000 are numbers."""


def analyze(
    statement: Tokens, defaults: Mapping[str, str], *, server_version: int
) -> Substitute | None:
    """The substitute for a command about one of our settings; None for any other statement.

    Args:
        statement: one statement, as the session's server reads it.
        defaults: values of settings that nothing on the server has set.
        server_version: as server_version_num, e.g. 150004.
    """
    try:
        return _command(statement, defaults, server_version)
    except NotRecognizedError:
        return None


def _command(
    statement: Tokens, defaults: Mapping[str, str], server_version: int
) -> Substitute | None:
    first = statement.keyword(0)
    is_local = first == "set" and statement.keyword(1) == "local"
    at, tag = _before_name(statement)
    name, at = _name(statement, at)
    if name not in GUCS:
        if server_version < _RESERVED_PREFIXES:
            return None
        error = SQLError(
            INVALID_NAME,
            f'invalid configuration parameter name "{name}"',
            detail='"pg_background" is a reserved prefix.',
        )
        return substitute(statement.sql, raise_block(error), tag)
    if first == "reset":
        if at != statement.count:
            return None
        return substitute(statement.sql, _reset(name, defaults[name], is_local=False), tag)
    if statement.text(at) != b"=" and statement.keyword(at) != "to":
        return None
    at += 1
    if first == "set" and statement.keyword(at) == "default" and statement.count == at + 1:
        return substitute(statement.sql, _reset(name, defaults[name], is_local=is_local), tag)
    written = _value(statement, at, server_version)
    if written is None:
        return None
    try:
        shown = GUCS[name].show(written)
    except ValueError as error:
        return substitute(statement.sql, raise_block(_refusal(GUCS[name], error)), tag)
    if shown == written:
        return None
    start = statement.sql[: statement.start(at)]
    return substitute(statement.sql, start + literal(shown.encode()), tag)


def _reset(name: str, default: str, *, is_local: bool) -> bytes:
    """A block that resets a setting; to the proxy's default if nothing on the server sets it."""
    command = b"SET LOCAL %b TO DEFAULT" if is_local else b"RESET %b"
    return do_block(
        b"BEGIN " + command % name.encode() + b"; PERFORM pg_catalog.set_config(%b, %b, %b) WHERE"
        b" COALESCE(pg_catalog.current_setting(%b), '') OPERATOR(pg_catalog.=) ''; END"
        % (
            literal(name.encode()),
            literal(default.encode()),
            b"true" if is_local else b"false",
            literal(name.encode()),
        )
    )


def _before_name(statement: Tokens) -> tuple[int, bytes]:
    """The token where the setting's name begins, and the command tag."""
    first, second = statement.keyword(0), statement.keyword(1)
    if first == "reset":
        return 1, b"RESET"
    if first == "set":
        return (2 if second in ("session", "local") else 1), b"SET"
    if first != "alter":
        raise NotRecognizedError("another command")
    at = 2
    if second in ("role", "user"):
        in_database = statement.keyword(3) == "in" and statement.keyword(4) == "database"
        at, tag = (6 if in_database else 3), b"ALTER ROLE"
    elif second == "database":
        at, tag = 3, b"ALTER DATABASE"
    elif second == "system":
        tag = b"ALTER SYSTEM"
    else:
        raise NotRecognizedError("another ALTER")
    if statement.keyword(at) != "set":
        raise NotRecognizedError("ALTER of something else")
    return at + 1, tag


def _name(statement: Tokens, at: int) -> tuple[str, int]:
    """The setting with our prefix that is named there, and the index behind the name. Case does not
    matter, even in quotes, which may contain the dot."""
    parts = [statement.name(at)]
    at += 1
    while statement.text(at) == b".":
        parts.append(statement.name(at + 1))
        at += 2
    if None in parts:
        raise NotRecognizedError("not a name")
    name = b".".join(part or b"" for part in parts)
    if not name.isascii() or not name.lower().startswith(_PREFIX.encode()):
        raise NotRecognizedError("another setting")
    text = name.decode()
    return (text.lower() if text.lower() in GUCS else text), at


def _value(statement: Tokens, at: int, server_version: int) -> str | None:
    """The single constant or word that ends the statement, as the server stores it, else None."""
    text = statement.text(at)
    sign = b""
    if text in (b"+", b"-"):
        sign = text.removeprefix(b"+")
        at += 1
    if statement.count != at + 1 or statement.keyword(at) == "default":
        return None
    text, kind = statement.text(at), statement.tokens[at].kind
    if kind is Kind.NUMBER:
        return sign.decode() + _number(text.decode().lower(), server_version)
    if sign:
        return None
    if kind is Kind.STRING:
        return _string(text)
    if statement.keyword(at) in RESERVED - _WORDS:
        return None
    name = statement.name(at)
    return None if name is None else name.decode("ascii", "replace")


def _number(text: str, server_version: int) -> str:
    """A number as the server prints it: SQL integers are not octal."""
    if text[:2] in ("0x", "0o", "0b") or "_" in text:
        if server_version < _OTHER_NUMBERS:
            raise NotRecognizedError("no number to this server")
        text = text.replace("_", "")
        return str(int(text, 0)) if text[:1] == "0" and text[1:2].isalpha() else text
    return str(int(text)) if text.isdigit() else text


def _string(text: bytes) -> str | None:
    """The value of a string constant, with U+FFFD for non-ASCII, which no value has. None if that
    depends on settings, or is harder to read."""
    if text.startswith(b"$"):
        quote = text[: text.index(b"$", 1) + 1]
        return text[len(quote) : -len(quote)].decode("ascii", "replace")
    prefix, _, rest = text.partition(b"'")
    body = rest[:-1]
    if (
        prefix.lower() not in (b"", b"e", b"u&")
        or b"\\" in body
        or b"'" in body.replace(b"''", b"")
    ):
        return None
    return body.replace(b"''", b"'").decode("ascii", "replace")


def _refusal(guc: Guc, error: ValueError) -> SQLError:
    """The error in the server's words."""
    message, _, hint = str(error).partition("; ")
    if hint:
        hint = hint.replace("valid units are", "valid units for this parameter are")
        hint = f"{hint[0].upper()}{hint[1:]}."
    return SQLError(INVALID_PARAMETER_VALUE, message, hint=hint or None)
