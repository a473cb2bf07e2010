"""Requests to the primary backend and its answers, while a batch is served message by message.

Invariant: each request is queued with a handler for its answer, and requests are sent together, so
that a batch takes as few round trips as its calls allow. The server's errors are passed on in terms
of the client's own text; ours are raised in the server too, so that its transaction also fails.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.errors import SQLError
from protocol.framing import frame
from protocol.kinds import (
    ASYNCHRONOUS,
    ENDS_BIND,
    ENDS_CLOSE,
    ENDS_EXECUTE,
    ENDS_PARSE,
    PORTAL,
    STATEMENT,
    B,
    F,
)
from protocol.messages import (
    Bind,
    Close,
    DataRow,
    ErrorResponse,
    Execute,
    Flush,
    NoticeResponse,
    Parse,
    Sync,
)
from proxy.jobs.interrupts import Interrupts
from proxy.net.connection import Connection
from proxy.net.inbox import Inbox
from proxy.session.client_session import ClientSession
from proxy.session.named import Undo
from proxy.sql.text import raise_block
from proxy.statements.plan import Block, Plan, Substitute
from proxy.statements.standin import complaint

OWN_NAME: Final = b"_pg_background_proxy"
"""The name of our own statement and portal in the primary; closed after use."""

_BIND_OWN: Final = Bind(OWN_NAME, OWN_NAME, (), (), ()).serialize()
_EXECUTE_OWN: Final = Execute(OWN_NAME, 0).serialize()
_CLOSE_PORTAL: Final = Close(PORTAL, OWN_NAME).serialize()
_CLOSE_STATEMENT: Final = Close(STATEMENT, OWN_NAME).serialize()

SYNC_MESSAGE: Final = Sync().serialize()
FLUSH: Final = Flush().serialize()
SYNC_AHEAD: Final = SYNC_MESSAGE + FLUSH
"""Sync, and a message without effect, which stops the idle_session_timeout that begins at Sync: the
server must not end a session that waits for us."""

_LONG: Final = 64 * 1024
"""Messages from this size on (bytes) are not copied into a common write."""

ResponseHandler = Callable[[int, bytes], Awaitable[None]]
"""Handles one message of an answer, given as type and body."""


@dataclass(slots=True)
class _Reply:
    """How the server's answer to one message is handled; see `Exchange.send`."""

    ends: bytes
    handler: ResponseHandler
    plan: Plan | Substitute | None = None
    offset: int = 0
    undo: Undo | None = None
    is_block: bool = False

    @property
    def has_blocks(self) -> bool:
        """Whether a block of ours is executed, alone or within one of the client's."""
        return self.is_block or (isinstance(self.plan, Substitute) and bool(self.plan.blocks))

    def fields(self, fields: dict[str, bytes]) -> dict[str, bytes]:
        """The fields of an error or notice, without those about our blocks."""
        if self.is_block:
            return _without_context(fields)
        context = fields.get("W", b"")
        blocks = self.plan.blocks if isinstance(self.plan, Substitute) else ()
        for block in blocks:
            if block.text in context:
                return {**_without_context(fields), "W": _as_written(context, block)}
        return fields


class BatchFailedError(Exception):
    """The server has sent an error, which was passed on; it skips the rest of the batch."""


async def drop(kind: int, body: bytes) -> None:
    """Drops a message."""


