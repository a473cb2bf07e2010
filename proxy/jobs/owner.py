"""Whose jobs they are: a session; or a job, whose SQL launches others.

Invariant: for the functions both are the same. They differ in where an owner's messages go, and in
how its settings are known.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable

from proxy.backends.backend import Backend
from proxy.backends.channels import Channel
from proxy.backends.spares import LONGEST_COMMAND
from proxy.config.gucs import DEFAULT_QUEUE_SIZE, JOB_SETTING, MAX_WORKERS
from proxy.jobs.context import Context
from proxy.jobs.job import Counts, Job, Jobs, JobSession, checked_queue_size
from proxy.jobs.launcher import Launcher
from proxy.jobs.service import JobService
from proxy.log import logger


class Owner(ABC):
    """What launches jobs, and may ask after them.

    Attributes:
        service: the jobs of all owners.
        jobs: those that it launched and has not fetched or detached.
        custom_settings: names with a dot that it may have set.
        system_id: the system identifier of its database cluster; empty if that cannot be known,
            None if not asked for yet.
    """

    custom_settings: Iterable[bytes]

    def __init__(self, service: JobService) -> None:
        self.service = service
        self.jobs = Jobs()
        self.system_id: bytes | None = None

    @property
    @abstractmethod
    def launcher(self) -> Launcher:
        """Opens the backends of its jobs."""

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

    @abstractmethod
    def job_session(self, launcher: Launcher, backend: Backend) -> JobSession:
        """What serves the calls of one of its jobs.

        Args:
            launcher: opens the backends of the jobs that this one launches.
            backend: runs the job.
        """

    @property
    def cluster(self) -> bytes:
        """What tells its database cluster from others, by which OIDs mean something."""
        return self.system_id or repr(self.launcher.route.host).encode()

    async def launch(
        self,
        sql: bytes,
        queue_size: int,
        context: Context,
        *,
        launcher: Launcher | None = None,
        client_encoding: bytes | None = None,
        label: bytes | None = None,
        keep_rows: bool = True,
    ) -> Job:
        """Start a job on a spare or a new backend, with the owner's role and settings.

        Args:
            sql: what it runs.
            queue_size: in bytes; 0 or less for the setting's.
            context: of the call.
            launcher: opens the backend, if not as the owner's role.
            client_encoding: of the SQL, and of the results, if it is not the owner's.
            label: of the job.
            keep_rows: whether its rows are kept for somebody to fetch.

        Raises SQLError.
        """
        service, launcher = self.service, launcher or self.launcher
        config = service.runtime.config
        self.jobs.check_limit(launcher.setting(MAX_WORKERS, context), config.max_session_workers)
        if b"database" in (lower := sql[: LONGEST_COMMAND + 1].lower()):
            service.leave_databases(lower)
        size = checked_queue_size(queue_size, launcher.setting(DEFAULT_QUEUE_SIZE, context))
        backend = await launcher.backend(
            context,
            client_encoding=client_encoding or self.client_encoding,
            label=label,
            system_id=self.system_id,
        )
        job = Job(
            backend,
            sql,
            queue_size=min(size, config.max_queue_size),
            role_id=context.role_id,
            cluster=self.cluster,
            route=launcher.route,
            label=label,
            marker=backend.own_settings[JOB_SETTING],
            keep_rows=keep_rows,
            budgets=service.budgets.of_role(launcher.user),
            session=self.job_session(launcher.for_job(backend.pid), backend),
            # Not of the owner, which may be gone before the job.
            on_finish=functools.partial(_ended, self.jobs.counts, service),
        )
        await self._start(job)
        return job

    async def _start(self, job: Job) -> None:
        self.service.registry.add(job)
        self.jobs.add(job)
        try:
            await job.start()
            await self.service.peers.announce(job.role_id)
        except asyncio.CancelledError:
            self.drop(job)
            raise
        logger.debug("launched %r", job)

    def drop(self, job: Job) -> None:
        """Stop a job whose launch or fetch was interrupted, and that no caller can ask for."""
        self.jobs.remove(job)
        if not job.finished:
            self.service.cancel(job)

    def launcher_for(self, login: bytes | None) -> Launcher:
        """Opens the backends of jobs that log in as another role; None: as the owner's."""
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


def _ended(counts: Counts, service: JobService, job: Job) -> None:
    counts.ended(job)
    service.ended(job)
