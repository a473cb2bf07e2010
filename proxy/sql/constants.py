"""The values of string constants, and where each byte of them is in the text: for SQL within SQL.

Invariant: a constant is read as the server reads it, or not at all. Only ASCII bytes keep their
value: bytes of other characters are replaced by one that looks like nothing else.

Source: https://www.postgresql.org/docs/current/sql-syntax-lexical.html
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy.sql.lexer import CONTINUED, Kind, Token, mask, tokenize
from proxy.sql.tokens import Tokens

_OTHER: Final = b"\xff"
_READABLE: Final = bytes(range(0x80)) + 0x80 * _OTHER
_JUNCTION: Final = rb"'" + CONTINUED + rb"'"
_PLAIN: Final = re.compile(rb"''|" + _JUNCTION)
_ESCAPED: Final = re.compile(
    rb"''|" + _JUNCTION + rb"|\\(?:x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-7]{1,3}|.)",
    re.DOTALL,
)
_MAX_ESCAPES: Final = 20_000
"""Limit in one constant, doubled quotes included; beyond it the constant is not read."""
_LETTERS: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class _Part(NamedTuple):
    """A run of bytes in a constant's value, from ``offset`` on, and its place in the text,
    ``start`` to ``end``. The bytes of an escape stand for one."""

    offset: int
    start: int
    end: int
    is_escape: bool


@dataclass(frozen=True, slots=True)
class StringConstant:
    """A constant, read: its value.

    Attributes:
        text: its bytes.
        is_quoted: whether quotes within are doubled. Otherwise nothing within is changed, and the
            constant's own ``$tag$`` cannot occur.
    """

    text: bytes
    is_quoted: bool
    _parts: tuple[_Part, ...]
    _around: StringConstant | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Where ``text[start:end]``, not empty, is in the outermost text."""
        first, last = self._part(start), self._part(end - 1)
        begin = first.start if first.is_escape else first.start + start - first.offset
        stop = last.end if last.is_escape else last.start + end - last.offset
        return (begin, stop) if self._around is None else self._around.span(begin, stop)

    def _part(self, at: int) -> _Part:
        index = bisect.bisect_right(self._parts, at, key=lambda part: part.offset)
        return self._parts[index - 1]

    def tokens(self, *, standard_conforming_strings: bool) -> Tokens:
        """The value as SQL. Raises LexError, BudgetError."""
        tokens = tokenize(
            self.text, standard_conforming_strings=standard_conforming_strings, bounded=True
        )
        return Tokens(self.text, tokens, None)


def read(
    statement: Tokens,
    index: int,
    *,
    standard_conforming_strings: bool,
    around: StringConstant | None = None,
) -> StringConstant | None:
    """The value of a token; None if it is no string constant, U&'…', bits, or has many escapes.

    Args:
        statement: has the token.
        index: of the token.
        standard_conforming_strings: the session's setting.
        around: the constant whose value the statement is.
    """
    if not 0 <= index < statement.count:
        return None
    token = statement.tokens[index]
    if token.kind is not Kind.STRING:
        return None
    sql = mask(statement.sql[token.start : token.end], statement.encoding)
    prefix, _, _ = sql.partition(b"'") if sql[:1] != b"$" else (b"$", b"", b"")
    match prefix.lower():
        case b"$":
            size = sql.index(b"$", 1) + 1
            part = _Part(0, token.start + size, token.end - size, is_escape=False)
            return StringConstant(_readable(sql[size:-size]), False, (part,), around)
        case b"" | b"n":
            escapes = _PLAIN if standard_conforming_strings else _ESCAPED
        case b"e":
            escapes = _ESCAPED
        case _:
            return None
    return _unescaped(sql, token, len(prefix) + 1, escapes, around)


def _unescaped(
    sql: bytes, token: Token, start: int, escapes: re.Pattern[bytes], around: StringConstant | None
) -> StringConstant | None:
    value = bytearray()
    parts: list[_Part] = []
    done, end = start, len(sql) - 1

    def keep(until: int) -> None:
        if until > done:
            parts.append(
                _Part(len(value), token.start + done, token.start + until, is_escape=False)
            )
            value.extend(sql[done:until])

    for found in escapes.finditer(sql, start, end):
        keep(found.start())
        if len(parts) > _MAX_ESCAPES:
            return None
        done = found.end()
        if found[0] != b"''" and found[0][:1] == b"'":
            continue  # between two parts of a constant
        span = token.start + found.start(), token.start + done
        parts.append(_Part(len(value), *span, is_escape=True))
        value += _meant(found[0])
    keep(end)
    return StringConstant(
        _readable(bytes(value)), True, tuple(parts) or (_Part(0, 0, 0, False),), around
    )


def _meant(escape: bytes) -> bytes:
    """The byte that an escape stands for."""
    if escape == b"''":
        return b"'"
    letter = escape[1:2]
    if letter in _LETTERS:
        return _LETTERS[letter]
    if letter.isdigit() and letter < b"8":
        number = int(escape[1:], 8) & 0xFF
    elif len(escape) > 2:
        number = int(escape[2:].decode(), 16)
    else:
        return letter
    return bytes([number]) if 0 < number < 0x80 else _OTHER


def _readable(text: bytes) -> bytes:
    return text if text.isascii() else text.translate(_READABLE)
