"""Job metadata, shared with other sessions and worker processes.

Invariant: a record never includes rows. A job is a `JobRecord` in the process that runs it, and a
`RemoteJob` in those that have asked for it: the last answer of its own process. That does not
change by itself, except for the end, which every process that has seen the job running is told.
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
"""Bytes that hold the preview, whatever the encoding."""

LABEL_SIZE: Final = 1024
TEXT_SIZE: Final = 4096
"""Bytes that are kept of a label, and of each field of an error and a text of progress: what users
make up must not fill our memory, nor the messages between processes."""

CUT: Final = b"[...]"
"""What stands for the rest of a text that is not kept whole."""

_LISTED_FIELDS: Final = "CM"
"""The fields of an error that lists and outcomes show."""

_MILLISECOND: Final = timedelta(milliseconds=1)

JobT = TypeVar("JobT", bound="JobRecord")
ReportT = TypeVar("ReportT", ErrorResponse, NoticeResponse)

Handle = tuple[int, int]
"""Pid and cookie. No pid, `NO_PID`, means the job of the cookie, whatever its pid is."""

NO_PID: Final = 0
"""The pid of a job that waits for a backend; to users NULL."""

RUNNING: Final = b"running"
PENDING: Final = b"pending"
QUEUED: Final = b"queued"
"""States of a job that has not ended. `PENDING`: it waits for the commit of its caller; `QUEUED`:
for room."""


def new_cookie() -> int:
    """A number that tells a job from all others, and that nobody can guess."""
    return int.from_bytes(secrets.token_bytes(8), "big", signed=True)


class JobRecord:
    """One job, as those see it who do not read its rows.

    Attributes:
        pid: of its backend; `NO_PID` as long as it waits for one.
        cookie: a random number that tells it from all others.
        unfinished_state: its state until it ends: `RUNNING`, or what it waits for.
        encoding: of its SQL, its label and all that its backend says, as PostgreSQL names it;
            SQL_ASCII if it is unknown.
        label: what its launcher called it.
        role_id: OID of the current role at launch.
        cluster: what tells the database cluster of that role from others.
        queue_size: bytes of output that are held at the most.
        launched_at, finished_at: in UTC; as long as it waits for a backend, the first is when it
            was asked for.
        tags: the command tag of each statement that has ended.
        progress: percentage and message that it has last reported.
        finished: whether the backend is done, one way or the other.
        canceled, timed_out: whether it was told to stop, and because it took too long.
        error: what went wrong; fields as the server sent them, CONTEXT extended.
        consumed: whether somebody has begun to fetch the result.
        attempts: how many times it was started; more than once with `retries`.
    """

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
        # More than application_name shows, and all that a name may be.
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
        """Whether a handle with its cookie and this pid is one of it."""
        return pid in (NO_PID, self.pid)

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for a backend."""
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
        """How long it has run."""
        return round(((self.finished_at or datetime.now(UTC)) - self.launched_at) / _MILLISECOND)

    @property
    def command_tag(self) -> bytes | None:
        """Of the last statement that has ended, without the counts: INSERT, CREATE TABLE."""
        return self.tags[-1].rstrip(b" 0123456789") if self.tags else None

    @property
    def row_count(self) -> int | None:
        """Of that statement, if its command tag has one."""
        count = self.tags[-1].rpartition(b" ")[2] if self.tags else b""
        return int(count) if count.isdigit() else None

    def error_field(self, code: str) -> bytes | None:
        """A field of its error; None without one."""
        return None if self.error is None else self.error.fields.get(code)

    def report_in(self, report: ReportT, *encodings: bytes) -> ReportT:
        """A message of its backend for who has the last of these encodings (see `recoded`)."""
        fields = report.fields.items()
        return type(report)({code: recoded(it, self.encoding, *encodings) for code, it in fields})

    @property
    def preview(self) -> bytes:
        """The beginning of its SQL: 120 characters."""
        start = beginning(self._sql, LISTED_SQL_SIZE, self.encoding)
        return first_characters(start, PREVIEW_SIZE, self.encoding)

    @property
    def full_sql(self) -> bytes:
        """Its SQL; what is longer than 64 KiB is cut and marked so."""
        return shortened(self._sql, FULL_SQL_SIZE, self.encoding)

    # Who follows it

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Have a future resolved at the next change: output, columns, the end."""
        self._waiters.add(waiter)

    def remove_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Forget a future of add_waiter()."""
        self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    # To other processes

    def snapshot(self, *, whole: bool) -> dict[str, Any]:
        """What is known of it now, for JSON; unless `whole`, what a list and an outcome show."""
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
    """The stand-in for a job that another process runs.

    Attributes:
        owner: that process, by the number that the supervisor has given it.
    """

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
        """What its process says now."""
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
        # A list has less of it than others have asked for; it never changes.
        self._sql = max(self._sql, base64.b64decode(snapshot["sql"]), key=len)
        if self.finished:
            self._wake()
        return self

    def lose(self) -> None:
        """Its process is gone, and so the job has lost its connection."""
        if self.finished:
            return
        self.finished = True
        self.finished_at = datetime.now(UTC)
        self.error = SQLError(
            CONNECTION_FAILURE,
            f"lost connection to worker process with PID {self.pid}",
            detail="The process of the proxy that ran the job has ended.",
        ).response()
        self._wake()


