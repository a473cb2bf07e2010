"""One client: its connection, its primary backend, its jobs.

Invariant: the session decides who handles the two connections: itself during startup; then the
relay; an interception during a batch with a call. The end of one ends the other; jobs run on.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import struct
from collections.abc import Coroutine
from datetime import UTC, datetime
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
from protocol.framing import HEADER_SIZE
from protocol.kinds import TransactionStatus
from protocol.messages import BackendKeyData, ErrorResponse, Terminate
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
from proxy.backends import pooler
from proxy.backends.backend import Backend
from proxy.backends.reuse import Reuse
from proxy.backends.route import Route
from proxy.config import Config, Host
from proxy.config.gucs import SESSION_SETTING
from proxy.extension.conversation import Secrets
from proxy.extension.in_database import DatabaseCalls
from proxy.extension.job_session import JobSession
from proxy.jobs.at_commit import cannot_prepare
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.launcher import Launcher
from proxy.log import logger
from proxy.net.connection import Connection
from proxy.net.descriptors import OutOfDescriptorsError, no_room
from proxy.net.peer import Peer
from proxy.reasons import explain
from proxy.session.admission import check_address, check_names, name_with_host
from proxy.session.client_session import ClientSession
from proxy.session.custom_settings import CustomSettings
from proxy.session.defaults import LoginEnd, defaults_query
from proxy.session.extension_state import ExtensionState
from proxy.session.interception import TO_LEAVE, Interception
from proxy.session.named import NamedStatements
from proxy.session.reader import SqlReader
from proxy.session.relay import Relay
from proxy.session.reported import ReportedSettings
from proxy.session.services import Services, SessionSummary
from proxy.session.session_log import SessionLog
from proxy.session.startup import StartupPackets, may_send_password
from proxy.statements.plan import Statement
from proxy.statements.unserved import unavailable, unserved
from proxy.stats import counters

# The version number 1234.5681, which is no request code
_NO_REQUEST: Final = struct.pack("!HH", 1234, 5681)

_numbers = itertools.count(1)

_IDLE_STATUS: Final = int(TransactionStatus.IDLE)
"""A constant, since each statement is compared with it, and an attribute is slower."""
_IDLE: Final = {
    TransactionStatus.IDLE: "idle",
    TransactionStatus.IN_BLOCK: "idle in transaction",
    TransactionStatus.FAILED: "idle in transaction (aborted)",
}

# The SQLSTATE for a connection that no line of pg_hba.conf allows
_NOT_LIKE_THIS: Final = INVALID_AUTHORIZATION_SPECIFICATION


class Session(ClientSession):
    """A client and what belongs to it.

    Attributes:
        route: to its server, once it is connected.
        jobs: those that it launched and has not fetched or detached.
        watchword: the beginning of messages from inside the database.
        interception: serves a batch with a call, as long as that lasts.
        observer: of its client's login.
        is_console: whether it is a console session, which has no server.
    """

    is_console = False

    def __init__(self, services: Services) -> None:
        super().__init__(services.jobs)
        self._services = services
        self._is_closed = False
        self._log = SessionLog()
        self._number = next(_numbers)
        self._connected_at = datetime.now(UTC)
        self._sqlstate: str | None = None  # of the error that refused it
        self._ends_statement = False
        self._is_pooled = False
        self.client = Connection(self._startup_data, self._ended, self._lost, self._hung_up)
        self._startup_packets = StartupPackets(
            services, self.client, self._startup_packet, self._spawn
        )
        self.primary = None
        self.custom_settings = CustomSettings()
        self.reported = ReportedSettings()
        self.named = NamedStatements(self.reported, self.custom_settings)
        self.extension_state = ExtensionState(services)
        self.route = Route(services.runtime.config.upstream.hosts[0])
        self._startup: StartupMessage | None = None
        self._is_cancel_request = False
        self._is_refused = False
        self._is_replication = False
        self._relays = False  # true from the end of the login on
        self._client_ended = False
        self._reuse = Reuse(self.service.spares)
        self.observer = LoginObserver()
        self._login: Login | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._login_timer: asyncio.TimerHandle | None = None
        if timeout := services.runtime.config.client_login_timeout:
            loop = asyncio.get_running_loop()
            self._login_timer = loop.call_later(timeout, self._login_expired)
        self._key: CancelRequest | None = None
        self._task: asyncio.Task[None] | None = None
        self.interception: Interception | None = None
        self._database_calls = DatabaseCalls(self, Secrets())
        self.watchword = self._database_calls.secrets.token
        services.session_began(self)

    def _stop_timer(self) -> None:
        if self._login_timer is not None:
            self._login_timer.cancel()
            self._login_timer = None

    # Startup

    def received(self, peer: Peer) -> None:
        """The client has connected."""
        counters.connections += 1
        self.client.peer = peer
        self._log.received(peer, self._config)

    def _startup_data(self, data: bytes) -> None:
        try:
            self._startup_packets.feed(data)
        except (ProtocolViolation, SQLError) as error:
            self._refuse(error)

    def _startup_packet(
        self, packet: StartupMessage | CancelRequest | RefusedStartup, raw: bytes
    ) -> None:
        match packet:
            case CancelRequest():
                check_address(self.client, self._config)
                self._is_cancel_request = True
                self._spawn(self._cancel(packet))
            case RefusedStartup(version):
                check_address(self.client, self._config)
                self._is_refused = True
                self._spawn(self._have_refused(version, raw))
            case StartupMessage() if self._services.has_console(packet):
                self._spawn(self._serve_console(packet))
            case StartupMessage():
                self._spawn(self._connect(packet, raw))

    def _login_expired(self) -> None:
        """Time is up: end the login; as in a server, without an error if it has not begun."""
        if self._startup is None:
            self.client.abort()
            self.close()
        else:
            self._refuse(SQLError(QUERY_CANCELED, "canceling authentication due to timeout"))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run this in a task that ends with the session."""
        self._task = asyncio.get_running_loop().create_task(self._guard(work))
        # If it was cancelled before it began:
        self._task.add_done_callback(lambda _: work.close())

    async def _guard(self, work: Coroutine[object, object, None]) -> None:
        """Log any error in the work, and end this session only."""
        try:
            await work
        except ConnectionError as error:
            logger.debug("session ended: %s", explain(error))
            self.close()
        except (ProtocolViolation, SQLError) as error:
            self._refuse(error)
        except Exception:
            logger.exception("internal error; the session is closed")
            self._refuse(SQLError(INTERNAL_ERROR, "internal error of the proxy"))

    async def _cancel(self, request: CancelRequest) -> None:
        await self._services.cancel(request)
        self.client.close()

    async def _have_refused(self, version: tuple[int, int], packet: bytes) -> None:
        """Pass on the server's own refusal of a startup packet, in the form that is right for the
        protocol version; then the server closes."""
        if version in (SSLRequest.code, GSSENCRequest.code):
            # An encryption request that comes again. A server would take it for the first.
            packet = packet[:4] + _NO_REQUEST + packet[8:]

        def pass_on(said: bytes) -> None:
            self.client.write(said.replace(b"1234.5681", b"%d.%d" % version))

        try:
            self.route, self.primary = await self._services.runtime.dialer.connect(
                lambda: Connection(pass_on, self._ended, self._lost)
            )
        except OSError as error:
            raise _no_connection(error) from None
        self.primary.write(packet)

    async def _serve_console(self, startup: StartupMessage) -> None:
        """Let the console serve the client. Its users are not the server's roles."""
        self._startup = startup
        self._log.asked(startup)
        check_address(self.client, self._config)
        self.is_console = True

        def let_in() -> None:
            self._stop_timer()
            self._log.authorized(self.client, os.getpid(), self._config)

        rest = bytes(self._startup_packets.rest)
        await self._services.console(self.client, startup, rest, let_in)
        self.close()

    def _pids_of_jobs(self) -> list[int]:
        """The pids of all jobs that run on this server."""
        running = self._services.jobs.registry.running
        return [job.backend_pid for job in running if job.route.host == self.route.host]

    async def _connect(self, startup: StartupMessage, raw: bytes) -> None:
        """Connect to the server, let the client log in, and leave the rest to the relay."""
        self._startup = startup
        self._is_replication = startup.is_replication
        self._log.asked(startup)
        check_address(self.client, self._config)
        check_names(startup, self._config)
        if not self._is_replication:
            with_ours = self._with_watchword(startup).serialize()
            if len(with_ours) - 4 <= MAX_STARTUP_PACKET_LENGTH:
                raw = with_ours
        from_client, from_server = await self._log_in(startup, raw)
        assert self.primary is not None
        self._login = None
        self.relay = Relay(self.client, self.primary, self)
        self.reader = SqlReader(
            *(self.reported, self.named, self.extension_state),
            lambda: self._config,
            self._pids_of_jobs,
        )
        if not self._is_replication:
            from_client, from_server = await self._set_defaults(from_client, from_server)
        self._stop_timer()
        self._task = None
        self._relays = True
        self.primary.receive = self.relay.from_server
        self.client.receive = (
            self._to_replication if self._is_replication else self.relay.from_client
        )
        if from_server:
            self.primary.receive(from_server)
        if from_client:
            self.client.receive(from_client)
        self.client.resume_reading()
        if self._client_ended:
            self._ended(self.client)

    async def _set_defaults(self, from_client: bytes, from_server: bytes) -> tuple[bytes, bytes]:
        """Give the session the defaults of our settings. Returns what both have sent after that."""
        assert self.primary is not None
        early = bytearray(from_client)
        self.client.receive = early.extend
        self.client.pause_reading()
        login_end = LoginEnd(
            self.primary,
            self.relay.from_server,
            lambda: defaults_query(
                self._config.session_defaults,
                0 if self._key is None else self._key.pid,
            ),
        )
        from_server = await login_end.run(from_server)
        self._is_pooled = login_end.is_pooled
        return bytes(early), from_server

    async def _log_in(self, startup: StartupMessage, raw: bytes) -> tuple[bytes, bytes]:
        """Connect to a server that lets the client in. Returns what both have sent after that.

        A server that refuses the connection at once may take it another way (`Dialer.alternative`),
        or may be starting up while another host is ready.

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
                raise ConnectionError(explain(error)) from None
            self.client.opposite, self.primary.opposite = self.primary, self.client
            self.primary.write(raw)
            self._login = self._new_login(self.primary, startup)
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
        counters.client_bytes += len(data)
        assert self.primary is not None
        self.primary.write(data)

    def _new_login(self, primary: Connection, startup: StartupMessage) -> Login:
        user, database = startup.user, startup.database
        client_key = rate_limit.client_key(self.client.peer.name)
        plain = self._config.auth_type == "plain"
        return Login(
            self.client,
            primary,
            user,
            self.observer,
            lambda: self._services.runtime.check_of(self.route, database, user, client_key),
            asks_password=may_send_password(self.client) if plain else None,
            policy=self._config.upstream.policy(self.route.host),
        )

    def _with_watchword(self, startup: StartupMessage) -> StartupMessage:
        """Add to the startup packet the words that identify calls from inside the database, and the
        client's address if configured."""
        ours = {SESSION_SETTING: self._database_calls.secrets.setting}
        if self._config.application_name_add_host:
            ours[b"application_name"] = name_with_host(startup.application_name, self.client)
        return StartupMessage({**startup.parameters, **ours}, startup.version)

    def _no_data(self, data: bytes) -> None:
        raise ProtocolViolation("the server spoke first")

    def _refuse(self, error: SQLError | ProtocolViolation) -> None:
        """Send the client a last error; none, like a server, if it may not know the protocol."""
        if isinstance(error, ProtocolViolation):
            if self._startup is None:
                logger.info("%s", error)
                self.close()
                return
            error = SQLError(PROTOCOL_VIOLATION, str(error))
        error.severity = "FATAL"
        self._sqlstate = error.sqlstate
        self.client.write(error.response().serialize())
        self.close()

    # Called by the relay

    def backend_key(self, body: bytes) -> None:
        try:
            key = BackendKeyData.parse(body)
        except ProtocolViolation:
            return  # the client will report what is wrong with it
        self._key = CancelRequest(key.pid, key.secret_key)
        self._log.authorized(self.client, key.pid, self._config)
        self._services.key_known(self._key, self)

    def calls(self, kind: int, body: bytes) -> list[Statement] | None:
        return self.reader.calls(kind, body, settings_may_differ=self.relay.settings_may_differ)

    def unread(self) -> None:
        """A statement too long to be read goes to the server."""
        self.reader.too_long = True

    def database_mentioned(self, sql: bytes) -> None:
        self.service.leave_databases(sql)

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the primary. Returns whether it was a call, which is then served."""
        is_call = self._database_calls.notice(body)
        if is_call and self._database_calls.is_talkative and self.primary is not None:
            self.primary.take_a_break()
            asyncio.get_running_loop().call_soon(self.primary.end_break)
        return is_call

    def ready(self) -> None:
        self._database_calls.statement_ended()
        if self.relay.status == _IDLE_STATUS:
            self.extension_state.transaction_ended()
            if self.pending:
                self.transaction_ended()

    def statement_ended(self) -> None:
        self._database_calls.statement_ended()

    def complaint(self, error: bytes) -> bytes | None:
        if self._key is None:  # refused after AuthenticationOk: the database may not exist
            self._sqlstate = ErrorResponse.parse(error).sqlstate
        if self._is_replication or self.extension_state.uses_c_extension:
            return None
        if self._config.extension == "proxy" and (said := unavailable(error)) is not None:
            return said
        if (said := cannot_prepare(error)) is not None:
            return said
        said = unserved(error, too_long=self.reader.too_long) or self._database_calls.complaint(
            error
        )
        if said is not None and self._is_pooled:
            return pooler.explained(ErrorResponse.parse(said[HEADER_SIZE:])).serialize()
        return said

    def complaint_from_inside(self, error: bytes) -> bytes | None:
        return self._database_calls.complaint(error)

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

    @property
    def summary(self) -> SessionSummary:
        startup = self._startup or StartupMessage({})
        return SessionSummary(
            self._number,
            startup.user,
            startup.database,
            startup.application_name,
            self._state,
            self._connected_at,
            0 if self._key is None else self._key.pid,
            sum(1 for _ in self.jobs),
        )

    @property
    def _state(self) -> str:
        if self.is_console:
            return "console"
        if not self._relays:
            return "login"
        if self.interception is not None or self.relay.is_busy:
            return "active"
        return _IDLE.get(self.relay.status, "active")

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
            *(self.service, self._startup.parameters, self.route, self.observer, self._key.pid),
            self._reuse,
        )

    # The end

    def _ended(self, connection: Connection) -> None:
        """One side will send no more. If it is the client, the server may still owe answers."""
        if connection is self.primary:
            self._primary_lost()
        elif connection is not self.client:
            pass  # a server that we have left
        elif self._is_refused:
            pass  # the client may still be reading why
        elif self._startup is None or self.is_console:
            self.close()
        elif self.primary is None or not self._relays:
            self._client_ended = True
            if self._login is not None:
                self._login.client_ended()
        elif self.relay.is_behind:
            # What it has sent before that comes first.
            asyncio.get_running_loop().call_soon(self._ended, connection)
        elif self.interception is not None:
            self._database_calls.end_client()
            self.interception.end_client()
        elif self.primary.can_write_eof:
            self._database_calls.end_client()
            self.primary.write_eof()
            self._see_it_end()
        elif self.relay.between_messages and not self._is_replication:
            self._database_calls.end_client()
            self.primary.write(Terminate().serialize())
            self._see_it_end()
        else:
            self.close()

    def _hung_up(self) -> None:
        """The client has left messages behind that are not read yet."""
        if self.interception is not None:
            self.interception.interrupts.client_hung_up()
        else:
            self._database_calls.end_client()

    def _see_it_end(self) -> None:
        """The server knows that the client has left, and closes the connection once it has done its
        work. If it waits for more instead, we close."""
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
        """Pass on the server's last message to the client, and say that the server is gone."""
        if self._login is not None:
            self._login.server_ended()
            return
        if self.interception is not None:
            self.interception.server_lost(ConnectionError("the server closed the connection"))
            self.client.write(self.interception.unread_server_messages())
        self.close()

    def shut_down(self) -> None:
        """End the session as a server does that shuts down, even within a statement."""
        self._ends_statement = True
        self._refuse(
            SQLError(ADMIN_SHUTDOWN, "terminating connection due to administrator command")
        )

    def close(self) -> None:
        """Close both connections; the jobs run on."""
        if self._is_closed:
            return
        self._is_closed = True
        sqlstate = self._login.sqlstate if self._login is not None else None
        self._log.ended(self._sqlstate or sqlstate, self._config)
        self._services.session_ended(self, self._key)
        self._stop_timer()
        # A cancel request is passed on even if its sender has left.
        if self._task is not None and not self._is_cancel_request:
            self._task.cancel()
        if self._leaving is not None:
            self._leaving.cancel()
        if may_be_asked := self._key is not None and self._may_be_asked:
            # Its function would wait for an answer that never comes.
            self.service.cancel_statement(self.route, self._key)
        self._database_calls.statement_ended()
        if self._key is not None:
            self.transaction_lost(self._key.pid)
        self.jobs.clear()
        self._reuse.close()
        self.client.close()
        if self.primary is None:
            return
        if may_be_asked:
            # If the statement has not begun, the request comes too early for it. Then its function
            # must not be able to ask.
            self.primary.reset()
        elif self.primary.is_stopped_by_opposite:
            # It may wait for us to read, while we wait for it; nobody wants its output.
            self.primary.abort()
        else:
            self.primary.close()

    @property
    def _may_be_asked(self) -> bool:
        """Whether a function may be waiting for an answer, or its question be on its way."""
        if self._database_calls.is_asked:
            return True
        is_busy = self._relays and (self.relay.is_busy or self.interception is not None)
        return is_busy and (self._ends_statement or self._database_calls.has_called)


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
