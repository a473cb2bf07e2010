"""The output of a job that nobody has taken yet.

The rule: it is bounded. When as much as `limit` bytes is held, the job's backend is not read any
more, and the server makes the job wait.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from proxy.net.inbox import Source


@dataclass(frozen=True, slots=True)
class Rows:
    """A piece of the result as it came: whole DataRow messages; or a part of a long one.

    `count` messages begin in it. `cut`: the last one goes on in the next piece.
    """

    data: bytes
    count: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """The body of a NoticeResponse."""

    data: bytes


Output = Rows | Notice


class OutputQueue:
    """A bounded queue of output, in the order in which it came."""

    __slots__ = ("_dropping", "_held", "_items", "_limit", "_paused", "_source")

    def __init__(self, limit: int, source: Source) -> None:
        self._limit = limit
        self._source: Source | None = source
        self._items: deque[Output] = deque()
        self._held = 0
        self._paused = False
        self._dropping = False

    @property
    def room(self) -> int | None:
        """Bytes until it is full; None if all is dropped."""
        return None if self._dropping else max(self._limit - self._held, 1)

    def put(self, output: Output) -> None:
        """Add a piece, or drop it."""
        if not self._dropping:
            self._items.append(output)
            self._held += len(output.data)

    def stop_if_full(self) -> None:
        """Stop the source when the queue is full; take() lets it go on."""
        if self._source is not None and self._held >= self._limit and not self._paused:
            self._paused = True
            self._source.pause_reading()

    def take(self) -> Output | None:
        """The oldest piece."""
        if not self._items:
            return None
        output = self._items.popleft()
        self._release(len(output.data))
        return output

    def take_notice(self) -> Notice | None:
        """The oldest piece if it is a notice."""
        output = self._items[0] if self._items else None
        if not isinstance(output, Notice):
            return None
        self.take()
        return output

    def drop_cut_row(self) -> None:
        """Forget the pieces of a row whose rest will not come."""
        while self._items:
            piece = self._items[-1]
            if isinstance(piece, Notice) or not piece.cut:
                break
            self._items.pop()
            self._release(len(piece.data))

    def end(self) -> None:
        """The source has ended."""
        self._source = None

    def drop(self) -> None:
        """Drop what is here, and from now on what comes."""
        self._dropping = True
        self._items.clear()
        self._release(self._held)

    def _release(self, size: int) -> None:
        self._held -= size
        if self._source is not None and self._paused and self._held < self._limit:
            self._paused = False
            self._source.resume_reading()
