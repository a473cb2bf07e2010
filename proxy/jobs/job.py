"""Background jobs: SQL strings that run in side backends.

Invariant: a job is one Query message in a backend of its own (`attempt`). PostgreSQL runs such a
message as one transaction, so the string commits or fails as a whole; a single statement may be one
that refuses transaction blocks. (Not behind a connection pooler: there a transaction is already
open, and is committed after the message.) Only the last statement's rows are results; others are
dropped as they arrive, and output that is not fetched stays in the server (`rows`). Once the
session is done with a job, only its metadata stays (`registry`). An ended job keeps neither its
backend nor its session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from protocol.messages import ErrorResponse, Field, NoticeResponse
from protocol.startup import CancelRequest
from proxy.backends.backend import Backend
from proxy.backends.reuse import ReleaseBackend
from proxy.backends.route import Route
from proxy.jobs.job_text import JobText
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
from proxy.jobs.rows import Budget, Notice, OutputQueue
from proxy.jobs.termination import LendChannel, Termination
from proxy.sql.lexer import Statement


class Running(Protocol):
    """Has a job run on one backend: an `Attempt`.

    Attributes:
        backend: the backend.
        statements: how many the string has; 0 if not known.
    """

    backend: Backend
    statements: int

    def end(self, *, is_idle: bool, may_keep: bool) -> ReleaseBackend | None:
        """Let go of the backend (see `Attempt.end`)."""


class Job(JobRecord):
    """One job: its attempt while it runs, its output until it is fetched, its outcome.

    Attributes:
        route: to its server.
        user, database: its backend's login.
        attempt: the present one; None while it waits, and at its end: many ended jobs are
            remembered for a while.
        output: rows and notices not fetched yet.
        keeps_rows: whether its rows are kept to be fetched.
        columns: of the result; None if there are none, or not yet known.
        parameters: what its backend has reported (ParameterStatus).
        has_handle: whether anybody knows its handle; if not, only its reader can stop it.
        lease: lends a channel that may terminate its backend, while it runs.
        termination: of its backend, once tried.
        is_detached: whether its session is done with it.
        is_abandoned: whether the proxy hung up while it ran; only the server knows the outcome.
        is_lost: whether the server did not say why the connection ended.
        cut_off: the error of a job whose terminated backend ended without one, if it turns out that
            the job may have committed before.
    """

    __slots__ = (
        *("route", "user", "database", "attempt", "output", "keeps_rows", "columns", "parameters"),
        *("has_handle", "lease", "termination", "is_detached", "is_abandoned", "is_lost"),
        *("cut_off", "_on_finish", "_release_backend", "_afterwards", "_whole_error", "_text"),
    )

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
        lease: LendChannel,
        label: bytes | None = None,
        keep_rows: bool = True,
        budgets: Sequence[Budget] = (),
        on_finish: Callable[[Job], None],
    ) -> None:
        super().__init__(
            NO_PID,
            new_cookie(),
            sql[: FULL_SQL_SIZE + 1],
            queue_size=queue_size,
            role_id=role_id,
            cluster=cluster,
            encoding=encoding,
            label=label,
        )
        self.route = route
        self.user = user
        self.database = database
        self.lease: LendChannel | None = lease
        self.attempt: Running | None = None
        self.termination: Termination | None = None
        self.keeps_rows = keep_rows
        self.columns: tuple[Field, ...] | None = None
        self.parameters: dict[bytes, bytes] = {}
        self.has_handle = True
        self.is_detached = self.is_abandoned = self.is_lost = False
        self.cut_off: ErrorResponse | None = None
        self.output = OutputQueue(queue_size, budgets)
        if not keep_rows:
            self.output.drop()
        self._on_finish: Callable[[Job], None] | None = on_finish
        self._release_backend: ReleaseBackend | None = None
        self._afterwards: list[Callable[[], object]] = []
        # The whole error, for a fetch; `error` is shortened.
        self._whole_error: ErrorResponse | None = None
        # Once the server has taken it up.
        self._text: JobText | None = None

    # Life cycle

    def assign(self, attempt: Running) -> None:
        """The job has got a backend, and is about to run."""
        self.pid, self.unfinished_state = attempt.backend.pid, RUNNING
        self.launched_at = datetime.now(UTC)
        self._begin(attempt)

    def _begin(self, attempt: Running) -> None:
        self.attempt = attempt
        self.parameters = attempt.backend.parameters

    def requeue(self, state: bytes) -> None:
        """The backend has not run the job: wait for another, in this state."""
        self._end_attempt(is_idle=False)
        self.pid, self.unfinished_state = NO_PID, state

    def withdraw(self) -> None:
        """Forget the job, which has not run and will not."""
        self._on_finish = None
        self.finish()

    def finish(self, *, is_idle: bool = False) -> None:
        """The attempt has come to its end. `is_idle`: its backend is ready for another job."""
        self.finished = True
        self.finished_at = datetime.now(UTC)
        self._end_attempt(is_idle=is_idle)
        self.lease = None
        self.wake()
        for then in self._afterwards:
            then()
        self._afterwards.clear()
        if self._on_finish is not None:
            # Drop the callback: a finished job must not keep its session alive.
            on_finish, self._on_finish = self._on_finish, None
            on_finish(self)

    def _end_attempt(self, *, is_idle: bool, may_keep: bool = True) -> None:
        """Let go of the backend, if the job has one. Arguments as for `Attempt.end`."""
        if self.attempt is None:
            return
        attempt, self.attempt = self.attempt, None
        release = attempt.end(is_idle=is_idle, may_keep=may_keep)
        if release is not None and (self.is_detached or not self.keeps_rows):
            release()  # of a submitted job only the outcome is wanted, by its cookie
        else:
            self._release_backend = release

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
            self.finish()

    def end_with(self, error: ErrorResponse) -> None:
        """End with this error, since the backend is gone, unless the job has ended."""
        if not self.finished:
            self.fail(error)
            self.finish()

    @property
    def backend_pid(self) -> int:
        """The pid of the present backend; a retry has another than the first attempt."""
        return self.pid if self.attempt is None else self.attempt.backend.pid

    @property
    def state_for_operators(self) -> str:
        """`state`, or abandoned."""
        return "abandoned" if self.is_abandoned else self.state.decode()

    def stop_trying(self) -> bool:
        """Make no further attempt. Returns whether that ends the job."""
        return False

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler is in between, while the job runs."""
        return self.attempt is not None and self.attempt.backend.is_pooled

    def cancel_request(self) -> CancelRequest:
        """The request that cancels the job in the server, while it runs."""
        assert self.attempt is not None
        return self.attempt.backend.cancel_request()

    # Without a fetch

    def detach(self) -> None:
        """Its session is done with it: from now on, only the outcome is kept."""
        self.is_detached = True
        if self._release_backend is not None:
            self._release_backend()
            self._release_backend = None
        if not self.canceled:  # if it is, the output is dropped once the server was told
            self.forget_output()
        self._sql = self._sql[:LISTED_SQL_SIZE]
        if self._text is not None:
            self._text.forget()
        # A fetch in progress has its own copies.
        self._whole_error = self.columns = None
        self.tags = self.tags[-1:]

    def forget_output(self) -> None:
        """Nobody will fetch it: read and drop its output, so that it never waits."""
        self.output.drop()

    # Told by its attempt

    def check_alone(self, sql: bytes, statement: Statement) -> None:
        """Raises SQLError if the job must not run this string of one statement."""

    def taken_up(self, text: JobText) -> None:
        """The server has taken the string up."""
        self._text = text
        if self.is_detached:
            text.forget()

    def add_tag(self, tag: bytes | None) -> None:
        """A statement has ended with this command tag; None if it was not the caller's."""
        if tag is None:
            pass
        elif self.is_detached:
            self.tags = [tag]
        else:
            # Long strings have many statements, mostly with equal tags.
            self.tags.append(self.tags[-1] if self.tags and self.tags[-1] == tag else tag)

    def fail(self, error: ErrorResponse) -> None:
        """The string has failed."""
        whole = self._with_context(error)
        self.error = kept_error(whole, self.encoding)
        if not self.is_detached:
            self._whole_error = whole

    # For a fetch

    @property
    def fetched_error(self) -> ErrorResponse | None:
        """The error for a fetch of the result; whole, as long as the session has the job."""
        return self._whole_error or self.error

    def notice(self, output: Notice, encoding: bytes) -> bytes:
        """A notice of the job as a whole NoticeResponse, in this encoding."""
        assert self._text is not None
        notice = self._text.located(NoticeResponse.parse(output.data))
        return self.report_in(self._with_context(notice), encoding).serialize()

    def _with_context(self, report: ReportT) -> ReportT:
        if self.pid == NO_PID:
            return report
        line = b"background worker, pid %d" % self.pid
        context = report.fields.get("W")
        return report.with_fields(W=context + b"\n" + line if context else line)
