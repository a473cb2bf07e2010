"""Serves a Query with a call, statement by statement.

Invariant: its statements are one implicit transaction, as in the server. Each goes by Parse, Bind,
Describe and Execute, so that a call can precede the next statement; one Sync ends all.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.errors import FEATURE_NOT_SUPPORTED, SQLError
from protocol.kinds import ENDS_BIND, ENDS_DESCRIBE, ENDS_EXECUTE, ENDS_PARSE, PORTAL, B
from protocol.messages import Bind, Describe, Parse, Query
from proxy.session.batch import Batch
from proxy.session.exchange import SYNC_MESSAGE, ResponseHandler, drop
from proxy.session.execution import Execution
from proxy.session.prepared import Portal, prepare
from proxy.sql.lexer import READING
from proxy.statements.plan import Plan, Statement, Substitute, joined
from proxy.statements.reading import Reading, depends_on_settings


class SimpleQuery:
    """Serves Query."""

    def __init__(self, batch: Batch, execution: Execution) -> None:
        self._batch = batch
        self._execution = execution
        self._primary = batch.primary

    async def serve(self, body: bytes, statements: Sequence[Statement]) -> None:
        """Serve a Query that has a call, or a statement to be changed."""
        session, relay = self._batch.session, self._batch.relay
        sql = body.removesuffix(b"\0")
        session.named.forget_unnamed()
        for statement in statements[:1]:
            await self._batch.know_names(statement, apart=not relay.batch)
        await self._batch.know_view(statements, apart=not relay.batch)
        plans = [session.reader.plan(statement) for statement in statements]
        if all(plan is None or isinstance(plan, Substitute) for plan in plans):
            await self._substitutes(sql, statements, plans)
            return
        reading = session.reading
        texts = [statement.text for statement in statements]
        offset = end = 0
        for number, statement in enumerate(statements):
            if number:
                await self._check_settings(reading, texts[number:])
            offset += len(sql[end : statement.offset].decode(session.codec, "replace"))
            end = statement.offset
            comment = _rest_as_comment(sql, statement) if number == 0 else b""
            is_last = number == len(statements) - 1
            await self._statement(statement, offset, is_last=is_last, comment=comment)
        if b"" in self._primary.unclosed:
            self._batch.close_unnamed()
            await self._primary.settle(SYNC_MESSAGE)

    async def _check_settings(self, before: Reading, texts: Sequence[bytes]) -> None:
        """Raises SQLError if, because of earlier statements, the server would read the next ones
        differently from how it has read the Query."""
        if not any(map(depends_on_settings, texts)):
            return
        await self._primary.ask_settings(*READING)
        now = self._batch.session.reading
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
        self, sql: bytes, statements: Sequence[Statement], plans: Sequence[Plan | Substitute | None]
    ) -> None:
        """Serve a Query without calls: sent as one, with some of its statements replaced."""
        self._batch.relay.known_settings = None
        pairs = zip(statements, plans, strict=True)
        whole = joined(sql, [(s.offset, plan) for s, plan in pairs if plan is not None])
        message = Query(whole.rewrite.sql).serialize()
        for plan in plans:
            handler = self._batch.pass_as(plan)
            is_block = isinstance(plan, Substitute) and plan.tag is not None
            self._primary.send(message, ENDS_EXECUTE, handler, plan=whole, is_block=is_block)
            message = b""
        self._primary.synced = True  # a Query needs no Sync
        await self._primary.settle()

    async def _statement(
        self, statement: Statement, offset: int, *, is_last: bool, comment: bytes = b""
    ) -> None:
        """Serve one statement, `offset` characters into the Query. `comment`: sent behind it."""
        await self._batch.know_names(statement)
        text, plan = statement.text, self._batch.session.reader.plan(statement)
        if plan is not None:
            text = plan.rewrite.sql
            text += as_comment(plan.rewrite.unsent)
        self._primary.unclosed.add(b"")

        def send(message: Parse | Bind | Describe, ends: bytes, handler: ResponseHandler) -> None:
            self._primary.send(message.serialize(), ends, handler, plan=plan, offset=offset)

        send(Parse(b"", text + comment, ()), ENDS_PARSE, drop)
        send(Bind(b"", b"", (), (), ()), ENDS_BIND, drop)
        describe = Describe(PORTAL, b"")
        if plan is None or isinstance(plan, Substitute):
            send(describe, ENDS_DESCRIBE, self._pass_columns)
            # Nothing may be sent before its answer: it may be COPY FROM STDIN.
            handler = self._batch.pass_as(plan)
            self._batch.send_execute(b"", 0, handler, plan=plan, offset=offset)
            await self._primary.settle()
            return
        prepared = prepare(plan, self._batch.session.extension_state.composites)
        send(describe, ENDS_DESCRIBE, self._execution.describes(prepared, ()))
        portal = Portal(prepared, offset=offset, in_query=True)
        await self._execution.execute(b"", portal, 0, may_sync=is_last)

    async def _pass_columns(self, kind: int, body: bytes) -> None:
        """Pass on the answer to Describe, except NoData, which no Query is answered with."""
        if kind == B.ROW_DESCRIPTION:
            await self._primary.pass_on(kind, body)


def _rest_as_comment(sql: bytes, first: Statement) -> bytes:
    """What surrounds the first statement of a Query, as a comment, so that the server checks the
    encoding of the whole; empty if it is ASCII."""
    return as_comment(sql[: first.offset] + b" " + sql[first.offset + len(first.text) :])


def as_comment(text: bytes) -> bytes:
    """A text as a comment, of which the server checks only the encoding."""
    return b"" if text.isascii() else b" --" + text.replace(b"\r", b" ").replace(b"\n", b" ")
