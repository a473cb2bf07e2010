"""Runs PostgreSQL's own load generator, pgbench, and reads its output."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.client import BenchError
from bench.targets import Target

GRACE: Final = 60.0
"""Seconds that a run may take beyond its duration."""


@dataclass(frozen=True)
class Run:
    """The result of a run of pgbench; ``latencies`` in ms, if they were asked for."""

    tps: float
    transactions: int
    latencies: list[float]


def init(program: str, target: Target, scale: int) -> None:
    """Creates pgbench's tables."""
    _run(program, target, GRACE, "-i", "-q", "-s", str(scale))


def run(
    program: str,
    target: Target,
    *options: str,
    clients: int,
    seconds: int,
    sampling: float | None = None,
) -> Run:
    """One run; ``sampling``: the share of the transactions whose latency is recorded.

    If ``seconds`` is 0, each client runs a few transactions.

    Raises:
        BenchError: pgbench failed, or a client of it was aborted.
    """
    threads = min(clients, os.cpu_count() or 1)
    length = ("-T", str(seconds)) if seconds else ("-t", "30")
    options = ("-n", "-c", str(clients), "-j", str(threads), *length, *options)
    with tempfile.TemporaryDirectory(prefix="pgbg-bench-") as folder:
        if sampling is not None:
            log = ("--log", f"--log-prefix={folder}/log")
            share = () if sampling >= 1 else (f"--sampling-rate={sampling}",)
            options = (*options, *log, *share)
        said = _run(program, target, seconds + GRACE, *options)
        return Run(
            float(_find(r"^tps = ([\d.]+)", said)),
            int(_find(r"^number of transactions actually processed: (\d+)", said)),
            [time for path in Path(folder).iterdir() for time in _latencies(path)],
        )


def _latencies(log: Path) -> list[float]:
    """The third column is the elapsed time of a transaction in microseconds."""
    with log.open() as lines:
        return [int(line.split(maxsplit=3)[2]) / 1000 for line in lines]


def _find(pattern: str, said: str) -> str:
    match = re.search(pattern, said, re.MULTILINE)
    if match is None:
        raise BenchError(f"pgbench said: {said[-500:]}")
    return match[1]


def _run(program: str, target: Target, timeout: float, *options: str) -> str:
    done = subprocess.run(
        [program, *options],
        env=target.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"pgbench {' '.join(options)}: {done.stderr.strip()[-500:]}")
    return done.stdout
