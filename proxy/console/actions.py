"""What the console's commands do, in a proxy of one process.

Invariant: a command reports success only if it has succeeded. `workers.console` has the same for
several processes; there, what others do not answer is missing, and the client is told so.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from protocol.errors import (
    CONNECTION_FAILURE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    UNDEFINED_OBJECT,
    SQLError,
)
from proxy.console import tables
from proxy.console.tables import LocalProcess, Row
from proxy.jobs.registry import Handle
from proxy.jobs.service import JobService
from proxy.runtime import Reloaded

_YIELD_AFTER: Final = 100
"""Rows before others get a turn."""

_AMBIGUOUS: Final = "42725"
_CONFIG_FILE_ERROR: Final = "F0000"


class Found(NamedTuple):
    """A running job.

    Attributes:
        owner: the number of its process; None for this one.
        handle: its pid and cookie.
    """

    owner: int | None
    handle: Handle


class ConsoleActions:
    """What the commands do: here, or in all processes (`workers.console`).

    Args:
        process: what this process knows.

    Attributes:
        read_again, stop: what SIGHUP and SIGTERM do; None while that is impossible.
    """

    def __init__(self, process: LocalProcess) -> None:
        self._process = process
        self.read_again: Callable[[], Reloaded] | None = None
        self.stop: Callable[[], None] | None = None

    async def show(self, name: str) -> tuple[list[Row], int]:
        """The rows of a table, and how many processes did not answer."""
        if name in ("config", "version"):  # the same in all processes
            return list(tables.rows(name, self._process)), 0
        theirs, unanswered = await self._of_others(name)
        found: list[Row] = []
        for row in tables.rows(name, self._process):
            found.append(row)
            if len(found) % _YIELD_AFTER == 0:
                await asyncio.sleep(0)
        found += theirs
        match name:
            case "jobs":
                found = tables.sorted_jobs(found)
            case "stats":
                found = tables.merged_stats(found)
            case "workers":
                found = tables.workers(await self._processes(), found)
        return found, unanswered

    async def cancel(self, pid: int) -> None:
        """Have the server stop the job with this pid. Raises SQLError."""
        theirs, unanswered = await self._running_at_others(pid)
        found = [Found(None, handle) for handle in running(self._process.jobs, pid)] + theirs
        if not found:
            raise SQLError(
                UNDEFINED_OBJECT,
                f"there is no job with PID {pid}",
                detail=_incomplete(unanswered),
                hint="SHOW JOBS lists those that run.",
            )
        if len(found) > 1:
            raise SQLError(
                _AMBIGUOUS,
                f"there is more than one job with PID {pid}",
                detail="They run on different servers.",
                hint="Call pg_background_cancel(pid, cookie) in a session of the job's role.",
            )
        if not await self._cancel(found[0]):
            raise SQLError(
                CONNECTION_FAILURE,
                f"cannot cancel the job with PID {pid}",
                detail="The process of the proxy that runs it did not answer in time.",
                hint="It is canceled when that process goes on."
                f" Otherwise call pg_terminate_backend({pid}) on the server.",
            )

    async def kill(self, session: str) -> None:
        """End a session. Raises SQLError."""
        if kill(self._process, session):
            return
        killed, unanswered = await self._kill_at_others(session)
        if not killed:
            raise SQLError(
                UNDEFINED_OBJECT,
                f'there is no session "{session}"',
                detail=_incomplete(unanswered),
                hint="SHOW SESSIONS lists them; the id looks like 4711.12.",
            )

    async def reload(self) -> list[str]:
        """Reload the configuration. Returns settings that need a restart. Raises SQLError."""
        result = await self._reload()
        if result.error is not None:
            raise SQLError(
                _CONFIG_FILE_ERROR, "the configuration stays as it was", detail=result.error
            )
        return result.fixed

    # Different with several processes

    async def drain(self, number: int) -> None:
        """Have a process end after its sessions, and start another. Raises SQLError."""
        raise SQLError(
            OBJECT_NOT_IN_PREREQUISITE_STATE,
            "cannot drain the only process",
            detail="The proxy runs with workers = 1.",
            hint="SHUTDOWN ends the proxy when its sessions and jobs have ended.",
        )

    async def shut_down(self) -> None:
        """End the proxy after its sessions and jobs; the second time, at once."""
        if self.stop is None:
            raise _not_possible("SHUTDOWN")
        self.stop()

    async def _reload(self) -> Reloaded:
        if self.read_again is None:
            raise _not_possible("RELOAD")
        return self.read_again()

    async def _processes(self) -> list[Row]:
        """Number, pid, state and sessions of each process."""
        return [[1, os.getpid(), "active", len(self._process.sessions)]]

    async def _of_others(self, name: str) -> tuple[list[Row], int]:
        return [], 0

    async def _running_at_others(self, pid: int) -> tuple[list[Found], int]:
        return [], 0

    async def _cancel(self, found: Found) -> bool:
        job = self._process.jobs.registry.get(*found.handle)
        return job is None or await self._process.jobs.cancel(job)

    async def _kill_at_others(self, session: str) -> tuple[bool, int]:
        return False, 0


# For one process


def running(jobs: JobService, pid: int) -> list[Handle]:
    """The handles of this process's jobs with this pid: at most one for each server."""
    return [job.handle for job in jobs.registry.running if job.pid == pid]


def kill(process: LocalProcess, session: str) -> bool:
    """End a session of this process, as pg_terminate_backend() does. Returns whether it exists."""
    for served in process.sessions:
        if tables.session_id(served.summary.number) == session:
            served.shut_down()
            return True
    return False


def _incomplete(unanswered: int) -> str | None:
    if not unanswered:
        return None
    return f"{unanswered} of the proxy's processes did not answer in time."


def _not_possible(command: str) -> SQLError:
    return SQLError(OBJECT_NOT_IN_PREREQUISITE_STATE, f"{command} is not possible at this time")
