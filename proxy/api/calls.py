"""What the functions do: one coroutine for each.

Invariant: a coroutine gets its caller and the arguments as Python values (text as bytes in the
client's encoding), and returns Python values: a tuple for a composite type, a list of tuples for a
set. It knows nothing of messages, statements or formats. A strict function never gets a NULL.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from protocol.errors import (
    CONNECTION_FAILURE,
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    NULL_VALUE_NOT_ALLOWED,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    UNDEFINED_OBJECT,
    WARNING,
    SQLError,
)
from protocol.messages import NoticeResponse
from proxy.api.like import like
from proxy.config.gucs import LAUNCH_AT_COMMIT, MAX_WORKERS
from proxy.jobs.context import Context
from proxy.jobs.history import PastJob, SessionRole
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.jobs.launch import launch
from proxy.jobs.launcher import Launcher
from proxy.jobs.owner import Owner
from proxy.jobs.registry import NO_PID, Handle, JobRecord
from proxy.jobs.request import LaunchRequest
from proxy.sql.recoding import recoded
from proxy.sql.text import EXECUTOR_ROLE

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
Row = tuple[Any, ...]

_VOID: Final = b""
"""The value of type void."""


class Caller(ABC):
    """The caller of a function: a session, or code inside the database for one.

    Attributes:
        jobs: those of its session.
        context: of the call.
    """

    def __init__(self, owner: Owner, interrupts: Interrupts) -> None:
        """
        Args:
            owner: the owner of its jobs.
            interrupts: what may end its waits.
        """
        self._owner = owner
        self._interrupts = interrupts
        self.jobs = owner.jobs

    @property
    @abstractmethod
    def context(self) -> Context: ...

    @property
    @abstractmethod
    def codec(self) -> str:
        """Python's name of the encoding of the arguments."""

    @property
    @abstractmethod
    def encodings(self) -> Sequence[bytes]:
        """The encodings that limit what the functions return; the last is that of the result."""

    def text(self, job: JobRecord, text: bytes | None) -> bytes | None:
        """A text of a job, in the encoding of the results."""
        return None if text is None else recoded(text, job.encoding, *self.encodings)

    @property
    def cluster(self) -> bytes:
        """Identifies the session's database cluster; in another, the same OID is another role."""
        return self._owner.cluster

    @property
    def max_workers(self) -> int:
        """The setting pg_background.max_workers."""
        return self._owner.launcher.setting(MAX_WORKERS, self.context)

    async def known_jobs(self) -> Sequence[JobRecord]:
        """Jobs of all sessions, at least those that the current role may see; also ended ones."""
        jobs, unanswered = await self._owner.service.jobs_of(self.context.roles)
        if unanswered:
            await self._say_incomplete("the list of background workers is incomplete", unanswered)
        return jobs

    async def find(self, handles: Sequence[Handle]) -> list[JobRecord | None]:
        """The present state of jobs by handle, among this session's and `known_jobs`."""
        jobs, unanswered = await self._owner.service.find(self.jobs, handles)
        if unanswered:
            [pid, *_] = [pid for (pid, _), job in zip(handles, jobs, strict=True) if job is None]
            what = "a background worker has this cookie"
            if pid != NO_PID:
                what = f"PID {pid} is a background worker"
            await self._say_incomplete(f"cannot tell whether {what}", unanswered)
        return jobs

    async def past(self, handles: Sequence[Handle] | None = None) -> list[PastJob]:
        """The history of these jobs, or of the newest ones; empty if there is none. The server
        decides what the current role sees."""
        history = self._owner.service.history
        if not history.is_on or handles == []:
            return []
        launcher, encoding = self._launching
        role = SessionRole.of(launcher.login, self.context, encoding, self._owner.server_encoding)
        return await history.read(role, launcher.channel, self.cluster, handles)

    @property
    @abstractmethod
    def _launching(self) -> tuple[Launcher, bytes]:
        """The launcher for its jobs, and client_encoding by PostgreSQL's name."""

    async def _say_incomplete(self, message: str, unanswered: int) -> None:
        """Tell the client that some of the other processes have not answered."""
        warning = SQLError(
            WARNING,
            message,
            detail=f"{unanswered} of the proxy's processes did not answer in time.",
            hint="Call the function again later; a process that hangs is replaced.",
            severity="WARNING",
        )
        await self._owner.inject(NoticeResponse(warning.response(self.codec).fields).serialize())

    async def launch(self, request: LaunchRequest) -> Job:
        """Start a job with the context's role and settings, once there is room. If the wait is
        interrupted, the launch is cancelled."""
        launching = asyncio.ensure_future(
            launch(self._owner, request, self.context, *self._launching, self._interrupts.for_room)
        )
        running = self._owner.service.registry.running  # to wait for room is to wait for these
        try:
            return await self._interrupts.for_future(launching, running)
        except BaseException:
            launching.cancel()
            launching.add_done_callback(self._drop)
            raise

    def _drop(self, launching: asyncio.Future[Job]) -> None:
        """Stop the job of an interrupted launch, if the launch has succeeded meanwhile: the session
        may be gone, and the job would wait for a reader."""
        if not launching.cancelled() and launching.exception() is None:
            self._owner.drop(launching.result())

    @abstractmethod
    async def launch_at_commit(self, request: LaunchRequest) -> Job:
        """Launch a job that waits for the commit of the calling transaction."""

    @property
    def launches_at_commit(self) -> bool:
        """The setting pg_background.launch_at_commit; off if the function has no such setting."""
        if LAUNCH_AT_COMMIT.name not in self.context.own_settings:
            return False
        return bool(self._owner.launcher.setting(LAUNCH_AT_COMMIT, self.context))

    async def check_may_wait(self, jobs: Iterable[JobRecord]) -> None:
        """Raises SQLError 55000 if a job waits for the calling transaction to commit."""
        await self._owner.check_may_wait(jobs)

    async def cancel_job(self, job: JobRecord) -> None:
        """Have the server stop a job. Raises SQLError if the process that runs it hangs."""
        if not (job.finished or await self._cancel(job)):
            raise SQLError(
                CONNECTION_FAILURE,
                f"cannot cancel background worker with PID {job.pid}",
                detail="The process of the proxy that runs it did not answer in time.",
                hint="It is canceled when that process goes on."
                f" Otherwise call pg_terminate_backend({job.pid}).",
            )

    async def _cancel(self, job: JobRecord) -> bool:
        """Have the server stop a job. Returns whether it was told."""
        return await self._owner.service.cancel(job)

    def limit(self, job: Job, timeout_ms: int) -> None:
        """Cancel the job if it runs this long."""
        self._owner.service.limit(job, timeout_ms)

    async def wait(self, jobs: Sequence[JobRecord], until: float | None = None) -> None:
        """Wait until a job changes, or until this time of the loop's clock."""
        await self._interrupts.for_jobs(jobs, until)

    async def wait_for(self, job: Job) -> None:
        """Wait until the job changes."""
        await self.wait([job])

    @abstractmethod
    async def activity(self, jobs: Sequence[Job]) -> dict[int, Row]:
        """The columns of pg_stat_activity that the view shows, by backend pid."""

    @abstractmethod
    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        """GRANT or REVOKE in the primary backend, in the caller's transaction."""

    @abstractmethod
    async def drop_executor_role(self) -> bool:
        """DROP ROLE in the primary backend, in the caller's transaction."""


