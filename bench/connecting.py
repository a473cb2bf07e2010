"""Connections per second: pgbench -C, a new connection for each SELECT 1, by 4 clients at a time.

With trust, the connection is the whole cost; with SCRAM, both ends compute too. PgBouncer keeps the
server's connections in a pool and starts no backend. The proxy cannot do that: each of its sessions
is a session of the server.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from bench import pgbench
from bench.harness import Bench, Turn
from bench.results import CONNECTIONS, Outcome
from bench.targets import SCRAM_PASSWORD, SCRAM_ROLE, Target

CLIENTS: Final = 4


def run(bench: Bench) -> None:
    """Measures each login method."""
    logins = {"trust": ("", "")}
    if bench.targets.own_server:
        logins["SCRAM"] = (SCRAM_ROLE, SCRAM_PASSWORD)
    else:
        bench.skip("on a running server: only the login method that it asks for")
        logins = {"as the server asks": ("", "")}
    for name, (user, password) in logins.items():
        bench.alternate(
            [
                Turn((f"connect, {name}",), target.name, partial(load, bench, target))
                for target in (
                    replace(t, user=user, password=password) if user else t
                    for t in bench.targets.all()
                )
            ]
        )


def load(bench: Bench, target: Target) -> Outcome:
    """One run of pgbench against one target."""
    with tempfile.NamedTemporaryFile("w", prefix="pgbg-bench-", suffix=".sql") as script:
        script.write("SELECT 1;\n")
        script.flush()
        done = pgbench.run(
            bench.targets.pgbench,
            target,
            *("-C", "-f", str(Path(script.name))),
            clients=CLIENTS,
            seconds=bench.effort.pgbench_seconds,
        )
    return {CONNECTIONS: done.tps}
