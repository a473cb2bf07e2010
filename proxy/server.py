"""The proxy itself: it listens, makes a session of each client, and ends them all in good order.

The rule: what belongs to no single session is here: the listening sockets, the way to the server,
the cancel keys, and the jobs that are running, also those whose session has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Coroutine

from protocol.startup import CancelRequest
from proxy import lexer, statements, tls
from proxy.auth_query import AuthQuery
from proxy.config import Config, ConfigError
from proxy.credentials import Credentials, CredentialStore, LoginObserver, Secret
from proxy.functions import catalog
from proxy.jobs import Job, KnownJobs
from proxy.keepalive import Keepalive
from proxy.listeners import Listeners
from proxy.log import logger
from proxy.session import Session
from proxy.settings import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT
from proxy.spares import Spares
from proxy.upstream import Dialer, Route

_CANCEL_AGAIN = 0.02
_CANCEL_SELDOM = 1.0
"""Seconds between cancel requests to a job that goes on: the first time, and at most."""

_REMEMBERED = 256
"""SQL texts whose reading is remembered, for all sessions."""

_LAST_WORDS = 2.0
"""Seconds that connections get to send what is left when the time to shut down is over."""


class Server:
    """What all sessions share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sessions: set[Session] = set()
        self.jobs = KnownJobs(config.outcome_retention)
        # Both are asked several times about each statement, and clients repeat themselves.
        self.split = functools.lru_cache(_REMEMBERED)(lexer.split)
        self.analyze = functools.lru_cache(_REMEMBERED)(
            functools.partial(statements.analyze, functions=catalog(config.api_version))
        )
        self.spares = Spares(config.spares, config.spare_lifetime)
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
        self._tasks: set[asyncio.Task[None]] = set()

    # The way to the server

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel what waits in the proxy, or pass the request on to the server."""
        session = self.keys.get(request)
        interception = session.interception if session is not None else None
        waits = interception.waits if interception is not None else None
        if waits is not None and waits.is_waiting:
            waits.cancel()
            return
        await self.dialer.cancel(session.route if session is not None else None, request)
        # The server may have done its part of the call before it heard of this.
        if waits is not None and waits.is_calling:
            waits.cancel()

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
        if self.sessions or self.jobs.running:
            logger.warning("ending what still runs: %s", self._what_runs())
        closing = [session.client for session in self.sessions]
        jobs = tuple(self.jobs.running)
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
        self.spares.close()
        logger.info("shut down")

    async def _all_done(self) -> None:
        while self.sessions or self.jobs.running:
            self._idle.clear()
            await self._idle.wait()

    def _what_runs(self) -> str:
        return f"{len(self.sessions)} sessions, {len(self.jobs.running)} jobs"

    def session_ended(self, session: Session) -> None:
        """One that has closed its connections."""
        self.sessions.discard(session)
        self._idle.set()

    def job_ended(self, job: Job) -> None:
        """One whose backend is done."""
        self.jobs.ended(job)
        self._idle.set()

    def cancel_job(self, job: Job) -> asyncio.Task[None]:
        """Tell the server to stop a job. The task ends when it was told once; it is told again
        until the job ends, since a backend that has only just got its query does not listen."""
        job.canceled = True
        job.forget_output()
        told = self._spawn(self.dialer.cancel(job.route, job.cancel_request()))
        self._spawn(self._cancel_until_finished(job))
        return told

    async def _cancel_until_finished(self, job: Job) -> None:
        delay = _CANCEL_AGAIN
        while not job.finished:
            await asyncio.sleep(delay)
            if not job.finished:
                await self.dialer.cancel(job.route, job.cancel_request())
            delay = min(delay * 2, _CANCEL_SELDOM)

    def limit(self, job: Job, timeout_ms: int) -> None:
        """Cancel a job that runs longer than that."""

        def time_out() -> None:
            if not job.finished:
                job.timed_out = True
                self.cancel_job(job)

        asyncio.get_running_loop().call_later(timeout_ms / 1000, time_out)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def serve(config: Config) -> int:
    """Run the proxy until it is told to stop; the exit code.

    Raises OSError if it cannot start, ConfigError for a file that is not what it should be.
    """
    await Server(config).run()
    return 0
