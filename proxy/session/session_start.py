"""The start of a session: everything before its relay.

Invariant: the relay gets the two connections once the server has let the client in and is ready for
its first query, and with them whatever either has sent ahead.

A start is in one of these stages. PACKETS leads to one of the others, LOGIN to the relay; the
others, and any error, end the session.

======= ======================== ===================== ======================= ===========
stage   begins with              the client ends       the server ends         time is up
======= ======================== ===================== ======================= ===========
PACKETS the connection           close                                         close
CANCEL  a CancelRequest          close; the request is                         close
                                 passed on
REFUSAL a packet that every      nothing: it may still close                   close
        server refuses           be reading why
CONSOLE a StartupMessage for the close                                         an error
        console
LOGIN   any other StartupMessage what it has sent may  close, once its last    an error
                                 be enough to log in   error is passed on; the
                                                       next server, if it has
                                                       asked for nothing yet
======= ======================== ===================== ======================= ===========
"""

from __future__ import annotations

import asyncio
import enum
import functools
import os
import struct
from abc import abstractmethod
from collections.abc import Coroutine
from typing import Final

from protocol.errors import (
    CANNOT_CONNECT_NOW,
    INVALID_AUTHORIZATION_SPECIFICATION,
    QUERY_CANCELED,
    ProtocolViolation,
    SQLError,
)
from protocol.startup import (
    MAX_STARTUP_PACKET_LENGTH,
    CancelRequest,
    GSSENCRequest,
    RefusedStartup,
    SSLRequest,
    StartupMessage,
)
from proxy.auth import rate_limit
from proxy.auth.login import Login, RefusedError
from proxy.auth.observer import LoginObserver
from proxy.backends.route import Route
from proxy.config import Config, Host
from proxy.config.gucs import SESSION_SETTING
from proxy.net.connection import Connection
from proxy.net.descriptors import OutOfDescriptorsError, no_room
from proxy.reasons import explain
from proxy.session.admission import check_address, check_names, name_with_host
from proxy.session.client_session import ClientSession
from proxy.session.defaults import LoginEnd, defaults_query
from proxy.session.relay import Relay
from proxy.session.services import Services
from proxy.session.session_log import SessionLog
from proxy.session.startup import StartupPackets, may_send_password
from proxy.stats import counters

# The version number 1234.5681, which is no request code
_NO_REQUEST: Final = struct.pack("!HH", 1234, 5681)

# The SQLSTATE for a connection that no line of pg_hba.conf allows
_NOT_LIKE_THIS: Final = INVALID_AUTHORIZATION_SPECIFICATION


