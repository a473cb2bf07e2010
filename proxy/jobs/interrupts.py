"""The waits of calls in the proxy, and what ends them.

Invariant: what would end such a wait in the server ends it here: a cancel request, the session's
statement_timeout, the loss of the server, the client's leaving. The call fails with the server's
error, at the next possible point: never in the middle of a row that the client has got in part.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Final, Protocol, TypeVar

from protocol.errors import QUERY_CANCELED, SQLError
from proxy.jobs.registry import JobRecord

T = TypeVar("T")

VISIBLE_AFTER: Final = 0.1
"""Seconds that a call waits before the server is made to wait too."""


class ServerWait(Protocol):
    """Makes the server wait while a call does."""

    def may_wait_for(self, jobs: Collection[JobRecord]) -> bool:
        """Whether the server may wait for these jobs."""

    async def until(self, done: asyncio.Future[None]) -> None:
        """Wait in the server until `done`. Raises what has ended the call there."""


class Interrupts:
    """The waits of one batch, at most one at a time.

    Attributes:
        call_in_progress: a call, or what it needs, that cancel() would end.
        server_done: whether the server has done its part, so that only cancel() would end the call.
        row_is_partial: the client has got part of a row, and would read an error as the rest of it.
        client_ended: the client will send no more.
    """

    def __init__(self) -> None:
        self.call_in_progress = False
        self.server_done = False
        self.row_is_partial = False
        self.client_ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_jobs = False
        # An interrupt that arrived between two waits.
        self._interrupt: SQLError | None = None
        self._server_wait: ServerWait | None = None
        self._in_server: asyncio.Task[None] | None = None
        # Whether statement_timeout ends the present call.
        self._limited = False
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def calling(self, *, limited: bool) -> Iterator[None]:
        """A call is in progress: a cancel request ends it, and, if `limited`, statement_timeout."""
        self.call_in_progress = True
        self._limited = limited
        try:
            yield
        finally:
            self.call_in_progress = self.server_done = False
            self._interrupt = self._server_wait = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """A request of ours is in progress, without which the client's cannot be served: a cancel
        request ends that too, even if the server was idle when it came. Raises SQLError then."""
        was_in_progress, self.call_in_progress = self.call_in_progress, True
        try:
            yield
        finally:
            self.call_in_progress = was_in_progress
        self.check_for_interrupts()

    def wait_in_server(self, wait: ServerWait) -> None:
        """The server has done its part; from now on it waits when the call does."""
        self.server_done = True
        self._server_wait = wait

    @property
    def is_in_server(self) -> bool:
        """Whether the server waits too, where a cancel request takes effect."""
        return self._in_server is not None

    def start_timer(self, timeout_ms: int, *, limited: bool = False) -> None:
        """The session's statement_timeout is known; 0 is none. `limited`: it ends the call,
        whatever `calling` was told.
        """
        if (self._limited or limited) and timeout_ms and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(timeout_ms / 1000, self._time_out)

    def check_for_interrupts(self) -> None:
        """Raises the SQLError that has ended the call, if any."""
        if self._interrupt is not None and not self.row_is_partial:
            raise self._interrupt

    # Waits

    async def for_jobs(self, jobs: Sequence[JobRecord], until: float | None = None) -> None:
        """Wait until a job changes, or until this time of the loop's clock."""
        if self.client_ended:
            raise _client_gone()
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        timer = None if until is None else loop.call_at(until, _resolve, waiter)
        for job in jobs:
            job.add_waiter(waiter)
        self._waits_for_jobs = True
        try:
            await self._wait(waiter, jobs)
        finally:
            self._waits_for_jobs = False
            for job in jobs:
                job.remove_waiter(waiter)
            if timer is not None:
                timer.cancel()

    async def for_future(self, future: asyncio.Future[T], jobs: Collection[JobRecord] = ()) -> T:
        """Wait for a result, which may itself wait for the end of `jobs`."""
        waiter = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: _resolve(waiter))
        await self._wait(waiter, jobs)
        return future.result()

    @contextlib.contextmanager
    def for_room(self) -> Iterator[None]:
        """While entered, waits are for the end of other jobs."""
        self._waits_for_jobs = True
        if self.client_ended:
            self._fail(_client_gone())
        try:
            yield
        finally:
            self._waits_for_jobs = False

    async def _wait(self, waiter: asyncio.Future[None], jobs: Collection[JobRecord] = ()) -> None:
        self.check_for_interrupts()
        self._waiter = waiter
        timer = None
        if (wait := self._server_wait) is not None and not self.row_is_partial:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(VISIBLE_AFTER, self._wait_in_server, wait, waiter, jobs)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
            if self._in_server is not None:
                try:
                    await self._in_server
                except BaseException:
                    # The client has been told this error. During later waits, e.g. for the end of a
                    # job being cancelled, the server would not answer.
                    self._server_wait = None
                    raise
                finally:
                    self._in_server = None

    def _wait_in_server(
        self, wait: ServerWait, waiter: asyncio.Future[None], jobs: Collection[JobRecord]
    ) -> None:
        def end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                _resolve(waiter)

        if wait.may_wait_for(jobs):
            self._in_server = asyncio.ensure_future(wait.until(waiter))
            self._in_server.add_done_callback(end)

    # What ends them

    def cancel(self) -> None:
        """The client has sent a cancel request."""
        self._end(SQLError(QUERY_CANCELED, "canceling statement due to user request"))

    def _time_out(self) -> None:
        self._end(SQLError(QUERY_CANCELED, "canceling statement due to statement timeout"))

    def _end(self, error: SQLError) -> None:
        self._interrupt = error
        if not self.row_is_partial:
            self._fail(error)

    def end_client(self, *, reads: bool) -> None:
        """The client will send no more: no job is awaited, since most probably nobody is there to
        read its result. `reads`: whether the client reads what is sent."""
        self.client_ended = True
        if reads and self._waits_for_jobs:
            self._fail(_client_gone())

    def client_hung_up(self) -> None:
        """The client has left behind unread messages, to be served without awaiting jobs."""
        if self._waits_for_jobs:
            self._fail(_client_gone())

    def _fail(self, error: Exception) -> None:
        """End the wait, if there is one, with this error."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


def _client_gone() -> ConnectionError:
    return ConnectionError("the client has closed the connection")


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
