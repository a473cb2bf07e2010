"""Launching a job on a spare or a new backend, with the launching session's role and settings.

Invariant: the backend logs in as the client did, with the same startup packet, and takes over what
the session has changed since. If any of that fails the launch fails; a job never runs with another
role or other settings than its session had, even behind a connection pooler.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from typing import TYPE_CHECKING, Final

from protocol.errors import INVALID_PARAMETER_VALUE, ProtocolViolation, ServerError, SQLError
from protocol.startup import StartupMessage
from proxy.auth.observer import LoginObserver
from proxy.backends.backend import Backend, no_backend, number, open_backend
from proxy.backends.channels import APPLICATION_NAME, Channel
from proxy.backends.identity import Login, StaleLoginError
from proxy.backends.route import Route
from proxy.backends.spares import LONGEST_COMMAND
from proxy.config.gucs import (
    DEFAULT_QUEUE_SIZE,
    JOB_SETTING,
    MAX_WORKERS,
    SESSION_SETTING,
    WORKER_TIMEOUT,
    Guc,
)
from proxy.extension.conversation import Secrets
from proxy.extension.nested import Nested
from proxy.jobs.context import Context, takeover_block, takeover_query
from proxy.jobs.job import Job, checked_queue_size
from proxy.log import logger

if TYPE_CHECKING:
    from proxy.jobs.owner import Owner
    from proxy.server import Server

_JOB_SETTING: Final = JOB_SETTING.encode()
_SESSION_SETTING: Final = SESSION_SETTING.encode()


class Launcher:
    """Launches the jobs of one session, or of one job."""

    def __init__(
        self,
        server: Server,
        startup: dict[bytes, bytes],
        route: Route,
        observer: LoginObserver,
        pid: int,
    ) -> None:
        """
        Args:
            server: what all sessions share.
            startup: the parameters of the session's StartupMessage.
            route: to its server.
            observer: of its login.
            pid: of its primary backend, or the job's.
        """
        self._server = server
        self._startup = startup
        self._route = route
        user = startup[b"user"]
        self._login = Login(route, startup.get(b"database") or user, user)
        self._observer = observer
        self.pid = pid

    async def launch(
        self,
        owner: Owner,
        sql: bytes,
        queue_size: int,
        context: Context,
        *,
        client_encoding: bytes,
        label: bytes | None,
        keep_rows: bool,
    ) -> Job:
        """Start a job in a new backend.

        Args:
            owner: whose it is.
            sql: what it runs.
            queue_size: in bytes; 0 or less for the setting's.
            context: of the call.
            client_encoding: of the SQL, and of the results.
            label: of the job.
            keep_rows: whether its rows are kept for somebody to fetch.

        Raises SQLError.
        """
        jobs = owner.jobs
        config = self._server.config
        jobs.check_limit(self.setting(MAX_WORKERS, context), config.max_session_workers)
        if b"database" in (lower := sql[: LONGEST_COMMAND + 1].lower()):
            self._server.leave_databases(lower)
        size = checked_queue_size(queue_size, self.setting(DEFAULT_QUEUE_SIZE, context))
        size = min(size, config.max_queue_size)
        backend = await self._backend(
            context,
            client_encoding=client_encoding,
            overrides={b"application_name": self._application_name(label)},
            worker_timeout=self.setting(WORKER_TIMEOUT, context),
            system_id=owner.system_id,
        )
        stop = functools.partial(
            self._server.cancel_statement, self._route, backend.cancel_request()
        )
        own_secrets = Secrets(backend.own_settings[_SESSION_SETTING])
        nested = Nested(self._server, self, owner, own_secrets, stop)

        def ended(job: Job) -> None:
            jobs.counts.ended(job)
            self._server.job_ended(job)

        job = Job(
            backend,
            sql,
            queue_size=size,
            role_id=context.role_id,
            cluster=owner.cluster,
            route=self._route,
            label=label,
            marker=backend.own_settings[_JOB_SETTING],
            keep_rows=keep_rows,
            budgets=self._server.budgets.of_role(self._user),
            nested=nested,
            on_finish=ended,
        )
        nested.launcher.pid = job.pid
        nested.output = job.output
        self._server.jobs.add(job)
        jobs.add(job)
        try:
            await job.start()
            await self._server.peers.announce(job.role_id)
        except asyncio.CancelledError:
            owner.drop(job)
            raise
        logger.debug("launched %r", job)
        return job

    def setting(self, setting: Guc, context: Context) -> int:
        """A setting of ours, as it is in a session. Raises SQLError 22023."""
        text = context.own_settings.get(setting.name, self._server.own_settings[setting.name])
        try:
            return setting.parse(text)
        except ValueError as error:
            raise SQLError(INVALID_PARAMETER_VALUE, str(error)) from None

    async def _backend(
        self,
        context: Context,
        *,
        client_encoding: bytes,
        overrides: dict[bytes, bytes],
        worker_timeout: int,
        system_id: bytes | None,
    ) -> Backend:
        """A backend that is ready for the job.

        Args:
            context: of the call.
            client_encoding: the session's.
            overrides: settings beside the session's.
            worker_timeout: in milliseconds, 0 for the session's statement_timeout.
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
        if worker_timeout:
            overrides[b"statement_timeout"] = b"%d" % worker_timeout
        open_one = functools.partial(self._open_side_backend, login)
        spares = self._server.spares
        is_stale = False
        while True:
            if is_stale:
                backend, is_spare = await spares.open_now(open_one), False
            else:
                key = (self._login, tuple(login.parameters.items()))
                backend, is_spare = await spares.take(key, open_one)
            try:
                if is_spare and system_id and backend.system_id not in (system_id, b""):
                    raise StaleLoginError("another server has the address now")
                await self._take_over(backend, context, overrides, is_spare=is_spare)
            except StaleLoginError as error:
                # Let the server judge a new login. The other spares are no better.
                logger.debug("the spares of %s are retired: %s", self._login, error)
                backend.terminate()
                spares.retire(lambda login: login == self._login)
                is_stale = True
                continue
            except ServerError as error:
                backend.terminate()
                if not error.is_fatal:
                    raise
                reason = str(error)
            except (ConnectionError, ProtocolViolation) as error:
                backend.terminate()
                reason = str(error)
            except BaseException:
                backend.terminate()
                raise
            else:
                return backend
            if not is_spare:
                raise no_backend(reason)
            # The spare had died unnoticed; try the next one.

    async def _take_over(
        self, backend: Backend, context: Context, overrides: dict[bytes, bytes], *, is_spare: bool
    ) -> None:
        """Give a backend the session's role and settings.

        Behind a connection pooler the next query may be for another server connection, unless a
        transaction is open: there the job runs in the transaction that has taken over.

        Raises StaleLoginError, ServerError, ConnectionError, ProtocolViolation.
        """
        ask = backend.row_as_before if is_spare else backend.row
        row = await ask(takeover_query(context, self._user, overrides, backend.pid))
        if number(row[0]) != backend.pid:
            # The pooler may have kept what the startup packet says from the server.
            overrides = overrides | backend.own_settings
            row = await backend.row(takeover_block(context, self._user, overrides))
            backend.pid = number(row[0])
            backend.is_pooled = True

    async def channel(self) -> Channel:
        """A channel to answer calls from inside the database.

        Raises SQLError, OSError.
        """
        _, database, user = self._login
        login = StartupMessage(
            {b"user": user, b"database": database, b"application_name": APPLICATION_NAME}
        )
        open_one = functools.partial(self._open, login)
        return await self._server.channels.lease(
            self._login,
            functools.partial(self._server.spares.open_now, open_one),
        )

    def for_job(self) -> Launcher:
        """One for what a job launches."""
        return Launcher(self._server, self._startup, self._route, self._observer, 0)

    def for_login(self, role: bytes) -> Launcher:
        """One for what code launches that runs as another role than the session's: it logs in with
        what the proxy has for that role, and with nothing of the session's."""
        startup = {**self._startup, b"user": role, b"database": self._login.database}
        observer = LoginObserver.of_code()
        return Launcher(self._server, startup, self._route, observer, self.pid)

    @property
    def address(self) -> bytes:
        """Of the server."""
        return repr(self._route.host).encode()

    @property
    def _user(self) -> bytes:
        return self._login.user

    def _application_name(self, label: bytes | None) -> bytes:
        return b"pg_background" if label is None else b"pg_background:%b:%d" % (label, self.pid)

    async def _open_side_backend(self, login: StartupMessage) -> Backend:
        """One that has its words from the startup packet: in SQL, monitors and the server's log
        would see them."""
        own_settings = {
            _JOB_SETTING: secrets.token_hex(16).encode(),
            _SESSION_SETTING: Secrets().setting,
        }
        backend = await self._open(StartupMessage({**login.parameters, **own_settings}))
        backend.own_settings = own_settings
        return backend

    async def _open(self, login: StartupMessage) -> Backend:
        server = self._server
        return await open_backend(
            functools.partial(server.dialer.connect_by, self._route),
            login,
            await server.credentials_of(*self._login, self._observer),
            server.config.connect_timeout,
        )
