"""A server connection of our own: a side backend.

Invariant: it logs in as the client's role with that role's credentials, and serves one job at a
time. This file connects, logs in, queries and cancels; `jobs` says what a job does with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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
    ParameterStatus,
    Parse,
    Query,
    Sync,
    Terminate,
)
from protocol.startup import CancelRequest, StartupMessage
from proxy.auth.authenticator import Authenticator
from proxy.auth.credentials import Credentials
from proxy.backends.identity import Login, StaleLoginError, check_query
from proxy.backends.session_setup import (
    Opening,
    Receiver,
    Row,
    SessionSetup,
    alone,
    in_front_of_query,
)
from proxy.net.descriptors import HINT, OutOfDescriptorsError
from proxy.net.inbox import Inbox
from proxy.reasons import explain
from proxy.stats import counters

P = TypeVar("P", bound=asyncio.BaseProtocol)
_MAX_BEFORE_LOGIN: Final = 256 * 1024
"""Bytes received until a backend is ready; a server sends a kilobyte or two of settings."""

READ_SIZE = 64 * 1024
"""Bytes read from the kernel at once, at most."""

_read_buffer = memoryview(bytearray(READ_SIZE))
"""Shared: input is consumed before the next read."""


class NoRoomError(SQLError):
    """No connection can be had now: the server said so (class 53), or we lack a file descriptor."""


class Connect(Protocol):
    """Opens a connection to the session's server. Raises OSError."""

    async def __call__(self, factory: Callable[[], P]) -> P: ...


class _InboxReceiver(Inbox):
    def room(self) -> int:
        return READ_SIZE


