"""The protocol, simple and extended, with one client of the console.

Invariant: a client's cost is bounded. Its messages have at most `LONGEST` bytes and are served one
by one, `_RATE` commands a second for each user; rows are written as fast as they are read, and a
client that reads nothing for a minute is disconnected. Transactions of drivers have no effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol import values
from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    INVALID_PARAMETER_VALUE,
    PROGRAM_LIMIT_EXCEEDED,
    PROTOCOL_VIOLATION,
    WARNING,
    ProtocolViolation,
    SQLError,
)
from protocol.kinds import STATEMENT, F, TransactionStatus
from protocol.messages import (
    Bind,
    BindComplete,
    Close,
    CloseComplete,
    CommandComplete,
    DataRow,
    Describe,
    EmptyQueryResponse,
    Execute,
    Field,
    NoData,
    NoticeResponse,
    ParameterDescription,
    Parse,
    ParseComplete,
    PortalSuspended,
    Query,
    ReadyForQuery,
    RowDescription,
)
from protocol.values.oids import type_size
from proxy.auth.rate_limit import RateLimiter
from proxy.console.actions import ConsoleActions
from proxy.console.commands import USAGE, Command, parse, parse_one
from proxy.console.tables import Columns, Row, as_text
from proxy.log import Event, logger
from proxy.net.connection import Connection
from proxy.net.inbox import Inbox
from proxy.runtime import Runtime

LONGEST: Final = 16 * 1024
"""Bytes of a client's message."""

_MAX_STATEMENTS: Final = 256
_MAX_PORTALS: Final = 4
"""Limits of a client's prepared statements, and of its portals, which may hold all jobs' rows."""

_TIMEOUT: Final = 60.0
"""Seconds for a client to read something."""

_BURST: Final = 50
_RATE: Final = 10.0
"""Commands of one user in a process: at once, and per second."""

_PIECE: Final = 64 * 1024
"""Bytes of rows in one write."""

_YIELD_AFTER: Final = 50
"""Messages or rows before others get a turn."""

_NO_TRANSACTION: Final = "25P02"
_UNDEFINED_STATEMENT: Final = "26000"
_UNDEFINED_CURSOR: Final = "34000"

_rate_limiter: Final = RateLimiter(_BURST, _RATE, max_waiting=float("inf"))


class ConsoleUser:
    """A client's identity in the console.

    Args:
        name: as which it has logged in.
        runtime: has the lists; a reload replaces it.
        is_own: whether it is the operating system's user that the proxy runs as.
    """

    def __init__(self, name: str, runtime: Callable[[], Runtime], *, is_own: bool) -> None:
        self.name = name
        self._runtime = runtime
        self._is_own = is_own

    @property
    def is_admin(self) -> bool:
        """Whether it may change things."""
        config = self._runtime().config
        if self.name in config.admin_users:
            return True
        return self._is_own and self.name not in config.stats_users

    @property
    def may_look(self) -> bool:
        """Whether it may do anything."""
        return self.is_admin or self.name in self._runtime().config.stats_users


@dataclass(slots=True)
class _Portal:
    """A bound command.

    Attributes:
        formats: of the columns.
        rows: not sent yet, once executed.
    """

    command: Command | None
    formats: list[int] = field(default_factory=list)
    rows: list[Row] | None = None


