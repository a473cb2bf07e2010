"""The supervisor's view of its workers' jobs and figures, for monitoring.

Invariant: it asks when asked, and does not wait for workers that hang: their last answers stand in.
Counters only grow: those of a worker that is gone stay in the sum, as far as reported; so the
supervisor also asks periodically.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

from proxy.admin.source import Processes
from proxy.runtime import Runtime
from proxy.stats import Counters, Figures, total
from proxy.workers.bus import WorkerPipe
from proxy.workers.messages import SUPERVISOR, Answer, Ask, CancelJob, Measure, Question, ShowJobs
from proxy.workers.question import OpenQuestion

_TIMEOUT: Final = 2.0
"""Seconds for a worker to answer."""

_CANCELING: Final = 15.0
"""The same if it must tell the server something."""

_BY_ITSELF: Final = 5.0
"""Seconds between periodic questions."""


class AWorker(Protocol):
    """The part of `process.WorkerProcess` that is used here."""

    serial: int
    pipe: WorkerPipe

    @property
    def hangs(self) -> bool: ...
    @property
    def answers(self) -> bool: ...
    @property
    def serves(self) -> bool: ...


class AllWorkers:
    """All workers together, as a `Source`.

    Args:
        workers: the present ones.
        configured: how many there should be.
        stopping: whether no more clients are taken.

    Attributes:
        runtime: the live objects made of the configuration; set at each reload.
        restarts: number of workers started to replace one that had ended.
    """

    def __init__(
        self,
        workers: Callable[[], Collection[AWorker]],
        configured: int,
        stopping: Callable[[], bool],
        runtime: Runtime,
    ) -> None:
        self._workers = workers
        self._configured = configured
        self._stopping = stopping
        self.runtime = runtime
        self.restarts = 0
        self._silent = 0
        self._numbers = itertools.count(1)
        self._asked: dict[int, OpenQuestion] = {}
        # The last figures of each worker, and the counters of those that are gone.
        self._last: dict[int, Figures] = {}
        self._past: Figures = Counters().figures()

    @property
    def unready(self) -> str:
        if self._stopping():
            return "the proxy is shutting down"
        serving = any(worker.serves and not worker.hangs for worker in self._workers())
        return "" if serving else "no worker process serves"

    def processes(self) -> Processes:
        alive = sum(worker.serves for worker in self._workers())
        return Processes(alive, self._configured, self._silent, self.restarts)

    async def figures(self) -> Figures:
        await self._ask(Measure())
        latest = list(self._last.values())
        none = {"running": {}, "waiting": {}, "sessions": 0, "spares": {}, "channels": {}}
        return {
            "counters": total([self._past, *(figures["counters"] for figures in latest)]),
            "gauges": total([none, *(figures["gauges"] for figures in latest)]),
        }

    async def jobs(self) -> list[dict[str, Any]]:
        return list((await self._ask(ShowJobs())).values())

    async def cancel(self, pid: int, cookie: int) -> bool:
        # A worker without this job says yes too: it does not run there.
        answers = await self._ask(CancelJob(pid, cookie), _CANCELING)
        return bool(answers) and not self._silent

    async def keep_asking(self) -> None:
        """Ask periodically, so that few counts are lost when a worker crashes."""
        while True:
            await asyncio.sleep(_BY_ITSELF)
            await self.figures()

    async def _ask(self, ask: Ask, timeout: float = _TIMEOUT) -> dict[int, Any]:
        """The answers of the workers that do answer, by serial number."""
        asked = [worker for worker in self._workers() if worker.answers]
        number = next(self._numbers)
        answers: dict[int, Any] = {}

        def take(serial: int, body: Any) -> bool:
            answers[serial] = body
            if isinstance(ask, Measure):  # at once: the worker may be gone before the question is
                self._last[serial] = body
            return False

        question = self._asked[number] = OpenQuestion(take)
        question.asked(worker.serial for worker in asked if not worker.hangs)
        for worker in asked:
            if not worker.hangs:
                worker.pipe.send(Question(number, ask, sender=SUPERVISOR))
        try:
            await asyncio.wait([question.over], timeout=timeout)
        finally:
            del self._asked[number]
        self._silent = len(asked) - len(answers)
        return answers

    # Called by the supervisor

    def answered(self, serial: int, answer: Answer) -> None:
        """A worker has answered, or reported its last figures."""
        if answer.number == 0 and answer.body is not None:
            self._last[serial] = answer.body
        elif (question := self._asked.get(answer.number)) is not None:
            question.answer(serial, answer.body)

    def gone(self, serial: int) -> None:
        if (last := self._last.pop(serial, None)) is not None:
            self._past = total([self._past, last["counters"]])
        for question in self._asked.values():
            question.gone(serial)
