"""The other processes that serve clients, as the jobs of this one see them.

Invariant: unless it is given other peers (`workers.peers`), a process is alone: these know nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from protocol.startup import CancelRequest
from proxy.jobs.job import Job
from proxy.jobs.registry import Handle, JobRecord, RemoteJob


class Peers:
    """No other processes.

    Attributes:
        roles: OIDs of the roles whose jobs other processes know.
    """

    @property
    def roles(self) -> Set[int]:
        return frozenset()

    async def find(self, handles: Sequence[Handle]) -> tuple[dict[int, JobRecord], int]:
        """The jobs among these that others know, by cookie, and how many others did not answer."""
        return {}, 0

    async def jobs_of(self, roles: Collection[int]) -> tuple[list[JobRecord], int]:
        """Their jobs of these roles, and how many processes did not answer."""
        return [], 0

    async def cancel_job(self, job: RemoteJob) -> bool:
        """Have the job's process stop it in the server. Returns whether it has answered."""
        return False

    async def cancel(self, request: CancelRequest) -> bool:
        """Have the right process carry out a cancel request. Returns whether there was one."""
        return False

    async def give_way(self) -> bool:
        """Have them close their spares. Returns whether there were any."""
        return False

    async def announce(self, role_id: int) -> None:
        """We have jobs of this role. Returns when all processes know."""

    def role_gone(self, role_id: int) -> None:
        """We have no more jobs of this role."""

    def job_ended(self, job: Job) -> None:
        """A job of this process has ended."""

    def extension_changed(self) -> None:
        """A command has changed the extension in some database."""

    def leave_databases(self, sql: bytes) -> None:
        """A statement is about to drop, rename or copy databases."""
