"""Turns and rounds: how everything is measured here.

Invariant: in each round every target takes one turn, and every other round runs backwards, so none
always runs first, or always after the same one. A turn that fails is noted and left out; the others
go on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import psycopg

from bench import pgbench
from bench.client import BenchError
from bench.effort import Effort
from bench.results import Outcome, Results
from bench.targets import Targets

FAILURES = (BenchError, OSError, psycopg.Error, subprocess.SubprocessError, psutil.Error)


@dataclass(frozen=True)
class Turn:
    """One target's part in each round.

    Args:
        cases: the cases that the outcome counts for; a yardstick's counts for several.
        target: its name.
        run: takes the turn.
    """

    cases: tuple[str, ...]
    target: str
    run: Callable[[], Outcome]


@dataclass
class Bench:
    """What a measure works with."""

    targets: Targets
    effort: Effort
    results: Results
    progress: Progress
    measure: str = "bench"
    _has_tables: bool = False

    def make_tables(self) -> None:
        """Creates pgbench's tables, once."""
        if not self._has_tables:
            pgbench.init(self.targets.pgbench, self.targets.direct, self.effort.scale)
            self._has_tables = True

    def alternate(self, turns: Sequence[Turn], rounds: int | None = None) -> None:
        """Takes the turns, round by round, until all are done or the time is over."""
        rounds = rounds or self.effort.rounds
        left = list(turns)
        for number in range(rounds):
            for turn in left[::-1] if number % 2 else left[:]:
                if self.progress.is_over:
                    self.skip(f"{', '.join(turn.cases)}: round {number + 1}: out of time")
                    return
                self.progress.show(
                    f"{self.measure}: {turn.cases[0]}",
                    f"{turn.target}, round {number + 1}/{rounds}",
                )
                try:
                    outcome = turn.run()
                except FAILURES as error:
                    self.skip(f"{', '.join(turn.cases)}: {turn.target} failed: {error}")
                    left.remove(turn)
                    continue
                for case in turn.cases:
                    self.results.add(self.measure, case, turn.target, number, outcome)

    def skip(self, why: str) -> None:
        """Notes why something was not measured."""
        self.results.notes.append(f"{self.measure}: {why}")
        self.progress.note(self.results.notes[-1])


@dataclass
class Progress:
    """Shows on stderr what is running, for how long so far, and its limit."""

    limit: float
    step: str = ""
    _started: float = field(default_factory=time.monotonic)
    _shown: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the time is over, so that no turn may begin."""
        return time.monotonic() - self._started > self.limit

    def show(self, case: str, detail: str) -> None:
        """Shows the case: on a terminal in one line that changes, else in a line of its own."""
        if sys.stderr.isatty():
            line = f"\r\x1b[K{self._clock()} {case} ({detail})"
            print(line[:160], end="", file=sys.stderr, flush=True)
        elif case != self._shown:
            self._shown = case
            print(f"{self._clock()} {case}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        start = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{start}{self._clock()} {text}", file=sys.stderr, flush=True)

    def _clock(self) -> str:
        now = int(time.monotonic() - self._started)
        limit = int(self.limit)
        return f"[{self.step} {now // 60}:{now % 60:02} of at most {limit // 60}:{limit % 60:02}]"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value such that this share of the values is not above it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
