"""Where messages begin and end in a stream of the wire protocol.

Every message after the startup phase is one type byte, then a four-byte length that counts itself
and the body (manual: "Message Flow", "Message Formats"). The rule of this file: it looks at those
five bytes and at nothing else. Bodies are neither copied nor decoded, and a length field never
makes it allocate: it only says how many bytes will be skipped or waited for.
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
    """The error for a message whose length word cannot be: it counts itself, so 4 is the least."""
    return ProtocolViolation(f"message of type {chr(kind)!r} has the impossible length {length}")


_AUTHENTICATION = ord("R")


def limit_before_login(kind: int) -> int:
    """The longest message, by its length word, that is taken from a server before the login is
    done: libpq's limits. Nothing that it says then is long, and nobody knows yet who it is."""
    return 2000 if kind == _AUTHENTICATION else 30_000


# How many headers `skip_run` compares at once, at first and at most, and how many messages it looks
# at one by one when they were not alike, at first and at most.
_COMPARED = (16, 1024)
_PAUSE = (4, 256)


def skip_run(data: bytes, position: int) -> tuple[int, int]:
    """Where the whole messages end that begin at `position` and are all of one type; how many.

    One with an impossible length ends the run. Rows are often of one length for long: where a
    message is as long as the last, many headers are compared at once, as slices with that length
    for a step. If all are equal, then that is where the messages begin. (7 ns a message, 100 one
    by one.)
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

    For the side of a conversation that is read message by message. What it holds is what was fed
    and not yet taken: the caller bounds it by pausing its source (`len(buffer)`).

    Attributes:
        limit: gives the longest that a message of a type may be, by its length word; None: any.
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
        """The next whole message as (type, body), or None until more is fed.

        Raises ProtocolViolation for a length word under 4, or over the limit.
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
        """All messages that are whole by now."""
        while (message := self.next_message()) is not None:
            yield message

    def take_rest(self) -> bytes:
        """What has not been handed out; the buffer is empty afterwards."""
        rest = bytes(memoryview(self._data)[self._start :])
        self._data.clear()
        self._start = 0
        return rest


class LongMessage:
    """A message that comes in pieces and is kept from its beginning on, up to a limit.

    The limit is what bounds the memory: what is beyond it is counted and dropped as it comes.

    Attributes:
        kind: its type.
        missing: bytes of it that are still to come.
        is_cut: whether `body` is not all of it.
    """

    __slots__ = ("_body", "_limit", "is_cut", "kind", "missing")

    def __init__(self, kind: int, size: int, limit: int) -> None:
        """
        Args:
            kind: its type.
            size: of its body.
            limit: how many bytes of that are kept.
        """
        self.kind = kind
        self.missing = size
        self.is_cut = size > limit
        self._limit = limit
        self._body = bytearray()

    def feed(self, data: bytes | memoryview) -> int:
        """Add a chunk; how many bytes of it belong to this message."""
        view = memoryview(data)[: self.missing]
        self.missing -= len(view)
        room = self._limit - len(self._body)
        if room > 0:
            self._body += view[:room]
        return len(view)

    @property
    def body(self) -> bytes:
        """What is kept of its body."""
        return bytes(self._body)


def frame(kind: int, body: bytes) -> bytes:
    """A message put together again from its type and body."""
    return b"%c%b%b" % (kind, (len(body) + 4).to_bytes(4, "big"), body)
