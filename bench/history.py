"""What the history costs a launch: the same launches with and without it.

Both proxies are in front of one server, in a database with the extension; one of them writes the
outcome of each job. Times are measured in the client, up to the answer of the launch.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import psycopg

from bench.harness import Bench, Turn
from bench.launching import PACES, launch, launches
from bench.targets import Target, proxy

SETTINGS: Final = ("off", "all")


def run(bench: Bench) -> None:
    """Measures each pace."""
    with proxy(bench.targets.direct, "--history", "all") as recording:
        targets = dict(zip(SETTINGS, (bench.targets.proxy, recording), strict=True))
        with psycopg.connect(recording.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_background")
        try:
            for pace, pause in PACES.items():
                bench.alternate(
                    [
                        Turn(
                            (f"launch, {pace}, history = {setting}",),
                            bench.targets.proxy.name,
                            partial(launches, bench, target, launch, pause),
                        )
                        for setting, target in targets.items()
                    ]
                )
        finally:
            _drop(recording)


def _drop(target: Target) -> None:
    with psycopg.connect(target.conninfo(), autocommit=True) as connection:
        connection.execute("DROP EXTENSION pg_background")
