"""Launching a job on a spare or a new backend, with the launching session's role and settings.

Invariant: the backend logs in as the client did, with the same startup packet, and takes over what
the session has changed since. If any of that fails the launch fails; a job never runs with another
role or other settings than its session had, even behind a connection pooler.
"""

from __future__ import annotations

import functools
import secrets

from protocol.errors import INVALID_PARAMETER_VALUE, ProtocolViolation, ServerError, SQLError
from protocol.startup import StartupMessage
from proxy.auth.observer import LoginObserver
from proxy.backends.backend import Backend, no_backend, number, open_backend
from proxy.backends.channels import APPLICATION_NAME, Channel
from proxy.backends.identity import Login, StaleLoginError
from proxy.backends.route import Route
from proxy.config.gucs import JOB_SETTING, SESSION_SETTING, WORKER_TIMEOUT, Guc, session_secret
from proxy.jobs.context import Context, takeover_block, takeover_query
from proxy.jobs.service import JobService
from proxy.log import logger


class Launcher:
    """Opens the backends for the jobs of one session, or of one job."""

    def __init__(
        self,
        service: JobService,
        startup: dict[bytes, bytes],
        route: Route,
        observer: LoginObserver,
        pid: int,
    ) -> None:
        """
        Args:
            service: what all sessions share.
            startup: the parameters of the session's StartupMessage.
            route: to its server.
            observer: of its login.
            pid: of its primary backend, or the job's.
        """
        self._service = service
        self._startup = startup
        self.route = route
        self.user = startup[b"user"]
        self._login = Login(route, startup.get(b"database") or self.user, self.user)
        self._observer = observer
        self.pid = pid

    async def backend(
        self,
        context: Context,
        *,
        client_encoding: bytes,
        label: bytes | None,
        system_id: bytes | None,
    ) -> Backend:
        """A backend that is ready for a job.

        Args:
            context: of the call.
            client_encoding: of the SQL, and of the results.
            label: of the job.
            system_id: of the session's database cluster, if it is known.

        Raises SQLError: there is none to be had, or it cannot take over the session's settings.
        """
        login = StartupMessage(
            {
                **self._startup,
                b"client_encoding": client_encoding,
                # Its own name, as jobs have it, comes with what it takes over.
                b"application_name": b"pg_background starting",
            }
        )
        name = b"pg_background" if label is None else b"pg_background:%b:%d" % (label, self.pid)
        overrides = {b"application_name": name}
        if worker_timeout := self.setting(WORKER_TIMEOUT, context):
            overrides[b"statement_timeout"] = b"%d" % worker_timeout
        return await self._taken_over(login, context, overrides, system_id)

    async def _taken_over(
        self,
        login: StartupMessage,
        context: Context,
        overrides: dict[bytes, bytes],
        system_id: bytes | None,
    ) -> Backend:
        """A spare or, if none will do, a new backend, that has taken over the session's state.

        Raises SQLError.
        """
        open_one = functools.partial(self._open_side_backend, login)
        key = (self._login, tuple(login.parameters.items()))
        spares = self._service.spares
        is_stale = False
        while True:
            if is_stale:
                backend, is_spare = await spares.open_now(open_one), False
            else:
                backend, is_spare = await spares.take(key, open_one)
            try:
                if is_spare and system_id and backend.system_id not in (system_id, b""):
                    raise StaleLoginError("another server has the address now")
                await self._take_over(backend, context, overrides, is_spare=is_spare)
            except StaleLoginError as error:
                # Let the server judge a new login. The other spares are no better.
                logger.debug("the spares of %s are retired: %s", self._login, error)
                backend.terminate()
                spares.retire(self._login)
                is_stale = True
            except (ServerError, ConnectionError, ProtocolViolation) as error:
                backend.terminate()
                if isinstance(error, ServerError) and not error.is_fatal:
                    raise
                if not is_spare:
                    raise no_backend(str(error)) from None
                # The spare had died unnoticed; try the next one.
            except BaseException:
                backend.terminate()
                raise
            else:
                return backend

    async def _take_over(
        self, backend: Backend, context: Context, overrides: dict[bytes, bytes], *, is_spare: bool
    ) -> None:
        """Give a backend the session's role and settings.

        Behind a connection pooler the next query may be for another server connection, unless a
        transaction is open: there the job runs in the transaction that has taken over.

        Raises StaleLoginError, ServerError, ConnectionError, ProtocolViolation.
        """
        ask = backend.row_as_before if is_spare else backend.row
        row = await ask(takeover_query(context, self.user, overrides, backend.pid))
        if number(row[0]) != backend.pid:
            # The pooler may have kept what the startup packet says from the server.
            overrides = overrides | backend.own_settings
            row = await backend.row(takeover_block(context, self.user, overrides))
            backend.pid = number(row[0])
            backend.is_pooled = True

    def setting(self, setting: Guc, context: Context) -> int:
        """A setting of ours, as it is in a session. Raises SQLError 22023."""
        default = self._service.runtime.own_settings[setting.name]
        text = context.own_settings.get(setting.name, default)
        try:
            return setting.parse(text)
        except ValueError as error:
            raise SQLError(INVALID_PARAMETER_VALUE, str(error)) from None

    async def channel(self) -> Channel:
        """A channel to answer calls from inside the database.

        Raises SQLError, OSError.
        """
        _, database, user = self._login
        login = StartupMessage(
            {b"user": user, b"database": database, b"application_name": APPLICATION_NAME}
        )
        open_one = functools.partial(self._open, login)
        return await self._service.channels.lease(
            self._login, functools.partial(self._service.spares.open_now, open_one)
        )

    def for_job(self, pid: int) -> Launcher:
        """One for what a job launches, whose backend has this PID."""
        return Launcher(self._service, self._startup, self.route, self._observer, pid)

    def for_login(self, role: bytes) -> Launcher:
        """One for what code launches that runs as another role than the session's: it logs in with
        what the proxy has for that role, and with nothing of the session's."""
        startup = {**self._startup, b"user": role, b"database": self._login.database}
        observer = LoginObserver.of_code()
        return Launcher(self._service, startup, self.route, observer, self.pid)

    async def _open_side_backend(self, login: StartupMessage) -> Backend:
        """One that has its words from the startup packet: in SQL, monitors and the server's log
        would see them."""
        own_settings = {
            JOB_SETTING: secrets.token_hex(16).encode(),
            SESSION_SETTING: session_secret(),
        }
        backend = await self._open(StartupMessage({**login.parameters, **own_settings}))
        backend.own_settings = own_settings
        return backend

    async def _open(self, login: StartupMessage) -> Backend:
        runtime = self._service.runtime
        return await open_backend(
            functools.partial(runtime.dialer.connect_by, self.route),
            login,
            await runtime.credentials_of(*self._login, self._observer),
            runtime.config.connect_timeout,
        )