def _text(data: bytes | None) -> str | None:
    """Bytes in JSON, in base64: as characters some would take six times their size."""
    return None if data is None else base64.b64encode(data).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def shortened(text: bytes, size: int, encoding: bytes) -> bytes:
    """At most about that many bytes of a text, and a mark if it is cut."""
    return text if len(text) <= size else beginning(text, size, encoding) + CUT


def kept_error(error: ErrorResponse, encoding: bytes) -> ErrorResponse:
    """What is kept of an error after its result was fetched, or will not be."""
    if all(len(text) <= TEXT_SIZE for text in error.fields.values()):
        return error
    return ErrorResponse(
        {
            code: shortened(text, TEXT_SIZE, encoding)
            for code, text in error.fields.items()
            if code != "q" or len(text) <= TEXT_SIZE  # a part of it would not fit the position
        }
    )


def cut_fields(body: bytes, encoding: bytes) -> bytes:
    """The body of an ErrorResponse or NoticeResponse of which only the beginning is here."""
    whole, _, last = body.rpartition(b"\0")
    if last:
        last = whole_characters(last, encoding) + CUT + b"\0"
    return (whole + b"\0" if whole else b"") + last + b"\0"


class JobRegistry(Generic[JobT]):
    """The jobs of all sessions of this process: those that wait or run, and for a while those that
    have ended.

    So another session of the same role can follow a job and stop it. What is kept of one that has
    ended is how it went, never its rows.

    Attributes:
        retention: seconds for which a job that has ended is known.
        running: those that have a backend.
        waiting: those that wait for one.
    """

    MOST = 2_000
    """How many that have ended are kept; beyond that the oldest are forgotten."""

    def __init__(self, retention: float, role_gone: Callable[[int], None]) -> None:
        """
        Args:
            retention: seconds for which a job that has ended is known.
            role_gone: called with a role's OID when its last job has been forgotten.
        """
        self.retention = retention
        self._role_gone = role_gone
        # By cookie, as in the next but one.
        self._jobs: dict[int, JobT] = {}
        # How many of them each role has launched: every call asks about their roles.
        self._roles: Counter[int] = Counter()
        # When those that have ended did so, in that order.
        self._ended: dict[int, float] = {}
        self.running: set[JobT] = set()
        self.waiting: set[JobT] = set()

    def __iter__(self) -> Iterator[JobT]:
        self._forget()
        return iter(tuple(self._jobs.values()))

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles that have launched them."""
        self._forget()
        return set(self._roles)

    @property
    def unfinished(self) -> int:
        """How many wait or run."""
        return len(self.running) + len(self.waiting)

    def get(self, pid: int, cookie: int) -> JobT | None:
        """The job of this handle, if it is known."""
        self._forget()
        job = self._jobs.get(cookie)
        return job if job is not None and job.is_meant_by(pid) else None

    def add(self, job: JobT) -> None:
        """A new one, or one that has got a backend, or that waits for one again."""
        if job.cookie not in self._jobs:
            self._jobs[job.cookie] = job
            self._roles[job.role_id] += 1
        here, elsewhere = self.running, self.waiting
        if job.pid == NO_PID:
            here, elsewhere = elsewhere, here
        here.add(job)
        elsewhere.discard(job)

    def withdraw(self, job: JobT) -> None:
        """It has not run, and will not."""
        self._unlist(job)
        self._remove(job.cookie)

    def ended(self, job: JobT) -> None:
        """It has ended; it will be forgotten later."""
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
            if when > too_old and len(self._ended) <= self.MOST:
                break
            del self._ended[cookie]
            self._remove(cookie)

    def _remove(self, cookie: int) -> None:
        role_id = self._jobs.pop(cookie).role_id
        self._roles[role_id] -= 1
        if not self._roles[role_id]:
            del self._roles[role_id]
            self._role_gone(role_id)
