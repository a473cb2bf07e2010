"""Client encodings: PostgreSQL's names and Python's codecs.

Invariant: SQL and rows pass as bytes. A codec is needed only to count characters (an error's
position), for our own errors, and for texts of jobs that other sessions ask for (`recoding`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from protocol import values
from protocol.wire import ProtocolViolation
from proxy.sql.lexer import has_lookalikes, mask

CODECS: Final = {
    b"BIG5": "big5",
    b"EUC_CN": "gb2312",
    b"EUC_JIS_2004": "euc_jis_2004",
    b"EUC_JP": "euc_jp",
    b"EUC_KR": "euc_kr",
    b"GB18030": "gb18030",
    b"GBK": "gbk",
    b"JOHAB": "johab",
    b"KOI8R": "koi8_r",
    b"KOI8U": "koi8_u",
    b"LATIN5": "iso8859_9",
    b"LATIN6": "iso8859_10",
    b"LATIN7": "iso8859_13",
    b"LATIN8": "iso8859_14",
    b"LATIN9": "iso8859_15",
    b"LATIN10": "iso8859_16",
    b"SHIFT_JIS_2004": "shift_jis_2004",
    b"SJIS": "cp932",
    b"UHC": "cp949",
    b"UNICODE": "utf_8",  # as reported if set so
    b"UTF8": "utf_8",
    b"WIN866": "cp866",
    b"WIN874": "cp874",
    **{b"ISO_8859_%d" % part: f"iso8859_{part}" for part in range(5, 9)},
    **{b"LATIN%d" % part: f"iso8859_{part}" for part in range(1, 5)},
    **{b"WIN%d" % page: f"cp{page}" for page in range(1250, 1259)},
}

"""Without MULE_INTERNAL and EUC_TW, which Python lacks."""

NO_CONVERSION: Final = (b"", b"SQL_ASCII")
"""Encodings that nobody converts, not even the server."""


def codec(client_encoding: bytes) -> str:
    """The Python codec for a client_encoding; a single-byte one where Python has none."""
    return CODECS.get(client_encoding, "latin_1")


def position_codec(text: bytes, client_encoding: bytes, server_encoding: bytes) -> str | None:
    """The codec of the characters that the server counts in a text, which are those of its own
    encoding; None if they cannot be told."""
    if text.isascii() or b"SQL_ASCII" in (server_encoding, client_encoding):
        return codec(server_encoding)
    return CODECS.get(client_encoding)


def is_valid(text: bytes, codec: str) -> bool:
    """Whether these bytes are text in that codec."""
    try:
        text.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


_NAME_SIZE: Final = 63
_LONG_NAME: Final = 1024


def name_key(name: bytes, client_encoding: bytes, server_encoding: bytes) -> bytes:
    """What identifies a prepared statement or portal: the first 63 bytes of its name in the
    server's encoding, even if that cuts a character."""
    if not (
        name.isascii()
        or client_encoding == server_encoding
        or client_encoding in NO_CONVERSION
        or server_encoding in NO_CONVERSION
    ):
        # A name that cannot be converted is invalid, which the server will report.
        text = name.decode(codec(client_encoding), "replace")
        name = text.encode(codec(server_encoding), "replace")
    return name[:_NAME_SIZE]


def short_name(name: bytes, client_encoding: bytes) -> bytes:
    """A name of at most 63 characters for the same statement or portal: a Describe must not be
    longer than 10 kB, while a Parse may."""
    if len(name) <= _LONG_NAME:
        return name
    # Each character has at least one byte in the server.
    letters = name.decode(codec(client_encoding), "replace")[:_NAME_SIZE]
    return letters.encode(codec(client_encoding), "replace")


def parse_array(text: bytes, client_encoding: bytes) -> list[bytes | None]:
    """The elements of a one-dimensional text[], None for NULL; even if a byte of a multi-byte
    character looks like a quote or backslash."""
    return values.parse_array(text, mask(text, client_encoding.decode("ascii", "replace")))


_YIELD_AFTER: Final = 1024 * 1024
"""Bytes of an array that are read before others get a turn: 1 to 40 ms."""


def parse_array_in_turns(
    text: bytes, client_encoding: bytes
) -> Iterator[list[bytes | None] | None]:
    """`parse_array` for a text of any length: yields None when others may have a turn, and finally
    the elements. It is also much faster, unless a character may look like a quote or backslash:
    quoted elements are found and unescaped by searches and replacements."""
    encoding = client_encoding.decode("ascii", "replace")
    if (
        len(text) <= _YIELD_AFTER
        or b"\0" in text
        or (has_lookalikes(encoding) and not text.isascii())
    ):
        yield parse_array(text, client_encoding)
        return
    # The text with a number for each quoted element, and these elements.
    outside: list[bytes] = []
    quoted: list[bytes] = []
    inside: list[bytes] | None = None
    at = 0
    while at < len(text):
        window = text[at : at + _YIELD_AFTER]
        if (len(window) - len(window.rstrip(b"\\"))) % 2:
            window = text[
                at : at + _YIELD_AFTER + 1
            ]  # do not separate a backslash from what it escapes
        at += len(window)
        has_escapes = b"\\" in window
        hidden = window
        if has_escapes:
            hidden = window.replace(b"\\\\", b"\0\0").replace(b'\\"', b"\0\0")
        start = 0
        while True:
            quote = hidden.find(b'"', start)
            part = window[start : len(window) if quote < 0 else quote]
            if inside is None:
                outside.append(part)
            else:
                inside.append(_unescaped(part) if has_escapes else part)
            if quote < 0:
                break
            start = quote + 1
            if inside is None:
                inside = []
            else:
                outside.append(b'"\\"%d"' % len(quoted))
                quoted.append(b"".join(inside))
                inside = None
        yield None
    if inside is not None:
        raise ProtocolViolation("malformed array literal")
    elements = values.parse_array(b"".join(outside))
    if sum(element is not None and element[:1] == b'"' for element in elements) != len(quoted):
        yield parse_array(text, client_encoding)  # there is an escaped quote outside quotes
        return
    yield [
        quoted[int(element[1:])] if element is not None and element[:1] == b'"' else element
        for element in elements
    ]


def _unescaped(text: bytes) -> bytes:
    """The text without escaping backslashes. It contains no NUL."""
    return text.replace(b"\\\\", b"\0").replace(b"\\", b"").replace(b"\0", b"\\")


_PLAIN: Final = re.compile(rb"(?!null$)[^\s,{}\"\\\x0b]+", re.IGNORECASE)
_SPECIAL: Final = re.compile(rb'["\\]')


def array_text(values: Sequence[bytes | None], client_encoding: bytes) -> bytes:
    """The text of a text[] for PostgreSQL; the inverse of parse_array()."""
    return b"{" + b",".join([_element(value, client_encoding) for value in values]) + b"}"


def array_2_text(rows: Sequence[Sequence[bytes | None]], client_encoding: bytes) -> bytes:
    return b"{" + b",".join([array_text(row, client_encoding) for row in rows]) + b"}"


def _element(value: bytes | None, client_encoding: bytes) -> bytes:
    if value is None:
        return b"NULL"
    if _PLAIN.fullmatch(value):
        return value
    masked = mask(value, client_encoding.decode("ascii", "replace"))
    if masked == value:
        return b'"' + _SPECIAL.sub(rb"\\\g<0>", value) + b'"'
    parts: list[bytes] = []
    end = 0
    for special in _SPECIAL.finditer(masked):
        parts += [value[end : special.start()], b"\\"]
        end = special.start()
    return b'"' + b"".join([*parts, value[end:]]) + b'"'
