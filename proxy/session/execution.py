"""Executes a portal with a call: the stand-in in the server, then the calls with its rows.

Invariant: Sync is sent ahead of a call only if an error in the call has nothing to undo
(`Batch.is_alone`); otherwise the transaction stays open until the call has returned.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from protocol.errors import FEATURE_NOT_SUPPORTED, QUERY_CANCELED, ProtocolViolation, SQLError
from protocol.kinds import ENDS_DESCRIBE, PORTAL, B, F
from protocol.messages import (
    CommandComplete,
    DataRow,
    Describe,
    PortalSuspended,
    RowDescription,
)
from protocol.values import NoBinaryForm
from proxy.api.functions import TEXT, Column, Needs, Type
from proxy.jobs.job import Job
from proxy.session.batch import Batch
from proxy.session.exchange import FLUSH, SYNC_AHEAD, ResponseHandler, drop
from proxy.session.fetch import Fetch, text_field
from proxy.session.prepared import (
    FunctionResult,
    Portal,
    RowCalls,
    WithCalls,
    as_defined,
    format_of,
    misread,
)
from proxy.session.results import Delivery, Result, Table, encode, with_formats
from proxy.session.visible_wait import VisibleWait
from proxy.statements.plan import ScalarPlan

_MAX_ROWS_KEPT: Final = 1000
"""Up to this many rows, calls are made after the server's whole answer; beyond, as rows come."""


