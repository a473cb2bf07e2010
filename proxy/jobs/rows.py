"""The output of a job that has not been fetched yet.

Invariant: it is bounded. When a queue holds `limit` bytes, or all queues of the process or the role
hold what they may, the job's backend is not read, and the server makes the job wait. So nothing is
lost; and no job waits for ever, since an empty queue is always filled.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proxy.net.inbox import Source

_READ_AT_ONCE: Final = 64 * 1024
_MIN_READ: Final = 8 * 1024
"""Limit of bytes that a queue reads at once where there is no room for more."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A piece of the result as received: whole DataRow messages, or part of a long one.

    `count` messages begin in it. `cut`: the last one continues in the next piece.
    """

    data: bytes
    count: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """The body of a NoticeResponse."""

    data: bytes


Output = Rows | Notice


class Budget:
    """A limit of bytes that several queues hold together.

    Attributes:
        limit: the limit; an empty queue may exceed it by what is read at once.
        held: bytes held now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        # Queues stopped by this limit, in that order.
        self._waiting: dict[OutputQueue, None] = {}

    @property
    def is_full(self) -> bool:
        return self.held >= self.limit

    def wait(self, queue: OutputQueue) -> None:
        """Have a queue continue when there is room."""
        self._waiting[queue] = None

    def forget(self, queue: OutputQueue) -> None:
        """The queue no longer waits."""
        self._waiting.pop(queue, None)

    def release(self, size: int) -> None:
        """These bytes are no longer held."""
        self.held -= size
        if not self._waiting or self.is_full:
            return
        for queue in tuple(self._waiting)[: 1 + (self.limit - self.held) // _READ_AT_ONCE]:
            del self._waiting[queue]
            queue.go_on()


class Budgets:
    """The budgets of a process: one for all queues, and one for those of each role."""

    def __init__(self, limit: int, role_limit: int) -> None:
        self._all = Budget(limit)
        self._role_limit = role_limit
        self._roles: weakref.WeakValueDictionary[bytes, Budget] = weakref.WeakValueDictionary()

    def change(self, limit: int, role_limit: int) -> None:
        """Set other limits."""
        self._all.limit, self._role_limit = limit, role_limit
        for budget in self._roles.values():
            budget.limit = role_limit

    def of_role(self, role: bytes) -> tuple[Budget, Budget]:
        """The budgets for a queue of this login role's job."""
        budget = self._roles.get(role)
        if budget is None:
            budget = self._roles[role] = Budget(self._role_limit)
        return self._all, budget


class OutputQueue:
    """A bounded queue of output, in order of arrival."""

    __slots__ = ("_budgets", "_dropping", "_held", "_items", "_limit", "_paused", "_source")

    def __init__(self, limit: int, budgets: Sequence[Budget] = ()) -> None:
        self._limit = limit
        self._budgets = budgets
        self._source: Source | None = None
        self._items: deque[Output] = deque()
        self._held = 0
        self._paused = False
        self._dropping = False

    @property
    def room(self) -> int | None:
        """Bytes until it is full; None if everything is dropped."""
        if self._dropping:
            return None
        left = (max(budget.limit - budget.held, _MIN_READ) for budget in self._budgets)
        return max(min(self._limit - self._held, *left, self._limit), 1)

    def put(self, output: Output) -> None:
        """Add a piece, or drop it."""
        if not self._dropping:
            self._items.append(output)
            self._held += len(output.data)
            for budget in self._budgets:
                budget.held += len(output.data)

    def read(self, source: Source) -> None:
        """Take input from this source from now on."""
        self._source = source
        self._paused = False

    def stop_if_full(self) -> None:
        """Stop the source if the queue is full; take() lets it continue."""
        if self._source is not None and not self._paused and self._must_wait():
            self._paused = True
            self._source.pause_reading()

    def _must_wait(self) -> bool:
        if self._held >= self._limit:
            return True
        full = [budget for budget in self._budgets if budget.is_full] if self._held else ()
        for budget in full:
            budget.wait(self)
        return bool(full)

    def go_on(self) -> None:
        """Read the source again if there is room."""
        if self._source is not None and self._paused and not self._must_wait():
            self._paused = False
            self._source.resume_reading()

    def take(self) -> Output | None:
        """Remove the oldest piece."""
        if not self._items:
            return None
        output = self._items.popleft()
        self._release(len(output.data))
        return output

    def take_notice(self) -> Notice | None:
        """Remove the oldest piece if it is a notice."""
        output = self._items[0] if self._items else None
        if not isinstance(output, Notice):
            return None
        self.take()
        return output

    def drop_cut_row(self) -> None:
        """Drop the pieces of a row whose rest will not come."""
        while self._items:
            piece = self._items[-1]
            if isinstance(piece, Notice) or not piece.cut:
                break
            self._items.pop()
            self._release(len(piece.data))

    def end(self) -> None:
        self._source = None
        for budget in self._budgets:
            budget.forget(self)

    def drop(self) -> None:
        """Drop all output, present and future."""
        self._dropping = True
        self._items.clear()
        self._release(self._held)

    def _release(self, size: int) -> None:
        self._held -= size
        self.go_on()
        for budget in self._budgets:
            budget.release(size)
