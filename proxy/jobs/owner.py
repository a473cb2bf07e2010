"""Owners of jobs: a session, or a job whose SQL launches others.

Invariant: the functions treat both alike. They differ in where messages go and settings come from.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from protocol.errors import OBJECT_NOT_IN_PREREQUISITE_STATE, ProtocolViolation, SQLError
from proxy.backends.backend import Backend, NoRoomError, no_backend
from proxy.backends.channels import Channel
from proxy.backends.identity import StaleLoginError
from proxy.backends.reuse import KeepBackend
from proxy.backends.spares import LONGEST_COMMAND
from proxy.config.gucs import (
    DEFAULT_QUEUE_SIZE,
    LAUNCH_TIMEOUT,
    MAX_WORKERS,
    QUEUE,
)
from proxy.jobs import job_log
from proxy.jobs.at_commit import Notification, Pending, rolled_back
from proxy.jobs.attached import Jobs, Reservation, checked_queue_size
from proxy.jobs.attempt import Attempt, JobSession
from proxy.jobs.context import Context
from proxy.jobs.history import SessionRole
from proxy.jobs.job import Job
from proxy.jobs.launcher import Launcher
from proxy.jobs.registry import NO_PID, PENDING, QUEUED, JobRecord
from proxy.jobs.request import LaunchRequest
from proxy.jobs.retries import LONGEST_PAUSE, RetriedJob
from proxy.jobs.room import FOR_EVER, FullError, Waiting, WaitLimit
from proxy.jobs.service import JobService
from proxy.jobs.termination import canceled
from proxy.reasons import explain
from proxy.sql.encodings import codec
from proxy.sql.recoding import encoding_of
from proxy.stats import counters, error_class

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch under way: the request, and what decides how it is carried out.

    Attributes:
        client_encoding: of the SQL and the results.
        queue_size: in bytes.
        system_id: of the owner's database cluster, if known.
    """

    request: LaunchRequest
    context: Context
    launcher: Launcher
    client_encoding: bytes
    queue_size: int
    system_id: bytes | None

    async def on_backend(self, begin: Callable[[Backend, KeepBackend], Awaitable[T]]) -> T:
        """`Launcher.launch`. Raises SQLError."""
        return await self.launcher.launch(
            begin,
            self.context,
            client_encoding=self.client_encoding,
            label=self.request.label,
            system_id=self.system_id,
        )