def check_privilege(caller: Caller, name: str) -> None:
    """Raises SQLError 42501 if the current role may not call the function."""
    if not caller.context.may_call:
        raise permission_denied(name)


def permission_denied(name: str) -> SQLError:
    """The error for a call that the current role may not make."""
    return SQLError(
        INSUFFICIENT_PRIVILEGE,
        f"permission denied for function {name}",
        hint=f"Superusers and members of the role {EXECUTOR_ROLE} may call it; a superuser can"
        " say SELECT grant_pg_background_privileges('role').",
    )


# Finding jobs


def attached(caller: Caller, pid: int, cookie: int | None = None) -> Job:
    """The session's job with this pid and cookie, else the latest with this pid, or, without a pid,
    with this cookie; if the current role may touch it. Raises SQLError."""
    job = caller.jobs.get(pid, cookie)
    _check_role(caller, job)
    return job


async def result(caller: Caller, pid: int, cookie: int | None = None) -> Job:
    job = attached(caller, pid, cookie)
    if cookie is not None and cookie != job.cookie:
        raise SQLError(
            UNDEFINED_OBJECT, f"PID {pid} is not attached to this session (cookie mismatch)"
        )
    which = "this cookie" if pid == NO_PID else f"PID {pid}"
    if not job.keeps_rows:
        raise SQLError(
            FEATURE_NOT_SUPPORTED, f"results are disabled for {which} (submitted via submit_v2)"
        )
    if job.is_waiting:
        await caller.check_may_wait([job])
    if job.consumed:
        raise SQLError(UNDEFINED_OBJECT, f"results for {which} have already been consumed")
    return job


