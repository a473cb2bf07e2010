"""The jobs of this process: finds, lists, cancels and limits them.

Invariant: a job is in the registry from its start until it is forgotten, even after its session has
ended. Sessions ask about jobs here, and this asks the other processes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, Final, TypeVar

from protocol.errors import ProtocolViolation, SQLError
from protocol.startup import CancelRequest
from proxy.backends.channels import Channel, Channels
from proxy.backends.route import Route
from proxy.backends.spares import DATABASE_COMMANDS, LONGEST_COMMAND, Spares, is_named
from proxy.jobs.at_commit import PendingJobs
from proxy.jobs.attached import JobCounts
from proxy.jobs.history import History
from proxy.jobs.job import Job
from proxy.jobs.peers import Peers
from proxy.jobs.queue import JobQueue
from proxy.jobs.registry import Handle, JobRecord, JobRegistry, RemoteJob
from proxy.jobs.room import ServerRoom
from proxy.jobs.rows import Budgets
from proxy.jobs.slots import Limits, OwnSlots, SlotSource
from proxy.jobs.termination import Termination, canceled
from proxy.log import logger
from proxy.reasons import explain
from proxy.runtime import Runtime

T = TypeVar("T")

_MAX_DATABASES: Final = 1_000
"""Limit of databases whose jobs are counted separately."""

_CANCEL_INTERVAL: Final = 0.02
_CANCEL_MAX_INTERVAL: Final = 1.0
"""Seconds between cancel requests to a job that goes on: at first, and at most."""

_MAX_TERMINATIONS: Final = 8
"""Concurrent terminations, each with a connection for a moment."""

_WRITE_TIMEOUT: Final = 2.0
"""Seconds to write the history when the proxy ends."""

_LOGIN_TIMEOUT: Final = 1.0
"""Seconds to send a termination, which may need a login."""


class JobService:
    """The jobs of a process, and what they share.

    Attributes:
        runtime: the live objects made of the configuration; a reload replaces it.
        peers: the other processes.
        registry: the jobs of all sessions.
        history: outcomes, written to the jobs' databases.
        counts: of all jobs so far, by database.
        room: launches for which the server has no connection.
        slots: the places that the whole proxy has for jobs.
        pending: jobs that wait for a commit.
        queue: jobs that were submitted when there was no room.
    """

    def __init__(
        self,
        runtime: Runtime,
        channel_setup: bytes,
        find_history: bytes,
        on_end: Callable[[], None],
    ) -> None:
        """
        Args:
            runtime: the live objects made of the configuration.
            channel_setup: SQL that each channel runs first.
            find_history: SQL that finds the history (`jobs/history`).
            on_end: called when a job has ended.
        """
        config = runtime.config
        self.runtime = runtime
        self.peers = Peers()
        self.registry: JobRegistry[Job] = JobRegistry(
            config.outcome_retention, lambda role_id: self.peers.role_gone(role_id)
        )
        self.counts: dict[bytes, JobCounts] = {}
        self.channels = Channels(config.spare_lifetime, channel_setup)
        self.spares = Spares(
            config.spares,
            config.spare_lifetime,
            config.reuse_lifetime,
            self.channels,
            self._others_give_way,
        )
        self.room = ServerRoom()
        self.slots: SlotSource = OwnSlots(Limits.of(config))
        self.pending = PendingJobs(config.max_pending_jobs, config.spare_lifetime)
        self.queue = JobQueue(config)
        self.budgets = Budgets(config.queue_memory, config.role_queue_memory)
        self.history = History(lambda: self.runtime.config, self.channels.give_back, find_history)
        self._on_end = on_end
        self._tasks: set[asyncio.Task[Any]] = set()
        self._terminating = asyncio.Semaphore(_MAX_TERMINATIONS)
        # The tasks of `cancel_statement`.
        self._cancels: set[asyncio.Task[None]] = set()

    def reload(self, runtime: Runtime) -> None:
        """Apply another configuration."""
        config = runtime.config
        moved = config.upstream != self.runtime.config.upstream
        self.runtime = runtime
        if moved:
            self.spares.give_way()
        self.slots.change(Limits.of(config))
        self.registry.retention = config.outcome_retention
        self.budgets.change(config.queue_memory, config.role_queue_memory)
        self.spares.count = config.spares
        self.spares.reuse_lifetime = config.reuse_lifetime
        self.spares.lifetime = self.channels.lifetime = config.spare_lifetime
        self.pending.lifetime = config.spare_lifetime
        self.pending.most = config.max_pending_jobs
        self.queue.config = config

    def give_way(self) -> bool:
        """Close connections that only save time. Returns whether there were any."""
        listeners = self.pending.give_way()
        return self.spares.give_way() or listeners

    async def _others_give_way(self) -> bool:
        listeners = self.pending.give_way()
        return await self.peers.give_way() or listeners

    def counts_of(self, database: bytes) -> JobCounts:
        """The counts for a database; beyond the limit, databases share one."""
        if database not in self.counts and len(self.counts) >= _MAX_DATABASES:
            database = b""
        return self.counts.setdefault(database, JobCounts())

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles whose jobs are known, here or in other processes."""
        return self.registry.roles | self.peers.roles

    async def find(
        self, own: Iterable[Job], handles: Sequence[Handle]
    ) -> tuple[list[JobRecord | None], int]:
        """Jobs by handle: among the caller's own, then in this process, then in the others; and how
        many processes did not answer that may know the rest.

        A caller knows its own jobs until it detaches them.
        """
        here = {job.cookie: job for job in own}

        def known(handle: Handle) -> JobRecord | None:
            job = here.get(handle[1])
            if job is not None and job.is_meant_by(handle[0]):
                return job
            return self.registry.get(*handle)

        found: dict[Handle, JobRecord | None] = {handle: known(handle) for handle in handles}
        unanswered = 0
        if missing := [handle for handle, job in found.items() if job is None]:
            theirs, unanswered = await self.peers.find(missing)
            found |= {handle: theirs.get(handle[1]) for handle in missing}
        return [found[handle] for handle in handles], unanswered

    async def jobs_of(self, roles: Collection[int]) -> tuple[list[JobRecord], int]:
        """All jobs here, jobs of these roles in other processes, and how many did not answer."""
        theirs, unanswered = await self.peers.jobs_of(roles)
        return [*self.registry, *theirs], unanswered

    def ended(self, job: Job) -> None:
        """A job's backend is done."""
        self.registry.ended(job)
        self.peers.job_ended(job)
        self.room.changed()
        self._on_end()

    def withdrawn(self, job: Job) -> None:
        """A job that was to run will not."""
        self.peers.job_ended(job)
        self._on_end()

    def cancel(self, job: JobRecord) -> asyncio.Task[bool]:
        """Have the server stop a job for certain. The task ends once the server was told; false if
        the process that must tell it does not answer."""
        if isinstance(job, RemoteJob):
            return self._spawn(self.peers.cancel_job(job))
        assert isinstance(job, Job)
        job.canceled = True
        return self._spawn(self._stop(job))

    async def _stop(self, job: Job) -> bool:
        """Terminate the job's backend. Where that is impossible or slow, send cancel requests until
        the job ends, since a backend that has only just got its query does not react.

        Behind a connection pooler the server connection may be another client's by then; there, we
        keep a transaction open (`Attempt`). The output is dropped last: before, a job that waits
        for its reader would run on and commit.
        """
        if job.is_waiting:
            job.end_with(canceled(None))
        if job.finished or job.stop_trying():
            return True
        told = not job.is_pooled and await self._is_terminating(job)
        if not (told or job.finished):
            await self._tell(job)
            self._spawn(self._cancel_until_finished(job))
        job.forget_output()
        return True

    async def _is_terminating(self, job: Job) -> bool:
        """Whether the server was told to terminate the backend."""
        if job.termination is None:
            job.termination = Termination(job.backend_pid)
            self._spawn(self._terminate(job, job.termination))
        sent = job.termination.sent
        await asyncio.wait([sent], timeout=_LOGIN_TIMEOUT)
        return sent.done() and sent.result()

    async def _terminate(self, job: Job, termination: Termination) -> None:
        """Terminate a job's backend, and find out whether it committed before, if need be."""
        sent = termination.sent
        try:
            async with self._terminating, self._channel(job) as channel:
                if channel is not None:
                    await termination.send(channel)
            sent.set_result(True)
            while not (job.finished or job.cut_off):
                waiter = asyncio.get_running_loop().create_future()
                job.add_waiter(waiter)
                await waiter
            async with self._channel(job) as channel:
                if channel is not None and await termination.has_rolled_back(channel):
                    job.end_with(canceled(None))
        except (SQLError, OSError, ProtocolViolation) as error:
            termination.is_sent = False
            logger.info("cannot terminate the backend of a canceled job: %s", explain(error))
        finally:
            if not sent.done():
                sent.set_result(job.finished)
            if job.cut_off:
                job.end_with(job.cut_off)

    @contextlib.asynccontextmanager
    async def _channel(self, job: Job) -> AsyncIterator[Channel | None]:
        """A channel of the job's login; None if the job has ended.

        Raises SQLError, OSError, ProtocolViolation.
        """
        if job.lease is None:
            yield None
            return
        channel = await job.lease()
        try:
            yield None if job.finished else channel
        finally:
            self.channels.give_back(channel)

    def _tell(self, job: Job) -> Coroutine[object, object, None]:
        return self.runtime.dialer.cancel(job.route, job.cancel_request())

    async def _cancel_until_finished(self, job: Job) -> None:
        delay = _CANCEL_INTERVAL
        while not job.finished:
            await asyncio.sleep(delay)
            if not job.finished:
                await self._tell(job)
            delay = min(delay * 2, _CANCEL_MAX_INTERVAL)

    def limit(self, job: Job, timeout_ms: int) -> None:
        """Cancel a job that runs longer than this."""

        def time_out() -> None:
            if not job.finished:
                job.timed_out = True
                self.cancel(job)

        timer = asyncio.get_running_loop().call_later(timeout_ms / 1000, time_out)
        job.when_finished(timer.cancel)

    def cancel_statement(
        self, route: Route, key: CancelRequest, is_meant: Callable[[], bool] = lambda: True
    ) -> asyncio.Task[None]:
        """Have the server cancel a statement that waits for an answer that will not come.
        `is_meant`: as for `send_cancel`."""
        task = self._spawn(self.runtime.dialer.cancel(route, key, is_meant))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)
        return task

    async def end_all(self) -> None:
        """Cancel the unfinished jobs, and release their backends."""
        jobs = (*self.registry.waiting, *self.registry.running)
        for job in jobs:
            job.canceled = True
        await asyncio.gather(*self._cancels, *map(self._stop, jobs))
        for job in jobs:
            job.abandon()
        await self.history.finish(_WRITE_TIMEOUT)

    def close(self) -> None:
        """Close idle connections."""
        self.spares.close()
        self.channels.give_way()
        self.pending.give_way()

    def leave_databases(self, sql: bytes) -> None:
        """Close idle connections to databases that a statement, in lower case, may be about to
        drop, rename or copy: the server waits 5 seconds for others to leave, then refuses.
        """
        if len(sql) <= LONGEST_COMMAND and any(verb in sql for verb in DATABASE_COMMANDS):
            self.leave(sql)
            self.peers.leave_databases(sql)

    def leave(self, sql: bytes) -> None:
        """`leave_databases` for this process alone."""
        self.spares.leave(sql)
        self.pending.leave(lambda login: is_named(login, sql))

    def _spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
