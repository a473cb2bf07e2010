"""What a spare is sent before its job, in the same write, and its answers.

Invariant: the job's Query runs only if everything before it has succeeded. It follows messages of
the extended protocol without a Sync: after an error in one of them the server skips everything up
to Sync, even a Query. What precedes it is a transaction of its own, so the job may be a statement
that refuses transaction blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from protocol.errors import ProtocolViolation, ServerError
from protocol.framing import MessageBuffer
from protocol.kinds import B
from protocol.messages import Bind, DataRow, ErrorResponse, Execute, Flush, Parse, Sync
from proxy.backends.identity import StaleLoginError

Row = tuple[bytes | None, ...]

_COMMANDS: Final = 4
"""Commands before a job: the check of the login, BEGIN, the setup, COMMIT."""


class SessionSetup(NamedTuple):
    """What a spare must do before its job.

    Attributes:
        sql: a SELECT that sets everything to be taken over.
        changes_reading: whether that affects how the job's text is read.
    """

    sql: bytes
    changes_reading: bool = False


class Receiver(Protocol):
    """Takes a backend's input."""

    def feed(self, data: memoryview) -> None:
        """Take bytes; the view is valid during the call only."""

    def room(self) -> int:
        """Limit of bytes in the next feed(); asked unless the connection is paused."""

    def close(self, error: Exception) -> None:
        """The connection ended."""


def _executed(sql: bytes) -> bytes:
    return Parse(b"", sql, ()).serialize() + _EXECUTE


_EXECUTE: Final = Bind(b"", b"").serialize() + Execute(b"").serialize()
_BEGIN: Final = _executed(b"BEGIN")
_COMMIT: Final = _executed(b"COMMIT")

# An empty Parse, and Flush: answered at once, without any work.
_TAKE_UP: Final = Parse(b"", b"", ()).serialize() + Flush().serialize()
_SYNC: Final = Sync().serialize()


def in_front_of_query(setup: SessionSetup | None) -> bytes:
    """The messages that precede a job's Query.

    The server answers with ParseComplete when it takes the query up: from then on pg_stat_activity
    shows it, and it can be cancelled.

    `setup`: precedes the Query. The check of the login is the unnamed statement by now.
    """
    return _first(setup) + _TAKE_UP


def alone(setup: SessionSetup | None) -> bytes:
    """The same messages without a Query, which will follow later."""
    return _first(setup) + _SYNC


def _first(setup: SessionSetup | None) -> bytes:
    if setup is None:
        return b""
    return b"".join((_EXECUTE, _BEGIN, _executed(setup.sql), _COMMIT))


class Opening:
    """Receives the answers to what precedes a job, then makes way for another receiver.

    Attributes:
        done: resolved when the other receiver takes over. Fails with what has kept the job from
            running: StaleLoginError, ServerError, ConnectionError, ProtocolViolation; if nobody
            waits any more (it was cancelled), the other receiver is closed with that instead.
    """

    def __init__(
        self,
        setup: SessionSetup | None,
        receiver: Receiver,
        *,
        is_query_sent: bool,
        hand_over: Callable[[Receiver], object],
        parameter_status: Callable[[bytes], object],
        taken_up: Callable[[Row], object],
    ) -> None:
        """
        Args:
            setup: what was sent.
            receiver: takes what follows.
            is_query_sent: whether the job was sent too.
            hand_over: makes a receiver take the input from now on.
            parameter_status: called with the bodies of such messages.
            taken_up: called with the setup's row (empty without one) before the receiver takes
                over; may raise ProtocolViolation.
        """
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receiver = receiver
        self._is_query_sent = is_query_sent
        self._hand_over = hand_over
        self._parameter_status = parameter_status
        self._taken_up = taken_up
        self._buffer = MessageBuffer()
        self._left = 0 if setup is None else _COMMANDS
        self._row: Row = ()
        self._has_ended = False

    def room(self) -> int:
        return self._receiver.room()

    def feed(self, data: memoryview) -> None:
        if self._has_ended:
            return
        self._buffer.feed(data)
        try:
            for kind, body in self._buffer:
                if self._message(kind, body):
                    break
        except (ServerError, StaleLoginError) as error:
            self._fail(error)
        except ProtocolViolation as error:
            self.close(error)

    def _message(self, kind: int, body: bytes) -> bool:
        """Handle a message. Returns whether it was the last one."""
        if kind == B.COMMAND_COMPLETE:
            self._left -= 1
        elif kind == B.DATA_ROW:
            self._row = DataRow.parse(body).values
        elif kind == B.PARAMETER_STATUS:
            self._parameter_status(body)
        elif kind == B.ERROR_RESPONSE:
            error = ServerError(ErrorResponse.parse(body))
            if self._left == _COMMANDS and not error.is_fatal:
                raise StaleLoginError(str(error))
            raise error
        elif not self._left and kind in (B.PARSE_COMPLETE, B.READY_FOR_QUERY):
            self._end()
            return True
        return False

    def _end(self) -> None:
        self._taken_up(self._row)
        self._has_ended = True
        self._hand_over(self._receiver)
        if not self.done.done():
            self.done.set_result(None)
        if rest := self._buffer.take_rest():
            self._receiver.feed(memoryview(rest))

    def close(self, error: Exception) -> None:
        """A job that was sent may have run, so it must deal with the loss itself."""
        if self._has_ended:
            return
        if not self._is_query_sent:
            self._fail(error)
            return
        self._end_by(error)
        if not self.done.done():
            self.done.set_result(None)

    def give_up(self) -> None:
        """The other receiver wants nothing more."""
        self._has_ended = True
        if not self.done.done():
            self.done.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self.done.done():
            self._end_by(error)
        else:
            self._has_ended = True
            self.done.set_exception(error)

    def _end_by(self, error: Exception) -> None:
        self._has_ended = True
        self._hand_over(self._receiver)
        self._receiver.close(error)
