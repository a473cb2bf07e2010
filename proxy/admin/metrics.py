"""The figures as Prometheus metrics.

Invariant: the number of time series is bounded, whatever clients do: labels have fixed sets of
values, except role and database, of which the first `MAX_LOGINS` pairs in the life of the process
are distinguished, and all others are ``other``.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from proxy import __version__
from proxy.admin.source import Processes
from proxy.loop import has_uvloop
from proxy.stats import DURATIONS, LAGS, LATENCIES, OTHER, Figures

PREFIX: Final = "pg_background_proxy"

MAX_LOGINS: Final = 100

_SOURCES: Final = {"client_bytes": "clients", "server_bytes": "servers", "job_bytes": "jobs"}


class Exposition:
    """Writes metrics."""

    def __init__(self) -> None:
        self._began = time.time()
        self._logins: set[tuple[str, str]] = set()

    def write(
        self, figures: Figures, processes: Processes, *, is_ready: bool, accept: str
    ) -> tuple[bytes, str]:
        """The text, and its content type.

        Args:
            figures: the sum over all processes.
            processes: how many there are.
            is_ready: whether a login to the server is possible.
            accept: the Accept header of the request.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collected(self._families(figures, processes, is_ready)))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _families(self, figures: Figures, processes: Processes, is_ready: bool) -> Iterator[Metric]:
        build = {
            "version": __version__,
            "python": platform.python_version(),
            "event_loop": "uvloop" if has_uvloop() else "asyncio",
        }
        yield InfoMetricFamily(f"{PREFIX}_build", "Which proxy this is.", build)
        yield _gauge("start_time_seconds", "When it was started, in Unix time.", self._began)
        yield _gauge("ready", "Whether a login to the server is possible.", int(is_ready))
        yield from _of_processes(processes)
        yield from self._gauges(figures["gauges"])
        yield from _counters(figures["counters"])

    def _gauges(self, gauges: Figures) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            f"{PREFIX}_jobs_running", "Jobs that run.", labels=("role", "database")
        )
        for (role, database), count in self._by_login(gauges["running"]).items():
            running.add_metric((role, database), count)
        yield running
        waiting = GaugeMetricFamily(
            f"{PREFIX}_jobs_waiting",
            "Jobs that wait: queued, for room; pending, for a commit.",
            labels=("state",),
        )
        for state in ("queued", "pending"):
            waiting.add_metric((state,), gauges["waiting"].get(state, 0))
        yield waiting
        yield _gauge("sessions", "Clients that are connected.", gauges["sessions"])
        for name, what in (
            ("spares", "Side backends that are logged in before a job needs them."),
            ("channels", "Backends that answer calls from inside the database."),
        ):
            family = GaugeMetricFamily(f"{PREFIX}_{name}", what, labels=("state",))
            for state, count in gauges[name].items():
                family.add_metric((state,), count)
            yield family

    def _by_login(self, running: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, str], int]:
        """Logins that once had jobs stay, with 0, so that no series ends at another value."""
        found = dict.fromkeys(sorted(self._logins), 0)
        for role, databases in running.items():
            for database, count in databases.items():
                login = self._admitted((role, database))
                found[login] = found.get(login, 0) + count
        return found

    def _admitted(self, login: tuple[str, str]) -> tuple[str, str]:
        if login not in self._logins:
            if len(self._logins) >= MAX_LOGINS:
                return OTHER, OTHER
            self._logins.add(login)
        return login


class _Collected:
    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


def _of_processes(processes: Processes) -> Iterator[Metric]:
    yield _gauge("worker_processes", "Processes that serve clients now.", processes.alive)
    yield _gauge("worker_processes_configured", "How many there should be.", processes.configured)
    yield _gauge(
        "worker_processes_silent",
        "Those whose figures are older, because they do not answer.",
        processes.silent,
    )
    yield _counter(
        "worker_restarts", "Processes that ended and were started again.", processes.restarts
    )


def _counters(counted: Figures) -> Iterator[Metric]:
    yield _counter("jobs_launched", "Jobs that were launched.", counted["launched"])
    yield _by_class("launches_failed", "Launches that failed.", counted["not_launched"])
    ended = CounterMetricFamily(
        f"{PREFIX}_jobs_ended",
        "Jobs that have ended: stopped, error, canceled, abandoned; with the class of the error.",
        labels=("state", "sqlstate_class"),
    )
    for state, classes in ({"stopped": {"": 0}} | counted["ended"]).items():
        for name, count in classes.items():
            ended.add_metric((state, name), count)
    yield ended
    yield _histogram("job_duration_seconds", "From launch to end.", DURATIONS, counted["duration"])
    yield _histogram(
        "launch_latency_seconds",
        "From the call to when the server has the job's SQL.",
        LATENCIES,
        counted["latency"],
    )
    yield _counter("client_connections", "Connections of clients.", counted["connections"])
    yield _by_class(
        "logins_refused", "Logins of clients that ended in an error.", counted["refused"]
    )
    yield _counter(
        "upstream_connects", "Connections to the server that came about.", counted["connects"]
    )
    yield _counter("upstream_connect_failures", "Those that did not.", counted["failed_connects"])
    received = CounterMetricFamily(
        f"{PREFIX}_received_bytes",
        "Bytes from clients and from their primary backends, after the login, and from the side"
        " backends of jobs.",
        labels=("source",),
    )
    for name, source in _SOURCES.items():
        received.add_metric((source,), counted[name])
    yield received
    yield _histogram("event_loop_lag_seconds", "How late the event loop is.", LAGS, counted["lag"])


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", what, value=value)


def _by_class(name: str, what: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", what, labels=("sqlstate_class",))
    for sqlstate_class, count in counts.items():
        family.add_metric((sqlstate_class,), count)
    return family


def _histogram(name: str, what: str, bounds: Sequence[float], figures: Figures) -> Metric:
    buckets: list[tuple[str, float]] = []
    so_far = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), figures["counts"], strict=True):
        so_far += count
        buckets.append((bound, so_far))
    return HistogramMetricFamily(
        f"{PREFIX}_{name}", what, buckets=buckets, sum_value=figures["sum"]
    )
