"""Where messages begin and end in a stream of the wire protocol.

Every message after the startup phase is one type byte, then a four-byte length that counts itself
and the body (manual: "Message Flow", "Message Formats"). Invariant: this file looks at those five
bytes only. It does not decode bodies, and a length field says how many bytes to skip or to wait
for, never how many to allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct

from protocol.wire import ProtocolViolation

HEADER_SIZE = 5
"""Bytes of the type and the length word."""

unpack_length = Struct("!i").unpack_from
"""`unpack_length(data, offset)[0]`: the length word at an offset, which counts its own 4 bytes."""


def bad_length(kind: int, length: int) -> ProtocolViolation:
    """The error for an impossible length word: it counts itself, so it is at least 4."""
    return ProtocolViolation(f"message of type {chr(kind)!r} has the impossible length {length}")


_AUTHENTICATION = ord("R")


def limit_before_login(kind: int) -> int:
    """The length word of the longest message that a server may send before the login is done:
    libpq's limits. Until then the server has not proved its identity, and needs no more."""
    return 2000 if kind == _AUTHENTICATION else 30_000


# How many headers `skip_run` compares at once, and how many messages it looks at one by one after
# headers that were not alike; each at first and at most.
_COMPARED = (16, 1024)
_PAUSE = (4, 256)


def skip_run(data: bytes, position: int) -> tuple[int, int]:
    """The end of the run of whole messages of one type that begins at `position`; their number.

    A message with an impossible length ends the run. Many rows in a row are often of one length:
    where a message is as long as the last, many headers are compared at once, as slices with that
    length for a step. If all are equal, the messages begin there. (7 ns a message, 100 one by one.)
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
    """Gathers chunks of a stream and hands out its messages whole.

    It holds what was fed and not yet taken. The caller bounds that by pausing its source when
    `len(buffer)` is large.

    Attributes:
        limit: gives the largest length word allowed for a message type; None for no limit.
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
        """Add a chunk, cut anywhere."""
        if self._start:
            del self._data[: self._start]
            self._start = 0
        self._data += data

    def next_message(self) -> tuple[int, bytes] | None:
        """The next whole message as (type, body); None until it has been fed.

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
        """All messages that are whole so far."""
        while (message := self.next_message()) is not None:
            yield message

    def take_rest(self) -> bytes:
        """The bytes not handed out yet; the buffer is empty afterwards."""
        rest = bytes(memoryview(self._data)[self._start :])
        self._data.clear()
        self._start = 0
        return rest


class LongMessage:
    """A message that comes in pieces, of which the beginning is kept, up to a limit.

    Bytes beyond the limit are counted and dropped as they come.

    Attributes:
        kind: its type.
        missing: bytes of it that are still to come.
        is_cut: whether `body` is only a part of it.
    """

    __slots__ = ("_body", "_limit", "is_cut", "kind", "missing")

    def __init__(self, kind: int, size: int, limit: int) -> None:
        """`size`: of its body; `limit`: how many bytes of it are kept."""
        self.kind = kind
        self.missing = size
        self.is_cut = size > limit
        self._limit = limit
        self._body = bytearray()

    def feed(self, data: bytes | memoryview) -> int:
        """Add a chunk. Returns how many bytes of it belong to this message."""
        view = memoryview(data)[: self.missing]
        self.missing -= len(view)
        room = self._limit - len(self._body)
        if room > 0:
            self._body += view[:room]
        return len(view)

    @property
    def body(self) -> bytes:
        """The part of its body that is kept."""
        return bytes(self._body)


def frame(kind: int, body: bytes) -> bytes:
    """The message of this type and body."""
    return b"%c%b%b" % (kind, (len(body) + 4).to_bytes(4, "big"), body)
