"""The figures of one process: its counters, and its gauges.

Invariant: what clients make up is a key in a dict, so that `stats.total` can add figures up.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from proxy.jobs.service import JobService
from proxy.stats import Figures, counters

_LOOK: Final = 0.25
"""Seconds between measurements of the event loop's lag."""


def collect(jobs: JobService, sessions: int) -> Figures:
    """``counters`` (`stats.Counters`), which only grow, and ``gauges``.

    Args:
        jobs: of this process.
        sessions: their number.
    """
    running: dict[str, dict[str, int]] = {}
    logins = Counter((job.user, job.database) for job in jobs.registry.running)
    for (user, database), count in logins.items():
        by_database = running.setdefault(text(user), {})
        by_database[text(database)] = by_database.get(text(database), 0) + count
    return {
        "counters": counters.figures(),
        "gauges": {
            "running": running,
            "waiting": Counter(job.state.decode() for job in jobs.registry.waiting),
            "sessions": sessions,
            "spares": {"ready": jobs.spares.ready, "opening": jobs.spares.opening},
            "channels": {"idle": jobs.channels.idle, "lent": jobs.channels.lent},
        },
    }


def text(name: bytes) -> str:
    """Bytes that should be UTF-8, for people to read."""
    return name.decode("utf-8", "replace")


async def measure_lag() -> None:
    """Measure, again and again, how late the event loop serves a timer."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK
        await asyncio.sleep(_LOOK)
        counters.lag.observe(loop.time() - due)
