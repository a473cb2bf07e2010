"""Many sessions, many jobs, large results: every answer right, and the proxy small all the time."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections.abc import Iterator
from typing import Final

import asyncpg
import pytest

from tests.support.background import wait_until
from tests.support.servers import Proxy, Server
from tests.support.wire import Footprint, Wire

MEGABYTE: Final = 1024 * 1024
RUNNING: Final = 60
"""Jobs at a time: up to 200 sessions and their jobs share the server's 300 connections."""


async def session(
    proxy: Proxy, number: int, jobs: int, slots: asyncio.Semaphore, barrier: asyncio.Barrier
) -> int:
    """Launches and fetches jobs, one after the other; returns how many gave what they should.

    All sessions are connected before the first job, and until the last one's end.
    """
    right = 0
    conn = await asyncpg.connect(
        host=proxy.host, port=proxy.port, user="postgres", database="postgres", timeout=60
    )
    try:
        await barrier.wait()
        for job in range(jobs):
            n = number * 1000 + job
            async with slots:
                pid = await conn.fetchval(
                    "SELECT pg_background_launch($1)", f"SELECT {n}, md5('{n}')"
                )
                rows = await conn.fetch(
                    "SELECT * FROM pg_background_result($1) AS (n int, digest text)", pid
                )
            digest = hashlib.md5(str(n).encode(), usedforsecurity=False).hexdigest()
            right += [tuple(row) for row in rows] == [(n, digest)]
        await barrier.wait()
    finally:
        await conn.close()
    return right


async def round_of(proxy: Proxy, sessions: int, jobs: int) -> int:
    slots = asyncio.Semaphore(RUNNING)
    barrier = asyncio.Barrier(sessions)
    all = (session(proxy, number, jobs, slots, barrier) for number in range(sessions))
    return sum(await asyncio.gather(*all))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("sessions", "jobs"), [(100, 2), pytest.param(200, 20, marks=pytest.mark.slow)]
)
def test_many_sessions_with_many_jobs_each(
    server: Server, proxy: Proxy, sessions: int, jobs: int
) -> None:
    footprint = Footprint(proxy)
    left = len(server.wait_for_no_clients())
    fds = footprint.fds
    # Once, so that what so many sessions and jobs need at a time is there already.
    assert asyncio.run(round_of(proxy, sessions, 1)) == sessions
    assert len(server.wait_for_no_clients()) == left == 0
    wait_until(lambda: footprint.fds <= fds)
    rss = footprint.rss
    assert asyncio.run(round_of(proxy, sessions, jobs)) == sessions * jobs
    assert server.wait_for_no_clients() == []
    wait_until(lambda: footprint.fds <= fds)
    assert footprint.rss - rss < 8 * MEGABYTE


@pytest.fixture
def peak(proxy: Proxy) -> Iterator[list[int]]:
    """The proxy's resident memory, sampled all the time; the last element is its highest."""
    footprint = Footprint(proxy)
    samples = [footprint.rss]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.01):
            samples.append(max(samples[-1], footprint.rss))

    sampler = threading.Thread(target=sample)
    sampler.start()
    yield samples
    stop.set()
    sampler.join()


def slow_start() -> Iterator[float]:
    """Two seconds of reading in small pieces."""
    return itertools.repeat(0.01, 200)


@pytest.mark.parametrize("rows", [15_000, pytest.param(107_374, marks=pytest.mark.slow)])
def test_up_to_1_gb_for_a_slow_reader(proxy: Proxy, peak: list[int], rows: int) -> None:
    with Wire((proxy.host, proxy.port), receive_buffer=64 * 1024) as wire:
        sql = f"SELECT 100000 + i, repeat('x', 10000) FROM generate_series(1, {rows}) i"
        pid = wire.launch(sql)
        wire.send_query(f"SELECT * FROM pg_background_result({pid}) AS (i int, x text)")
        lengths = wire.skim(slow_start())
    assert lengths["D"] == [2 + 4 + 6 + 4 + 10_000] * rows
    assert {kind: len(all) for kind, all in lengths.items() if kind != "D"} == {
        "T": 1,
        "C": 1,
        "Z": 1,
    }
    assert len(peak) > 10
    assert peak[-1] < 100 * MEGABYTE


def test_one_row_of_150_mb_for_a_slow_reader(proxy: Proxy, peak: list[int]) -> None:
    with Wire((proxy.host, proxy.port), receive_buffer=64 * 1024) as wire:
        pid = wire.launch("SELECT 1, repeat('x', 150000000), 'end'")
        wire.send_query(f"SELECT * FROM pg_background_result({pid}) AS (i int, x text, e text)")
        lengths = wire.skim(slow_start())
    assert lengths["D"] == [2 + 4 + 1 + 4 + 150_000_000 + 4 + 3]
    assert len(lengths["Z"]) == 1
    assert len(peak) > 10
    assert peak[-1] < 100 * MEGABYTE


def test_150_mb_that_the_relay_passes_on(proxy: Proxy, peak: list[int]) -> None:
    """What has no call in it costs no memory either."""
    with Wire((proxy.host, proxy.port), receive_buffer=64 * 1024) as wire:
        wire.send_query("SELECT repeat('x', 10000) FROM generate_series(1, 15000)")
        lengths = wire.skim(slow_start())
    assert len(lengths["D"]) == 15_000
    assert peak[-1] < 100 * MEGABYTE
