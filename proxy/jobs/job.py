"""Background jobs: SQL strings that run in side backends.

Invariant: a job is one Query message in a backend of its own. PostgreSQL runs such a message as one
transaction, so the string commits or fails as a whole; a single statement may be one that refuses
transaction blocks. (Not behind a connection pooler: there a transaction is already open, and is
committed after the message.) Only the last statement's rows are results; others are dropped as they
arrive, and output that is not fetched stays in the server (`rows`). A message longer than the queue
(or `LONGEST`) is cut as it arrives. Once the session is done with a job, only its metadata stays
(`registry`). Our own statements follow a string that may change `output_settings`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from protocol.errors import (
    ADMIN_SHUTDOWN,
    FEATURE_NOT_SUPPORTED,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.kinds import B, TransactionStatus
from protocol.messages import (
    CommandComplete,
    CopyFail,
    ErrorResponse,
    Field,
    NoticeResponse,
    ParameterStatus,
    Query,
    RowDescription,
)
from protocol.startup import CancelRequest
from proxy.backends import pooler
from proxy.backends.backend import READ_SIZE, Backend
from proxy.backends.reuse import KeepBackend, ReleaseBackend, is_remembered
from proxy.backends.route import Route
from proxy.jobs import output_settings
from proxy.jobs.job_input import JobInput
from proxy.jobs.job_text import JobText
from proxy.jobs.output_settings import OutputSettings
from proxy.jobs.progress import progress_statement, reported
from proxy.jobs.registry import (
    FULL_SQL_SIZE,
    LISTED_SQL_SIZE,
    NO_PID,
    RUNNING,
    JobRecord,
    ReportT,
    kept_error,
    new_cookie,
)
from proxy.jobs.rows import Budget, Notice, OutputQueue, Rows
from proxy.jobs.termination import Lease, Termination, canceled, lost_connection
from proxy.sql import lexer
from proxy.sql.lexer import LexError
from proxy.sql.rewrite import Piece

LONGEST: Final = 1024 * 1024
"""Bytes of an error or notice that are kept, whatever the queue size."""

_IDLE: Final = bytes([TransactionStatus.IDLE])


class JobSession(Protocol):
    """Serves the calls in a job's SQL."""

    def begin(self, output: OutputQueue) -> None:
        """The job is about to start. `output`: for messages to its caller."""

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the job. Returns whether it was a call, which is then handled."""

    @property
    def is_talkative(self) -> bool:
        """Whether others should get a turn before more is read."""

    def statement_ended(self) -> None:
        """No function waits for an answer any more."""

    def failed(self, error: bytes) -> bytes:
        """The same, by this error (its body); what the error is to be told as."""

    def close(self, *, is_idle: bool) -> None:
        """The job has ended. `is_idle`: its backend is ready for another."""


class Job(JobRecord):
    """One job: its backend while it runs, its output until it is fetched, its outcome.

    Attributes:
        route: to its server.
        user, database: its backend's login.
        output: rows and notices not fetched yet.
        keeps_rows: whether its rows are kept to be fetched.
        columns: of the result; None if there are none, or not yet known.
        parameters: what its backend has reported (ParameterStatus).
        has_handle: whether anybody knows its handle; if not, only its reader can stop it.
        lease: lends a channel that may terminate its backend, while it runs.
        termination: of its backend, once tried.
        is_abandoned: whether the proxy hung up while it ran; only the server knows the outcome.
        is_lost: whether the server did not say why the connection ended.
        cut_off: the error of a job whose terminated backend ended without one, if it turns out that
            the job may have committed before.
    """

    def __init__(
        self,
        sql: bytes,
        *,
        queue_size: int,
        role_id: int,
        cluster: bytes,
        encoding: bytes,
        route: Route,
        user: bytes,
        database: bytes,
        lease: Lease,
        label: bytes | None = None,
        keep_rows: bool = True,
        budgets: Sequence[Budget] = (),
        on_finish: Callable[[Job], None],
    ) -> None:
        super().__init__(
            NO_PID,
            new_cookie(),
            sql,
            queue_size=queue_size,
            role_id=role_id,
            cluster=cluster,
            encoding=encoding,
            label=label,
        )
        self.route = route
        self.user = user
        self.database = database
        self.lease: Lease | None = lease
        self.termination: Termination | None = None
        self.keeps_rows = keep_rows
        self.columns: tuple[Field, ...] | None = None
        self.has_handle = True
        self.is_abandoned = self.is_lost = False
        self._on_finish: Callable[[Job], None] | None = on_finish
        self._release_backend: ReleaseBackend | None = None
        self._is_detached = False
        self._afterwards: list[Callable[[], object]] = []
        # The whole error, for a fetch; `error` is shortened.
        self._whole_error: ErrorResponse | None = None
        # None before and after the run: many ended jobs are remembered for a while.
        self._backend: Backend | None = None
        self._session: JobSession | None = None
        self.parameters: dict[bytes, bytes] = {}
        self.output = OutputQueue(queue_size, budgets)
        if not keep_rows:
            self.output.drop()
        self.cut_off: ErrorResponse | None = None

    def assign(
        self,
        backend: Backend,
        sql: bytes,
        *,
        marker: bytes,
        session: JobSession | None,
        keep_backend: KeepBackend,
    ) -> None:
        """Assign the job to a backend.

        Args:
            backend: that nothing else uses.
            sql: the whole string; the job's metadata may have less of it.
            marker: a word that identifies messages of pg_background_progress.
            session: serves the calls in its SQL.
            keep_backend: takes the backend when the job has ended.
        """
        self.pid, self.unfinished_state = backend.pid, RUNNING
        self.launched_at = datetime.now(UTC)
        self._sql = sql
        self._run_on(backend, marker, session, keep_backend)

    def requeue(self, state: bytes) -> None:
        """The backend has not run the job: wait for another, in this state."""
        self._let_go(is_idle=False)
        self.pid, self.unfinished_state = NO_PID, state

    def _run_on(
        self, backend: Backend, marker: bytes, session: JobSession | None, keep_backend: KeepBackend
    ) -> None:
        """Run on a backend on which nothing of the string has run. Arguments as for `assign`."""
        self._keep_backend = keep_backend
        self.parameters = backend.parameters
        self._backend = backend
        backend.is_spent = is_remembered(self._sql)
        self.output.read(backend)
        if session is not None:
            session.begin(self.output)
        self._statements = 0
        self._statements_done = 0
        self._taken_up = False
        self._output_settings = OutputSettings(backend.parameters)
        # Behind a pooler: whether COMMIT or ROLLBACK was sent.
        self._commits = False
        # Whether the string's transaction has committed (or failed): only our query for the
        # settings still runs.
        self._is_committed = False
        self._text = JobText(self._sql, backend.parameters, marker)
        self._marker = marker
        self._session = session
        self._input = JobInput(max(self.queue_size, LONGEST), self.encoding)
        # The server's error before it closed the connection.
        self._fatal: ErrorResponse | None = None
        self.cut_off = None

    # Life cycle

    async def start(self) -> None:
        """Run the string, unless it holds a statement that a job may not run.

        Returns when the backend has begun to run it. Raises what `Backend.start` raises.
        """
        backend = self._backend
        assert backend is not None
        if backend.setup is None:
            self._output_settings.callers = output_settings.read(backend.setup_row[2:])
        try:
            if backend.setup is not None and backend.setup.changes_reading:
                await self._take_over(backend)
            sql = await self._prepared(backend)
        except ServerError:
            raise
        except SQLError as refusal:
            await self._take_over(backend)
            if not self.finished:
                self._fail(refusal.response())
                self._finish()
        except asyncio.CancelledError:
            self.abandon()  # nothing was sent that could be cancelled
            raise
        else:
            if self.finished:
                return  # it was abandoned meanwhile
            if not backend.is_alive and backend.setup is None:
                self.close(ConnectionError("the server closed the connection"))
                return
            self._sql = self._sql[: FULL_SQL_SIZE + 1]
            await backend.start(sql, self, functools.partial(self._take_up, backend))

    async def _take_over(self, backend: Backend) -> None:
        """Have the backend take over the session's state now, unless it has."""
        if backend.setup is not None:
            await backend.take_over()
            if not self.finished:
                self._output_settings.callers = output_settings.read(backend.setup_row[2:])

    def _take_up(self, backend: Backend) -> None:
        self._output_settings.callers = output_settings.read(backend.setup_row[2:])
        self._text.taken_up()
        self._taken_up = True
        if self._is_detached:
            self.detach()

    def withdraw(self) -> None:
        """Forget the job, which has not run and will not."""
        self._on_finish = None
        self._finish()

    async def _prepared(self, backend: Backend) -> bytes:
        """The string for the server. Statements are counted and examined one by one, with turns for
        others, since there may be many.

        What cannot be tokenized is left to the server to reject. Raises SQLError for a statement
        that would break the job's transaction or the protocol, and what `Backend.take_over` raises.
        """
        parameters = backend.parameters
        conforming = parameters.get(b"standard_conforming_strings") != b"off"
        encoding = parameters.get(b"client_encoding", b"").decode("ascii", "replace")
        sql = self._sql
        refusal: str | None = None
        count = end = 0
        blocks: dict[int, tuple[Piece, ...]] = {}
        pieces: list[Piece] = []
        last: lexer.Statement | None = None
        try:
            for statement in lexer.split_in_turns(
                sql, standard_conforming_strings=conforming, encoding=encoding
            ):
                if statement is None or count % 64 == 63:
                    await asyncio.sleep(0)
                if statement is None:
                    continue
                if last is not None and count - 1 not in blocks:
                    self._output_settings.look(sql, last)
                last = statement
                refusal = refusal or self._refused(sql, statement)
                block = progress_statement(sql, statement, self._marker, encoding=encoding)
                if block is not None:
                    blocks[count] = block
                    pieces += [Piece(end, statement.start), *block]
                    end = statement.end
                count += 1
        except LexError:
            return sql
        if refusal is not None:
            raise SQLError(FEATURE_NOT_SUPPORTED, refusal)
        self._statements = count
        if last is None or not self.keeps_rows or count - 1 in blocks:
            pieces.append(Piece(end, len(sql)))
        else:
            if self._output_settings.may_need_callers(sql, last):
                await self._take_over(backend)
            if self.finished:
                return b""  # it was abandoned meanwhile
            pieces.append(Piece(end, last.start))
            pieces += self._output_settings.last_statement(sql, last, count - 1)
            self._statements += self._output_settings.added_statements
        return self._text.sent(pieces, blocks)

    def _refused(self, sql: bytes, statement: lexer.Statement) -> str | None:
        """Why a job may not run this statement; None if it may."""
        if lexer.is_transaction_control(sql, statement):
            return "transaction control statements are not allowed in pg_background"
        if lexer.is_client_copy(sql, statement):
            return "COPY protocol not allowed in pg_background"
        return None

    def _finish(self, *, is_idle: bool = False) -> None:
        self.finished = True
        self._sql = self._sql[: FULL_SQL_SIZE + 1]
        self.finished_at = datetime.now(UTC)
        self._let_go(is_idle=is_idle)
        self.lease = None
        self._wake()
        for then in self._afterwards:
            then()
        self._afterwards.clear()
        if self._on_finish is not None:
            # Drop the callback: a finished job must not keep its session alive.
            on_finish, self._on_finish = self._on_finish, None
            on_finish(self)

    def _let_go(self, *, is_idle: bool) -> None:
        """Release the backend."""
        if self._backend is not None:
            backend, self._backend = self._backend, None
            self._input.clear()
            backend.forget_receiver()
            if self.termination is not None:
                self.termination.let_go(backend)
            elif not is_idle or self.canceled:
                backend.terminate()
            elif (release := self._keep_backend(backend)) and (
                self._is_detached or not self.keeps_rows
            ):
                release()  # of a submitted job only the outcome is wanted, by its cookie
            else:
                self._release_backend = release
        self.output.end()
        if self._session is not None:
            self._session.close(is_idle=is_idle)
            self._session = None

    def when_finished(self, then: Callable[[], object]) -> None:
        """Call `then` when the job has ended, or now if it has."""
        if self.finished:
            then()
        else:
            self._afterwards.append(then)

    def abandon(self) -> None:
        """Close the connection, since the proxy stops."""
        if not self.finished:
            self.is_abandoned = True
            self._finish()

    @property
    def backend_pid(self) -> int:
        """The pid of the present backend; a retry has another than the first attempt."""
        return self.pid if self._backend is None else self._backend.pid

    def stop_trying(self) -> bool:
        """Make no further attempt. Returns whether that ends the job."""
        return False

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler is in between, while the job runs."""
        return self._backend is not None and self._backend.is_pooled

    def cancel_request(self) -> CancelRequest:
        """The request that cancels the job in the server, while it runs."""
        assert self._backend is not None
        return self._backend.cancel_request()

    # Without a fetch

    def detach(self) -> None:
        """Its session is done with it: from now on, only the outcome is kept."""
        self._is_detached = True
        if self._release_backend is not None:
            self._release_backend()
            self._release_backend = None
        if not self.canceled:  # if it is, the output is dropped once the server was told
            self.forget_output()
        self._sql = self._sql[:LISTED_SQL_SIZE]
        if self.pid != NO_PID:
            self._text.forget()
        # A fetch in progress has its own copies.
        self._whole_error = self.columns = None
        self.tags = self.tags[-1:]

    def forget_output(self) -> None:
        """Nobody will fetch it: read and drop its output, so that it never waits."""
        self.output.drop()

    @property
    def fetched_error(self) -> ErrorResponse | None:
        """The error for a fetch of the result; whole, as long as the session has the job."""
        return self._whole_error or self.error

    # Input from the backend

    def room(self) -> int:
        """Bytes that fit into the queue."""
        room = self.output.room
        return READ_SIZE if room is None else max(room, self._input.missing)

    def feed(self, data: memoryview) -> None:
        """Process input. A malformed stream ends the job."""
        try:
            for item in self._input.read(data):
                if not isinstance(item, Rows):
                    self._message(*item)
                    if self.finished:
                        return
                elif self._is_last_statement:
                    self.output.put(item)
        except ProtocolViolation as error:
            self.close(error)
            return
        self.output.stop_if_full()
        if self._waiters:
            self._wake()

    @property
    def _is_last_statement(self) -> bool:
        return self._statements_done == self._statements - 1

    @property
    def _is_behind(self) -> bool:
        return self._statements_done == self._statements and self._output_settings.compares

    def _message(self, kind: int, body: bytes) -> None:
        if kind == B.ROW_DESCRIPTION:
            if self._is_last_statement and not self._is_detached:
                self.columns = RowDescription.parse(body).fields
                if self.keeps_rows and (question := self._output_settings.question(self.columns)):
                    self._send(question)
        elif kind == B.COMMAND_COMPLETE and self._commits:
            pass
        elif kind == B.COMMAND_COMPLETE and self._is_behind:
            self._output_settings.compared(CommandComplete.parse(body).tag)
        elif kind == B.COMMAND_COMPLETE:
            if self._session is not None:
                self._session.statement_ended()
            is_progress = self._statements_done in self._text.progress_calls
            tag = b"SELECT 1" if is_progress else CommandComplete.parse(body).tag
            self._add_tag(self._output_settings.tag(self._statements_done, tag))
            self._statements_done += 1
        elif kind == B.PARAMETER_STATUS:
            status = ParameterStatus.parse(body)
            if status.name == b"client_encoding":
                self._output_settings.reported_encoding(status.value)
        elif kind == B.NOTICE_RESPONSE:
            is_call = self._session is not None and self._session.notice(body)
            if is_call and self._session is not None and self._session.is_talkative:
                assert self._backend is not None
                self._backend.take_a_break()
            if not is_call and not self._report_progress(body):
                self.output.put(Notice(body))
        elif kind == B.ERROR_RESPONSE:
            if self._session is not None:
                body = self._session.failed(body)
            error = ErrorResponse.parse(body)
            if error.severity in ("FATAL", "PANIC"):
                self._fatal = error
            elif self.error is None and not self._is_committed:
                self._fail(self._explained(error))
        elif kind == B.COPY_IN_RESPONSE:
            # A COPY that the lexer did not recognise; the server would wait for ever.
            assert self._backend is not None
            self._backend.transport.write(CopyFail(b"not allowed in pg_background").serialize())
        elif kind == B.READY_FOR_QUERY:
            self._ready(body)

    def _ready(self, status: bytes) -> None:
        """The string has run: end the transaction opened for it, by COMMIT even if it failed."""
        assert self._backend is not None
        settings = self._output_settings
        if settings.asks_behind:
            settings.asks_behind = False  # the next ReadyForQuery belongs to the comparison
            self._is_committed = not self._backend.is_pooled
            return
        columns = self.columns if self.keeps_rows and self.error is None else None
        if columns is not None and (fault := settings.fault(columns)) is not None:
            self._fail(fault.response())
        if self._backend.is_pooled and status != _IDLE and not self._commits:
            self._commits = True
            if self.canceled and self.error is None:
                self._fail(canceled(None))  # its code caught the cancel
            self._send(b"ROLLBACK" if self.canceled else b"COMMIT")
        else:
            self._finish(
                is_idle=status == _IDLE and not self._backend.is_pooled and self._input.is_empty
            )

    def _send(self, sql: bytes) -> None:
        """Send a query of ours after the job's."""
        assert self._backend is not None
        self._backend.transport.write(Query(sql).serialize())

    def _fail(self, error: ErrorResponse) -> None:
        whole = self._with_context(error)
        self.error = kept_error(whole, self.encoding)
        if not self._is_detached:
            self._whole_error = whole

    def _add_tag(self, tag: bytes | None) -> None:
        if tag is None:
            pass
        elif self._is_detached:
            self.tags = [tag]
        else:
            # Long strings have many statements, mostly with equal tags.
            self.tags.append(self.tags[-1] if self.tags and self.tags[-1] == tag else tag)

    def _report_progress(self, notice: bytes) -> bool:
        """Note a report of pg_background_progress; false if the notice is none."""
        report = reported(notice, self._marker, self.encoding)
        self.progress = report or self.progress
        return report is not None

    def _explained(self, error: ErrorResponse) -> ErrorResponse:
        error = self._text.located(error, self._statements_done)
        return pooler.explained_of_job(error) if self.is_pooled else error

    def notice(self, output: Notice, encoding: bytes) -> bytes:
        """A notice of the job as a whole NoticeResponse, in this encoding."""
        notice = self._text.located(NoticeResponse.parse(output.data))
        return self.report_in(self._with_context(notice), encoding).serialize()

    def _with_context(self, report: ReportT) -> ReportT:
        if self.pid == NO_PID:
            return report
        line = b"background worker, pid %d" % self.pid
        context = report.fields.get("W")
        return report.with_fields(W=context + b"\n" + line if context else line)

    def close(self, error: Exception) -> None:
        """The connection ended before the job did."""
        if self.finished or self.cut_off:
            return
        self.output.drop_cut_row()
        lost = lost_connection(self.pid, error, self._fatal)
        self.is_lost = self._fatal is None
        if self.termination is None or not self.termination.is_sent:
            self.end_with(lost)
        elif self._is_committed:
            self._finish()
        elif self._fatal is None and self._taken_up:
            self.cut_off = lost
            self._wake()
        elif self._fatal is None or self._fatal.sqlstate == ADMIN_SHUTDOWN:
            self.end_with(canceled(self._fatal))
        else:
            self.end_with(lost)

    def end_with(self, error: ErrorResponse) -> None:
        """End with this error, since the backend is gone, unless the job has ended."""
        if not self.finished:
            self._fail(error)
            self._finish()
