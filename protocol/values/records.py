"""Text and binary form of a composite value (manual, "Composite Type Input and Output Syntax").

Invariant: values are only put together here; they come in the form that is asked for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Final

_NEEDS_QUOTES: Final = re.compile(rb'[\s(),"\\]')


def record_text(values: Sequence[bytes | None]) -> bytes:
    """The text form, as record_out writes it: ``(1,,"a b")``; NULL is nothing at all."""
    return b"(" + b",".join(b"" if value is None else _quoted(value) for value in values) + b")"


def _quoted(value: bytes) -> bytes:
    if value and not _NEEDS_QUOTES.search(value):
        return value
    return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'""') + b'"'


def record_binary(values: Sequence[tuple[int, bytes | None]]) -> bytes:
    """The binary form, as record_send writes it.

    Args:
        values: for each column, the type's OID and the binary value; None is NULL.
    """
    parts = [struct.pack("!i", len(values))]
    for oid, value in values:
        parts.append(struct.pack("!Ii", oid, -1 if value is None else len(value)))
        if value is not None:
            parts.append(value)
    return b"".join(parts)


def parse_record(text: bytes) -> list[bytes | None]:
    """The values of a record in text form.

    Raises ValueError if the text is malformed.
    """
    if text[:1] != b"(" or text[-1:] != b")":
        raise ValueError("malformed record literal")
    values: list[bytes | None] = []
    value = bytearray()
    given = in_quotes = False
    position = 1
    end = len(text) - 1
    while position <= end:
        byte = text[position : position + 1]
        if position == end or (byte == b"," and not in_quotes):
            if in_quotes:
                raise ValueError("malformed record literal")
            values.append(bytes(value) if given or value else None)
            value.clear()
            given = False
        elif byte == b"\\":
            position += 1
            value += text[position : position + 1]
        elif byte == b'"':
            if in_quotes and text[position + 1 : position + 2] == b'"':
                value += byte
                position += 1
            else:
                in_quotes = not in_quotes
                given = True
        else:
            value += byte
        position += 1
    return values
