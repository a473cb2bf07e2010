"""Background jobs: SQL strings that run in side backends.

The rule: a job is one Query message in a backend of its own. PostgreSQL runs such a message as one
transaction, so the string commits or fails as a whole, and a single statement may be one that
refuses transaction blocks. Only the last statement's rows are results; what comes before is
dropped as it arrives, and what nobody fetches stays in the server: a job holds `queue_size` bytes
of output, then stops reading.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from protocol.errors import (
    CONFIGURATION_LIMIT_EXCEEDED,
    CONNECTION_FAILURE,
    FEATURE_NOT_SUPPORTED,
    INVALID_PARAMETER_VALUE,
    UNDEFINED_OBJECT,
    ProtocolViolation,
    SQLError,
)
from protocol.framing import HEADER_SIZE, bad_length, unpack_length
from protocol.messages import (
    CommandComplete,
    CopyFail,
    ErrorResponse,
    Field,
    NoticeResponse,
    RowDescription,
)
from protocol.startup import CancelRequest
from proxy import lexer
from proxy.backend import READ_SIZE, Backend
from proxy.lexer import LexError
from proxy.settings import MAX_WORKERS
from proxy.upstream import Route

MIN_QUEUE_SIZE: Final = 64
MAX_QUEUE_SIZE: Final = 256 * 1024 * 1024

# Message types of the backend.
_DATA_ROW = ord("D")
_ROW_DESCRIPTION = ord("T")
_COMMAND_COMPLETE = ord("C")
_ERROR = ord("E")
_NOTICE = ord("N")
_READY = ord("Z")
_COPY_IN = ord("G")

ReportT = TypeVar("ReportT", ErrorResponse, NoticeResponse)


@dataclass(frozen=True, slots=True)
class Rows:
    """A piece of the result as it came: whole DataRow messages; or a part of a long one.

    `count` messages begin in it. `cut`: the last one goes on in the next piece.
    """

    data: bytes
    count: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """The body of a NoticeResponse."""

    data: bytes


Output = Rows | Notice


class Job:
    """One job: its backend while it runs, its output until somebody takes it.

    Attributes:
        pid: of its backend.
        role_id: OID of the current role at launch.
        route: to its server.
        columns: of the result; None as long as they are not known, and if there are none.
        tags: the command tag of each statement that has ended.
        finished: whether the backend is done, one way or the other.
        error: what went wrong; fields as the server sent them, CONTEXT extended.
        consumed: whether somebody has begun to fetch the result.
    """

    def __init__(
        self,
        backend: Backend,
        sql: bytes,
        *,
        queue_size: int,
        role_id: int,
        route: Route,
        on_finish: Callable[[Job], None],
    ) -> None:
        self.pid = backend.pid
        self.role_id = role_id
        self.route = route
        self.columns: tuple[Field, ...] | None = None
        self.tags: list[bytes] = []
        self.finished = False
        self.error: ErrorResponse | None = None
        self.consumed = False
        self._backend = backend
        self._sql = sql
        self._queue_size = queue_size
        self._on_finish = on_finish
        self._output: deque[Output] = deque()
        self._queued = 0
        self._paused = False
        self._dropping = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._statements = 0
        # Reading: a message that is not whole yet, and how much of it is missing; or bytes still
        # to come of a long row, which is passed on in pieces.
        self._partial = b""
        self._missing = 0
        self._rest_of_row = 0
        # What the server said before it closed the connection.
        self._fatal: ErrorResponse | None = None

    def __repr__(self) -> str:
        return f"<Job pid={self.pid} finished={self.finished}>"

    # Its life

    def start(self) -> None:
        """Run the string, unless it holds a statement that a job may not run."""
        refused = self._refusal()
        if refused is None:
            self._backend.start(self._sql, self)
        else:
            self.error = self._with_context(refused.response())
            self._finish()

    def _refusal(self) -> SQLError | None:
        """Count the statements, and look for one that would break transaction or protocol.

        What cannot be lexed is left to the server, which will say what is wrong with it.
        """
        parameters = self._backend.parameters
        try:
            statements = lexer.split(
                self._sql,
                standard_conforming_strings=parameters.get(b"standard_conforming_strings")
                != b"off",
                encoding=parameters.get(b"client_encoding", b"").decode("ascii", "replace"),
            )
        except LexError:
            return None
        self._statements = len(statements)
        for statement in statements:
            if lexer.is_transaction_control(self._sql, statement):
                return SQLError(
                    FEATURE_NOT_SUPPORTED,
                    "transaction control statements are not allowed in pg_background",
                )
            if lexer.is_client_copy(self._sql, statement):
                return SQLError(FEATURE_NOT_SUPPORTED, "COPY protocol not allowed in pg_background")
        return None

    def _finish(self) -> None:
        self.finished = True
        self._partial = b""
        self._backend.receiver = None
        self._backend.terminate()
        self._wake()
        self._on_finish(self)

    def abandon(self) -> None:
        """The proxy stops: hang up."""
        if not self.finished:
            self._finish()

    def cancel_request(self) -> CancelRequest:
        """What makes the server cancel it."""
        return self._backend.cancel_request()

    # Its output

    def drop_output(self) -> None:
        """Nobody will fetch it: from now on it is read and dropped, so the job never waits."""
        self._dropping = True
        self._output.clear()
        self._took(self._queued)

    def take(self) -> Output | None:
        """The next piece of output, if there is any by now."""
        if not self._output:
            return None
        output = self._output.popleft()
        self._took(len(output.data))
        return output

    def take_notice(self) -> Notice | None:
        """The next piece of output if it is a notice."""
        output = self._output[0] if self._output else None
        if not isinstance(output, Notice):
            return None
        self.take()
        return output

    def _took(self, size: int) -> None:
        self._queued -= size
        if self._paused and self._queued < self._queue_size:
            self._paused = False
            if not self.finished:
                self._backend.transport.resume_reading()

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

    # What its backend sends

    def room(self) -> int:
        """Bytes that may come in: what is left of the queue."""
        if self._dropping:
            return READ_SIZE
        return max(self._queue_size - self._queued, self._missing, 1)

    def feed(self, data: memoryview) -> None:
        """Sort what came in. A stream that is none ends the job."""
        try:
            self._read(self._partial + data)
        except ProtocolViolation as error:
            self.close(error)
            return
        if self._queued >= self._queue_size and not self._paused and not self.finished:
            self._paused = True
            self._backend.transport.pause_reading()
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
            if kind == _DATA_ROW and end <= size:
                position = end
                count += 1
                continue
            self._rows(data[rows:position], count)
            rows = position
            count = 0
            if end > size:
                if kind == _DATA_ROW and end - position > READ_SIZE:
                    self._rows(data[position:], 1, cut=True)
                    self._rest_of_row = end - size
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
        if data and len(self.tags) == self._statements - 1:
            self._queue(Rows(data, count, cut))

    def _queue(self, output: Output) -> None:
        if not self._dropping:
            self._output.append(output)
            self._queued += len(output.data)

    def _message(self, kind: int, body: bytes) -> None:
        if kind == _ROW_DESCRIPTION:
            if len(self.tags) == self._statements - 1:
                self.columns = RowDescription.parse(body).fields
        elif kind == _COMMAND_COMPLETE:
            self.tags.append(CommandComplete.parse(body).tag)
        elif kind == _NOTICE:
            self._queue(Notice(body))
        elif kind == _ERROR:
            error = ErrorResponse.parse(body)
            if error.severity in ("FATAL", "PANIC"):
                self._fatal = error
            else:
                self.error = self._with_context(error)
        elif kind == _COPY_IN:
            # A COPY that the lexer did not recognise; without this the server waits for ever.
            self._backend.transport.write(CopyFail(b"not allowed in pg_background").serialize())
        elif kind == _READY:
            self._finish()

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
        self._drop_cut_row()
        reason = self._fatal.message.decode("utf-8", "replace") if self._fatal else str(error)
        self.error = SQLError(
            CONNECTION_FAILURE,
            f"lost connection to worker process with PID {self.pid}",
            detail=f"{reason[:1].upper()}{reason[1:]}.",
        ).response()
        self._finish()

    def _drop_cut_row(self) -> None:
        """Forget the pieces of a row whose rest will not come."""
        while self._output:
            piece = self._output[-1]
            if isinstance(piece, Notice) or not piece.cut:
                break
            self._output.pop()
            self._queued -= len(piece.data)


class Jobs:
    """The jobs of one session that it has launched and not yet fetched or detached, by pid."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(tuple(self._jobs.values()))

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles that have launched them."""
        return {job.role_id for job in self._jobs.values()}

    def check_limit(self, max_workers: int) -> None:
        """Raises SQLError 53400 if as many as that are running."""
        running = sum(not job.finished for job in self._jobs.values())
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
        self._jobs[job.pid] = job

    def get(self, pid: int) -> Job:
        """The job of this pid. Raises SQLError 42704."""
        try:
            return self._jobs[pid]
        except KeyError:
            raise SQLError(UNDEFINED_OBJECT, f"PID {pid} is not attached to this session") from None

    def remove(self, job: Job) -> None:
        """The session is done with it. If it runs, it runs on to its end."""
        if self._jobs.get(job.pid) is job:
            del self._jobs[job.pid]
        job.drop_output()

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
