"""How long a launch takes, beside what a program without pg_background does: open a connection.

Each block is a series of launches, back to back (spares run out, and are opened while we wait) or
paced (there is time to open them, as with a user at work). The yardstick is a fresh
connection and ``SELECT 1`` on it, to the server directly. Times are measured in the client.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from bench.client import Session
from bench.harness import Bench, Turn, percentile
from bench.results import DIRECT, MEDIAN, P99, Outcome
from bench.targets import Target

LAUNCH: Final = "SELECT pg_background_launch('SELECT 1')"
PACES: Final = {"back to back": 0.0, "10 ms apart": 0.01}
WARM_UP: Final = 3


def run(bench: Bench) -> None:
    """Each kind, at each pace."""
    for pace, pause in PACES.items():
        cases = {f"{kind}, {pace}": block for kind, block in KINDS.items()}
        turns = [
            Turn(tuple(cases), DIRECT, partial(_fresh, bench.targets.direct, bench, pause)),
            *(
                Turn((case,), target.name, partial(_launches, target, block, bench, pause))
                for case, block in cases.items()
                for target in bench.targets.launchers()
            ),
        ]
        bench.alternate(turns)


def launch(session: Session) -> float:
    """The launch alone; the result is fetched afterwards, to leave nothing behind."""
    started = time.perf_counter()
    pid = session.value(LAUNCH)
    elapsed = time.perf_counter() - started
    result(session, pid)
    return elapsed


def launch_and_result(session: Session) -> float:
    """The launch, and then the rows: two statements."""
    started = time.perf_counter()
    result(session, session.value(LAUNCH))
    return time.perf_counter() - started


def launch_and_detach(session: Session) -> float:
    """The launch, and then detaching the job: two statements."""
    started = time.perf_counter()
    session.value(f"SELECT pg_background_detach({session.value(LAUNCH)})")
    return time.perf_counter() - started


def result(session: Session, pid: str) -> None:
    """Fetches the job's one row."""
    session.value(f"SELECT * FROM pg_background_result({pid}) AS (n int)")


KINDS: Final[dict[str, Callable[[Session], float]]] = {
    "launch": launch,
    "launch, then result": launch_and_result,
    "launch, then detach": launch_and_detach,
}


def fresh_connection(target: Target) -> float:
    """What a program can do on any server: connect, and run the query there."""
    started = time.perf_counter()
    with target.connect() as session:
        session.value("SELECT 1")
        return time.perf_counter() - started


def _fresh(target: Target, bench: Bench, pause: float) -> Outcome:
    return _block(lambda: fresh_connection(target), bench.effort.launches, pause)


def _launches(
    target: Target, once: Callable[[Session], float], bench: Bench, pause: float
) -> Outcome:
    with target.connect() as session:
        return _block(lambda: once(session), bench.effort.launches, pause)


def _block(once: Callable[[], float], count: int, pause: float) -> Outcome:
    times = []
    for number in range(WARM_UP + count):
        time.sleep(pause)
        elapsed = once() * 1000
        if number >= WARM_UP:
            times.append(elapsed)
    return {MEDIAN: statistics.median(times), P99: percentile(times, 0.99)}
