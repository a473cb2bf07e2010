"""Serves the messages of the extended protocol in a batch with a call.

Invariant: our record of statements and portals (`named`) follows the server's, in which a stand-in
has a name of its own: see `hidden`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from protocol import wire
from protocol.errors import FEATURE_NOT_SUPPORTED, SQLError
from protocol.framing import frame
from protocol.kinds import (
    ENDS_BIND,
    ENDS_CLOSE,
    ENDS_DESCRIBE,
    ENDS_PARSE,
    PORTAL,
    STATEMENT,
    B,
    F,
    TransactionStatus,
)
from protocol.messages import Bind, Close, Describe, Execute, Parse, RowDescription
from proxy.session.batch import Batch
from proxy.session.exchange import OWN_NAME, ResponseHandler, drop
from proxy.session.execution import Execution
from proxy.session.named import Undo
from proxy.session.prepared import Command, FunctionResult, Portal, Prepared, WithCalls, prepare
from proxy.session.simple_query import as_comment
from proxy.sql import encodings
from proxy.sql.lexer import Kind
from proxy.sql.rewrite import Piece, Rewrite
from proxy.statements.hidden import GUARD_COLUMN, portal_guard, statement_guard
from proxy.statements.plan import Plan, Statement

_STILL_THERE: Final = (
    b"SELECT p.name FROM pg_catalog.pg_prepared_statements p WHERE NOT p.from_sql"
    b" AND p.name OPERATOR(pg_catalog.=) ANY (CAST($1 AS pg_catalog.text[]))"
)
"""Those of some names that are statements made by the protocol."""

_PRUNE_EACH: Final = 64
"""After this many statements with calls, check which still exist."""


class ExtendedQuery:
    """Serves the messages of types in `EXTENDED`."""

    def __init__(self, batch: Batch, execution: Execution) -> None:
        self._batch = batch
        self._execution = execution
        self._relay = batch.relay
        self._named = batch.session.named
        self._primary = batch.primary
        # Hidden portals whose guards certainly exist: bound, and nothing executed since.
        self._certain: set[bytes] = set()
        self._serve = {
            F.BIND: self._bind,
            F.DESCRIBE: self._describe,
            F.EXECUTE: self._execute,
            F.CLOSE: self._close,
        }

    async def serve(self, kind: int, body: bytes) -> None:
        """Serve Bind, Describe, Execute or Close."""
        await self._serve[kind](body)

    async def parse(self, body: bytes, read: Sequence[Statement]) -> None:
        """Serve Parse. `read`: its statements, if the relay has read them."""
        session, named = self._batch.session, self._named
        lowered = body.lower()
        session.custom_settings.mentioned(lowered)
        named.note_sent(lowered)
        await self._batch.know_settings(body)
        if b"set_config" in lowered:
            named.note_setter(body.partition(b"\0")[0])
        [statement] = read or session.reader.read(F.PARSE, body)
        message = Parse.parse(body)
        await self._batch.know_names(statement)
        await self._batch.know_view([statement])
        if named.statements and len(named.statements) % _PRUNE_EACH == 0:
            await self._prune_deallocated()
        plan = session.reader.plan(statement)
        if isinstance(plan, Plan):
            prepared = prepare(plan, session.extension_state.composites)
            if (
                plan.server_can_run
                and not statement.voids
                and session.extension_state.has_functions
            ):
                prepared.client_parse = replace(message, statement=OWN_NAME)
            old, undo = named.parsed(message.statement, prepared)
            self._parse_call(message, prepared, _parameters(message, statement), undo)
        else:
            parse, command = frame(F.PARSE, body), None
            if plan is not None:
                query = plan.rewrite.sql
                if plan.is_followed:
                    query += as_comment(plan.rewrite.unsent)
                    command = Command(plan, server_name=self._short(message.statement))
                parse = replace(message, query=query).serialize()
            old, undo = named.parsed(message.statement, command)
            self._primary.send(parse, ENDS_PARSE, self._primary.pass_on, plan=plan, undo=undo)
        self._close_stand_in(old)

    def _parse_call(self, message: Parse, prepared: WithCalls, parameters: int, undo: Undo) -> None:
        """Queue the Parse of a statement with calls, and a Describe of our own."""
        plan, primary, name = prepared.plan, self._primary, message.statement
        stand_in = plan.rewrite.sql + as_comment(plan.rewrite.unsent)
        prepared.server_name = hidden = self._hidden(name) if name else b""
        undo_hidden = self._undo_hidden(hidden, undo)
        primary.send(
            replace(message, statement=hidden, query=stand_in).serialize(),
            ENDS_PARSE,
            drop if hidden else primary.pass_on,
            plan=plan,
            undo=undo_hidden,
        )
        if hidden:

            def undo_both(was_read: bool) -> None:
                undo_hidden(was_read)
                if was_read:
                    primary.unclosed.add(hidden)

            own = statement_guard(self._short(name), hidden, message.query, parameters)
            if prepared.client_parse is not None:
                own = message.query, message.parameter_types
            primary.send(
                Parse(name, *own).serialize(),
                ENDS_PARSE,
                primary.pass_on,
                plan=_as_it_is(plan, own[0]),
                undo=undo_both,
            )
        describe = Describe(STATEMENT, hidden).serialize()
        primary.send(describe, ENDS_DESCRIBE, self._execution.describes(prepared), plan=plan)

    def _hidden(self, name: bytes) -> bytes:
        """A new server-side name for one of the client's statements or portals."""
        return self._named.hidden.new(self._short(name))

    def _undo_hidden(self, hidden: bytes, undo: Undo) -> Undo:
        """`undo`, and what `_hidden` has done."""

        def undo_hidden(was_read: bool) -> None:
            undo(was_read)
            self._named.hidden.forget(hidden)

        return undo_hidden

    def _short(self, name: bytes) -> bytes:
        return encodings.short_name(name, self._batch.session.client_encoding)

    def _close_stand_in(self, statement: Prepared | None) -> None:
        """Queue a Close for the stand-in of a statement that is gone."""
        if isinstance(statement, WithCalls) and statement.server_name:
            self._close_hidden(STATEMENT, statement.server_name)

    def _close_portal(self, portal: Portal | None) -> None:
        """The same for a portal."""
        if portal is not None and portal.is_hidden:
            self._close_hidden(PORTAL, portal.server_name, portal)

    def _close_hidden(self, kind: bytes, name: bytes, portal: Portal | None = None) -> None:
        async def closed(kind: int, body: bytes) -> None:
            self._named.hidden.forget(name)
            if portal is not None:
                portal.close()

        self._primary.send(Close(kind, name).serialize(), ENDS_CLOSE, closed)

    async def _check_still_there(self, name: bytes) -> None:
        """Check whether a statement still exists, if SQL may have deallocated it."""
        if not (self._named.is_doubtful and name and self._named.statement(name) is not None):
            return
        if self._relay.status == TransactionStatus.FAILED and not self._batch.executed:
            # The server cannot be asked in SQL. If there is no such statement, it says so.
            describe = Describe(STATEMENT, self._short(name)).serialize()
            self._primary.send(describe, ENDS_DESCRIBE, drop)
            return
        await self._forget_deallocated()

    async def _prune_deallocated(self) -> None:
        """Check all statements, if SQL may have deallocated some: their names may never recur."""
        if self._named.is_doubtful and self._relay.status != TransactionStatus.FAILED:
            await self._forget_deallocated()

    async def _forget_deallocated(self) -> None:
        """Ask the server which statements SQL has deallocated, and close their stand-ins."""
        names = self._named.names_to_ask()
        array = encodings.array_text(names, self._batch.session.client_encoding)
        found = {name for (name,) in await self._primary.query(_STILL_THERE, (array,)) if name}
        for statement in self._named.forget_missing(names, found):
            self._close_stand_in(statement)

    async def _bind(self, body: bytes) -> None:
        self._batch.settings_known = False  # parameter types have functions, which may run SET
        message = Bind.parse(body)
        named = self._named
        named.note_bound(named.key(message.statement), body)
        await self._check_still_there(message.statement)
        statement = named.statement(message.statement)
        key = named.key(message.portal)
        old, undo = named.bound(message.portal)
        client_parse: Parse | None = None  # of what the server executes itself
        if isinstance(statement, WithCalls) and message.portal and not statement.plan.streams:
            client_parse = statement.client_parse
        if statement is None or (client_parse is not None and message.statement):
            self._primary.send(frame(F.BIND, body), ENDS_BIND, self._primary.pass_on, undo=undo)
        elif isinstance(statement, Command) or not message.portal:
            self._bind_stand_in(body, message, statement, undo)
            named.portals[key] = Portal(statement, message.portal, message.result_formats)
        elif client_parse is not None:
            bind = _in_other_words(body, message, replace(message, statement=OWN_NAME))
            self._bind_own(statement.plan, client_parse, bind, undo)
        else:
            named.portals[key] = self._bind_hidden(body, message, statement, undo)
        self._close_portal(old)

    def _bind_stand_in(
        self, body: bytes, message: Bind, statement: Prepared, undo: Undo, hidden: bytes = b""
    ) -> None:
        new = replace(
            message,
            portal=hidden or message.portal,
            statement=statement.server_name,
            result_formats=statement.stand_in_formats(message.result_formats),
        )
        handler: ResponseHandler = drop if hidden else self._primary.pass_on
        bind = _in_other_words(body, message, new)
        self._primary.send(bind, ENDS_BIND, handler, plan=statement.plan, undo=undo)

    def _bind_hidden(self, body: bytes, message: Bind, statement: WithCalls, undo: Undo) -> Portal:
        """Queue the Bind of a stand-in to a named portal, and that of its guard."""
        hidden = self._hidden(message.portal)
        undo_hidden = self._undo_hidden(hidden, undo)
        self._bind_stand_in(body, message, statement, undo_hidden, hidden)
        self._certain.add(hidden)
        sql = statement.plan.rewrite.original
        guard = Parse(OWN_NAME, portal_guard(self._short(message.portal), hidden, sql), ())
        bind = Bind(message.portal, OWN_NAME, (), (), ()).serialize()
        self._bind_own(statement.plan, guard, bind, undo_hidden)
        return Portal(statement, hidden, message.result_formats)

    def _bind_own(self, plan: Plan, parse: Parse, bind: bytes, undo: Undo) -> None:
        """Queue the Bind of the client's portal to a statement of ours."""
        primary, plan = self._primary, _as_it_is(plan, parse.query)
        primary.send(parse.serialize(), ENDS_PARSE, drop, plan=plan, undo=undo)
        primary.send(bind, ENDS_BIND, primary.pass_on, plan=plan, undo=undo)
        primary.send(
            Close(STATEMENT, OWN_NAME).serialize(),
            ENDS_CLOSE,
            drop,
            undo=lambda _: primary.unclosed.add(OWN_NAME),
        )

    async def _bound(self, name: bytes) -> Portal | None:
        """A portal with a call, if the server still has it under the client's name. SQL may have
        closed it or put another in its place.

        Raises BatchFailedError if no portal has this name.
        """
        portal = self._named.portal(name)
        if portal is None or not portal.is_hidden or portal.server_name in self._certain:
            return portal
        columns: list[bytes] = []

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.ROW_DESCRIPTION:
                columns.extend(field.name for field in RowDescription.parse(body).fields)

        describe = Describe(PORTAL, self._short(name)).serialize()
        self._primary.send(describe, ENDS_DESCRIBE, handler)
        await self._primary.settle()
        if columns == [GUARD_COLUMN]:
            self._certain.add(portal.server_name)
            return portal
        self._close_portal(portal)
        self._named.forget_portal(name)
        return None

    async def _describe(self, body: bytes) -> None:
        message = Describe.parse(body)
        portal: Portal | None = None
        statement: Prepared | None
        if message.kind == PORTAL:
            portal = await self._bound(message.name)
            statement = None if portal is None else portal.statement
        else:
            await self._check_still_there(message.name)
            statement = self._named.statement(message.name)
        handler: ResponseHandler = self._primary.pass_on
        if isinstance(statement, WithCalls):
            formats = () if portal is None else portal.formats
            handler = self._execution.describes(statement, formats)
            name = statement.server_name if portal is None else portal.server_name
            body = message.kind + name + b"\0"
        plan = None if statement is None else statement.plan
        self._primary.send(frame(F.DESCRIBE, body), ENDS_DESCRIBE, handler, plan=plan)
        if isinstance(statement, FunctionResult) and not statement.has_columns:
            await self._primary.settle()
            await self._describe_job(portal, statement)

    async def _describe_job(self, portal: Portal | None, statement: FunctionResult) -> None:
        """Describe a result whose job alone knows the columns."""
        if portal is None:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "the columns of pg_background_result are not known before it is executed",
                hint="Give a column definition list:"
                " SELECT * FROM pg_background_result(...) AS (column type, ...).",
            )
        messages = self._batch.messages
        if self._batch.is_alone(statement.plan):
            following = messages.peek(F.EXECUTE, F.SYNC)
            execute = None if following is None else Execute.parse(following[0])
            if execute and self._named.portal(execute.portal) is portal:
                messages.take(F.EXECUTE, F.SYNC)
                await self._execution.fetch(
                    portal.server_name,
                    portal,
                    statement,
                    execute.max_rows,
                    describe=True,
                    sync=True,
                )
                return
        await self._execution.describe(portal.server_name, portal, statement)

    async def _close(self, body: bytes) -> None:
        message = Close.parse(body)
        undo: Undo | None = None
        if message.kind == STATEMENT:
            old, undo = self._named.closed(message.name)
            self._close_stand_in(old)
        elif message.kind == PORTAL:
            self._close_portal(self._named.portal(message.name))
            self._named.forget_portal(message.name)
        self._primary.send(frame(F.CLOSE, body), ENDS_CLOSE, self._primary.pass_on, undo=undo)

    async def _execute(self, body: bytes) -> None:
        message = Execute.parse(body)
        portal = await self._bound(message.portal)
        if portal is None:
            self._certain.clear()  # it may execute CLOSE
            handler = self._batch.pass_execution
            self._batch.send_execute(message.portal, message.max_rows, handler)
        else:
            await self._execution.execute(portal.server_name, portal, message.max_rows)


def _parameters(message: Parse, statement: Statement) -> int:
    """An upper bound for the parameters of a statement: at most 65535."""
    count = len(message.parameter_types)
    if statement.tokens is not None:
        for token, text in zip(statement.tokens.tokens, statement.tokens.texts, strict=True):
            if token.kind is Kind.PARAMETER:
                count = max(count, int(text[1:6]))
    return min(count, 65535)


def _as_it_is(plan: Plan, sql: bytes) -> Plan:
    """A plan for errors about a text that is sent unchanged."""
    return replace(plan, rewrite=Rewrite(sql, (Piece(0, len(sql)),)))


def _in_other_words(body: bytes, old: Bind, new: Bind) -> bytes:
    """The Bind in this body with other names and result formats. They are at its beginning and end,
    and what is between may be long."""
    start = len(old.portal) + len(old.statement) + 2
    between = memoryview(body)[start : -2 - 2 * len(old.result_formats)]
    names = b"%b\0%b\0" % (new.portal, new.statement)
    return frame(F.BIND, b"".join((names, between, wire.int16s(new.result_formats))))
