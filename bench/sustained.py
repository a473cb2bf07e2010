"""Launches without pause, by 4 sessions at a time, for long enough to run out of spares.

Each pgbench transaction launches a job and fetches its result, so the figure is completed jobs. The
yardstick is a fresh connection to the server and ``SELECT 1`` on it: with a backend for each job, a
launch cannot be faster than the start of a backend. The proxy is measured in that way, too.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from bench import connecting, pgbench
from bench.harness import Bench, Turn
from bench.results import ALONE, CONNECTIONS, DIRECT, LAUNCHES, Outcome
from bench.targets import Target, proxy

CASE: Final = "launch and result, 4 sessions, no pause"
SCRIPT: Final = """\
SELECT pg_background_launch('SELECT 1') AS pid \\gset
SELECT * FROM pg_background_result(:pid) AS (n int);
"""


def run(bench: Bench) -> None:
    """Measures one long round."""
    with proxy(bench.targets.direct, "--reuse-lifetime", "0") as alone:
        targets = [*bench.targets.launchers(), replace(alone, name=ALONE)]
        turns = [
            Turn((CASE,), DIRECT, partial(_yardstick, bench)),
            *(Turn((CASE,), target.name, partial(_load, bench, target)) for target in targets),
        ]
        bench.alternate(turns, rounds=1)


def _yardstick(bench: Bench) -> Outcome:
    done = connecting.load(bench, bench.targets.direct)
    return {LAUNCHES: done[CONNECTIONS]}


def _load(bench: Bench, target: Target) -> Outcome:
    with tempfile.NamedTemporaryFile("w", prefix="pgbg-bench-", suffix=".sql") as script:
        script.write(SCRIPT)
        script.flush()
        done = pgbench.run(
            bench.targets.pgbench,
            target,
            *("-f", str(Path(script.name))),
            clients=connecting.CLIENTS,
            seconds=bench.effort.sustained_seconds,
        )
    return {LAUNCHES: done.tps}