class Owner(ABC):
    """Launches jobs, and may ask about them.

    Attributes:
        service: the jobs of all owners.
        jobs: those that it has launched and not fetched or detached.
        pending: jobs that start when its transaction commits.
        custom_settings: names with a dot that it may have set.
        system_id: of its database cluster; empty if it cannot be known, None if not asked for yet.
    """

    custom_settings: Iterable[bytes]

    def __init__(self, service: JobService) -> None:
        self.service = service
        self.jobs = Jobs()
        self.pending: set[Pending] = set()
        self.system_id: bytes | None = None

    @property
    @abstractmethod
    def launcher(self) -> Launcher:
        """Opens backends for its jobs."""

    @property
    @abstractmethod
    def server_version(self) -> int:
        """As server_version_num, without the minor version: 90500, 150000."""

    @property
    @abstractmethod
    def client_encoding(self) -> bytes:
        """By PostgreSQL's name."""

    @property
    @abstractmethod
    def server_encoding(self) -> bytes:
        """By PostgreSQL's name; empty if unknown."""

    @property
    def encoding(self) -> bytes:
        """The encoding of what it is sent."""
        return encoding_of(self.client_encoding, self.server_encoding)

    @abstractmethod
    async def inject(self, message: bytes) -> None:
        """Deliver a message of one of its jobs, while the server is within a statement."""

    @abstractmethod
    def cancel_statement(self, is_meant: Callable[[], bool]) -> None:
        """Have the server cancel the owner's present statement, if that is still the one that is
        meant when the request is about to be sent."""

    @abstractmethod
    def job_session(self, launcher: Launcher, backend: Backend) -> JobSession:
        """The session that serves the calls of one of its jobs.

        Args:
            launcher: opens the backends of the jobs that this job launches.
            backend: runs the job.
        """

    @property
    def cluster(self) -> bytes:
        """Identifies its database cluster, within which OIDs have a meaning."""
        return self.system_id or repr(self.launcher.route.host).encode()

    async def launch(
        self,
        request: LaunchRequest,
        context: Context,
        *,
        launcher: Launcher | None = None,
        client_encoding: bytes | None = None,
        waiting: Waiting = contextlib.nullcontext,
    ) -> Job:
        """Start a job on a spare or new backend, with the owner's role and settings, once there is
        room for it; pg_background.launch_timeout limits the wait.

        If it may be queued, all jobs count that the owner has launched and that run, attached or
        not: those who queue jobs often detach them at once, or leave.

        Args:
            request: the launch.
            context: of the call.
            launcher: opens the backend, if not as the owner's role.
            client_encoding: of the SQL and the results, if not the owner's.
            waiting: entered during a wait for room.

        Raises SQLError.
        """
        launcher = launcher or self.launcher
        began = time.monotonic()
        try:
            queues = request.may_queue and bool(launcher.setting(QUEUE, context))
            seconds = 0 if queues else launcher.setting(LAUNCH_TIMEOUT, context) / 1000
            wait_limit = WaitLimit(seconds, waiting)
            launch = self._launch_of(request, context, launcher, client_encoding)
            try:
                job = await self._start_now(launch, wait_limit, count_all=queues)
            except (FullError, NoRoomError):
                if not queues:
                    raise
                return await self._queue(launch, wait_limit)
        except SQLError as error:
            counters.not_launched[error_class(error.sqlstate)] += 1
            raise
        counters.latency.observe(time.monotonic() - began - wait_limit.waited)
        return job

    def _launch_of(
        self,
        request: LaunchRequest,
        context: Context,
        launcher: Launcher,
        client_encoding: bytes | None,
    ) -> _Launch:
        """Raises SQLError for an invalid queue size."""
        size = checked_queue_size(request.queue_size, launcher.setting(DEFAULT_QUEUE_SIZE, context))
        return _Launch(
            request,
            context,
            launcher,
            client_encoding or self.client_encoding,
            min(size, self.service.runtime.config.max_queue_size),
            self.system_id,
        )

    async def _start_now(self, launch: _Launch, wait_limit: WaitLimit, *, count_all: bool) -> Job:
        """Raises SQLError."""
        self._leave_databases(launch.request.sql)

        async def begin(
            reservation: Reservation, backend: Backend, keep_backend: KeepBackend
        ) -> Job:
            job = self._new(launch)
            attempt = self._give(job, launch, backend, keep_backend)
            self._known(job)
            try:
                await self._start(job, attempt, reservation, functools.partial(self._withdraw, job))
                await self.service.peers.announce(job.role_id)
            except asyncio.CancelledError:
                self.drop(job)
                counters.launched += 1
                raise
            counters.launched += 1
            self._follow(job, launch, wait_limit)
            return job

        return await self._in_room(begin, launch, wait_limit, count_all=count_all)

    async def _queue(self, launch: _Launch, earlier: WaitLimit) -> Job:
        """Queue a job until there is room. `earlier`: its wait, in vain. Raises SQLError."""
        size = len(launch.request.sql)
        queue = self.service.queue
        queue.check(launch.launcher.user, size)
        job = self._new(launch)
        job.unfinished_state = QUEUED
        self._known(job)
        wait_limit = WaitLimit(FOR_EVER, earlier=earlier)
        queue.add(job, size, self._start_waiting(job, launch, wait_limit))
        await self._announce(job)
        return job

    async def _announce(self, job: Job) -> None:
        """Tell the other processes about a waiting job."""
        try:
            await self.service.peers.announce(job.role_id)
        except asyncio.CancelledError:
            self.drop(job)
            raise

    async def _start(
        self,
        job: Job,
        attempt: Attempt,
        reservation: Reservation,
        otherwise: Callable[[], None],
    ) -> None:
        """Start the job on its backend. If that fails before it has run, call `otherwise`, and
        raise what `Attempt.start` has raised: another backend may do.
        """
        reservation.job = job
        try:
            await attempt.start()
        except (StaleLoginError, SQLError, OSError, ProtocolViolation):
            if job.canceled:  # no other attempt
                job.end_with(canceled(None))
            if not job.finished:
                otherwise()
                reservation.job = None
                raise

    def _follow(self, job: Job, launch: _Launch, wait_limit: WaitLimit) -> None:
        launcher = launch.launcher
        role = SessionRole.of(
            launcher.login, launch.context, launch.client_encoding, self.server_encoding
        )
        self.service.history.follow(job, role, launcher.channel, waited=wait_limit.waited)

    def _leave_databases(self, sql: bytes) -> None:
        if b"database" in (lower := sql[: LONGEST_COMMAND + 1].lower()):
            self.service.leave_databases(lower)

    def _new(self, launch: _Launch) -> Job:
        """A job without a backend."""
        request, launcher = launch.request, launch.launcher
        make: Callable[..., Job] = Job
        if request.retries:
            relaunch = functools.partial(_relaunch, self.service, launch)
            make = functools.partial(RetriedJob, retries=request.retries, relaunch=relaunch)
        return make(
            request.sql,
            queue_size=launch.queue_size,
            role_id=launch.context.role_id,
            cluster=self.cluster,
            encoding=encoding_of(launch.client_encoding, self.server_encoding),
            route=launcher.route,
            user=launcher.user,
            database=launcher.database,
            lease=launcher.channel,
            label=request.label,
            keep_rows=request.keeps_rows,
            budgets=self.service.budgets.of_role(launcher.user),
            # Without reference to the owner, which may be gone before the job.
            on_finish=functools.partial(_ended, self.jobs, self.service),
        )

    def _give(
        self, job: Job, launch: _Launch, backend: Backend, keep_backend: KeepBackend
    ) -> Attempt:
        """Assign the job to this backend."""
        launcher, sql = launch.launcher, launch.request.sql
        attempt = _attempt(self, launcher, sql, job, backend, keep_backend)
        if isinstance(job, RetriedJob):
            assert isinstance(attempt.session, Owner)
            job.next_attempt = functools.partial(_attempt, attempt.session, launcher, sql)
        job.assign(attempt)
        job_log.started(job, self.service.runtime.config)
        return attempt

    async def _in_room(
        self,
        begin: Callable[[Reservation, Backend, KeepBackend], Awaitable[T]],
        launch: _Launch,
        wait_limit: WaitLimit,
        *,
        count_all: bool,
    ) -> T:
        """Begin a job on a backend once there is room for it. Raises SQLError."""
        service, launcher = self.service, launch.launcher

        async def attempt(reservation: Reservation) -> T:
            slot = await service.slots.take(launcher.user, launcher.database, wait_limit)
            try:
                return await launch.on_backend(functools.partial(begin, reservation))
            finally:
                give_back = functools.partial(service.slots.give_back, slot)
                if reservation.job is None:
                    give_back()
                else:
                    reservation.job.when_finished(give_back)

        max_workers = launcher.setting(MAX_WORKERS, launch.context)
        most = service.runtime.config.max_session_workers
        async with self.jobs.room(
            max_workers, most, wait_limit, count_all=count_all
        ) as reservation:
            return await service.room.launch(
                launcher.login, functools.partial(attempt, reservation), wait_limit
            )

    def _known(self, job: Job) -> None:
        self.service.registry.add(job)
        self.service.counts_of(job.database).launched += 1
        self.jobs.add(job)

    def _withdraw(self, job: Job) -> None:
        self.service.registry.withdraw(job)
        self.service.counts_of(job.database).launched -= 1
        self.jobs.withdraw(job)

    # At commit

    async def launch_at_commit(
        self,
        request: LaunchRequest,
        context: Context,
        *,
        launcher: Launcher | None = None,
        client_encoding: bytes | None = None,
    ) -> tuple[Job, Notification]:
        """Launch once a transaction commits that sends the notification.

        Raises SQLError.
        """
        launcher = launcher or self.launcher
        launch = self._launch_of(request, context, launcher, client_encoding)
        job = self._new(launch)
        pending = Pending(
            job,
            len(request.sql),
            mine=self.pending,
            start=functools.partial(self._start_waiting, job, launch),
            forget=functools.partial(self._forget, job),
        )
        try:
            notification = await self.service.pending.add(
                launcher.login, launcher.open_listener, pending
            )
        except BaseException:
            pending.let_go()
            raise
        job.unfinished_state = PENDING
        self._known(job)
        await self._announce(job)
        return job, notification

    def _forget(self, job: Job) -> None:
        """Forget a job, since the transaction that launched it was rolled back."""
        job.error = rolled_back().response()
        self._withdraw(job)
        self.service.withdrawn(job)

    async def _start_waiting(
        self, job: Job, launch: _Launch, earlier: WaitLimit | None = None
    ) -> None:
        """Run a job that is known already, once there is room. If it cannot run, it ends with the
        error, since nobody could be told otherwise.

        `earlier`: its wait for room, if that has begun already.
        """
        job.unfinished_state = QUEUED

        def requeue() -> None:
            self.jobs.forget_pid(job)
            job.requeue(QUEUED)
            self.service.registry.add(job)

        async def begin(
            reservation: Reservation, backend: Backend, keep_backend: KeepBackend
        ) -> None:
            if job.finished:
                backend.terminate()
                return
            attempt = self._give(job, launch, backend, keep_backend)
            self.service.registry.add(job)
            self.jobs.begun(job)
            await self._start(job, attempt, reservation, requeue)
            counters.launched += 1
            self._follow(job, launch, wait_limit)

        self._leave_databases(launch.request.sql)
        wait_limit = earlier or WaitLimit(FOR_EVER)
        starting = asyncio.ensure_future(self._in_room(begin, launch, wait_limit, count_all=True))
        job.when_finished(lambda: job.pid == NO_PID and starting.cancel())
        try:
            await starting
        except asyncio.CancelledError:
            if not job.finished:
                raise
        except SQLError as error:
            counters.not_launched[error_class(error.sqlstate)] += 1
            job.end_with(error.response(codec(job.encoding)))
            self._follow(job, launch, wait_limit)
        except (OSError, ProtocolViolation) as error:
            job.end_with(no_backend(explain(error)).response(codec(job.encoding)))
            self._follow(job, launch, wait_limit)

    def transaction_ended(self) -> None:
        """The owner's transaction has ended, and so have all earlier ones."""
        if self.pending:
            self.service.pending.transaction_ended(tuple(self.pending))
            self.pending.clear()

    def transaction_lost(self, pid: int) -> None:
        """The owner's session is gone; its backend, `pid`, may still be committing."""
        if self.pending:
            self.service.pending.owner_gone(tuple(self.pending), pid)
            self.pending.clear()

    async def check_may_wait(self, jobs: Iterable[JobRecord]) -> None:
        """Raises SQLError 55000 if a job waits for this very transaction to commit."""
        waited_for = set(jobs)
        mine = {pending for pending in self.pending if pending.job in waited_for}
        if mine:
            # A procedure may have committed, whose words are not heard yet.
            await self.service.pending.catch_up(mine)
        if mine & self.pending:
            raise SQLError(
                OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the background worker starts when this transaction commits",
                hint="Wait for it after COMMIT.",
            )

    def drop(self, job: Job) -> None:
        """Stop a job whose launch or fetch was interrupted, and whose handle nobody has."""
        if not job.finished:
            self.service.cancel(job)
        self.jobs.remove(job)

    def launcher_for(self, login: bytes | None) -> Launcher:
        """The launcher for jobs that log in as another role; None: as the owner's."""
        return self.launcher if login is None else self.launcher.for_login(login)

    async def lease_channel(self, login: bytes | None) -> Channel:
        """A channel to answer calls from inside the database.

        Args:
            login: its role, in the encoding of the database; None for the owner's.

        Raises SQLError, OSError.
        """
        return self._known_by(await self.launcher_for(login).channel())

    def idle_channel(self, login: bytes | None, pid: int) -> Channel | None:
        """The channel with this pid, if it is idle and shows a word."""
        channel = self.launcher_for(login).idle_channel(pid)
        return None if channel is None else self._known_by(channel)

    def _known_by(self, channel: Channel) -> Channel:
        if self.system_id is None:
            self.system_id = channel.system_id
        return channel


