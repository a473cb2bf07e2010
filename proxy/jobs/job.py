"""Background jobs: SQL strings that run in side backends.

Invariant: a job is one Query message in a backend of its own. PostgreSQL runs such a message as one
transaction, so the string commits or fails as a whole, and a single statement may be one that
refuses transaction blocks. (Behind a connection pooler it may not: there the transaction is open
already, and is committed after the message.) Only the last statement's rows are results; earlier
ones are dropped as they arrive, and output that is not fetched stays in the server (`rows`). A
message longer than the queue (or `LONGEST`) is cut as it arrives, and when the session is done with
a job, only what others may ask for is kept (`registry`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol, TypeVar

from protocol.errors import (
    ACTIVE_SQL_TRANSACTION,
    CONFIGURATION_LIMIT_EXCEEDED,
    CONNECTION_FAILURE,
    FEATURE_NOT_SUPPORTED,
    INVALID_PARAMETER_VALUE,
    INVALID_TRANSACTION_TERMINATION,
    UNDEFINED_OBJECT,
    ProtocolViolation,
    SQLError,
)
from protocol.framing import HEADER_SIZE, LongMessage, bad_length, skip_run, unpack_length
from protocol.kinds import B, TransactionStatus
from protocol.messages import (
    CommandComplete,
    CopyFail,
    ErrorResponse,
    Field,
    NoticeResponse,
    Query,
    RowDescription,
)
from protocol.startup import CancelRequest
from proxy.backends.backend import READ_SIZE, Backend
from proxy.backends.route import Route
from proxy.config.gucs import MAX_WORKERS
from proxy.jobs.progress import parse_progress, progress_statement
from proxy.jobs.registry import (
    FULL_SQL_SIZE,
    LISTED_SQL_SIZE,
    TEXT_SIZE,
    JobRecord,
    cut_fields,
    kept_error,
    shortened,
)
from proxy.jobs.rows import Budget, Notice, OutputQueue, Rows
from proxy.sql import lexer
from proxy.sql.lexer import LexError

MIN_QUEUE_SIZE: Final = 64
MAX_QUEUE_SIZE: Final = 256 * 1024 * 1024

LONGEST: Final = 1024 * 1024
"""Bytes that an error or a notice may have, whatever the queue size."""

_IDLE: Final = bytes([TransactionStatus.IDLE])

_REFUSES_BLOCKS: Final = (ACTIVE_SQL_TRANSACTION, INVALID_TRANSACTION_TERMINATION)

ReportT = TypeVar("ReportT", ErrorResponse, NoticeResponse)


class JobSession(Protocol):
    """Serves what a job's SQL calls."""

    def begin(self, output: OutputQueue) -> None:
        """The job is about to start; its messages go there."""

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the job; whether it was a call, and is dealt with."""

    @property
    def is_talkative(self) -> bool:
        """Whether others should have their turn before more is read."""

    def statement_ended(self) -> None:
        """No function waits for an answer any more."""

    def close(self) -> None:
        """The job has ended."""


class Job(JobRecord):
    """One job: its backend while it runs, its output until somebody takes it, how it went.

    Attributes:
        route: to its server.
        output: rows and notices that have not been fetched yet.
        keeps_rows: whether its rows are kept for somebody to fetch.
        columns: of the result; None as long as they are not known, and if there are none.
        parameters: what its backend has reported (ParameterStatus).
        has_handle: whether anybody knows it by one; if not, only its reader can stop it.
    """

    def __init__(
        self,
        backend: Backend,
        sql: bytes,
        *,
        queue_size: int,
        role_id: int,
        cluster: bytes,
        route: Route,
        label: bytes | None = None,
        marker: bytes,
        keep_rows: bool = True,
        budgets: Sequence[Budget] = (),
        session: JobSession | None,
        on_finish: Callable[[Job], None],
    ) -> None:
        super().__init__(
            backend.pid,
            int.from_bytes(secrets.token_bytes(8), "big", signed=True),
            sql,
            queue_size=queue_size,
            role_id=role_id,
            cluster=cluster,
            label=label,
        )
        self.route = route
        self.keeps_rows = keep_rows
        self.columns: tuple[Field, ...] | None = None
        self.has_handle = True
        self.parameters = backend.parameters
        # None once it has ended: many are known for a while after that.
        self._backend: Backend | None = backend
        self._on_finish: Callable[[Job], None] | None = on_finish
        self.output = OutputQueue(queue_size, backend, budgets)
        if not keep_rows:
            self.output.drop()
        if session is not None:
            session.begin(self.output)
        self._statements = 0
        self._statements_done = 0
        self._taken_up = False
        # Whether the string has run, and its transaction is being committed.
        self._commits = False
        self._left = False
        self._afterwards: list[Callable[[], object]] = []
        # The whole error, for a fetch of the result; `error` is what is kept of it.
        self._whole_error: ErrorResponse | None = None
        # Statements, by their place, that stand for a call of pg_background_progress, and the word
        # by which its messages are known.
        self._progress_calls: frozenset[int] = frozenset()
        self._marker = marker
        self._session = session
        # Reading: a message that is not whole yet, and how much of it is missing; a long one; or
        # bytes still to come of a long row, which is passed on in pieces.
        self._partial = b""
        self._missing = 0
        self._long: LongMessage | None = None
        self._rest_of_row = 0
        # What the server said before it closed the connection.
        self._fatal: ErrorResponse | None = None

    # Its life

    async def start(self) -> None:
        """Run the string, unless it holds a statement that a job may not run.

        Returns when the backend has taken it up.
        """
        backend = self._backend
        assert backend is not None
        try:
            sql = await self._prepared(backend.parameters)
        except SQLError as refusal:
            if not self.finished:
                self._fail(refusal.response())
                self._finish()
        except asyncio.CancelledError:
            self.abandon()  # nothing has been sent that could be canceled
            raise
        else:
            if self.finished:
                return  # it was abandoned meanwhile
            if not backend.is_alive:
                self.close(ConnectionError("the server closed the connection"))
                return
            backend.start(sql, self)
            self._sql = self._sql[: FULL_SQL_SIZE + 1]
            while not (self._taken_up or self.finished):
                waiter = asyncio.get_running_loop().create_future()
                self.add_waiter(waiter)
                await waiter

    async def _prepared(self, parameters: dict[bytes, bytes]) -> bytes:
        """The string for the server. Its statements are counted, and looked at one by one; it may
        be long, and others have their turn between them.

        What cannot be lexed is left to the server, which will say what is wrong with it. Raises
        SQLError for a statement that would break the job's transaction or the protocol.
        """
        conforming = parameters.get(b"standard_conforming_strings") != b"off"
        encoding = parameters.get(b"client_encoding", b"").decode("ascii", "replace")
        sql = self._sql
        refusal: str | None = None
        count = end = 0
        blocks: set[int] = set()
        parts: list[bytes] = []
        try:
            for statement in lexer.split_in_turns(
                sql, standard_conforming_strings=conforming, encoding=encoding
            ):
                if statement is None or count % 64 == 63:
                    await asyncio.sleep(0)
                if statement is None:
                    continue
                refusal = refusal or _refused(sql, statement)
                block = progress_statement(sql, statement, self._marker, encoding=encoding)
                if block is not None:
                    blocks.add(count)
                    parts += [sql[end : statement.start], block]
                    end = statement.end
                count += 1
        except LexError:
            return sql
        if refusal is not None:
            raise SQLError(FEATURE_NOT_SUPPORTED, refusal)
        self._statements = count
        self._progress_calls = frozenset(blocks)
        return b"".join([*parts, sql[end:]])

    def _finish(self) -> None:
        self.finished = True
        self._sql = self._sql[: FULL_SQL_SIZE + 1]
        self.finished_at = datetime.now(UTC)
        self._partial = b""
        self._long = None
        if self._backend is not None:
            self._backend.receiver = None
            self._backend.terminate()
            self._backend = None
        self.output.end()
        if self._session is not None:
            self._session.close()
            self._session = None
        self._wake()
        for then in self._afterwards:
            then()
        self._afterwards.clear()
        if self._on_finish is not None:
            # Drop the callback: a finished job must not keep its session alive.
            on_finish, self._on_finish = self._on_finish, None
            on_finish(self)

    def when_finished(self, then: Callable[[], object]) -> None:
        """Have something done when it has ended, or at once."""
        if self.finished:
            then()
        else:
            self._afterwards.append(then)

    def abandon(self) -> None:
        """The proxy stops: hang up."""
        if not self.finished:
            self._finish()

    def cancel_request(self) -> CancelRequest:
        """What makes the server cancel it, while it runs."""
        assert self._backend is not None
        return self._backend.cancel_request()

    # Without a reader

    def leave(self) -> None:
        """Its session is done with it: of what it holds only the outcome is of use, to others."""
        self._left = True
        self.forget_output()
        self._sql = self._sql[:LISTED_SQL_SIZE]
        # Who is in the middle of the result has its own.
        self._whole_error = self.columns = None
        self.tags = self.tags[-1:]

    def forget_output(self) -> None:
        """It will not be fetched: from now on it is read and dropped, so the job never waits."""
        self.output.drop()

    @property
    def fetched_error(self) -> ErrorResponse | None:
        """Its error for a fetch of the result: all of it, as long as the session has the job."""
        return self._whole_error or self.error

    # What its backend sends

    def room(self) -> int:
        """Bytes that may come in: what is left of the queue."""
        room = self.output.room
        return READ_SIZE if room is None else max(room, self._missing)

    def feed(self, data: memoryview) -> None:
        """Sort the input. A malformed stream ends the job."""
        try:
            if self._long is not None:
                data = data[self._long.feed(data) :]
                self._missing = self._long.missing
                if self._missing:
                    return
                long, self._long = self._long, None
                self._message(long.kind, _whole(long) if long.is_cut else long.body)
                if self.finished:
                    return
            self._read(self._partial + data)
        except ProtocolViolation as error:
            self.close(error)
            return
        self.output.stop_if_full()
        if self._waiters:
            self._wake()

    def _read(self, data: bytes) -> None:
        size = len(data)
        position = min(self._rest_of_row, size)
        self._rest_of_row -= position
        self._rows(data[:position], 0, cut=self._rest_of_row > 0)
        # data[rows:position] is rows that are not queued yet: they are queued a run at a time.
        rows, count = position, 0
        self._missing = 0
        while size - position >= HEADER_SIZE:
            kind = data[position]
            (length,) = unpack_length(data, position + 1)
            if length < 4:
                raise bad_length(kind, length)
            end = position + 1 + length
            if kind == B.DATA_ROW and end <= size:
                position, whole = skip_run(data, position)
                count += whole
                continue
            self._rows(data[rows:position], count)
            rows = position
            count = 0
            if end > size:
                if kind == B.DATA_ROW and end - position > READ_SIZE:
                    self._rows(data[position:], 1, cut=True)
                    self._rest_of_row = end - size
                    rows = position = size
                elif end - position > READ_SIZE:
                    limit = max(self.queue_size, LONGEST)
                    self._long = LongMessage(kind, length - 4, limit)
                    self._long.feed(memoryview(data)[position + HEADER_SIZE :])
                    self._missing = self._long.missing
                    rows = position = size
                else:
                    self._missing = end - size
                break
            self._message(kind, data[position + HEADER_SIZE : end])
            if self.finished:
                return
            rows = position = end
        self._rows(data[rows:position], count)
        self._partial = data[position:]

    def _rows(self, data: bytes, count: int, *, cut: bool = False) -> None:
        if data and self._is_last_statement:
            self.output.put(Rows(data, count, cut))

    @property
    def _is_last_statement(self) -> bool:
        return self._statements_done == self._statements - 1

    def _message(self, kind: int, body: bytes) -> None:
        if kind == B.ROW_DESCRIPTION:
            if self._is_last_statement and not self._left:
                self.columns = RowDescription.parse(body).fields
        elif kind == B.COMMAND_COMPLETE and self._commits:
            pass
        elif kind == B.COMMAND_COMPLETE:
            self._statement_ended()
            is_progress = self._statements_done in self._progress_calls
            self._statements_done += 1
            self._add_tag(b"SELECT 1" if is_progress else CommandComplete.parse(body).tag)
        elif kind == B.NOTICE_RESPONSE:
            is_call = self._session is not None and self._session.notice(body)
            if is_call and self._session is not None and self._session.is_talkative:
                assert self._backend is not None
                self._backend.take_a_break()
            if not is_call and not self._report_progress(body):
                self.output.put(Notice(body))
        elif kind == B.ERROR_RESPONSE:
            self._statement_ended()
            error = ErrorResponse.parse(body)
            if error.severity in ("FATAL", "PANIC"):
                self._fatal = error
            else:
                self._fail(self._explained(error))
        elif kind == B.COPY_IN_RESPONSE:
            # A COPY that the lexer did not recognise; without this the server waits for ever.
            assert self._backend is not None
            refusal = CopyFail(b"not allowed in pg_background")
            self._backend.transport.write(refusal.serialize())
        elif kind == B.PARSE_COMPLETE:
            self._taken_up = True
        elif kind == B.READY_FOR_QUERY:
            self._ready(body)

    def _ready(self, status: bytes) -> None:
        """The string has run. The transaction that was open for it is committed; if it has failed,
        that ends it, too."""
        assert self._backend is not None
        if self._backend.is_pooled and status != _IDLE and not self._commits:
            self._commits = True
            self._backend.transport.write(Query(b"COMMIT").serialize())
        else:
            self._finish()

    def _fail(self, error: ErrorResponse) -> None:
        whole = self._with_context(error)
        self.error = kept_error(whole)
        if not self._left:
            self._whole_error = whole

    def _add_tag(self, tag: bytes) -> None:
        if self._left:
            self.tags = [tag]
        else:
            # A long string has many statements, and most of them end in the same way.
            self.tags.append(self.tags[-1] if self.tags and self.tags[-1] == tag else tag)

    def _statement_ended(self) -> None:
        if self._session is not None:
            self._session.statement_ended()

    def _report_progress(self, notice: bytes) -> bool:
        """What a call of pg_background_progress has said; false if it is something else."""
        if self._marker not in notice:
            return False
        message = NoticeResponse.parse(notice).message
        if not message.startswith(self._marker):
            return False
        try:
            percentage, text = parse_progress(message, self._marker)
        except ValueError:
            return False
        clamped = None if percentage is None else min(max(percentage, 0), 100)
        self.progress = (clamped, None if text is None else shortened(text, TEXT_SIZE))
        return True

    def _explained(self, error: ErrorResponse) -> ErrorResponse:
        """With a word about the transaction block if that is what a statement has refused."""
        assert self._backend is not None
        if not (self._backend.is_pooled and error.sqlstate in _REFUSES_BLOCKS):
            return error
        return error.with_fields(
            H=b"The proxy reaches the server through a connection pooler, so background workers run"
            b" in a transaction block. Have the proxy connect to the server itself."
        )

    def notice(self, output: Notice) -> bytes:
        """A message of the job as its caller gets it: the whole NoticeResponse."""
        return self._with_context(NoticeResponse.parse(output.data)).serialize()

    def _with_context(self, report: ReportT) -> ReportT:
        line = b"background worker, pid %d" % self.pid
        context = report.fields.get("W")
        return report.with_fields(W=context + b"\n" + line if context else line)

    def close(self, error: Exception) -> None:
        """The connection ended before the job did."""
        if self.finished:
            return
        self.output.drop_cut_row()
        reason = self._fatal.message.decode("utf-8", "replace") if self._fatal else str(error)
        lost = SQLError(
            CONNECTION_FAILURE,
            f"lost connection to worker process with PID {self.pid}",
            detail=f"{reason[:1].upper()}{reason[1:]}.",
        )
        self.error = self._whole_error = kept_error(lost.response())
        self._finish()


def _whole(message: LongMessage) -> bytes:
    """The body of an error or a notice that was cut. Raises ProtocolViolation for others."""
    if message.kind not in (B.ERROR_RESPONSE, B.NOTICE_RESPONSE):
        raise ProtocolViolation(f"message of type {chr(message.kind)!r} is too long")
    return cut_fields(message.body)


def _refused(sql: bytes, statement: lexer.Statement) -> str | None:
    """Why a job may not run this, if that is so."""
    if lexer.is_transaction_control(sql, statement):
        return "transaction control statements are not allowed in pg_background"
    if lexer.is_client_copy(sql, statement):
        return "COPY protocol not allowed in pg_background"
    return None


@dataclass(slots=True)
class Counts:
    """How many jobs a session had, and how they ended; active is how many run now."""

    launched: int = 0
    completed: int = 0
    failed: int = 0
    canceled: int = 0
    timed_out: int = 0
    total_ms: int = 0

    @property
    def active(self) -> int:
        """Those that have not ended."""
        return self.launched - self._ended

    @property
    def mean_ms(self) -> float:
        """Of those that have ended; 0 if there are none."""
        return self.total_ms / self._ended if self._ended else 0.0

    @property
    def _ended(self) -> int:
        return self.completed + self.failed + self.canceled

    def ended(self, job: Job) -> None:
        """One more has ended."""
        self.total_ms += job.elapsed_ms
        self.timed_out += job.timed_out
        if job.state == b"canceled":
            self.canceled += 1
        elif job.error is not None:
            self.failed += 1
        else:
            self.completed += 1


class Jobs:
    """The jobs of one session that it has launched and not yet fetched or detached, by pid."""

    MOST: Final = 2_000
    """How many it has at the most, as long as some have ended: the oldest of those is detached, as
    they do not seem to be fetched."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self.counts = Counts()

    def __iter__(self) -> Iterator[Job]:
        return iter(tuple(self._jobs.values()))

    def __contains__(self, job: JobRecord) -> bool:
        return self._jobs.get(job.pid) is job

    def check_limit(self, max_workers: int, most: int) -> None:
        """Raises SQLError 53400 if as many as that are running: the session's setting, and what
        the proxy's configuration allows at the most."""
        running = sum(not job.finished for job in self._jobs.values())
        if running >= most and most < max_workers:
            raise SQLError(
                CONFIGURATION_LIMIT_EXCEEDED,
                "too many background workers",
                detail=f"This session runs {running} background workers, and the proxy allows"
                f" {most} (max_session_workers), whatever {MAX_WORKERS.name} is.",
                hint="Wait for some to finish, or fetch or detach their results.",
            )
        if running >= max_workers:
            raise SQLError(
                CONFIGURATION_LIMIT_EXCEEDED,
                "too many background workers",
                detail=f"This session runs {running} background workers, and"
                f" {MAX_WORKERS.name} is {max_workers}.",
                hint="Wait for some to finish, fetch or detach their results, or increase"
                f" {MAX_WORKERS.name}.",
            )

    def add(self, job: Job) -> None:
        """Attach a job. An older one of the same pid is history: its backend is gone."""
        if job.pid in self._jobs:
            self.remove(self._jobs[job.pid])
        self._jobs[job.pid] = job
        self.counts.launched += 1
        if len(self._jobs) > self.MOST:
            ended = next((job for job in self._jobs.values() if job.finished), None)
            if ended is not None:
                self.remove(ended)

    def get(self, pid: int) -> Job:
        """The job of this pid. Raises SQLError 42704."""
        try:
            return self._jobs[pid]
        except KeyError:
            raise SQLError(UNDEFINED_OBJECT, f"PID {pid} is not attached to this session") from None

    def remove(self, job: JobRecord) -> None:
        """The session is done with it. If it runs, it runs on to its end. Those of other sessions
        are not touched."""
        if job in self:
            self._jobs.pop(job.pid).leave()

    def clear(self) -> None:
        """The session ends."""
        for job in self:
            self.remove(job)


def checked_queue_size(queue_size: int, default: int) -> int:
    """The queue size in bytes for what a launch asks for; 0 or less is the default.

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
