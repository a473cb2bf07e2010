"""A large result: rows of a number and its MD5 through pg_background_result.

The yardstick is the same SELECT on the server itself. The same SELECT through the proxy, without a
job, shows the cost of the way; the rest is the cost of the job.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from bench.client import Session
from bench.harness import Bench, Turn
from bench.results import TIME, Outcome
from bench.targets import Target


def run(bench: Bench) -> None:
    """Measures the result and the SELECT."""
    count = bench.effort.rows
    sql = f"SELECT i, md5(i::text) FROM generate_series(1, {count}) i"
    job, plain = f"{count:,} rows, pg_background_result", f"{count:,} rows, SELECT"

    def select(session: Session) -> None:
        session.skim(sql, f"SELECT {count}")

    def launch_and_result(session: Session) -> None:
        pid = session.value(f"SELECT pg_background_launch('{sql}')")
        result = f"SELECT * FROM pg_background_result({pid}) AS (i int, hash text)"
        session.skim(result, f"SELECT {count}")

    def turn(target: Target, work: Callable[[Session], None], *cases: str) -> Turn:
        return Turn(cases, target.name, partial(_timed, target, work))

    bench.alternate(
        [
            turn(bench.targets.direct, select, job, plain),
            *(turn(target, launch_and_result, job) for target in bench.targets.launchers()),
            *(turn(target, select, plain) for target in bench.targets.relays()),
        ]
    )


def _timed(target: Target, work: Callable[[Session], None]) -> Outcome:
    with target.connect() as session:
        started = time.perf_counter()
        work(session)
        return {TIME: time.perf_counter() - started}
