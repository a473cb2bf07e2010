"""pgbench -S: the shortest useful transaction, in which a process in between costs most.

In all three protocols (``prepared`` is what drivers do), alone and with many clients. CPU time is
the operating system's figure for the process in between, divided by the transactions of the run: on
a busy machine it says more than the throughput. Latencies are from a sample in pgbench's log,
because logging every transaction would slow pgbench down.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Final

from bench import pgbench
from bench.harness import Bench, Turn, percentile
from bench.results import CPU_TRANSACTION, MEDIAN, P99, TPS, Outcome
from bench.targets import Target

SAMPLING: Final = 0.2


def run(bench: Bench) -> None:
    """Measures each mode with each number of clients."""
    bench.make_tables()
    for mode in bench.effort.modes:
        for clients in bench.effort.clients:
            case = f"pgbench -S -M {mode} -c {clients}"
            bench.alternate(
                [
                    Turn((case,), target.name, partial(load, bench, target, mode, clients))
                    for target in bench.targets.all()
                ]
            )


def load(bench: Bench, target: Target, mode: str, clients: int) -> Outcome:
    """One run of pgbench against one target."""
    before = target.usage()
    done = pgbench.run(
        bench.targets.pgbench,
        target,
        *("-S", "-M", mode),
        clients=clients,
        seconds=bench.effort.pgbench_seconds,
        sampling=SAMPLING,
    )
    outcome = {
        TPS: done.tps,
        MEDIAN: statistics.median(done.latencies),
        P99: percentile(done.latencies, 0.99),
    }
    after = target.usage()
    if before is not None and after is not None:
        outcome[CPU_TRANSACTION] = (after.cpu - before.cpu) * 1e6 / done.transactions
    return outcome
