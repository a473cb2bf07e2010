"""The session as the caller of the functions.

Invariant: a call uses the context read in its own transaction (`context`), and whatever it asks of
the primary backend is asked within the client's batch.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, TypeVar

from protocol.errors import FEATURE_NOT_SUPPORTED, WARNING, ProtocolViolation, SQLError
from protocol.kinds import B, TransactionStatus
from protocol.messages import DataRow, NoticeResponse
from proxy.api.calls import Caller, check_privilege
from proxy.api.functions import Needs
from proxy.api.values import decode_argument
from proxy.backends.identity import SYSTEM_ID_QUERY
from proxy.config.gucs import LAUNCH_TIMEOUT, parse_time_ms
from proxy.extension.context import CallContext, context_query, parse_context
from proxy.extension.installed import Installed
from proxy.extension.names import Name, meant_query, name_of, names_of, parse_meant
from proxy.extension.privileges import drop_role_block, privileges_block
from proxy.jobs.context import activity_query
from proxy.jobs.history import PastJob
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.jobs.launch import launch_at_commit
from proxy.jobs.launcher import Launcher
from proxy.jobs.registry import Handle, JobRecord
from proxy.jobs.request import LaunchRequest
from proxy.session.client_session import ClientSession
from proxy.session.exchange import Exchange
from proxy.session.extension_state import BARE_QUERY, state_query
from proxy.session.prepared import misread
from proxy.sql import encodings
from proxy.statements.plan import Call, FieldOf, Plan

T = TypeVar("T")

_NOTIFY: Final = b"SELECT pg_catalog.pg_notify($1, $2)"

_TWO_EXTENSIONS: Final = SQLError(
    WARNING,
    "the server has an extension pg_background too, which the proxy does not use",
    detail="Jobs of calls that the client sends are the proxy's, jobs of calls in functions and"
    " views are the server's; neither side knows those of the other.",
    hint='Set extension = "server" in the proxy\'s configuration, or drop the extension.',
    severity="WARNING",
)


class SessionCaller(Caller):
    """Makes calls for a session.

    Attributes:
        may_wait_for_room: whether a launch would wait, as far as the context is known.
    """

    def __init__(self, session: ClientSession, primary: Exchange, interrupts: Interrupts) -> None:
        super().__init__(session, interrupts)
        self._session = session
        self._primary = primary
        self._context: CallContext | None = None
        self._marker: bytes | None = None
        self.may_wait_for_room = False
        # Of the context without settings, and what it asks about.
        self._whole_query: Callable[[], bytes] = bytes
        self._names: Sequence[Name] = ()

    def ask_context(self, plan: Plan, *, first: bool, marker: bytes | None = None) -> None:
        """Queue the query that reads the context of the next call.

        The settings, its expensive part, are reused if nothing can have changed them: between
        consecutive calls outside a transaction block. `first`: nothing in this batch has been
        executed yet. `marker`: of the extension whose types were described.
        """
        session, relay = self._session, self._session.relay
        self._marker = marker
        wanted = Needs.SETTINGS in plan.needs
        lasting = first and relay.status == TransactionStatus.IDLE
        known = relay.known_settings if lasting else None
        # A name that was only guessed may be invalid, or precede a change of client_encoding.
        custom = tuple(
            name for name in session.custom_settings if encodings.is_valid(name, session.codec)
        )
        names = tuple(names_of(plan))
        query = functools.partial(
            context_query,
            names=names,
            closely=session.extension_state.may_mean_other_objects(plan),
            roles=frozenset(session.service.roles.union(job.role_id for job in self.jobs)),
        )
        sql = query(
            has_no_objects=session.extension_state.has_no_objects,
            settings=wanted and known is None,
            custom_settings=custom,
        )
        self._names, self._whole_query = (
            names,
            functools.partial(query, has_no_objects=False, settings=False),
        )

        async def handler(kind: int, body: bytes) -> None:
            if kind == B.DATA_ROW:
                self._context = parse_context(
                    DataRow.parse(body).values, names=names, custom_settings=custom
                )
                session.reported.answered(b"client_encoding", self._context.client_encoding)
                session.reported.answered(b"TimeZone", self._context.time_zone)
                if wanted and known is not None:
                    self._context = replace(self._context, settings=known)
                elif wanted and lasting and plan.has_no_side_effects:
                    relay.known_settings = self._context.settings
                self.may_wait_for_room = wanted and self._has_launch_timeout()
                timeout = self._context.statement_timeout.decode()
                self._interrupts.start_timer(parse_time_ms(timeout), limited=self.may_wait_for_room)

        self._primary.ask(sql, handler)
        if session.system_id is None:
            self._primary.ask(SYSTEM_ID_QUERY, self._take_system_id)

    def _has_launch_timeout(self) -> bool:
        try:
            return self._session.launcher.setting(LAUNCH_TIMEOUT, self.context) > 0
        except SQLError:
            return False  # the launch will report the error

    @property
    def has_whole_context(self) -> bool:
        """Whether the context says what the names mean, if that matters."""
        return self._context is None or self._context.is_whole

    async def complete_context(self) -> None:
        """Ask what the names mean in a database that seemed to have no objects of these names."""
        self._session.extension_state.forget()
        [row] = await self._primary.query(self._whole_query())
        whole = parse_context(row, names=self._names)
        self._context = replace(
            self.context, extension=whole.extension, meant=whole.meant, is_whole=True
        )

    async def _take_system_id(self, kind: int, body: bytes) -> None:
        if kind == B.DATA_ROW:
            [self._session.system_id] = DataRow.parse(body).values

    async def evaluate(
        self,
        call: Call,
        leaves: Sequence[bytes | None],
        others: Mapping[int, Any] = MappingProxyType({}),
    ) -> Any:
        """Make a call, after the calls in its arguments.

        Args:
            call: the call.
            leaves: the arguments, evaluated by the server.
            others: results of the calls in other columns of the row.

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
                value = argument.parameter.null
                if value is None:
                    return None
            arguments[argument.parameter.name] = value
        return await function.run(self, **arguments)

    def _check(self, call: Call) -> None:
        """Raises SQLError if the role may not make the call, as the server would."""
        function, extension = call.function, self.context.extension
        name, meant = name_of(call), self.context.meant
        if name in meant.others or (name in meant.untrusted and not _finds(extension, call)):
            self._session.extension_state.forget()
            raise _not_ours(name, is_trusted=name in meant.others)
        state = self._session.extension_state
        is_other_api = function.api and function.api != state.learn_api(extension)
        is_other = self._marker not in (None, None if extension is None else extension.marker)
        if is_other:
            state.forget()
        if is_other or is_other_api:
            raise SQLError(FEATURE_NOT_SUPPORTED, "cached plan must not change result type")
        if extension is not None:
            extension.check(function, call.schema)
        elif Needs.PRIMARY not in function.needs:
            # For functions that change or show privileges, the server checks.
            check_privilege(self, function.name)

    async def ask_state(self, *, apart: bool) -> None:
        """Ask which extension this database has. `apart`: before the batch begins."""
        [(is_there,)] = await self._primary.query(BARE_QUERY, apart=apart)
        if is_there == b"f":
            self._session.extension_state.learn(None, has_c_extension=False)
            return
        query = state_query(self._session.server_version)
        for version, real, alike, marker, types, speaks, level in await self._primary.query(
            query, apart=apart
        ):
            named = (element.split() for element in self._elements(types))
            self._session.extension_state.learn(
                version,
                has_c_extension=real == b"t",
                alike=self._elements(alike),
                marker=marker,
                types={name: int(oid) for name, oid in named},
                speaks=speaks == b"t",
            )
            self._warn(level or b"")

    def _warn(self, client_min_messages: bytes) -> None:
        """Warn, once in a session, if there are two extensions."""
        session = self._session
        if session.has_been_warned or not session.extension_state.is_split:
            return
        session.has_been_warned = True
        if client_min_messages not in (b"error", b"fatal", b"panic"):
            fields = _TWO_EXTENSIONS.response(session.codec).fields
            session.client.write(NoticeResponse(fields).serialize())

    async def means_others(self, plan: Plan, *, apart: bool) -> bool:
        """Whether the plan has a name that means another object of the database. `apart`: as in
        `ask_state`."""
        names = names_of(plan)
        rows = await self._primary.query(b"SELECT " + meant_query(names), apart=apart)
        return any(parse_meant(names, self._elements(array)).others for (array,) in rows)

    def _elements(self, array: bytes | None) -> list[str]:
        """The elements of a text[] of ASCII words."""
        found = encodings.parse_array(array or b"{}", self._session.client_encoding)
        return [(text or b"").decode("ascii", "replace") for text in found]

    async def arguments(self, call: Call, text: bytes | None) -> list[bytes | None]:
        """The argument values in the stand-in's text. Raises SQLError XX000."""
        found: list[bytes | None] = []
        try:
            for elements in encodings.parse_array_in_turns(
                text or b"{}", self.context.client_encoding
            ):
                if elements is None:
                    await asyncio.sleep(0)
                else:
                    found = elements
        except ProtocolViolation:
            raise misread() from None
        if len(found) != sum(1 for _ in call.leaves()):
            raise misread()
        return found

    # What the functions use

    def may_use_primary(self, plan: Plan) -> bool:
        """Whether a call of the plan may send statements to the primary. The context is known."""
        if plan.needs & (Needs.PRIMARY | Needs.COMMIT):
            return True
        return Needs.SETTINGS in plan.needs and self.launches_at_commit

    @property
    def context(self) -> CallContext:
        assert self._context is not None
        return self._context

    @property
    def codec(self) -> str:
        return self._session.codec

    @property
    def encodings(self) -> Sequence[bytes]:
        return (self._session.encoding,)

    async def known_jobs(self) -> Sequence[JobRecord]:
        return await self._for(super().known_jobs())

    async def past(self, handles: Sequence[Handle] | None = None) -> list[PastJob]:
        return await self._for(super().past(handles))

    @property
    def _launching(self) -> tuple[Launcher, bytes]:
        return self._session.launcher, self._session.client_encoding

    async def find(self, handles: Sequence[Handle]) -> list[JobRecord | None]:
        return await self._for(super().find(handles))

    async def launch_at_commit(self, request: LaunchRequest) -> Job:
        if self._primary.synced:
            # The transaction has ended, and had nothing to commit.
            return await self.launch(request)
        # If this is interrupted while the job is pending, its word never comes.
        launching = launch_at_commit(self._session, request, self.context, *self._launching)
        job, notification = await self._for(launching)
        # As parameters, since others who see the session's queries must not see the word.
        await self._primary.query(_NOTIFY, notification)
        return job

    async def _for(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a result. If the wait is interrupted, the work is cancelled."""
        working = asyncio.ensure_future(work)
        try:
            return await self._interrupts.for_future(working)
        finally:
            working.cancel()

    async def _cancel(self, job: JobRecord) -> bool:
        return await self._interrupts.for_future(self._session.service.cancel(job))

    async def activity(self, jobs: Sequence[Job]) -> dict[int, tuple[bytes | None, ...]]:
        rows = await self._primary.query(activity_query([job.backend_pid for job in jobs]))
        return {int(pid or 0): tuple(values) for pid, *values in rows}

    async def drop_executor_role(self) -> bool:
        return await self._privileges_block(drop_role_block)

    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        return await self._privileges_block(
            functools.partial(privileges_block, verb, role, print_commands=print_commands)
        )

    async def _privileges_block(self, block: Callable[[str], bytes]) -> bool:
        """Run a block that raises a random marker at its end. Returns whether it did."""
        marker = secrets.token_hex(16)
        return await self._primary.ask_marked(block(marker), marker)


def _finds(extension: Installed | None, call: Call) -> bool:
    """Whether the extension's own function has the call's name."""
    return extension is not None and extension.finds(call.schema)


def _not_ours(name: Name, *, is_trusted: bool) -> SQLError:
    """The error for a call planned as ours that means something else, possibly as a trap."""
    own = name.function.name
    kind = "relation" if name.is_view else "function"
    if is_trusted:
        return SQLError(
            FEATURE_NOT_SUPPORTED,
            f"the database now has a {kind} {own} of its own, which this statement means",
            hint="Send the statement again; if it was prepared, prepare it again.",
        )
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        f"{own} may mean a {kind} of a role that this session need not trust",
        detail="It belongs neither to a superuser nor to the database's owner nor to this role,"
        " and is found in the search_path.",
        hint="Write its schema's name if you mean it. Otherwise remove it, or take its schema out"
        " of the search_path.",
    )
