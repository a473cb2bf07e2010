"""Jobs that were queued on submission, since there was no room.

Invariant: the queue is in memory only. Number of jobs and size of SQL are limited for each role,
and count until a job has been launched or will not be.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from typing import Final

from protocol.errors import CONFIGURATION_LIMIT_EXCEEDED, INTERNAL_ERROR, SQLError
from proxy.config import Config
from proxy.jobs.job import Job
from proxy.log import logger

_KEPT_BESIDE: Final = 16 * 1024
"""Approximate bytes that a queued job takes besides its SQL, for the settings of its session."""


class JobQueue:
    """The queued jobs of all sessions of this process."""

    def __init__(self, config: Config) -> None:
        """`config`: has the limits; a reload replaces it."""
        self.config = config
        self._numbers: Counter[bytes] = Counter()
        self._sizes: Counter[bytes] = Counter()
        self._tasks: set[asyncio.Future[None]] = set()

    def check(self, role: bytes, size: int) -> None:
        """Raises SQLError 53400 if a login role may not queue another job with this much SQL."""
        config, size = self.config, size + _KEPT_BESIDE
        name = f'role "{role.decode("utf-8", "replace")}"'
        if self._numbers[role] >= config.max_queued_jobs:
            detail = (
                f"{self._numbers[role]} jobs of {name} are queued, and max_queued_jobs is"
                f" {config.max_queued_jobs}."
            )
        elif self._sizes[role] + size > config.role_queue_memory:
            detail = f"The queued jobs of {name} would take more memory than role_queue_memory."
        elif sum(self._sizes.values()) + size > config.queue_memory:
            detail = "All queued jobs together would take more memory than queue_memory."
        else:
            return
        raise SQLError(
            CONFIGURATION_LIMIT_EXCEEDED,
            "too many queued background workers",
            detail=detail,
            hint="Wait for some to run, or cancel some.",
        )

    def add(self, job: Job, size: int, launch: Awaitable[None]) -> None:
        """Queue a job whose SQL has `size` bytes. `launch`: waits for room."""
        self._count(job.user, 1, size)
        task = asyncio.ensure_future(launch)
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._left(task, job, size))

    def _left(self, task: asyncio.Future[None], job: Job, size: int) -> None:
        self._tasks.discard(task)
        self._count(job.user, -1, size)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("internal error; a queued job does not run", exc_info=error)
            job.end_with(SQLError(INTERNAL_ERROR, "internal error of the proxy").response())

    def _count(self, role: bytes, number: int, size: int) -> None:
        for counted, amount in ((self._numbers, 1), (self._sizes, size + _KEPT_BESIDE)):
            counted[role] += number * amount
            if not counted[role]:
                del counted[role]
