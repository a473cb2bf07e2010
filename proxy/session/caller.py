"""The session as the functions see it: their caller, and what they may ask of it.

Invariant: a call is made with the context that was read in its own transaction (`context`), and
whatever it asks of the primary backend goes there within the client's batch.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from protocol.errors import FEATURE_NOT_SUPPORTED, ProtocolViolation, SQLError
from protocol.kinds import B, TransactionStatus
from protocol.messages import DataRow
from proxy.api.calls import Caller, check_privilege
from proxy.api.functions import Needs
from proxy.api.values import decode_argument
from proxy.backends.identity import SYSTEM_ID_QUERY
from proxy.config.gucs import parse_time_ms
from proxy.extension import installed
from proxy.extension.context import CallContext, context_query, parse_context
from proxy.extension.privileges import drop_role_block, privileges_block
from proxy.jobs.context import activity_query
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.jobs.registry import Handle, JobRecord
from proxy.session.client_session import ClientSession
from proxy.session.exchange import Exchange
from proxy.session.prepared import misread
from proxy.sql import encodings
from proxy.statements.plan import Call, FieldOf, Plan

T = TypeVar("T")


class SessionCaller(Caller):
    """Makes calls for a session."""

    def __init__(self, session: ClientSession, primary: Exchange, interrupts: Interrupts) -> None:
        super().__init__(session, interrupts)
        self._session = session
        self._primary = primary
        self._context: CallContext | None = None

    def ask_context(self, plan: Plan, *, first: bool) -> None:
        """Queue the query that reads the context of the next call.

        The settings, the expensive part, are reused if nothing can have changed them: between
        calls that follow each other directly, outside a transaction block. `first`: nothing in
        this batch has executed yet.
        """
        session, relay = self._session, self._session.relay
        wanted = Needs.SETTINGS in plan.needs
        lasting = first and relay.status == TransactionStatus.IDLE
        known = relay.known_settings if lasting else None
        # A supposed name may be invalid, or be older than a change of client_encoding.
        custom = tuple(
            name for name in session.custom_settings if encodings.is_valid(name, session.codec)
        )
        sql = context_query(
            functions=plan.functions,
            server_version=session.server_version,
            roles=session.service.roles.union(job.role_id for job in self.jobs),
            settings=wanted and known is None,
            custom_settings=custom,
        )

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.DATA_ROW:
                self._context = parse_context(DataRow.parse(body).values, custom_settings=custom)
                relay.unreported[b"client_encoding"] = self._context.client_encoding
                relay.unreported[b"TimeZone"] = self._context.time_zone
                if wanted and known is not None:
                    self._context = replace(self._context, settings=known)
                elif wanted and lasting and plan.has_no_side_effects:
                    relay.known_settings = self._context.settings
                timeout = self._context.statement_timeout.decode()
                self._interrupts.start_timer(parse_time_ms(timeout))

        self._primary.ask(sql, handler)
        if session.system_id is None:
            self._primary.ask(SYSTEM_ID_QUERY, self._take_system_id)

    async def _take_system_id(self, kind: int, body: bytes) -> None:
        if kind == B.DATA_ROW:
            [self._session.system_id] = DataRow.parse(body).values

    async def evaluate(
        self,
        call: Call,
        leaves: Sequence[bytes | None],
        others: Mapping[int, Any] = MappingProxyType({}),
    ) -> Any:
        """Make a call, the calls in its arguments first.

        Args:
            call: what is called.
            leaves: the arguments that the server has evaluated.
            others: what the calls in other columns of the row have returned.

        Raises SQLError.
        """
        function = call.function
        self._check(call)
        arguments: dict[str, Any] = {}
        for argument in call.arguments:
            if isinstance(argument.value, Call):
                value = await self.evaluate(argument.value, leaves)
            elif isinstance(argument.value, FieldOf):
                row = others[argument.value.column]
                value = None if row is None else row[argument.value.field]
            else:
                value = decode_argument(argument.parameter.type, leaves[argument.value])
            if value is None and function.strict:
                return None
            arguments[argument.parameter.name] = value
        return await function.run(self, **arguments)

    def _check(self, call: Call) -> None:
        """Raises SQLError if the call is not to be made, as the server would for its own."""
        function, extension = call.function, self.context.extension
        if function.api and function.api != self._session.extension_state.learn_api(extension):
            raise SQLError(FEATURE_NOT_SUPPORTED, "cached plan must not change result type")
        if extension is not None:
            extension.check(function, call.schema)
        elif Needs.PRIMARY not in function.needs:
            # The privileges that the others change or show are the server's to check.
            check_privilege(self, function.name)

    async def ask_api(self, *, apart: bool) -> None:
        """Ask which version of the API this database has. `apart`: before the batch begins."""

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.DATA_ROW:
                version, real = DataRow.parse(body).values
                self._session.extension_state.learn(version, has_real=real == b"t")

        if apart:
            await self._primary.ask_apart(installed.VERSION_QUERY, handler)
        else:
            self._primary.ask(installed.VERSION_QUERY, handler)
            await self._primary.settle()

    def arguments(self, call: Call, text: bytes | None) -> list[bytes | None]:
        """The values that a stand-in has for the arguments of a call. Raises SQLError XX000."""
        try:
            found = encodings.parse_array(text or b"{}", self.context.client_encoding)
        except ProtocolViolation:
            raise misread() from None
        if len(found) != sum(1 for _ in call.leaves()):
            raise misread()
        return found

    # What the functions ask for

    @property
    def context(self) -> CallContext:
        assert self._context is not None
        return self._context

    @property
    def codec(self) -> str:
        return self._session.codec

    async def known_jobs(self) -> Sequence[JobRecord]:
        return await self._for(super().known_jobs())

    async def find(self, handles: Sequence[Handle]) -> list[JobRecord | None]:
        return await self._for(super().find(handles))

    async def launch(
        self, sql: bytes, queue_size: int, *, label: bytes | None = None, keep_rows: bool = True
    ) -> Job:
        launching = asyncio.ensure_future(
            self._session.launch(sql, queue_size, self.context, label=label, keep_rows=keep_rows)
        )
        try:
            return await self._interrupts.for_future(launching)
        except BaseException:
            launching.cancel()
            launching.add_done_callback(self._drop)
            raise

    def _drop(self, launching: asyncio.Future[Job]) -> None:
        """Stop a job whose launch was interrupted, if it came to its end before that took effect:
        the session may be gone, and the job would wait for a reader."""
        if not launching.cancelled() and launching.exception() is None:
            self._session.drop(launching.result())

    async def _for(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the result of the work, which is cancelled if the wait is interrupted."""
        working = asyncio.ensure_future(work)
        try:
            return await self._interrupts.for_future(working)
        finally:
            working.cancel()

    async def cancel_job(self, job: JobRecord) -> None:
        if not job.finished:
            await self._interrupts.for_future(self._session.service.cancel(job))

    async def activity(self, jobs: Sequence[Job]) -> dict[int, tuple[bytes | None, ...]]:
        rows: dict[int, tuple[bytes | None, ...]] = {}

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.DATA_ROW:
                pid, *values = DataRow.parse(body).values
                rows[int(pid or 0)] = tuple(values)

        self._primary.ask(
            activity_query([job.pid for job in jobs], self._session.server_version), handler
        )
        await self._primary.settle()
        return rows

    async def drop_executor_role(self) -> bool:
        return await self._privileges_block(drop_role_block)

    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        return await self._privileges_block(
            functools.partial(privileges_block, verb, role, print_commands=print_commands)
        )

    async def _privileges_block(self, block: Callable[[str], bytes]) -> bool:
        """Run a block that raises a random marker at its end; whether it did."""
        marker = secrets.token_hex(16)
        return await self._primary.ask_marked(block(marker), marker)
