"""The proxy itself: it listens, makes a session of each client, and ends them all in good order.

Invariant: this holds what does not belong to a single session: the way to the server, the cancel
keys, and the running jobs, also those whose session has ended. There is one `Server` in a process;
`serve` and `worker` decide where its clients come from and when it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence

from protocol.startup import CancelRequest
from proxy import log
from proxy.auth.checks import Check
from proxy.auth.credentials import Credentials
from proxy.auth.observer import LoginObserver
from proxy.backends.channels import Channels
from proxy.backends.route import Route
from proxy.backends.spares import DATABASE_COMMANDS, LONGEST_COMMAND, Spares
from proxy.config import Config
from proxy.extension.context import ROLE_STATEMENT
from proxy.jobs.job import Job
from proxy.jobs.registry import Handle, JobRecord, JobRegistry, RemoteJob
from proxy.jobs.rows import Budgets
from proxy.log import logger
from proxy.memory import keep_trimmed
from proxy.net.listeners import Acceptor, Listeners
from proxy.runtime import LAST_WORDS, Runtime, client_keepalive, reload, reloaded
from proxy.session.session import Session
from proxy.workers.peers import Peers

_CANCEL_AGAIN = 0.02
_CANCEL_SELDOM = 1.0
"""Seconds between cancel requests to a job that goes on: the first time, and at most."""


class Server:
    """What all sessions share.

    Attributes:
        extension_changes: how many commands about the extension their transactions have ended.

    Raises:
        ConfigError: from the constructor, for a file that is not what it should be.
    """

    def __init__(self, config: Config) -> None:
        self._use(Runtime(config))
        self.sessions: set[Session] = set()
        self.peers = Peers(self)
        self.jobs: JobRegistry[Job] = JobRegistry(config.outcome_retention, self.peers.role_gone)
        self.channels = Channels(config.spare_lifetime, ROLE_STATEMENT)
        self.spares = Spares(
            config.spares, config.spare_lifetime, self.channels, self.peers.give_way
        )
        self.budgets = Budgets(config.queue_memory, config.role_queue_memory)
        self.keys: dict[CancelRequest, Session] = {}
        self.extension_changes = 0
        self.on_session_end: Callable[[], None] | None = None
        self.acceptor = Acceptor(
            lambda: Session(self), lambda: self.tls, lambda: self.config.client_login_timeout
        )
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # Cancel requests for statements whose session has ended.
        self._cancels: set[asyncio.Task[None]] = set()

    def _use(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.credentials = runtime.credentials
        self.tls = runtime.tls
        self.dialer = runtime.dialer
        self.auth_query = runtime.auth_query
        self.own_settings = runtime.own_settings

    def reload(self, config: Config) -> list[str]:
        """Take over another configuration; the settings that cannot be changed any more.

        What runs goes on: new sessions, launches and logins go by the new one.

        Raises ConfigError: nothing has changed then.
        """
        config, fixed = reloaded(self.config, config)
        moved = config.upstream != self.config.upstream
        self._use(Runtime(config))
        if moved:
            self.spares.give_way()
        self.jobs.retention = config.outcome_retention
        self.budgets.change(config.queue_memory, config.role_queue_memory)
        self.spares.count = config.spares
        self.spares.lifetime = self.channels.lifetime = config.spare_lifetime
        log.set_level(config.log_level)
        return fixed

    # The way to the server

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel what waits in the proxy, or pass the request on to the server."""
        session = self.keys.get(request)
        if session is None and await self.peers.cancel(request):
            logger.debug("a cancel request was for a session of another worker")
            return
        interception = session.interception if session is not None else None
        interrupts = interception.interrupts if interception is not None else None
        if interrupts is not None and interrupts.is_waiting:
            interrupts.cancel()
            return
        await self.dialer.cancel(session.route if session is not None else None, request)
        # The server may have done its part of the call before it heard of this.
        if interrupts is not None and interrupts.is_calling:
            interrupts.cancel()

    async def credentials_of(
        self, route: Route, database: bytes, user: bytes, login: LoginObserver
    ) -> Credentials:
        """What a role whose login was accepted can log in with once more."""
        find = functools.partial(
            self.credentials.credentials,
            *(route.host.name, route.host.port, database, user, login),
            policy=self.config.upstream.policy(route.host),
        )
        found = find()
        asked = login.method is not None and self.auth_query.enabled
        if asked and found.password is None and found.secret is None:
            queried = await self.auth_query.secret(route.host, user)
            found = find(queried=queried, has_auth_query=True)
        return found

    async def check_of(
        self, route: Route, database: bytes, user: bytes, stranger: str
    ) -> Check | None:
        """What to check a client with that claims to be a role; None if the proxy has no secrets.

        Args:
            route: to the session's server.
            database: that the client wants; the passfile may ask for it.
            user: the role.
            stranger: whose connection it is (`pace.who`).
        """
        if not (self.credentials.has_files or self.auth_query.enabled):
            return None
        host = route.host
        found = self.credentials.secret(host.name, host.port, database, user)
        found = found or await self.auth_query.secret(host, user, stranger)
        return self.runtime.checks.check(user, found)

    # Its life

    async def shut_down(
        self, now: asyncio.Event, others_done: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Let sessions and jobs end; after shutdown_timeout, or `now`, end them. `others_done`
        waits until there is no need any more to be there for others."""
        self.acceptor.close()
        logger.info("shutting down: %s", self._what_runs())
        ways_out = [
            asyncio.ensure_future(self._all_done(others_done)),
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
        await asyncio.gather(
            *self._cancels,
            *(self.dialer.cancel(job.route, job.cancel_request()) for job in jobs),
        )
        for job in jobs:
            job.abandon()
        deadline = asyncio.get_running_loop().time() + LAST_WORDS
        while any(client.is_open for client in closing):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        self.spares.close()
        self.channels.give_way()
        logger.info("shut down")

    async def _all_done(self, others_done: Callable[[], Awaitable[None]] | None) -> None:
        while self.sessions or self.jobs.running:
            self._idle.clear()
            await self._idle.wait()
        if others_done is not None:
            await others_done()

    def _what_runs(self) -> str:
        return f"{len(self.sessions)} sessions, {len(self.jobs.running)} jobs"

    # What calls ask for

    async def find(self, own: Iterable[Job], handles: Sequence[Handle]) -> list[JobRecord | None]:
        """Jobs by their handles: the caller's own, those of this process, those of the others."""
        here = {job.handle: job for job in own}
        found: dict[Handle, JobRecord | None] = {
            handle: here.get(handle) or self.jobs.get(*handle) for handle in handles
        }
        missing = [handle for handle, job in found.items() if job is None]
        if missing and self.peers.exist:
            found |= await self.peers.find(missing)
        return [found[handle] for handle in handles]

    async def jobs_of(self, roles: Collection[int]) -> list[JobRecord]:
        """What is known of the jobs of these roles; and of all others of this process."""
        return [*self.jobs, *(await self.peers.jobs_of(roles) if self.peers.exist else ())]

    def leave_databases(self, sql: bytes) -> None:
        """Close what waits in databases that a statement, in lower case, may be about to drop,
        rename or copy: the server waits 5 seconds for others to be gone, and then refuses."""
        if len(sql) <= LONGEST_COMMAND and any(verb in sql for verb in DATABASE_COMMANDS):
            self.spares.leave(sql)
            self.peers.leave_databases(sql)

    def extension_changed(self) -> None:
        """What the sessions know of their databases may be out of date."""
        self.extension_changes += 1
        self.peers.extension_changed()

    def session_ended(self, session: Session) -> None:
        """One that has closed its connections."""
        self.sessions.discard(session)
        self._idle.set()
        if self.on_session_end is not None:
            self.on_session_end()

    def job_ended(self, job: Job) -> None:
        """One whose backend is done."""
        self.jobs.ended(job)
        self.peers.job_ended(job)
        self._idle.set()

    def cancel_job(self, job: JobRecord) -> asyncio.Task[None]:
        """Tell the server to stop a job. The task ends when it was told once; it is told again
        until the job ends, since a backend that has only just got its query does not listen."""
        if isinstance(job, RemoteJob):
            return self._spawn(self.peers.cancel_job(job))
        assert isinstance(job, Job)
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

        timer = asyncio.get_running_loop().call_later(timeout_ms / 1000, time_out)
        job.when_finished(timer.cancel)

    def cancel_statement(self, route: Route, key: CancelRequest) -> asyncio.Task[None]:
        """Tell the server to stop a statement that waits for an answer which will not come."""
        task = self._spawn(self.dialer.cancel(route, key))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)
        return task

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def serve(config: Config, read_again: Callable[[], Config] | None = None) -> int:
    """Run the proxy in this process until SIGINT or SIGTERM, then let sessions and jobs end.

    Args:
        config: its settings.
        read_again: gives what they are now, after SIGHUP; raises ConfigError.

    Returns the exit code. Raises OSError if it cannot start, because the server cannot be reached
    or an address is taken; ConfigError for a file that is not what it should be.
    """
    server = Server(config)
    await server.runtime.check()
    keep_trimmed()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    now = asyncio.Event()

    def signalled() -> None:
        (now if stop.is_set() else stop).set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, signalled)
    if read_again is not None:
        loop.add_signal_handler(signal.SIGHUP, reload, read_again, server.reload)
    acceptor = server.acceptor
    listeners = Listeners(acceptor.take, client_keepalive(config))
    with contextlib.closing(listeners):
        for address in config.listen:
            await listeners.listen(address)
        await stop.wait()
    await server.shut_down(now)
    return 0