async def _with_cookie(caller: Caller, pid: int, cookie: int) -> JobRecord:
    """A job of this session, or of another session of the same role. Raises SQLError."""
    [job] = await _with_cookies(caller, [(pid, cookie)])
    return job


async def _with_cookies(caller: Caller, handles: Sequence[Handle]) -> list[JobRecord]:
    """Several such jobs. Raises SQLError."""
    jobs: list[JobRecord] = []
    for handle, job in zip(handles, await caller.find(handles), strict=True):
        if job is None:
            jobs.append(_own_with_cookie(caller, *handle))
        else:
            _check_role(caller, job)
            jobs.append(job)
    return jobs


def _own_with_cookie(caller: Caller, pid: int, cookie: int) -> Job:
    """A job of this session. Raises SQLError."""
    job = attached(caller, pid, cookie)
    if cookie != job.cookie:
        raise SQLError(
            OBJECT_NOT_IN_PREREQUISITE_STATE,
            f"cookie mismatch for PID {pid}",
            hint="The pid was used again, or the handle is not the one that the launch returned.",
        )
    return job


def _may_touch(caller: Caller, job: JobRecord) -> bool:
    if isinstance(job, PastJob):
        return True  # otherwise the server would not have shown it
    return job.cluster == caller.cluster and job.role_id in caller.context.roles


def _check_role(caller: Caller, job: JobRecord) -> None:
    if not _may_touch(caller, job):
        raise SQLError(
            INSUFFICIENT_PRIVILEGE,
            "permission denied for background worker with "
            + ("this cookie" if job.pid == NO_PID else f'PID "{job.pid}"'),
        )


def _own(caller: Caller) -> list[Job]:
    """The session's jobs that the current role may touch."""
    return [job for job in caller.jobs if _may_touch(caller, job)]


# Launching


def given(sql: bytes | None) -> bytes:
    """The SQL of a job. Raises SQLError for NULL."""
    if sql is None:
        raise SQLError(NULL_VALUE_NOT_ALLOWED, "sql must not be null")
    return sql


def handle_of(job: JobRecord) -> Row:
    """The pid, None if the job has none yet, and the cookie."""
    return job.pid or None, job.cookie


# Ending and forgetting


async def detach(caller: Caller, pid: int, cookie: int | None = None) -> bytes:
    job = attached(caller, pid) if cookie is None else _own_with_cookie(caller, pid, cookie)
    caller.jobs.remove(job)
    return _VOID


async def cancel(caller: Caller, pid: int, cookie: int, grace_ms: int = 0) -> bytes:
    job = await _with_cookie(caller, pid, cookie)
    await caller.cancel_job(job)
    await wait_for([job], caller, min(max(grace_ms, 0), HOUR_MS))
    return _VOID


async def cancel_by_label(caller: Caller, pattern: bytes, grace_ms: int = 0) -> int:
    jobs = [
        job
        for job in _own(caller)
        if not job.finished
        and (label := caller.text(job, job.label)) is not None
        and like(label, pattern, caller.codec)
    ]
    await _cancel(caller, jobs)
    await wait_for(jobs, caller, min(max(grace_ms, 0), HOUR_MS))
    return len(jobs)


async def cancel_all(caller: Caller) -> int:
    jobs = [job for job in _own(caller) if not job.finished]
    await _cancel(caller, jobs)
    return len(jobs)


async def _cancel(caller: Caller, jobs: list[Job]) -> None:
    """Cancel waiting jobs first: they would start in the room that others leave."""
    for job in sorted(jobs, key=lambda job: not job.is_waiting):
        await caller.cancel_job(job)


