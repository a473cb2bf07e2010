"""One attempt to run a job: its string, as one Query message, in one backend.

Invariant: an attempt is made for one backend, which nothing else uses meanwhile. It tells its job
whatever must outlast it; another attempt is another object.

It is in one of these states. Events not listed leave them unchanged.

========== ============================================= ==========
state      event                                         next
========== ============================================= ==========
PREPARING  the server has taken up the string            RUNNING
RUNNING    columns that settings affect: our query that  ASKED
           compares the settings is sent behind
ASKED      ReadyForQuery, for the string                 COMPARING
RUNNING,   ReadyForQuery behind a connection pooler, in  COMMITTING
COMPARING  a transaction: COMMIT or ROLLBACK is sent
any other  ReadyForQuery                                 ENDED
any        the connection is lost                        ENDED, or
                                                         the same
any        the job ends it (`end`)                       ENDED
========== ============================================= ==========

If a job is terminated, the loss of its connection leaves the state as it is: `JobService` finds out
whether the job had committed before (`Job.cut_off`), and ends it. The string has committed, or
failed, before COMPARING; behind a pooler, by the end of COMMITTING. If the connection is lost while
PREPARING, a job that is being terminated counts as canceled.
"""

from __future__ import annotations

import asyncio
import enum
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
    ParameterStatus,
    Query,
    RowDescription,
)
from proxy.backends import pooler
from proxy.backends.backend import READ_SIZE, Backend
from proxy.backends.reuse import KeepBackend, ReleaseBackend, is_remembered
from proxy.config.gucs import JOB_SETTING
from proxy.jobs import output_settings
from proxy.jobs.job import Job
from proxy.jobs.job_input import JobInput
from proxy.jobs.job_text import JobText
from proxy.jobs.output_settings import OutputSettings
from proxy.jobs.progress import progress_statement, reported
from proxy.jobs.rows import Notice, OutputQueue, Rows
from proxy.jobs.termination import canceled, lost_connection
from proxy.sql import lexer
from proxy.sql.lexer import LexError
from proxy.sql.rewrite import Piece


class State(enum.Enum):
    """Of an attempt; see the table above.

    Attributes:
        PREPARING: the string is examined, and sent.
        RUNNING: the server has taken it up.
        ASKED: it runs, and our own query will follow.
        COMPARING: it has run; our own query runs.
        COMMITTING: the transaction that the proxy has opened for it is being ended.
        ENDED: the backend is released.
    """

    PREPARING = enum.auto()
    RUNNING = enum.auto()
    ASKED = enum.auto()
    COMPARING = enum.auto()
    COMMITTING = enum.auto()
    ENDED = enum.auto()


PREPARING, RUNNING, ASKED, COMPARING, COMMITTING, ENDED = State

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
        """The statement has ended with this error (its body). Returns the body to report."""

    def close(self, *, is_idle: bool) -> None:
        """The job has ended. `is_idle`: its backend is ready for another."""


