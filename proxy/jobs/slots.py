"""Slots: the places that the proxy has for jobs, over all sessions and processes.

Invariant: a job has a slot from before its login to its end, and gives it back once. `Slots` counts
them in one place: in the single process, or in the supervisor (`workers.slots`), where launches
wait in order of arrival. One that waits because of its role or database does not hold up others.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from proxy.config import Config
from proxy.jobs.attached import WAIT_FOR_ROOM
from proxy.jobs.room import FullError, WaitLimit

Key = tuple[int, int]
"""The process that a slot is for, and its number there."""

HERE: Final = 0
"""The process number if there is only one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of jobs: in all, of each role and of each database; 0: none."""

    jobs: int = 0
    per_role: int = 0
    per_database: int = 0

    @classmethod
    def of(cls, config: Config) -> Limits:
        """The limits that the configuration sets."""
        return cls(config.max_jobs, config.max_jobs_per_role, config.max_jobs_per_database)

    def __bool__(self) -> bool:
        return self != NO_LIMITS


NO_LIMITS: Final = Limits()


class Full(NamedTuple):
    """The setting that allows no more jobs, and its value."""

    setting: str
    most: int


@dataclass(order=True, slots=True)
class _Waiter:
    arrived: float
    turn: int
    key: Key = field(compare=False)


_Group = tuple[str, str]
"""Role and database."""


class Slots:
    """The slots granted, and the requests that wait.

    Args:
        limits: of their number.
        granted: called when a request that waited is granted.
        is_able: whether a process would notice.
    """

    def __init__(
        self,
        limits: Limits,
        granted: Callable[[Key], None],
        is_able: Callable[[int], bool] = lambda process: True,
    ) -> None:
        self._limits = limits
        self._granted = granted
        self._is_able = is_able
        self._held: dict[Key, _Group] = {}
        self._roles: Counter[str] = Counter()
        self._databases: Counter[str] = Counter()
        self._waiting: dict[_Group, list[_Waiter]] = {}
        self._group_of: dict[Key, _Group] = {}
        self._turns = itertools.count()

    @property
    def held(self) -> int:
        """Number of slots granted."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._group_of)

    def take(self, key: Key, role: str, database: str, arrived: float) -> bool:
        """Request a slot. Returns whether it is granted at once; otherwise the request waits.

        `arrived`: the time of the launch, by the system's monotonic clock.
        """
        group = role, database
        bisect.insort(self._waiting.setdefault(group, []), _Waiter(arrived, next(self._turns), key))
        self._group_of[key] = group
        self._dispense(at_once=key)
        return key in self._held

    def hold(self, key: Key, role: str, database: str) -> None:
        """Count a slot that is in use already, whatever the limits."""
        if key not in self._held:
            self._held[key] = role, database
            self._roles[role] += 1
            self._databases[database] += 1

    def free(self, key: Key) -> None:
        """Give back a slot, or withdraw a request."""
        self._forget(key)
        self._dispense()

    def free_all(self, process: int) -> None:
        for key in [key for key in (*self._held, *self._group_of) if key[0] == process]:
            self._forget(key)
        self._dispense()

    def _forget(self, key: Key) -> None:
        if (held := self._held.pop(key, None)) is not None:
            self._roles[held[0]] -= 1
            self._databases[held[1]] -= 1
            self._roles += Counter()  # removes zeros
            self._databases += Counter()
        elif key in self._group_of:
            self._leave(key)

    def change(self, limits: Limits) -> None:
        """Apply other limits to what is granted from now on."""
        self._limits = limits
        self._dispense()

    def able_again(self) -> None:
        """A process can be told again what is granted."""
        self._dispense()

    def full(self, role: str, database: str) -> Full | None:
        """The limit that stops a request; None if there is none."""
        limits = self._limits
        for setting, most, number in (
            ("max_jobs", limits.jobs, len(self._held)),
            ("max_jobs_per_role", limits.per_role, self._roles[role]),
            ("max_jobs_per_database", limits.per_database, self._databases[database]),
        ):
            if most and number >= most:
                return Full(setting, most)
        return None

    def _leave(self, key: Key) -> _Group:
        group = self._group_of.pop(key)
        waiters = self._waiting[group]
        waiters[:] = [waiter for waiter in waiters if waiter.key != key]
        if not waiters:
            del self._waiting[group]
        return group

    def _dispense(self, at_once: Key | None = None) -> None:
        while (key := self._next()) is not None:
            role, database = self._leave(key)
            self.hold(key, role, database)
            if key != at_once:
                self._granted(key)

    def _next(self) -> Key | None:
        """The next request: the first in order of arrival that no limit stops. One that its
        database stops has a claim to its role's next slot; otherwise later ones of the role, in
        other databases, could take it again and again.
        """
        firsts: list[tuple[_Waiter, _Group]] = []
        for group, waiters in self._waiting.items():
            able = (waiter for waiter in waiters if self._is_able(waiter.key[0]))
            if (first := next(able, None)) is not None:
                firsts.append((first, group))
        claims: Counter[str] = Counter()
        for waiter, (role, database) in sorted(firsts):
            full = self.full(role, database)
            if full is None and not self._is_claimed(role, claims):
                return waiter.key
            if full is not None and full.setting == "max_jobs":
                return None
            if full is not None and full.setting == "max_jobs_per_database":
                claims[role] += 1
        return None

    def _is_claimed(self, role: str, claims: Counter[str]) -> bool:
        most = self._limits.per_role
        return most > 0 and self._roles[role] + claims[role] >= most


