"""What a spare is sent before its job, in the same write, and what it answers to that.

Invariant: the job's Query runs only if all that is in front of it has worked. It stands behind
messages of the extended protocol without a Sync: after an error in one of them the server skips all
up to Sync, a Query too. What is in front is a transaction of its own, so the job may be a statement
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
"""Executed in front of a job: the check of the login, BEGIN, the takeover, COMMIT."""


class Takeover(NamedTuple):
    """What a spare has to do before its job.

    Attributes:
        sql: a SELECT that sets all that it takes over.
        changes_reading: whether that changes how the job's text is to be read.
    """

    sql: bytes
    changes_reading: bool = False


class Receiver(Protocol):
    """Who gets what a backend sends."""

    def feed(self, data: memoryview) -> None:
        """Bytes that came in; the view is valid during the call only."""

    def room(self) -> int:
        """How many bytes feed() may be given next; asked when the connection is not paused."""

    def close(self, error: Exception) -> None:
        """The connection ended."""


def _executed(sql: bytes) -> bytes:
    return Parse(b"", sql, ()).serialize() + _EXECUTE


_EXECUTE: Final = Bind(b"", b"").serialize() + Execute(b"").serialize()
_BEGIN: Final = _executed(b"BEGIN")
_COMMIT: Final = _executed(b"COMMIT")

# Parse of nothing, and Flush: answered at once, and nothing is done for it.
_TAKE_UP: Final = Parse(b"", b"", ()).serialize() + Flush().serialize()
_SYNC: Final = Sync().serialize()


def in_front_of_query(takeover: Takeover | None) -> bytes:
    """What is sent in front of a job's Query.

    The server answers a ParseComplete when it takes the query up: from then on that can be seen in
    pg_stat_activity, and canceled.

    `takeover`: what is to be done first. The check of the login is the unnamed prepared statement
    by now (`Backend.remember_identity`).
    """
    return _first(takeover) + _TAKE_UP


def alone(takeover: Takeover | None) -> bytes:
    """The same without a Query, which is to come later."""
    return _first(takeover) + _SYNC


def _first(takeover: Takeover | None) -> bytes:
    if takeover is None:
        return b""
    return b"".join((_EXECUTE, _BEGIN, _executed(takeover.sql), _COMMIT))


class Opening:
    """Receives the answers to what is in front of a job, and leaves the rest to another receiver.

    Attributes:
        done: set when the other receiver's turn has come, or to what has kept the job from running:
            StaleLoginError, ServerError, ConnectionError, ProtocolViolation. If it is cancelled,
            the other receiver is closed with that error.
    """

    def __init__(
        self,
        takeover: Takeover | None,
        receiver: Receiver,
        *,
        is_query_sent: bool,
        hand_over: Callable[[Receiver], object],
        parameter_status: Callable[[bytes], object],
        taken_up: Callable[[Row], object],
    ) -> None:
        """
        Args:
            takeover: that was sent.
            receiver: gets what follows.
            is_query_sent: whether the job came along.
            hand_over: has the receiver get it from now on.
            parameter_status: gets the bodies of such messages.
            taken_up: called with the row of the takeover, empty without one, before anything is
                left to the receiver; may raise ProtocolViolation.
        """
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receiver = receiver
        self._is_query_sent = is_query_sent
        self._hand_over = hand_over
        self._parameter_status = parameter_status
        self._taken_up = taken_up
        self._buffer = MessageBuffer()
        self._left = 0 if takeover is None else _COMMANDS
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
        """Whether it was the last one."""
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
        """If the job was sent, it may have run: only it knows how to say that."""
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
