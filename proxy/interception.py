"""A batch of the client's messages with a call in it, served message by message.

The rule: the primary backend does everything that it can do. It parses, describes, binds and
executes a stand-in in the place of each statement with a call (see `statements`), so it is the
server that infers parameters, evaluates arguments and keeps the transaction. The interception
takes the stand-in's rows off the stream and puts the call's in. When a call fails, the same error
is raised in the server, so its transaction fails as well.

An interception begins when everything before its first message is answered, and ends with the
ReadyForQuery of its batch. What it sends to the server is queued with what is to be done with the
answer (`_send`), and goes out together (`_settle`): a batch costs as few round trips as its calls
allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from protocol.errors import FEATURE_NOT_SUPPORTED, QUERY_CANCELED, UNDEFINED_OBJECT, SQLError
from protocol.framing import frame
from protocol.messages import (
    Bind,
    Close,
    CommandComplete,
    DataRow,
    Describe,
    ErrorResponse,
    Execute,
    Field,
    Flush,
    NoticeResponse,
    Parse,
    PortalSuspended,
    RowDescription,
    Sync,
)
from protocol.values import to_binary
from proxy import calls, encodings
from proxy.asked import (
    BIND,
    CLOSE,
    COPY_DONE,
    COPY_FAIL,
    DESCRIBE,
    EXECUTE,
    PARSE,
    QUERY,
    SYNC,
)
from proxy.calls import Value
from proxy.context import Context, context_query, parse_context
from proxy.fetch import Fetch, text_field
from proxy.functions import INT4, TEXT, Type
from proxy.inbox import Inbox
from proxy.jobs import Job, Jobs
from proxy.relay import COPY_DATA, COPY_IN, ERROR, IDLE, PARAMETER_STATUS, READY, TERMINATE
from proxy.settings import parse_time_ms
from proxy.sql import privileges_block, raise_block
from proxy.statements import Call, Plan, ResultPlan, ScalarPlan, complaint

if TYPE_CHECKING:
    from proxy.session import Session

OWN_NAME: Final = b"_pg_background_proxy"
"""Of the statement and the portal with which we ask the primary backend; closed after use."""

_SYNC: Final = Sync().serialize()
_FLUSH: Final = Flush().serialize()
# Sync, and a message that does nothing: so the server does not take a session for idle that waits
# for us, and idle_session_timeout does not end it.
_SYNC_AHEAD: Final = _SYNC + _FLUSH

# Message types of the backend.
_DATA_ROW: Final = ord("D")
_NOTICE: Final = ord("N")
_ROW_DESCRIPTION: Final = ord("T")
_PARAMETER_DESCRIPTION: Final = ord("t")
_PARSE_COMPLETE: Final = ord("1")
_ASYNCHRONOUS: Final = b"NSA"
_EXECUTED: Final = b"CIs"
_DESCRIBED: Final = b"Tn"

_CONSTANT: Final = re.compile(rb"'[^']*'|\$(\w*)\$.*?\$\1\$", re.DOTALL)

Take = Callable[[int, bytes], Awaitable[None]]
Undo = Callable[[bool], object]


@dataclass(slots=True)
class PreparedCall:
    """A prepared statement with a call. `fields` are the server's, of the stand-in."""

    plan: Plan
    fields: tuple[Field, ...] = ()
    has_parameters: bool = False


@dataclass(slots=True)
class Portal:
    """A portal of such a statement, and its result, once somebody has asked for it."""

    statement: PreparedCall
    formats: tuple[int, ...]
    fetch: Fetch | None = None

    def close(self) -> None:
        """Nobody will fetch the rest: the job must not wait for us."""
        if self.fetch is not None and not self.fetch.finished:
            self.fetch.job.drop_output()


@dataclass(slots=True)
class _Reply:
    """What is done with the server's answer to one message.

    `ends`: the types of message that end it. `plan` and `offset`: of the statement that an error
    is about, and where it begins in the client's text, in characters. `undo`: for an error; it is
    told whether the server has read the message at all.
    """

    ends: bytes
    take: Take
    plan: Plan | None = None
    offset: int = 0
    undo: Undo | None = None


class _BatchFailedError(Exception):
    """The server sent an error, which has been passed on; it skips the rest of the batch."""


