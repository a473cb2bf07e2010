"""The messages of the extended protocol in a batch with a call.

Invariant: the proxy's account of a statement or portal follows the server's. It is changed when the
message is sent, and changed back if the server fails before it has carried that out (`undo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from protocol.errors import FEATURE_NOT_SUPPORTED, SQLError
from protocol.framing import frame
from protocol.kinds import ENDS_BIND, ENDS_CLOSE, ENDS_DESCRIBE, ENDS_PARSE, F
from protocol.messages import Bind, Close, Describe, Execute, Parse
from proxy.session.batch import Batch
from proxy.session.exchange import ResponseHandler
from proxy.session.execution import Execution
from proxy.session.prepared import Command, FunctionResult, Portal, Prepared, WithCalls, prepare
from proxy.session.simple_query import as_comment
from proxy.sql import encodings
from proxy.statements.plan import Statement, Substitute


class ExtendedQuery:
    """Serves the messages of types in `EXTENDED`."""

    def __init__(self, batch: Batch, execution: Execution) -> None:
        self._batch = batch
        self._execution = execution
        self._relay = batch.relay
        self._primary = batch.primary
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
        """Serve Parse; `read`: its text, if the relay has read it."""
        session, statements = self._batch.session, self._relay.statements
        lowered = body.lower()
        session.custom_settings.mentioned(lowered)
        await self._batch.know_settings(body)
        if b"set_config" in lowered:
            self._relay.setters.add(self._relay.key(body.partition(b"\0")[0]))
        [statement] = read or session.reader.read(F.PARSE, body)
        message = Parse.parse(body)
        await self._batch.know_api(statement)
        plan = session.reader.plan(statement)
        key = self._relay.key(message.statement)
        old = statements.pop(key, None)

        def undo(was_read: bool) -> None:
            statements.pop(key, None)
            # The unnamed statement goes with the attempt.
            if old is not None and (key or not was_read):
                statements[key] = old

        parse = frame(F.PARSE, body)
        prepared: Prepared | None = None
        if plan is not None:
            query = plan.rewrite.sql
            if not isinstance(plan, Substitute) or plan.tag is not None:
                query += as_comment(plan.rewrite.unsent)
                prepared = Command(plan) if isinstance(plan, Substitute) else prepare(plan)
                statements[key] = prepared
            parse = replace(message, query=query).serialize()
        self._primary.send(parse, ENDS_PARSE, self._primary.pass_on, plan=plan, undo=undo)
        if prepared is None or isinstance(prepared, Command):
            return
        name = encodings.short_name(message.statement, session.client_encoding)
        describe = Describe(b"S", name).serialize()
        handler = self._execution.describes(prepared)
        self._primary.send(describe, ENDS_DESCRIBE, handler, plan=plan)

    async def _bind(self, body: bytes) -> None:
        self._batch.settings_known = False  # a parameter's type has functions of its own
        message = Bind.parse(body)
        relay, portals = self._relay, self._relay.portals
        key, name = relay.key(message.portal), relay.key(message.statement)
        if name in relay.setters:
            self._batch.session.custom_settings.bound(body)
        statement = relay.statements.get(name)
        formats = message.result_formats
        if statement is not None:
            message = replace(message, result_formats=statement.stand_in_formats(formats))
        if not message.portal:
            relay.forget_portal(b"")
        if statement is None:
            self._primary.send(frame(F.BIND, body), ENDS_BIND, self._primary.pass_on)
            return
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
        key = self._relay.key(message.name)
        portal: Portal | None = None
        statement: Prepared | None
        if message.kind == b"P":
            portal = self._relay.portals.get(key)
            statement = None if portal is None else portal.statement
        else:
            statement = self._relay.statements.get(key)
        handler: ResponseHandler = self._primary.pass_on
        if isinstance(statement, WithCalls):
            formats = () if portal is None else portal.formats
            handler = self._execution.describes(statement, formats)
        plan = None if statement is None else statement.plan
        self._primary.send(frame(F.DESCRIBE, body), ENDS_DESCRIBE, handler, plan=plan)
        if isinstance(statement, FunctionResult) and not statement.has_columns:
            await self._primary.settle()
            await self._describe_job(message.name, portal, statement)

    async def _describe_job(
        self, name: bytes, portal: Portal | None, statement: FunctionResult
    ) -> None:
        """Describe a result whose columns only its job knows."""
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
            if execute and self._relay.portals.get(self._relay.key(execute.portal)) is portal:
                messages.take(F.EXECUTE, F.SYNC)
                await self._execution.fetch(
                    name, portal, statement, execute.max_rows, describe=True, sync=True
                )
                return
        await self._execution.describe(name, portal, statement)

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
            handler = self._batch.pass_execution
            self._batch.send_execute(message.portal, message.max_rows, handler)
        else:
            await self._execution.execute(message.portal, portal, message.max_rows)
