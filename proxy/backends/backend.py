"""A server connection of our own: a side backend.

Invariant: it logs in as the client's role with that role's own credentials, and serves one job.
This file knows how to connect, log in, ask a query and cancel; what a job does with its
connection is said in `jobs`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, TypeVar, cast

from protocol import messages
from protocol.errors import (
    INSUFFICIENT_RESOURCES,
    TOO_MANY_CONNECTIONS,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.framing import limit_before_login
from protocol.kinds import B
from protocol.messages import (
    BackendKeyData,
    Bind,
    DataRow,
    ErrorResponse,
    Execute,
    Flush,
    ParameterStatus,
    Parse,
    Query,
    Sync,
    Terminate,
)
from protocol.startup import CancelRequest, StartupMessage
from proxy.auth.authenticator import Authenticator
from proxy.auth.credentials import Credentials
from proxy.backends.identity import IDENTITY_QUERY, Login, StaleLoginError, still_holds
from proxy.net.descriptors import HINT, OutOfDescriptorsError
from proxy.net.inbox import Inbox

P = TypeVar("P", bound=asyncio.BaseProtocol)
Row = tuple[bytes | None, ...]

# Parse of nothing, and Flush: answered at once, and nothing is done for it.
_TAKE_UP: Final = Parse(b"", b"", ()).serialize() + Flush().serialize()

_MAX_BEFORE_LOGIN: Final = 256 * 1024
"""Bytes of all messages until a backend is ready; a server's settings are a kilobyte or two."""

READ_SIZE = 64 * 1024
"""The most bytes taken from the kernel at once."""

_read_buffer = memoryview(bytearray(READ_SIZE))
"""One for all: what was read is consumed before anything else is read into it."""


class Connect(Protocol):
    """Opens a connection to the server of the session. Raises OSError."""

    async def __call__(self, factory: Callable[[], P]) -> P: ...


class Receiver(Protocol):
    """Who gets what a backend sends."""

    def feed(self, data: memoryview) -> None:
        """Bytes that came in; the view is valid during the call only."""

    def room(self) -> int:
        """How many bytes feed() may be given next; asked when the connection is not paused."""

    def close(self, error: Exception) -> None:
        """The connection ended."""


class _InboxReceiver(Inbox):
    def room(self) -> int:
        return READ_SIZE


