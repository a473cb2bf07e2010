"""A batch of the client's messages with a call in it, served message by message.

Invariant: the primary backend does everything that it can do. It parses, describes, binds and
executes a stand-in in the place of each statement with a call (see `statements`), so it is the
server that infers parameters, evaluates arguments and keeps the transaction. The interception
takes the stand-in's rows off the stream and puts the call's in.

An interception begins when everything before its first message is answered, and ends with the
ReadyForQuery of its batch. How it talks to the server is in `dialogue`, who calls in `caller`, what
ends a wait in `interrupts`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    QUERY_CANCELED,
    ProtocolViolation,
    SQLError,
)
from protocol.framing import HEADER_SIZE, frame
from protocol.kinds import (
    AFTER_LOGIN,
    ENDS_BIND,
    ENDS_CLOSE,
    ENDS_COPY_IN,
    ENDS_DESCRIBE,
    ENDS_EXECUTE,
    ENDS_PARSE,
    B,
    F,
    TransactionStatus,
)
from protocol.messages import (
    Bind,
    Close,
    CommandComplete,
    DataRow,
    Describe,
    Execute,
    Parse,
    PortalSuspended,
    Query,
    RowDescription,
    Terminate,
)
from protocol.values import NoBinaryForm
from proxy.api.functions import TEXT, Column, Needs, Type
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.net.inbox import Inbox
from proxy.session.caller import SessionCaller
from proxy.session.dialogue import (
    FLUSH,
    SYNC_AHEAD,
    SYNC_MESSAGE,
    BatchFailedError,
    PrimaryDialogue,
    Take,
    drop,
)
from proxy.session.fetch import Fetch, text_field
from proxy.session.prepared import (
    Portal,
    PreparedCall,
    as_defined,
    call_types,
    check_stand_in,
    client_fields,
    format_of,
    misread,
    needs_of,
    outputs_of,
    shape_unknown,
    stand_in_formats,
)
from proxy.session.relay import TEXT_COST, TURN
from proxy.session.results import Table, encode, with_formats
from proxy.sql import encodings
from proxy.statements.plan import Plan, ResultPlan, ScalarPlan, Substitute, joined
from proxy.statements.reading import READING, Reading, depends_on_settings
from proxy.statements.statement import Statement
from proxy.statements.triggers import may_be_ours

if TYPE_CHECKING:
    from proxy.session.session import Session


TO_LEAVE: Final = 10.0
"""Seconds that a server gets to end the session when its client has left, and it has nothing more
to do. Then the connection is closed, which to it is a client that has vanished."""


class Interception:
    """Serves one batch, then hands both connections back to the relay."""

    def __init__(self, session: Session, data: bytes, statements: list[Statement]) -> None:
        """
        Args:
            session: whose client and primary backend these are.
            data: of the client, from the message with the call on.
            statements: of the first message, if they were read.
        """
        assert session.primary is not None
        self._session = session
        self._relay = session.relay
        self._client = session.client
        self._server = session.primary
        self.interrupts = Interrupts()
        self._primary = PrimaryDialogue(session, self._client, self._server, self.interrupts)
        self._caller = SessionCaller(session, self._primary, self.interrupts)
        self._from_client = Inbox(self._client)
        self._from_client.feed(data)
        self._client.receive = self._from_client.feed
        # The client's messages that were looked at ahead of their turn.
        self._ahead: deque[tuple[int, bytes]] = deque()
        self._first_statements = statements
        # Something was executed in this batch, which an error would have to undo.
        self._executed = F.EXECUTE in self._relay.batch
        # The relay knows the settings that SQL is read with: nothing was executed in this batch
        # since they were reported, or asked for.
        self._settings_known = False
        # The server has begun to read COPY data: the Sync sent before that has no ReadyForQuery.
        self._copied = False
        # What was read of SQL since others had their turn.
        self._read = 0

    # The batch

    async def run(self) -> None:
        """Serve the client's messages up to the end of the batch."""
        await self._relay.settle()
        if self._relay.asked.copying:
            return  # the server will say that this is no COPY data
        self._settings_known = not self._relay.settings_may_differ
        self._primary.failed = self._relay.asked.skipping
        self._server.receive = self._primary.inbox.feed
        while not await self._message():
            pass

    def hand_back(self) -> None:
        """Let the relay go on with what was not read."""
        self._relay.batch.clear()
        self._server.receive = self._relay.from_server
        self._client.receive = self._relay.from_client
        rest = self._primary.inbox.take_rest()
        if rest:
            self._relay.from_server(rest)
        ahead = b"".join(frame(kind, body) for kind, body in self._ahead)
        rest = ahead + self._from_client.take_rest()
        if rest:
            self._relay.from_client(rest)

    def end_client(self) -> None:
        """The client will send no more. It gets the answers to what it has sent, except that no
        job is waited for."""
        self._from_client.close(ConnectionError("the client has closed the connection"))
        self.interrupts.end_client(reads=self._client.full is None)

    def client_hung_up(self) -> None:
        """The client has left behind messages that were not read. No job is waited for; otherwise
        they are served in their turn."""
        self.interrupts.client_hung_up()

    def server_lost(self, error: Exception) -> None:
        """The primary backend is gone."""
        self._primary.inbox.close(error)
        self.interrupts.fail(error)

    def last_words(self) -> bytes:
        """Messages that the server sent before it went, and that were not read."""
        words: list[bytes] = []
        with contextlib.suppress(ProtocolViolation):
            for kind, body in self._primary.inbox:
                if kind in (B.ERROR_RESPONSE, B.NOTICE_RESPONSE):
                    words.append(frame(kind, body))
        return b"".join(words)

    async def _message(self) -> bool:
        """Serve one message of the client; true if it ended the batch."""
        try:
            kind, body = await self._client_message()
        except ConnectionError:
            if self.interrupts.client_ended:
                await self._end_server()
            raise
        except ProtocolViolation:
            # Not our protocol: the relay lets the server judge the rest of the stream.
            with contextlib.suppress(BatchFailedError):
                await self._primary.settle()
            return True
        statements, self._first_statements = self._first_statements, []
        if kind not in AFTER_LOGIN:
            # The server ends the session for it, whatever it is doing.
            with contextlib.suppress(BatchFailedError):
                await self._primary.settle()
            return self._end_at(kind, body)
        if self._primary.failed and kind not in (F.SYNC, F.TERMINATE):
            return False
        if kind == F.QUERY:
            with contextlib.suppress(BatchFailedError):
                await self._primary.settle()
            if self._primary.failed:
                return False  # the server skips it
        try:
            match chr(kind):
                case "Q":
                    await self._know_settings(body)
                    await self._take_turns(body)
                    statements = statements or self._session.reader.read(kind, body)
                    if not self._session.reader.has_call(statements):
                        return self._end_at(kind, body)
                    self._session.settings_mentioned(body.lower())
                    await self._query(body, statements)
                case "P":
                    await self._take_turns(body)
                    self._session.settings_mentioned(body.lower())
                    await self._know_settings(body)
                    if b"set_config" in body.lower():
                        self._relay.setters.add(self._relay.key(body.partition(b"\0")[0]))
                    [statement] = statements or self._session.reader.read(kind, body)
                    await self._parse(body, statement)
                case "B":
                    self._settings_known = False  # a parameter's type has functions of its own
                    await self._bind(body)
                case "D":
                    await self._describe(body)
                case "E":
                    await self._execute(body)
                case "C":
                    await self._close(body)
                case "H":
                    await self._primary.settle()
                case "S":
                    self._copied = False
                    await self._primary.settle()
                case "F":
                    await self._primary.settle()
                    return self._end_at(kind, body)
                case "X":
                    self._primary.push()
                    self._server.write(frame(kind, body))
                    await self._primary.inbox.next()  # raises: the server closes the connection
                case _ if self._primary.owes:
                    # COPY data, perhaps for what has not been executed yet.
                    self._ahead.appendleft((kind, body))
                    await self._primary.settle()
                case _:
                    pass  # COPY data after its end: the server ignores it too
        except BatchFailedError:
            pass
        except SQLError as error:
            await self._primary.fail(error)
        if kind == F.SYNC and self._copied:
            return False
        if kind in (F.SYNC, F.QUERY) or self._primary.synced:
            await self._primary.ready()
            return True
        return False

    async def _take_turns(self, body: bytes) -> None:
        """Before a text is read: let others have their turn, after many or long ones."""
        if self._read > TURN:
            self._read = 0
            await asyncio.sleep(0)
        self._read += len(body) + TEXT_COST

    async def _end_server(self) -> None:
        """Let the server see that the client has ended, and pass on the errors that it still has.
        Raises ConnectionError when it has closed the connection, or is not going to."""
        self._primary.push()
        rest = self._from_client.take_rest()  # a part of a message
        if self._server.can_write_eof:
            self._server.write(rest)
            self._server.write_eof()
        elif rest:
            # Terminate would be taken for more of it, and waited for the rest.
            raise ConnectionError("the client has left in the middle of a message")
        else:
            self._server.write(Terminate().serialize())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TO_LEAVE):
                while True:
                    kind, body = await self._primary.next_message()
                    if kind == B.ERROR_RESPONSE:
                        self._client.write(frame(kind, body))
        raise ConnectionError("the server did not end with its client")

    def _end_at(self, kind: int, body: bytes) -> bool:
        """Leave this message to the relay, and what comes after it."""
        self._ahead.appendleft((kind, body))
        return True

    async def _client_message(self) -> tuple[int, bytes]:
        """The client's next message. The server must not be kept waiting meanwhile."""
        if self._ahead:
            return self._ahead.popleft()
        message = self._from_client.next_nowait()
        if message is None:
            self._primary.push()
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
        if not self._next_are(F.SYNC):
            return False
        self._ahead.popleft()
        return True

    def _is_alone(self, plan: Plan) -> bool:
        """Whether there is nothing that an error of ours would have to undo, so that Sync may go
        along with a call: then the server's transaction, and its snapshot, do not wait with us."""
        if self._executed or self._relay.status != TransactionStatus.IDLE:
            return False
        return Needs.PRIMARY not in needs_of(plan) and plan.has_no_side_effects

    async def _pass_rows_only(self, kind: int, body: bytes) -> None:
        """For the answer to Describe in a Query, where NoData is not said."""
        if kind == B.ROW_DESCRIPTION:
            await self._primary.pass_on(kind, body)

    async def _pass_execution(self, kind: int, body: bytes) -> None:
        await self._primary.pass_on(kind, body)
        if kind != B.COPY_IN_RESPONSE:
            return
        self._copied = True
        early = self._primary.listen()
        while kind not in ENDS_COPY_IN:
            message = await self._unless_server_speaks(early)
            if message is None:
                return
            kind, body = message
            if kind not in (F.FLUSH, F.SYNC):
                # Other messages are for the server to refuse.
                self._server.write(frame(kind, body))
                if self._server.full is not None:
                    await asyncio.wait([self._server.full])
        self._server.write(FLUSH)

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

    async def _query(self, body: bytes, statements: Sequence[Statement]) -> None:
        sql = body.removesuffix(b"\0")
        self._relay.statements.pop(b"", None)
        self._relay.forget_portal(b"")
        for statement in statements[:1]:
            await self._know_api(statement, apart=not self._relay.batch)
        plans = [self._session.reader.plan(statement) for statement in statements]
        if all(plan is None or isinstance(plan, Substitute) for plan in plans):
            await self._substitutes(sql, statements, plans)
            return
        reading = self._session.reading
        texts = [statement.text for statement in statements]
        offset = end = 0
        for number, statement in enumerate(statements):
            if number:
                await self._check_settings(reading, texts[number:])
            offset += len(sql[end : statement.offset].decode(self._session.codec, "replace"))
            end = statement.offset
            comment = _rest_as_comment(sql, statement) if number == 0 else b""
            is_last = number == len(statements) - 1
            await self._statement(statement, offset, is_last=is_last, comment=comment)
        if b"" in self._primary.unclosed:
            self._close_unnamed()
            self._primary.synced = True
            await self._primary.settle(SYNC_MESSAGE)

    async def _check_settings(self, before: Reading, texts: Sequence[bytes]) -> None:
        """Raises SQLError if the server would read what comes next in a Query otherwise than it has
        read the Query, because of what came before."""
        if not any(map(depends_on_settings, texts)):
            return
        await self._primary.ask_settings(*READING)
        now = self._session.reading
        if not all(before.reads_as(now, text) for text in texts):
            changed = [
                name.decode()
                for name, old, new in zip(READING, before, now, strict=True)
                if old != new
            ]
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                f"a query string with a pg_background call must not change {' and '.join(changed)}"
                " before statements that this gives another meaning",
                detail="PostgreSQL reads a query string before it executes any of it; the proxy"
                " has one with a pg_background call read statement by statement.",
                hint="Send what comes before in a query string of its own.",
            )

    async def _substitutes(
        self,
        sql: bytes,
        statements: Sequence[Statement],
        plans: Sequence[Plan | Substitute | None],
    ) -> None:
        """A Query without calls, as it is but for what some of its statements are replaced by."""
        self._relay.untouched = False
        replaced = [
            (statement.offset, plan)
            for statement, plan in zip(statements, plans, strict=True)
            if plan is not None
        ]
        whole = joined(sql, replaced)
        message = Query(whole.rewrite.sql).serialize()
        for plan in plans:
            tag = plan.tag if isinstance(plan, Substitute) else None
            self._primary.send(
                message, ENDS_EXECUTE, self._pass_as(tag), plan=whole, is_block=tag is not None
            )
            message = b""
        self._primary.synced = True
        await self._primary.settle()

    def _pass_as(self, tag: bytes | None) -> Take:
        """Passes on the answer to Execute or Query, with this command tag if there is one."""

        async def take(kind: int, body: bytes) -> None:
            if kind == B.COMMAND_COMPLETE and tag is not None:
                self._session.extension_state.change()
                await self._primary.write(CommandComplete(tag).serialize())
            else:
                await self._pass_execution(kind, body)

        return take

    async def _statement(
        self, read: Statement, offset: int, *, is_last: bool, comment: bytes = b""
    ) -> None:
        """One statement of a Query, through the extended protocol, so that it can be stopped
        before the next one and the transaction stays one. `comment`: sent behind it."""
        await self._know_api(read)
        text, plan = read.text, self._session.reader.plan(read)
        if plan is not None:
            text = plan.rewrite.sql
            text += _as_comment(plan.rewrite.unsent)
        text += comment
        is_call = isinstance(plan, ScalarPlan | ResultPlan)
        statement = PreparedCall(plan) if plan is not None and is_call else None
        self._primary.unclosed.add(b"")
        self._primary.send(
            Parse(b"", text, ()).serialize(), ENDS_PARSE, drop, plan=plan, offset=offset
        )
        self._primary.send(
            Bind(b"", b"", (), (), ()).serialize(), ENDS_BIND, drop, plan=plan, offset=offset
        )
        describe = Describe(b"P", b"").serialize()
        if statement is None:
            tag = plan.tag if isinstance(plan, Substitute) else None
            self._primary.send(
                describe, ENDS_DESCRIBE, self._pass_rows_only, plan=plan, offset=offset
            )
            # Nothing may follow before its answer: it could be COPY FROM STDIN.
            self._send_execute(b"", 0, self._pass_as(tag), plan=plan, offset=offset)
            await self._primary.settle()
            return
        portal = Portal(statement, ())
        self._primary.send(
            describe, ENDS_DESCRIBE, self._described(statement, ()), plan=plan, offset=offset
        )
        if isinstance(plan, ScalarPlan):
            await self._call(b"", portal, 0, offset=offset, is_query=True, may_sync=is_last)
        else:
            assert isinstance(plan, ResultPlan)
            sync = is_last and self._is_alone(plan)
            await self._fetch(b"", portal, 0, offset=offset, is_query=True, sync=sync)

    async def _know_settings(self, body: bytes) -> None:
        """Ask the server for the settings that it reads a Query or Parse with, if they make a
        difference and it has not reported them since it executed something."""
        if self._settings_known or not may_be_ours(body.lower()) or not depends_on_settings(body):
            return
        if self._relay.status == TransactionStatus.FAILED and not self._executed:
            return  # nothing can have changed them, and SHOW would fail
        await self._primary.ask_settings(*READING)
        self._settings_known = True

    async def _know_api(self, statement: Statement, *, apart: bool = False) -> None:
        """Ask the server what a function returns, if that is not known yet and this may be a call
        of one where it makes a difference. `apart`: the batch has not begun."""
        session = self._session
        if (
            not session.extension_state.is_known
            and self._relay.status != TransactionStatus.FAILED
            and session.reader.depends_on_api(statement)
        ):
            await self._caller.ask_api(apart=apart)

    def _close_unnamed(self) -> None:
        """A Query leaves no unnamed statement or portal behind."""

        async def closed(kind: int, body: bytes) -> None:
            self._primary.unclosed.discard(b"")

        self._primary.send(Close(b"P", b"").serialize(), ENDS_CLOSE, drop)
        self._primary.send(Close(b"S", b"").serialize(), ENDS_CLOSE, closed)

    # The extended protocol

    async def _parse(self, body: bytes, read: Statement) -> None:
        message = Parse.parse(body)
        await self._know_api(read)
        plan = self._session.reader.plan(read)
        statements = self._relay.statements
        key = self._relay.key(message.statement)
        old = statements.get(key)

        def undo(was_read: bool) -> None:
            statements.pop(key, None)
            # The unnamed statement goes with the attempt.
            if old is not None and (key or not was_read):
                statements[key] = old

        if plan is None or (isinstance(plan, Substitute) and plan.tag is None):
            statements.pop(key, None)
            if plan is not None:
                body = replace(message, query=plan.rewrite.sql).serialize()[HEADER_SIZE:]
            parse = frame(F.PARSE, body)
            self._primary.send(parse, ENDS_PARSE, self._primary.pass_on, plan=plan, undo=undo)
            return
        prepared = PreparedCall(plan)
        statements[key] = prepared
        query = plan.rewrite.sql + _as_comment(plan.rewrite.unsent)
        self._primary.send(
            replace(message, query=query).serialize(),
            ENDS_PARSE,
            self._primary.pass_on,
            plan=plan,
            undo=undo,
        )
        if isinstance(plan, Substitute):
            return
        name = encodings.short_name(message.statement, self._session.client_encoding)
        self._primary.send(
            Describe(b"S", name).serialize(),
            ENDS_DESCRIBE,
            self._described(prepared),
            plan=plan,
        )

    def _described(self, statement: PreparedCall, shown: Sequence[int] | None = None) -> Take:
        """Notes how the server describes a stand-in.

        `shown`: the result formats, if the client is to see it, as a description of its own
        statement; None if not.
        """

        async def take(kind: int, body: bytes) -> None:
            if kind == B.PARAMETER_DESCRIPTION:
                statement.has_parameters = len(body) > 2
                if shown is not None:
                    await self._primary.pass_on(kind, body)
            elif kind == B.ROW_DESCRIPTION:
                statement.fields = RowDescription.parse(body).fields
                if not isinstance(statement.plan, Substitute):
                    check_stand_in(statement.plan, statement.fields)
                if shown is not None and not shape_unknown(statement.plan):
                    fields = with_formats(client_fields(statement), shown)
                    await self._primary.write(RowDescription(fields).serialize())

        return take

    async def _bind(self, body: bytes) -> None:
        message = Bind.parse(body)
        relay = self._relay
        key, name = relay.key(message.portal), relay.key(message.statement)
        if name in relay.setters:
            self._session.setting_bound(body)
        portals = relay.portals
        statement = relay.statements.get(name)
        if statement is None:
            if not message.portal:
                relay.forget_portal(b"")
            self._primary.send(frame(F.BIND, body), ENDS_BIND, self._primary.pass_on)
            return
        formats = message.result_formats
        message = replace(message, result_formats=stand_in_formats(statement, formats))
        if not message.portal:
            relay.forget_portal(b"")
        portals[key] = Portal(statement, formats)
        self._primary.send(
            message.serialize(),
            ENDS_BIND,
            self._primary.pass_on,
            plan=statement.plan,
            undo=lambda _: portals.pop(key, None),
        )

    async def _describe(self, body: bytes) -> None:
        message = Describe.parse(body)
        relay = self._relay
        key = relay.key(message.name)
        if message.kind == b"P":
            portal = relay.portals.get(key)
            statement = portal.statement if portal is not None else None
        else:
            portal, statement = None, relay.statements.get(key)
        if statement is None:
            self._primary.send(frame(F.DESCRIBE, body), ENDS_DESCRIBE, self._primary.pass_on)
            return
        if isinstance(statement.plan, Substitute):
            self._primary.send(
                frame(F.DESCRIBE, body),
                ENDS_DESCRIBE,
                self._primary.pass_on,
                plan=statement.plan,
            )
            return
        formats = () if portal is None else portal.formats
        self._primary.send(
            frame(F.DESCRIBE, body),
            ENDS_DESCRIBE,
            self._described(statement, formats),
            plan=statement.plan,
        )
        if not shape_unknown(statement.plan):
            return
        await self._primary.settle()
        if portal is None:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "the columns of pg_background_result are not known before it is executed",
                hint="Give a column definition list:"
                " SELECT * FROM pg_background_result(...) AS (column type, ...).",
            )
        plan = portal.statement.plan
        assert not isinstance(plan, Substitute)
        if self._is_alone(plan) and self._next_are(F.EXECUTE, F.SYNC):
            execute = Execute.parse(self._ahead[0][1])
            if relay.key(execute.portal) == key:
                self._ahead.clear()
                await self._fetch(message.name, portal, execute.max_rows, describe=True, sync=True)
                return
        async with self._result(message.name, portal) as result:
            await self._primary.write(RowDescription(result.fields).serialize())

    async def _close(self, body: bytes) -> None:
        message = Close.parse(body)
        statements = self._relay.statements
        key = self._relay.key(message.name)
        old = statements.pop(key, None) if message.kind == b"S" else None
        if message.kind == b"P":
            self._relay.forget_portal(message.name)

        def undo(was_read: bool) -> None:
            if old is not None:
                statements[key] = old

        self._primary.send(frame(F.CLOSE, body), ENDS_CLOSE, self._primary.pass_on, undo=undo)

    async def _execute(self, body: bytes) -> None:
        message = Execute.parse(body)
        portal = self._relay.portals.get(self._relay.key(message.portal))
        if portal is None:
            self._send_execute(message.portal, message.max_rows, self._pass_execution)
            return
        plan = portal.statement.plan
        if isinstance(plan, Substitute):
            self._send_execute(message.portal, message.max_rows, self._pass_as(plan.tag), plan=plan)
        elif isinstance(plan, ScalarPlan):
            await self._call(message.portal, portal, message.max_rows)
        else:
            alone = portal.result is None and self._is_alone(plan)
            sync = alone and self._next_is_sync()
            await self._fetch(message.portal, portal, message.max_rows, sync=sync)

    def _send_execute(
        self,
        portal: bytes,
        max_rows: int,
        take: Take,
        *,
        plan: Plan | Substitute | None = None,
        offset: int = 0,
    ) -> None:
        self._executed = True
        self._settings_known = False
        if plan is None or isinstance(plan, Substitute) or not plan.has_no_side_effects:
            self._relay.untouched = False
        self._primary.send(
            Execute(portal, max_rows).serialize(),
            ENDS_EXECUTE,
            take,
            plan=plan,
            offset=offset,
            is_block=isinstance(plan, Substitute) and plan.tag is not None,
        )

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
        needs = needs_of(plan)
        kept: list[tuple[int, bytes]] = []
        may_set = not plan.has_no_side_effects

        async def take(kind: int, body: bytes) -> None:
            if kept or Needs.PRIMARY in needs or (may_set and _has_other_letters(plan, kind, body)):
                kept.append((kind, body))
            else:
                await self._call_row(portal, kind, body)

        self._caller.ask_context(plan, first=not self._executed)
        alone = may_sync and self._is_alone(plan)
        self._send_execute(name, max_rows, take, plan=plan, offset=offset)
        if is_query:
            self._close_unnamed()
        self._primary.synced = alone and (is_query or self._next_is_sync())
        with self.interrupts.calling(limited=Needs.TIME in needs):
            await self._primary.settle(SYNC_AHEAD if self._primary.synced else FLUSH)
            if kept and may_set:
                await self._check_encoding()
            for kind, body in kept:
                await self._call_row(portal, kind, body)

    async def _check_encoding(self) -> None:
        """Raises SQLError if a stand-in has changed the encoding of its own rows, perhaps between
        two of them."""
        before = self._caller.context.client_encoding
        await self._primary.ask_settings(b"client_encoding")
        if self._session.client_encoding != before:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "a statement with a pg_background call must not change client_encoding",
                hint="Change it in a statement before.",
            )

    async def _call_row(self, portal: Portal, kind: int, body: bytes) -> None:
        plan = portal.statement.plan
        assert isinstance(plan, ScalarPlan)
        if kind != B.DATA_ROW:
            await self._primary.pass_on(kind, body)
            return
        self.interrupts.check_for_interrupts()
        values = list(DataRow.parse(body).values)
        if len(values) != len(portal.statement.fields):
            raise misread()
        results: dict[int, Any] = {}
        for column in plan.columns:
            place = column.index % len(values)
            results[place] = await self._caller.evaluate(
                column.call, self._caller.arguments(column.call, values[place]), results
            )
        outputs = outputs_of(plan, len(values))
        types = call_types(plan, len(values))
        row: list[bytes | None] = []
        for number, output in enumerate(outputs):
            if output.column not in results:
                row.append(values[output.column])
                continue
            value, type = results[output.column], types[output.column]
            if output.field is not None:
                value = None if value is None else value[output.field]
                type = type.columns[output.field].type
            binary = format_of(portal.formats, number) == 1
            row.append(self._encode(value, type, binary=binary))
        await self._primary.write(DataRow(tuple(row)).serialize())

    def _encode(self, value: Any, type: Type, *, binary: bool) -> bytes | None:
        try:
            return encode(value, type, self._session.zone, binary=binary)
        except (NoBinaryForm, ProtocolViolation):
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                f"binary format is not available for type {type.name}",
                hint="Ask for results in text format.",
            ) from None

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
        """Execute a portal whose rows a function makes, or a job.

        `describe`: the client has asked for its columns too. `sync`: Sync goes along.
        """
        async with self._result(
            name, portal, offset=offset, is_query=is_query, sync=sync
        ) as result:
            if describe or (is_query and shape_unknown(portal.statement.plan)):
                await self._primary.write(RowDescription(result.fields).serialize())
            sent = await result.send(max_rows)
            if max_rows and sent == max_rows:
                await self._primary.write(PortalSuspended().serialize())
            else:
                await self._primary.write(CommandComplete(b"SELECT %d" % sent).serialize())

    @contextlib.asynccontextmanager
    async def _result(
        self,
        name: bytes,
        portal: Portal,
        *,
        offset: int = 0,
        is_query: bool = False,
        sync: bool = False,
    ) -> AsyncIterator[Fetch | Table]:
        """The result of a portal, begun if it was not yet, its columns known and checked."""
        plan = portal.statement.plan
        assert isinstance(plan, ResultPlan)
        self._caller.ask_context(plan, first=not self._executed)
        rows: list[tuple[bytes | None, ...]] = []
        if portal.result is None:

            async def take(kind: int, body: bytes) -> None:
                if kind == B.DATA_ROW:
                    rows.append(DataRow.parse(body).values)

            self._send_execute(name, 0, take, plan=plan, offset=offset)
        else:
            # It may have gone with a savepoint; the server knows.
            self._primary.send(Describe(b"P", name).serialize(), ENDS_DESCRIBE, drop)
        if is_query:
            self._close_unnamed()
        self._primary.synced = sync
        with self.interrupts.calling(limited=Needs.TIME in needs_of(plan)):
            await self._primary.settle(SYNC_AHEAD if sync else FLUSH)
            self.interrupts.is_waiting = True
            try:
                if portal.result is None:
                    if [len(row) for row in rows] != [len(portal.statement.fields)]:
                        raise misread()
                    if not plan.has_no_side_effects and not (rows[0][-1] or b"").isascii():
                        await self._check_encoding()
                    portal.result = await self._open(portal, rows[0][-1])
                await portal.result.describe()
                yield portal.result
            except BaseException as error:
                portal.close()
                if isinstance(portal.result, Fetch) and _is_interrupt(error):
                    self._interrupted(portal.result.job)
                raise
            finally:
                if isinstance(portal.result, Fetch) and portal.result.finished:
                    self._session.jobs.remove(portal.result.job)

    def _interrupted(self, job: Job) -> None:
        """The fetch was interrupted. Cancel the job if no other way leads to it."""
        if not (job.has_handle or job.finished):
            self._session.jobs.remove(job)
            self._session.cancel_job(job)

    async def _open(self, portal: Portal, arguments: bytes | None) -> Fetch | Table:
        """Call the function in FROM."""
        plan = portal.statement.plan
        assert isinstance(plan, ResultPlan)
        function = plan.call.function
        leaves = self._caller.arguments(plan.call, arguments)
        value = await self._caller.evaluate(plan.call, leaves)
        defined = portal.statement.fields[-1 - plan.defined_columns : -1]
        if isinstance(value, Job):
            return Fetch(
                value,
                plan.outputs,
                defined=defined,
                formats=portal.formats,
                write=self._primary.write,
                wait=self._wait_for,
            )
        if function.returns_set:
            rows = value or []
        else:
            rows = [value or (None,) * len(function.columns)]
        columns: Sequence[Column] = function.columns
        if not columns:
            # A job whose pid is NULL has no rows, of whatever columns.
            columns = [Column(field.name.decode(), TEXT) for field in defined or (text_field(),)]
        elif defined:
            columns = as_defined(columns, defined)
        return Table(
            rows,
            columns,
            plan.outputs,
            portal.formats,
            zone=self._session.zone,
            write=self._primary.write,
        )

    async def _wait_for(self, job: Job) -> None:
        await self.interrupts.for_jobs([job])


def _rest_as_comment(sql: bytes, first: Statement) -> bytes:
    """What else there is in a Query than its first statement, as a comment, for the server to check
    its encoding as that of the whole; none if it is ASCII."""
    rest = sql[: first.offset] + b" " + sql[first.offset + len(first.text) :]
    return _as_comment(rest)


def _as_comment(text: bytes) -> bytes:
    """For the server to check the encoding of what it has no other use for."""
    return b"" if text.isascii() else b" --" + text.replace(b"\r", b" ").replace(b"\n", b" ")


def _has_other_letters(plan: ScalarPlan, kind: int, body: bytes) -> bool:
    """Whether the arguments in a row are not ASCII, so that their encoding matters."""
    if kind != B.DATA_ROW or body.isascii():
        return False
    values = DataRow.parse(body).values
    return not all((values[column.index % len(values)] or b"").isascii() for column in plan.columns)


def _is_interrupt(error: BaseException) -> bool:
    """Whether this is an interrupt (cancel, timeout, disconnect) and not an error of the call."""
    return not isinstance(error, SQLError) or error.sqlstate == QUERY_CANCELED