class Execution:
    """Executes the portals of a batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._primary = batch.primary

    async def execute(
        self, name: bytes, portal: Portal, max_rows: int, *, may_sync: bool = True
    ) -> None:
        """Execute a portal, and send its rows with the results of the calls.

        `may_sync`: the batch may end here.
        """
        match portal.statement:
            case RowCalls() as statement:
                await self._row_calls(name, portal, statement, max_rows, may_sync=may_sync)
            case FunctionResult() as statement:
                sync = may_sync and portal.result is None and self._ends_batch(portal, statement)
                await self.fetch(name, portal, statement, max_rows, sync=sync)
            case command:
                plan = command.plan
                handler = self._batch.pass_as(plan, command)
                self._batch.send_execute(name, max_rows, handler, plan=plan)

    def _ends_batch(self, portal: Portal, statement: WithCalls) -> bool:
        """Whether Sync is due and may go with the call. The client's own Sync is then consumed."""
        if not self._batch.is_alone(statement.plan):
            return False
        return portal.in_query or self._batch.messages.take(F.SYNC)

    def describes(
        self, statement: WithCalls, formats: Sequence[int] | None = None
    ) -> ResponseHandler:
        """Returns a handler that notes the server's description of a stand-in.

        `formats`: the result formats, if the client is to get the description of its statement.
        """

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.PARAMETER_DESCRIPTION and formats is not None:
                await self._primary.pass_on(kind, body)
            elif kind == B.ROW_DESCRIPTION:
                statement.described(RowDescription.parse(body).fields)
                if formats is not None and statement.has_columns:
                    fields = with_formats(statement.client_fields(), formats)
                    self._primary.hold(RowDescription(fields).serialize())

        return handler

    # Calls with each row

    async def _row_calls(
        self, name: bytes, portal: Portal, statement: RowCalls, max_rows: int, *, may_sync: bool
    ) -> None:
        batch, plan = self._batch, statement.plan
        needs = plan.needs
        kept: list[tuple[int, bytes]] = []
        may_set = not plan.has_no_side_effects
        streams = False

        def waits() -> bool:
            """Whether calls are made after the server's answer, so that it waits with them."""
            return Needs.TIME in needs or batch.caller.may_wait_for_room

        def must_keep(kind: int, body: bytes) -> bool:
            """Whether a message must wait until the server has answered all."""
            return (
                bool(kept)  # messages stay in their order
                or waits()  # the calls wait, and the server with them
                or not batch.caller.has_whole_context  # the server must tell what the names mean
                or batch.caller.may_use_primary(plan)  # the calls have requests of their own
                # The arguments' encoding must be checked first.
                or (may_set and _has_other_letters(plan, kind, body))
            )

        async def handler(kind: int, body: bytes) -> None:
            nonlocal streams
            if streams or not must_keep(kind, body):
                await self._row(portal, statement, kind, body)
                return
            kept.append((kind, body))
            if (
                len(kept) > _MAX_ROWS_KEPT
                and not (may_set or batch.caller.may_use_primary(plan))
                and batch.caller.has_whole_context
            ):
                streams = True
                await self._rows(portal, statement, kept)

        sync = may_sync and self._ends_batch(portal, statement)
        batch.caller.ask_context(plan, first=not batch.executed, marker=statement.marker)
        batch.send_execute(name, max_rows, handler, plan=plan, offset=portal.offset)
        if portal.in_query:
            batch.close_unnamed()
        with batch.interrupts.calling(limited=Needs.TIME in needs):
            await self._primary.settle(SYNC_AHEAD if sync else FLUSH)
            await self._complete_context(portal)
            if kept and may_set:
                await self._check_encoding()
            if waits():
                batch.interrupts.wait_in_server(self._visible_wait(statement))
            await self._rows(portal, statement, kept)

    def _visible_wait(self, statement: WithCalls) -> VisibleWait:
        text = statement.plan.rewrite.original
        return VisibleWait(self._primary, text, self._batch.session.codec)

    async def _rows(
        self, portal: Portal, statement: RowCalls, kept: list[tuple[int, bytes]]
    ) -> None:
        for kind, body in kept:
            await self._row(portal, statement, kind, body)
        kept.clear()

    async def _check_encoding(self) -> None:
        """Raises SQLError if a stand-in has changed the encoding, perhaps between its rows."""
        before = self._batch.caller.context.client_encoding
        await self._primary.ask_settings(b"client_encoding")
        if self._batch.session.client_encoding != before:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "a statement with a pg_background call must not change client_encoding",
                hint="Change it in a statement before.",
            )

    async def _row(self, portal: Portal, statement: RowCalls, kind: int, body: bytes) -> None:
        """Make the calls of a row, and send it with their results; pass on other messages."""
        if kind != B.DATA_ROW:
            await self._primary.pass_on(kind, body)
            return
        self._batch.interrupts.check_for_interrupts()
        caller = self._batch.caller
        values = list(DataRow.parse(body).values)
        if len(values) != len(statement.fields):
            raise misread()
        results: dict[int, Any] = {}
        for column in statement.plan.columns:
            place = column.index % len(values)
            results[place] = await caller.evaluate(
                column.call, await caller.arguments(column.call, values[place]), results
            )
        types = statement.types
        row: list[bytes | None] = []
        for number, output in enumerate(statement.outputs):
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
            return encode(value, type, self._batch.session.zone, binary=binary)
        except (NoBinaryForm, ProtocolViolation):
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                f"binary format is not available for type {type.name}",
                hint="Ask for results in text format.",
            ) from None

    # Rows of a function

    async def fetch(
        self,
        name: bytes,
        portal: Portal,
        statement: FunctionResult,
        max_rows: int,
        *,
        describe: bool = False,
        sync: bool = False,
    ) -> None:
        """Execute a portal whose rows come from a function or a job.

        `describe`: the client has asked for the columns too. `sync`: send Sync along.
        """
        async with self._result(name, portal, statement, sync=sync, redescribe=describe) as result:
            if describe or (portal.in_query and not statement.has_columns):
                self._describe(statement, result, portal)
            sent = await result.send(max_rows)
            if max_rows and sent == max_rows:
                await self._primary.write(PortalSuspended().serialize())
            else:
                await self._primary.write(CommandComplete(b"SELECT %d" % sent).serialize())

    async def describe(self, name: bytes, portal: Portal, statement: FunctionResult) -> None:
        """Send the columns of a portal whose job alone knows them."""
        async with self._result(name, portal, statement, redescribe=True) as result:
            self._describe(statement, result, portal)

    def _describe(self, statement: FunctionResult, result: Result, portal: Portal) -> None:
        if not portal.in_query:
            statement.described_columns = result.fields
        self._primary.hold(RowDescription(result.fields).serialize())

    @contextlib.asynccontextmanager
    async def _result(
        self,
        name: bytes,
        portal: Portal,
        statement: FunctionResult,
        *,
        sync: bool = False,
        redescribe: bool = False,
    ) -> AsyncIterator[Result]:
        """The result of a portal, started if it was not yet, its columns known and checked."""
        batch, plan = self._batch, statement.plan
        batch.caller.ask_context(plan, first=not batch.executed, marker=statement.marker)
        rows: list[tuple[bytes | None, ...]] = []
        if portal.result is None:

            async def handler(kind: int, body: bytes) -> None:
                if kind == B.DATA_ROW:
                    rows.append(DataRow.parse(body).values)

            batch.send_execute(name, 0, handler, plan=plan, offset=portal.offset)
        else:
            # It may be gone with a savepoint; the server knows.
            self._primary.send(Describe(PORTAL, name).serialize(), ENDS_DESCRIBE, drop)
        if portal.in_query:
            batch.close_unnamed()
        with batch.interrupts.calling(limited=Needs.TIME in plan.needs):
            await self._primary.settle(SYNC_AHEAD if sync else FLUSH)
            await self._complete_context(portal)
            batch.interrupts.wait_in_server(self._visible_wait(statement))
            try:
                if portal.result is None:
                    if [len(row) for row in rows] != [len(statement.fields)]:
                        raise misread()
                    portal.result = await self._call(
                        portal, statement, rows[0], redescribe=redescribe
                    )
                portal.result.delivery = Delivery(
                    self._primary.write,
                    batch.caller.wait_for,
                    functools.partial(self._ask, portal),
                    batch.session.encoding,
                    batch.session.server_encoding,
                )
                await portal.result.describe()
                yield portal.result
            except BaseException as error:
                portal.close()
                if portal.job is not None and _is_interrupt(error):
                    self._interrupted(portal.job)
                raise
            finally:
                if portal.job is not None and portal.result is not None and portal.result.finished:
                    batch.session.jobs.remove(portal.job)

    def _interrupted(self, job: Job) -> None:
        """The fetch was interrupted: cancel the job if nothing else leads to it."""
        if not (job.has_handle or job.finished):
            self._batch.session.drop(job)

    async def _ask(
        self, portal: Portal, sql: bytes, parameters: Sequence[bytes], formats: Sequence[int]
    ) -> Sequence[Sequence[bytes | None]]:
        """A `conversion.Ask`. If Sync went ahead, this begins a second transaction, which the
        client's Sync ends: the first had nothing to lose."""
        await self._reopen(portal)
        interrupts = self._batch.interrupts
        interrupts.server_done = False  # a cancel request must now reach the server
        try:
            return await self._primary.query(sql, parameters, formats)
        finally:
            interrupts.server_done = True

    async def _reopen(self, portal: Portal) -> None:
        if await self._primary.reopen() and not portal.in_query:
            self._batch.messages.put_back(F.SYNC, b"")

    async def _complete_context(self, portal: Portal) -> None:
        if not self._batch.caller.has_whole_context:
            await self._reopen(portal)
            await self._batch.caller.complete_context()

    async def _call(
        self,
        portal: Portal,
        statement: FunctionResult,
        row: Sequence[bytes | None],
        *,
        redescribe: bool,
    ) -> Result:
        """Call the function in FROM. `row`: of the stand-in."""
        plan, caller = statement.plan, self._batch.caller
        function, arguments = plan.call.function, row[-1]
        if not (plan.has_no_side_effects or (arguments or b"").isascii()):
            await self._check_encoding()
        defined = statement.defined(row)
        value = await caller.evaluate(plan.call, await caller.arguments(plan.call, arguments))
        if isinstance(value, Job):
            described_columns = () if redescribe else statement.described_columns
            if statement.has_columns:
                described_columns = statement.client_fields()
            return Fetch(
                value,
                plan,
                defined=defined,
                described_columns=described_columns,
                formats=portal.formats,
            )
        if function.returns_set:
            rows = value or []
        else:
            rows = [value or (None,) * len(statement.columns)]
        columns = statement.columns
        if not columns:
            # A NULL pid gives no rows, of any columns.
            fields = defined or (text_field(),)
            columns = [
                Column(field.name.decode("utf-8", "surrogateescape"), TEXT) for field in fields
            ]
        elif defined:
            columns = as_defined(columns, defined)
        return Table(
            rows,
            columns,
            plan.outputs,
            portal.formats,
            zone=self._batch.session.zone,
        )


def _has_other_letters(plan: ScalarPlan, kind: int, body: bytes) -> bool:
    """Whether the arguments in a row are not all ASCII, so that their encoding matters."""
    if kind != B.DATA_ROW or body.isascii():
        return False
    values = DataRow.parse(body).values
    return not all((values[column.index % len(values)] or b"").isascii() for column in plan.columns)


def _is_interrupt(error: BaseException) -> bool:
    """Whether this is an interrupt (cancel, timeout, disconnect) rather than an error."""
    return not isinstance(error, SQLError) or error.sqlstate == QUERY_CANCELED
