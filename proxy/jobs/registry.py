"""Job metadata, shared with other sessions and worker processes.

Invariant: a record never includes rows. A job is a `JobRecord` in the process that runs it, and a
`RemoteJob` in those that have asked about it: the last answer of its process. That stays as it is,
but every process that has seen the job running is told of its end.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Self, TypeVar

from protocol.errors import CONNECTION_FAILURE, QUERY_CANCELED, SQLError
from protocol.messages import ErrorResponse, NoticeResponse
from proxy.sql.recoding import beginning, first_characters, recoded, whole_characters

PREVIEW_SIZE: Final = 120
FULL_SQL_SIZE: Final = 64 * 1024
LISTED_SQL_SIZE: Final = 4 * PREVIEW_SIZE
"""Bytes that hold the preview in any encoding."""

LABEL_SIZE: Final = 1024
TEXT_SIZE: Final = 4096
"""Bytes kept of a label, of each field of an error, and of a progress text: what users make up must
fill neither our memory nor the messages between processes."""

CUT: Final = b"[...]"
"""Stands for the rest of a text that was cut."""

_LISTED_FIELDS: Final = "CM"
"""The fields of an error in lists and outcomes."""

_MILLISECOND: Final = timedelta(milliseconds=1)

JobT = TypeVar("JobT", bound="JobRecord")
ReportT = TypeVar("ReportT", ErrorResponse, NoticeResponse)

Handle = tuple[int, int]
"""Pid and cookie; with `NO_PID` it means the job with the cookie, whatever its pid."""

NO_PID: Final = 0
"""The pid of a job that waits for a backend; users see NULL."""

RUNNING: Final = b"running"
PENDING: Final = b"pending"
QUEUED: Final = b"queued"
"""States of an unfinished job. `PENDING`: it waits for its caller's commit; `QUEUED`: for room."""


def new_cookie() -> int:
    """A random number that identifies a job and cannot be guessed."""
    return int.from_bytes(secrets.token_bytes(8), "big", signed=True)


