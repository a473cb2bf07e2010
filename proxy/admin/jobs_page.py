"""The jobs of one process, as shown on the page.

Invariant: output is bounded: the jobs that have run longest, those that ended last, and the
beginning of each text. Text is plain; whoever displays it must escape it.
"""

from __future__ import annotations

import asyncio
import heapq
from typing import Any, Final

from protocol.errors import ProtocolViolation, SQLError
from proxy.admin.figures import text
from proxy.jobs.job import Job
from proxy.jobs.service import JobService
from proxy.jobs.termination import LendChannel
from proxy.log import logger
from proxy.reasons import explain
from proxy.sql.recoding import beginning, readable

MAX_RUNNING: Final = 200
MAX_ENDED: Final = 50
"""Ended jobs that are shown."""

_SQL_SIZE: Final = 600
_LABEL_SIZE: Final = 200
_MESSAGE_SIZE: Final = 500
"""Characters of a message that are shown."""

_MAX_LOGINS: Final = 5
"""Logins for whose jobs wait events are requested; each takes a connection, a channel."""

_MEMORY: Final = 1.5
_TIMEOUT: Final = 1.0
"""Seconds for which wait events are remembered, and for the server to report them."""

_WAITS: Final = (
    b"SELECT pid, pg_catalog.concat_ws(': ', wait_event_type, wait_event)"
    b" FROM pg_catalog.pg_stat_get_activity(NULL) WHERE pid OPERATOR(pg_catalog.=) ANY ('{%b}')"
)


class JobsPage:
    """The jobs of this process, for the page."""

    def __init__(self, jobs: JobService) -> None:
        self._jobs = jobs
        self._waits: dict[int, str] = {}
        self._until = 0.0

    async def show(self) -> dict[str, Any]:
        """JSON: ``running``, ``waiting``, ``ended``, lists of `_shown`; ``count``: running jobs."""
        registry = self._jobs.registry
        running = heapq.nsmallest(MAX_RUNNING, registry.running, key=lambda job: job.launched_at)
        await self._ask_waits(running)
        waiting = heapq.nsmallest(MAX_RUNNING, registry.waiting, key=lambda job: job.launched_at)
        ended = [job for job in registry if job.finished]
        return {
            "count": len(registry.running),
            "running": [_shown(job, self._waits.get(job.backend_pid)) for job in running],
            "waiting": [_shown(job, None) for job in waiting],
            "ended": [_shown(job, None) for job in ended[-MAX_ENDED:]],
        }

    async def _ask_waits(self, jobs: list[Job]) -> None:
        """Ask for the jobs' wait events, as their own roles."""
        now = asyncio.get_running_loop().time()
        if now < self._until:
            return
        self._until = now + _MEMORY
        groups: dict[tuple[bytes, bytes], list[Job]] = {}
        for job in jobs:
            if not (job.is_pooled or job.finished):
                groups.setdefault((job.user, job.database), []).append(job)
        asked = [self._ask(group) for group in list(groups.values())[:_MAX_LOGINS]]
        self._waits = {pid: wait for found in await asyncio.gather(*asked) for pid, wait in found}

    async def _ask(self, jobs: list[Job]) -> list[tuple[int, str]]:
        lease: LendChannel | None = jobs[0].lease
        if lease is None:
            return []
        try:
            async with asyncio.timeout(_TIMEOUT):
                channel = await lease()
                try:
                    pids = b",".join(b"%d" % job.backend_pid for job in jobs)
                    rows = await channel.query(_WAITS % pids)
                finally:
                    self._jobs.channels.give_back(channel)
        except (SQLError, OSError, ProtocolViolation) as error:
            logger.debug("wait events: %s", explain(error))
            return []
        return [(int(pid), text(wait)) for pid, wait, *_ in rows if pid and wait]


def _shown(job: Job, wait: str | None) -> dict[str, Any]:
    percentage, message = job.progress
    return {
        "pid": job.pid or None,
        "cookie": job.cookie,
        "label": _beginning(job, job.label, _LABEL_SIZE),
        "role": text(job.user),
        "database": text(job.database),
        "state": job.state_for_operators,
        "canceled": job.canceled,
        "launched": job.launched_at.timestamp(),
        "seconds": job.elapsed_ms / 1000,
        "percentage": None if percentage is None else max(0, min(percentage, 100)),
        "message": _beginning(job, message, _MESSAGE_SIZE),
        "wait": wait,
        "sql": _beginning(job, job.full_sql, _SQL_SIZE),
        "rows": job.row_count,
        "error": _beginning(job, job.error_field("M"), _MESSAGE_SIZE),
        "sqlstate": None if job.error is None else job.error.sqlstate,
    }


def _beginning(job: Job, data: bytes | None, size: int) -> str | None:
    if data is None:
        return None
    whole = readable(beginning(data, 4 * size + 4, job.encoding), job.encoding)
    return whole if len(whole) <= size else f"{whole[:size]} …"
