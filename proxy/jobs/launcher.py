"""Provides the backend for a job, with the launching session's role and settings.

It is that of an earlier job of the session, a spare, or a new one.

Invariant: the backend logs in as the client did, with the same startup packet, and takes over what
the session has changed since; a spare in the write that brings its job (`backends.session_setup`).
If any of that fails, the launch fails: a job never runs with another role or other settings than
its session's, not even behind a connection pooler.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from protocol.errors import (
    INVALID_PARAMETER_VALUE,
    INVALID_PASSWORD,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.startup import StartupMessage
from proxy.auth.observer import LoginObserver
from proxy.backends.backend import Backend, no_backend, number, open_backend
from proxy.backends.channels import APPLICATION_NAME, Channel
from proxy.backends.identity import Login, StaleLoginError
from proxy.backends.listener import APPLICATION_NAME as LISTENER_NAME
from proxy.backends.reuse import STYLES, KeepBackend, Reuse
from proxy.backends.route import Route
from proxy.backends.session_setup import SessionSetup
from proxy.config.gucs import (
    GUCS,
    JOB_SETTING,
    SESSION_SETTING,
    WORKER_TIMEOUT,
    Guc,
    session_secret,
)
from proxy.jobs.context import Context, setup_block, setup_query
from proxy.jobs.service import JobService
from proxy.log import logger
from proxy.reasons import explain
from proxy.sql.lexer import READING

T = TypeVar("T")


_USUAL_LENGTH: Final = 32
"""Characters of a setting's text that is remembered. White space may make one as long as it likes.
"""


@functools.lru_cache(maxsize=256)
def _parse(setting: Guc, text: str) -> int:
    # A launch reads some settings, which are hardly ever different from the last one's.
    return setting.parse(text)


class Launcher:
    """Opens the backends for the jobs of one session, or of one job.

    Attributes:
        route: to its server.
        user: the login role.
        login: of the jobs' backends.
        reuse: its backends whose jobs have ended.
    """

    def __init__(
        self,
        service: JobService,
        startup: dict[bytes, bytes],
        route: Route,
        observer: LoginObserver,
        pid: int,
        reuse: Reuse,
    ) -> None:
        """
        Args:
            service: shared by all sessions.
            startup: the parameters of the session's StartupMessage.
            route: to its server.
            observer: of its login.
            pid: of its primary backend, or the job's.
            reuse: its backends whose jobs have ended.
        """
        self._service = service
        self._startup = startup
        self.route = route
        self.user = startup[b"user"]
        self.login = Login(route, startup.get(b"database") or self.user, self.user)
        self._observer = observer
        self.pid = pid
        self.reuse = reuse

    @property
    def database(self) -> bytes:
        """The database of that login."""
        return self.login.database

    async def launch(
        self,
        begin: Callable[[Backend, KeepBackend], Awaitable[T]],
        context: Context,
        *,
        client_encoding: bytes,
        label: bytes | None,
        system_id: bytes | None,
    ) -> T:
        """Begin a job on a ready backend.

        Args:
            begin: sends the job, and has the backend kept at its end. Called again with another
                backend if it raises what `Backend.start` raises.
            context: of the call.
            client_encoding: of the SQL and the results.
            label: of the job.
            system_id: of the session's database cluster, if known.

        Raises SQLError: no backend can be had, or it cannot take over the session's settings.
        """
        login = StartupMessage(
            {
                **self._startup,
                b"client_encoding": client_encoding,
                # A job's own application_name is set when it takes over.
                b"application_name": b"pg_background starting",
            }
        )
        name = b"pg_background" if label is None else b"pg_background:%b:%d" % (label, self.pid)
        overrides = {b"application_name": name, **self._own_settings(context)}
        if worker_timeout := self.setting(WORKER_TIMEOUT, context):
            overrides[b"statement_timeout"] = b"%d" % worker_timeout
        open_one = functools.partial(self._open_side_backend, login)
        key = (self.login, tuple(login.parameters.items()))
        spares = self._service.spares
        is_stale = False
        while True:
            if is_stale:
                backend, is_spare = await spares.open_now(open_one), False
            elif (kept := self.reuse.take(key)) is not None:
                backend, is_spare = kept, True
            else:
                backend, is_spare = await spares.take(key, open_one)
            is_begun = False
            try:
                if is_spare and system_id and backend.system_id not in (system_id, b""):
                    raise StaleLoginError("another server has the address now")
                await self._make_ready(backend, context, overrides, is_spare=is_spare)
                is_begun = True
                return await begin(backend, functools.partial(self.reuse.keep, key))
            except StaleLoginError as error:
                # Let the server judge a new login; the other spares are just as stale.
                logger.debug("the spares of %s are retired: %s", self.login, explain(error))
                backend.terminate()
                spares.retire(self.login)
                is_stale = True
            except (ServerError, ConnectionError, ProtocolViolation) as error:
                backend.terminate()
                if isinstance(error, ServerError) and not error.is_fatal:
                    raise
                if not is_spare:
                    raise no_backend(explain(error)) from None
                # The spare died unnoticed; try the next one.
            except BaseException:
                if not is_begun:  # closing alone would not stop what was sent
                    backend.terminate()
                raise

    async def _make_ready(
        self, backend: Backend, context: Context, overrides: dict[bytes, bytes], *, is_spare: bool
    ) -> None:
        """Have a backend take over the session's role and settings: a spare when its job begins, in
        the same write; another now.

        Behind a connection pooler the next query may reach another server connection unless a
        transaction is open; there the job runs in the transaction that has taken over.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        query = setup_query(context, self.user, overrides, backend.pid)
        if is_spare:
            reading = [(name, value) for name, value in context.settings if name in READING]
            changes = any(backend.parameters.get(name) != value for name, value in reading)
            backend.setup = SessionSetup(query, changes)
            # The server reports them at the end of the job, but rows may be read before.
            styles = {name: value for name, value in context.settings if name in STYLES}
            backend.parameters.update(styles)
            return
        row = await backend.row(query)
        if number(row[0]) != backend.pid:
            # The pooler may not have passed the startup packet's settings to the server.
            overrides = overrides | backend.own_settings | {SESSION_SETTING: b""}
            row = await backend.row(setup_block(context, self.user, overrides))
            backend.pid = number(row[0])
            backend.is_pooled = True
        backend.setup_row = row

    def setting(self, setting: Guc, context: Context) -> int:
        """The value of one of our settings in the session. Raises SQLError 22023."""
        try:
            text = self._text(setting.name, context)
            return _parse(setting, text) if len(text) <= _USUAL_LENGTH else setting.parse(text)
        except ValueError as error:
            raise SQLError(INVALID_PARAMETER_VALUE, str(error)) from None

    def _text(self, name: str, context: Context) -> str:
        # RESET ALL leaves a setting empty unless the server's configuration sets it.
        default = self._service.runtime.config.session_defaults[name]
        return context.own_settings.get(name) or default

    def _own_settings(self, context: Context) -> dict[bytes, bytes]:
        """Our settings for a job's session, which gets no defaults."""
        return {name.encode(): self._text(name, context).encode() for name in GUCS}

    async def channel(self) -> Channel:
        """A channel to answer calls from inside the database.

        Raises SQLError, OSError.
        """
        _, database, user = self.login
        login = StartupMessage(
            {b"user": user, b"database": database, b"application_name": APPLICATION_NAME}
        )
        open_one = functools.partial(self._open, login)
        return await self._service.channels.lease(
            self.login, functools.partial(self._service.spares.open_now, open_one)
        )

    async def open_listener(self) -> Backend:
        """A backend for LISTEN. Raises SQLError."""
        _, database, user = self.login
        name = LISTENER_NAME
        login = StartupMessage({b"user": user, b"database": database, b"application_name": name})
        return await self._service.spares.open_now(functools.partial(self._open, login))

    def idle_channel(self, pid: int) -> Channel | None:
        """The channel with this pid, if it is idle and shows a word."""
        return self._service.channels.take(self.login, pid)

    def for_job(self, pid: int) -> Launcher:
        """The launcher for a job whose backend has this pid."""
        reuse = Reuse(self._service.spares)
        return Launcher(self._service, self._startup, self.route, self._observer, pid, reuse)

    def for_login(self, role: bytes) -> Launcher:
        """The launcher for code that runs as another role than the session's: it logs in with the
        proxy's credentials for that role, and with none of the session's."""
        startup = {**self._startup, b"user": role, b"database": self.login.database}
        observer = LoginObserver.of_code()
        return Launcher(self._service, startup, self.route, observer, self.pid, self.reuse)

    async def _open_side_backend(self, login: StartupMessage) -> Backend:
        """A backend that gets its words in the startup packet, which no log or monitor shows."""
        own_settings = {
            JOB_SETTING: secrets.token_hex(16).encode(),
            SESSION_SETTING: session_secret(),
        }
        backend = await self._open(StartupMessage({**login.parameters, **own_settings}))
        backend.own_settings = own_settings
        return backend

    async def _open(self, login: StartupMessage) -> Backend:
        runtime = self._service.runtime
        credentials = await runtime.credentials_of(*self.login, self._observer)
        try:
            return await open_backend(
                functools.partial(runtime.dialer.connect_by, self.route),
                login,
                credentials,
                runtime.config.connect_timeout,
            )
        except SQLError as error:
            if error.sqlstate == INVALID_PASSWORD:
                _, database, user = self.login
                runtime.password_command.forget(self.route.host, database, user)
            raise