class JobRecord:
    """The metadata of one job.

    Attributes:
        pid: of its backend; `NO_PID` while it waits for one.
        cookie: a random number that identifies it.
        unfinished_state: its state until it ends: `RUNNING`, or what it waits for.
        encoding: of its SQL, label and messages, by PostgreSQL's name; SQL_ASCII if unknown.
        label: given by its launcher.
        role_id: OID of the current role at launch.
        cluster: identifies the database cluster of that role.
        queue_size: limit of unfetched output in bytes.
        launched_at, finished_at: in UTC; a waiting job was launched at the time of the call.
        tags: the command tags of the statements that have ended.
        progress: the last report: percentage and message.
        finished: whether the backend is done, one way or the other.
        canceled, timed_out: whether it was told to stop; and whether for taking too long.
        error: the error; fields as the server sent them, CONTEXT extended.
        consumed: whether somebody has begun to fetch the result.
        attempts: how many times it was started; more than once with `retries`.
    """

    # Many ended jobs are remembered: without a dictionary each takes half as much.
    __slots__ = (
        *("pid", "cookie", "unfinished_state", "encoding", "label", "role_id", "cluster"),
        *("queue_size", "launched_at", "finished_at", "tags", "progress", "finished", "canceled"),
        *("timed_out", "error", "consumed", "attempts", "_sql", "_waiters", "__weakref__"),
    )

    def __init__(
        self,
        pid: int,
        cookie: int,
        sql: bytes,
        *,
        queue_size: int,
        role_id: int,
        cluster: bytes,
        encoding: bytes,
        label: bytes | None,
    ) -> None:
        self.pid = pid
        self.cookie = cookie
        self.unfinished_state = RUNNING
        self.encoding = encoding
        # More than application_name shows, and as long as a name may be.
        self.label = None if label is None else beginning(label, LABEL_SIZE, encoding)
        self.role_id = role_id
        self.cluster = cluster
        self.queue_size = queue_size
        self.launched_at = datetime.now(UTC)
        self.finished_at: datetime | None = None
        self.tags: list[bytes] = []
        self.progress: tuple[int | None, bytes | None] = (None, None)
        self.finished = False
        self.canceled = False
        self.timed_out = False
        self.error: ErrorResponse | None = None
        self.consumed = False
        self.attempts = 1
        self._sql = sql
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid} finished={self.finished}>"

    @property
    def handle(self) -> Handle:
        """Pid and cookie."""
        return self.pid, self.cookie

    def is_meant_by(self, pid: int) -> bool:
        """Whether this pid may accompany its cookie in a handle."""
        return pid in (NO_PID, self.pid)

    @property
    def is_waiting(self) -> bool:
        """Whether the job waits for a backend."""
        return self.pid == NO_PID and not self.finished

    @property
    def state(self) -> bytes:
        """pending, queued, running, stopped, canceled or error."""
        if not self.finished:
            return self.unfinished_state
        if self.error is None:
            return b"stopped"
        canceled = self.canceled and self.error.sqlstate == QUERY_CANCELED
        return b"canceled" if canceled else b"error"

    @property
    def elapsed_ms(self) -> int:
        """How long the job has run."""
        return round(((self.finished_at or datetime.now(UTC)) - self.launched_at) / _MILLISECOND)

    @property
    def command_tag(self) -> bytes | None:
        """The last statement's tag without counts: INSERT, CREATE TABLE."""
        return self.tags[-1].rstrip(b" 0123456789") if self.tags else None

    @property
    def row_count(self) -> int | None:
        """The row count in that tag, if any."""
        count = self.tags[-1].rpartition(b" ")[2] if self.tags else b""
        return int(count) if count.isdigit() else None

    def error_field(self, code: str) -> bytes | None:
        """A field of the error; None without one."""
        return None if self.error is None else self.error.fields.get(code)

    def report_in(self, report: ReportT, *encodings: bytes) -> ReportT:
        """A message of its backend, for a reader with the last of `encodings` (see `recoded`)."""
        fields = report.fields.items()
        return type(report)({code: recoded(it, self.encoding, *encodings) for code, it in fields})

    @property
    def preview(self) -> bytes:
        """The first 120 characters of the SQL."""
        start = beginning(self._sql, LISTED_SQL_SIZE, self.encoding)
        return first_characters(start, PREVIEW_SIZE, self.encoding)

    @property
    def full_sql(self) -> bytes:
        """The SQL; cut after 64 KiB, with a mark."""
        return shortened(self._sql, FULL_SQL_SIZE, self.encoding)

    # Waiting for changes

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Have a future resolved at the next change: output, columns, the end."""
        self._waiters.add(waiter)

    def remove_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Undo add_waiter()."""
        self._waiters.discard(waiter)

    def wake(self) -> None:
        """Something has changed: resolve the futures."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    # For other processes

    def snapshot(self, *, whole: bool) -> dict[str, Any]:
        """The metadata as JSON values; unless `whole`, only what lists and outcomes show."""
        sql_size = FULL_SQL_SIZE + 1 if whole else LISTED_SQL_SIZE
        return {
            "pid": self.pid,
            "cookie": self.cookie,
            "unfinished_state": _text(self.unfinished_state),
            "encoding": self.encoding.decode("ascii", "replace"),
            "label": _text(self.label),
            "role_id": self.role_id,
            "cluster": _text(self.cluster),
            "queue_size": self.queue_size,
            "launched_at": self.launched_at.isoformat(),
            "finished_at": None if self.finished_at is None else self.finished_at.isoformat(),
            "tag": _text(self.tags[-1]) if self.tags else None,
            "progress": [self.progress[0], _text(self.progress[1])],
            "finished": self.finished,
            "canceled": self.canceled,
            "timed_out": self.timed_out,
            "error": None
            if self.error is None
            else {
                code: _text(text)
                for code, text in self.error.fields.items()
                if whole or code in _LISTED_FIELDS
            },
            "consumed": self.consumed,
            "attempts": self.attempts,
            "sql": _text(self._sql[:sql_size]),
        }


class RemoteJob(JobRecord):
    """A job that another process runs, as last reported.

    Attributes:
        owner: that process, by its number from the supervisor.
    """

    __slots__ = ("owner",)

    def __init__(self, owner: int, snapshot: dict[str, Any]) -> None:
        super().__init__(
            snapshot["pid"],
            snapshot["cookie"],
            b"",
            queue_size=snapshot["queue_size"],
            role_id=snapshot["role_id"],
            cluster=base64.b64decode(snapshot["cluster"]),
            encoding=snapshot["encoding"].encode(),
            label=_bytes(snapshot["label"]),
        )
        self.owner = owner
        self.update(snapshot)

    def update(self, snapshot: dict[str, Any]) -> Self:
        """Update from a snapshot by its process."""
        finished_at, tag, error = snapshot["finished_at"], snapshot["tag"], snapshot["error"]
        percentage, message = snapshot["progress"]
        self.pid = snapshot["pid"]
        self.unfinished_state = base64.b64decode(snapshot["unfinished_state"])
        self.launched_at = datetime.fromisoformat(snapshot["launched_at"])
        self.finished_at = None if finished_at is None else datetime.fromisoformat(finished_at)
        self.tags = [] if tag is None else [base64.b64decode(tag)]
        self.progress = (percentage, _bytes(message))
        self.finished = snapshot["finished"]
        self.canceled = snapshot["canceled"]
        self.timed_out = snapshot["timed_out"]
        self.error = (
            None
            if error is None
            else ErrorResponse({code: base64.b64decode(text) for code, text in error.items()})
        )
        self.consumed = snapshot["consumed"]
        self.attempts = snapshot["attempts"]
        # A list has less of it than other answers; the SQL never changes.
        self._sql = max(self._sql, base64.b64decode(snapshot["sql"]), key=len)
        if self.finished:
            self.wake()
        return self

    def lose(self) -> None:
        """Its process is gone, and with it the job's connection."""
        if self.finished:
            return
        self.finished = True
        self.finished_at = datetime.now(UTC)
        self.error = SQLError(
            CONNECTION_FAILURE,
            f"lost connection to worker process with PID {self.pid}",
            detail="The process of the proxy that ran the job has ended.",
        ).response()
        self.wake()


