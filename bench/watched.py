"""The cost of observing and restricting everything: pgbench -S through a proxy with all of it on,
and through one with all of it off.

On are: metrics, fetched every five seconds; the log of connections and jobs, as JSON; lists of
networks, roles and databases; application_name_add_host; a console; a link to replicas. The two
take turns in short runs, because the difference is smaller than the machine's noise; CPU time says
more than the throughput.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from bench import select_only
from bench.harness import Bench, Turn
from bench.results import CPU_TRANSACTION, MEDIAN, PLAIN, TPS, Outcome
from bench.targets import Target, proxy
from proxy.demo.embedded import free_port

_CLIENTS: Final = 8
_MODES: Final = ("simple", "prepared")
_ROUNDS: Final = 8
"""How many times as many rounds as other measures have."""

_SCRAPE: Final = 5.0
"""Seconds between two fetches of the metrics."""

_OFF: Final = ("--log-min-job-duration", "-1")


def run(bench: Bench) -> None:
    """Measures both."""
    bench.make_tables()
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(proxy(bench.targets.direct, *_OFF))
        watched = stack.enter_context(everything_on(bench.targets.direct))
        targets = (watched, replace(plain, name=PLAIN))
        for mode in (mode for mode in bench.effort.modes if mode in _MODES):
            bench.alternate(
                [
                    Turn(
                        (f"everything on, -M {mode} -c {_CLIENTS}",),
                        target.name,
                        partial(load, bench, target, mode),
                    )
                    for target in targets
                ],
                bench.effort.rounds * _ROUNDS,
            )


def load(bench: Bench, target: Target, mode: str) -> Outcome:
    """One run of pgbench against one of the two."""
    outcome = select_only.load(bench, target, mode, _CLIENTS)
    return {metric: outcome[metric] for metric in (TPS, MEDIAN, CPU_TRANSACTION)}


@contextlib.contextmanager
def everything_on(server: Target) -> Iterator[Target]:
    """A proxy with everything on, and a thread that fetches its metrics."""
    with tempfile.TemporaryDirectory(prefix="pgbg-bench-") as name:
        folder = Path(name)
        for file, text in (
            ("users", f'"operator" "{secrets.token_hex()}"\n'),
            ("replicas", secrets.token_hex(32)),
        ):
            (folder / file).touch(mode=0o600)
            (folder / file).write_text(text)
        port = free_port()
        options = {
            "admin-listen": f"127.0.0.1:{port}",
            "auth-file": f"{folder}/users",
            "admin-users": "operator",
            "stats-users": "operator",
            "allow-from": "127.0.0.0/8",
            "allow-roles": server.user,
            "allow-databases": server.dbname,
            "application-name-add-host": "on",
            "log-format": "json",
            "log-connections": "on",
            "log-disconnections": "on",
            "log-job-sql": "on",
            "log-min-job-duration": "0",
            "replica-secret-file": f"{folder}/replicas",
            "auth-user": server.user,
            "auth-query": "",
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        with proxy(server, *given) as target, _scraped(f"http://127.0.0.1:{port}/metrics"):
            yield target


@contextlib.contextmanager
def _scraped(url: str) -> Iterator[None]:
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(_SCRAPE):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - ours
                answer.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