class Backend(asyncio.BufferedProtocol):
    """One connection, made by `open_backend`.

    Attributes:
        pid: of the backend; behind a connection pooler at first a number that the pooler made up.
        is_pooled: whether there is a pooler in between; then a transaction is open for the job.
        ready: whether it has logged in.
        logged_in: when, by the loop's clock.
        asked: the server's first authentication request.
        parameters: by its ParameterStatus messages.
        on_lost: called when the connection ends.
        system_id: of its database cluster (`identity`); None if not asked for.
        own_settings: those made for a side backend at its login.
        setup: what it must do before its job; None once done.
        setup_row: what that returned.
        identity: what its login was based on, if remembered.
        is_spent: whether it must serve no other job.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.ready = False
        self.logged_in = 0.0
        self.asked: messages.AuthenticationRequest | None = None
        self._is_paused = False
        self.is_pooled = False
        self._key: BackendKeyData | None = None
        self.parameters: dict[bytes, bytes] = {}
        self.own_settings: dict[bytes, bytes] = {}
        self.setup: SessionSetup | None = None
        self.setup_row: Row = ()
        self.identity: bytes | None = None
        self.is_spent = False
        self.system_id: bytes | None = None
        self.receiver: Receiver | None = None
        self.on_lost: Callable[[], None] | None = None

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._inbox = _InboxReceiver(self.transport)
        self.receiver = self._inbox

    def get_buffer(self, sizehint: int) -> memoryview:
        room = self.receiver.room() if self.receiver else READ_SIZE
        return _read_buffer[:room] if room < READ_SIZE else _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        counters.job_bytes += nbytes
        if self.receiver:
            self.receiver.feed(_read_buffer[:nbytes])

    def connection_lost(self, exc: Exception | None) -> None:
        if self.receiver:
            self.receiver.close(exc or ConnectionError("the server closed the connection"))
        self.receiver = None
        if self.on_lost is not None:
            self.on_lost()

    # Called by us

    async def login(self, startup: StartupMessage, credentials: Credentials) -> None:
        """Send the startup packet, answer authentication requests, wait until the server is ready.

        Raises SQLError: the server's own, or 28000 if we have nothing to log in with;
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
                self.logged_in = asyncio.get_running_loop().time()
                return
            elif kind == B.BACKEND_KEY_DATA:
                self._key = BackendKeyData.parse(body)
                self.pid = self._key.pid
            elif kind == B.AUTHENTICATION:
                request = cast(messages.AuthenticationRequest, messages.parse_backend(kind, body))
                self.asked = self.asked or request
                answer = authenticator.respond(request)
                if answer is not None:
                    self.transport.write(answer)
            elif kind == B.ERROR_RESPONSE:
                raise ServerError(ErrorResponse.parse(body))

    async def query(self, sql: bytes, *parameters: bytes) -> Row:
        """The last row that our query returns, in text; empty if there is none.

        Parameters are text, of types that the server infers.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        rows = await self.rows(sql, *parameters)
        return rows[-1] if rows else ()

    async def row(self, sql: bytes, columns: int = 1) -> Row:
        """`query`, which must return a row with at least `columns` columns.

        Raises ProtocolViolation if it does not.
        """
        return _last(await self.rows(sql), columns)

    async def rows(self, sql: bytes, *parameters: bytes) -> list[Row]:
        """All rows, also of several statements. Raises ServerError."""
        if parameters:
            self._send(Parse(b"", sql), Bind(b"", b"", parameters=parameters), Execute(b""), Sync())
        else:
            self._send(Query(sql))
        return await self._answer()

    async def transact(self, *commands: tuple[bytes, Sequence[bytes]]) -> list[Row]:
        """All rows of several commands with parameters, sent together as one transaction unless
        they say otherwise. After an error the rest is skipped. Raises as `rows` does."""
        sent: list[messages.Message] = []
        for sql, parameters in commands:
            sent += [Parse(b"", sql), Bind(b"", b"", parameters=tuple(parameters)), Execute(b"")]
        self._send(*sent, Sync())
        return await self._answer()

    async def remember_identity(
        self, login: Login, identity: bytes | None, greeting: bytes, *, discard: bool = False
    ) -> Row:
        """Have the backend check what its login was based on, now and before it takes over. No
        other query may come in between: the check is the unnamed prepared statement.

        `identity`: that right after the login. `greeting`: a query before the check, in the same
        round trip, whose row is returned. `discard`: discard the session state first.

        Raises StaleLoginError if a new login would already differ; otherwise as `row` does.
        """
        if identity is None:
            raise StaleLoginError("the server would not let it in now")
        check = check_query(identity)
        first = (Query(b"DISCARD ALL"),) if discard else ()
        self._send(*first, Query(greeting), Parse(b"", check), Bind(b"", b""), Execute(b""), Sync())
        if discard:
            await self._answer()
        row = _last(await self._answer(), 2)
        try:
            user, database, *_ = _last(await self._answer(), 3)
        except ServerError as error:
            if error.is_fatal:
                raise
            raise StaleLoginError(str(error)) from None
        if not login.is_of(user, database):
            raise StaleLoginError("the role or the database was changed")
        self.identity = identity
        return row

    def rest(self) -> None:
        """The job has ended: drop what the backend sends until `reset`."""
        self.receiver = self._inbox = _InboxReceiver(self.transport)
        self.parameters, self.setup_row = dict(self.parameters), ()
        self.resume_reading()

    async def reset(self, login: Login, greeting: bytes) -> Row:
        """Make a spare of a backend whose job has ended: its session state is discarded.

        Returns and raises what `remember_identity` does.
        """
        return await self.remember_identity(login, self.identity, greeting, discard=True)

    async def next_message(self) -> tuple[int, bytes]:
        """The next message. Raises ConnectionError, ProtocolViolation."""
        return await self._inbox.next()

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

    async def take_over(self) -> None:
        """Do what must precede the job.

        Raises StaleLoginError: a new login would differ from this one; ServerError,
        ConnectionError, ProtocolViolation.
        """
        await self._open(None, self._inbox, lambda: None)

    async def start(self, sql: bytes, receiver: Receiver, taken_up: Callable[[], object]) -> None:
        """Send a query, behind what must precede it; `receiver` reads the answer.

        Returns when the server has taken the query up. `taken_up`: called then, before the receiver
        gets anything; may raise ProtocolViolation.

        Raises what `take_over` does; then the query will not run. But if the connection is lost, it
        may have run, and the receiver is told.
        """
        await self._open(sql, receiver, taken_up)

    async def _open(
        self, sql: bytes | None, receiver: Receiver, taken_up: Callable[[], object]
    ) -> None:
        if sql is not None and 0 in sql:
            raise ValueError("a query cannot contain NUL")
        if not self.is_alive:
            raise ConnectionError("the server closed the connection")

        def end(row: Row) -> None:
            self.setup_row = row or self.setup_row
            taken_up()

        setup, self.setup = self.setup, None
        opening = Opening(
            setup,
            receiver,
            is_query_sent=sql is not None,
            hand_over=self._receive_by,
            parameter_status=self._parameter_status,
            taken_up=end,
        )
        self.read_by(opening)
        front = in_front_of_query(setup) if sql is not None else alone(setup)
        if sql is None or len(sql) <= READ_SIZE:
            self.transport.write(front if sql is None else front + Query(sql).serialize())
        else:
            # The text may be very long, so it is not copied.
            header = bytes((Query.type,)) + (len(sql) + 5).to_bytes(4, "big")
            for part in (front + header, sql, b"\0"):
                self.transport.write(part)
        del sql
        await opening.done

    def read_by(self, receiver: Receiver) -> None:
        """Hand unread and future input to a receiver."""
        self.receiver = receiver
        if unread := self._inbox.take_rest():
            receiver.feed(memoryview(unread))

    def _receive_by(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def forget_receiver(self) -> None:
        """Drop all input from now on; nobody waits for the start of a query any more."""
        if isinstance(self.receiver, Opening):
            self.receiver.give_up()
        self.receiver = None

    @property
    def is_alive(self) -> bool:
        """Whether the connection is up."""
        return self.receiver is not None

    def pause_reading(self) -> None:
        """Leave the server's output unread for now."""
        self._is_paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._is_paused = False
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def take_a_break(self) -> None:
        """Continue reading after others had a turn."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._end_break)

    def _end_break(self) -> None:
        if not (self._is_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    def terminate(self) -> None:
        """Send Terminate, and close."""
        if not self.transport.is_closing():
            self.transport.write(Terminate().serialize())
            self.transport.close()

    def cancel_request(self) -> CancelRequest:
        """The request that cancels the query running here."""
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
    """Connect and log in.

    Raises SQLError: 28000 and 28P01 if the login failed, otherwise one of class 53, with the
    server's reason as DETAIL; NoRoomError if a later attempt may succeed.
    """
    backend: Backend | None = None
    try:
        async with asyncio.timeout(timeout or None):
            backend = await connect(Backend)
            await backend.login(startup, credentials)
            return backend
    except ServerError as error:
        kind = NoRoomError if error.sqlstate.startswith("53") else SQLError
        raise no_backend(error.message, error.sqlstate, kind=kind) from None
    except TimeoutError:
        raise no_backend(f"The server did not answer within {timeout:g} seconds.") from None
    except OutOfDescriptorsError as error:
        raise no_backend(explain(error), hint=HINT, kind=NoRoomError) from None
    except (OSError, ProtocolViolation) as error:
        raise no_backend(explain(error)) from None
    finally:
        if backend is not None and not backend.ready:
            backend.transport.abort()


_NO_BACKEND: Final = (
    "Each background worker is a server connection. You may need to wait for others to end, or to"
    " increase max_connections."
)


def no_backend(
    reason: str, sqlstate: str = "", *, hint: str = _NO_BACKEND, kind: type[SQLError] = SQLError
) -> SQLError:
    """The error of a launch that could not get a backend."""
    if sqlstate.startswith("28"):
        return SQLError(
            sqlstate,
            "could not log in to start a background worker",
            detail=reason,
            hint="Check the password that the proxy has for this role (passfile, auth_file).",
        )
    return kind(
        sqlstate if sqlstate == TOO_MANY_CONNECTIONS else INSUFFICIENT_RESOURCES,
        "could not start a background worker",
        detail=reason,
        hint=hint,
    )


async def send_cancel(
    connect: Connect, request: CancelRequest, is_meant: Callable[[], bool] = lambda: True
) -> None:
    """Send a CancelRequest, and wait until the server has read it (it closes the connection).

    `is_meant`: asked when it is about to be sent; if not, it is not.

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
        if is_meant():
            transport.write(request.serialize())
            await closed
    finally:
        transport.close()
