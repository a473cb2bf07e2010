"""One of several processes that serve clients, started by the supervisor.

Invariant: a worker is a `Server` that gets accepted clients through a socket and orders through the
bus. The end of the former means: end when the present clients have left. A lost bus means: the
supervisor is gone, so end now, since nothing would end us later. Signals are for the supervisor;
only SIGTERM asks for draining and replacement.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import Any

from proxy import config, log
from proxy.admin.figures import measure_lag
from proxy.config import ConfigError
from proxy.jobs.slots import Limits
from proxy.log import logger
from proxy.loop import run
from proxy.memory import keep_trimmed
from proxy.net.acceptor import Accepted
from proxy.net.descriptors import report
from proxy.reasons import explain
from proxy.server import Server
from proxy.workers.bus import WorkerPipe
from proxy.workers.console import OneOfSeveral
from proxy.workers.messages import (
    SUPERVISOR,
    WITH_HEADER,
    Answer,
    Configure,
    EndNow,
    Event,
    Message,
    Ping,
    Report,
    SlotAnswer,
)
from proxy.workers.peers import OtherWorkers
from proxy.workers.replicas import linked
from proxy.workers.slots import SupervisorsSlots


class Worker:
    """The counterpart of `supervisor` in a worker."""

    def __init__(self, clients: socket.socket) -> None:
        self._clients = clients
        # No more clients will come; sessions and jobs must end.
        self._retired = asyncio.Event()
        self._end_now = asyncio.Event()

    async def run(self, bus: socket.socket) -> int:
        """Serve until told to stop. Returns the exit code. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Server] = loop.create_future()
        self._pipe = await WorkerPipe.over(bus, self._receive)
        self._pipe.lost.add_done_callback(lambda _: self._supervisor_lost())
        loop.add_signal_handler(signal.SIGTERM, self._send, Event.DRAINING)
        try:
            server = await self._started
        except asyncio.CancelledError:
            return 1  # the supervisor is gone
        server.on_session_end = lambda: self._send(Event.CLOSED)
        self._slots = SupervisorsSlots(Limits.of(server.runtime.config), self._pipe)
        server.jobs.slots = self._slots
        self._peers = OtherWorkers(server, self._pipe)
        server.console_login.actions = OneOfSeveral(server, self._peers)
        await self._peers.join()
        async with linked(server, self._group):
            await self._serve(server)
        self._pipe.close()
        await self._pipe.lost
        return 0

    async def _serve(self, server: Server) -> None:
        """Serve until told to stop."""
        loop = asyncio.get_running_loop()
        self._clients.setblocking(False)
        loop.add_reader(self._clients, self._take_clients, server)
        self._send(Event.READY)
        if server.runtime.config.admin_listen is not None:
            lag = loop.create_task(measure_lag())
            self._pipe.lost.add_done_callback(lambda _: lag.cancel())
        await self._retired.wait()
        loop.remove_reader(self._clients)
        await server.shut_down(self._end_now, self._others_done)

    def _send(self, event: Event) -> None:
        self._pipe.send(Report(event))

    def _receive(self, message: Message) -> None:
        match message:
            case Configure():
                self._configure(message)
            case EndNow():
                self._end_now.set()
            case Ping():
                self._send(Event.ALIVE)
            case SlotAnswer():
                self._slots.answered(message)
            case _:
                self._peers.receive(message)

    def _configure(self, message: Configure) -> None:
        """Apply a configuration, the first or another."""
        try:
            settings = config.build(message.given, os.environ)
            if self._started.done():
                self._started.result().reload(settings)
            else:
                log.configure(settings.log_level, settings.log_format, who=message.name)
                self._group = bytes.fromhex(message.group)
                self._started.set_result(Server(settings))
                keep_trimmed()
        except ConfigError as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            logger.error("the configuration stays as it was: %s", error)

    def _supervisor_lost(self) -> None:
        if not self._started.done():
            self._started.cancel()
        elif not self._retired.is_set():
            logger.error("the supervisor is gone")
        self._retired.set()
        self._end_now.set()

    def _take_clients(self, server: Server) -> None:
        """Take connections that the supervisor has accepted, up to an end of file."""
        while True:
            try:
                marks, fds, _, _ = socket.recv_fds(self._clients, 1, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                marks = b""
            if not marks:
                asyncio.get_running_loop().remove_reader(self._clients)
                self._retired.set()  # the supervisor says when time is up
                return
            if not fds:
                # We are short of file descriptors, so the kernel has closed it.
                report("accept new connections")
                self._send(Event.REFUSED)
                continue
            self._send(Event.TAKEN)
            connection = socket.socket(fileno=fds[0])
            connection.setblocking(False)
            server.acceptor.take(Accepted(connection, marks == WITH_HEADER))

    async def _others_done(self) -> None:
        """Our sessions are done: wait until the supervisor says that all workers' are."""
        self._pipe.send(Answer(0, SUPERVISOR, self._peers.figures()))
        self._send(Event.DONE)
        await asyncio.Event().wait()


def main(arguments: list[str]) -> Any:
    """Run a worker on two sockets, given as file descriptors. Returns sys.exit()'s argument."""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    bus, clients = (socket.socket(fileno=int(argument)) for argument in arguments)
    try:
        return run(Worker(clients).run(bus))
    except (ConfigError, OSError) as error:
        return str(error) or explain(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
