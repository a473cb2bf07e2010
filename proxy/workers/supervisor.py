"""The supervisor of several processes that serve clients together.

Invariant: the supervisor serves no client and knows nothing of PostgreSQL. It listens, gives each
connection to the worker with the fewest, forwards messages between workers (`peers`), restarts a
worker that dies, kills one that hangs, handles signals, and is the last to end.

Why it hands over connections, instead of letting workers accept them: sessions are few and long, so
even distribution matters. Measured with 2 workers and 32 connections at once, the share of the
busier one, median and worst of 30 tries: SO_REUSEPORT, which hashes, 56 and 66 %; one shared
listening socket 56 and 100 %; handed over 50 and 50 % (8 connections: 62 and 88, 100 and 100, 50
and 50 %). The cost is not measurable beside the server's work for a new connection. Also, a
worker's death loses no connection that it has not taken, and Unix sockets are no special case.

A hanging worker (stopped, or its event loop blocked) is detected by pings, one a second, which its
loop answers. The number of unanswered pings counts, not the time: while the supervisor itself is
stopped, or the machine asleep, no ping goes out that could be missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import os
import secrets
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from protocol.errors import OBJECT_NOT_IN_PREREQUISITE_STATE, UNDEFINED_OBJECT
from proxy import config, log
from proxy.config import Given
from proxy.ending import Ending
from proxy.entrance import Entrance
from proxy.jobs.slots import Limits
from proxy.log import logger
from proxy.net.acceptor import Accepted
from proxy.net.service_manager import ServiceManager
from proxy.net.takeover import TakeoverError
from proxy.reasons import explain
from proxy.runtime import (
    LAST_WORDS,
    Reloaded,
    Runtime,
    find_server,
    reload,
    reloaded,
)
from proxy.workers.all_workers import AllWorkers
from proxy.workers.messages import (
    SUPERVISOR,
    Answer,
    Asked,
    Configure,
    EndNow,
    Event,
    FreeSlot,
    Gone,
    HasSlot,
    Message,
    News,
    Order,
    Outcome,
    Question,
    Report,
    TakeSlot,
)
from proxy.workers.process import END_TIMEOUT, HANGS, WorkerProcess
from proxy.workers.sealed import GROUP
from proxy.workers.slots import AllSlots

_LONG_LIFE: Final = 10.0
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 10.0
"""Seconds before a worker is restarted, at most: zero if it lived long, then growing."""

_TRIES: Final = 5
"""Consecutive failures to start a worker while there is no other."""

_PING: Final = 1.0
"""Seconds between two pings."""

_SETTLED: Final = 5.0
"""Seconds for workers to take held connections before a successor takes over."""

_HELD: Final = "held"
"""Why listeners are paused: no worker can take more at the moment."""

_HAND_OVER_AGAIN: Final = 0.005
"""Seconds before a connection that no worker could take is offered again."""


class Supervisor:
    """All workers.

    Args:
        given: reads the configuration. Raises ConfigError.
    """

    def __init__(self, given: Callable[[], Given]) -> None:
        self._read = given
        self._given = given()
        self._group = secrets.token_hex(GROUP)
        self._config = config.build(self._given, os.environ)
        self._workers: dict[int, WorkerProcess] = {}
        self._serials = itertools.count(1)
        self._turns = itertools.count(1)
        # Workers do not get these variables, which are for the one process it knows.
        self._manager = ServiceManager(os.environ)
        # Clients wait until all workers are ready; otherwise the first would get them all.
        self._all_there = asyncio.Event()
        self._open = False
        # Connections that no worker could take yet.
        self._held: deque[Accepted] = deque()
        self._none_held = asyncio.Event()
        self._none_held.set()
        self._ending = Ending(lambda: self._config)
        self._source = AllWorkers(
            *(self._workers.values, self._config.workers),
            *(self._ending.begun.is_set, Runtime(self._config)),
        )
        self._slots = AllSlots(Limits.of(self._config), self._workers)
        self._entrance = Entrance(
            *(self._config, self._manager, self._source, self._take, self._ending, self._settle)
        )
        self._listeners = self._entrance.listeners
        # The error that ends it.
        self._failure: Exception | None = None

    async def run(self) -> int:
        """Serve until SIGINT, SIGTERM or a takeover, then let all workers end; the exit code.

        Raises OSError if it cannot start: a required server is unreachable, an address is taken, or
        a worker cannot be started; ConfigError for an invalid file.
        """
        async with self._entrance:
            await self._entrance.look_for_predecessor()
            self._manager.begin()
            looking = await find_server(lambda: Runtime(self._config), self._manager)
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(signum, self._ending.signalled)
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            await self._entrance.prepare()
            await self._serve(looking)
        if self._failure is not None:
            raise self._failure
        return 0

    async def _serve(self, looking: asyncio.Task[None] | None) -> None:
        loop = asyncio.get_running_loop()
        numbers = range(1, self._config.workers + 1)
        keepers = [loop.create_task(self._keep_running(number)) for number in numbers]
        watches = [loop.create_task(self._watch()), loop.create_task(self._open_when_all_there())]
        for task in (*keepers, watches[-1]):
            task.add_done_callback(self._keeper_ended)
        if self._config.admin_listen is not None:
            watches.append(loop.create_task(self._source.keep_asking()))
        await self._ending.begun.wait()
        self._entrance.shut()
        self._manager.stopping(self._config.shutdown_timeout)
        if looking is not None:
            looking.cancel()
        for connection in self._held:
            connection.socket.close()
        await self._shut_down(keepers)
        for watch in watches:
            watch.cancel()
        await self._entrance.predecessor_has_ended()

    async def _open_when_all_there(self) -> None:
        await self._all_there.wait()
        try:
            await self._entrance.open()
        except OSError as error:
            self._fail(error)
            return
        self._open = True
        self._hand_over_again()

    async def _settle(self) -> None:
        """Wait until workers have taken all connections. Raises OSError."""
        try:
            async with asyncio.timeout(_SETTLED):
                await self._none_held.wait()
        except TimeoutError:
            raise TakeoverError("clients wait for a worker that does not take them") from None

    def _reload(self) -> Reloaded:
        return reload(self._manager, self._read, self._take_over)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._ending.at_once()

    # One worker's place

    async def _keep_running(self, number: int) -> None:
        """Keep a worker in this place, until the end."""
        loop = asyncio.get_running_loop()
        delay = 0.0
        failures = 0
        while not self._ending.begun.is_set():
            began = loop.time()
            worker = WorkerProcess(number, next(self._serials))
            try:
                await worker.start(functools.partial(self._receive, worker))
            except OSError as error:
                reason: str | None = str(error) or explain(error)
            else:
                reason = await self._serve_with(worker)
            if self._ending.begun.is_set():
                return
            failures = 0 if reason is None else failures + 1
            if reason is not None:
                self._not_started(f"worker {number} could not be started: {reason}", failures)
            if loop.time() - began > _LONG_LIFE:
                delay = 0.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.begun.wait(), delay)
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)

    async def _serve_with(self, worker: WorkerProcess) -> str | None:
        """Run a worker to its end. Returns how it ended, if it never became ready."""
        self._workers[worker.serial] = worker
        name = f"worker {worker.number}"
        worker.pipe.send(Configure(self._given, name, self._group))
        if self._ending.begun.is_set():
            worker.retire()
        is_ready = await worker.ready
        if is_ready:
            logger.info("%s is ready", worker)
            if len(self._serving()) == self._config.workers:
                self._all_there.set()
            if self._open:
                self._hand_over_again()
        code = await worker.end()
        self._worker_ended(worker)
        if is_ready and not self._ending.begun.is_set():
            level = logger.info if code == 0 else logger.error
            level("%s %s; it is started again", worker, _how(code))
            self._source.restarts += 1
        return None if is_ready else f"it {_how(code)}"

    async def _watch(self) -> None:
        """Ping all workers that were ready, and handle those that do not answer."""
        while True:
            await asyncio.sleep(_PING)
            for worker in tuple(self._workers.values()):
                if worker.ready.done() and not worker.pipe.lost.done():
                    worker.ping()
                    if worker.hangs:
                        self._does_not_answer(worker)

    def _does_not_answer(self, worker: WorkerProcess) -> None:
        others = [other for other in self._serving() if not other.hangs]
        if others:
            for connection in worker.take_back():
                self._take(connection)
        if worker.unanswered == HANGS:
            logger.warning(
                "%s does not answer; it has %d sessions, and new clients %s",
                worker,
                worker.sessions,
                "go to the others" if others else "wait for it",
            )
        seconds = worker.unanswered * _PING
        if 0 < self._config.hung_worker_timeout <= seconds:
            logger.error(
                "%s has not answered for %d seconds and is killed: its %d sessions and their"
                " jobs are lost",
                worker,
                seconds,
                worker.sessions,
            )
            worker.kill()

    def _heard_from(self, worker: WorkerProcess) -> None:
        hung = worker.hangs
        worker.heard_from()
        if hung:
            logger.info("%s answers again; it gets new clients again", worker)
            self._slots.able_again()

    def _worker_ended(self, worker: WorkerProcess) -> None:
        """A worker is gone: tell the others, and give them its untaken clients."""
        self._slots.free_all(worker.serial)
        del self._workers[worker.serial]
        self._source.gone(worker.serial)
        for other in self._workers.values():
            if other.joined:
                other.pipe.send(Gone(worker.serial))
        if self._ending.begun.is_set():
            for connection in worker.untaken:
                connection.socket.close()
            self._end_those_done()
            return
        for connection in worker.untaken:
            self._take(connection)

    def _not_started(self, message: str, failures: int) -> None:
        """End everything at startup; later only if no worker serves and each start fails."""
        if self._open and (self._serving() or failures < _TRIES):
            logger.error("%s; it is tried again", message)
        else:
            self._fail(OSError(message))

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        error = None if keeper.cancelled() else keeper.exception()
        if isinstance(error, Exception):
            logger.error("internal error of the supervisor", exc_info=error)
            self._fail(error)

    # Clients

    def _take(self, connection: Accepted) -> None:
        if self._held or not self._hand_over(connection):
            self._held.append(connection)
            self._none_held.clear()
            self._listeners.pause(_HELD)
            self._try_later()

    def _hand_over(self, connection: Accepted) -> bool:
        """Give a connection to the worker with the fewest. Returns whether one could take it."""
        for worker in sorted(self._serving(), key=lambda w: (w.hangs, w.sessions, w.turn)):
            if worker.take(connection):
                worker.turn = next(self._turns)
                return True
            if not worker.is_stuck:
                return False  # it will be able to soon
        return False

    def _serving(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers.values() if worker.serves]

    def _try_later(self) -> None:
        """Offer connections again; without a serving worker, once one is ready."""
        if self._serving():
            asyncio.get_running_loop().call_later(_HAND_OVER_AGAIN, self._hand_over_again)

    def _hand_over_again(self) -> None:
        if self._ending.begun.is_set():
            return
        while self._held:
            if not self._hand_over(self._held[0]):
                self._try_later()
                return
            self._held.popleft()
        self._none_held.set()
        self._listeners.resume(_HELD)

    # Messages of workers

    def _receive(self, worker: WorkerProcess, message: Message) -> None:
        self._heard_from(worker)
        match message:
            case Report(event):
                self._reported(worker, event)
            case Question(number):
                worker.joined = True
                asked = self._others(worker, message.to)
                answering, hanging = (
                    [other.serial for other in asked if other.hangs is hangs]
                    for hangs in (False, True)
                )
                worker.pipe.send(Asked(number, answering, hanging))
                self._hand_on(worker, message, asked)
            case Answer(to=to) if to == SUPERVISOR:
                self._source.answered(worker.serial, message)
            case Answer() | News():
                self._hand_on(worker, message, self._others(worker, message.to))
            case TakeSlot() | HasSlot() | FreeSlot():
                self._slots.heard(worker.serial, message)
            case Order():
                worker.pipe.send(self._carry_out(message))

    def _reported(self, worker: WorkerProcess, event: Event) -> None:
        match event:
            case Event.READY:
                worker.set_ready(True)
            case Event.TAKEN:
                worker.taken()
            case Event.REFUSED:
                worker.refused()
            case Event.CLOSED:
                worker.sessions -= 1
            case Event.DRAINING:
                self._retire(worker)
            case Event.DONE:
                worker.done = True
                self._end_those_done()
            case Event.ALIVE:
                pass

    # Orders of the console

    def _carry_out(self, order: Order) -> Outcome:
        match order.what:
            case "processes":
                workers = sorted(self._workers.values(), key=lambda worker: worker.serial)
                return Outcome(
                    order.number,
                    [[w.number, w.process.pid, w.state, w.sessions] for w in workers],
                )
            case "drain":
                return Outcome(order.number, error=self._drain(order.worker))
            case "reload":
                return Outcome(order.number, self._reload())
            case "shut_down":
                self._ending.signalled()
                return Outcome(order.number)

    def _drain(self, number: int) -> Sequence[str] | None:
        """Let a worker end and be replaced. Returns why not, if so."""
        serving = self._serving()
        found = [worker for worker in serving if worker.number == number]
        if not found:
            hint = "SHOW WORKERS lists those that are active."
            return UNDEFINED_OBJECT, f"there is no worker {number} that is active", "", hint
        if len(serving) == 1:
            return (
                OBJECT_NOT_IN_PREREQUISITE_STATE,
                f"cannot drain worker {number}",
                "It is the only one that is active.",
                "Try again when SHOW WORKERS lists another.",
            )
        logger.info("%s is drained: the console wants it", found[0])
        self._retire(found[0])
        return None

    def _retire(self, worker: WorkerProcess) -> None:
        """Let a worker end: its sessions and jobs may go on for shutdown_timeout."""
        worker.retire()
        if (seconds := self._config.shutdown_timeout) < math.inf:
            asyncio.get_running_loop().call_later(seconds, worker.pipe.send, EndNow())

    def _others(self, worker: WorkerProcess, serial: int | None) -> list[WorkerProcess]:
        return [
            other
            for other in self._workers.values()
            if other is not worker and other.joined and serial in (None, other.serial)
        ]

    def _hand_on(
        self, worker: WorkerProcess, message: Question | Answer | News, others: list[WorkerProcess]
    ) -> None:
        message = replace(message, sender=worker.serial)
        for other in others:
            other.pipe.send(message)

    def _end_those_done(self) -> None:
        """Let workers end that are done. In a shutdown they wait for each other, since one may
        still be asked about its jobs by another."""
        workers = self._workers.values()
        if self._ending.begun.is_set() and not all(worker.done for worker in workers):
            return
        for worker in workers:
            if worker.done:
                worker.pipe.send(EndNow())

    # Life cycle

    def _take_over(self, given: Given) -> list[str]:
        """Apply another configuration, here and in all workers. Raises ConfigError."""
        settings, fixed = reloaded(self._config, config.build(given, os.environ))
        self._source.runtime = Runtime(settings)
        # Workers started later must have what the others have.
        for name in fixed:
            given.pop(name, None)
            if name in self._given:
                given[name] = self._given[name]
        self._config, self._given = settings, given
        self._slots.change(Limits.of(settings))
        log.change(settings.log_level, settings.log_format)
        for worker in self._workers.values():
            worker.pipe.send(Configure(given))
        return fixed

    async def _shut_down(self, keepers: list[asyncio.Task[None]]) -> None:
        logger.info("shutting down: %d workers", len(self._workers))
        for worker in self._workers.values():
            worker.retire()
        all_kept = asyncio.ensure_future(asyncio.wait(keepers))
        told = asyncio.ensure_future(self._ending.now.wait())
        await asyncio.wait({all_kept, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        for worker in self._workers.values():
            worker.pipe.send(EndNow())
        await asyncio.wait({all_kept}, timeout=LAST_WORDS + END_TIMEOUT)
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