class Conversation:
    """The exchange with one client.

    Args:
        client: its connection.
        inbox: its messages.
        user: who it is.
        actions: carry out its commands.
    """

    def __init__(
        self, client: Connection, inbox: Inbox, user: ConsoleUser, actions: ConsoleActions
    ) -> None:
        self._client = client
        self._inbox = inbox
        self._user = user
        self._actions = actions
        self._status: int = TransactionStatus.IDLE
        self._statements: dict[bytes, Command | None] = {}
        self._portals: dict[bytes, _Portal] = {}

    async def run(self) -> None:
        """Serve the client until it leaves.

        Raises ProtocolViolation, ConnectionError; SQLError: it is no longer allowed in.
        """
        self._ready()
        skips = False
        count = 0
        while True:
            kind, body = await self._inbox.next()
            count += 1
            if count % _YIELD_AFTER == 0:
                await asyncio.sleep(0)
            if kind == F.TERMINATE:
                return
            if skips and kind != F.SYNC:
                continue
            try:
                await self._serve(kind, body)
            except SQLError as error:
                if error.is_fatal:
                    raise
                if self._status == TransactionStatus.IN_BLOCK:
                    self._status = TransactionStatus.FAILED
                await self._send(error.response().serialize())
                skips = kind != F.QUERY
            if kind == F.SYNC:
                skips = False
                if self._status != TransactionStatus.IN_BLOCK:
                    self._portals.clear()
            if kind in (F.QUERY, F.SYNC):
                self._ready()

    async def _serve(self, kind: int, body: bytes) -> None:
        match kind:
            case F.QUERY:
                await self._query(Query.parse(body).query)
            case F.PARSE:
                await self._parse(Parse.parse(body))
            case F.BIND:
                await self._bind(Bind.parse(body))
            case F.DESCRIBE:
                await self._describe(Describe.parse(body))
            case F.EXECUTE:
                await self._execute(Execute.parse(body))
            case F.CLOSE:
                message = Close.parse(body)
                if message.kind == STATEMENT:
                    self._statements.pop(message.name, None)
                else:
                    self._portals.pop(message.name, None)
                await self._send(CloseComplete().serialize())
            case F.SYNC | F.FLUSH | F.COPY_DATA | F.COPY_DONE | F.COPY_FAIL:
                pass
            case F.FUNCTION_CALL:
                raise SQLError(FEATURE_NOT_SUPPORTED, "the console has no functions")
            case _:
                raise ProtocolViolation(f"invalid frontend message type {kind}")

    def _ready(self) -> None:
        self._client.write(ReadyForQuery(bytes([self._status])).serialize())

    async def _send(self, data: bytes) -> None:
        """Raises ConnectionError if the client reads nothing."""
        self._client.write(data)
        if (full := self._client.full) is not None:
            done, _ = await asyncio.wait([full], timeout=_TIMEOUT)
            if not done:
                self._client.abort()
                raise ConnectionError("a client of the console does not read")

    # The simple protocol

    async def _query(self, sql: bytes) -> None:
        commands = parse(sql)
        if not commands:
            await self._send(EmptyQueryResponse().serialize())
        for command in commands:
            rows = await self._carry_out(command)
            if (columns := command.columns) is not None:
                formats = [0] * len(columns)
                await self._send(_description(columns, formats))
                await self._send_rows(rows, columns, formats)
            await self._complete(command)

    async def _complete(self, command: Command) -> None:
        await self._send(CommandComplete(command.tag.encode()).serialize())

    async def _send_rows(
        self, rows: Iterable[Row], columns: Columns, formats: Sequence[int]
    ) -> None:
        piece = bytearray()
        for count, data in enumerate(_encoded(rows, columns, formats), start=1):
            piece += data
            if len(piece) > _PIECE:
                await self._send(bytes(piece))
                piece.clear()
            if count % _YIELD_AFTER == 0:
                await asyncio.sleep(0)
        await self._send(bytes(piece))

    # The extended protocol

    async def _parse(self, message: Parse) -> None:
        if message.statement in self._statements and message.statement:
            raise SQLError(
                "42P05", f'prepared statement "{_text(message.statement)}" already exists'
            )
        if len(self._statements) >= _MAX_STATEMENTS and message.statement not in self._statements:
            raise SQLError(PROGRAM_LIMIT_EXCEEDED, "too many prepared statements")
        self._statements[message.statement] = parse_one(message.query)
        await self._send(ParseComplete().serialize())

    async def _bind(self, message: Bind) -> None:
        command = self._statement(message.statement)
        if message.parameters:
            raise SQLError(
                PROTOCOL_VIOLATION,
                f"bind message supplies {len(message.parameters)} parameters, but prepared"
                f' statement "{_text(message.statement)}" requires 0',
            )
        columns = command.columns if command is not None else None
        formats = _formats(message.result_formats, len(columns or ()))
        if len(self._portals) >= _MAX_PORTALS and message.portal not in self._portals:
            raise SQLError(PROGRAM_LIMIT_EXCEEDED, "too many portals")
        self._portals[message.portal] = _Portal(command, formats)
        await self._send(BindComplete().serialize())

    async def _describe(self, message: Describe) -> None:
        if message.kind == STATEMENT:
            command = self._statement(message.name)
            await self._send(ParameterDescription(()).serialize())
            formats: list[int] | None = None
        else:
            portal = self._portal(message.name)
            command, formats = portal.command, portal.formats
        columns = command.columns if command is not None else None
        if columns is None:
            await self._send(NoData().serialize())
        else:
            await self._send(_description(columns, formats or [0] * len(columns)))

    async def _execute(self, message: Execute) -> None:
        portal = self._portal(message.portal)
        command = portal.command
        if command is None:
            await self._send(EmptyQueryResponse().serialize())
            return
        if portal.rows is None:
            portal.rows = await self._carry_out(command)
        if (columns := command.columns) is not None:
            size = message.max_rows if message.max_rows > 0 else len(portal.rows)
            now, portal.rows = portal.rows[:size], portal.rows[size:]
            await self._send_rows(now, columns, portal.formats)
            if portal.rows:
                await self._send(PortalSuspended().serialize())
                return
        await self._complete(command)

    def _statement(self, name: bytes) -> Command | None:
        """Raises SQLError."""
        if name in self._statements:
            return self._statements[name]
        raise SQLError(
            _UNDEFINED_STATEMENT,
            f'prepared statement "{_text(name)}" does not exist'
            if name
            else "unnamed prepared statement does not exist",
        )

    def _portal(self, name: bytes) -> _Portal:
        """Raises SQLError."""
        if name in self._portals:
            return self._portals[name]
        raise SQLError(_UNDEFINED_CURSOR, f'portal "{_text(name)}" does not exist')

    # Carrying out commands

    async def _carry_out(self, command: Command) -> list[Row]:
        """Carry out a command. Returns its rows, if any. Raises SQLError."""
        self._check(command)
        if command.status is not None:
            self._status = command.status
            return []
        if command.is_harmless and command.tag != "SHOW":
            return []
        delay = _rate_limiter.take(self._user.name, asyncio.get_running_loop().time())
        if delay:
            await asyncio.sleep(delay)
        if command.tag == "SHOW":
            return await self._show(command.argument)
        said = f"{command.tag} {command.argument}".rstrip()
        logger.info(Event("console command", {"user": self._user.name, "command": said}))
        match command.tag:
            case "CANCEL":
                await self._actions.cancel(_number(command))
            case "KILL":
                await self._actions.kill(command.argument)
            case "DRAIN":
                await self._actions.drain(_number(command))
            case "RELOAD":
                for name in await self._actions.reload():
                    await self._notice(f"{name} cannot be changed without restarting the proxy")
            case "SHUTDOWN":
                await self._actions.shut_down()
        return []

    def _check(self, command: Command) -> None:
        """Raises SQLError unless the user may carry out the command now."""
        ends = command.status == TransactionStatus.IDLE
        if self._status == TransactionStatus.FAILED and not ends:
            raise SQLError(
                _NO_TRANSACTION,
                "current transaction is aborted, commands ignored until end of transaction block",
            )
        if not self._user.may_look:
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                f'user "{self._user.name}" may not use the console any more',
                severity="FATAL",
            )
        if not (command.is_harmless or self._user.is_admin):
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                "admin access needed",
                detail=f'User "{self._user.name}" is in stats_users, and may SHOW only.',
                hint="Log in as one of admin_users.",
            )

    async def _show(self, name: str) -> list[Row]:
        if name == "help":
            usage = SQLError("00000", "Console usage", detail="\n" + "\n".join(USAGE))
            usage.severity = "NOTICE"
            await self._send(NoticeResponse(usage.response().fields).serialize())
            return []
        rows, unanswered = await self._actions.show(name)
        if unanswered:
            await self._notice(
                f"SHOW {name.upper()} is incomplete",
                f"{unanswered} of the proxy's processes did not answer in time.",
            )
        return rows

    async def _notice(self, message: str, detail: str | None = None) -> None:
        warning = SQLError(WARNING, message, detail=detail, severity="WARNING")
        await self._send(NoticeResponse(warning.response().fields).serialize())


