"""The proxy itself: it listens, makes a session of each client, and ends them all in good order.

Invariant: this holds what does not belong to a single session: the way to the server, the cancel
keys, and the running jobs, also those whose session has ended. There is one `Server` in a process;
`serve` and `worker` decide where its clients come from and when it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

from protocol.startup import CancelRequest
from proxy import log
from proxy.config import Config
from proxy.extension.context import ROLE_STATEMENT
from proxy.jobs.service import JobService
from proxy.log import logger
from proxy.memory import keep_trimmed
from proxy.net.listeners import Acceptor, Listeners
from proxy.runtime import LAST_WORDS, Runtime, client_keepalive, reload, reloaded
from proxy.session.services import Served
from proxy.session.session import Session


class Server:
    """What all sessions share (`session.services.Services`).

    Attributes:
        jobs: the jobs of all sessions, and what the configuration has been made into.
        sessions: all that have not ended.
        keys: the sessions by what cancels their statements.
        extension_changes: how many transactions have changed the extension, in any database.

    Raises:
        ConfigError: from the constructor, for a file that is not what it should be.
    """

    def __init__(self, config: Config) -> None:
        self._idle = asyncio.Event()
        self.jobs = JobService(Runtime(config), ROLE_STATEMENT, on_end=self._idle.set)
        self.sessions: set[Served] = set()
        self.keys: dict[CancelRequest, Served] = {}
        self.extension_changes = 0
        self.on_session_end: Callable[[], None] | None = None
        self.acceptor = Acceptor(
            lambda: Session(self),
            lambda: self.runtime.tls,
            lambda: self.runtime.config.client_login_timeout,
        )

    @property
    def runtime(self) -> Runtime:
        """What the configuration has been made into; another one after a reload."""
        return self.jobs.runtime

    def reload(self, config: Config) -> list[str]:
        """Take over another configuration; the settings that cannot be changed any more.

        What runs goes on: new sessions, launches and logins go by the new one.

        Raises ConfigError: nothing has changed then.
        """
        config, fixed = reloaded(self.runtime.config, config)
        self.jobs.reload(Runtime(config))
        log.set_level(config.log_level)
        return fixed

    # The way to the server

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel what waits in the proxy, or pass the request on to the server."""
        session = self.keys.get(request)
        if session is None and await self.jobs.peers.cancel(request):
            logger.debug("a cancel request was for a session of another worker")
            return
        interrupts = session.interrupts if session is not None else None
        if interrupts is not None and interrupts.is_waiting:
            interrupts.cancel()
            return
        await self.runtime.dialer.cancel(session.route if session is not None else None, request)
        # The server may have done its part of the call before it heard of this.
        if interrupts is not None and interrupts.is_calling:
            interrupts.cancel()

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
            timeout=self.runtime.config.shutdown_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for way in ways_out:
            way.cancel()
        if self.sessions or self.jobs.registry.running:
            logger.warning("ending what still runs: %s", self._what_runs())
        closing = [session.client for session in self.sessions]
        for session in tuple(self.sessions):
            session.shut_down()
        await self.jobs.end_all()
        deadline = asyncio.get_running_loop().time() + LAST_WORDS
        while any(client.is_open for client in closing):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        self.jobs.close()
        logger.info("shut down")

    async def _all_done(self, others_done: Callable[[], Awaitable[None]] | None) -> None:
        while self.sessions or self.jobs.registry.running:
            self._idle.clear()
            await self._idle.wait()
        if others_done is not None:
            await others_done()

    def _what_runs(self) -> str:
        return f"{len(self.sessions)} sessions, {len(self.jobs.registry.running)} jobs"

    # What sessions tell

    def session_began(self, session: Served) -> None:
        """A client has connected."""
        self.sessions.add(session)

    def key_known(self, key: CancelRequest, session: Served) -> None:
        """The server has said what cancels the statements of a session."""
        self.keys[key] = session

    def session_ended(self, session: Served, key: CancelRequest | None) -> None:
        """It has closed its connections; `key`: what cancels its statements."""
        self.sessions.discard(session)
        if key is not None:
            self.keys.pop(key, None)
        self._idle.set()
        if self.on_session_end is not None:
            self.on_session_end()

    def extension_changed(self) -> None:
        """What the sessions know of their databases may be out of date."""
        self.extension_changes += 1
        self.jobs.peers.extension_changed()


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
