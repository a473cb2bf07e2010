"""How a job gets its backend: a spare or a fresh one, made into one of the session that launches.

The rule: the backend logs in as the client did, with the same startup packet, and takes over what
the session has changed since. If any of that fails the launch fails; a job never runs with another
role or other settings than its session had.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from protocol.startup import StartupMessage
from proxy.backend import Backend, ServerError, no_backend, open_backend
from proxy.context import Context, takeover_query
from proxy.credentials import LoginObserver
from proxy.fetch import JobFailed
from proxy.upstream import Route

if TYPE_CHECKING:
    from proxy.server import Server


class Launcher:
    """Gets the backends for one session's jobs."""

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
            pid: of its primary backend.
        """
        self._server = server
        self._startup = startup
        self._route = route
        self._observer = observer
        self._pid = pid

    async def backend(
        self,
        context: Context,
        *,
        client_encoding: bytes,
        label: bytes | None,
        worker_timeout: int,
    ) -> Backend:
        """A backend that is ready for the job.

        Args:
            context: of the call.
            client_encoding: the session's.
            label: of the job.
            worker_timeout: in milliseconds, 0 for the session's statement_timeout.

        Raises SQLError: there is none to be had, or it cannot take over the session's settings.
        """
        login = StartupMessage(
            {
                **self._startup,
                b"client_encoding": client_encoding,
                b"application_name": b"pg_background",
            }
        )
        overrides = {b"application_name": self._application_name(label)}
        if worker_timeout:
            overrides[b"statement_timeout"] = b"%d" % worker_timeout
        takeover = takeover_query(context, self._user, overrides)
        open_one = functools.partial(self._open, login)
        key = (self._route, *login.parameters.items())
        while True:
            backend, is_spare = await self._server.spares.take(key, open_one)
            try:
                row = await backend.query(takeover)
                backend.pid = int(row[0] or 0)
            except ServerError as error:
                backend.terminate()
                if not error.is_fatal:
                    raise JobFailed(error.response) from None
                reason = str(error)
            except (ConnectionError, ValueError, LookupError) as error:
                # The last two, ProtocolViolation among them, are about an answer that is none.
                backend.terminate()
                reason = str(error)
            except BaseException:
                backend.terminate()
                raise
            else:
                return backend
            if not is_spare:
                raise no_backend(reason)
            # It was lost while nobody looked: that is no reason to fail.

    @property
    def _user(self) -> bytes:
        return self._startup[b"user"]

    def _application_name(self, label: bytes | None) -> bytes:
        return b"pg_background" if label is None else b"pg_background:%b:%d" % (label, self._pid)

    async def _open(self, login: StartupMessage) -> Backend:
        server = self._server
        database = self._startup.get(b"database", self._user)
        return await open_backend(
            functools.partial(server.dialer.connect_by, self._route),
            login,
            await server.credentials_of(self._route, database, self._user, self._observer),
            server.config.connect_timeout,
        )
