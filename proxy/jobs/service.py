"""The jobs of this process, and what they run on: found, listed, cancelled, limited.

Invariant: a job is in the registry from its start until it is forgotten, also when its session has
ended; what sessions know of it they ask for here, and here the other processes are asked too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Final

from protocol.startup import CancelRequest
from proxy.backends.channels import Channels
from proxy.backends.route import Route
from proxy.backends.spares import DATABASE_COMMANDS, LONGEST_COMMAND, Spares
from proxy.jobs.job import Job
from proxy.jobs.peers import Peers
from proxy.jobs.registry import Handle, JobRecord, JobRegistry, RemoteJob
from proxy.jobs.rows import Budgets
from proxy.runtime import Runtime

_CANCEL_AGAIN: Final = 0.02
_CANCEL_SELDOM: Final = 1.0
"""Seconds between cancel requests to a job that goes on: the first time, and at most."""


class JobService:
    """
    Attributes:
        runtime: what the configuration has been made into; replaced by a reload.
        peers: the other processes.
        registry: the jobs of all sessions.
    """

    def __init__(self, runtime: Runtime, channel_setup: bytes, on_end: Callable[[], None]) -> None:
        """
        Args:
            runtime: what the configuration has been made into.
            channel_setup: SQL that each channel runs first.
            on_end: called when a job has ended.
        """
        config = runtime.config
        self.runtime = runtime
        self.peers = Peers()
        self.registry: JobRegistry[Job] = JobRegistry(
            config.outcome_retention, lambda role_id: self.peers.role_gone(role_id)
        )
        self.channels = Channels(config.spare_lifetime, channel_setup)
        self.spares = Spares(
            config.spares, config.spare_lifetime, self.channels, lambda: self.peers.give_way()
        )
        self.budgets = Budgets(config.queue_memory, config.role_queue_memory)
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()
        # Those of `cancel_statement`.
        self._cancels: set[asyncio.Task[None]] = set()

    def reload(self, runtime: Runtime) -> None:
        """Go by another configuration from now on."""
        config = runtime.config
        moved = config.upstream != self.runtime.config.upstream
        self.runtime = runtime
        if moved:
            self.spares.give_way()
        self.registry.retention = config.outcome_retention
        self.budgets.change(config.queue_memory, config.role_queue_memory)
        self.spares.count = config.spares
        self.spares.lifetime = self.channels.lifetime = config.spare_lifetime

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles whose jobs are known, here or elsewhere."""
        return self.registry.roles | self.peers.roles

    async def find(self, own: Iterable[Job], handles: Sequence[Handle]) -> list[JobRecord | None]:
        """Jobs by their handles: the caller's own, those of this process, those of the others.

        A caller's own are known to it until it detaches them.
        """
        here = {job.handle: job for job in own}
        found: dict[Handle, JobRecord | None] = {
            handle: here.get(handle) or self.registry.get(*handle) for handle in handles
        }
        if missing := [handle for handle, job in found.items() if job is None]:
            found |= await self.peers.find(missing)
        return [found[handle] for handle in handles]

    async def jobs_of(self, roles: Collection[int]) -> list[JobRecord]:
        """What is known of the jobs of these roles; and of all others of this process."""
        return [*self.registry, *await self.peers.jobs_of(roles)]

    def ended(self, job: Job) -> None:
        """Its backend is done."""
        self.registry.ended(job)
        self.peers.job_ended(job)
        self._on_end()

    def cancel(self, job: JobRecord) -> asyncio.Task[None]:
        """Tell the server to stop a job. The task ends when it was told once; it is told again
        until the job ends, since a backend that has only just got its query does not listen."""
        if isinstance(job, RemoteJob):
            return self._spawn(self.peers.cancel_job(job))
        assert isinstance(job, Job)
        job.canceled = True
        job.forget_output()
        told = self._spawn(self._tell(job))
        self._spawn(self._cancel_until_finished(job))
        return told

    def _tell(self, job: Job) -> Coroutine[object, object, None]:
        return self.runtime.dialer.cancel(job.route, job.cancel_request())

    async def _cancel_until_finished(self, job: Job) -> None:
        delay = _CANCEL_AGAIN
        while not job.finished:
            await asyncio.sleep(delay)
            if not job.finished:
                await self._tell(job)
            delay = min(delay * 2, _CANCEL_SELDOM)

    def limit(self, job: Job, timeout_ms: int) -> None:
        """Cancel a job that runs longer than that."""

        def time_out() -> None:
            if not job.finished:
                job.timed_out = True
                self.cancel(job)

        timer = asyncio.get_running_loop().call_later(timeout_ms / 1000, time_out)
        job.when_finished(timer.cancel)

    def cancel_statement(self, route: Route, key: CancelRequest) -> asyncio.Task[None]:
        """Tell the server to stop a statement that waits for an answer which will not come."""
        task = self._spawn(self.runtime.dialer.cancel(route, key))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)
        return task

    async def end_all(self) -> None:
        """Cancel the jobs that run, once, and let go of their backends."""
        jobs = tuple(self.registry.running)
        await asyncio.gather(*self._cancels, *map(self._tell, jobs))
        for job in jobs:
            job.abandon()

    def close(self) -> None:
        """Close what is idle."""
        self.spares.close()
        self.channels.give_way()

    def leave_databases(self, sql: bytes) -> None:
        """Close what waits in databases that a statement, in lower case, may be about to drop,
        rename or copy: the server waits 5 seconds for others to be gone, and then refuses."""
        if len(sql) <= LONGEST_COMMAND and any(verb in sql for verb in DATABASE_COMMANDS):
            self.spares.leave(sql)
            self.peers.leave_databases(sql)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