async def detach_all(caller: Caller) -> int:
    return _detach(caller, _own(caller))


async def purge(caller: Caller) -> int:
    return _detach(caller, [job for job in _own(caller) if job.finished])


def _detach(caller: Caller, jobs: Sequence[JobRecord]) -> int:
    for job in jobs:
        caller.jobs.remove(job)
    return len(jobs)


# Waiting


async def wait_for(jobs: Sequence[JobRecord], caller: Caller, timeout_ms: int | None) -> bool:
    """Wait until all have ended, within a limit (None: no limit). Returns whether they have."""
    loop = asyncio.get_running_loop()
    until = None if timeout_ms is None else loop.time() + timeout_ms / 1000
    if timeout_ms != 0:
        await caller.check_may_wait([job for job in jobs if job.is_waiting])
    return await wait_until(jobs, caller, until)


async def wait_until(jobs: Sequence[JobRecord], caller: Caller, until: float | None) -> bool:
    """The same, until this time of the loop's clock."""
    loop = asyncio.get_running_loop()
    while running := [job for job in jobs if not job.finished]:
        if until is not None and loop.time() >= until:
            return False
        await caller.wait(running, until)
    return True


def time_limit(timeout_ms: int) -> int | None:
    """A timeout_ms of 0 or less means no limit."""
    return min(timeout_ms, DAY_MS) if timeout_ms > 0 else None


async def wait(caller: Caller, pid: int, cookie: int, timeout_ms: int = 0) -> bool:
    return await wait_for([await _with_cookie(caller, pid, cookie)], caller, time_limit(timeout_ms))


async def wait_void(caller: Caller, pid: int, cookie: int) -> bytes:
    await wait(caller, pid, cookie)
    return _VOID


async def wait_timeout(caller: Caller, pid: int, cookie: int, timeout_ms: int) -> bool:
    job = await _with_cookie(caller, pid, cookie)
    return await wait_for([job], caller, min(max(timeout_ms, 0), DAY_MS))


async def wait_any(caller: Caller, handles: list[Handle], timeout_ms: int = 0) -> Row | None:
    jobs = await _with_cookies(caller, handles)
    limit = time_limit(timeout_ms)
    loop = asyncio.get_running_loop()
    until = None if limit is None else loop.time() + limit / 1000
    await caller.check_may_wait([job for job in jobs if job.is_waiting])
    while jobs:
        ended = [job for job in jobs if job.finished]
        if ended:
            return handle_of(min(ended, key=lambda job: job.finished_at or job.launched_at))
        if until is not None and loop.time() >= until:
            return None
        await caller.wait(jobs, until)
    return None


async def drain(caller: Caller, handles: list[Handle], timeout_ms: int = 0) -> list[Row]:
    found = await caller.find(handles)
    jobs = [job for job in found if job is not None and _may_touch(caller, job)]
    for job in set(caller.jobs).intersection(jobs):
        job.forget_output()
    if not await wait_for(jobs, caller, time_limit(timeout_ms)):
        await caller.find(handles)  # updates jobs of other processes
    rows = [_outcome(caller, handle, job) for handle, job in zip(handles, found, strict=True)]
    _detach(caller, jobs)
    return rows


# Inspecting


async def list_jobs(caller: Caller) -> list[Row]:
    return [_list_row(caller, job) for job in _own(caller)]


async def list_all(caller: Caller) -> list[Row]:
    jobs = [job for job in await caller.known_jobs() if _may_touch(caller, job)]
    known = {job.handle for job in jobs}
    past = [job for job in await caller.past() if job.handle not in known]
    return [_list_row(caller, job) for job in (*past, *jobs)]


def _list_row(caller: Caller, job: JobRecord) -> Row:
    return (
        *handle_of(job),
        job.launched_at,
        job.role_id,
        job.queue_size,
        job.state,
        caller.text(job, job.preview),
        caller.text(job, job.error_field("M")),
        job.consumed,
        caller.text(job, job.label),
    )


async def activity(caller: Caller) -> list[Row]:
    if caller.context.extension is None:
        check_privilege(caller, "pg_background_activity")
    jobs = _own(caller)
    running = [job for job in jobs if not job.finished]
    backends = await caller.activity(running)
    # The backend of an ended job may wait for another, or already run it.
    found = {job.handle: backends.get(job.backend_pid) for job in running}
    return [(*_list_row(caller, job), *(found.get(job.handle) or (None,) * 7)) for job in jobs]


