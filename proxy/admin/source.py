"""Where the figures and the jobs come from, be it one process or several.

Invariant: nothing above a `Source` knows which. `OneProcess` is the one of a process that serves
alone; `workers.overview` has the one of a supervisor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.admin.figures import collect
from proxy.admin.overview import Overview
from proxy.jobs.service import JobService
from proxy.runtime import Runtime
from proxy.stats import Figures


@dataclass(frozen=True, slots=True)
class Processes:
    """How many serve clients.

    Attributes:
        alive: those that are there.
        configured: how many there should be.
        silent: those that have not answered the last question.
        restarts: how often one has ended and was started again.
    """

    alive: int
    configured: int
    silent: int
    restarts: int


class Source(Protocol):
    """The proxy, seen from outside."""

    @property
    def runtime(self) -> Runtime:
        """What the configuration has been made into; another one after a reload."""

    @property
    def unready(self) -> str:
        """Why no client would be taken, whatever the server says; "" if one would."""

    async def figures(self) -> Figures:
        """As `figures.collect` has them, summed."""

    def processes(self) -> Processes:
        """How many there are."""

    async def jobs(self) -> list[dict[str, Any]]:
        """As `overview.Overview.show` has them, one for each process that has answered."""

    async def cancel(self, pid: int, cookie: int) -> bool:
        """Have the server stop a job; whether it was told."""


class OneProcess:
    """A process that serves alone.

    Args:
        jobs: its jobs.
        sessions: tells how many it has.
        stopping: tells whether it takes no more clients.
    """

    def __init__(
        self, jobs: JobService, sessions: Callable[[], int], stopping: Callable[[], bool]
    ) -> None:
        self._jobs = jobs
        self._sessions = sessions
        self._stopping = stopping
        self._overview = Overview(jobs)

    @property
    def runtime(self) -> Runtime:
        return self._jobs.runtime

    @property
    def unready(self) -> str:
        return "the proxy is shutting down" if self._stopping() else ""

    async def figures(self) -> Figures:
        return collect(self._jobs, self._sessions())

    def processes(self) -> Processes:
        return Processes(alive=1, configured=1, silent=0, restarts=0)

    async def jobs(self) -> list[dict[str, Any]]:
        return [await self._overview.show()]

    async def cancel(self, pid: int, cookie: int) -> bool:
        job = self._jobs.registry.get(pid, cookie)
        if job is None or job.finished:
            return False
        return await self._jobs.cancel(job)
