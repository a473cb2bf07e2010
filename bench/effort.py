"""How much is measured.

A full run gives figures to publish, and a quick one a first look; a trial shows that all measures
run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Effort:
    """The sizes of everything that is measured.

    Args:
        name: ``full``, ``quick`` or ``trial``.
        limit: seconds after which no new round begins.
        rounds: of each measure, unless it has its own number.
        pgbench_seconds: one run of pgbench; 0: a few transactions.
        scale: of pgbench's tables, in 100,000 rows.
        modes: pgbench's protocols.
        clients: numbers of pgbench's clients.
        bulk: the share of the bulk sizes (1 M rows, 200 MB, …) that is moved.
        launches: launches in one block, one block of each kind a round.
        sustained_seconds: one run of launching without pause.
        rows: rows of a result.
        memory_clients: connections whose memory is measured idle and busy.
        idle_connections: connections that are idle all the time.
    """

    name: str
    limit: int
    rounds: int
    pgbench_seconds: int
    scale: int
    modes: tuple[str, ...]
    clients: tuple[int, ...]
    bulk: float
    launches: int
    sustained_seconds: int
    rows: int
    memory_clients: int
    idle_connections: int


FULL: Final = Effort(
    name="full",
    limit=900,
    rounds=3,
    pgbench_seconds=2,
    scale=10,
    modes=("simple", "extended", "prepared"),
    clients=(1, 8, 32, 128),
    bulk=1.0,
    launches=200,
    sustained_seconds=30,
    rows=500_000,
    memory_clients=128,
    idle_connections=5000,
)
QUICK: Final = Effort(
    name="quick",
    limit=80,
    rounds=1,
    pgbench_seconds=1,
    scale=1,
    modes=("simple", "extended", "prepared"),
    clients=(1, 8),
    bulk=0.2,
    launches=30,
    sustained_seconds=2,
    rows=200_000,
    memory_clients=32,
    idle_connections=500,
)
TRIAL: Final = Effort(
    name="trial",
    limit=80,
    rounds=1,
    pgbench_seconds=0,
    scale=1,
    modes=("prepared",),
    clients=(8,),
    bulk=0.01,
    launches=5,
    sustained_seconds=1,
    rows=5_000,
    memory_clients=4,
    idle_connections=20,
)
