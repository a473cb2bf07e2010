"""Slots for jobs with several processes: the supervisor grants them.

Invariant: the supervisor alone counts, so limits hold over all processes, and all launches wait in
one order. A worker asks only if there are limits; if some are set while jobs run, it reports these.
A process that is gone has no slots; one that hangs gets none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from protocol.errors import CONNECTION_FAILURE, SQLError
from proxy.jobs.room import WaitLimit
from proxy.jobs.slots import Full, Key, Limits, Slot, Slots, SlotSource
from proxy.workers.bus import WorkerPipe
from proxy.workers.messages import FreeSlot, HasSlot, SlotAnswer, Slotting, TakeSlot
from proxy.workers.process import WorkerProcess

_TIMEOUT: Final = 5.0
"""Seconds for the supervisor to answer."""


class AllSlots(Slots):
    """The slots of all workers, in the supervisor.

    Args:
        limits: of their number.
        workers: the present ones, by serial number.
    """

    def __init__(self, limits: Limits, workers: Mapping[int, WorkerProcess]) -> None:
        super().__init__(limits, self._grant, lambda serial: not workers[serial].hangs)
        self._workers = workers

    def heard(self, serial: int, message: Slotting) -> None:
        """A worker wants a slot, or has one, or gives one back."""
        key = serial, message.number
        match message:
            case TakeSlot(number, role, database, arrived):
                if self.take(key, role, database, arrived):
                    self._grant(key)
                elif full := self.full(role, database):
                    self._answer(serial, SlotAnswer(number, False, *full))
                else:  # other workers of the role came first
                    self._answer(serial, SlotAnswer(number, False))
            case HasSlot(_, role, database):
                self.hold(key, role, database)
            case FreeSlot():
                self.free(key)

    def _grant(self, key: Key) -> None:
        serial, number = key
        self._answer(serial, SlotAnswer(number, True))

    def _answer(self, serial: int, answer: SlotAnswer) -> None:
        self._workers[serial].pipe.send(answer)


class SupervisorsSlots(SlotSource):
    """The slots of one of several workers."""

    def __init__(self, limits: Limits, pipe: WorkerPipe) -> None:
        super().__init__()
        self._limits = limits
        self._pipe = pipe
        self._answers: dict[int, asyncio.Future[None]] = {}

    async def _ask(self, slot: Slot, wait_limit: WaitLimit) -> None:
        if not self._limits:
            slot.is_counted = False
            slot.grant()
            return
        answered = self._answers[slot.number] = asyncio.get_running_loop().create_future()
        self._pipe.send(TakeSlot(slot.number, slot.role, slot.database, wait_limit.arrived))
        try:
            async with asyncio.timeout(_TIMEOUT):
                await answered
        except TimeoutError:
            raise SQLError(
                CONNECTION_FAILURE,
                "could not start a background worker",
                detail="The proxy's supervisor does not answer.",
            ) from None
        finally:
            del self._answers[slot.number]

    def answered(self, answer: SlotAnswer) -> None:
        """The supervisor has granted a slot, or makes it wait."""
        slot = self.slots.get(answer.number)
        if slot is None:
            return  # the slot was withdrawn meanwhile
        if answer.granted:
            slot.grant()
        else:
            slot.full = Full(answer.setting, answer.most) if answer.setting else None
        waiter = self._answers.get(answer.number)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _free(self, slot: Slot) -> None:
        self._pipe.send(FreeSlot(slot.number))

    def change(self, limits: Limits) -> None:
        self._limits = limits
        if not limits:
            return
        for slot in self.slots.values():
            if not slot.is_counted:
                slot.is_counted = True
                self._pipe.send(HasSlot(slot.number, slot.role, slot.database))
