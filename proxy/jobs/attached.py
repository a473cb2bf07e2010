"""The jobs that a session is attached to, and the limits of its launches.

Invariant: these are only jobs that the session has launched and not yet fetched or detached. Those
of other sessions are in the `registry`, without output.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Final

from protocol.errors import INVALID_PARAMETER_VALUE, UNDEFINED_OBJECT, SQLError
from proxy.config.gucs import LAUNCH_TIMEOUT, MAX_WORKERS
from proxy.jobs.job import Job
from proxy.jobs.registry import NO_PID, JobRecord
from proxy.jobs.room import FullError, Line, WaitLimit

WAIT_FOR_ROOM: Final = f"set {LAUNCH_TIMEOUT.name} to wait for that"
"""Part of a HINT."""

MIN_QUEUE_SIZE: Final = 64
MAX_QUEUE_SIZE: Final = 256 * 1024 * 1024


@dataclass(slots=True)
class JobCounts:
    """How many jobs were launched, and how they ended."""

    launched: int = 0
    completed: int = 0
    failed: int = 0
    canceled: int = 0
    timed_out: int = 0
    total_ms: int = 0

    @property
    def active(self) -> int:
        """Number of jobs that have not ended."""
        return self.launched - self._ended

    @property
    def mean_ms(self) -> float:
        """Mean duration of jobs that have ended; 0 if there are none."""
        return self.total_ms / self._ended if self._ended else 0.0

    @property
    def _ended(self) -> int:
        return self.completed + self.failed + self.canceled

    def ended(self, job: Job) -> None:
        self.total_ms += job.elapsed_ms
        self.timed_out += job.timed_out
        if job.state == b"canceled":
            self.canceled += 1
        elif job.error is not None:
            self.failed += 1
        else:
            self.completed += 1


@dataclass(slots=True, eq=False)  # equal ones are still distinct
class Reservation:
    """Room for a launch, which counts among a session's running jobs until its job counts itself.

    Attributes:
        job: once it has begun.
    """

    job: Job | None = None


class Jobs:
    """The jobs that one session has launched and not yet fetched or detached."""

    MAX_ATTACHED: Final = 2_000
    """Limit while some have ended: the oldest of those, which nobody fetches, is detached."""

    def __init__(self) -> None:
        # By cookie.
        self._jobs: dict[int, Job] = {}
        # Those that have had a backend also by its pid, oldest first: a backend may run several
        self._of_pid: defaultdict[int, dict[int, Job]] = defaultdict(dict)
        self.counts = JobCounts()
        # All that have not ended, attached or not.
        self._all: set[Job] = set()
        self._reservations: list[Reservation] = []
        # Launches that wait for room, and queued ones, which count all jobs: independent lines.
        self._waiting = Line()
        self._queued = Line()

    def __iter__(self) -> Iterator[Job]:
        return iter(tuple(self._jobs.values()))

    def __contains__(self, job: JobRecord) -> bool:
        return self._jobs.get(job.cookie) is job

    @contextlib.asynccontextmanager
    async def room(
        self, max_workers: int, most: int, wait_limit: WaitLimit, *, count_all: bool = False
    ) -> AsyncIterator[Reservation]:
        """Room for one more job, as soon as the session's setting and the configuration allow.

        Args:
            max_workers: the setting.
            most: max_session_workers.
            wait_limit: how long to wait.
            count_all: whether jobs count that are no longer attached.

        Raises FullError if there is no room in time.
        """
        limit = min(max_workers, most)
        line = self._queued if count_all else self._waiting

        def is_full() -> bool:
            return self._running(count_all=count_all) >= limit

        if wait_limit.may_wait:
            with line.join(wait_limit.arrived) as place:
                while not place.is_first or is_full():
                    await wait_limit.wait(place, self._too_many(max_workers, most))
                reservation = self._reserve()
        elif line or is_full():
            raise self._too_many(max_workers, most)
        else:
            reservation = self._reserve()
        try:
            yield reservation
        finally:
            self._reservations.remove(reservation)
            self._changed()

    def _changed(self) -> None:
        self._waiting.changed()
        self._queued.changed()

    def _reserve(self) -> Reservation:
        reservation = Reservation()
        self._reservations.append(reservation)
        return reservation

    def _running(self, *, count_all: bool) -> int:
        jobs = self._all if count_all else self._jobs.values()
        running = sum(not (job.finished or job.is_waiting) for job in jobs)
        return running + sum(one.job is None for one in self._reservations)

    def _too_many(self, max_workers: int, most: int) -> FullError:
        number = self._running(count_all=False)
        workers = "worker" if number == 1 else "workers"
        running = f"This session runs {number} background {workers}, and"
        if most < max_workers:
            return FullError(
                detail=f"{running} the proxy allows {most} (max_session_workers), whatever"
                f" {MAX_WORKERS.name} is.",
                hint=f"Wait for some to finish, fetch or detach their results, or {WAIT_FOR_ROOM}.",
            )
        return FullError(
            detail=f"{running} {MAX_WORKERS.name} is {max_workers}.",
            hint="Wait for some to finish, fetch or detach their results, increase"
            f" {MAX_WORKERS.name}, or {WAIT_FOR_ROOM}.",
        )

    def add(self, job: Job) -> None:
        """Attach a job."""
        self._jobs[job.cookie] = job
        self._all.add(job)
        self.counts.launched += 1
        if not job.is_waiting:
            self.begun(job)
        if len(self._jobs) > self.MAX_ATTACHED:
            ended = next((job for job in self._jobs.values() if job.finished), None)
            if ended is not None:
                self.remove(ended)

    def begun(self, job: Job) -> None:
        """A job has got a backend; ignored if the session is done with it."""
        if job in self:
            self._of_pid[job.pid][job.cookie] = job

    def forget_pid(self, job: Job) -> None:
        """A job is about to lose its backend, which has not run it."""
        of_pid = self._of_pid.get(job.pid, {})
        of_pid.pop(job.cookie, None)
        if not of_pid:
            self._of_pid.pop(job.pid, None)

    def withdraw(self, job: Job) -> None:
        """Remove a job that was added, and has not run."""
        if job in self:
            self._forget(job)
        self.counts.launched -= 1
        self._all.discard(job)
        job.withdraw()

    def ended(self, job: Job) -> None:
        """A job that was added has ended."""
        self.counts.ended(job)
        self._all.discard(job)
        self._changed()

    def get(self, pid: int, cookie: int | None = None) -> Job:
        """The job with this pid and cookie, else the latest with this pid; without a pid, the job
        with this cookie. Raises SQLError 42704."""
        if pid == NO_PID and cookie is not None:
            if cookie in self._jobs:
                return self._jobs[cookie]
            raise SQLError(
                UNDEFINED_OBJECT,
                "no background worker has this cookie",
                hint="A job whose transaction was rolled back is not known any more.",
            )
        if pid not in self._of_pid:
            raise SQLError(UNDEFINED_OBJECT, f"PID {pid} is not attached to this session")
        latest = next(reversed(self._of_pid[pid].values()))
        return latest if cookie is None else self._of_pid[pid].get(cookie, latest)

    def remove(self, job: JobRecord) -> None:
        """The session is done with a job, which may run on. Jobs of other sessions are ignored."""
        if job in self:
            self._forget(job).detach()
            self._changed()

    def _forget(self, record: JobRecord) -> Job:
        job = self._jobs.pop(record.cookie)
        self.forget_pid(job)
        return job

    def clear(self) -> None:
        """Detach all jobs, since the session ends."""
        for job in self:
            self.remove(job)


def checked_queue_size(queue_size: int, default: int) -> int:
    """The queue size in bytes that a launch asks for; `default` if it is 0 or less.

    Raises SQLError 22023.
    """
    if queue_size <= 0:
        return default
    if queue_size < MIN_QUEUE_SIZE:
        raise SQLError(
            INVALID_PARAMETER_VALUE, f"queue size must be at least {MIN_QUEUE_SIZE} bytes"
        )
    if queue_size > MAX_QUEUE_SIZE:
        raise SQLError(
            INVALID_PARAMETER_VALUE, f"queue size must not exceed {MAX_QUEUE_SIZE} bytes"
        )
    return queue_size