class Attempt:
    """Has the backend run the string, and reads what it sends.

    Attributes:
        backend: the backend.
        session: serves the calls in the string.
        state: one of those above.
        statements: their number, with those that the proxy adds; 0 if not known.
    """

    def __init__(
        self,
        job: Job,
        backend: Backend,
        sql: bytes,
        *,
        session: JobSession,
        keep_backend: KeepBackend,
    ) -> None:
        """
        Args:
            job: is told the outcome.
            backend: that nothing else uses.
            sql: the whole string; the job's metadata may have less of it.
            session: serves the calls in its SQL.
            keep_backend: takes the backend at the end.
        """
        self.backend = backend
        self.session = session
        self.state = PREPARING
        self.statements = 0
        self._job = job
        self._sql = sql
        self._keep_backend = keep_backend
        # Identifies messages of pg_background_progress.
        self._marker = backend.own_settings[JOB_SETTING]
        self._text = JobText(sql, backend.parameters, self._marker)
        self._settings = OutputSettings(backend.parameters)
        self._input = JobInput(max(job.queue_size, LONGEST), job.encoding)
        self._output = job.output
        self._statements_done = 0
        # The server's error before it closed the connection.
        self._fatal: ErrorResponse | None = None
        backend.is_spent = is_remembered(sql)
        job.output.read(backend)
        session.begin(job.output)

    # The string

    async def start(self) -> None:
        """Run the string, unless it holds a statement that a job may not run.

        Returns when the backend has begun to run it. Raises what `Backend.start` raises.
        """
        backend = self.backend
        if backend.setup is None:
            self._settings.callers = output_settings.read(backend.setup_row[2:])
        try:
            if backend.setup is not None and backend.setup.changes_reading:
                await self._take_over()
            sql = await self._prepared()
        except ServerError:
            raise
        except SQLError as refusal:
            await self._take_over()
            self._job.end_with(refusal.response())
        except asyncio.CancelledError:
            self._job.abandon()  # nothing was sent that could be cancelled
            raise
        else:
            if self.state is ENDED:
                return  # it was abandoned meanwhile
            if not backend.is_alive and backend.setup is None:
                self.close(ConnectionError("the server closed the connection"))
                return
            self._sql = b""
            await backend.start(sql, self, self._take_up)

    async def _take_over(self) -> None:
        """Have the backend take over the session's state now, unless it has."""
        backend = self.backend
        if backend.setup is not None:
            await backend.take_over()
            if self.state is not ENDED:
                self._settings.callers = output_settings.read(backend.setup_row[2:])

    def _take_up(self) -> None:
        self._settings.callers = output_settings.read(self.backend.setup_row[2:])
        self._text.taken_up()
        self.state = RUNNING
        self._job.taken_up(self._text)

    async def _prepared(self) -> bytes:
        """The string for the server. Statements are counted and examined one by one, with turns for
        others, since there may be many.

        What cannot be tokenized is left to the server to reject. Raises SQLError for a statement
        that would break the job's transaction or the protocol, and what `Backend.take_over` raises.
        """
        parameters = self.backend.parameters
        conforming = parameters.get(b"standard_conforming_strings") != b"off"
        encoding = parameters.get(b"client_encoding", b"").decode("ascii", "replace")
        sql, settings = self._sql, self._settings
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
                    settings.look(sql, last)
                last = statement
                refusal = refusal or _refusal(sql, statement)
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
        self.statements = count
        if last is not None and count == 1:
            self._job.check_alone(sql, last)
        if last is None or not self._job.keeps_rows or count - 1 in blocks:
            pieces.append(Piece(end, len(sql)))
        else:
            if settings.may_need_callers(sql, last):
                await self._take_over()
            if self.state is ENDED:
                return b""  # it was abandoned meanwhile
            pieces.append(Piece(end, last.start))
            pieces += settings.last_statement(sql, last, count - 1)
            self.statements += settings.added_statements
        return self._text.sent(pieces, blocks)

    # Input from the backend

    def room(self) -> int:
        """Bytes that fit into the queue."""
        room = self._output.room
        return READ_SIZE if room is None else max(room, self._input.missing)

    def feed(self, data: memoryview) -> None:
        """Process input. A malformed stream ends the job."""
        try:
            for item in self._input.read(data):
                if not isinstance(item, Rows):
                    self._message(*item)
                    if self.state is ENDED:
                        return
                elif self._is_last_statement:
                    self._output.put(item)
        except ProtocolViolation as error:
            self.close(error)
            return
        self._output.stop_if_full()
        self._job.wake()

    @property
    def _is_last_statement(self) -> bool:
        return self._statements_done == self.statements - 1

    @property
    def _is_behind(self) -> bool:
        return self._statements_done == self.statements and self._settings.compares

    def _message(self, kind: int, body: bytes) -> None:
        job = self._job
        if kind == B.ROW_DESCRIPTION:
            if self._is_last_statement and not job.is_detached:
                job.columns = RowDescription.parse(body).fields
                if job.keeps_rows and (question := self._settings.question(job.columns)):
                    self.state = ASKED
                    self._send(question)
        elif kind == B.COMMAND_COMPLETE and self.state is COMMITTING:
            pass
        elif kind == B.COMMAND_COMPLETE and self._is_behind:
            self._settings.compared(CommandComplete.parse(body).tag)
        elif kind == B.COMMAND_COMPLETE:
            self.session.statement_ended()
            is_progress = self._statements_done in self._text.progress_calls
            tag = b"SELECT 1" if is_progress else CommandComplete.parse(body).tag
            job.add_tag(self._settings.tag(self._statements_done, tag))
            self._statements_done += 1
        elif kind == B.PARAMETER_STATUS:
            status = ParameterStatus.parse(body)
            if status.name == b"client_encoding":
                self._settings.reported_encoding(status.value)
        elif kind == B.NOTICE_RESPONSE:
            self._notice(body)
        elif kind == B.ERROR_RESPONSE:
            error = ErrorResponse.parse(self.session.failed(body))
            if error.severity in ("FATAL", "PANIC"):
                self._fatal = error
            elif job.error is None and not self._is_committed:
                job.fail(self._explained(error))
        elif kind == B.COPY_IN_RESPONSE:
            # A COPY that the lexer did not recognise; the server would wait for ever.
            self.backend.transport.write(CopyFail(b"not allowed in pg_background").serialize())
        elif kind == B.READY_FOR_QUERY:
            self._ready(body)

    def _notice(self, body: bytes) -> None:
        if self.session.notice(body):
            if self.session.is_talkative:
                self.backend.take_a_break()
        elif (report := reported(body, self._marker, self._job.encoding)) is not None:
            self._job.progress = report
        else:
            self._output.put(Notice(body))

    def _ready(self, status: bytes) -> None:
        """The string has run, or our query behind it. Behind a pooler, end the transaction opened
        for it: by COMMIT, even if it failed; by ROLLBACK if it was canceled."""
        job, backend = self._job, self.backend
        if self.state is ASKED:
            self.state = COMPARING
            return
        columns = job.columns if job.keeps_rows and job.error is None else None
        if columns is not None and (fault := self._settings.fault(columns)) is not None:
            job.fail(fault.response())
        if backend.is_pooled and status != _IDLE and self.state is not COMMITTING:
            self.state = COMMITTING
            if job.canceled and job.error is None:
                job.fail(canceled(None))  # its code caught the cancel
            self._send(b"ROLLBACK" if job.canceled else b"COMMIT")
        else:
            job.finish(is_idle=status == _IDLE and not backend.is_pooled and self._input.is_empty)

    def _send(self, sql: bytes) -> None:
        """Send a query of ours after the job's."""
        self.backend.transport.write(Query(sql).serialize())

    def _explained(self, error: ErrorResponse) -> ErrorResponse:
        error = self._text.located(error, self._statements_done)
        return pooler.explained_of_job(error) if self.backend.is_pooled else error

    # The end

    @property
    def _is_committed(self) -> bool:
        """Whether the string's transaction has committed (or failed), and our own query runs."""
        return self.state is COMPARING and not self.backend.is_pooled

    def close(self, error: Exception) -> None:
        """The connection ended before the job did."""
        job, fatal = self._job, self._fatal
        if self.state is ENDED or job.cut_off:
            return
        self._output.drop_cut_row()
        lost = lost_connection(job.pid, error, fatal)
        job.is_lost = fatal is None
        if job.termination is None or not job.termination.is_sent:
            job.end_with(lost)
        elif self._is_committed:
            job.finish()
        elif fatal is None and self.state is not PREPARING:
            job.cut_off = lost
            job.wake()
        elif fatal is None or fatal.sqlstate == ADMIN_SHUTDOWN:
            job.end_with(canceled(fatal))
        else:
            job.end_with(lost)

    def end(self, *, is_idle: bool, may_keep: bool) -> ReleaseBackend | None:
        """Let go of the backend, and of the session. Called by the job, once.

        Args:
            is_idle: whether the backend is ready for another job.
            may_keep: whether it may be kept for that.

        Returns what is to be called when the session is done with the job, if it was kept.
        """
        self.state = ENDED
        backend, termination = self.backend, self._job.termination
        backend.forget_receiver()
        release: ReleaseBackend | None = None
        if termination is not None:
            termination.let_go(backend)
        elif is_idle and may_keep and not self._job.canceled:
            release = self._keep_backend(backend)
        else:
            backend.terminate()
        self._output.end()
        self.session.close(is_idle=is_idle)
        return release


def _refusal(sql: bytes, statement: lexer.Statement) -> str | None:
    """Why a job may not run this statement; None if it may."""
    if lexer.is_transaction_control(sql, statement):
        return "transaction control statements are not allowed in pg_background"
    if lexer.is_client_copy(sql, statement):
        return "COPY protocol not allowed in pg_background"
    return None
