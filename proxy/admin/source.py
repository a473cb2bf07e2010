"""Provides the figures and jobs of the proxy, whether it is one process or several.

Invariant: users of a `Source` cannot tell the difference. `OneProcess` is that of a single process,
`workers.all_workers` has that of a supervisor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.admin.figures import collect
from proxy.admin.jobs_page import JobsPage
from proxy.jobs.service import JobService
from proxy.runtime import Runtime
from proxy.stats import Figures


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that serve clients.

    Attributes:
        alive: number that exist.
        configured: number that should exist.
        silent: number that have not answered the last question.
        restarts: number of replacements so far.
    """

    alive: int
    configured: int
    silent: int
    restarts: int


class Source(Protocol):
    """The proxy, as seen by monitoring."""

    @property
    def runtime(self) -> Runtime:
        """The live objects made of the configuration; a reload replaces it."""

    @property
    def unready(self) -> str:
        """Why clients would be refused, whatever the server says; "" if they would not."""

    async def figures(self) -> Figures:
        """The sum of `figures.collect`."""

    def processes(self) -> Processes:
        """The processes that serve clients."""

    async def jobs(self) -> list[dict[str, Any]]:
        """`jobs_page.JobsPage.show` of each process that has answered."""

    async def cancel(self, pid: int, cookie: int) -> bool:
        """Have the server stop a job. Returns whether it was told."""


class OneProcess:
    """A single process.

    Args:
        jobs: its jobs.
        sessions: returns the number of its sessions.
        stopping: returns whether it accepts no more clients.
    """

    def __init__(
        self, jobs: JobService, sessions: Callable[[], int], stopping: Callable[[], bool]
    ) -> None:
        self._jobs = jobs
        self._sessions = sessions
        self._stopping = stopping
        self._jobs_page = JobsPage(jobs)

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
        return [await self._jobs_page.show()]

    async def cancel(self, pid: int, cookie: int) -> bool:
        job = self._jobs.registry.get(pid, cookie)
        if job is None or job.finished:
            return False
        return await self._jobs.cancel(job)
