"""The sockets for clients and HTTP: opened, taken over from a predecessor, handed to a successor.

Invariant: everything that can fail is done before anything is taken from a predecessor: an error in
a configuration or in a new version ends the new process, and the old one goes on.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Self

from proxy.admin.source import Source
from proxy.admin.start import Admin
from proxy.config import Config
from proxy.ending import Ending
from proxy.log import logger
from proxy.net import takeover
from proxy.net.acceptor import Accepted
from proxy.net.listeners import Listeners
from proxy.net.service_manager import ServiceManager
from proxy.net.sockets import ADMIN, CLIENTS, MANAGER, TAKEOVER, Listening, Sockets
from proxy.net.takeover import Offer, Predecessor
from proxy.reasons import explain
from proxy.runtime import client_keepalive
from proxy.successor import Successor


class Entrance:
    """The sockets of one proxy, as an asynchronous context manager that closes them.

    Args:
        config: at the start.
        manager: the service manager, to be informed.
        source: provides figures and jobs for HTTP.
        take: called with each connection.
        ending: of this process; begins when a successor has taken over.
        settle: called once no more connections are accepted; waits until none is held any more.

    Attributes:
        listeners: paused until `open`.
    """

    def __init__(
        self,
        config: Config,
        manager: ServiceManager,
        source: Source,
        take: Callable[[Accepted], None],
        ending: Ending,
        settle: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._config = config
        self._manager = manager
        self._source = source
        self._ending = ending
        self._settle = settle
        self.listeners = Listeners(take, client_keepalive(config))
        self.listeners.pause("start")
        self._sockets = Sockets()
        self._admin: Admin | None = None
        self._admin_sockets: list[Listening] = []
        self._predecessor: Predecessor | None = None
        self._offer: Offer | None = None
        self._successor: Successor | None = None
        self._closing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.shut()
        await self._close_admin()
        if self._closing is not None:
            await self._closing
        self._sockets.close()  # after the HTTP server, which uses its own till then

    async def look_for_predecessor(self) -> None:
        """Ask the process that listens at `takeover`, if there is one, for its sockets. Raises
        OSError: it refuses."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, self.start_successor)
        self._admin = Admin(self._source)
        if self._config.takeover is None:
            return
        self._predecessor = await Predecessor.at(self._config.takeover)
        if self._predecessor is not None:
            logger.info("taking over from process %d", self._predecessor.pid)
            self._manager.be_silent()
            self._sockets = Sockets(self._predecessor.sockets)

    async def prepare(self) -> None:
        """Bind what was not taken over. Raises OSError: an address is in use."""
        taken = self._sockets.of_predecessor(TAKEOVER)
        await self._listen_to_clients()
        if self._config.admin_listen is not None:
            self._admin_sockets = await self._sockets.listen(ADMIN, self._config.admin_listen)
        if self._config.takeover is not None and not taken:
            # Last: a process without an address must not replace the socket of one that has it.
            self._sockets.add([takeover.listen(self._config.takeover)])
            self._sockets.file_is_ours(self._config.takeover)
        if self._predecessor is None:
            await self._start_admin()

    async def _listen_to_clients(self) -> None:
        handed = self._sockets.add(self._manager.sockets())
        whose = ", of the service manager"
        if not handed:
            handed = self._sockets.of_predecessor(MANAGER)
        if not handed:
            whose = ""
            for address in self._config.listen:
                handed += await self._sockets.listen(CLIENTS, address)
        self.listeners.add(handed)
        for listening in handed:
            kind = ", with the PROXY protocol" if listening.has_header else ""
            logger.info("listening on %s%s%s", listening, whose, kind)

    async def _start_admin(self) -> None:
        assert self._admin is not None
        await self._admin.start([listening.socket for listening in self._admin_sockets])

    async def _close_admin(self) -> None:
        if self._admin is not None:
            admin, self._admin = self._admin, None
            await admin.close()

    async def open(self) -> None:
        """Accept clients, in place of a predecessor if there is one, and offer the sockets to a
        successor. Raises OSError: the predecessor does not release them."""
        if self._ending.begun.is_set():
            return  # a predecessor continues
        if self._predecessor is not None:
            await self._predecessor.take(lambda: not self._ending.begun.is_set())
            if not self._predecessor.is_replaced:
                return
            self._ending.on_signal = self._predecessor.stop
        self.listeners.resume("start")
        if self._predecessor is not None:
            await self._start_admin()
            await self._predecessor.released()
            self._sockets.own()
            self._manager.speak()
            if self._ending.begun.is_set():
                return
        self._manager.ready()
        for listening in self._sockets.all:
            if listening.use == TAKEOVER:
                self._offer = Offer(
                    listening,
                    lambda: self._sockets.all,
                    pause=self._pause,
                    resume=lambda: self.listeners.resume("takeover"),
                    hand_on=self._hand_on,
                    stop=self._ending.signalled,
                )

    def shut(self) -> None:
        """Accept no more clients; HTTP is served until the end."""
        self.listeners.close()
        if self._offer is not None and not self._ending.is_taken_over:
            if self._offer.has_successor:
                # The successor will find us gone and serve our addresses, HTTP too.
                self._sockets.keep_files()
                self._closing = asyncio.get_running_loop().create_task(self._close_admin())
            self._offer.close()
            self._offer = None
        self._sockets.close(but=ADMIN)

    async def predecessor_has_ended(self) -> None:
        """Wait for it, no longer than for our sessions: whoever ends us may end it with us."""
        if self._predecessor is None or not self._predecessor.is_replaced:
            return
        if self._predecessor.gone.done():
            return
        logger.info("waiting for process %d, which has handed over", self._predecessor.pid)
        now = asyncio.get_running_loop().create_task(self._ending.now.wait())
        self._predecessor.gone.add_done_callback(lambda _: now.cancel())
        await asyncio.wait([now])

    # Handing on

    async def _pause(self) -> None:
        self.listeners.pause("takeover")
        if self._settle is not None:
            await self._settle()

    def _hand_on(self, pid: int) -> None:
        logger.info("process %d has taken over; sessions and jobs go on here", pid)
        self.listeners.close()
        self._closing = asyncio.get_running_loop().create_task(self._close_admin())
        self._sockets.handed_on()
        if self._successor is not None and self._successor.pid == pid:
            self._successor.let_go()
        self._manager.main_process_is(pid)
        self._ending.taken_over()

    def start_successor(self) -> None:
        """Start the program again, as we were started, to take over (SIGUSR2)."""
        if self._config.takeover is None:
            logger.error("no other process can take over: takeover is not set")
        elif self._offer is None or self._ending.begun.is_set():
            logger.error("no other process is started to take over: this one takes no clients")
        elif self._successor is not None:
            logger.error("another process is about to take over already")
        else:
            try:
                self._successor = Successor(
                    {**os.environ, **self._manager.environ}, self._successor_ended
                )
            except OSError as error:
                logger.error("no other process could be started to take over: %s", explain(error))

    def _successor_ended(self, code: int) -> None:
        self._successor = None
        if not self._ending.is_taken_over:
            logger.error("the process that was to take over has ended: exit code %d", code)
