"""A worker process, as the supervisor sees it.

Invariant: this decides nothing. It starts and ends the process, gives it connections, and keeps
those not taken yet, so that they can go to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

from proxy.log import logger
from proxy.net.acceptor import Accepted
from proxy.net.descriptors import turn_away
from proxy.workers.bus import WorkerPipe
from proxy.workers.messages import PLAIN, WITH_HEADER, Message, Ping

_START_TIMEOUT: Final = 30.0
"""Seconds for a worker to become ready."""

END_TIMEOUT: Final = 5.0
"""Seconds before a worker that should have ended is killed."""

_STUCK: Final = 1.0
"""Seconds without taking a connection after which others get a worker's share."""

HANGS: Final = 3
"""Unanswered pings after which a worker gets no new clients and is not waited for. A worker that is
merely busy answers all of them at once, later."""


class WorkerProcess:
    """One process.

    Attributes:
        number: its place among the workers, from 1, which a replacement inherits.
        serial: unique, also among past workers.
        sessions: number of its connections, including those not taken yet.
        untaken: the latter, kept to go to others if it dies.
        turn: when it last got one.
        joined: whether it answers questions.
        ready: whether it serves; resolved when that is known.
        done: whether it only waits for others to end.
        unanswered: number of consecutive pings without an answer within a second.
    """

    process: asyncio.subprocess.Process
    pipe: WorkerPipe

    def __init__(self, number: int, serial: int) -> None:
        self.number = number
        self.serial = serial
        self.sessions = 0
        self.untaken: deque[Accepted] = deque()
        self.turn = 0
        # When its socket became full, by the loop's clock; 0 if it is not.
        self._full_since = 0.0
        self.joined = False
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.done = False
        self.unanswered = 0
        self._is_pinged = False
        self._clients: socket.socket | None = None
        # The worker's end of that socket, from which untaken connections can be taken back.
        self._its_end: socket.socket | None = None

    def __str__(self) -> str:
        return f"worker {self.number} (PID {self.process.pid})"

    async def start(self, receive: Callable[[Message], None]) -> None:
        """Start the process. Raises OSError."""
        with contextlib.ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            self._clients, clients = socket.socketpair()
            self._its_end = stack.enter_context(clients).dup()
            for end in (self._clients, self._its_end):
                end.setblocking(False)
            fds = (theirs.fileno(), clients.fileno())
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "proxy.workers.worker", *map(str, fds)),
                stdin=asyncio.subprocess.DEVNULL,
                # The same modules, whatever the working directory contains.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                pass_fds=fds,
                # Out of reach of a terminal's Ctrl-C.
                start_new_session=True,
            )
            self.pipe = await WorkerPipe.over(ours.dup(), receive)
        self.pipe.lost.add_done_callback(lambda _: self.set_ready(False))
        asyncio.get_running_loop().call_later(_START_TIMEOUT, self._too_late)

    def _too_late(self) -> None:
        if not self.ready.done():
            logger.error("%s did not get ready in time", self)
            self.kill()

    def set_ready(self, ready: bool) -> None:
        """The worker serves now, or never will."""
        if not self.ready.done():
            self.ready.set_result(ready)

    @property
    def serves(self) -> bool:
        """Whether it takes new clients."""
        return self.ready.done() and self.ready.result() and self._clients is not None

    @property
    def answers(self) -> bool:
        """Whether it answers questions, if it does not hang."""
        return self.joined and not self.pipe.lost.done()

    def take(self, connection: Accepted) -> bool:
        """Give it a connection. Returns whether it could take it."""
        assert self._clients is not None
        try:
            mark = WITH_HEADER if connection.has_header else PLAIN
            socket.send_fds(self._clients, [mark], [connection.socket.fileno()])
        except OSError:  # full, or gone
            self._full_since = self._full_since or asyncio.get_running_loop().time()
            return False
        self._full_since = 0.0
        self.sessions += 1
        self.untaken.append(connection)
        return True

    @property
    def state(self) -> str:
        """Its state in the console."""
        if not self.ready.done():
            return "starting"
        if self.hangs:
            return "hung"
        return "active" if self.serves else "draining"

    @property
    def is_stuck(self) -> bool:
        """Whether it has taken no connection for so long that others should get its share."""
        now = asyncio.get_running_loop().time()
        return self._full_since > 0.0 and now - self._full_since > _STUCK

    def taken(self) -> None:
        """The worker has taken the oldest connection given to it."""
        self.untaken.popleft().socket.close()

    def refused(self) -> None:
        """The worker has no file descriptor for that one."""
        turn_away(self.untaken.popleft().socket)
        self.sessions -= 1

    def take_back(self) -> list[Accepted]:
        """Take back the untaken connections, which it will not get any more."""
        count = 0
        while self._its_end is not None:
            try:
                marks, fds, _, _ = socket.recv_fds(self._its_end, 1, 1)
            except OSError:  # there are no more
                break
            for fd in fds:
                os.close(fd)
            if not marks:
                break
            count += 1
        self.sessions -= count
        return [self.untaken.pop() for _ in range(count)][::-1]

    def retire(self) -> None:
        """Give it no more clients, so that it ends when its present ones have left."""
        for end in (self._clients, self._its_end):
            if end is not None:
                end.close()
        self._clients = self._its_end = None

    @property
    def hangs(self) -> bool:
        """Whether it has not answered pings for seconds."""
        return self.unanswered >= HANGS

    def ping(self) -> None:
        """Send it another ping."""
        self.unanswered += self._is_pinged
        self._is_pinged = True
        self.pipe.send(Ping())

    def heard_from(self) -> None:
        """The worker has answered, so it does not hang."""
        self.unanswered = 0
        self._is_pinged = False

    async def end(self) -> int:
        """Wait for its end. Returns the exit code, or the negative number of a signal."""
        await self.pipe.lost
        self.retire()
        try:
            return await asyncio.wait_for(self.process.wait(), END_TIMEOUT)
        except TimeoutError:
            self.kill()
            return await self.process.wait()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
