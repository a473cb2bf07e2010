"""The proxy itself: it listens, makes a session for each client, and ends them in good order.

Invariant: this holds what belongs to no single session: the way to the server, the cancel keys, and
the running jobs, even those whose session has ended. A process has one `Server`; `serve` and
`worker` decide where its clients come from and when it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

from protocol.startup import CancelRequest, StartupMessage
from proxy import log
from proxy.admin.source import OneProcess
from proxy.config import Config
from proxy.console.actions import ConsoleActions
from proxy.console.login import ConsoleLogin
from proxy.ending import Ending
from proxy.entrance import Entrance
from proxy.extension.context import ROLE_STATEMENT
from proxy.extension.history import FIND_HISTORY
from proxy.jobs.service import JobService
from proxy.log import logger
from proxy.memory import keep_trimmed
from proxy.net.acceptor import Acceptor
from proxy.net.connection import Connection
from proxy.net.service_manager import ServiceManager
from proxy.runtime import (
    LAST_WORDS,
    Runtime,
    find_server,
    reload,
    reloaded,
)
from proxy.session.services import Served
from proxy.session.session import Session


class Server:
    """What all sessions share (`session.services.Services`).

    Attributes:
        jobs: the jobs of all sessions, and the live objects made of the configuration.
        sessions: all that have not ended.
        keys: the sessions, by the key that cancels their statements.
        extension_changes: number of transactions that have changed the extension, in any database.
        console_login: lets clients in to the console.

    Raises:
        ConfigError: from the constructor, for an invalid file.
    """

    def __init__(self, config: Config) -> None:
        self._idle = asyncio.Event()
        self.jobs = JobService(Runtime(config), ROLE_STATEMENT, FIND_HISTORY, on_end=self._idle.set)
        self.sessions: set[Served] = set()
        self.keys: dict[CancelRequest, Served] = {}
        self.extension_changes = 0
        self.on_session_end: Callable[[], None] | None = None
        self.console_login = ConsoleLogin(lambda: self.runtime, ConsoleActions(self))
        self.acceptor = Acceptor(
            lambda: Session(self),
            lambda: self.runtime.tls,
            lambda: self.runtime.config.client_login_timeout,
            lambda: self.runtime.config.proxy_protocol_from,
        )

    @property
    def runtime(self) -> Runtime:
        """The live objects made of the configuration; a reload replaces it."""
        return self.jobs.runtime

    def reload(self, config: Config) -> list[str]:
        """Apply another configuration. Returns the settings that cannot be changed any more.

        Sessions and jobs go on: the new one is for new sessions, launches and logins.

        Raises ConfigError: nothing was changed.
        """
        config, fixed = reloaded(self.runtime.config, config)
        self.jobs.reload(Runtime(config))
        log.change(config.log_level, config.log_format)
        return fixed

    # The way to the server

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel a wait in the proxy, or pass the request on to the server."""
        session = self.keys.get(request)
        if session is None and await self.jobs.peers.cancel(request):
            logger.debug("a cancel request was for a session of another worker")
            return
        interrupts = session.interrupts if session is not None else None
        if interrupts is not None and interrupts.server_done and not interrupts.is_in_server:
            interrupts.cancel()
            return
        await self.runtime.dialer.cancel(session.route if session is not None else None, request)
        # By the time the request arrived, the server may have done its part of the call.
        if interrupts is not None and interrupts.call_in_progress:
            interrupts.cancel()

    # The console

    def has_console(self, startup: StartupMessage) -> bool:
        """Whether a client asks for the console, and there is one."""
        return self.console_login.is_for(startup)

    async def console(
        self, client: Connection, startup: StartupMessage, rest: bytes, let_in: Callable[[], None]
    ) -> None:
        """Serve such a client; see `session.services.Services`."""
        await self.console_login.serve(client, startup, rest, let_in)

    # Shutdown

    async def shut_down(
        self, now: asyncio.Event, others_done: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Let sessions and jobs end; `now`: end them. `others_done`: others no longer need us."""
        logger.info("shutting down: %s", self._what_runs())
        ways_out = [
            asyncio.ensure_future(self._all_done(others_done)),
            asyncio.ensure_future(now.wait()),
        ]
        await asyncio.wait(ways_out, return_when=asyncio.FIRST_COMPLETED)
        for way in ways_out:
            way.cancel()
        self.acceptor.close()
        if self._clients or self.jobs.registry.unfinished:
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
        while self._clients or self.jobs.registry.unfinished:
            self._idle.clear()
            await self._idle.wait()
        if others_done is not None:
            await others_done()

    @property
    def _clients(self) -> int:
        """The number of sessions to wait for; those of the console do not count."""
        return sum(not session.is_console for session in self.sessions)

    def _what_runs(self) -> str:
        return f"{self._clients} sessions, {self.jobs.registry.unfinished} jobs"

    # Called by sessions

    def session_began(self, session: Served) -> None:
        """A client has connected."""
        self.sessions.add(session)

    def key_known(self, key: CancelRequest, session: Served) -> None:
        """The server has told the key that cancels a session's statements."""
        self.keys[key] = session

    def session_ended(self, session: Served, key: CancelRequest | None) -> None:
        """A session has closed its connections. `key`: what cancels its statements."""
        self.sessions.discard(session)
        if key is not None:
            self.keys.pop(key, None)
        self._idle.set()
        if self.on_session_end is not None:
            self.on_session_end()

    def extension_changed(self) -> None:
        """What sessions know about their databases may be outdated."""
        self.extension_changes += 1
        self.jobs.peers.extension_changed()


@contextlib.asynccontextmanager
async def _alone(server: Server) -> AsyncIterator[None]:
    yield


async def serve(
    config: Config,
    read_again: Callable[[], Config] | None = None,
    others: Callable[[Server], contextlib.AbstractAsyncContextManager[None]] = _alone,
) -> int:
    """Run the proxy until SIGINT or SIGTERM, or a takeover; then let sessions and jobs end.

    Args:
        config: its settings.
        read_again: reads the settings again, on SIGHUP; raises ConfigError.
        others: connects it to other proxies while entered.

    Returns the exit code. Raises OSError if it cannot start: a required server is unreachable, or
    an address is in use; ConfigError for an invalid file.
    """
    manager = ServiceManager(os.environ)
    server = Server(config)
    ending = Ending(lambda: server.runtime.config)
    source = OneProcess(server.jobs, lambda: len(server.sessions), ending.begun.is_set)
    async with Entrance(config, manager, source, server.acceptor.take, ending) as entrance:
        await entrance.look_for_predecessor()
        manager.begin()
        looking = await find_server(lambda: server.runtime, manager)
        keep_trimmed()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, ending.signalled)
        actions = server.console_login.actions
        actions.stop = ending.signalled
        if read_again is not None:
            actions.read_again = functools.partial(reload, manager, read_again, server.reload)
            loop.add_signal_handler(signal.SIGHUP, actions.read_again)
        async with others(server):
            await entrance.prepare()
            await entrance.open()
            await ending.begun.wait()
            entrance.shut()
            manager.stopping(server.runtime.config.shutdown_timeout)
            if looking is not None:
                looking.cancel()
            await server.shut_down(ending.now)
        await entrance.predecessor_has_ended()
    return 0
