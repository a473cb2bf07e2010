"""Where messages begin and end in a stream of the wire protocol.

After startup, each message is a type byte, a four-byte length that counts itself, and the body
(manual: "Message Flow", "Message Formats"). Invariant: only those five bytes are read here. Bodies
are not decoded, and a length says how much to skip or await, never how much to allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct

from protocol.wire import ProtocolViolation

HEADER_SIZE = 5
"""Bytes of the type and the length word."""

unpack_length = Struct("!i").unpack_from
"""`unpack_length(data, offset)[0]` is the length word at that offset; it counts its own 4 bytes."""


def bad_length(kind: int, length: int) -> ProtocolViolation:
    """The error for an impossible length word: one below 4."""
    return ProtocolViolation(f"message of type {chr(kind)!r} has the impossible length {length}")


_AUTHENTICATION = ord("R")


def limit_before_login(kind: int) -> int:
    """The longest length word allowed before a server has proved its identity, as in libpq."""
    return 2000 if kind == _AUTHENTICATION else 30_000


# `skip_run`: how many headers are compared at once, and how many messages are then stepped over one
# by one if they were not alike: (at first, at most).
_COMPARED = (16, 1024)
_PAUSE = (4, 256)


def skip_run(data: bytes, position: int) -> tuple[int, int]:
    """Where the run of whole messages of one type at `position` ends, and how many there are.

    A message with an impossible length ends the run. Consecutive rows often have the same length:
    where two do, many headers are compared at once, as slices with that length as the step. If all
    are equal, messages begin there. (7 ns per message; 100 ns one by one.)
    """
    kind = data[position]
    end = len(data)
    last = end - HEADER_SIZE
    count = size = 0
    compared, _ = _COMPARED
    wait = pause = _PAUSE[0]
    while position <= last and data[position] == kind:
        length = unpack_length(data, position + 1)[0] + 1
        if length < HEADER_SIZE or position + length > end:
            break
        alike = 1
        if length != size:
            size = length
        elif wait:
            wait -= 1
        else:
            alike = min((end - position) // size, compared)
            stop = position + size * (alike - 1) + 1
            for index in range(HEADER_SIZE):
                column = data[position + index : stop + index : size]
                if column != data[position + index : position + index + 1] * alike:
                    compared = _COMPARED[0]
                    wait = pause = min(pause * 2, _PAUSE[1])
                    alike = 1
                    break
            else:
                compared = min(compared * 2, _COMPARED[1])
                pause = _PAUSE[0]
        position += size * alike
        count += alike
    return position, count


class MessageBuffer:
    """Collects chunks of a stream and returns whole messages.

    Its size is not bounded: the caller pauses the source when `len(buffer)` is large.

    Attributes:
        limit: returns the largest length word allowed for a message type; None: no limit.
    """

    __slots__ = ("_data", "_start", "limit")

    def __init__(self, data: bytes = b"") -> None:
        self._data = bytearray(data)
        self._start = 0
        self.limit: Callable[[int], int] | None = None

    def __len__(self) -> int:
        """Bytes held."""
        return len(self._data) - self._start

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add a chunk, which may end anywhere."""
        if self._start:
            del self._data[: self._start]
            self._start = 0
        self._data += data

    def next_message(self) -> tuple[int, bytes] | None:
        """The next whole message as (type, body); None if it is not complete yet.

        Raises ProtocolViolation for a length word under 4 or over the limit.
        """
        start = self._start
        if len(self._data) - start < HEADER_SIZE:
            return None
        (length,) = unpack_length(self._data, start + 1)
        if length < 4:
            raise bad_length(self._data[start], length)
        if self.limit is not None and length > self.limit(self._data[start]):
            raise ProtocolViolation(
                f"message of type {chr(self._data[start])!r} is too long at this time: {length}"
            )
        end = start + 1 + length
        if end > len(self._data):
            return None
        self._start = end
        return self._data[start], bytes(memoryview(self._data)[start + HEADER_SIZE : end])

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """All messages that are complete so far."""
        while (message := self.next_message()) is not None:
            yield message

    def take_rest(self) -> bytes:
        """The bytes not returned yet, after which the buffer is empty."""
        rest = bytes(memoryview(self._data)[self._start :])
        self._data.clear()
        self._start = 0
        return rest


class LongMessage:
    """A message that arrives in pieces; its beginning is kept, the rest only counted.

    Attributes:
        kind: its type.
        missing: bytes still to come.
        is_cut: whether `body` is incomplete.
    """

    __slots__ = ("_body", "_limit", "is_cut", "kind", "missing")

    def __init__(self, kind: int, size: int, limit: int) -> None:
        """`size` is that of the body; at most `limit` bytes of it are kept."""
        self.kind = kind
        self.missing = size
        self.is_cut = size > limit
        self._limit = limit
        self._body = bytearray()

    def feed(self, data: bytes | memoryview) -> int:
        """Add a chunk. Returns how many of its bytes belong to this message."""
        view = memoryview(data)[: self.missing]
        self.missing -= len(view)
        room = self._limit - len(self._body)
        if room > 0:
            self._body += view[:room]
        return len(view)

    @property
    def body(self) -> bytes:
        """The kept part of the body."""
        return bytes(self._body)


def frame(kind: int, body: bytes) -> bytes:
    """The message of this type and body."""
    return b"%c%b%b" % (kind, (len(body) + 4).to_bytes(4, "big"), body)
