"""The batch that an interception serves: state and steps that its parts share.

Invariant: executions are noted before they are sent (`send_execute`). The notes tell whether an
error would have something to undo, and whether settings may have changed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from protocol.framing import frame
from protocol.kinds import (
    ENDS_CLOSE,
    ENDS_COPY_IN,
    ENDS_EXECUTE,
    PORTAL,
    STATEMENT,
    B,
    F,
    TransactionStatus,
)
from protocol.messages import Close, CommandComplete, Execute, NoticeResponse
from proxy.api.functions import Needs
from proxy.extension.definitions import VIEW_QUERY
from proxy.jobs.interrupts import Interrupts
from proxy.net.connection import Connection
from proxy.net.inbox import Inbox
from proxy.session.caller import SessionCaller
from proxy.session.client_session import ClientSession
from proxy.session.exchange import FLUSH, Exchange, ResponseHandler, drop
from proxy.session.prepared import Command
from proxy.sql.lexer import READING
from proxy.statements.mentions import may_be_ours
from proxy.statements.plan import Plan, Statement, Substitute
from proxy.statements.reading import depends_on_settings
from proxy.stats import counters


class ClientMessages(Inbox):
    """The client's messages, with some look-ahead."""

    def __init__(self, client: Connection, data: bytes) -> None:
        super().__init__(client)
        self.feed(data)
        self._ahead: deque[tuple[int, bytes]] = deque()
        client.receive = self._received

    def _received(self, data: bytes) -> None:
        counters.client_bytes += len(data)
        self.feed(data)

    def next_nowait(self) -> tuple[int, bytes] | None:
        """The next message; None if it has not arrived yet."""
        return self._ahead.popleft() if self._ahead else super().next_nowait()

    def put_back(self, kind: int, body: bytes) -> None:
        """Make this the next message again."""
        self._ahead.appendleft((kind, body))

    def peek(self, *kinds: int) -> list[bytes] | None:
        """The bodies of the next messages, if these have arrived and have these types. A Sync with
        a body is another message: the server fails at it."""
        while len(self._ahead) < len(kinds):
            message = super().next_nowait()
            if message is None:
                return None
            self._ahead.append(message)
        for (ahead, body), kind in zip(self._ahead, kinds, strict=False):
            if ahead != kind or (kind == F.SYNC and body):
                return None
        return [self._ahead[number][1] for number in range(len(kinds))]

    def take(self, *kinds: int) -> bool:
        """Consume the next messages, if these have arrived and have these types."""
        if self.peek(*kinds) is None:
            return False
        for _ in kinds:
            self._ahead.popleft()
        return True

    def take_rest(self) -> bytes:
        """All that was not consumed, including part of a message."""
        ahead = b"".join(frame(kind, body) for kind, body in self._ahead)
        self._ahead.clear()
        return ahead + super().take_rest()