class StartingSession(ClientSession):
    """A session as its start sees it.

    Attributes:
        log: of its connection, its login and its end.
        observer: of the login.
        startup: its startup packet, once that has come.
        is_pooled: whether there is a pooler between the proxy and its backend.
    """

    log: SessionLog
    observer: LoginObserver
    startup: StartupMessage | None = None
    is_pooled = False

    @abstractmethod
    def ended(self, connection: Connection) -> None:
        """One side will send no more."""

    @abstractmethod
    def lost(self, connection: Connection, error: Exception | None) -> None:
        """The connection to one side is gone."""

    @abstractmethod
    def hung_up(self) -> None:
        """The client has sent an end of file, perhaps behind unread data."""

    @abstractmethod
    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run this in a task. An error in it ends the session."""

    @abstractmethod
    def refuse(self, error: SQLError | ProtocolViolation) -> None:
        """Send the client a last error, and close."""

    @abstractmethod
    def close(self) -> None:
        """Close both connections."""

    @abstractmethod
    def logged_in(self) -> Relay:
        """The server has let the client in. Returns the relay, for what the server says next."""

    @abstractmethod
    def start_ended(self) -> None:
        """The relay gets both connections."""


class Stage(enum.Enum):
    """How far a start is; see the table above."""

    PACKETS = enum.auto()
    CANCEL = enum.auto()
    REFUSAL = enum.auto()
    CONSOLE = enum.auto()
    LOGIN = enum.auto()


class SessionStart:
    """The start of one session. It makes both connections.

    Attributes:
        stage: see the table above.
    """

    def __init__(self, session: StartingSession, services: Services, words: bytes) -> None:
        """
        Args:
            session: whose start it is.
            services: have the server, the console and the configuration.
            words: the value of SESSION_SETTING: they identify calls from inside the database.
        """
        self.stage = Stage.PACKETS
        self._session = session
        self._services = services
        self._words = words
        self._client = session.client = Connection(
            self._feed, session.ended, session.lost, session.hung_up
        )
        self._packets = StartupPackets(services, self._client, self._accept, self._spawn)
        self._login: Login | None = None
        self._client_ended = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout := self._config.client_login_timeout:
            self._timer = asyncio.get_running_loop().call_later(timeout, self._time_is_up)

    @property
    def _config(self) -> Config:
        return self._services.runtime.config

    @property
    def sqlstate(self) -> str | None:
        """Of the error with which the server has refused the client; None if it has not."""
        return self._login.sqlstate if self._login is not None else None

    # Called by the session

    def client_ended(self) -> None:
        """The client will send no more."""
        match self.stage:
            case Stage.PACKETS | Stage.CANCEL | Stage.CONSOLE:
                self._session.close()
            case Stage.LOGIN:
                self._client_ended = True
                if self._login is not None:
                    self._login.client_ended()

    def server_ended(self) -> None:
        """The server will send no more."""
        if self._login is not None:
            self._login.server_ended()
        else:
            self._session.close()

    def close(self) -> None:
        """The session is closed."""
        self._stop_timer()
        if self._task is not None and self.stage is not Stage.CANCEL:
            self._task.cancel()

    def _time_is_up(self) -> None:
        """End the start; as in a server, without an error if the login has not begun."""
        if self._session.startup is None:
            self._client.abort()
            self._session.close()
        else:
            error = SQLError(QUERY_CANCELED, "canceling authentication due to timeout")
            self._session.refuse(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        self._task = self._session.spawn(work)

    # Startup packets

    def _feed(self, data: bytes) -> None:
        """The client has sent this."""
        try:
            self._packets.feed(data)
        except (ProtocolViolation, SQLError) as error:
            self._session.refuse(error)

    def _accept(self, packet: StartupMessage | CancelRequest | RefusedStartup, raw: bytes) -> None:
        """Raises SQLError: such a client may not try."""
        if isinstance(packet, StartupMessage):
            self._session.startup = packet
            self._session.log.asked(packet)
        check_address(self._client, self._config)
        match packet:
            case CancelRequest():
                self.stage = Stage.CANCEL
                self._spawn(self._cancel(packet))
            case RefusedStartup(version):
                self.stage = Stage.REFUSAL
                self._spawn(self._have_refused(version, raw))
            case StartupMessage() if self._services.has_console(packet):
                self.stage = Stage.CONSOLE
                self._spawn(self._serve_console(packet))
            case StartupMessage():
                self.stage = Stage.LOGIN
                self._spawn(self._connect(packet, raw))

    async def _cancel(self, request: CancelRequest) -> None:
        await self._services.cancel(request)
        self._client.close()

    async def _have_refused(self, version: tuple[int, int], packet: bytes) -> None:
        """Pass on the server's own refusal of a startup packet, in the form that is right for the
        protocol version; then the server closes."""
        if version in (SSLRequest.code, GSSENCRequest.code):
            # An encryption request that comes again. A server would take it for the first.
            packet = packet[:4] + _NO_REQUEST + packet[8:]

        def pass_on(said: bytes) -> None:
            self._client.write(said.replace(b"1234.5681", b"%d.%d" % version))

        session = self._session
        try:
            session.route, session.primary = await self._services.runtime.dialer.connect(
                lambda: Connection(pass_on, session.ended, session.lost)
            )
        except OSError as error:
            raise _no_connection(error) from None
        session.primary.write(packet)

    async def _serve_console(self, startup: StartupMessage) -> None:
        """Let the console serve the client. Its users are not the server's roles."""

        def let_in() -> None:
            self._stop_timer()
            self._session.log.authorized(self._client, os.getpid(), self._config)

        rest = bytes(self._packets.rest)
        await self._services.console(self._client, startup, rest, let_in)
        self._session.close()

    # Login

    async def _connect(self, startup: StartupMessage, raw: bytes) -> None:
        """Connect to the server, let the client log in, and leave the rest to the relay."""
        session, client = self._session, self._client
        check_names(startup, self._config)
        if not startup.is_replication:
            with_ours = self._with_words(startup).serialize()
            if len(with_ours) - 4 <= MAX_STARTUP_PACKET_LENGTH:
                raw = with_ours
        from_client, from_server = await self._log_in(startup, raw)
        self._login = None
        assert session.primary is not None
        primary, relay = session.primary, session.logged_in()
        if not startup.is_replication:
            login_end = LoginEnd(
                *(client, primary, relay.from_server),
                lambda: defaults_query(self._config.session_defaults, session.pid),
            )
            from_client, from_server = await login_end.run(from_client, from_server)
            session.is_pooled = login_end.is_pooled
        self._stop_timer()
        session.start_ended()

        def to_replication(data: bytes) -> None:
            counters.client_bytes += len(data)
            primary.write(data)

        primary.receive = relay.from_server
        client.receive = to_replication if startup.is_replication else relay.from_client
        if from_server:
            primary.receive(from_server)
        if from_client:
            client.receive(from_client)
        client.resume_reading()
        if self._client_ended:
            session.ended(client)

    async def _log_in(self, startup: StartupMessage, raw: bytes) -> tuple[bytes, bytes]:
        """Connect to a server that lets the client in. Returns what both have sent after that.

        A server that refuses the connection at once may take it another way (`Dialer.alternative`),
        or may be starting up while another host is ready.

        Raises ConnectionError, SQLError, ProtocolViolation.
        """
        session, client = self._session, self._client
        dialer = self._services.runtime.dialer
        new_connection = functools.partial(Connection, _no_data, session.ended, session.lost)
        tried: set[Host] = set()
        refusal: RefusedError | None = None
        route: Route | None = None
        received = bytes(self._packets.rest)
        while True:
            try:
                session.route, session.primary = await dialer.connect(new_connection, tried, route)
            except OSError as error:
                if refusal is None:
                    raise _no_connection(error) from None
                client.write(refusal.messages)
                raise ConnectionError(explain(error)) from None
            client.opposite, session.primary.opposite = session.primary, client
            session.primary.write(raw)
            self._login = self._new_login(session.primary, startup)
            client.receive(received)
            if self._client_ended:
                self._login.client_ended()
            try:
                return await self._login.run()
            except RefusedError as error:
                refusal = error
            received = self._login.take_rest()
            sqlstate = refusal.sqlstate
            route = dialer.alternative(session.route) if sqlstate == _NOT_LIKE_THIS else None
            tried.add(session.route.host)
            if route is None and not (sqlstate == CANNOT_CONNECT_NOW and dialer.others(tried)):
                client.write(refusal.messages)
                raise ConnectionError(str(refusal))
            refused, session.primary = session.primary, None
            refused.abort()

    def _new_login(self, primary: Connection, startup: StartupMessage) -> Login:
        client, route = self._client, self._session.route
        names = startup.database, startup.user, rate_limit.client_key(client.peer.name)
        plain = self._config.auth_type == "plain"
        return Login(
            *(client, primary, startup.user, self._session.observer),
            lambda: self._services.runtime.check_of(route, *names),
            asks_password=may_send_password(client) if plain else None,
            policy=self._config.upstream.policy(route.host),
        )

    def _with_words(self, startup: StartupMessage) -> StartupMessage:
        """Add to the startup packet the words that identify calls from inside the database, and the
        client's address if configured."""
        ours = {SESSION_SETTING: self._words}
        if self._config.application_name_add_host:
            ours[b"application_name"] = name_with_host(startup.application_name, self._client)
        return StartupMessage({**startup.parameters, **ours}, startup.version)


def _no_data(data: bytes) -> None:
    raise ProtocolViolation("the server spoke first")


def _no_connection(error: OSError) -> SQLError:
    if isinstance(error, OutOfDescriptorsError):
        return no_room()
    # This SQLSTATE alone tells libpq that there is no server: pg_isready reports that, and a client
    # with several hosts tries the next.
    return SQLError(
        CANNOT_CONNECT_NOW,
        "could not connect to the server behind the proxy",
        detail=explain(error),
    )