class Slot:
    """A slot that a launch in this process has asked for.

    Attributes:
        number: unique in this process.
        is_granted: whether it was granted.
        full: if not, the limit that stops it.
        is_counted: whether the counting process knows it.
    """

    def __init__(self, number: int, role: str, database: str) -> None:
        self.number = number
        self.role = role
        self.database = database
        self.is_granted = False
        self.full: Full | None = None
        self.is_counted = True
        self._woken = asyncio.Event()

    def grant(self) -> None:
        self.is_granted = True
        self._woken.set()

    async def changed(self) -> None:
        """Wait until the slot is granted."""
        await self._woken.wait()

    @property
    def refusal(self) -> FullError:
        """The error for a launch that gets no slot."""
        whose = f'of role "{self.role}"'
        detail = f"Others {whose} came before."
        if self.full is not None:
            setting, most = self.full
            whose = {
                "max_jobs_per_role": f" {whose}",
                "max_jobs_per_database": f' in database "{self.database}"',
            }.get(setting, "")
            detail = f"{setting} allows {most} background workers{whose}, and so many run."
        return FullError(detail=detail, hint=f"Wait for some to finish, or {WAIT_FOR_ROOM}.")


class SlotSource(ABC):
    """Where the launches of this process get slots."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.slots: dict[int, Slot] = {}

    async def take(self, role: bytes, database: bytes, wait_limit: WaitLimit) -> Slot:
        """A slot for a job of this login role in this database.

        Raises SQLError; FullError if there is none in time.
        """
        names = (name.decode("utf-8", "backslashreplace") for name in (role, database))
        slot = Slot(next(self._numbers), *names)
        self.slots[slot.number] = slot
        try:
            await self._ask(slot, wait_limit)
            while not slot.is_granted:
                if not wait_limit.may_wait:
                    raise slot.refusal
                await wait_limit.wait(slot, slot.refusal)
        except BaseException:
            self.give_back(slot)
            raise
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's job has ended, or never was. Repeated calls do nothing."""
        if self.slots.pop(slot.number, None) is not None and slot.is_counted:
            self._free(slot)

    def granted(self, number: int) -> None:
        """A slot that was asked for is granted."""
        if (slot := self.slots.get(number)) is not None:
            slot.grant()

    @abstractmethod
    async def _ask(self, slot: Slot, wait_limit: WaitLimit) -> None:
        """Ask for a slot: it is granted, or its `full` says why not. Raises SQLError."""

    @abstractmethod
    def _free(self, slot: Slot) -> None:
        """The slot is no longer needed."""

    @abstractmethod
    def change(self, limits: Limits) -> None:
        """Apply other limits."""


class OwnSlots(SlotSource):
    """The slots of the single process."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._all = Slots(limits, lambda key: self.granted(key[1]))

    async def _ask(self, slot: Slot, wait_limit: WaitLimit) -> None:
        if self._all.take((HERE, slot.number), slot.role, slot.database, wait_limit.arrived):
            slot.grant()
        else:
            slot.full = self._all.full(slot.role, slot.database)

    def _free(self, slot: Slot) -> None:
        self._all.free((HERE, slot.number))

    def change(self, limits: Limits) -> None:
        self._all.change(limits)
