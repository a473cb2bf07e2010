"""The numbers of one run, in memory and as JSON.

A series is one target's values for one metric of one case, one for each round. Values of the same
round were measured right after one another, so a ratio of two targets is the median of its ratios
round by round: a disturbance of the machine affects both sides.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

DIRECT: Final = "direct"
PROXY: Final = "proxy"
PGBOUNCER: Final = "PgBouncer"
EXTENSION: Final = "extension"
ALONE: Final = "no reuse"
"""The proxy with a new backend for each job."""
PLAIN: Final = "all off"
"""The proxy without log, metrics and other extras."""
TARGETS: Final = (DIRECT, PROXY, ALONE, PLAIN, PGBOUNCER, EXTENSION)


@dataclass(frozen=True)
class Metric:
    """A quantity and its unit."""

    name: str
    unit: str

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}"


YARDSTICKS: Final = {
    "launch": "direct: a fresh connection and SELECT 1 on it",
    "sustained": "direct: a fresh connection and SELECT 1 on it for each job",
    "rows": "direct: the same SELECT without a job",
}
"""What the server itself does, where that is not what the proxy does, by measure."""

TPS: Final = Metric("throughput", "transactions/s")
MEDIAN: Final = Metric("median", "ms")
P99: Final = Metric("99th percentile", "ms")
CPU_TRANSACTION: Final = Metric("CPU of the proxy", "µs/transaction")
CPU_JOB: Final = Metric("CPU of the proxy", "ms/job")
SERVER_CPU_JOB: Final = Metric("CPU of the server", "ms/job")
CPU_MEGABYTE: Final = Metric("CPU of the proxy", "ms/MB")
BANDWIDTH: Final = Metric("throughput", "MB/s")
CONNECTIONS: Final = Metric("throughput", "connections/s")
LAUNCHES: Final = Metric("throughput", "jobs/s")
TIME: Final = Metric("time", "s")
MEMORY: Final = Metric("memory", "kB/connection")

Outcome: TypeAlias = dict[Metric, float]


@dataclass
class Series:
    """The values of one target, by round."""

    measure: str
    case: str
    metric: Metric
    target: str
    values: dict[int, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.values.values())


@dataclass(frozen=True)
class Spread:
    """A median and the range of its values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Results:
    """The outcome of a run.

    Args:
        about: date, machine and versions, as strings.
        notes: what was skipped or failed, and why.
    """

    about: dict[str, str]
    series: list[Series] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, measure: str, case: str, target: str, number: int, outcome: Outcome) -> None:
        """Adds the outcome of a turn in a round."""
        for metric, value in outcome.items():
            found = self.find(measure, case, metric, target)
            if found is None:
                found = Series(measure, case, metric, target)
                self.series.append(found)
            found.values[number] = value

    def find(self, measure: str, case: str, metric: Metric, target: str) -> Series | None:
        """A series, if it was measured."""
        wanted = (measure, case, metric, target)
        return next(
            (s for s in self.series if (s.measure, s.case, s.metric, s.target) == wanted), None
        )

    def median(self, measure: str, case: str, metric: Metric, target: str) -> float | None:
        """The median of a series, if it was measured."""
        found = self.find(measure, case, metric, target)
        return None if found is None else found.median

    def ratio(self, measure: str, case: str, metric: Metric, over: str) -> Spread | None:
        """The proxy's value over another target's, round by round."""
        ours = self.find(measure, case, metric, PROXY)
        theirs = self.find(measure, case, metric, over)
        if ours is None or theirs is None:
            return None
        both = [n for n in ours.values if theirs.values.get(n)]
        ratios = [ours.values[n] / theirs.values[n] for n in both]
        return Spread.of(ratios) if ratios else None

    def measures(self) -> list[str]:
        """The names of the measures, in order."""
        return list(dict.fromkeys(s.measure for s in self.series))

    def rows(self, measure: str | None = None) -> Iterator[tuple[str, str, Metric]]:
        """Measure, case and metric of all values that can be compared."""
        seen = dict.fromkeys((s.measure, s.case, s.metric) for s in self.series)
        return (row for row in seen if measure in (None, row[0]))

    def targets(self, measure: str) -> list[str]:
        """The targets in a measure."""
        took_part = {s.target for s in self.series if s.measure == measure}
        return [target for target in TARGETS if target in took_part]

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        series = [_rounded(asdict(s)) for s in self.series]
        lines = ",\n".join(json.dumps(s, ensure_ascii=False) for s in series)
        head = json.dumps({"about": self.about, "notes": self.notes}, ensure_ascii=False, indent=1)
        path.write_text(f'{head[:-2]},\n "series": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads the file that `save` has written."""
        data = json.loads(path.read_text())
        return cls(data["about"], [_series(s) for s in data["series"]], data["notes"])


def _rounded(series: dict[str, Any]) -> dict[str, Any]:
    values = {number: float(f"{value:.5g}") for number, value in series["values"].items()}
    return {**series, "values": values}


def _series(data: dict[str, Any]) -> Series:
    values = {int(number): value for number, value in data["values"].items()}
    metric = Metric(**data["metric"])
    return Series(data["measure"], data["case"], metric, data["target"], values)
