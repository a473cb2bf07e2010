"""One client: its connection, its primary backend, its jobs.

Invariant: one part at a time handles the two connections; only the relay already sees what the
server says at the end of the start, and until an interception begins to serve. The end of one
connection ends the other; the jobs run on.

============ ================================== ============ =======================================
phase        event                              next         when the client ends
============ ================================== ============ =======================================
SessionStart the server has let the client in,  Relay        see `session_start`
             and is ready for its first query
Relay        a batch with a call (`take_over`)  Interception the server is told, after all that the
                                                             client has sent; if it cannot be told,
                                                             the session is closed
Interception the end of the batch               Relay        the rest is answered, no job is awaited
any          the loss of either connection, an  None         nothing: the session is closed
             error, shutdown, the end of a
             cancel request or of the console
             (`close`)
============ ================================== ============ =======================================

A session that is closed stays closed: what arrives, or was held, is dropped.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Final

from protocol.errors import (
    ADMIN_SHUTDOWN,
    INTERNAL_ERROR,
    PROTOCOL_VIOLATION,
    ProtocolViolation,
    SQLError,
)
from protocol.framing import HEADER_SIZE
from protocol.kinds import TransactionStatus
from protocol.messages import BackendKeyData, ErrorResponse, Terminate
from protocol.startup import CancelRequest, StartupMessage
from proxy.auth.observer import LoginObserver
from proxy.backends import pooler
from proxy.backends.backend import Backend
from proxy.backends.reuse import Reuse
from proxy.backends.route import Route
from proxy.config import Config
from proxy.extension.conversation import Secrets
from proxy.extension.in_database import DatabaseCalls
from proxy.extension.job_session import JobSession
from proxy.jobs.at_commit import cannot_prepare
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.launcher import Launcher
from proxy.log import logger
from proxy.net.connection import Connection
from proxy.net.peer import Peer
from proxy.reasons import explain
from proxy.session.custom_settings import CustomSettings
from proxy.session.extension_state import ExtensionState
from proxy.session.interception import TO_LEAVE, Interception
from proxy.session.named import NamedStatements
from proxy.session.reader import SqlReader
from proxy.session.relay import Relay
from proxy.session.reported import ReportedSettings
from proxy.session.services import Services, SessionSummary
from proxy.session.session_log import SessionLog
from proxy.session.session_start import SessionStart, Stage, StartingSession
from proxy.statements.plan import Statement
from proxy.statements.unserved import unavailable, unserved
from proxy.stats import counters

_numbers = itertools.count(1)

_IDLE_STATUS: Final = int(TransactionStatus.IDLE)
"""A constant, since each statement is compared with it, and an attribute is slower."""
_IDLE: Final = {
    TransactionStatus.IDLE: "idle",
    TransactionStatus.IN_BLOCK: "idle in transaction",
    TransactionStatus.FAILED: "idle in transaction (aborted)",
}


class Session(StartingSession):
    """A client and what belongs to it.

    Attributes:
        route: to its server; before it is connected, to the first host.
        jobs: those that it launched and has not fetched or detached.
        watchword: the beginning of messages from inside the database.
        is_console: whether it is a console session, which has no server.
    """

    def __init__(self, services: Services) -> None:
        super().__init__(services.jobs)
        self._services = services
        self._number = next(_numbers)
        self._connected_at = datetime.now(UTC)
        self._sqlstate: str | None = None  # of the error that refused it
        self._key: CancelRequest | None = None
        self._task: asyncio.Task[None] | None = None  # runs the interception
        self._leaving: asyncio.TimerHandle | None = None
        self._reuse = Reuse(self.service.spares)
        self._database_calls = DatabaseCalls(self, Secrets())
        self.watchword = self._database_calls.secrets.token
        self.log = SessionLog()
        self.observer = LoginObserver()
        self.custom_settings = CustomSettings()
        self.reported = ReportedSettings()
        self.named = NamedStatements(self.reported, self.custom_settings)
        self.extension_state = ExtensionState(services)
        self.primary = None
        self.route = Route(services.runtime.config.upstream.hosts[0])
        self._phase: SessionStart | Relay | Interception | None
        self._phase = SessionStart(self, services, self._database_calls.secrets.setting)
        services.session_began(self)

    def received(self, peer: Peer) -> None:
        """The client has connected."""
        counters.connections += 1
        self.client.peer = peer
        self.log.received(peer, self._config)

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._guard(work))
        # If it was cancelled before it began:
        task.add_done_callback(lambda _: work.close())
        return task

    async def _guard(self, work: Coroutine[object, object, None]) -> None:
        """Log any error in the work, and end this session only."""
        try:
            await work
        except ConnectionError as error:
            logger.debug("session ended: %s", explain(error))
            self.close()
        except (ProtocolViolation, SQLError) as error:
            self.refuse(error)
        except Exception:
            logger.exception("internal error; the session is closed")
            self.refuse(SQLError(INTERNAL_ERROR, "internal error of the proxy"))

    # Called by the start

    def logged_in(self) -> Relay:
        assert self.primary is not None
        self.relay = Relay(self.client, self.primary, self)
        self.reader = SqlReader(
            *(self.reported, self.named, self.extension_state),
            lambda: self._config,
            self._pids_of_jobs,
        )
        return self.relay

    def start_ended(self) -> None:
        self._phase = self.relay

    def _pids_of_jobs(self) -> list[int]:
        """The pids of all jobs that run on this server."""
        running = self._services.jobs.registry.running
        return [job.backend_pid for job in running if job.route.host == self.route.host]

    # Called by the relay

    def backend_key(self, body: bytes) -> None:
        try:
            key = BackendKeyData.parse(body)
        except ProtocolViolation:
            return  # the client will report what is wrong with it
        self._key = CancelRequest(key.pid, key.secret_key)
        self.log.authorized(self.client, key.pid, self._config)
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
        if said is not None and self.is_pooled:
            return pooler.explained(ErrorResponse.parse(said[HEADER_SIZE:])).serialize()
        return said

    def complaint_from_inside(self, error: bytes) -> bytes | None:
        return self._database_calls.complaint(error)

    def take_over(self, data: bytes, statements: list[Statement]) -> None:
        if self._phase is not self.relay:
            return  # closed, and the relay had held this
        interception = self._phase = Interception(self, data, statements)
        self._task = self.spawn(self._intercept(interception))

    async def _intercept(self, interception: Interception) -> None:
        await interception.run()
        if self._phase is not interception:
            return  # it was closed meanwhile
        self._phase, self._task = self.relay, None
        interception.hand_back()
        if interception.interrupts.client_ended:
            self._client_ended()

    @property
    def _config(self) -> Config:
        return self._services.runtime.config

    @property
    def _is_replication(self) -> bool:
        return self.startup is not None and self.startup.is_replication

    @property
    def interrupts(self) -> Interrupts | None:
        return self._phase.interrupts if isinstance(self._phase, Interception) else None

    @property
    def summary(self) -> SessionSummary:
        startup = self.startup or StartupMessage({})
        return SessionSummary(
            self._number,
            startup.user,
            startup.database,
            startup.application_name,
            self._state,
            self._connected_at,
            self.pid,
            sum(1 for _ in self.jobs),
        )

    @property
    def _state(self) -> str:
        match self._phase:
            case SessionStart() if self.is_console:
                return "console"
            case SessionStart():
                return "login"
            case Relay() as relay if not relay.is_busy:
                return _IDLE.get(relay.status, "active")
            case _:
                return "active"

    @property
    def is_console(self) -> bool:
        phase = self._phase
        return isinstance(phase, SessionStart) and phase.stage is Stage.CONSOLE

    def job_session(self, launcher: Launcher, backend: Backend) -> JobSession:
        return JobSession(self, launcher, backend)

    async def inject(self, message: bytes) -> None:
        if not isinstance(self._phase, Interception) and not self.relay.at_boundary:
            return  # the caller did not wait for the answer
        self.client.write(message)
        if self.client.full is not None:
            await asyncio.wait([self.client.full])

    @functools.cached_property
    def launcher(self) -> Launcher:
        assert self.startup is not None
        assert self._key is not None
        return Launcher(
            *(self.service, self.startup.parameters, self.route, self.observer, self.pid),
            self._reuse,
        )

    # The end

    def ended(self, connection: Connection) -> None:
        if connection is self.primary:
            self._primary_lost()
        elif connection is self.client:
            self._client_ended()
        # Otherwise it is a server that we have left.

    def lost(self, connection: Connection, error: Exception | None) -> None:
        if connection is self.primary:
            self._primary_lost()
        elif connection is self.client:
            self.close()

    def hung_up(self) -> None:
        if (interrupts := self.interrupts) is not None:
            interrupts.client_hung_up()
        else:
            self._database_calls.end_client()

    def _client_ended(self) -> None:
        """The client will send no more. The server may still owe it answers."""
        match self._phase:
            case SessionStart() as start:
                start.client_ended()
            case Relay() as relay if relay.is_behind:
                # What it has sent before that comes first.
                asyncio.get_running_loop().call_soon(self._client_ended)
            case Relay() as relay:
                self._end_server(relay)
            case Interception() as interception:
                self._database_calls.end_client()
                interception.end_client()

    def _end_server(self, relay: Relay) -> None:
        """Let the server know that the client has left. It closes the connection once it has done
        its work. If it waits for more instead, we close."""
        assert self.primary is not None
        if self.primary.can_write_eof:
            self._database_calls.end_client()
            self.primary.write_eof()
            self._see_it_end()
        elif relay.between_messages and not self._is_replication:
            self._database_calls.end_client()
            self.primary.write(Terminate().serialize())
            self._see_it_end()
        else:
            self.close()

    def _see_it_end(self) -> None:
        self._leaving = asyncio.get_running_loop().call_later(TO_LEAVE, self._has_it_ended)

    def _has_it_ended(self) -> None:
        if self._is_replication or self.relay.is_busy:
            self._see_it_end()
        else:
            logger.debug("the server did not end with its client")
            self.close()

    def _primary_lost(self) -> None:
        """Pass on the server's last message to the client, and say that the server is gone."""
        match self._phase:
            case SessionStart() as start:
                start.server_ended()
            case Relay():
                self.close()
            case Interception() as interception:
                self.client.write(interception.unread_server_messages())
                self.close()

    def refuse(self, error: SQLError | ProtocolViolation) -> None:
        """Send the client a last error; none, like a server, if it may not know the protocol."""
        if isinstance(error, ProtocolViolation):
            if self.startup is None:
                logger.info("%s", error)
                self.close()
                return
            error = SQLError(PROTOCOL_VIOLATION, str(error))
        self._end(error)

    def shut_down(self) -> None:
        """End the session as a server does that shuts down, even within a statement."""
        reason = "terminating connection due to administrator command"
        self._end(SQLError(ADMIN_SHUTDOWN, reason), ends_statement=True)

    def _end(self, error: SQLError, *, ends_statement: bool = False) -> None:
        error.severity = "FATAL"
        self._sqlstate = error.sqlstate
        self.client.write(error.response().serialize())
        self.close(ends_statement=ends_statement)

    def close(self, *, ends_statement: bool = False) -> None:
        """Close both connections; the jobs run on. `ends_statement`: even within a statement."""
        if self._phase is None:
            return
        may_be_asked = self._may_be_asked(ends_statement=ends_statement)
        phase, self._phase = self._phase, None
        if isinstance(phase, SessionStart):
            self._sqlstate = self._sqlstate or phase.sqlstate
        self.log.ended(self._sqlstate, self._config)
        self._services.session_ended(self, self._key)
        if self._task is not None:
            self._task.cancel()
        if not isinstance(phase, Relay):
            phase.close()
        if self._leaving is not None:
            self._leaving.cancel()
        if self._key is not None and may_be_asked:
            # Its function would wait for an answer that never comes.
            self.service.cancel_statement(self.route, self._key)
        self._database_calls.statement_ended()
        self.transaction_lost(self.pid)
        self.jobs.clear()
        self._reuse.close()
        self.client.receive = _drop
        self.client.close()
        if self.primary is None:
            return
        self.primary.receive = _drop
        if may_be_asked:
            # If the statement has not begun, the request comes too early for it. Then its function
            # must not be able to ask.
            self.primary.reset()
        elif self.primary.is_stopped_by_opposite:
            # It may wait for us to read, while we wait for it; nobody wants its output.
            self.primary.abort()
        else:
            self.primary.close()

    def _may_be_asked(self, *, ends_statement: bool) -> bool:
        """Whether a function may be waiting for an answer, or its question be on its way."""
        if self._key is None:
            return False
        if self._database_calls.is_asked:
            return True
        match self._phase:
            case SessionStart():
                return False
            case Relay() as relay if not relay.is_busy:
                return False
            case _:
                return ends_statement or self._database_calls.has_called


def _drop(data: bytes) -> None:
    """Some event loops still hand over what arrives while a connection is closing."""
