"""Whose jobs they are: a session; or a job, whose SQL launches others.

Invariant: for the functions and the launcher both are the same. They differ in where an owner's
messages go, and in how its settings are known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from proxy.jobs.job import Job, Jobs

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Iterable, Sequence

    from proxy.backends.channels import Channel
    from proxy.backends.identity import Login
    from proxy.config.gucs import Guc
    from proxy.jobs.context import Context
    from proxy.jobs.launcher import Launcher
    from proxy.jobs.registry import Handle, JobRecord, JobRegistry
    from proxy.server import Server
    from proxy.workers.peers import Peers


class Owner(ABC):
    """What launches jobs, and may ask after them.

    Attributes:
        jobs: those that it launched and has not fetched or detached.
        custom_settings: names with a dot that it may have set.
        system_id: the system identifier of its database cluster; empty if that cannot be known,
            None if not asked for yet.
    """

    custom_settings: Iterable[bytes]

    def __init__(self, server: Server) -> None:
        self._server = server
        self.jobs = Jobs()
        self.system_id: bytes | None = None

    @property
    @abstractmethod
    def launcher(self) -> Launcher:
        """Launches its jobs."""

    @property
    @abstractmethod
    def server_version(self) -> int:
        """As server_version_num has it, without the minor version: 90500, 150000."""

    @property
    @abstractmethod
    def client_encoding(self) -> bytes:
        """As PostgreSQL names it."""

    @abstractmethod
    async def inject(self, message: bytes) -> None:
        """A message of one of its jobs, while the server is in the middle of a statement."""

    @abstractmethod
    def cancel_statement(self) -> None:
        """Have the server cancel the statement that it runs for this owner."""

    @property
    def cluster(self) -> bytes:
        """What tells its database cluster from others, by which OIDs mean something."""
        return self.system_id or self.launcher.address

    @property
    def known_jobs(self) -> JobRegistry[Job]:
        """The jobs of all sessions of this process."""
        return self._server.jobs

    @property
    def peers(self) -> Peers:
        """The other processes."""
        return self._server.peers

    async def find(self, handles: Sequence[Handle]) -> list[JobRecord | None]:
        """Jobs that it may know of. Its own are known to it until it detaches them."""
        return await self._server.find(self.jobs, handles)

    async def jobs_of(self, roles: Collection[int]) -> list[JobRecord]:
        """What is known of the jobs of these roles, at least."""
        return await self._server.jobs_of(roles)

    def drop(self, job: Job) -> None:
        """Stop a job whose launch was interrupted: its caller never learned of it."""
        self.jobs.remove(job)
        if not job.finished:
            self.cancel_job(job)

    def cancel_job(self, job: JobRecord) -> asyncio.Task[None]:
        """Have the server told to stop a job."""
        return self._server.cancel_job(job)

    def limit(self, job: Job, timeout_ms: int) -> None:
        """Stop a job that runs longer than that."""
        self._server.limit(job, timeout_ms)

    async def launch(
        self,
        sql: bytes,
        queue_size: int,
        context: Context,
        *,
        client_encoding: bytes | None = None,
        label: bytes | None = None,
        keep_rows: bool = True,
    ) -> Job:
        """Start a job in a new backend, with the owner's role and settings. Raises SQLError.

        `client_encoding`: that of the SQL, if it is not the owner's.
        """
        return await self.launcher.launch(
            self,
            sql,
            queue_size,
            context,
            client_encoding=client_encoding or self.client_encoding,
            label=label,
            keep_rows=keep_rows,
        )

    def setting(self, setting: Guc, context: Context) -> int:
        """A setting of ours. Raises SQLError 22023."""
        return self.launcher.setting(setting, context)

    def launcher_for(self, login: bytes | None) -> Launcher:
        """Launches jobs that log in as another role than the owner's; None: as the owner's."""
        return self.launcher if login is None else self.launcher.for_login(login)

    async def lease_channel(self, login: bytes | None) -> Channel:
        """A channel to answer calls from inside the database.

        Args:
            login: the role that it is of, as the server's database has the name; None for that
                of the owner.

        Raises SQLError, OSError.
        """
        channel = await self.launcher_for(login).channel()
        if self.system_id is None:
            self.system_id = channel.system_id
        return channel

    def retire(self, login: Login) -> None:
        """No new login would come to what idle backends of this one have come to: close them."""
        self._server.spares.retire(lambda other: other == login)

    def give_back(self, channel: Channel) -> None:
        """Let others have it."""
        self._server.channels.give_back(channel)
