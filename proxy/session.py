"""One client: its connection, its primary backend, its jobs.

The rule: the session decides who handles the two connections. First itself, for the startup
packets; then the relay; and for the length of a batch that holds a call, an interception. Whatever
ends one connection ends the other, and lets the jobs run on.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Final

from protocol.errors import (
    ADMIN_SHUTDOWN,
    CONNECTION_FAILURE,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PROTOCOL_VIOLATION,
    ProtocolViolation,
    SQLError,
)
from protocol.messages import BackendKeyData
from protocol.startup import (
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
    parse_startup_packet,
    startup_packet_length,
)
from proxy import encodings, lexer, statements
from proxy.asked import PARSE
from proxy.backend import ServerError, no_backend, open_backend
from proxy.connection import Connection
from proxy.context import Context, takeover_query
from proxy.credentials import LoginObserver
from proxy.fetch import JobFailed
from proxy.interception import Interception
from proxy.jobs import Job, Jobs, checked_queue_size
from proxy.lexer import LexError
from proxy.log import logger
from proxy.relay import AUTHENTICATION, Relay
from proxy.settings import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT, Setting
from proxy.unserved import unserved

if TYPE_CHECKING:
    from proxy.server import Server

# How a client says that it wants no replication.
_FALSE: Final = (b"false", b"off", b"no", b"0", b"f", b"n")

# What sets a custom setting, in lower-case SQL: SET [SESSION | LOCAL] a.b = …, set_config('a.b', …
_CUSTOM_SETTING: Final = re.compile(
    rb"""\bset\s+(?:session\s+|local\s+)?("?[a-z_\x80-\xff][\w$\x80-\xff]*"?\."?[\w$.\x80-\xff]+"?)"""
    rb"""|\bset_config\s*\(\s*'([^']+\.[^']+)'"""
)


class Session:
    """A client and what it has.

    Attributes:
        address: host and port of its server.
        jobs: those that it launched and has not fetched or detached.
        custom_settings: names with a dot that it may have set.
        interception: what serves a batch with a call, as long as that lasts.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.client = Connection(self._startup_data, self._ended, self._lost)
        self.primary: Connection | None = None
        self.jobs = Jobs()
        self.custom_settings: dict[bytes, None] = {}
        self._startup: StartupMessage | None = None
        self.address: tuple[str, int] = server.config.upstream.hosts[0]
        self._login = LoginObserver()
        self._key: CancelRequest | None = None
        self._received = bytearray()
        self._task: asyncio.Task[None] | None = None
        self.interception: Interception | None = None
        server.sessions.add(self)

    # Startup packets

    def _startup_data(self, data: bytes) -> None:
        self._received += data
        try:
            self._startup_packets()
        except ProtocolViolation as error:
            self._refuse(SQLError(PROTOCOL_VIOLATION, str(error), severity="FATAL"))

    def _startup_packets(self) -> None:
        while len(self._received) >= 4 and self._task is None:
            size = 4 + startup_packet_length(bytes(self._received[:4]))
            if len(self._received) < size:
                return
            packet = parse_startup_packet(bytes(self._received[4:size]))
            del self._received[:size]
            match packet:
                case SSLRequest() | GSSENCRequest():
                    self.client.write(b"N")
                case CancelRequest():
                    self._task = self._spawn(self._cancel(packet))
                case StartupMessage():
                    self.client.pause_reading()
                    self._task = self._spawn(self._connect(packet))

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._guard(work))

    async def _guard(self, work: Coroutine[object, object, None]) -> None:
        """Whatever goes wrong in a session ends this session, and is logged."""
        try:
            await work
        except ConnectionError as error:
            logger.debug("session ended: %s", error)
            self.close()
        except ProtocolViolation as error:
            self._refuse(SQLError(PROTOCOL_VIOLATION, str(error), severity="FATAL"))
        except Exception:
            logger.exception("internal error; the session is closed")
            self._refuse(SQLError(INTERNAL_ERROR, "internal error of the proxy", severity="FATAL"))

    async def _cancel(self, request: CancelRequest) -> None:
        await self._server.cancel(request)
        self.client.close()

    async def _connect(self, startup: StartupMessage) -> None:
        self._startup = startup
        try:
            self.address, self.primary = await self._server.connect_upstream(
                lambda: Connection(self._no_data, self._ended, self._lost)
            )
        except (OSError, TimeoutError) as error:
            self._refuse(
                SQLError(
                    CONNECTION_FAILURE,
                    "could not connect to the server behind the proxy",
                    detail=f"{error}",
                    severity="FATAL",
                )
            )
            return
        self.relay = Relay(self.client, self.primary, self)
        self.primary.opposite = self.client
        self.client.opposite = self.primary
        self.primary.receive = self.relay.from_server
        if startup.parameters.get(b"replication", b"false") in _FALSE:
            startup = self._with_own_settings(startup)
            self.client.receive = self.relay.from_client
        else:
            self.client.receive = self.primary.write
        self.primary.write(startup.serialize())
        self._task = None
        received, self._received = bytes(self._received), bytearray()
        if received:
            self.client.receive(received)
        self.client.resume_reading()

    def _with_own_settings(self, startup: StartupMessage) -> StartupMessage:
        """Give the session our settings, so that SHOW, SET and RESET work; its own words win."""
        given = startup.parameters
        options = given.get(b"options", b"")
        ours = {
            name.encode(): value.encode()
            for name, value in self._server.own_settings.items()
            if name.encode() not in options
        }
        return StartupMessage({**ours, **given}, startup.version)

    def _no_data(self, data: bytes) -> None:
        raise ProtocolViolation("the server spoke first")

    def _refuse(self, error: SQLError) -> None:
        """A last word to the client."""
        self.client.write(error.response().serialize())
        self.close()

    # What the relay tells

    def login_request(self, body: bytes) -> None:
        self._login.backend_message(AUTHENTICATION, body)

    def login_response(self, body: bytes) -> None:
        self._login.frontend_message(body)

    def backend_key(self, body: bytes) -> None:
        key = BackendKeyData.parse(body)
        self._key = CancelRequest(key.pid, key.secret_key)
        self._server.keys[self._key] = self

    def has_call(self, kind: int, body: bytes) -> bool:
        sql = body.partition(b"\0")[2] if kind == PARSE else body
        sql = sql.partition(b"\0")[0]
        return any(self.analyze(text) is not None for _, text in self.split(sql))

    def settings_mentioned(self, sql: bytes) -> None:
        for plain, argument in _CUSTOM_SETTING.findall(sql):
            name = (plain or argument).replace(b'"', b"")
            if b"." in name:
                self.custom_settings[name] = None

    def complaint(self, error: bytes) -> bytes | None:
        return unserved(error)

    def take_over(self, data: bytes) -> None:
        self.interception = Interception(self, data)
        self._task = self._spawn(self._intercept(self.interception))

    async def _intercept(self, interception: Interception) -> None:
        await interception.run()
        self.interception = self._task = None
        interception.hand_back()
        if interception.client_ended:
            self._ended(self.client)

    # What an interception asks for

    @property
    def codec(self) -> str:
        """The Python codec of the client_encoding."""
        return encodings.codec(self.relay.parameters.get(b"client_encoding", b""))

    @property
    def server_version(self) -> int:
        """As server_version_num has it, without the minor version: 90500, 150000."""
        match = re.match(rb"(\d+)(?:\.(\d+))?", self.relay.parameters.get(b"server_version", b""))
        if match is None:
            return 0
        major = int(match[1])
        return major * 10000 + (int(match[2] or 0) * 100 if major < 10 else 0)

    def split(self, sql: bytes) -> list[tuple[int, bytes]]:
        """The statements of a Query string and where they begin; all as one if it is no SQL."""
        try:
            parts = lexer.split(
                sql,
                standard_conforming_strings=self._standard_conforming_strings,
                encoding=self._encoding,
            )
        except LexError:
            return [(0, sql)]
        return [(part.start, sql[part.start : part.end]) for part in parts]

    def analyze(self, sql: bytes) -> statements.Plan | None:
        """How to serve a statement; None if it holds no call that we serve."""
        return statements.analyze(
            sql,
            standard_conforming_strings=self._standard_conforming_strings,
            encoding=self._encoding,
        )

    @property
    def _standard_conforming_strings(self) -> bool:
        return self.relay.parameters.get(b"standard_conforming_strings") != b"off"

    @property
    def _encoding(self) -> str:
        return self.relay.parameters.get(b"client_encoding", b"").decode("ascii", "replace")

    async def launch(self, sql: bytes, queue_size: int, context: Context) -> Job:
        """Start a job in a new backend, with the session's role and settings.

        Raises SQLError.
        """
        server = self._server
        self.jobs.check_limit(self._setting(MAX_WORKERS, context))
        size = checked_queue_size(queue_size, self._setting(DEFAULT_QUEUE_SIZE, context))
        timeout = self._setting(WORKER_TIMEOUT, context)
        assert self._startup is not None
        login = {
            **self._startup.parameters,
            b"client_encoding": self.relay.parameters.get(b"client_encoding", b"UTF8"),
            b"application_name": b"pg_background",
        }
        user = login[b"user"]
        backend = await open_backend(
            functools.partial(server.connect, self.address),
            StartupMessage(login),
            server.credentials.credentials(
                *self.address, login.get(b"database", user), user, self._login
            ),
            server.config.connect_timeout,
        )
        try:
            overrides = {b"statement_timeout": b"%d" % timeout} if timeout else {}
            row = await backend.query(takeover_query(context, user, overrides))
            backend.pid = int(row[0] or 0)
        except ServerError as error:
            backend.terminate()
            if error.is_fatal:
                raise no_backend(str(error)) from None
            raise JobFailed(error.response) from None
        except (ConnectionError, ProtocolViolation) as error:
            backend.terminate()
            raise no_backend(str(error)) from None
        except BaseException:
            backend.terminate()
            raise
        job = Job(
            backend,
            sql,
            queue_size=size,
            role_id=context.role_id,
            address=self.address,
            on_finish=server.job_ended,
        )
        server.jobs.add(job)
        self.jobs.add(job)
        job.start()
        logger.debug("launched %r", job)
        return job

    def _setting(self, setting: Setting, context: Context) -> int:
        text = context.own_settings.get(setting.name, self._server.own_settings[setting.name])
        try:
            return setting.parse(text)
        except ValueError as error:
            raise SQLError(INVALID_PARAMETER_VALUE, str(error)) from None

    # The end

    def _ended(self, connection: Connection) -> None:
        """One side will send no more. If it is the client, the server may still have to answer."""
        if connection is self.primary:
            self._primary_lost()
        elif self.primary is None:
            self.close()
        elif self.interception is not None:
            self.interception.end_client()
        else:
            self.primary.write_eof()

    def _lost(self, connection: Connection, error: Exception | None) -> None:
        if connection is self.primary:
            self._primary_lost()
        else:
            self.close()

    def _primary_lost(self) -> None:
        """Tell the client what the server said last, and that it is gone."""
        if self.interception is not None:
            self.interception.server_lost(ConnectionError("the server closed the connection"))
            self.client.write(self.interception.last_words())
        self.close()

    def shut_down(self) -> None:
        """End the session as a server does that shuts down."""
        self._refuse(
            SQLError(
                ADMIN_SHUTDOWN,
                "terminating connection due to administrator command",
                severity="FATAL",
            )
        )

    def close(self) -> None:
        """Close both connections; the jobs run on."""
        if self not in self._server.sessions:
            return
        self._server.session_ended(self)
        if self._key is not None:
            self._server.keys.pop(self._key, None)
        # A cancel request, which comes without a startup packet, is passed on also if whoever has
        # sent it does not wait.
        if self._task is not None and self._startup is not None:
            self._task.cancel()
        self.jobs.clear()
        self.client.close()
        if self.primary is not None:
            self.primary.close()
