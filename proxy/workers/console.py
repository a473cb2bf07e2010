"""The console's commands with several processes.

Invariant: each process reports what it knows, and the supervisor reports on the processes; the
worker that has the client merges these. So a client sees the same in every worker.
"""

from __future__ import annotations

from proxy.console.actions import ConsoleActions, Found
from proxy.console.tables import LocalProcess, Row
from proxy.runtime import Reloaded
from proxy.workers.peers import OtherWorkers


class OneOfSeveral(ConsoleActions):
    """A worker.

    Args:
        process: what this worker knows.
        peers: the other workers, and the way to the supervisor.
    """

    def __init__(self, process: LocalProcess, peers: OtherWorkers) -> None:
        super().__init__(process)
        self._peers = peers

    async def drain(self, number: int) -> None:
        await self._peers.order("drain", number)

    async def shut_down(self) -> None:
        await self._peers.order("shut_down")

    async def _reload(self) -> Reloaded:
        return Reloaded(*await self._peers.order("reload"))

    async def _processes(self) -> list[Row]:
        processes: list[Row] = await self._peers.order("processes")
        return processes

    async def _of_others(self, name: str) -> tuple[list[Row], int]:
        return await self._peers.table(name)

    async def _running_at_others(self, pid: int) -> tuple[list[Found], int]:
        return await self._peers.jobs_with_pid(pid)

    async def _cancel(self, found: Found) -> bool:
        if found.owner is None:
            return await super()._cancel(found)
        return await self._peers.cancel_found(found.owner, found.handle)

    async def _kill_at_others(self, session: str) -> tuple[bool, int]:
        return await self._peers.kill(session)