def _text(data: bytes | None) -> str | None:
    """Bytes as base64 in JSON: as characters, some would take six times their size."""
    return None if data is None else base64.b64encode(data).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def shortened(text: bytes, size: int, encoding: bytes) -> bytes:
    """About the first `size` bytes of a text, with a mark if it was cut."""
    return text if len(text) <= size else beginning(text, size, encoding) + CUT


def kept_error(error: ErrorResponse, encoding: bytes) -> ErrorResponse:
    """What is kept of an error once nobody will fetch the result."""
    if all(len(text) <= TEXT_SIZE for text in error.fields.values()):
        return error
    return ErrorResponse(
        {
            code: shortened(text, TEXT_SIZE, encoding)
            for code, text in error.fields.items()
            if code != "q" or len(text) <= TEXT_SIZE  # cut, it would not fit the position
        }
    )


def cut_fields(body: bytes, encoding: bytes) -> bytes:
    """The body of an ErrorResponse or NoticeResponse of which only the beginning is known."""
    whole, _, last = body.rpartition(b"\0")
    if last:
        last = whole_characters(last, encoding) + CUT + b"\0"
    return (whole + b"\0" if whole else b"") + last + b"\0"


class JobRegistry(Generic[JobT]):
    """The jobs of all sessions of this process, including, for a while, those that have ended.

    Through it other sessions of the same role can follow and stop a job. It keeps no rows.

    Attributes:
        retention: seconds for which an ended job is known.
        running: jobs that have a backend.
        waiting: jobs that wait for one.
    """

    MAX_ENDED = 2_000
    """Limit of ended jobs; beyond it the oldest are forgotten."""

    def __init__(self, retention: float, role_gone: Callable[[int], None]) -> None:
        """
        Args:
            retention: seconds for which an ended job is known.
            role_gone: called with a role's OID when its last job is forgotten.
        """
        self.retention = retention
        self._role_gone = role_gone
        # By cookie.
        self._jobs: dict[int, JobT] = {}
        # Number of jobs by launching role: every call asks about roles.
        self._roles: Counter[int] = Counter()
        # When jobs ended, by cookie, in that order.
        self._ended: dict[int, float] = {}
        self.running: set[JobT] = set()
        self.waiting: set[JobT] = set()

    def __iter__(self) -> Iterator[JobT]:
        self._forget()
        return iter(tuple(self._jobs.values()))

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles that have launched these jobs."""
        self._forget()
        return set(self._roles)

    @property
    def unfinished(self) -> int:
        """Number of jobs that wait or run."""
        return len(self.running) + len(self.waiting)

    def get(self, pid: int, cookie: int) -> JobT | None:
        """The job of this handle, if it is known."""
        self._forget()
        job = self._jobs.get(cookie)
        return job if job is not None and job.is_meant_by(pid) else None

    def add(self, job: JobT) -> None:
        """Add a new job; or move one that has got a backend, or waits for one again."""
        if job.cookie not in self._jobs:
            self._jobs[job.cookie] = job
            self._roles[job.role_id] += 1
        here, elsewhere = self.running, self.waiting
        if job.pid == NO_PID:
            here, elsewhere = elsewhere, here
        here.add(job)
        elsewhere.discard(job)

    def withdraw(self, job: JobT) -> None:
        """Remove a job that has not run and will not."""
        self._unlist(job)
        self._remove(job.cookie)

    def ended(self, job: JobT) -> None:
        """A job has ended; it is forgotten later."""
        self._unlist(job)
        self._ended[job.cookie] = time.monotonic()
        self._forget()

    def _unlist(self, job: JobT) -> None:
        self.running.discard(job)
        self.waiting.discard(job)

    def _forget(self) -> None:
        too_old = time.monotonic() - self.retention
        while self._ended:
            cookie, when = next(iter(self._ended.items()))
            if when > too_old and len(self._ended) <= self.MAX_ENDED:
                break
            del self._ended[cookie]
            self._remove(cookie)

    def _remove(self, cookie: int) -> None:
        role_id = self._jobs.pop(cookie).role_id
        self._roles[role_id] -= 1
        if not self._roles[role_id]:
            del self._roles[role_id]
            self._role_gone(role_id)
