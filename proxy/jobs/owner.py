"""Owners of jobs: a session, or a job whose SQL launches others.

Invariant: the functions treat both alike. They differ in where messages go and settings come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from protocol.errors import OBJECT_NOT_IN_PREREQUISITE_STATE, SQLError
from proxy.backends.backend import Backend
from proxy.backends.channels import Channel
from proxy.jobs.at_commit import Pending
from proxy.jobs.attached import Jobs
from proxy.jobs.attempt import JobSession
from proxy.jobs.job import Job
from proxy.jobs.launcher import Launcher
from proxy.jobs.registry import JobRecord
from proxy.jobs.service import JobService
from proxy.sql.recoding import encoding_of


class Owner(ABC):
    """Has jobs, and may ask about them.

    Attributes:
        service: the jobs of all owners.
        jobs: those that it has launched and not fetched or detached.
        pending: jobs that start when its transaction commits.
        custom_settings: names with a dot that it may have set.
        system_id: of its database cluster; empty if it cannot be known, None if not asked for yet.
    """

    custom_settings: Iterable[bytes]

    def __init__(self, service: JobService) -> None:
        self.service = service
        self.jobs = Jobs()
        self.pending: set[Pending] = set()
        self.system_id: bytes | None = None

    @property
    @abstractmethod
    def launcher(self) -> Launcher:
        """Opens backends for its jobs."""

    @property
    @abstractmethod
    def server_version(self) -> int:
        """As server_version_num, without the minor version: 90500, 150000."""

    @property
    @abstractmethod
    def client_encoding(self) -> bytes:
        """By PostgreSQL's name."""

    @property
    @abstractmethod
    def server_encoding(self) -> bytes:
        """By PostgreSQL's name; empty if unknown."""

    @property
    def encoding(self) -> bytes:
        """The encoding of what it is sent."""
        return encoding_of(self.client_encoding, self.server_encoding)

    @abstractmethod
    async def inject(self, message: bytes) -> None:
        """Deliver a message of one of its jobs, while the server is within a statement."""

    @abstractmethod
    def cancel_statement(self, is_meant: Callable[[], bool]) -> None:
        """Have the server cancel the owner's present statement, if that is still the one that is
        meant when the request is about to be sent."""

    @abstractmethod
    def job_session(self, launcher: Launcher, backend: Backend) -> JobSession:
        """The session that serves the calls of one of its jobs.

        Args:
            launcher: opens the backends of the jobs that this job launches.
            backend: runs the job.
        """

    @property
    def cluster(self) -> bytes:
        """Identifies its database cluster, within which OIDs have a meaning."""
        return self.system_id or repr(self.launcher.route.host).encode()

    def transaction_ended(self) -> None:
        """The owner's transaction has ended, and so have all earlier ones."""
        if self.pending:
            self.service.pending.transaction_ended(tuple(self.pending))
            self.pending.clear()

    def transaction_lost(self, pid: int) -> None:
        """The owner's session is gone; its backend, `pid`, may still be committing."""
        if self.pending:
            self.service.pending.owner_gone(tuple(self.pending), pid)
            self.pending.clear()

    async def check_may_wait(self, jobs: Iterable[JobRecord]) -> None:
        """Raises SQLError 55000 if a job waits for this very transaction to commit."""
        waited_for = set(jobs)
        mine = {pending for pending in self.pending if pending.job in waited_for}
        if mine:
            # A procedure may have committed, whose words are not heard yet.
            await self.service.pending.catch_up(mine)
        if mine & self.pending:
            raise SQLError(
                OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the background worker starts when this transaction commits",
                hint="Wait for it after COMMIT.",
            )

    def drop(self, job: Job) -> None:
        """Stop a job whose launch or fetch was interrupted, and whose handle nobody has."""
        if not job.finished:
            self.service.cancel(job)
        self.jobs.remove(job)

    def launcher_for(self, login: bytes | None) -> Launcher:
        """The launcher for jobs that log in as another role; None: as the owner's."""
        return self.launcher if login is None else self.launcher.for_login(login)

    async def lease_channel(self, login: bytes | None) -> Channel:
        """A channel to answer calls from inside the database.

        Args:
            login: its role, in the encoding of the database; None for the owner's.

        Raises SQLError, OSError.
        """
        return self._known_by(await self.launcher_for(login).channel())

    def idle_channel(self, login: bytes | None, pid: int) -> Channel | None:
        """The channel with this pid, if it is idle and shows a word."""
        channel = self.launcher_for(login).idle_channel(pid)
        return None if channel is None else self._known_by(channel)

    def _known_by(self, channel: Channel) -> Channel:
        if self.system_id is None:
            self.system_id = channel.system_id
        return channel
