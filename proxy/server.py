"""The proxy itself: it listens, makes a session of each client, and ends them all in good order.

The rule: what belongs to no single session is here: the listening sockets, the way to the server,
the cancel keys, and the jobs that are running, also those whose session has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal

from protocol.startup import CancelRequest
from proxy import tls
from proxy.auth_query import AuthQuery
from proxy.config import Config, ConfigError
from proxy.credentials import Credentials, CredentialStore, LoginObserver, Secret
from proxy.jobs import Job
from proxy.keepalive import Keepalive
from proxy.listeners import Listeners
from proxy.log import logger
from proxy.session import Session
from proxy.settings import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT
from proxy.upstream import Dialer, Route

_LAST_WORDS = 2.0
"""Seconds that connections get to send what is left when the time to shut down is over."""


class Server:
    """What all sessions share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sessions: set[Session] = set()
        self.jobs: set[Job] = set()
        self.keys: dict[CancelRequest, Session] = {}
        try:
            self.credentials = CredentialStore(config.passfile, config.auth_file)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.tls = tls.client_context(config)
        self.dialer = Dialer(config, self.credentials)
        self.auth_query = AuthQuery(config, self.dialer)
        self.own_settings = {
            MAX_WORKERS.name: str(config.max_workers),
            DEFAULT_QUEUE_SIZE.name: config.default_queue_size,
            WORKER_TIMEOUT.name: config.worker_timeout,
        }
        self._idle = asyncio.Event()

    # The way to the server

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel what waits in the proxy, or pass the request on to the server."""
        session = self.keys.get(request)
        call = session.interception if session is not None else None
        if call is not None and call.is_waiting:
            call.cancel()
            return
        await self.dialer.cancel(session.route if session is not None else None, request)
        # The server may have done its part of the call before it heard of this.
        if call is not None and call.is_calling:
            call.cancel()

    async def credentials_of(
        self, route: Route, database: bytes, user: bytes, login: LoginObserver
    ) -> Credentials:
        """What a role whose login was accepted can log in with once more."""
        find = functools.partial(
            self.credentials.credentials, route.host.name, route.host.port, database, user, login
        )
        found = find()
        asked = login.method is not None and self.auth_query.enabled
        if asked and found.password is None and found.secret is None:
            queried = await self.auth_query.secret(route.host, database, user)
            found = find(queried=queried, has_auth_query=True)
        return found

    async def secret_of(self, route: Route, database: bytes, user: bytes) -> Secret | None:
        """What is known of a role, to check a client with that claims to be it."""
        host = route.host
        found = self.credentials.secret(host.name, host.port, database, user)
        return found or await self.auth_query.secret(host, database, user)

    # Its life

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then let sessions and jobs end.

        Raises OSError if the server cannot be reached or an address is taken.
        """
        try:
            route = await self.dialer.check()
        except OSError as error:
            raise OSError(f"cannot reach the server {self.config.upstream}: {error}") from None
        logger.info("passing on to %s%s", route, " (TLS)" if route.encrypted else "")
        stop = asyncio.Event()
        now = asyncio.Event()
        loop = asyncio.get_running_loop()

        def signalled() -> None:
            (now if stop.is_set() else stop).set()

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, signalled)
        listeners = Listeners(
            lambda: Session(self),
            self.tls,
            Keepalive(
                bool(self.config.tcp_keepalive),
                self.config.tcp_keepidle,
                self.config.tcp_keepintvl,
                self.config.tcp_keepcnt,
                self.config.tcp_user_timeout,
            ),
            self.config.client_login_timeout,
        )
        with contextlib.closing(listeners):
            for address in self.config.listen:
                await listeners.listen(address)
            await stop.wait()
        await self._shut_down(now)

    async def _shut_down(self, now: asyncio.Event) -> None:
        logger.info("shutting down: %s", self._what_runs())
        ways_out = [
            asyncio.ensure_future(self._all_done()),
            asyncio.ensure_future(now.wait()),
        ]
        await asyncio.wait(
            ways_out,
            timeout=self.config.shutdown_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for way in ways_out:
            way.cancel()
        if self.sessions or self.jobs:
            logger.warning("ending what still runs: %s", self._what_runs())
        closing = [session.client for session in self.sessions]
        jobs = tuple(self.jobs)
        for session in tuple(self.sessions):
            session.shut_down()
        await asyncio.gather(*(self.dialer.cancel(job.route, job.cancel_request()) for job in jobs))
        for job in jobs:
            job.abandon()
        deadline = asyncio.get_running_loop().time() + _LAST_WORDS
        while any(client.is_open for client in closing):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        logger.info("shut down")

    async def _all_done(self) -> None:
        while self.sessions or self.jobs:
            self._idle.clear()
            await self._idle.wait()

    def _what_runs(self) -> str:
        return f"{len(self.sessions)} sessions, {len(self.jobs)} jobs"

    def session_ended(self, session: Session) -> None:
        """One that has closed its connections."""
        self.sessions.discard(session)
        self._idle.set()

    def job_ended(self, job: Job) -> None:
        """One whose backend is done."""
        self.jobs.discard(job)
        self._idle.set()


async def serve(config: Config) -> int:
    """Run the proxy until it is told to stop; the exit code.

    Raises OSError if it cannot start, ConfigError for a file that is not what it should be.
    """
    await Server(config).run()
    return 0
