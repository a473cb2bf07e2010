"""How long a launch takes. A program without pg_background would open a connection instead.

Each block is a series of launches, back to back or paced (the proxy has time to prepare for the
next, as with a user at work). The yardstick is a fresh connection to the server itself and ``SELECT
1`` on it. Times are measured in the client; CPU time is that of all server processes, and of the
proxy, over a block.

The proxy is measured twice: as it is, when a session's jobs share a backend, and with a new backend
for each job, as every first job of a session has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from bench.client import Session
from bench.harness import Bench, Turn, percentile
from bench.results import ALONE, CPU_JOB, DIRECT, MEDIAN, P99, SERVER_CPU_JOB, Outcome
from bench.targets import Target, Usage, proxy

LAUNCH: Final = "SELECT pg_background_launch('SELECT 1')"
PACES: Final = {"back to back": 0.0, "10 ms apart": 0.01}
WARM_UP: Final = 3
AFTERWARDS: Final = 0.05
"""Seconds until the last jobs of a block have ended."""

INSIDE: Final = "bench_inside"
"""A database with the extension, functions and a table."""
SET_UP: Final = (
    "CREATE EXTENSION IF NOT EXISTS pg_background",
    "CREATE TABLE IF NOT EXISTS bench_log (at timestamptz, what text)",
    "CREATE TABLE IF NOT EXISTS bench_account (id int, balance int)",
    "CREATE OR REPLACE FUNCTION bench_launch() RETURNS void LANGUAGE plpgsql AS"
    " 'BEGIN PERFORM pg_background_detach(pg_background_launch(''SELECT 1'')); END'",
    "CREATE OR REPLACE FUNCTION bench_audit() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN PERFORM pg_background_detach(pg_background_launch("
    "format(''INSERT INTO bench_log VALUES (now(), %L)'', NEW.id))); RETURN NEW; END'",
    "DROP TRIGGER IF EXISTS bench_audit ON bench_account",
    "CREATE TRIGGER bench_audit BEFORE INSERT ON bench_account"
    " FOR EACH ROW EXECUTE PROCEDURE bench_audit()",
)


def run(bench: Bench) -> None:
    """Measures each kind of launch, at each pace."""
    with proxy(bench.targets.direct, "--reuse-lifetime", "0") as alone:
        launchers = [*bench.targets.launchers(), replace(alone, name=ALONE)]
        inside = [_inside(bench, target) for target in launchers]
        for pace, pause in PACES.items():
            kinds = [(kind, block, launchers) for kind, block in KINDS.items()]
            kinds += [(kind, block, inside) for kind, block in KINDS_INSIDE.items()]
            cases = tuple(f"{kind}, {pace}" for kind, *_ in kinds)
            direct = bench.targets.direct
            turns = [Turn(cases, DIRECT, partial(_fresh, bench, direct, pause))]
            for case, (_, block, targets) in zip(cases, kinds, strict=True):
                turns += [
                    Turn((case,), target.name, partial(launches, bench, target, block, pause))
                    for target in targets
                ]
            bench.alternate(turns)


def _inside(bench: Bench, target: Target) -> Target:
    """Measures launches from functions in the database, and the C extension if it is there."""
    if target is not bench.targets.extension:
        target = target.has(INSIDE)
    with target.connect() as session:
        for sql in SET_UP:
            session.value(sql)
    return target


def launch(session: Session) -> float:
    """The launch alone. The result is fetched after the measurement, to leave nothing behind."""
    started = time.perf_counter()
    pid = session.value(LAUNCH)
    elapsed = time.perf_counter() - started
    result(session, pid)
    return elapsed


def launch_and_result(session: Session) -> float:
    """The launch, and then its rows: two statements."""
    started = time.perf_counter()
    result(session, session.value(LAUNCH))
    return time.perf_counter() - started


def launch_and_detach(session: Session) -> float:
    """The launch, and then detaching the job: two statements."""
    started = time.perf_counter()
    session.value(f"SELECT pg_background_detach({session.value(LAUNCH)})")
    return time.perf_counter() - started


def statement(sql: str, session: Session) -> float:
    """One statement: the database launches and detaches a job."""
    started = time.perf_counter()
    session.value(sql)
    return time.perf_counter() - started


def result(session: Session, pid: str) -> None:
    """Fetches the job's one row."""
    session.value(f"SELECT * FROM pg_background_result({pid}) AS (n int)")


Block = Callable[[Session], float]

KINDS: Final[dict[str, Block]] = {
    "launch": launch,
    "launch, then result": launch_and_result,
    "launch, then detach": launch_and_detach,
}
KINDS_INSIDE: Final[dict[str, Block]] = {
    "launch and detach in PL/pgSQL": partial(statement, "SELECT bench_launch()"),
    "audit row by a trigger": partial(statement, "INSERT INTO bench_account VALUES (1, 2)"),
}


def fresh_connection(target: Target) -> float:
    """What a program can do on any server: connect, and run the query."""
    started = time.perf_counter()
    with target.connect() as session:
        session.value("SELECT 1")
        return time.perf_counter() - started


def _fresh(bench: Bench, target: Target, pause: float) -> Outcome:
    return _block(bench, target, lambda: fresh_connection(target), pause)


def launches(bench: Bench, target: Target, once: Block, pause: float) -> Outcome:
    """One block of a series, in a session of its own."""
    with target.connect() as session:
        return _block(bench, target, lambda: once(session), pause)


def _block(bench: Bench, target: Target, once: Callable[[], float], pause: float) -> Outcome:
    for _ in range(WARM_UP):
        time.sleep(pause)
        once()
    time.sleep(AFTERWARDS)
    pid = bench.targets.server_pid
    server, between = None if pid is None else Usage.of(pid), target.usage()
    times = []
    for _ in range(bench.effort.launches):
        time.sleep(pause)
        times.append(once() * 1000)
    time.sleep(AFTERWARDS)
    outcome = {MEDIAN: statistics.median(times), P99: percentile(times, 0.99)}
    jobs = len(times)
    if pid is not None and server is not None:
        outcome[SERVER_CPU_JOB] = (Usage.of(pid).cpu - server.cpu) * 1000 / jobs
    if (after := target.usage()) is not None and between is not None:
        outcome[CPU_JOB] = (after.cpu - between.cpu) * 1000 / jobs
    return outcome