async def _relaunch(
    service: JobService, launch: _Launch, begin: Callable[[Backend, KeepBackend], Awaitable[None]]
) -> None:
    """Begin another attempt, after the launches that wait for room. Raises SQLError."""
    attempt = functools.partial(launch.on_backend, begin)
    await service.room.launch(launch.launcher.login, attempt, WaitLimit(LONGEST_PAUSE))


def _attempt(
    owner: Owner,
    launcher: Launcher,
    sql: bytes,
    job: Job,
    backend: Backend,
    keep_backend: KeepBackend,
) -> Attempt:
    """An attempt of a job. `owner`: the job's; of a later attempt, the session of the first."""
    session = owner.job_session(launcher.for_job(backend.pid), backend)
    return Attempt(job, backend, sql, session=session, keep_backend=keep_backend)


def _ended(jobs: Jobs, service: JobService, job: Job) -> None:
    if job.pid == NO_PID:  # it counts as launched now that it has ended
        counters.launched += 1
    job_log.ended(job, service.runtime.config)
    jobs.ended(job)
    service.counts_of(job.database).ended(job)
    state = "abandoned" if job.is_abandoned else job.state.decode()
    sqlstate = None if job.error is None else job.error.sqlstate
    counters.job_ended(state, sqlstate, job.elapsed_ms / 1000)
    service.ended(job)