def _number(command: Command) -> int:
    """Raises SQLError."""
    if not (command.argument.isascii() and command.argument.isdecimal()):
        raise SQLError(
            INVALID_PARAMETER_VALUE, f'{command.tag} takes a number, not "{command.argument[:60]}"'
        )
    return int(command.argument[:20])


def _formats(given: Sequence[int], count: int) -> list[int]:
    """A format for each column. Raises SQLError."""
    if any(code not in (0, 1) for code in given):
        raise SQLError(INVALID_PARAMETER_VALUE, f"unsupported format code: {max(given)}")
    if len(given) <= 1:
        return list(given or (0,)) * count
    if len(given) != count:
        raise SQLError(
            PROTOCOL_VIOLATION,
            f"bind message has {len(given)} result formats but query has {count} columns",
        )
    return list(given)


def _description(columns: Columns, formats: Sequence[int]) -> bytes:
    fields = [
        Field(name.encode(), 0, 0, oid, type_size(oid), -1, code)
        for (name, oid), code in zip(columns.items(), formats, strict=True)
    ]
    return RowDescription(tuple(fields)).serialize()


def _encoded(rows: Iterable[Row], columns: Columns, formats: Sequence[int]) -> Iterator[bytes]:
    kinds = list(zip(columns.values(), formats, strict=True))
    for row in rows:
        cells: list[bytes | None] = []
        for value, (oid, code) in zip(row, kinds, strict=True):
            text = as_text(value)
            cells.append(text if text is None or code == 0 else values.to_binary(oid, text))
        yield DataRow(tuple(cells)).serialize()


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
