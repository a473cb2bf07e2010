"""Launches: a job gets a backend once there is room, at once or after its caller's commit.

Invariant: whoever calls is told why a job cannot run, as long as it can be told: until the job has
a backend, or is queued or pending. From then on the error is the job's. A job that has begun does
not refer to its owner, which may be gone before it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from protocol.errors import ProtocolViolation, SQLError
from proxy.backends.backend import Backend, NoRoomError, no_backend
from proxy.backends.identity import Login, StaleLoginError
from proxy.backends.reuse import KeepBackend
from proxy.backends.spares import LONGEST_COMMAND
from proxy.config.gucs import DEFAULT_QUEUE_SIZE, LAUNCH_TIMEOUT, MAX_WORKERS, QUEUE
from proxy.jobs import job_log
from proxy.jobs.at_commit import Notification, Pending, rolled_back
from proxy.jobs.attached import Jobs, Reservation, checked_queue_size
from proxy.jobs.attempt import Attempt
from proxy.jobs.context import Context
from proxy.jobs.history import SessionRole
from proxy.jobs.job import Job
from proxy.jobs.launcher import Launcher
from proxy.jobs.owner import Owner
from proxy.jobs.registry import NO_PID, PENDING, QUEUED
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

Begin = Callable[[Backend, KeepBackend], Awaitable[T]]
"""Begins a job on a ready backend."""


async def launch(
    owner: Owner,
    request: LaunchRequest,
    context: Context,
    launcher: Launcher,
    client_encoding: bytes,
    waiting: Waiting,
) -> Job:
    """Start a job on a spare or new backend, with the owner's role and settings, once there is room
    for it; pg_background.launch_timeout limits the wait.

    If it may be queued, detached jobs of the owner count too while they run: who queues jobs often
    detaches them, or leaves.

    Args:
        owner: of the job.
        request: the launch.
        context: of the call.
        launcher: opens the backend.
        client_encoding: of the SQL and the results.
        waiting: entered during a wait for room.

    Raises SQLError.
    """
    began = time.monotonic()
    try:
        queues = request.may_queue and bool(launcher.setting(QUEUE, context))
        seconds = 0 if queues else launcher.setting(LAUNCH_TIMEOUT, context) / 1000
        wait_limit = WaitLimit(seconds, waiting)
        this = _Launch(owner, request, context, launcher, client_encoding)
        try:
            job = await this.start(wait_limit, count_all=queues)
        except (FullError, NoRoomError):
            if not queues:
                raise
            return await this.queue(wait_limit)
    except SQLError as error:
        counters.not_launched[error_class(error.sqlstate)] += 1
        raise
    counters.latency.observe(time.monotonic() - began - wait_limit.waited)
    return job


async def launch_at_commit(
    owner: Owner,
    request: LaunchRequest,
    context: Context,
    launcher: Launcher,
    client_encoding: bytes,
) -> tuple[Job, Notification]:
    """Launch once a transaction commits that sends the notification.

    Arguments are those of `launch`. Raises SQLError.
    """
    return await _Launch(owner, request, context, launcher, client_encoding).at_commit()


class _Launch:
    """A launch under way."""

    def __init__(
        self,
        owner: Owner,
        request: LaunchRequest,
        context: Context,
        launcher: Launcher,
        client_encoding: bytes,
    ) -> None:
        """Raises SQLError for an invalid queue size."""
        size = checked_queue_size(request.queue_size, launcher.setting(DEFAULT_QUEUE_SIZE, context))
        self._owner = owner
        self._service = owner.service
        self._request = request
        self._context = context
        self._launcher = launcher
        self._client_encoding = client_encoding
        self._queue_size = min(size, owner.service.runtime.config.max_queue_size)
        self._on_backend = functools.partial(
            launcher.launch,
            context=context,
            client_encoding=client_encoding,
            label=request.label,
            system_id=owner.system_id,
        )

    async def start(self, wait_limit: WaitLimit, *, count_all: bool) -> Job:
        """Start the job. Raises SQLError; FullError or NoRoomError if there is no room in time."""
        self._leave_databases()

        async def begin(
            reservation: Reservation, backend: Backend, keep_backend: KeepBackend
        ) -> Job:
            job = self._new_job()
            attempt = self._assign(job, backend, keep_backend)
            self._known(job)
            try:
                await _start(job, attempt, reservation, functools.partial(self._withdraw, job))
                await self._service.peers.announce(job.role_id)
            except asyncio.CancelledError:
                self._owner.drop(job)
                counters.launched += 1
                raise
            counters.launched += 1
            self._follow(job, wait_limit)
            return job

        return await self._in_room(begin, wait_limit, count_all=count_all)

    async def queue(self, earlier: WaitLimit) -> Job:
        """Queue the job until there is room. `earlier`: its wait, in vain. Raises SQLError."""
        size = len(self._request.sql)
        queue = self._service.queue
        queue.check(self._launcher.user, size)
        job = self._new_job()
        job.unfinished_state = QUEUED
        self._known(job)
        wait_limit = WaitLimit(FOR_EVER, earlier=earlier)
        queue.add(job, size, self._start_waiting(job, wait_limit))
        await self._announce(job)
        return job

    async def at_commit(self) -> tuple[Job, Notification]:
        """Have the job wait for the commit. Raises SQLError."""
        job = self._new_job()
        pending = Pending(
            job,
            len(self._request.sql),
            mine=self._owner.pending,
            start=functools.partial(self._start_waiting, job),
            forget=functools.partial(self._forget, job),
        )
        try:
            notification = await self._service.pending.add(
                self._launcher.login, self._launcher.open_listener, pending
            )
        except BaseException:
            pending.let_go()
            raise
        job.unfinished_state = PENDING
        self._known(job)
        await self._announce(job)
        return job, notification

    async def _start_waiting(self, job: Job, earlier: WaitLimit | None = None) -> None:
        """Run a job that is known already, once there is room. If it cannot run, it ends with the
        error, since nobody could be told otherwise.

        `earlier`: its wait for room, if that has begun already.
        """
        job.unfinished_state = QUEUED

        def requeue() -> None:
            self._owner.jobs.forget_pid(job)
            job.requeue(QUEUED)
            self._service.registry.add(job)

        async def begin(
            reservation: Reservation, backend: Backend, keep_backend: KeepBackend
        ) -> None:
            if job.finished:
                backend.terminate()
                return
            attempt = self._assign(job, backend, keep_backend)
            self._service.registry.add(job)
            self._owner.jobs.begun(job)
            await _start(job, attempt, reservation, requeue)
            counters.launched += 1
            self._follow(job, wait_limit)

        self._leave_databases()
        wait_limit = earlier or WaitLimit(FOR_EVER)
        starting = asyncio.ensure_future(self._in_room(begin, wait_limit, count_all=True))
        job.when_finished(lambda: job.pid == NO_PID and starting.cancel())
        try:
            await starting
        except asyncio.CancelledError:
            if not job.finished:
                raise
        except SQLError as error:
            counters.not_launched[error_class(error.sqlstate)] += 1
            job.end_with(error.response(codec(job.encoding)))
            self._follow(job, wait_limit)
        except (OSError, ProtocolViolation) as error:
            job.end_with(no_backend(explain(error)).response(codec(job.encoding)))
            self._follow(job, wait_limit)

    async def _in_room(
        self,
        begin: Callable[[Reservation, Backend, KeepBackend], Awaitable[T]],
        wait_limit: WaitLimit,
        *,
        count_all: bool,
    ) -> T:
        """Begin a job on a backend once there is room for it. Raises SQLError."""
        service, launcher = self._service, self._launcher

        async def in_slot(reservation: Reservation) -> T:
            slot = await service.slots.take(launcher.user, launcher.database, wait_limit)
            try:
                return await self._on_backend(functools.partial(begin, reservation))
            finally:
                give_back = functools.partial(service.slots.give_back, slot)
                if reservation.job is None:
                    give_back()
                else:
                    reservation.job.when_finished(give_back)

        max_workers = launcher.setting(MAX_WORKERS, self._context)
        most = service.runtime.config.max_session_workers
        async with self._owner.jobs.room(
            max_workers, most, wait_limit, count_all=count_all
        ) as reservation:
            return await service.room.launch(
                launcher.login, functools.partial(in_slot, reservation), wait_limit
            )

    # The job

    def _new_job(self) -> Job:
        """A job without a backend."""
        owner, service = self._owner, self._service
        request, launcher = self._request, self._launcher
        make: Callable[..., Job] = Job
        if request.retries:
            relaunch = functools.partial(_relaunch, service, launcher.login, self._on_backend)
            make = functools.partial(RetriedJob, retries=request.retries, relaunch=relaunch)
        return make(
            request.sql,
            queue_size=self._queue_size,
            role_id=self._context.role_id,
            cluster=owner.cluster,
            encoding=encoding_of(self._client_encoding, owner.server_encoding),
            route=launcher.route,
            user=launcher.user,
            database=launcher.database,
            lease=launcher.channel,
            label=request.label,
            keep_rows=request.keeps_rows,
            budgets=service.budgets.of_role(launcher.user),
            on_finish=functools.partial(_ended, owner.jobs, service),
        )

    def _assign(self, job: Job, backend: Backend, keep_backend: KeepBackend) -> Attempt:
        """Assign the job to this backend."""
        launcher, sql = self._launcher, self._request.sql
        attempt = _attempt(self._owner, launcher, sql, job, backend, keep_backend)
        if isinstance(job, RetriedJob):
            assert isinstance(attempt.session, Owner)
            job.next_attempt = functools.partial(_attempt, attempt.session, launcher, sql)
        job.assign(attempt)
        job_log.started(job, self._service.runtime.config)
        return attempt

    def _known(self, job: Job) -> None:
        self._service.registry.add(job)
        self._service.counts_of(job.database).launched += 1
        self._owner.jobs.add(job)

    def _withdraw(self, job: Job) -> None:
        self._service.registry.withdraw(job)
        self._service.counts_of(job.database).launched -= 1
        self._owner.jobs.withdraw(job)

    def _forget(self, job: Job) -> None:
        """Forget a job, since the transaction that launched it was rolled back."""
        job.error = rolled_back().response()
        self._withdraw(job)
        self._service.withdrawn(job)

    async def _announce(self, job: Job) -> None:
        """Tell the other processes about a waiting job."""
        try:
            await self._service.peers.announce(job.role_id)
        except asyncio.CancelledError:
            self._owner.drop(job)
            raise

    def _follow(self, job: Job, wait_limit: WaitLimit) -> None:
        launcher = self._launcher
        role = SessionRole.of(
            launcher.login, self._context, self._client_encoding, self._owner.server_encoding
        )
        self._service.history.follow(
            job, self._request.sql, role, launcher.channel, waited=wait_limit.waited
        )

    def _leave_databases(self) -> None:
        if b"database" in (lower := self._request.sql[: LONGEST_COMMAND + 1].lower()):
            self._service.leave_databases(lower)


async def _start(
    job: Job, attempt: Attempt, reservation: Reservation, otherwise: Callable[[], None]
) -> None:
    """Start the job on its backend. If that fails before it has run, call `otherwise`, and raise
    what `Attempt.start` has raised: another backend may do.
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


async def _relaunch(
    service: JobService,
    login: Login,
    on_backend: Callable[[Begin[None]], Awaitable[None]],
    begin: Begin[None],
) -> None:
    """Begin another attempt, after the launches that wait for room. Raises SQLError."""
    await service.room.launch(login, functools.partial(on_backend, begin), WaitLimit(LONGEST_PAUSE))


def _ended(jobs: Jobs, service: JobService, job: Job) -> None:
    if job.pid == NO_PID:  # it counts as launched now that it has ended
        counters.launched += 1
    job_log.ended(job, service.runtime.config)
    jobs.ended(job)
    service.counts_of(job.database).ended(job)
    sqlstate = None if job.error is None else job.error.sqlstate
    counters.job_ended(job.state_for_operators, sqlstate, job.elapsed_ms / 1000)
    service.ended(job)
