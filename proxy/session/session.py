"""One client: its connection, its primary backend, its jobs.

Invariant: the session decides who handles the two connections: first itself, for the startup
packets; then the relay; and for the length of a batch with a call, an interception. The end of one
connection ends the other, and lets the jobs run on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from typing import Final

from protocol.errors import (
    ADMIN_SHUTDOWN,
    CANNOT_CONNECT_NOW,
    INTERNAL_ERROR,
    INVALID_AUTHORIZATION_SPECIFICATION,
    PROTOCOL_VIOLATION,
    QUERY_CANCELED,
    ProtocolViolation,
    SQLError,
)
from protocol.kinds import TransactionStatus
from protocol.messages import BackendKeyData, Terminate
from protocol.startup import MAX_STARTUP_PACKET_LENGTH, CancelRequest, StartupMessage
from proxy.auth import pace
from proxy.auth.login import Login, RefusedError
from proxy.auth.observer import LoginObserver
from proxy.backends.backend import Backend
from proxy.backends.route import Route
from proxy.config import Config, Host
from proxy.config.gucs import SESSION_SETTING
from proxy.extension.conversation import Secrets
from proxy.extension.in_database import Inside
from proxy.extension.job_session import JobSession
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.launcher import Launcher
from proxy.log import logger
from proxy.net.connection import Connection
from proxy.net.descriptors import OutOfDescriptorsError, no_room
from proxy.session.client_session import ClientSession
from proxy.session.custom_settings import CustomSettings
from proxy.session.extension_state import ExtensionState
from proxy.session.interception import TO_LEAVE, Interception
from proxy.session.reader import SqlReader
from proxy.session.relay import Relay
from proxy.session.services import Services
from proxy.session.startup import StartupPackets, may_send_password
from proxy.statements.plan import Statement
from proxy.statements.unserved import unavailable, unserved

# How a client says that it wants no replication.
_FALSE: Final = (b"false", b"off", b"no", b"0", b"f", b"n")

# The SQLSTATE of a connection that pg_hba.conf has no line for.
_NOT_LIKE_THIS: Final = INVALID_AUTHORIZATION_SPECIFICATION


class Session(ClientSession):
    """A client and what it has.

    Attributes:
        route: to its server, once it is connected.
        jobs: those that it launched and has not fetched or detached.
        watchword: what a message from inside the database begins with.
        interception: what serves a batch with a call, as long as that lasts.
    """

    def __init__(self, services: Services) -> None:
        super().__init__(services.jobs)
        self._services = services
        self._is_closed = False
        self.client = Connection(self._startup_data, self._ended, self._lost, self._hung_up)
        self._startup_packets = StartupPackets(
            services, self.client, self._startup_packet, self._spawn
        )
        self.primary = None
        self.custom_settings = CustomSettings()
        self.extension_state = ExtensionState(services)
        self.route = Route(services.runtime.config.upstream.hosts[0])
        self._startup: StartupMessage | None = None
        self._is_cancel_request = False
        self._is_replication = False
        self._client_ended = False
        self._observer = LoginObserver()
        self._login: Login | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._login_timer: asyncio.TimerHandle | None = None
        if timeout := services.runtime.config.client_login_timeout:
            loop = asyncio.get_running_loop()
            self._login_timer = loop.call_later(timeout, self._login_expired)
        self._key: CancelRequest | None = None
        self._task: asyncio.Task[None] | None = None
        self.interception: Interception | None = None
        self._inside = Inside(self, Secrets())
        self.watchword = self._inside.secrets.token
        services.session_began(self)

    def _stop_timer(self) -> None:
        if self._login_timer is not None:
            self._login_timer.cancel()
            self._login_timer = None

    # Its startup

    def _startup_data(self, data: bytes) -> None:
        try:
            self._startup_packets.feed(data)
        except (ProtocolViolation, SQLError) as error:
            self._refuse(error)

    def _startup_packet(self, packet: StartupMessage | CancelRequest, raw: bytes) -> None:
        if isinstance(packet, CancelRequest):
            self._is_cancel_request = True
            self._spawn(self._cancel(packet))
        else:
            self._spawn(self._connect(packet, raw))

    def _login_expired(self) -> None:
        """End it; as a server does, with a word only to who has said who it is."""
        if self._startup is None:
            self.client.abort()
            self.close()
        else:
            self._refuse(SQLError(QUERY_CANCELED, "canceling authentication due to timeout"))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """Do this, until the session is closed."""
        self._task = asyncio.get_running_loop().create_task(self._guard(work))
        # It may have been cancelled before it began.
        self._task.add_done_callback(lambda _: work.close())

    async def _guard(self, work: Coroutine[object, object, None]) -> None:
        """Whatever goes wrong in a session ends this session, and is logged."""
        try:
            await work
        except ConnectionError as error:
            logger.debug("session ended: %s", error)
            self.close()
        except (ProtocolViolation, SQLError) as error:
            self._refuse(error)
        except Exception:
            logger.exception("internal error; the session is closed")
            self._refuse(SQLError(INTERNAL_ERROR, "internal error of the proxy"))

    async def _cancel(self, request: CancelRequest) -> None:
        await self._services.cancel(request)
        self.client.close()

    async def _connect(self, startup: StartupMessage, raw: bytes) -> None:
        """Connect, have the client log in, and leave the rest to the relay."""
        self._startup = startup
        replication = startup.parameters.get(b"replication", b"false").lower()
        self._is_replication = replication not in _FALSE
        if not self._is_replication:
            with_ours = self._with_own_settings(startup).serialize()
            if len(with_ours) - 4 <= MAX_STARTUP_PACKET_LENGTH:
                raw = with_ours
        from_client, from_server = await self._log_in(startup.parameters, raw)
        assert self.primary is not None
        self._stop_timer()
        self._login = self._task = None
        self.relay = Relay(self.client, self.primary, self)
        self.reader = SqlReader(self.relay, self.extension_state, lambda: self._config)
        self.primary.receive = self.relay.from_server
        self.client.receive = (
            self._to_replication if self._is_replication else self.relay.from_client
        )
        if from_server:
            self.primary.receive(from_server)
        if from_client:
            self.client.receive(from_client)
        if self._client_ended:
            self._ended(self.client)

    async def _log_in(self, parameters: dict[bytes, bytes], startup: bytes) -> tuple[bytes, bytes]:
        """Connect to a server that lets the client in; what the two have sent after that.

        A server that refuses the connection at once may take it another way (`Dialer.alternative`),
        or be starting up while another host is not.

        Raises ConnectionError, SQLError, ProtocolViolation.
        """
        dialer = self._services.runtime.dialer
        new_connection = functools.partial(Connection, self._no_data, self._ended, self._lost)
        tried: set[Host] = set()
        refusal: RefusedError | None = None
        route: Route | None = None
        received = bytes(self._startup_packets.rest)
        while True:
            try:
                self.route, self.primary = await dialer.connect(new_connection, tried, route)
            except OSError as error:
                if refusal is None:
                    raise _no_connection(error) from None
                self.client.write(refusal.messages)
                raise ConnectionError(str(error)) from None
            self.client.opposite, self.primary.opposite = self.primary, self.client
            self.primary.write(startup)
            self._login = self._new_login(self.primary, parameters)
            self.client.receive(received)
            if self._client_ended:
                self._login.client_ended()
            try:
                return await self._login.run()
            except RefusedError as error:
                refusal = error
            received = self._login.take_rest()
            sqlstate = refusal.sqlstate
            route = dialer.alternative(self.route) if sqlstate == _NOT_LIKE_THIS else None
            tried.add(self.route.host)
            if route is None and not (sqlstate == CANNOT_CONNECT_NOW and dialer.others(tried)):
                self.client.write(refusal.messages)
                raise ConnectionError(str(refusal))
            refused, self.primary = self.primary, None
            refused.abort()

    def _to_replication(self, data: bytes) -> None:
        assert self.primary is not None
        self.primary.write(data)

    def _new_login(self, primary: Connection, parameters: dict[bytes, bytes]) -> Login:
        user = parameters.get(b"user", b"")
        database = parameters.get(b"database", user)
        stranger = pace.who(self.client.transport.get_extra_info("peername"))
        plain = self._config.auth_type == "plain"
        return Login(
            self.client,
            primary,
            user,
            self._observer,
            lambda: self._services.runtime.check_of(self.route, database, user, stranger),
            asks_password=may_send_password(self.client) if plain else None,
            policy=self._config.upstream.policy(self.route.host),
        )

    def _with_own_settings(self, startup: StartupMessage) -> StartupMessage:
        """Give the session our settings, so that SHOW, SET and RESET work; its own words win."""
        given = startup.parameters
        options = given.get(b"options", b"")
        ours = {
            name.encode(): value.encode()
            for name, value in self._services.runtime.own_settings.items()
            if name.encode() not in options
        }
        session = {SESSION_SETTING: self._inside.secrets.setting}
        return StartupMessage({**ours, **given, **session}, startup.version)

    def _no_data(self, data: bytes) -> None:
        raise ProtocolViolation("the server spoke first")

    def _refuse(self, error: SQLError | ProtocolViolation) -> None:
        """A last word to the client."""
        if isinstance(error, ProtocolViolation):
            error = SQLError(PROTOCOL_VIOLATION, str(error))
        error.severity = "FATAL"
        self.client.write(error.response().serialize())
        self.close()

    # What the relay tells

    def backend_key(self, body: bytes) -> None:
        try:
            key = BackendKeyData.parse(body)
        except ProtocolViolation:
            return  # the client will say what is wrong with it
        self._key = CancelRequest(key.pid, key.secret_key)
        self._services.key_known(self._key, self)

    def calls(self, kind: int, body: bytes) -> list[Statement] | None:
        return self.reader.calls(kind, body)

    def unread(self) -> None:
        """A statement goes to the server that is too long to be looked at."""
        self.reader.too_long = True

    def database_mentioned(self, sql: bytes) -> None:
        self.service.leave_databases(sql)

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the primary backend; true if it was a call, which is served."""
        is_call = self._inside.notice(body)
        if is_call and self._inside.is_talkative and self.primary is not None:
            self.primary.take_a_break()
            asyncio.get_running_loop().call_soon(self.primary.end_break)
        return is_call

    def cancel_statement(self) -> None:
        if self._key is None or self.primary is None:
            return
        primary = self.primary
        told = self.service.cancel_statement(self.route, self._key)
        # Before 17 the server signals the backend twice. The second must not be for what the client
        # sends after the error, so that is read when the server is done.
        primary.take_a_break()
        told.add_done_callback(lambda _: primary.end_break())

    def statement_ended(self) -> None:
        if self.relay.status == TransactionStatus.IDLE:
            self.extension_state.transaction_ended()
        self._inside.statement_ended()

    def complaint(self, error: bytes) -> bytes | None:
        if self._is_replication or self.extension_state.is_real:
            return None
        if self._config.extension == "proxy" and (said := unavailable(error)) is not None:
            return said
        return unserved(error, too_long=self.reader.too_long) or self._inside.complaint(error)

    def take_over(self, data: bytes, statements: list[Statement]) -> None:
        self.interception = Interception(self, data, statements)
        self._spawn(self._intercept(self.interception))

    async def _intercept(self, interception: Interception) -> None:
        await interception.run()
        self.interception = self._task = None
        interception.hand_back()
        if interception.interrupts.client_ended:
            self._ended(self.client)

    @property
    def _config(self) -> Config:
        return self._services.runtime.config

    @property
    def interrupts(self) -> Interrupts | None:
        return self.interception.interrupts if self.interception is not None else None

    def job_session(self, launcher: Launcher, backend: Backend) -> JobSession:
        return JobSession(self, launcher, backend)

    async def inject(self, message: bytes) -> None:
        if self.interception is None and not self.relay.at_boundary:
            return  # the caller did not wait for the answer
        self.client.write(message)
        if self.client.full is not None:
            await asyncio.wait([self.client.full])

    @functools.cached_property
    def launcher(self) -> Launcher:
        assert self._startup is not None
        assert self._key is not None
        return Launcher(
            self.service, self._startup.parameters, self.route, self._observer, self._key.pid
        )

    # The end

    def _ended(self, connection: Connection) -> None:
        """One side will send no more. If it is the client, the server may still have to answer."""
        if connection is self.primary:
            self._primary_lost()
        elif connection is not self.client:
            pass  # a server that we have turned away from
        elif self._startup is None:
            self.close()
        elif self.primary is None or self._login is not None:
            self._client_ended = True
            if self._login is not None:
                self._login.client_ended()
        elif self.relay.is_behind:
            # What it has sent before that comes first.
            asyncio.get_running_loop().call_soon(self._ended, connection)
        elif self.interception is not None:
            self._inside.end_client()
            self.interception.end_client()
        elif self.primary.can_write_eof:
            self._inside.end_client()
            self.primary.write_eof()
            self._see_it_end()
        elif self.relay.between_messages and not self._is_replication:
            self._inside.end_client()
            self.primary.write(Terminate().serialize())
            self._see_it_end()
        else:
            self.close()

    def _hung_up(self) -> None:
        """The client has left behind messages that are not read yet."""
        if self.interception is not None:
            self.interception.interrupts.client_hung_up()
        else:
            self._inside.end_client()

    def _see_it_end(self) -> None:
        """The server knows that the client has left, and closes the connection when it has done
        what it was given. If it waits for more instead, it is hung up on."""
        self._leaving = asyncio.get_running_loop().call_later(TO_LEAVE, self._has_it_ended)

    def _has_it_ended(self) -> None:
        if self._is_replication or self.relay.is_busy:
            self._see_it_end()
        else:
            logger.debug("the server did not end with its client")
            self.close()

    def _lost(self, connection: Connection, error: Exception | None) -> None:
        if connection is self.primary:
            self._primary_lost()
        elif connection is self.client:
            self.close()

    def _primary_lost(self) -> None:
        """Tell the client what the server said last, and that it is gone."""
        if self._login is not None:
            self._login.server_ended()
            return
        if self.interception is not None:
            self.interception.server_lost(ConnectionError("the server closed the connection"))
            self.client.write(self.interception.last_words())
        self.close()

    def shut_down(self) -> None:
        """End the session as a server does that shuts down."""
        self._refuse(
            SQLError(ADMIN_SHUTDOWN, "terminating connection due to administrator command")
        )

    def close(self) -> None:
        """Close both connections; the jobs run on."""
        if self._is_closed:
            return
        self._is_closed = True
        self._services.session_ended(self, self._key)
        self._stop_timer()
        # A cancel request is passed on even if its sender has already left.
        if self._task is not None and not self._is_cancel_request:
            self._task.cancel()
        if self._leaving is not None:
            self._leaving.cancel()
        if self._inside.is_asked and self._key is not None:
            # The function would wait for an answer that will not come.
            self.service.cancel_statement(self.route, self._key)
        self._inside.statement_ended()
        self.jobs.clear()
        self.client.close()
        if self.primary is None:
            return
        if self.primary.is_stopped_by_opposite:
            # It may wait for us to read, and we for it; its output is not wanted.
            self.primary.abort()
        else:
            self.primary.close()


def _no_connection(error: OSError) -> SQLError:
    if isinstance(error, OutOfDescriptorsError):
        return no_room()
    # Of all SQLSTATEs this one tells libpq that there is no server: pg_isready says so, and a
    # client with several hosts tries the next.
    return SQLError(
        CANNOT_CONNECT_NOW, "could not connect to the server behind the proxy", detail=f"{error}"
    )