class Batch:
    """The batch that an interception serves.

    Attributes:
        client, server: the connections.
        messages: from the client.
        primary: the requests to the server.
        caller: makes the calls.
        executed: whether the batch has executed something, which an error would have to undo.
        settings_known: whether the reported settings that affect how SQL is read still hold:
            nothing was executed since.
        copy_in_started: the server has begun to read COPY data: an earlier Sync gets no
            ReadyForQuery.
    """

    def __init__(self, session: ClientSession, data: bytes) -> None:
        """`data`: the client's bytes, starting with the message that has the call."""
        assert session.primary is not None
        self.session = session
        self.relay = session.relay
        self.client = session.client
        self.server = session.primary
        self.interrupts = Interrupts()
        self.primary = Exchange(session, self.server, self.interrupts)
        self.caller = SessionCaller(session, self.primary, self.interrupts)
        self.messages = ClientMessages(self.client, data)
        self.executed = F.EXECUTE in self.relay.batch
        self.settings_known = False
        self.copy_in_started = False

    async def next_message(self) -> tuple[int, bytes]:
        """The client's next message. What is queued for the server is sent first."""
        message = self.messages.next_nowait()
        if message is None:
            self.primary.push()
            self.client.flush()
            message = await self.messages.next()
        return message

    def is_alone(self, plan: Plan) -> bool:
        """Whether an error in the call would have nothing to undo. Then Sync may go with the call,
        so that the server's transaction and its snapshot end before the call is made."""
        if self.executed or self.relay.status != TransactionStatus.IDLE:
            return False
        return not plan.needs & (Needs.PRIMARY | Needs.COMMIT) and plan.has_no_side_effects

    # What is known of the server

    async def know_settings(self, body: bytes) -> None:
        """Ask the server for the settings by which it reads a Query or Parse, if they matter and it
        has not reported them since the last execution."""
        if self.settings_known or not may_be_ours(body.lower()) or not depends_on_settings(body):
            return
        if self.relay.status == TransactionStatus.FAILED and not self.executed:
            return  # nothing can have changed them, and SHOW would fail
        await self.primary.ask_settings(*READING)
        self.settings_known = True

    async def know_names(self, statement: Statement, *, apart: bool = False) -> None:
        """Ask the server, unless it is known, which version of the API it has, and which names of
        ours in a statement belong to other objects. `apart`: the batch has not begun."""
        session, reader = self.session, self.session.reader
        if self.relay.status == TransactionStatus.FAILED or not reader.may_call(statement):
            return
        if not session.extension_state.is_known:
            await self.caller.ask_state(apart=apart)
        plan = reader.plan(statement)
        if isinstance(plan, Plan) and session.extension_state.may_mean_other_objects(plan):
            statement.is_others = await self.caller.means_others(plan, apart=apart)

    async def know_view(self, statements: Sequence[Statement], *, apart: bool = False) -> None:
        """Ask how to serve definitions that look for jobs. `apart`: the batch has not begun."""
        reader = self.session.reader
        undecided = [
            statement
            for statement in statements
            if isinstance(plan := reader.plan(statement), Substitute) and plan.is_undecided
        ]
        if not undecided or self.relay.status == TransactionStatus.FAILED:
            return
        [[schema, level, real]] = await self.primary.query(VIEW_QUERY, apart=apart)
        for statement in undecided:
            reader.decide(statement, schema, level or b"", has_c_extension=real == b"t")

    # Executing

    def send_execute(
        self,
        portal: bytes,
        max_rows: int,
        handler: ResponseHandler,
        *,
        plan: Plan | Substitute | None = None,
        offset: int = 0,
    ) -> None:
        """Queue Execute; see `Exchange.send`."""
        self.executed = True
        self.settings_known = False
        if plan is None or isinstance(plan, Substitute) or not plan.has_no_side_effects:
            self.relay.known_settings = None
        self.primary.send(
            Execute(portal, max_rows).serialize(),
            ENDS_EXECUTE,
            handler,
            plan=plan,
            offset=offset,
            is_block=isinstance(plan, Substitute) and plan.tag is not None,
        )

    def close_unnamed(self) -> None:
        """Close the unnamed statement and portal, as a Query does."""

        async def closed(kind: int, body: bytes) -> None:
            self.primary.unclosed.discard(b"")

        self.primary.send(Close(PORTAL, b"").serialize(), ENDS_CLOSE, drop)
        self.primary.send(Close(STATEMENT, b"").serialize(), ENDS_CLOSE, closed)

    def pass_as(
        self, plan: Plan | Substitute | None, command: Command | None = None
    ) -> ResponseHandler:
        """Returns a handler that passes on the answer to Execute or Query, with the command tag and
        notice of a substitute. `command`: the prepared statement, which gives its notice once."""
        if isinstance(plan, Substitute) and plan.blocks:
            self.session.extension_state.change()  # even on failure: it may have committed

        async def handler(kind: int, body: bytes) -> None:
            if kind != B.COMMAND_COMPLETE or not isinstance(plan, Substitute):
                await self.pass_execution(kind, body)
                return
            if plan.notice is not None and not (command is not None and command.notice_sent):
                fields = plan.notice.response(self.session.codec).fields
                await self.primary.write(NoticeResponse(fields).serialize())
            if command is not None:
                command.notice_sent = True
            if plan.tag is None:
                await self.primary.pass_on(kind, body)
            else:
                self.session.extension_state.change()
                await self.primary.write(CommandComplete(plan.tag).serialize())

        return handler

    async def pass_execution(self, kind: int, body: bytes) -> None:
        """Pass on the answer to Execute, and meanwhile the client's COPY data."""
        await self.primary.pass_on(kind, body)
        if kind != B.COPY_IN_RESPONSE:
            return
        self.copy_in_started = True
        early = self.primary.listen()
        while kind not in ENDS_COPY_IN:
            message = await self._unless_server_speaks(early)
            if message is None:
                return
            kind, body = message
            if kind not in (F.FLUSH, F.SYNC):
                # The server refuses other messages.
                self.server.write(frame(kind, body))
                if self.server.full is not None:
                    await asyncio.wait([self.server.full])
        self.server.write(FLUSH)

    async def _unless_server_speaks(
        self, early: asyncio.Task[tuple[int, bytes]]
    ) -> tuple[int, bytes] | None:
        """The client's next message; None if the server speaks first, since its COPY has failed."""
        waiting = asyncio.ensure_future(self.next_message())
        try:
            await asyncio.wait((waiting, early), return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
