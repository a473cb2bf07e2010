"""Retries jobs that have failed by chance.

Invariant: another attempt is made only if nothing of the last was committed: it was one
transaction, which failed according to the server, with an error that another attempt may not meet.
A lost connection proves nothing, so it ends the job. To everybody else the attempts are one job: it
has one handle, runs until the last attempt ends, and is stopped as a whole.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from protocol.errors import (
    CANNOT_CONNECT_NOW,
    DEADLOCK_DETECTED,
    FEATURE_NOT_SUPPORTED,
    INVALID_PARAMETER_VALUE,
    PROGRAM_LIMIT_EXCEEDED,
    QUERY_CANCELED,
    SERIALIZATION_FAILURE,
    ProtocolViolation,
    SQLError,
)
from protocol.messages import ErrorResponse
from proxy.backends.backend import Backend
from proxy.backends.identity import StaleLoginError
from proxy.backends.reuse import KeepBackend
from proxy.jobs.attempt import Attempt
from proxy.jobs.job import Job
from proxy.jobs.termination import canceled, lost_connection
from proxy.log import Event, Value, logger
from proxy.sql import lexer
from proxy.sql.encodings import codec

MAX_RETRIES: Final = 10
"""Limit of further attempts."""

_LONGEST_SQL: Final = 1024 * 1024
"""Bytes of SQL that are kept for another attempt."""

_FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
"""Seconds before the second attempt, and the longest pause. Each pause is twice the last, less up
to half at random, so that jobs that failed together do not meet again.
"""

_ONE_TRANSACTION: Final = (
    *("select", "with", "values", "table", "insert", "update", "delete", "merge"),
    *("truncate", "refresh", "copy"),
)
"""First words of statements that, alone in the string, are one transaction."""

Relaunch = Callable[[Callable[[Backend, KeepBackend], Awaitable[None]]], Awaitable[None]]
"""Has the job begin on another ready backend. Raises SQLError."""

NextAttempt = Callable[[Job, Backend, KeepBackend], Attempt]
"""Makes another attempt of a job."""


def checked(retries: int | None, sql: bytes | None) -> int:
    """The number of further attempts that a call asks for. Raises SQLError 22023, 54000."""
    retries = retries or 0
    if not 0 <= retries <= MAX_RETRIES:
        raise SQLError(INVALID_PARAMETER_VALUE, f"retries must be between 0 and {MAX_RETRIES}")
    if retries and sql is not None and len(sql) > _LONGEST_SQL:
        raise SQLError(
            PROGRAM_LIMIT_EXCEEDED,
            "the SQL string is too long to be tried again",
            detail=f"It has {len(sql)} bytes, and may have {_LONGEST_SQL}.",
        )
    return retries


def may_pass(sqlstate: str) -> bool:
    """Whether an error may not recur: it was a conflict with others, or a lack of resources."""
    return sqlstate[:2] == "53" or sqlstate in (
        *(SERIALIZATION_FAILURE, DEADLOCK_DETECTED, CANNOT_CONNECT_NOW),
    )


def pause_after(attempts: int, sqlstate: str, pid: int | None = None) -> float:
    """Seconds to wait after this many attempts, the last of which failed with this error; logged.
    `pid`: of the job, if it has one."""
    values: dict[str, Value] = {"pid": pid, "sqlstate": sqlstate, "attempts": attempts}
    logger.info(Event("job is tried again", values))
    longest = min(_FIRST_PAUSE * float(2 ** (attempts - 1)), LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1)  # noqa: S311


class RetriedJob(Job):
    """A job with further attempts; its rows are not kept.

    Attributes:
        retries: how many attempts may follow.
        next_attempt: makes another; set when the first begins.
        on_change: called when it has lost its backend, or has another one.
    """

    __slots__ = ("_next", "_relaunch", "next_attempt", "on_change", "retries")

    def __init__(self, sql: bytes, *, retries: int, relaunch: Relaunch, **others: Any) -> None:
        """`others`: arguments of `Job`."""
        assert not others["keep_rows"]
        super().__init__(sql, **others)
        self.retries = retries
        self._relaunch: Relaunch | None = relaunch
        self.next_attempt: NextAttempt | None = None
        self.on_change: Callable[[], None] = lambda: None
        # Without a backend: starts the next attempt.
        self._next: asyncio.Task[None] | None = None

    def check_alone(self, sql: bytes, statement: lexer.Statement) -> None:
        word = _beginning(sql, statement)
        if word not in _ONE_TRANSACTION:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                f"a job of {word.upper()} alone cannot be tried again",
                detail="It may have committed something before it fails.",
                hint="A string of several statements is one transaction: put another one in front,"
                " such as SELECT.",
            )

    def finish(self, *, is_idle: bool = False) -> None:
        error = self.error
        if (
            error is None
            or self.attempt is None
            or not self.attempt.statements
            or not self._may_go_on(error.sqlstate)
            or self.termination is not None
        ):
            self._end(is_idle=is_idle)
        else:
            self._end_attempt(is_idle=is_idle, may_keep=False)
            self._try_again(error)

    def _end(self, *, is_idle: bool = False) -> None:
        self.retries = 0
        self._relaunch = self.next_attempt = None
        super().finish(is_idle=is_idle)

    def _may_go_on(self, sqlstate: str) -> bool:
        return (
            self.retries > 0
            and may_pass(sqlstate)
            and not (self.canceled or self.is_abandoned or self.finished)
        )

    def _try_again(self, error: ErrorResponse) -> None:
        seconds = pause_after(self.attempts, error.sqlstate, self.pid)
        self.error = self._whole_error = None
        self._next = asyncio.get_running_loop().create_task(self._run_again(seconds))
        self.on_change()

    @property
    def rests(self) -> bool:
        """Whether it is between two attempts."""
        return self._next is not None and not self.finished

    async def _run_again(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.retries -= 1
        self.attempts += 1
        assert self._relaunch is not None
        try:
            await self._relaunch(self._begin_again)
        except SQLError as error:
            self._next = None
            if self.finished:
                return
            self.fail(error.response(codec(self.encoding)))
            if self._may_go_on(error.sqlstate):
                self._try_again(error.response(codec(self.encoding)))
            else:
                self._end()
        except (OSError, ProtocolViolation) as error:
            self._next = None
            if self.canceled:
                self.end_with(canceled(None))
            elif not self.finished:
                self.is_lost = True
                self.end_with(lost_connection(self.pid, error, None))

    async def _begin_again(self, backend: Backend, keep_backend: KeepBackend) -> None:
        if self.canceled or self.next_attempt is None:
            backend.terminate()  # while its replacement for a stale login was found
            raise SQLError(QUERY_CANCELED, "canceling statement due to user request")
        self._next = None  # it is this task, or will follow this attempt
        self.tags = []
        self.progress = (None, None)
        attempt = self.next_attempt(self, backend, keep_backend)
        self._begin(attempt)
        try:
            await attempt.start()
        except (StaleLoginError, SQLError, OSError, ProtocolViolation):
            self._end_attempt(is_idle=False)
            raise
        self.on_change()

    def stop_trying(self) -> bool:
        """Make no further attempt. Returns whether that ends the job."""
        self.retries = 0
        if self.finished or self.attempt is not None:
            return False
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self.end_with(canceled(None))
        return True

    def abandon(self) -> None:
        self.stop_trying()
        super().abandon()


def _beginning(sql: bytes, statement: lexer.Statement) -> str:
    """The first word behind opening brackets, in lower case."""
    for token in statement.tokens:
        if sql[token.start : token.end] != b"(":
            return lexer.keyword(sql, token)
    return ""