class Interception:
    """Serves one batch, then hands both connections back to the relay.

    Attributes:
        is_calling: whether a call is being made, which cancel() would end.
        is_waiting: whether the server has done its part of it, so that nothing else would.
        client_ended: whether the client will send no more.
    """

    def __init__(self, session: Session, data: bytes) -> None:
        """
        Args:
            session: whose client and primary backend these are.
            data: of the client, from the message with the call on.
        """
        assert session.primary is not None
        self._session = session
        self._relay = session.relay
        self._client = session.client
        self._server = session.primary
        self._from_client = Inbox(self._client)
        self._from_client.feed(data)
        self._client.receive = self._from_client.feed
        self._from_server = Inbox(self._server)
        self._out: list[bytes] = []
        self._replies: deque[_Reply] = deque()
        # The client's messages that were looked at ahead of their turn.
        self._ahead: deque[tuple[int, bytes]] = deque()
        self._context: Context | None = None
        # The server skips everything up to the next Sync.
        self._failed = False
        # Sync has been sent already, ahead of the client's own.
        self._synced = False
        # Something was executed in this batch, which an error would have to undo.
        self._executed = EXECUTE in self._relay.batch
        # The server has begun to read COPY data: the Sync sent before that has no ReadyForQuery.
        self._copied = False
        # Its next message, if it was waited for while the client's came.
        self._early: asyncio.Task[tuple[int, bytes]] | None = None
        # Statements of ours that an error has kept us from closing.
        self._unclosed: set[bytes] = set()
        # What a wait is told from outside, and a word that came between two waits.
        self._waiter: asyncio.Future[None] | None = None
        self._interrupt: SQLError | None = None
        # The client has got a part of a row: all else would be taken for the rest of it.
        self._in_row = False
        self.is_calling = False
        self.is_waiting = False
        self.client_ended = False
        self._marker = ""
        self._marked = False

    # The batch

    async def run(self) -> None:
        """Serve the client's messages up to the end of the batch."""
        await self._relay.settle()
        self._failed = self._relay.asked.skipping
        self._server.receive = self._from_server.feed
        while not await self._message():
            pass

    def hand_back(self) -> None:
        """Let the relay go on with what was not read."""
        self._relay.batch.clear()
        self._server.receive = self._relay.from_server
        self._client.receive = self._relay.from_client
        rest = self._from_server.take_rest()
        if rest:
            self._relay.from_server(rest)
        ahead = b"".join(frame(kind, body) for kind, body in self._ahead)
        rest = ahead + self._from_client.take_rest()
        if rest:
            self._relay.from_client(rest)

    def end_client(self) -> None:
        """The client will send no more. It gets the answers to what it has sent, except that no
        job is waited for: most probably nobody is there to read the result."""
        self.client_ended = True
        self._from_client.close(ConnectionError("the client has closed the connection"))
        if self._waiter is not None and self._client.full is None and not self._waiter.done():
            self._waiter.set_exception(ConnectionError("the client has closed the connection"))

    def server_lost(self, error: Exception) -> None:
        """The primary backend is gone."""
        self._from_server.close(error)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def last_words(self) -> bytes:
        """Messages that the server sent before it went, and that were not read."""
        return b"".join(frame(kind, body) for kind, body in self._from_server if kind in b"EN")

    async def _message(self) -> bool:
        """Serve one message of the client; true if it ended the batch."""
        kind, body = await self._client_message()
        if self._failed and kind not in (SYNC, TERMINATE):
            return False
        try:
            match chr(kind):
                case "Q":
                    await self._settle()
                    if not self._session.has_call(QUERY, body):
                        return self._end_at(kind, body)
                    self._session.settings_mentioned(body.lower())
                    await self._query(body)
                case "P":
                    self._session.settings_mentioned(body.lower())
                    if b"set_config" in body.lower():
                        self._relay.setters.add(body.partition(b"\0")[0])
                    await self._parse(body)
                case "B":
                    self._session.setting_bound(body)
                    await self._bind(body)
                case "D":
                    await self._describe(body)
                case "E":
                    await self._execute(body)
                case "C":
                    await self._close(body)
                case "H":
                    await self._settle()
                case "S":
                    self._copied = False
                    await self._settle()
                case "F":
                    await self._settle()
                    return self._end_at(kind, body)
                case "X":
                    self._server.write(b"".join(self._out) + frame(kind, body))
                    await self._from_server.next()  # raises: the server closes the connection
                case _ if self._replies:
                    # COPY data, perhaps for what has not been executed yet.
                    self._ahead.appendleft((kind, body))
                    await self._settle()
                case _:
                    pass  # COPY data after its end: the server ignores it too
        except _BatchFailedError:
            pass
        except SQLError as error:
            await self._fail(error)
        if kind == SYNC and self._copied:
            return False
        if kind in (SYNC, QUERY) or self._synced:
            await self._ready()
            return True
        return False

    def _end_at(self, kind: int, body: bytes) -> bool:
        """Leave this message to the relay, and what comes after it."""
        self._ahead.appendleft((kind, body))
        return True

    async def _client_message(self) -> tuple[int, bytes]:
        """The client's next message. Whoever waits for it must not keep the server waiting."""
        if self._ahead:
            return self._ahead.popleft()
        message = self._from_client.next_nowait()
        if message is None:
            if self._out:
                self._server.write(b"".join(self._out))
                self._out.clear()
            message = await self._from_client.next()
        return message

    def _next_are(self, *kinds: int) -> bool:
        """Whether the client has sent messages of these types next."""
        while len(self._ahead) < len(kinds):
            message = self._from_client.next_nowait()
            if message is None:
                return False
            self._ahead.append(message)
        return all(ahead[0] == kind for ahead, kind in zip(self._ahead, kinds, strict=False))

    def _next_is_sync(self) -> bool:
        """Whether the client has sent Sync next. It is taken if so."""
        if not self._next_are(SYNC):
            return False
        self._ahead.popleft()
        return True

    def _is_alone(self, plan: Plan) -> bool:
        """Whether there is nothing that an error of ours would have to undo, so that Sync may go
        along with a call: then the server's transaction, and its snapshot, do not wait with us."""
        return not self._executed and self._relay.status == IDLE and _is_harmless(plan)

    # Talking to the server

    def _send(
        self,
        message: bytes,
        ends: bytes,
        take: Take,
        *,
        plan: Plan | None = None,
        offset: int = 0,
        undo: Undo | None = None,
    ) -> None:
        """Queue a message for the server, and what is to be done with the answer."""
        self._out.append(message)
        self._replies.append(_Reply(ends, take, plan, offset, undo))

    async def _settle(self, end: bytes = _FLUSH) -> None:
        """Send what is queued and deal with the answers, in order.

        Raises _BatchFailedError if the server answers with an error, and what takers raise.
        """
        if self._out:
            self._server.write(b"".join(self._out) + end)
            self._out.clear()
        while self._replies:
            kind, body = await self._server_message()
            reply = self._replies[0]
            if kind == ERROR:
                self._server_failed(reply, body)
            if kind in reply.ends:
                self._replies.popleft()
            await reply.take(kind, body)

    async def _server_message(self) -> tuple[int, bytes]:
        """The server's next message that belongs to an answer; others are passed on."""
        if self._early is not None:
            early, self._early = self._early, None
            return await early
        return await self._server_message_now()

    async def _server_message_now(self) -> tuple[int, bytes]:
        while True:
            kind, body = await self._from_server.next()
            if kind not in _ASYNCHRONOUS:
                return kind, body
            if kind == PARAMETER_STATUS:
                self._relay.parameter_status(body)
            if self._marker and kind == _NOTICE and self._is_marker(body):
                self._marked = True
            else:
                self._client.write(frame(kind, body))

    def _is_marker(self, notice: bytes) -> bool:
        return NoticeResponse.parse(notice).message == self._marker.encode()

    def _server_failed(self, reply: _Reply, body: bytes) -> None:
        """Pass an error on, in the words and with the position of the client's own text."""
        error = ErrorResponse.parse(body)
        position = int(error.fields.get("P", b"0"))
        codec = self._session.codec
        if reply.plan is not None:
            words = complaint(reply.plan, error.message, position or None, codec)
            if words is not None:
                error = error.with_fields(M=words)
            if position:
                position = reply.plan.rewrite.original_position(position, codec)
        elif (replaced := self._session.complaint(body)) is not None:
            error = ErrorResponse.parse(replaced[5:])
        if position:
            error = error.with_fields(P=b"%d" % (position + reply.offset))
        self._client.write(error.serialize())
        self._failed = True
        self._forget_replies()
        raise _BatchFailedError

    def _forget_replies(self) -> None:
        """The server has failed with the first message that is not answered, and skips the rest."""
        while self._replies:
            reply = self._replies.pop()
            if reply.undo is not None:
                reply.undo(not self._replies)

    async def _fail(self, error: SQLError) -> None:
        """An error of ours: the server's transaction must fail too, then the client is told.

        Raises ConnectionError if the client cannot be told, because the rest of a row is lost.
        """
        if self._in_row:
            raise ConnectionError(f"in the middle of a row: {error}")
        while self._replies:
            kind, _ = await self._server_message()
            if kind == ERROR:
                self._forget_replies()
                self._failed = True
            elif kind in self._replies[0].ends:
                self._replies.popleft()
        if not self._synced and not self._failed:
            self._unclosed.add(OWN_NAME)
            self._server.write(
                Parse(OWN_NAME, raise_block(error), ()).serialize()
                + Bind(OWN_NAME, OWN_NAME, (), (), ()).serialize()
                + Execute(OWN_NAME, 0).serialize()
                + _FLUSH
            )
            while (await self._server_message())[0] != ERROR:
                pass
        self._failed = True
        self._client.write(error.response(self._session.codec).serialize())

    async def _ready(self) -> None:
        """End the batch: Sync, unless it was sent ahead, and ReadyForQuery."""
        if not self._synced:
            self._server.write(_SYNC)
        body = await self._until_ready()
        if self._unclosed:
            closes = [Close(b"S", name).serialize() for name in self._unclosed]
            self._server.write(b"".join(closes) + _SYNC)
            await self._until_ready()
        self._relay.ready(body[0])
        self._client.write(frame(READY, body))

    async def _until_ready(self) -> bytes:
        while True:
            kind, body = await self._server_message()
            if kind == READY:
                return body
            # The answer to Close is of our own; an error is of the COMMIT at Sync.
            if kind == ERROR:
                self._client.write(frame(kind, body))

    async def _pass(self, kind: int, body: bytes) -> None:
        self._client.write(frame(kind, body))
        if self._client.full is not None:
            await self._wait_for_client()

    async def _drop(self, kind: int, body: bytes) -> None:
        pass

    async def _pass_rows_only(self, kind: int, body: bytes) -> None:
        """For the answer to Describe in a Query, where NoData is not said."""
        if kind == _ROW_DESCRIPTION:
            await self._pass(kind, body)

    async def _pass_execution(self, kind: int, body: bytes) -> None:
        await self._pass(kind, body)
        if kind != COPY_IN:
            return
        self._copied = True
        self._early = asyncio.ensure_future(self._server_message_now())
        while kind not in (COPY_DONE, COPY_FAIL):
            message = await self._unless_server_speaks(self._early)
            if message is None:
                return
            kind, body = message
            if kind in (COPY_DATA, COPY_DONE, COPY_FAIL):
                self._server.write(frame(kind, body))
                if self._server.full is not None:
                    await asyncio.wait([self._server.full])
        self._server.write(_FLUSH)

    async def _unless_server_speaks(
        self, early: asyncio.Task[tuple[int, bytes]]
    ) -> tuple[int, bytes] | None:
        """The client's next message; None if the server's comes first: its COPY has failed."""
        waiting = asyncio.ensure_future(self._client_message())
        try:
            await asyncio.wait((waiting, early), return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()

    # A Query

    async def _query(self, body: bytes) -> None:
        sql = body.rstrip(b"\0")
        self._relay.statements.pop(b"", None)
        self._relay.forget_portal(b"")
        parts = self._session.split(sql)
        for number, (start, text) in enumerate(parts):
            offset = len(sql[:start].decode(self._session.codec, "replace"))
            await self._statement(text, offset, is_last=number == len(parts) - 1)
        if b"" in self._unclosed:
            self._close_unnamed()
            self._synced = True
            await self._settle(_SYNC)

    async def _statement(self, text: bytes, offset: int, *, is_last: bool) -> None:
        """One statement of a Query, through the extended protocol, so that it can be stopped
        before the next one and the transaction stays one."""
        plan = self._session.analyze(text)
        statement = PreparedCall(plan) if plan is not None else None
        if plan is not None:
            text = plan.rewrite.sql
        self._unclosed.add(b"")
        self._send(Parse(b"", text, ()).serialize(), b"1", self._drop, plan=plan, offset=offset)
        self._send(
            Bind(b"", b"", (), (), ()).serialize(), b"2", self._drop, plan=plan, offset=offset
        )
        describe = Describe(b"P", b"").serialize()
        if statement is None:
            self._send(describe, _DESCRIBED, self._pass_rows_only, offset=offset)
            # Nothing may follow before its answer: it could be COPY FROM STDIN.
            self._send_execute(b"", 0, self._pass_execution, offset=offset)
            await self._settle()
            return
        portal = Portal(statement, ())
        self._send(describe, _DESCRIBED, self._described(statement, ()), plan=plan, offset=offset)
        if isinstance(plan, ScalarPlan):
            await self._call(b"", portal, 0, offset=offset, is_query=True, may_sync=is_last)
        else:
            sync = is_last and self._is_alone(statement.plan)
            await self._fetch(b"", portal, 0, offset=offset, is_query=True, sync=sync)

    def _close_unnamed(self) -> None:
        """A Query leaves no unnamed statement or portal behind."""

        async def closed(kind: int, body: bytes) -> None:
            self._unclosed.discard(b"")

        self._send(Close(b"P", b"").serialize(), b"3", self._drop)
        self._send(Close(b"S", b"").serialize(), b"3", closed)

    # The extended protocol

    async def _parse(self, body: bytes) -> None:
        message = Parse.parse(body)
        plan = self._session.analyze(message.query)
        statements = self._relay.statements
        old = statements.get(message.statement)

        def undo(was_read: bool) -> None:
            statements.pop(message.statement, None)
            # The unnamed statement goes with the attempt.
            if old is not None and (message.statement or not was_read):
                statements[message.statement] = old

        if plan is None:
            statements.pop(message.statement, None)
            self._send(frame(PARSE, body), b"1", self._pass, undo=undo)
            return
        prepared = PreparedCall(plan)
        statements[message.statement] = prepared
        self._send(
            replace(message, query=plan.rewrite.sql).serialize(),
            b"1",
            self._pass,
            plan=plan,
            undo=undo,
        )
        self._send(
            Describe(b"S", message.statement).serialize(),
            _DESCRIBED,
            self._described(prepared),
            plan=plan,
        )

    def _described(self, statement: PreparedCall, shown: Sequence[int] | None = None) -> Take:
        """Notes how the server describes a stand-in.

        `shown`: the result formats, if the client is to see it, as a description of its own
        statement; None if not.
        """

        async def take(kind: int, body: bytes) -> None:
            if kind == _PARAMETER_DESCRIPTION:
                statement.has_parameters = len(body) > 2
                if shown is not None:
                    await self._pass(kind, body)
            elif kind == _ROW_DESCRIPTION:
                statement.fields = RowDescription.parse(body).fields
                if shown is not None and not _shape_unknown(statement.plan):
                    await self._write(RowDescription(_client_fields(statement)).serialize())

        return take

    async def _bind(self, body: bytes) -> None:
        message = Bind.parse(body)
        portals = self._relay.portals
        statement = self._relay.statements.get(message.statement)
        if statement is None:
            if not message.portal:
                self._relay.forget_portal(b"")
            self._send(frame(BIND, body), b"2", self._pass)
            return
        formats = message.result_formats
        if isinstance(statement.plan, ResultPlan):
            hidden = statement.plan.defined_columns + 1
            if _shape_unknown(statement.plan):
                message = replace(message, result_formats=())
            elif len(formats) > 1:
                message = replace(message, result_formats=(*formats, *[0] * hidden))
        if not message.portal:
            self._relay.forget_portal(b"")
        portals[message.portal] = Portal(statement, formats)
        self._send(
            message.serialize(),
            b"2",
            self._pass,
            plan=statement.plan,
            undo=lambda _: portals.pop(message.portal, None),
        )

    async def _describe(self, body: bytes) -> None:
        message = Describe.parse(body)
        relay = self._relay
        if message.kind == b"P":
            portal = relay.portals.get(message.name)
            statement = portal.statement if portal is not None else None
        else:
            portal, statement = None, relay.statements.get(message.name)
        if statement is None:
            self._send(frame(DESCRIBE, body), _DESCRIBED, self._pass)
            return
        self._send(
            frame(DESCRIBE, body), _DESCRIBED, self._described(statement, ()), plan=statement.plan
        )
        if not _shape_unknown(statement.plan):
            return
        await self._settle()
        if portal is None:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "the columns of pg_background_result are not known before it is executed",
                hint="Give a column definition list:"
                " SELECT * FROM pg_background_result(...) AS (column type, ...).",
            )
        if self._is_alone(portal.statement.plan) and self._next_are(EXECUTE, SYNC):
            execute = Execute.parse(self._ahead[0][1])
            if execute.portal == message.name:
                self._ahead.clear()
                await self._fetch(message.name, portal, execute.max_rows, describe=True, sync=True)
                return
        async with self._result(message.name, portal) as fetch:
            await self._write_description(fetch)

    async def _close(self, body: bytes) -> None:
        message = Close.parse(body)
        statements = self._relay.statements
        old = statements.pop(message.name, None) if message.kind == b"S" else None
        if message.kind == b"P":
            self._relay.forget_portal(message.name)

        def undo(was_read: bool) -> None:
            if old is not None:
                statements[message.name] = old

        self._send(frame(CLOSE, body), b"3", self._pass, undo=undo)

    async def _execute(self, body: bytes) -> None:
        message = Execute.parse(body)
        portal = self._relay.portals.get(message.portal)
        if portal is None:
            self._send_execute(message.portal, message.max_rows, self._pass_execution)
        elif isinstance(portal.statement.plan, ScalarPlan):
            await self._call(message.portal, portal, message.max_rows)
        else:
            alone = portal.fetch is None and self._is_alone(portal.statement.plan)
            sync = alone and self._next_is_sync()
            await self._fetch(message.portal, portal, message.max_rows, sync=sync)

    def _send_execute(
        self, portal: bytes, max_rows: int, take: Take, *, plan: Plan | None = None, offset: int = 0
    ) -> None:
        self._executed = True
        self._send(Execute(portal, max_rows).serialize(), _EXECUTED, take, plan=plan, offset=offset)

    # Calls

    async def _call(
        self,
        name: bytes,
        portal: Portal,
        max_rows: int,
        *,
        offset: int = 0,
        is_query: bool = False,
        may_sync: bool = True,
    ) -> None:
        """Execute a stand-in whose rows make calls, and send the rows with the calls' results."""
        plan = portal.statement.plan
        assert isinstance(plan, ScalarPlan)
        on_primary = any(
            calls.IMPLEMENTATIONS[column.call.function.name] in calls.ON_PRIMARY
            for column in plan.columns
        )
        kept: list[tuple[int, bytes]] = []

        async def take(kind: int, body: bytes) -> None:
            if on_primary:
                kept.append((kind, body))
            else:
                await self._call_row(portal, kind, body)

        self._ask_context(plan)
        alone = may_sync and not on_primary and self._is_alone(plan)
        self._send_execute(name, max_rows, take, plan=plan, offset=offset)
        if is_query:
            self._close_unnamed()
        self._synced = alone and (is_query or self._next_is_sync())
        self.is_calling = True
        try:
            await self._settle(_SYNC_AHEAD if self._synced else _FLUSH)
            for kind, body in kept:
                await self._call_row(portal, kind, body)
        finally:
            self.is_calling = False
            self._interrupt = None

    async def _call_row(self, portal: Portal, kind: int, body: bytes) -> None:
        plan = portal.statement.plan
        assert isinstance(plan, ScalarPlan)
        if kind != _DATA_ROW:
            await self._pass(kind, body)
            return
        self._check_interrupt()
        values = list(DataRow.parse(body).values)
        for column in plan.columns:
            result = await self._evaluate(column.call, self._arguments(values[column.index]))
            binary = _format(portal.formats, column.index)
            values[column.index] = _encode(column.call, result, binary=bool(binary))
        await self._write(DataRow(tuple(values)).serialize())

    def _arguments(self, text: bytes | None) -> list[bytes | None]:
        client_encoding = self._relay.parameters.get(b"client_encoding", b"")
        return encodings.parse_array(text or b"{}", client_encoding)

    async def _evaluate(self, call: Call, leaves: Sequence[bytes | None]) -> Value:
        """Make a call, the calls in its arguments first."""
        function = call.function
        calls.check_privilege(self.context, function)
        arguments: dict[str, Value] = {}
        for argument in call.arguments:
            if isinstance(argument.value, Call):
                value = await self._evaluate(argument.value, leaves)
            else:
                value = _decode(argument.parameter.type, leaves[argument.value])
            if value is None and function.strict:
                return None
            arguments[argument.parameter.name] = value
        if function.returns_set:
            [pid] = arguments.values()
            return pid
        return await calls.IMPLEMENTATIONS[function.name](self, **arguments)

    # Results

    async def _fetch(
        self,
        name: bytes,
        portal: Portal,
        max_rows: int,
        *,
        offset: int = 0,
        is_query: bool = False,
        describe: bool = False,
        sync: bool = False,
    ) -> None:
        """Execute a portal that is a job's result.

        `describe`: the client has asked for its columns too. `sync`: Sync goes along.
        """
        async with self._result(name, portal, offset=offset, is_query=is_query, sync=sync) as fetch:
            if describe or (is_query and _shape_unknown(portal.statement.plan)):
                await self._write_description(fetch)
            sent = 0 if fetch is None else await fetch.send(max_rows)
            if max_rows and sent == max_rows:
                await self._write(PortalSuspended().serialize())
            else:
                await self._write(CommandComplete(b"SELECT %d" % sent).serialize())

    async def _write_description(self, fetch: Fetch | None) -> None:
        fields = (text_field(),) if fetch is None else fetch.fields
        await self._write(RowDescription(fields).serialize())

    @contextlib.asynccontextmanager
    async def _result(
        self,
        name: bytes,
        portal: Portal,
        *,
        offset: int = 0,
        is_query: bool = False,
        sync: bool = False,
    ) -> AsyncIterator[Fetch | None]:
        """The fetch of a portal, begun if it was not yet, its columns known and checked.

        None for the job whose pid is NULL. While it lasts, a cancel request and statement_timeout
        end what waits.
        """
        self._ask_context(portal.statement.plan)
        row: list[tuple[bytes | None, ...]] = []
        if portal.fetch is None:

            async def take(kind: int, body: bytes) -> None:
                if kind == _DATA_ROW:
                    row.append(DataRow.parse(body).values)

            plan = portal.statement.plan
            self._send_execute(name, 0, take, plan=plan, offset=offset)
        else:
            # It may have gone with a savepoint; the server knows.
            self._send(Describe(b"P", name).serialize(), _DESCRIBED, self._drop)
        if is_query:
            self._close_unnamed()
        self._synced = sync
        self.is_calling = True
        try:
            await self._settle(_SYNC_AHEAD if sync else _FLUSH)
        except BaseException:
            self.is_calling = False
            raise
        timeout = parse_time_ms(self.context.statement_timeout.decode())
        timer = asyncio.get_running_loop().call_later(timeout / 1000, self._time_out)
        if not timeout:
            timer.cancel()
        self.is_waiting = True
        try:
            if row:
                portal.fetch = await self._begin_fetch(portal, row[0][-1])
            if portal.fetch is not None and not portal.fetch.described:
                await portal.fetch.describe()
            yield portal.fetch
        except BaseException:
            portal.close()
            raise
        finally:
            self.is_calling = self.is_waiting = False
            self._interrupt = None
            timer.cancel()
            if portal.fetch is not None and portal.fetch.finished:
                self.jobs.remove(portal.fetch.job)

    async def _begin_fetch(self, portal: Portal, arguments: bytes | None) -> Fetch | None:
        plan = portal.statement.plan
        assert isinstance(plan, ResultPlan)
        pid = await self._evaluate(plan.call, self._arguments(arguments))
        if pid is None:
            return None
        job = calls.attached(self, int(pid))
        if job.consumed:
            raise SQLError(
                UNDEFINED_OBJECT, f"results for PID {job.pid} have already been consumed"
            )
        defined = portal.statement.fields[-1 - plan.defined_columns : -1]
        return Fetch(
            job,
            plan.outputs,
            defined=defined,
            formats=portal.formats,
            write=self._write,
            wait=self._wait,
        )

    async def _write(self, data: bytes, *, cut: bool = False) -> None:
        """Send to the client, and wait while it is slow. `cut`: the last message goes on."""
        self._check_interrupt()
        self._client.write(data)
        self._in_row = cut
        if self._client.full is not None:
            await self._wait_for_client()

    async def _wait_for_client(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        full = self._client.full
        assert full is not None

        def drained(_: asyncio.Future[None]) -> None:
            if not waiter.done():
                waiter.set_result(None)

        full.add_done_callback(drained)
        await self._pause(waiter)

    async def _wait(self, job: Job) -> None:
        if self.client_ended:
            raise ConnectionError("the client has closed the connection")
        waiter = asyncio.get_running_loop().create_future()
        job.add_waiter(waiter)
        try:
            await self._pause(waiter)
        finally:
            job.remove_waiter(waiter)

    async def _pause(self, waiter: asyncio.Future[None]) -> None:
        """Wait for a future, or until `_end_call` or `server_lost` is called."""
        self._check_interrupt()
        self._waiter = waiter
        try:
            await waiter
        finally:
            self._waiter = None

    def _check_interrupt(self) -> None:
        if self._interrupt is not None and not self._in_row:
            raise self._interrupt

    def _end_call(self, error: SQLError) -> None:
        """The call that is being made fails with this error."""
        self._interrupt = error
        if self._waiter is not None and not self._waiter.done() and not self._in_row:
            self._waiter.set_exception(error)

    def cancel(self) -> None:
        """The client has asked for it."""
        self._end_call(SQLError(QUERY_CANCELED, "canceling statement due to user request"))

    def _time_out(self) -> None:
        self._end_call(SQLError(QUERY_CANCELED, "canceling statement due to statement timeout"))

    # What the functions ask for (`calls.Caller`)

    @property
    def jobs(self) -> Jobs:
        return self._session.jobs

    @property
    def context(self) -> Context:
        assert self._context is not None
        return self._context

    async def launch(self, sql: bytes, queue_size: int) -> Job:
        return await self._session.launch(sql, queue_size, self.context)

    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        self._marker = secrets.token_hex(16)
        self._marked = False
        try:
            sql = privileges_block(verb, role, print_commands=print_commands, marker=self._marker)
            self._ask(sql, self._drop)
            await self._settle()
        finally:
            self._marker = ""
        return self._marked

    def _ask_context(self, plan: Plan) -> None:
        """Have the context of the next call sent along."""
        session = self._session
        called = [plan.call] if isinstance(plan, ResultPlan) else [c.call for c in plan.columns]
        custom = tuple(session.custom_settings)
        sql = context_query(
            server_version=session.server_version,
            roles=self.jobs.roles,
            settings=any(_launches(call) for call in called),
            custom_settings=custom,
        )

        async def take(kind: int, body: bytes) -> None:
            if kind == _DATA_ROW:
                self._context = parse_context(
                    DataRow.parse(body).values,
                    custom_settings=custom,
                    client_encoding=self._relay.parameters.get(b"client_encoding", b""),
                )

        self._ask(sql, take)

    def _ask(self, sql: bytes, take: Take) -> None:
        """Have a query of ours run in the primary backend, within the client's batch."""
        self._send(Parse(OWN_NAME, sql, ()).serialize(), b"1", self._drop)
        self._send(Bind(OWN_NAME, OWN_NAME, (), (), ()).serialize(), b"2", self._drop)
        self._send(Execute(OWN_NAME, 0).serialize(), _EXECUTED, take)
        self._send(Close(b"P", OWN_NAME).serialize(), b"3", self._drop)
        self._send(Close(b"S", OWN_NAME).serialize(), b"3", self._drop)


def _is_harmless(plan: Plan) -> bool:
    """Whether the stand-in can have no effect: it holds but the calls, constants and parameters.

    For what is not certain at a glance the answer is no, which costs a round trip.
    """
    text = plan.rewrite.original
    if any(mark in text for mark in (b"\\", b"--", b"/*", b'"')):
        return False
    code = _CONSTANT.sub(b"", text).lower()
    if isinstance(plan, ScalarPlan):
        made = sum(map(_call_count, (column.call for column in plan.columns)))
        return b"from" not in code and code.count(b"(") == made
    before, _, _ = code.partition(b")")
    return before.count(b"(") == _call_count(plan.call) and code.count(b"from") <= 1


def _call_count(call: Call) -> int:
    inner = (argument.value for argument in call.arguments)
    return 1 + sum(_call_count(value) for value in inner if isinstance(value, Call))


def _shape_unknown(plan: Plan) -> bool:
    """A result whose columns only its job knows."""
    return isinstance(plan, ResultPlan) and not plan.defined_columns


def _client_fields(statement: PreparedCall) -> tuple[Field, ...]:
    """The columns of the client's statement, from those of its stand-in."""
    plan = statement.plan
    if isinstance(plan, ResultPlan):
        return statement.fields[: -1 - plan.defined_columns]
    fields = list(statement.fields)
    for column in plan.columns:
        result_type = column.call.function.result_type
        fields[column.index] = replace(
            fields[column.index],
            type_oid=result_type.oid,
            type_size=result_type.size,
            type_modifier=-1,
        )
    return tuple(fields)


def _launches(call: Call) -> bool:
    return call.function.name == "pg_background_launch" or any(
        isinstance(argument.value, Call) and _launches(argument.value)
        for argument in call.arguments
    )


def _format(formats: Sequence[int], column: int) -> int:
    """The result format of a column (Bind: none means all text, one is for all)."""
    if len(formats) <= 1:
        return formats[0] if formats else 0
    return formats[column]


def _decode(type: Type, text: bytes | None) -> Value:
    if text is None or type == TEXT:
        return text
    return int(text) if type == INT4 else text[:1] == b"t"


def _encode(call: Call, value: Value, *, binary: bool) -> bytes | None:
    if value is None:
        return None
    match value:
        case bool():
            text = b"t" if value else b"f"
        case int():
            text = b"%d" % value
        case bytes():
            text = value
    return to_binary(call.function.result_type.oid, text) if binary else text
