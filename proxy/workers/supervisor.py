"""The supervisor of several processes that serve clients together.

Invariant: the supervisor serves no client and does not know PostgreSQL. It listens, gives each
connection to the worker that has the fewest, forwards the workers' messages to each other
(`peers`), restarts a worker that dies, and ends when it is told to and all of them have ended.
Signals go to the supervisor alone.

Why connections are handed over, and the workers do not accept them themselves: sessions are few and
long, so their even distribution counts. Measured with 2 workers, 32 connections at once, share of
the busier one, median and worst of 30 tries: SO_REUSEPORT, which hashes, 56 and 66 %; one listening
socket for all 56 and 100 %; handed over 50 and 50 % (8 connections: 62 and 88, 100 and 100, 50 and
50 %). It costs nothing that could be measured beside the server's work for a new connection. And a
worker's death loses no connection that it has not taken yet, and Unix sockets are no special case.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from proxy import config, log
from proxy.config import Given
from proxy.log import logger
from proxy.net.descriptors import turn_away
from proxy.net.listeners import Listeners
from proxy.runtime import LAST_WORDS, Runtime, client_keepalive, reload, reloaded
from proxy.workers.bus import Channel
from proxy.workers.messages import (
    Answer,
    Asked,
    Configure,
    EndNow,
    Event,
    Gone,
    Message,
    Question,
    Report,
    Told,
)

_START_TIMEOUT: Final = 30.0
"""Seconds that a worker has to get ready."""

_LONG_LIFE: Final = 10.0
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 10.0
"""Seconds before a worker is started again: none if it lived long, else more each time."""

_TRIES: Final = 5
"""How often in a row a worker may fail to start while there is no other."""

_END_TIMEOUT: Final = 5.0
"""Seconds after which a worker that should have ended is killed."""

_STUCK: Final = 1.0
"""Seconds in which a worker takes no connection, until others get its share."""

_HAND_OVER_AGAIN: Final = 0.005
"""Seconds until a connection is offered again that no worker could take."""


class _Worker:
    """One process.

    Attributes:
        number: its place among the workers, from 1; that of its successor too.
        serial: what tells it from others, also from its predecessors.
        sessions: how many connections it has, those included that it has not yet taken.
        untaken: the latter. They are kept until then, and go to others if it dies.
        turn: when it last got one.
        joined: whether it answers questions.
        ready: whether it serves; done when that is known.
        done: whether it only waits for others to end.
    """

    process: asyncio.subprocess.Process
    channel: Channel

    def __init__(self, number: int, serial: int) -> None:
        self.number = number
        self.serial = serial
        self.sessions = 0
        self.untaken: deque[socket.socket] = deque()
        self.turn = 0
        # Since when its socket has been full, by the loop's clock; 0 if it is not.
        self._full_since = 0.0
        self.joined = False
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.done = False
        self._clients: socket.socket | None = None

    def __str__(self) -> str:
        return f"worker {self.number} (PID {self.process.pid})"

    async def start(self, receive: Callable[[Message], None]) -> None:
        """Start the process. Raises OSError."""
        with contextlib.ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            self._clients, clients = socket.socketpair()
            stack.enter_context(clients)
            self._clients.setblocking(False)
            fds = (theirs.fileno(), clients.fileno())
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "proxy.workers.worker", *map(str, fds)),
                stdin=asyncio.subprocess.DEVNULL,
                # The same modules, whatever is in the folder where we are.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                pass_fds=fds,
                # Not to be reached by a terminal's Ctrl-C.
                start_new_session=True,
            )
            self.channel = await Channel.over(ours.dup(), receive)
        self.channel.lost.add_done_callback(lambda _: self.known(ready=False))
        asyncio.get_running_loop().call_later(_START_TIMEOUT, self._too_late)

    def _too_late(self) -> None:
        if not self.ready.done():
            logger.error("%s did not get ready in time", self)
            self.kill()

    def known(self, *, ready: bool) -> None:
        """It serves now, or it never will."""
        if not self.ready.done():
            self.ready.set_result(ready)

    @property
    def serves(self) -> bool:
        """Whether it takes new clients."""
        return self.ready.done() and self.ready.result() and self._clients is not None

    def take(self, connection: socket.socket) -> bool:
        """Give it a connection; whether it could take it."""
        assert self._clients is not None
        try:
            socket.send_fds(self._clients, [b"+"], [connection.fileno()])
        except OSError:  # it is full, or gone
            self._full_since = self._full_since or asyncio.get_running_loop().time()
            return False
        self._full_since = 0.0
        self.sessions += 1
        self.untaken.append(connection)
        return True

    @property
    def is_stuck(self) -> bool:
        """Whether it has taken none for so long that others are to have its share."""
        now = asyncio.get_running_loop().time()
        return self._full_since > 0.0 and now - self._full_since > _STUCK

    def taken(self) -> None:
        """It has the oldest of those that were given to it."""
        self.untaken.popleft().close()

    def refused(self) -> None:
        """It has no descriptor for that."""
        turn_away(self.untaken.popleft())
        self.sessions -= 1

    def retire(self) -> None:
        """Give it no more clients, so that it ends when those that it has have left."""
        if self._clients is not None:
            self._clients.close()
            self._clients = None

    async def end(self) -> int:
        """Wait for its end; the exit code, or the negative number of a signal."""
        await self.channel.lost
        self.retire()
        try:
            return await asyncio.wait_for(self.process.wait(), _END_TIMEOUT)
        except TimeoutError:
            self.kill()
            return await self.process.wait()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Supervisor:
    """All of them.

    Args:
        given: reads what the configuration says now. Raises ConfigError.
    """

    def __init__(self, given: Callable[[], Given]) -> None:
        self._read = given
        self._given = given()
        self._config = config.build(self._given, os.environ)
        self._workers: dict[int, _Worker] = {}
        self._serials = itertools.count(1)
        self._turns = itertools.count(1)
        self._listeners = Listeners(self._take, client_keepalive(self._config))
        # Clients come in once all workers were there: else the first would get them all.
        self._open = False
        # Connections that no worker could take yet.
        self._held: deque[socket.socket] = deque()
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        # Why it cannot go on.
        self._failure: Exception | None = None

    async def run(self) -> int:
        """Serve until SIGINT or SIGTERM, then let all workers end; the exit code.

        Raises OSError if it cannot start, because the server cannot be reached, an address is taken
        or a worker cannot be started; ConfigError for a file that is not what it should be.
        """
        await Runtime(self._config).check()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, reload, self._read, self._take_over)
        self._listeners.pause()
        with contextlib.closing(self._listeners):
            for address in self._config.listen:
                await self._listeners.listen(address)
            numbers = range(1, self._config.workers + 1)
            keepers = [loop.create_task(self._keep(number)) for number in numbers]
            for keeper in keepers:
                keeper.add_done_callback(self._kept)
            await self._stop.wait()
        for connection in self._held:
            connection.close()
        await self._shut_down(keepers)
        if self._failure is not None:
            raise self._failure
        return 0

    def _signalled(self) -> None:
        (self._now if self._stop.is_set() else self._stop).set()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._stop.set()
        self._now.set()

    # One place among the workers

    async def _keep(self, number: int) -> None:
        """See that there is a worker, until the end."""
        loop = asyncio.get_running_loop()
        delay = 0.0
        failures = 0
        while not self._stop.is_set():
            began = loop.time()
            worker = _Worker(number, next(self._serials))
            try:
                await worker.start(functools.partial(self._receive, worker))
            except OSError as error:
                reason: str | None = str(error)
            else:
                reason = await self._serve_with(worker)
            if self._stop.is_set():
                return
            failures = 0 if reason is None else failures + 1
            if reason is not None:
                self._not_started(f"worker {number} could not be started: {reason}", failures)
            if loop.time() - began > _LONG_LIFE:
                delay = 0.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)

    async def _serve_with(self, worker: _Worker) -> str | None:
        """From its start to its end; if it never got ready, how it ended."""
        self._workers[worker.serial] = worker
        worker.channel.send(Configure(self._given, f"worker {worker.number}"))
        if self._stop.is_set():
            worker.retire()
        is_ready = await worker.ready
        if is_ready:
            logger.info("%s is ready", worker)
            self._open |= len(self._serving()) == self._config.workers
            if self._open:
                self._hand_over_again()
        code = await worker.end()
        self._bury(worker)
        if is_ready and not self._stop.is_set():
            level = logger.info if code == 0 else logger.error
            level("%s %s; it is started again", worker, _how(code))
        return None if is_ready else f"it {_how(code)}"

    def _bury(self, worker: _Worker) -> None:
        """It is gone: the others are told, and get the clients that it has not taken."""
        del self._workers[worker.serial]
        for other in self._workers.values():
            if other.joined:
                other.channel.send(Gone(worker.serial))
        if self._stop.is_set():
            for connection in worker.untaken:
                connection.close()
            self._let_go()
            return
        for connection in worker.untaken:
            self._take(connection)

    def _not_started(self, message: str, failures: int) -> None:
        """Ends everything at the start, and later if no worker serves and each start fails."""
        if self._open and (self._serving() or failures < _TRIES):
            logger.error("%s; it is tried again", message)
        else:
            self._fail(OSError(message))

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        error = keeper.exception()
        if isinstance(error, Exception):
            logger.error("internal error of the supervisor", exc_info=error)
            self._fail(error)

    # Clients

    def _take(self, connection: socket.socket) -> None:
        if self._held or not self._hand_over(connection):
            self._held.append(connection)
            self._listeners.pause()
            self._try_later()

    def _hand_over(self, connection: socket.socket) -> bool:
        """Give it to the worker that has the fewest; whether one could take it."""
        for worker in sorted(self._serving(), key=lambda worker: (worker.sessions, worker.turn)):
            if worker.take(connection):
                worker.turn = next(self._turns)
                return True
            if not worker.is_stuck:
                return False  # it will take it soon
        return False

    def _serving(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.serves]

    def _try_later(self) -> None:
        """If no worker serves, the next one that is ready takes the connections."""
        if self._serving():
            asyncio.get_running_loop().call_later(_HAND_OVER_AGAIN, self._hand_over_again)

    def _hand_over_again(self) -> None:
        if self._stop.is_set():
            return
        while self._held:
            if not self._hand_over(self._held[0]):
                self._try_later()
                return
            self._held.popleft()
        self._listeners.resume()

    # What the workers say

    def _receive(self, worker: _Worker, message: Message) -> None:
        match message:
            case Report(event):
                self._reported(worker, event)
            case Question(number):
                worker.joined = True
                asked = self._others(worker, message.to)
                worker.channel.send(Asked(number, [other.serial for other in asked]))
                self._hand_on(worker, message, asked)
            case Answer() | Told():
                self._hand_on(worker, message, self._others(worker, message.to))

    def _reported(self, worker: _Worker, event: Event) -> None:
        match event:
            case Event.READY:
                worker.known(ready=True)
            case Event.TAKEN:
                worker.taken()
            case Event.REFUSED:
                worker.refused()
            case Event.CLOSED:
                worker.sessions -= 1
            case Event.DRAINING:
                worker.retire()
            case Event.DONE:
                worker.done = True
                self._let_go()

    def _others(self, worker: _Worker, serial: int | None) -> list[_Worker]:
        """All others, or one."""
        return [
            other
            for other in self._workers.values()
            if other is not worker and other.joined and serial in (None, other.serial)
        ]

    def _hand_on(
        self, worker: _Worker, message: Question | Answer | Told, others: list[_Worker]
    ) -> None:
        message = replace(message, sender=worker.serial)
        for other in others:
            other.channel.send(message)

    def _let_go(self) -> None:
        """Let those end that are done. While all are to end, they wait for each other, since what
        one knows of its jobs another may still ask for."""
        workers = self._workers.values()
        if self._stop.is_set() and not all(worker.done for worker in workers):
            return
        for worker in workers:
            if worker.done:
                worker.channel.send(EndNow())

    # Its life

    def _take_over(self, given: Given) -> list[str]:
        """Make another configuration hold, here and in all workers. Raises ConfigError."""
        settings, fixed = reloaded(self._config, config.build(given, os.environ))
        Runtime(settings)
        # A worker that is started later is to have what the others have.
        for name in fixed:
            given.pop(name, None)
            if name in self._given:
                given[name] = self._given[name]
        self._config, self._given = settings, given
        log.set_level(settings.log_level)
        for worker in self._workers.values():
            worker.channel.send(Configure(given))
        return fixed

    async def _shut_down(self, keepers: list[asyncio.Task[None]]) -> None:
        logger.info("shutting down: %d workers", len(self._workers))
        for worker in self._workers.values():
            worker.retire()
        all_kept = asyncio.ensure_future(asyncio.wait(keepers))
        told = asyncio.ensure_future(self._now.wait())
        await asyncio.wait(
            {all_kept, told},
            timeout=self._config.shutdown_timeout + LAST_WORDS + _END_TIMEOUT,
            return_when=asyncio.FIRST_COMPLETED,
        )
        told.cancel()
        for worker in self._workers.values():
            worker.channel.send(EndNow())
        await asyncio.wait({all_kept}, timeout=LAST_WORDS + _END_TIMEOUT)
        for worker in self._workers.values():
            logger.warning("%s has not ended in time", worker)
            worker.kill()
        await all_kept
        logger.info("all workers have ended")


def _how(code: int) -> str:
    """How a process ended, in PostgreSQL's words."""
    if code >= 0:
        return f"exited with exit code {code}"
    return f"was terminated by signal {-code}: {signal.strsignal(-code)}"
