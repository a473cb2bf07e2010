"""What one process tells of itself in numbers: its counters, and how much there is of what now.

Invariant: whatever clients make up comes in a dict, by name, so that numbers of several processes
can be added up (`stats.total`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from proxy.jobs.service import JobService
from proxy.stats import Figures, counters

_LOOK: Final = 0.25
"""Seconds between two looks at how late the event loop is."""


def collect(jobs: JobService, sessions: int) -> Figures:
    """``counters`` (`stats.Counters`), which only grow, and ``gauges``.

    Args:
        jobs: of this process.
        sessions: how many it has.
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
    """What people are shown of bytes that should be UTF-8."""
    return name.decode("utf-8", "replace")


async def measure_lag() -> None:
    """Look again and again how late the event loop comes to a timer."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK
        await asyncio.sleep(_LOOK)
        counters.lag.observe(loop.time() - due)
