"""Who gets a slot when there are limits for all, for a role and for a database: a model.

The model knows who has a slot and who waits. What it demands: no limit is passed, nobody is granted
twice, a slot that somebody could have does not stay empty, and among those that no limit of
their own stops the first that came is the first that is served.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.jobs.slots import Key, Limits, Slots
from tests.support.examples import examples

ROLES = st.sampled_from(["a", "b", "c"])
DATABASES = st.sampled_from(["x", "y"])
PROCESSES = st.integers(1, 3)
LIMITS = st.builds(Limits, st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))
WHICH = st.integers(0, 50)


@dataclass
class Asked:
    """A slot that was asked for."""

    key: Key
    role: str
    database: str
    arrived: float
    is_granted: bool = False


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.limits = Limits(2, 1, 0)
        self.hung: set[int] = set()
        self.slots = Slots(self.limits, self._granted, lambda process: process not in self.hung)
        self.asked: dict[Key, Asked] = {}
        self.number = 0

    def _granted(self, key: Key) -> None:
        asked = self.asked[key]
        assert not asked.is_granted
        assert key[0] not in self.hung
        asked.is_granted = True

    @rule(role=ROLES, database=DATABASES, process=PROCESSES, late=st.floats(0, 5))
    def take(self, role: str, database: str, process: int, late: float) -> None:
        if process in self.hung:
            return
        self.number += 1
        key = process, self.number
        asked = self.asked[key] = Asked(key, role, database, self.number - late)
        if self.slots.take(key, role, database, asked.arrived):
            assert not asked.is_granted
            asked.is_granted = True

    @rule(which=WHICH)
    def free(self, which: int) -> None:
        if self.asked:
            key = list(self.asked)[which % len(self.asked)]
            del self.asked[key]
            self.slots.free(key)

    @rule(process=PROCESSES)
    def process_dies(self, process: int) -> None:
        self.asked = {key: asked for key, asked in self.asked.items() if key[0] != process}
        self.slots.free_all(process)
        self.hung.discard(process)

    @rule(process=PROCESSES)
    def process_hangs(self, process: int) -> None:
        self.hung.add(process)

    @rule(process=PROCESSES)
    def process_answers_again(self, process: int) -> None:
        self.hung.discard(process)
        self.slots.able_again()

    @rule(limits=LIMITS)
    def change(self, limits: Limits) -> None:
        self.limits = limits
        self.slots.change(limits)

    def _count(self, *, role: str | None = None, database: str | None = None) -> int:
        return sum(
            asked.is_granted and role in (None, asked.role) and database in (None, asked.database)
            for asked in self.asked.values()
        )

    def _has_room(self, asked: Asked) -> bool:
        limits = self.limits
        return all(
            not most or count < most
            for most, count in (
                (limits.jobs, self._count()),
                (limits.per_role, self._count(role=asked.role)),
                (limits.per_database, self._count(database=asked.database)),
            )
        )

    @invariant()
    def what_is_counted_is_what_there_is(self) -> None:
        assert self.slots.held == self._count()
        assert self.slots.waiting == len(self.asked) - self._count()

    @invariant()
    def no_slot_stays_empty(self) -> None:
        """Whoever could have one has it, but for those behind others of their role."""
        waiting = [
            asked
            for asked in self.asked.values()
            if not asked.is_granted and asked.key[0] not in self.hung
        ]
        for asked in waiting:
            if self._has_room(asked):
                earlier = [other for other in waiting if other.arrived <= asked.arrived]
                assert any(
                    other.role == asked.role and other.database != asked.database
                    for other in earlier
                )

    def teardown(self) -> None:
        """Nobody starves: when all that run end, again and again, all that wait get their turn."""
        for process in tuple(self.hung):
            self.process_answers_again(process)
        for _ in range(len(self.asked) + 1):
            for key, asked in tuple(self.asked.items()):
                if asked.is_granted:
                    del self.asked[key]
                    self.slots.free(key)
        assert not self.asked


TestSlots = Machine.TestCase
TestSlots.settings = settings(
    max_examples=examples(200),
    stateful_step_count=50,
    deadline=None,
    # Shrinking takes minutes, and hypothesis prints the steps anyway.
    phases=(Phase.generate,),
)


def order(slots: Slots, granted: list[Key], held: list[Key]) -> list[Key]:
    """In which order those that wait are served, when those that run end."""
    for key in held:
        slots.free(key)
    for key in granted:
        slots.free(key)
    return granted


def test_the_first_that_came_is_the_first_that_is_served() -> None:
    granted: list[Key] = []
    slots = Slots(Limits(jobs=1), granted.append)
    assert slots.take((1, 1), "a", "x", 1.0)
    assert not slots.take((1, 2), "a", "x", 3.0)
    assert not slots.take((2, 1), "b", "y", 2.0)
    assert not slots.take((3, 1), "c", "x", 4.0)
    assert order(slots, granted, [(1, 1)]) == [(2, 1), (1, 2), (3, 1)]


def test_a_role_at_its_limit_keeps_no_other_waiting() -> None:
    slots = Slots(Limits(jobs=3, per_role=1), lambda key: None)
    assert slots.take((1, 1), "a", "x", 1.0)
    for number in range(2, 50):
        assert not slots.take((1, number), "a", "x", number)
    assert slots.take((2, 1), "b", "x", 60.0)


def test_the_later_of_a_role_do_not_overtake_one_that_waits_for_its_database() -> None:
    granted: list[Key] = []
    slots = Slots(Limits(per_role=1, per_database=1), granted.append)
    assert slots.take((1, 1), "b", "x", 1.0)
    assert slots.take((1, 2), "a", "y", 2.0)
    assert not slots.take((1, 3), "a", "x", 3.0)
    assert not slots.take((1, 4), "a", "y", 4.0)
    slots.free((1, 2))
    assert granted == []
    slots.free((1, 1))
    assert granted == [(1, 3)]
