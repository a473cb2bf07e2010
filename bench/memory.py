"""Memory of the process in between, for each connection of a client.

Resident memory does not include the kernel's socket buffers. Each figure is from a fresh process,
because a process seldom gives memory back. It is the growth while the connections are opened (idle:
each has run ``SELECT 1``), or up to the peak of a pgbench run (busy). A few connections may fit
into memory that the process has already, so the large number counts. It is measured with a
`playback` in place of real backends.
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias

from bench import pgbench
from bench.client import BenchError
from bench.harness import Bench, Turn
from bench.playback import QUERY, Playback
from bench.results import MEMORY, PGBOUNCER, PROXY, Outcome
from bench.targets import Target, Usage, pgbouncer, proxy

SPARE_FILES: Final = 200
SETTLE: Final = 0.5
WARM_UP: Final = 5

Figure: TypeAlias = Callable[[Target], float]
"""Bytes for each connection through a target."""


def run(bench: Bench) -> None:
    """Measures some connections, idle and busy, then very many idle ones."""
    bench.make_tables()
    few = bench.effort.memory_clients
    server = bench.targets.direct
    _measure(bench, f"{few} connections, idle", partial(_idle, few), server)
    _measure(bench, f"{few} connections, busy", partial(_busy, bench, few), server)
    if not bench.targets.own_server:
        bench.skip("on a running server: only these connections")
        return
    many = min(bench.effort.idle_connections, _room())
    if many < bench.effort.idle_connections:
        bench.skip(f"the limit of open files allows {many} connections")
    with Playback(server) as playback:
        _measure(bench, f"{many:,} connections, idle", partial(_idle, many), playback.target)


def _room() -> int:
    """How many connections a process may have, two open files each.

    The proxy has the two inner ends, and this process has the two outer ends.
    """
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (files - SPARE_FILES) // 2


def _measure(bench: Bench, case: str, figure: Figure, server: Target) -> None:
    turns = [
        Turn((case,), name, partial(_fresh, bench, name, server, figure))
        for name in [target.name for target in bench.targets.relays()]
    ]
    bench.alternate(turns, rounds=1)


def _fresh(bench: Bench, name: str, server: Target, figure: Figure) -> Outcome:
    with _started(bench, name, server) as target:
        for _ in range(WARM_UP):
            with target.connect() as session:
                session.value("SELECT 1")
        time.sleep(SETTLE)
        return {MEMORY: figure(target) / 1000}


@contextlib.contextmanager
def _started(bench: Bench, name: str, server: Target) -> Iterator[Target]:
    options = bench.targets.options
    if name == PROXY:
        with proxy(server, *options.proxy) as target:
            yield target
        return
    assert name == PGBOUNCER
    program = bench.targets.pgbouncer_program
    assert program is not None
    with pgbouncer(program, server) as target:
        yield target


def _idle(count: int, target: Target) -> float:
    before = _memory(target)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(target.connect()).value(QUERY)
        time.sleep(SETTLE)
        return (_memory(target) - before) / count


def _busy(bench: Bench, count: int, target: Target) -> float:
    before = most = _memory(target)
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, _memory(target))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        pgbench.run(
            bench.targets.pgbench,
            target,
            *("-S", "-M", "prepared"),
            clients=count,
            seconds=bench.effort.pgbench_seconds,
        )
    finally:
        done.set()
        watcher.join(5.0)
    return (most - before) / count


def _memory(target: Target) -> int:
    if target.pid is None:
        raise BenchError("there is no process in between")
    return Usage.of(target.pid).memory
