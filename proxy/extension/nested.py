"""A job whose SQL calls the functions itself: by a trigger of the table that it writes to, say.

The rule: to what it calls, a job is a session of its own, with jobs of its own, which run on when
it ends. Only it has no client: messages of its jobs are among its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.framing import HEADER_SIZE
from proxy.extension.inside import Inside
from proxy.jobs.job import Job, Jobs
from proxy.jobs.rows import Notice, OutputQueue

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Sequence

    from proxy.extension.channels import Channel
    from proxy.jobs.context import Context
    from proxy.jobs.known import Handle, KnownJob, KnownJobs
    from proxy.jobs.launcher import Launcher, Owner
    from proxy.server import Server
    from proxy.settings import Setting
    from proxy.workers.peers import Peers


class Nested:
    """A job as a caller (`inside.Host`).

    Attributes:
        jobs: those that it has launched.
        custom_settings: names with a dot that it may have set: those that its session had.
        server_version: as server_version_num.
        inside: serves its calls.
        launcher: launches its jobs.
        output: the job's own; None before it begins.
    """

    def __init__(self, server: Server, launcher: Launcher, owner: Owner) -> None:
        self._server = server
        self.launcher = launcher.for_job()
        self.jobs = Jobs()
        self.custom_settings = dict(owner.custom_settings)
        self.server_version = owner.server_version
        self.output: OutputQueue | None = None
        self.inside = Inside(self)

    # What the job tells

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the job; whether it was a call, and is dealt with."""
        return self.inside.notice(body)

    def statement_ended(self) -> None:
        """Nobody waits for an answer any more."""
        self.inside.statement_ended()

    def close(self) -> None:
        """The job has ended."""
        self.inside.statement_ended()
        self.jobs.clear()

    # What its calls ask for

    @property
    def client_encoding(self) -> bytes:
        """Not known; each question says its own."""
        return b"UTF8"

    @property
    def known_jobs(self) -> KnownJobs[Job]:
        """The jobs of all sessions."""
        return self._server.jobs

    @property
    def peers(self) -> Peers:
        """The other processes."""
        return self._server.peers

    async def find(self, handles: Sequence[Handle]) -> list[KnownJob | None]:
        """Jobs that it may know of."""
        return await self._server.find(self.jobs, handles)

    async def jobs_of(self, roles: Collection[int]) -> list[KnownJob]:
        """What is known of the jobs of these roles, at least."""
        return await self._server.jobs_of(roles)

    def drop(self, job: Job) -> None:
        """A job that nobody knows of: it shall stop."""
        self.jobs.remove(job)
        if not job.finished:
            self.cancel_job(job)

    def cancel_job(self, job: KnownJob) -> asyncio.Task[None]:
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
        keeps_rows: bool = True,
    ) -> Job:
        """Start a job. Raises SQLError."""
        return await self.launcher.launch(
            self,
            sql,
            queue_size,
            context,
            client_encoding=client_encoding or self.client_encoding,
            label=label,
            keeps_rows=keeps_rows,
        )

    def setting(self, setting: Setting, context: Context) -> int:
        """A setting of ours. Raises SQLError 22023."""
        return self.launcher.setting(setting, context)

    async def lease_channel(self) -> Channel:
        """A channel for the answers. Raises SQLError, ServerError, OSError."""
        return await self.launcher.channel()

    def give_back(self, channel: Channel) -> None:
        """Let others have it."""
        self._server.channels.give_back(channel)

    async def inject(self, message: bytes) -> None:
        """A message of one of its jobs."""
        if self.output is not None:
            self.output.put(Notice(message[HEADER_SIZE:]))