class Backend(asyncio.BufferedProtocol):
    """One connection. Made by `open_backend`.

    Attributes:
        pid: of the backend; behind a connection pooler at first a number that the pooler made up.
        is_pooled: whether there is a pooler in between; then a transaction is open for the job.
        ready: whether it has logged in.
        parameters: of its ParameterStatus messages.
        system_id: of its database cluster (`identity`); None if not asked for.
        own_settings: of a side backend, made up for it when it logged in.
        identity: what its login was based on (`identity`); None if not asked for.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.ready = False
        self._is_paused = False
        self.is_pooled = False
        self._key: BackendKeyData | None = None
        self.parameters: dict[bytes, bytes] = {}
        self.own_settings: dict[bytes, bytes] = {}
        self.identity: bytes | None = None
        self.system_id: bytes | None = None
        self.receiver: Receiver | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._inbox = _InboxReceiver(self.transport)
        self.receiver = self._inbox

    def get_buffer(self, sizehint: int) -> memoryview:
        room = self.receiver.room() if self.receiver else READ_SIZE
        return _read_buffer[:room] if room < READ_SIZE else _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.receiver:
            self.receiver.feed(_read_buffer[:nbytes])

    def connection_lost(self, exc: Exception | None) -> None:
        if self.receiver:
            self.receiver.close(exc or ConnectionError("the server closed the connection"))
        self.receiver = None

    # our side

    async def login(self, startup: StartupMessage, credentials: Credentials) -> None:
        """Send the startup packet, answer what the server asks for, wait until it is ready.

        Raises SQLError: the server's own error, or 28000 if we have nothing to log in with;
        ProtocolViolation: it sends more than a server does until then.
        """
        self.transport.write(startup.serialize())
        authenticator = Authenticator(credentials)
        self._inbox.bound(limit_before_login)
        said = 0
        while True:
            kind, body = await self._inbox.next()
            said += len(body)
            if said > _MAX_BEFORE_LOGIN:
                raise ProtocolViolation("the server says too much before the login is done")
            if kind == B.PARAMETER_STATUS:
                self._parameter_status(body)
            elif kind == B.READY_FOR_QUERY:
                self._inbox.bound(None)
                self.ready = True
                return
            elif kind == B.BACKEND_KEY_DATA:
                self._key = BackendKeyData.parse(body)
                self.pid = self._key.pid
            elif kind == B.AUTHENTICATION:
                answer = authenticator.respond(
                    cast(messages.AuthenticationRequest, messages.parse_backend(kind, body))
                )
                if answer is not None:
                    self.transport.write(answer)
            elif kind == B.ERROR_RESPONSE:
                raise ServerError(ErrorResponse.parse(body))

    async def query(self, sql: bytes, *parameters: bytes) -> Row:
        """The last row that a query of ours returns, in text; empty if there is none.

        Parameters, if any, are text, of the types that the server finds for them.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        rows = await self.rows(sql, *parameters)
        return rows[-1] if rows else ()

    async def row(self, sql: bytes, columns: int = 1) -> Row:
        """The same for a query that must return a row of at least `columns` columns.

        Raises ProtocolViolation if it does not.
        """
        return _last(await self.rows(sql), columns)

    async def rows(self, sql: bytes, *parameters: bytes) -> list[Row]:
        """All rows, those of several statements one after the other. Raises ServerError."""
        if parameters:
            self._send(Parse(b"", sql), Bind(b"", b"", parameters=parameters), Execute(b""), Sync())
        else:
            self._send(Query(sql))
        return await self._answer()

    async def remember_identity(self, login: Login, at_first: bytes | None) -> None:
        """Note what the login was based on. `at_first`: what it was right after the login.

        Raises StaleLoginError if a new one would be different already; else as `row` does.
        """
        self._send(Parse(b"", IDENTITY_QUERY), Bind(b"", b""), Execute(b""), Sync())
        user, database, self.identity, *_ = _last(await self._answer(), 3)
        if not (still_holds(at_first, self.identity) and login.is_of(user, database)):
            raise StaleLoginError("the role or the database was changed")

    async def row_as_before(self, sql: bytes) -> Row:
        """The same as `row`, if a new login would still come to what this one did.

        The same round trip finds that out. Nothing else may have been asked since
        `remember_identity`: its query is still the unnamed prepared statement.

        Raises StaleLoginError, after which nothing else may be asked; else as `row` does.
        """
        self._send(Bind(b"", b""), Execute(b""), Sync(), Query(sql))
        try:
            *_, now = _last(await self._answer())
        except ServerError as error:
            if error.is_fatal:
                raise
            raise StaleLoginError(str(error)) from None  # the role is gone
        if not still_holds(self.identity, now):
            raise StaleLoginError("the role or the database was changed")
        return _last(await self._answer())

    def _send(self, *sent: messages.Message) -> None:
        self.transport.write(b"".join(message.serialize() for message in sent))

    async def _answer(self) -> list[Row]:
        """All rows up to ReadyForQuery. Raises ServerError."""
        rows: list[Row] = []
        error: ServerError | None = None
        while True:
            kind, body = await self._inbox.next()
            if kind == B.DATA_ROW:
                rows.append(DataRow.parse(body).values)
            elif kind == B.READY_FOR_QUERY:
                if error:
                    raise error
                return rows
            elif kind == B.PARAMETER_STATUS:
                self._parameter_status(body)
            elif kind == B.ERROR_RESPONSE:
                error = ServerError(ErrorResponse.parse(body))
                if error.is_fatal:
                    raise error

    def _parameter_status(self, body: bytes) -> None:
        status = ParameterStatus.parse(body)
        self.parameters[status.name] = status.value

    def start(self, sql: bytes, receiver: Receiver) -> None:
        """Send a query whose answer somebody else reads.

        The answer begins with a ParseComplete: the server sends it when it takes up the query, so
        from then on the query can be seen in pg_stat_activity, and canceled.
        """
        self.receiver = receiver
        self.transport.write(_TAKE_UP + Query(sql).serialize())

    @property
    def is_alive(self) -> bool:
        """Whether the connection is up."""
        return self.receiver is not None

    def pause_reading(self) -> None:
        """Let what the server sends wait there."""
        self._is_paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._is_paused = False
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def take_a_break(self) -> None:
        """Read on when others had their turn."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._end_break)

    def _end_break(self) -> None:
        if not (self._is_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    def terminate(self) -> None:
        """End the session as a client does."""
        if not self.transport.is_closing():
            self.transport.write(Terminate().serialize())
            self.transport.close()

    def cancel_request(self) -> CancelRequest:
        """What cancels the query that runs here."""
        assert self._key is not None
        return CancelRequest(self._key.pid, self._key.secret_key)


def _last(rows: list[Row], columns: int = 1) -> Row:
    if not rows or len(rows[-1]) < columns:
        raise ProtocolViolation("the server's answer has no row, or too few columns")
    return rows[-1]


def number(text: bytes | None) -> int:
    """An integer in an answer; 0 for NULL. Raises ProtocolViolation."""
    try:
        return int(text or 0)
    except ValueError:
        raise ProtocolViolation("an integer in the server's answer is malformed") from None


async def open_backend(
    connect: Connect, startup: StartupMessage, credentials: Credentials, timeout: float
) -> Backend:
    """A new backend, logged in.

    Raises SQLError: 28000 and 28P01 if it could not log in, else one of class 53, with the
    server's own reason as DETAIL.
    """
    backend: Backend | None = None
    try:
        async with asyncio.timeout(timeout or None):
            backend = await connect(Backend)
            await backend.login(startup, credentials)
            return backend
    except ServerError as error:
        raise no_backend(error.message, error.sqlstate) from None
    except TimeoutError:
        raise no_backend(f"The server did not answer within {timeout:g} seconds.") from None
    except OutOfDescriptorsError as error:
        raise no_backend(f"{error}", hint=HINT) from None
    except (OSError, ProtocolViolation) as error:
        raise no_backend(f"{error}") from None
    finally:
        if backend is not None and not backend.ready:
            backend.transport.abort()


_NO_BACKEND: Final = (
    "Each background worker is a server connection. You may need to wait for others to end, or to"
    " increase max_connections."
)


def no_backend(reason: str, sqlstate: str = "", *, hint: str = _NO_BACKEND) -> SQLError:
    """The error of a launch that got no backend."""
    if sqlstate.startswith("28"):
        return SQLError(
            sqlstate,
            "could not log in to start a background worker",
            detail=reason,
            hint="Check the password that the proxy has for this role (passfile, auth_file).",
        )
    return SQLError(
        sqlstate if sqlstate == TOO_MANY_CONNECTIONS else INSUFFICIENT_RESOURCES,
        "could not start a background worker",
        detail=reason,
        hint=hint,
    )


async def send_cancel(connect: Connect, request: CancelRequest) -> None:
    """Deliver a CancelRequest, and wait until the server has read it (it closes the connection).

    Raises OSError or TimeoutError.
    """
    closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    class Cancel(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def connection_lost(self, exc: Exception | None) -> None:
            if not closed.done():
                closed.set_result(None)

    transport = (await connect(Cancel)).transport
    try:
        transport.write(request.serialize())
        await closed
    finally:
        transport.close()
