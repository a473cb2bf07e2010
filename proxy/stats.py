"""What this process has counted since its start: jobs, logins, connections, bytes.

Invariant: counting costs a few machine instructions and never fails, whether or not anybody reads
the counters (`admin` does). They only grow, and `total` adds them up over processes. What clients
can make up, such as an SQLSTATE, is counted under one of a fixed set of names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

Figures: TypeAlias = "dict[str, Any]"
"""Numbers, lists of numbers, and dicts of these, as JSON."""

OTHER: Final = "other"
"""Stands for everything without a name of its own."""

_CLASSES: Final = frozenset(
    (  # noqa: SIM905 - as the manual lists them
        "00 01 02 03 08 09 0A 0B 0F 0L 0P 0Z 10 20 21 22 23 24 25 26 27 28 2B 2D 2F 34 38 39 3B"
        " 3D 3F 40 42 44 53 54 55 57 58 72 F0 HV P0 XX"
    ).split()
)
"""Classes of SQLSTATEs (manual, "PostgreSQL Error Codes")."""

DURATIONS: Final = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)
LATENCIES: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
LAGS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""Upper bounds of the histograms' buckets in seconds; a last bucket has the rest."""


def error_class(sqlstate: str | None) -> str:
    """The class of an SQLSTATE, its first two characters; "" for None."""
    if sqlstate is None:
        return ""
    return found if (found := sqlstate[:2]) in _CLASSES else OTHER


class Histogram:
    """How many values fell into each bucket, and the sum of all."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value. A clock that was set back gives no negative time."""
        value = max(0.0, value)
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def figures(self) -> Figures:
        """The counts, not cumulative, and the sum."""
        return {"counts": list(self.counts), "sum": self.sum}


class Counters:
    """The counters of a process.

    Attributes:
        client_bytes, server_bytes, job_bytes: received after the login from clients, from their
            primary backends, and from side backends.
        connections: made by clients.
        refused: logins that failed, by class of the error.
        connects, failed_connects: connections to the server, for sessions, jobs and all else.
        launched: jobs.
        not_launched: launches that failed, by class of the error.
        ended: jobs, by state and class of the error.
        duration, latency: of jobs and launches, in seconds.
        lag: of the event loop, in seconds, if measured.
    """

    __slots__ = (
        *("client_bytes", "server_bytes", "job_bytes", "connections", "refused", "connects"),
        *("failed_connects", "launched", "not_launched", "ended", "duration", "latency", "lag"),
    )

    def __init__(self) -> None:
        self.client_bytes = self.server_bytes = self.job_bytes = 0
        self.connections = self.connects = self.failed_connects = self.launched = 0
        self.refused: defaultdict[str, int] = defaultdict(int)
        self.not_launched: defaultdict[str, int] = defaultdict(int)
        self.ended: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.duration = Histogram(DURATIONS)
        self.latency = Histogram(LATENCIES)
        self.lag = Histogram(LAGS)

    def job_ended(self, state: str, sqlstate: str | None, seconds: float) -> None:
        self.ended[state][error_class(sqlstate)] += 1
        self.duration.observe(seconds)

    def figures(self) -> Figures:
        """All counters, by name."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.figures()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


counters: Final = Counters()
"""Those of this process; like the logger, there is one."""


def total(parts: Iterable[Figures]) -> Figures:
    """The sum over several processes."""
    summed: Figures = {}
    for part in parts:
        for name, value in part.items():
            summed[name] = _sum(summed[name], value) if name in summed else value
    return summed


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return total((first, second))
    if isinstance(first, list):
        return [a + b for a, b in zip(first, second, strict=True)]
    return first + second
