"""More than one worker process: pgbench -S through a proxy with one, and with two.

On a machine with two cores the server and pgbench alone keep both busy.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Final

from bench import select_only
from bench.harness import Bench, Turn
from bench.results import DIRECT
from bench.targets import proxy, proxy_has_option

WORKERS: Final = (1, 2)
CLIENTS: Final = 32
MODE: Final = "prepared"


def run(bench: Bench) -> None:
    """Measures both."""
    if not proxy_has_option("--workers"):
        bench.skip("this proxy has no --workers")
        return
    server = bench.targets.direct
    bench.make_tables()
    with contextlib.ExitStack() as stack:
        turns = []
        for count in WORKERS:
            options = (*bench.targets.options.proxy, "--workers", str(count))
            target = stack.enter_context(proxy(server, *options))
            case = f"pgbench -S -M {MODE} -c {CLIENTS}, {count} workers"
            work = partial(select_only.load, bench, target, MODE, CLIENTS)
            turns.append(Turn((case,), target.name, work))
        cases = tuple(case for turn in turns for case in turn.cases)
        yardstick = partial(select_only.load, bench, server, MODE, CLIENTS)
        bench.alternate([Turn(cases, DIRECT, yardstick), *turns])
