"""Reads and writes the primitive types of the manual's "Message Data Types".

Invariant: message bytes are taken apart only here. Every read first checks that the body is long
enough, before anything is allocated, and raises only `ProtocolViolation`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_INT8 = struct.Struct(">B")
_INT16 = struct.Struct(">h")
_UINT16 = struct.Struct(">H")
_INT32 = struct.Struct(">i")
_UINT32 = struct.Struct(">I")


class ProtocolViolation(ValueError):  # noqa: N818 (the SQLSTATE's name)
    """The bytes received violate the protocol (SQLSTATE 08P01, protocol_violation).

    Malformed input raises no other exception.
    """


class Reader:
    """A cursor over the body of one message (what follows the length word).

    Every method raises `ProtocolViolation` when the body ends too early.
    """

    __slots__ = ("_at", "_body")

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self._body = bytes(body)
        self._at = 0

    @property
    def remaining(self) -> int:
        """How many bytes are left."""
        return len(self._body) - self._at

    def take(self, count: int) -> bytes:
        """Byte*n*: the next `count` bytes."""
        if not 0 <= count <= self.remaining:
            raise ProtocolViolation(f"a field of {count} bytes, but {self.remaining} are left")
        start = self._at
        self._at = start + count
        return self._body[start : self._at]

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(self.remaining)

    def byte(self) -> int:
        """Int8, or a Byte1 as its number."""
        return self.take(1)[0]

    def int16(self) -> int:
        return self._number(_INT16)

    def uint16(self) -> int:
        """An Int16 that PostgreSQL reads as unsigned, like all counts."""
        return self._number(_UINT16)

    def int32(self) -> int:
        return self._number(_INT32)

    def uint32(self) -> int:
        """An Int32 that PostgreSQL reads as unsigned, like an OID."""
        return self._number(_UINT32)

    def int16s(self) -> tuple[int, ...]:
        """A count, then as many Int16 (format codes)."""
        return self._numbers(self.uint16(), 2, "h")

    def uint32s(self) -> tuple[int, ...]:
        """A count, then as many unsigned Int32 (OIDs)."""
        return self._numbers(self.uint16(), 4, "I")

    def string(self) -> bytes:
        """A String: up to a NUL, which is consumed but not returned."""
        end = self._body.find(0, self._at)
        if end < 0:
            raise ProtocolViolation("a string without its terminating NUL")
        start = self._at
        self._at = end + 1
        return self._body[start:end]

    def value(self) -> bytes | None:
        """An Int32 length and that many bytes; length -1 is NULL, returned as None."""
        length = self.int32()
        return None if length == -1 else self.take(length)

    def values(self) -> tuple[bytes | None, ...]:
        """A count, then as many values."""
        count = self.uint16()
        if count * 4 > self.remaining:
            raise ProtocolViolation(f"{count} values cannot be in {self.remaining} bytes")
        # `value`, inlined: there are thousands of rows, and calls cost more than the work.
        body, at, size = self._body, self._at, len(self._body)
        found: list[bytes | None] = []
        for _ in range(count):
            start = at + 4
            if start > size:
                raise ProtocolViolation("the message ends inside a number")
            (length,) = _INT32.unpack_from(body, at)
            if length == -1:
                found.append(None)
                at = start
                continue
            at = start + length
            if not start <= at <= size:
                raise ProtocolViolation(f"a field of {length} bytes, but {size - start} are left")
            found.append(body[start:at])
        self._at = at
        return tuple(found)

    def end(self) -> None:
        """Check that the message ends here."""
        if self.remaining:
            raise ProtocolViolation(f"{self.remaining} bytes follow the end of the message")

    def _number(self, form: struct.Struct) -> int:
        number: int
        try:
            (number,) = form.unpack_from(self._body, self._at)
        except struct.error:
            raise ProtocolViolation("the message ends inside a number") from None
        self._at += form.size
        return number

    def _numbers(self, count: int, size: int, code: str) -> tuple[int, ...]:
        return struct.unpack(f">{count}{code}", self.take(count * size))


def int8(number: int) -> bytes:
    return _pack(_INT8, number)


def int16(number: int) -> bytes:
    return _pack(_INT16, number)


def uint16(number: int) -> bytes:
    return _pack(_UINT16, number)


def int32(number: int) -> bytes:
    return _pack(_INT32, number)


def uint32(number: int) -> bytes:
    return _pack(_UINT32, number)


def int16s(numbers: Sequence[int]) -> bytes:
    return uint16(len(numbers)) + b"".join([int16(number) for number in numbers])


def uint32s(numbers: Sequence[int]) -> bytes:
    return uint16(len(numbers)) + b"".join([uint32(number) for number in numbers])


def string(text: bytes) -> bytes:
    """The text and its NUL.

    Raises ValueError for a NUL inside, after which the rest would be read as the next field.
    """
    if 0 in text:
        raise ValueError("a string in a message cannot contain NUL")
    return text + b"\0"


def value(data: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if data is None else int32(len(data)) + data


def values(row: Sequence[bytes | None]) -> bytes:
    return uint16(len(row)) + b"".join([value(data) for data in row])


def _pack(form: struct.Struct, number: int) -> bytes:
    try:
        return form.pack(number)
    except struct.error as error:
        raise ValueError(f"a number does not fit its field: {error}") from None