class Exchange:
    """The requests of one batch.

    Attributes:
        inbox: the server's messages not read yet.
        synced: whether Sync was sent ahead of the client's own.
        unclosed: our statements that an error has kept us from closing.
    """

    def __init__(self, session: ClientSession, server: Connection, interrupts: Interrupts) -> None:
        self._session = session
        self._relay = session.relay
        self._client = session.client
        self._server = server
        self._interrupts = interrupts
        self.inbox = Inbox(server)
        self.synced = False
        self.unclosed: set[bytes] = set()
        self._out: list[bytes] = []
        self._replies: deque[_Reply] = deque()
        # Its next message, awaited while waiting for the client's.
        self._early: asyncio.Task[tuple[int, bytes]] | None = None
        # The marker that one of our blocks raises as INFO, and whether it has.
        self._marker = b""
        self._marked = False

    # Asking

    def send(
        self,
        message: bytes,
        ends: bytes,
        handler: ResponseHandler,
        *,
        plan: Plan | Substitute | None = None,
        offset: int = 0,
        undo: Undo | None = None,
        is_block: bool = False,
    ) -> None:
        """Queue a message for the server, and the handling of its answer.

        Args:
            message: the whole message.
            ends: the types of message that end the answer.
            handler: called with each message of the answer.
            plan: of the statement, for errors.
            offset: where the statement begins in the client's text, in characters.
            undo: called if the server fails before it has answered, with whether it got this far.
            is_block: a block of ours is executed in place of a command; errors and notices do not
                tell the client where in the block they arose.
        """
        self._out.append(message)
        self._replies.append(_Reply(ends, handler, plan, offset, undo, is_block))

    def push(self) -> None:
        """Send what is queued, without a Flush yet."""
        self._write_out()

    def _write_out(self, end: bytes = b"") -> None:
        """Send what is queued, then `end`; long messages are not copied."""
        out, self._out = self._out, []
        if sum(map(len, out)) <= _LONG:
            out = [b"".join([*out, end])]
        else:
            out.append(end)
        for data in out:
            if data:
                self._server.write(data)

    def ask(
        self,
        sql: bytes,
        handler: ResponseHandler = drop,
        parameters: Sequence[bytes] = (),
        formats: Sequence[int] = (),
    ) -> int:
        """Queue a query of ours within the client's batch. Returns its number of answers."""
        before = len(self._replies)
        bind = _BIND_OWN
        if parameters or formats:
            bind = Bind(OWN_NAME, OWN_NAME, (), tuple(parameters), tuple(formats)).serialize()
        self.send(Parse(OWN_NAME, sql, ()).serialize(), ENDS_PARSE, drop)
        self.send(bind, ENDS_BIND, drop)
        self.send(_EXECUTE_OWN, ENDS_EXECUTE, handler)
        self.send(_CLOSE_PORTAL, ENDS_CLOSE, drop)
        self.send(
            _CLOSE_STATEMENT,
            ENDS_CLOSE,
            drop,
            undo=lambda _: self.unclosed.add(OWN_NAME),
        )
        return len(self._replies) - before

    async def query(
        self,
        sql: bytes,
        parameters: Sequence[bytes] = (),
        formats: Sequence[int] = (),
        *,
        apart: bool = False,
    ) -> list[tuple[bytes | None, ...]]:
        """The rows of a query of ours, within the client's batch or, if `apart`, before it.

        Raises BatchFailedError; SQLError if the client has canceled it.
        """
        rows: list[tuple[bytes | None, ...]] = []

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.DATA_ROW:
                rows.append(DataRow.parse(body).values)

        with self._interrupts.asking():
            self.ask(sql, handler, parameters, formats)
            if apart:
                await self.settle(SYNC_MESSAGE)
                await self.reopen()
            else:
                await self.settle()
        return rows

    async def ask_settings(self, *names: bytes) -> None:
        """Ask what these settings are now, after all that was executed. SHOW takes no snapshot, so
        the client may still choose its transaction's isolation level. Raises as `query`."""

        def noting(name: bytes) -> ResponseHandler:
            async def handler(kind: int, body: bytes) -> None:
                if kind == B.DATA_ROW:
                    value = DataRow.parse(body).values[0] or b""
                    self._session.reported.answered(name, value)

            return handler

        with self._interrupts.asking():
            for name in names:
                self.ask(b"SHOW " + name, noting(name))
            await self.settle()

    async def reopen(self) -> bool:
        """Begin another transaction if a Sync sent ahead has ended that of the batch. Returns
        whether it has. `sync_ahead` or the client's Sync must end it."""
        if not self.synced:
            return False
        await self._until_ready()
        self.synced = False
        return True

    def sync_ahead(self) -> None:
        """Send Sync before the client has."""
        self._server.write(SYNC_AHEAD)
        self.synced = True

    async def ask_marked(self, sql: bytes, marker: str) -> bool:
        """Run a block of ours. Returns whether it raised its marker as INFO, which is dropped."""
        self._marker = marker.encode()
        self._marked = False
        try:
            self.ask(sql, drop)
            await self.settle()
        finally:
            self._marker = b""
        return self._marked

    @property
    def owes(self) -> bool:
        """Whether some answers were not read."""
        return bool(self._replies)

    # Answers

    async def settle(self, end: bytes = FLUSH, *, leave: int = 0) -> None:
        """Send what is queued and handle the answers, in order, except for the last `leave`. `end`:
        sent behind it; a Sync (SYNC_MESSAGE, SYNC_AHEAD) ends the batch.

        Raises BatchFailedError if the server answers with an error, and what handlers raise.
        """
        if self._replies:
            # What was pushed is not flushed yet, so `end` is needed even if nothing else is sent.
            self._write_out(end)
            self.synced = self.synced or end != FLUSH
        while len(self._replies) > leave:
            kind, body = await self.next_message()
            reply = self._replies[0]
            if kind == B.ERROR_RESPONSE:
                self._server_failed(reply, body)
            if kind in reply.ends:
                self._replies.popleft()
                if kind == B.COMMAND_COMPLETE:
                    self._session.statement_ended()
            await reply.handler(kind, body)

    async def next_message(self) -> tuple[int, bytes]:
        """The server's next message that belongs to an answer; others are passed on."""
        if self._early is not None:
            early, self._early = self._early, None
            return await early
        return await self._next_message()

    def listen(self) -> asyncio.Task[tuple[int, bytes]]:
        """Wait for the server's next message in a task."""
        self._early = asyncio.ensure_future(self._next_message())
        # If the client is gone first, nobody takes its result.
        self._early.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._early

    async def _next_message(self) -> tuple[int, bytes]:
        while True:
            kind, body = await self.inbox.next()
            if kind not in ASYNCHRONOUS:
                return kind, body
            if kind == B.PARAMETER_STATUS:
                self._session.reported.parameter_status(body)
            if kind == B.NOTICE_RESPONSE and self._session.notice(body):
                pass
            elif self._marker and kind == B.NOTICE_RESPONSE and self._is_marker(body):
                self._marked = True
            elif kind == B.NOTICE_RESPONSE and self._replies and self._replies[0].has_blocks:
                fields = self._replies[0].fields(NoticeResponse.parse(body).fields)
                self._client.write(NoticeResponse(fields).serialize())
            else:
                self._client.write(frame(kind, body))

    def _is_marker(self, notice: bytes) -> bool:
        return NoticeResponse.parse(notice).message == self._marker

    def _server_failed(self, reply: _Reply, body: bytes) -> None:
        """Pass an error on, with texts and position for the client's own text."""
        body = self._session.named.hidden.restored(body)
        error = ErrorResponse(reply.fields(ErrorResponse.parse(body).fields))
        position = int(error.fields.get("P", b"0"))
        codec = self._session.codec
        if reply.plan is not None:
            words = complaint(reply.plan, error.message, position or None, codec)
            if words is not None:
                error = error.with_fields(M=words)
            if position:
                position = reply.plan.rewrite.original_position(position, codec)
        of_call = isinstance(reply.plan, Plan)
        says = self._session.complaint_from_inside if of_call else self._session.complaint
        if not reply.is_block and (replaced := says(body)) is not None:
            error = ErrorResponse(reply.fields(ErrorResponse.parse(replaced[5:]).fields))
        if position:
            error = error.with_fields(P=b"%d" % (position + reply.offset))
        self._session.statement_ended()
        self._client.write(error.serialize())
        self._relay.outstanding.skip()
        self._forget_replies()
        raise BatchFailedError

    def _forget_replies(self) -> None:
        """Drop the unanswered requests: the server has failed at the first, and skips the rest."""
        while self._replies:
            reply = self._replies.pop()
            if reply.undo is not None:
                reply.undo(not self._replies)

    async def fail(self, error: SQLError) -> None:
        """Report an error of ours: first make the server's transaction fail, then tell the client.

        Raises ConnectionError if the client cannot be told, since the rest of a row is lost.
        """
        if self._interrupts.row_is_partial:
            raise ConnectionError(f"in the middle of a row: {error}")
        while self._replies:
            kind, _ = await self.next_message()
            if kind == B.ERROR_RESPONSE:
                self._forget_replies()
                self._relay.outstanding.skip()
            elif kind in self._replies[0].ends:
                self._replies.popleft()
        if not self.synced and not self._relay.outstanding.skipping:
            self.unclosed.add(OWN_NAME)
            self._server.write(
                Parse(OWN_NAME, raise_block(error), ()).serialize()
                + _BIND_OWN
                + _EXECUTE_OWN
                + FLUSH
            )
            while (await self.next_message())[0] != B.ERROR_RESPONSE:
                pass
        self._relay.outstanding.skip()
        self._client.write(error.response(self._session.codec).serialize())

    async def ready(self, sync: bytes = b"") -> None:
        """End the batch with Sync, unless it was sent ahead, and ReadyForQuery. `sync`: the body of
        the client's; the server fails if it is not empty."""
        if not self.synced:
            self._server.write(frame(F.SYNC, sync))
        body = await self._until_ready()
        if self.unclosed:
            closes = [Close(STATEMENT, name).serialize() for name in self.unclosed]
            self._server.write(b"".join(closes) + SYNC_MESSAGE)
            await self._until_ready()
        self._relay.ready(body[0])
        self._client.write(frame(B.READY_FOR_QUERY, body))

    async def _until_ready(self) -> bytes:
        while True:
            kind, body = await self.next_message()
            if kind == B.READY_FOR_QUERY:
                return body
            # The answer to Close is ours; an error comes from the COMMIT at Sync.
            if kind == B.ERROR_RESPONSE:
                self._client.write(self._session.complaint(body) or frame(kind, body))

    # To the client

    async def pass_on(self, kind: int, body: bytes) -> None:
        """Pass a message on to the client unchanged."""
        self._client.write(frame(kind, body))
        await self._drained()

    def hold(self, data: bytes) -> None:
        """Send to the client together with what comes next."""
        self._interrupts.check_for_interrupts()
        self._client.hold(data)

    async def write(self, data: bytes, *, cut: bool = False) -> None:
        """Send to the client, and wait while it is slow. `cut`: the last message is incomplete."""
        self._interrupts.check_for_interrupts()
        self._client.write(data)
        self._interrupts.row_is_partial = cut
        await self._drained()

    async def _drained(self) -> None:
        if self._client.full is not None:
            await self._interrupts.for_future(self._client.full)


def _as_written(context: bytes, block: Block) -> bytes:
    """CONTEXT with the client's text in place of a block, and nothing from within the block."""
    before, _, after = context.partition(block.text)
    if not block.is_executed:
        first, newline, rest = after.partition(b"\n")
        second, more, others = rest.partition(b"\n")
        second = second.replace(b" at EXECUTE", b" at SQL statement")
        after = first + newline + second + more + others
    return before.rpartition(b"\n")[2] + block.written + after


def _without_context(fields: Mapping[str, bytes]) -> dict[str, bytes]:
    """The fields of a message, without those that locate it in a block."""
    return {code: value for code, value in fields.items() if code not in "Wpq"}
