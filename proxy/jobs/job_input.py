"""What a job's backend sends, taken apart into runs of rows and single messages.

Invariant: rows are not parsed and leave as they came, many whole messages at a time, a row longer
than one read in pieces. Of another message that is longer, at most `limit` bytes are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from protocol.errors import ProtocolViolation
from protocol.framing import HEADER_SIZE, LongMessage, bad_length, skip_run, unpack_length
from protocol.kinds import B
from proxy.backends.backend import READ_SIZE
from proxy.jobs.registry import cut_fields
from proxy.jobs.rows import Rows


class Message(NamedTuple):
    """A message that is no row."""

    kind: int
    body: bytes


class JobInput:
    """Takes one backend's stream apart.

    Attributes:
        missing: bytes that must arrive before the message that has begun is complete; 0 while it is
            passed on in pieces.
    """

    __slots__ = ("_encoding", "_limit", "_long", "_partial", "_rest_of_row", "missing")

    def __init__(self, limit: int, encoding: bytes) -> None:
        """
        Args:
            limit: bytes that are kept of an error or a notice.
            encoding: that they are cut in.
        """
        self._limit = limit
        self._encoding = encoding
        self.missing = 0
        # What is behind the last complete message; a long message; how much of a row is to come.
        self._partial = b""
        self._long: LongMessage | None = None
        self._rest_of_row = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing has arrived behind the last message but parts of a long one."""
        return not self._partial

    def read(self, arrived: memoryview) -> Iterator[Rows | Message]:
        """Rows and messages that are complete with these bytes. Not to be used again if the
        iteration was given up.

        Raises ProtocolViolation.
        """
        if self._long is not None:
            arrived = arrived[self._long.feed(arrived) :]
            self.missing = self._long.missing
            if self.missing:
                return
            long, self._long = self._long, None
            yield Message(long.kind, self._kept(long))
        data = self._partial + arrived
        size = len(data)
        position = min(self._rest_of_row, size)
        self._rest_of_row -= position
        if position:
            yield Rows(data[:position], 0, cut=self._rest_of_row > 0)
        # data[rows:position] are whole rows that were not yielded yet.
        rows, count = position, 0
        self.missing = 0
        while size - position >= HEADER_SIZE:
            kind = data[position]
            (length,) = unpack_length(data, position + 1)
            if length < 4:
                raise bad_length(kind, length)
            end = position + 1 + length
            if kind == B.DATA_ROW and end <= size:
                position, whole = skip_run(data, position)
                count += whole
                continue
            if count:
                yield Rows(data[rows:position], count)
            rows, count = position, 0
            if end > size:
                if end - position <= READ_SIZE:
                    self.missing = end - size
                elif kind == B.DATA_ROW:
                    yield Rows(data[position:], 1, cut=True)
                    self._rest_of_row = end - size
                    position = size
                else:
                    self._long = LongMessage(kind, length - 4, self._limit)
                    self._long.feed(memoryview(data)[position + HEADER_SIZE :])
                    self.missing = self._long.missing
                    position = size
                break
            self._partial = data[end:] if kind == B.READY_FOR_QUERY else b""
            yield Message(kind, data[position + HEADER_SIZE : end])
            rows = position = end
        if count:
            yield Rows(data[rows:position], count)
        self._partial = data[position:]

    def _kept(self, message: LongMessage) -> bytes:
        if not message.is_cut:
            return message.body
        if message.kind not in (B.ERROR_RESPONSE, B.NOTICE_RESPONSE):
            raise ProtocolViolation(f"message of type {chr(message.kind)!r} is too long")
        return cut_fields(message.body, self._encoding)
