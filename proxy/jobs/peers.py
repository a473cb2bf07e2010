"""The other processes that serve clients, as the jobs of this one need them.

Invariant: a process serves its clients alone unless it is given other peers than these, which know
nothing. `workers.peers` has those of several processes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from protocol.startup import CancelRequest
from proxy.jobs.job import Job
from proxy.jobs.registry import Handle, JobRecord, RemoteJob


class Peers:
    """No other processes.

    Attributes:
        roles: OIDs of the roles whose jobs they know.
    """

    @property
    def roles(self) -> Set[int]:
        return frozenset()

    async def find(self, handles: Sequence[Handle]) -> tuple[dict[int, JobRecord], int]:
        """Those of these jobs that they know, by cookie; how many did not answer of those that may
        know the rest."""
        return {}, 0

    async def jobs_of(self, roles: Collection[int]) -> tuple[list[JobRecord], int]:
        """All that they know of jobs of these roles; how many did not answer."""
        return [], 0

    async def cancel_job(self, job: RemoteJob) -> bool:
        """Have its process tell the server to stop it; whether it has answered."""
        return False

    async def cancel(self, request: CancelRequest) -> bool:
        """Have one of them do what a cancel request asks for, if it is for one of its sessions;
        whether it was."""
        return False

    async def give_way(self) -> bool:
        """Have them close their spares; whether there were any."""
        return False

    async def announce(self, role_id: int) -> None:
        """We know jobs of this role; returns when all know that."""

    def role_gone(self, role_id: int) -> None:
        """We know none of this role any more."""

    def job_ended(self, job: Job) -> None:
        """One of ours."""

    def extension_changed(self) -> None:
        """A command about the extension has done its work in some database."""

    def leave_databases(self, sql: bytes) -> None:
        """A statement here is about to drop, rename or copy databases."""