async def stats(caller: Caller) -> Row:
    launched, completed, failed, canceled, _, *rest = await stats_2(caller)
    return (launched, completed, failed, canceled, *rest)


async def stats_2(caller: Caller) -> Row:
    counts = caller.jobs.counts
    return (
        counts.launched,
        counts.completed,
        counts.failed,
        counts.canceled,
        counts.timed_out,
        counts.active,
        counts.mean_ms,
        caller.max_workers,
    )


async def get_progress(caller: Caller, pid: int, cookie: int) -> Row:
    job = await _with_cookie(caller, pid, cookie)
    percentage, message = job.progress
    return percentage, caller.text(job, message)


async def result_info(caller: Caller, pid: int, cookie: int) -> Row:
    job = await _with_cookie(caller, pid, cookie)
    return (
        job.row_count,
        job.command_tag,
        job.finished,
        job.error is not None,
        job.launched_at,
        job.finished_at,
    )


async def error_info(caller: Caller, pid: int, cookie: int) -> Row | None:
    job = await _with_cookie(caller, pid, cookie)
    if job.error is None:
        return None
    return tuple(caller.text(job, job.error_field(code)) for code in "CMDHWstcn")


def _outcome(caller: Caller, handle: Handle, job: JobRecord | None) -> Row:
    if job is None or not _may_touch(caller, job):
        pid, cookie = handle
        return (pid or None, cookie, None, False, False, False, None, None, None, None, None, None)
    return outcome_of(caller, job)


def outcome_of(caller: Caller, job: JobRecord) -> Row:
    return (
        *handle_of(job),
        job.state,
        job.consumed,
        job.finished,
        job.error is not None,
        job.row_count,
        job.command_tag,
        job.error_field("C"),
        caller.text(job, job.error_field("M")),
        caller.text(job, job.label),
        job.launched_at,
    )


async def _known_or_past(caller: Caller, handle: Handle) -> JobRecord | None:
    [job] = await caller.find([handle])
    if job is None:
        [job, *_] = [*await caller.past([handle]), None]
    return job


async def outcome(caller: Caller, pid: int, cookie: int) -> Row:
    job = await _known_or_past(caller, (pid, cookie))
    return _outcome(caller, (pid, cookie), job)


async def status(caller: Caller, pid: int, cookie: int, *, names: Sequence[str]) -> bytes:
    """`names`: of the outcome's columns."""
    job = await _known_or_past(caller, (pid, cookie))
    row = [*zip(names, _outcome(caller, (pid, cookie), job), strict=True)]
    if job is not None and job.attempts > 1 and _may_touch(caller, job):
        row.append(("attempts", job.attempts))
    found = {name: _json(value, caller.codec) for name, value in row}
    text = json.dumps(found, ensure_ascii=False, separators=(", ", ": "))
    return text.encode(caller.codec, "surrogateescape")


def _json(value: object, codec: str) -> object:
    if isinstance(value, bytes):
        return value.decode(codec, "surrogateescape")
    return value.isoformat() if isinstance(value, datetime) else value


async def full_sql(caller: Caller, pid: int, cookie: int) -> bytes | None:
    job = await _with_cookie(caller, pid, cookie)
    return caller.text(job, job.full_sql)


# In jobs, and for administrators


async def progress(caller: Caller, pct: int | None, msg: bytes | None = None) -> None:
    raise SQLError(
        FEATURE_NOT_SUPPORTED, "pg_background_progress can only be called from a background worker"
    )


async def grant(
    caller: Caller, role_name: bytes | None, print_commands: bool | None = False
) -> bool:
    return await caller.change_privileges(
        "GRANT", role_name or b"", print_commands=bool(print_commands)
    )


async def revoke(
    caller: Caller, role_name: bytes | None, print_commands: bool | None = False
) -> bool:
    return await caller.change_privileges(
        "REVOKE", role_name or b"", print_commands=bool(print_commands)
    )


async def drop_executor_role(caller: Caller) -> bool:
    return await caller.drop_executor_role()
