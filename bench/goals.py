"""The goals of the proxy, and whether a run has met them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.launching import PACES
from bench.results import (
    BANDWIDTH,
    CONNECTIONS,
    CPU_TRANSACTION,
    DIRECT,
    EXTENSION,
    LAUNCHES,
    MEDIAN,
    MEMORY,
    PGBOUNCER,
    PLAIN,
    PROXY,
    SERVER_CPU_JOB,
    TIME,
    TPS,
    Metric,
    Results,
    Spread,
)


@dataclass(frozen=True)
class Goal:
    """A bound for the proxy's ratio to another target, or for its own value.

    Args:
        measure: its name.
        case: a pattern with ``*``.
        metric: what is bounded.
        over: the other target; None: the value itself is bounded.
        limit: the bound.
        at_least: whether it is a lower one.
    """

    measure: str
    case: str
    metric: Metric
    over: str | None
    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        of = f" × {self.over}" if self.over else f" {self.metric.unit}"
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{of}"

    def applies(self, measure: str, case: str, metric: Metric) -> bool:
        """Whether the goal is about this row."""
        same = (measure, metric) == (self.measure, self.metric)
        return same and fnmatch.fnmatchcase(case, self.case)

    def is_met(self, value: float) -> bool:
        """Whether a median is within the bound, rounded as it is shown: to two digits."""
        return value >= self.limit - 0.005 if self.at_least else value <= self.limit + 0.005


GOALS: Final = (
    *(
        goal
        for mode in ("simple", "prepared")
        for goal in (
            Goal("pgbench", f"*-M {mode} -c 8", TPS, PGBOUNCER, 0.95, at_least=True),
            Goal("pgbench", f"*-M {mode} -c 8", CPU_TRANSACTION, PGBOUNCER, 1.1),
        )
    ),
    Goal("watched", "*", TPS, PLAIN, 0.98, at_least=True),
    Goal("watched", "*", CPU_TRANSACTION, PLAIN, 1.02),
    Goal("bulk", "*", BANDWIDTH, DIRECT, 0.95, at_least=True),
    *(
        goal
        for pace in PACES
        for goal in (
            Goal("launch", f"launch, {pace}", MEDIAN, EXTENSION, 0.6),
            Goal("launch", f"launch, then result, {pace}", MEDIAN, EXTENSION, 0.5),
            Goal("launch", f"launch and detach in PL/pgSQL, {pace}", MEDIAN, EXTENSION, 1.0),
            Goal("launch", f"launch, then result, {pace}", SERVER_CPU_JOB, DIRECT, 1.2),
        )
    ),
    Goal("sustained", "*", LAUNCHES, EXTENSION, 1.5, at_least=True),
    Goal("connecting", "*", CONNECTIONS, DIRECT, 0.9, at_least=True),
    Goal("rows", "*pg_background_result", TIME, DIRECT, 1.05),
    Goal("memory", "* idle", MEMORY, None, 24),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and the measured value; ``found`` is None if one of the two sides is missing."""

    goal: Goal
    case: str
    found: Spread | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if something is missing."""
        return None if self.found is None else self.goal.is_met(self.found.median)


def verdict(results: Results, measure: str, case: str, metric: Metric) -> Verdict | None:
    """The verdict on one row, if there is a goal for it."""
    for goal in GOALS:
        if goal.applies(measure, case, metric):
            return Verdict(goal, case, _found(results, goal, case))
    return None


def verdicts(results: Results) -> Iterator[Verdict]:
    """All verdicts on a run."""
    for row in results.rows():
        if (found := verdict(results, *row)) is not None:
            yield found


def _found(results: Results, goal: Goal, case: str) -> Spread | None:
    if goal.over is not None:
        return results.ratio(goal.measure, case, goal.metric, goal.over)
    ours = results.find(goal.measure, case, goal.metric, PROXY)
    return None if ours is None else Spread.of(list(ours.values.values()))
