"""Room for a job, and the launches that wait for it.

Invariant: launches that wait for the same room wait in order of arrival, and only the first in line
tries. One that does not wait overtakes none that do. Whoever leaves a line, for whatever reason,
wakes the next. No launch holds one kind of room for longer than a try while it waits for another.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import operator
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Protocol, TypeVar

from protocol.errors import CONFIGURATION_LIMIT_EXCEEDED, SQLError
from proxy.backends.backend import NoRoomError
from proxy.backends.identity import Login

T = TypeVar("T")

Waiting = Callable[[], contextlib.AbstractContextManager[object]]
"""Entered while a launch waits."""

FOR_EVER: Final = float("inf")

_LOOK_INTERVAL: Final = 0.05
_LOOK_MAX_INTERVAL: Final = 0.5
"""Seconds until the first in line asks the server again: at first, and at most. The server does not
tell when it has room; when one of our connections ends, it is asked at once."""


class FullError(SQLError):
    """As many jobs run as are allowed."""

    def __init__(self, *, detail: str, hint: str) -> None:
        message = "too many background workers"
        super().__init__(CONFIGURATION_LIMIT_EXCEEDED, message, detail=detail, hint=hint)


class Changing(Protocol):
    """Something to wait for."""

    async def changed(self) -> None:
        """Wait until there is a reason to try again."""


class WaitLimit:
    """How long one launch waits for room.

    Args:
        seconds: from now on; 0 for no wait; FOR_EVER.
        waiting: entered while it waits.
        earlier: the limit of an earlier wait of the same launch, whose time of arrival counts.

    Attributes:
        may_wait: whether it waits at all.
        arrived: its time of arrival, by the system's monotonic clock, which processes share.
        waited: seconds, so far.
    """

    def __init__(
        self,
        seconds: float,
        waiting: Waiting = contextlib.nullcontext,
        earlier: WaitLimit | None = None,
    ) -> None:
        self.may_wait = seconds > 0
        self.arrived: float = time.monotonic() if earlier is None else earlier.arrived
        self.waited = 0.0
        self._until = asyncio.get_running_loop().time() + seconds
        self._waiting = waiting

    async def wait(self, place: Changing, error: SQLError, at_most: float = FOR_EVER) -> None:
        """Wait for a reason to try again, at most `at_most` seconds.

        Raises `error` when the launch's time is over.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = self._until - began
        if left <= 0:
            raise error.with_traceback(None)
        try:
            with self._waiting(), contextlib.suppress(TimeoutError):
                left = min(left, at_most)
                async with asyncio.timeout(None if left == FOR_EVER else left):
                    await place.changed()
        finally:
            self.waited += loop.time() - began


class Place:
    """The place of one launch in a `Line`."""

    def __init__(self, line: Line, arrived: float) -> None:
        self.arrived = arrived
        self._line = line
        self._woken = asyncio.Event()

    @property
    def is_first(self) -> bool:
        """Whether this launch may try."""
        return self._line.first is self

    def wake(self) -> None:
        """Have the launch try again."""
        self._woken.set()

    async def changed(self) -> None:
        """Wait until woken, if that has not happened since the last wait."""
        await self._woken.wait()
        self._woken.clear()


class Line:
    """Launches that wait for the same room, in order of arrival."""

    def __init__(self) -> None:
        self._places: list[Place] = []

    @property
    def first(self) -> Place | None:
        """The launch that may try."""
        return self._places[0] if self._places else None

    def __len__(self) -> int:
        return len(self._places)

    @contextlib.contextmanager
    def join(self, arrived: float) -> Iterator[Place]:
        """A place by time of arrival, given up on exit."""
        place = Place(self, arrived)
        bisect.insort(self._places, place, key=operator.attrgetter("arrived"))
        try:
            yield place
        finally:
            self._places.remove(place)
            self.changed()

    def changed(self) -> None:
        """There may be room now: wake the first."""
        if self._places:
            self._places[0].wake()


class _ServerLine(Line):
    """`error`: the server's last refusal."""

    def __init__(self, error: NoRoomError) -> None:
        super().__init__()
        self.error = error


class ServerRoom:
    """Launches for which the server has no connection, in one line for each login: roles and
    databases may have limits of their own."""

    def __init__(self) -> None:
        self._lines: dict[Login, _ServerLine] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def changed(self) -> None:
        """A connection was closed."""
        for line in self._lines.values():
            line.changed()

    async def launch(
        self, login: Login, launch: Callable[[], Awaitable[T]], wait_limit: WaitLimit
    ) -> T:
        """Call `launch` until it no longer raises NoRoomError. Returns its result.

        Raises SQLError.
        """
        line = self._lines.get(login)
        if line is None:
            try:
                return await launch()
            except NoRoomError as error:
                if not wait_limit.may_wait:
                    raise
                line = self._lines.setdefault(login, _ServerLine(error))
        elif not wait_limit.may_wait:
            raise line.error.with_traceback(None)
        try:
            with line.join(wait_limit.arrived) as place:
                return await self._first_in(line, place, launch, wait_limit)
        finally:
            if not line and self._lines.get(login) is line:
                del self._lines[login]

    async def _first_in(
        self,
        line: _ServerLine,
        place: Place,
        launch: Callable[[], Awaitable[T]],
        wait_limit: WaitLimit,
    ) -> T:
        delay = _LOOK_INTERVAL
        while True:
            if not place.is_first:
                await wait_limit.wait(place, line.error)
                continue
            try:
                return await launch()
            except NoRoomError as error:
                line.error = error
            await wait_limit.wait(place, line.error, delay)
            delay = min(2 * delay, _LOOK_MAX_INTERVAL)
