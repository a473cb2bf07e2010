"""The other replicas: proxies in front of the same server, behind a load balancer.

Invariant: each serving process asks those of all other replicas itself, as it asks its fellow
workers, and checks rights itself: only what a proxy with the secret has sealed is believed
(`replica_link`). Only questions about jobs, and cancel requests, are answered. A lost link is no
lost process: its jobs are searched for when the link is back, and given up after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Final

from protocol.startup import CancelRequest
from proxy.auth.rate_limit import RateLimiter
from proxy.jobs.job import Job
from proxy.jobs.peers import Peers
from proxy.jobs.registry import Handle, JobRecord, RemoteJob
from proxy.log import logger
from proxy.server import Server
from proxy.workers.messages import (
    CancelJob,
    CancelStatement,
    FindJobs,
    GiveWay,
    ListJobs,
    NewRole,
    Roles,
)
from proxy.workers.peers import OtherWorkers
from proxy.workers.replica_link import Link
from proxy.workers.sealed import GROUP

_CANCEL: Final = 2.0
"""Seconds before a cancel request goes on to the server."""

_SEARCHED: Final = 15.0
_SEARCH_AGAIN: Final = 1.0
"""Seconds to search for a job whose process is gone, and between attempts."""


class OtherReplicas(OtherWorkers):
    """The processes that the link reaches."""

    _name = "a replica"
    _answered = Roles | NewRole | FindJobs | ListJobs | CancelJob | CancelStatement | GiveWay
    _announcing = 1.0

    def __init__(self, server: Server, link: Link) -> None:
        super().__init__(server, link)
        self._link = link
        link.receive, link.joined, link.left = self.receive, self._joined, self._left
        # Jobs that are being searched for, by cookie.
        self._searching: set[int] = set()
        # Anybody can send cancel requests, and an unknown key is a question to all.
        self._cancel_limiter = RateLimiter(burst=100, rate=50)

    async def cancel(self, request: CancelRequest) -> bool:
        """Have the replica with the session carry out a cancel request."""
        if self._cancel_limiter.take(None, asyncio.get_running_loop().time()) is None:
            return False
        return await super().cancel(request)

    @property
    def _forwarding(self) -> float:
        return _CANCEL

    # The link

    def _joined(self) -> None:
        self._spawn(self._rejoin())

    async def _rejoin(self) -> None:
        """Report our roles, learn theirs, and follow the jobs that somebody waits for."""
        await self._learn_roles()
        for role_id in self._jobs.registry.roles:
            self._announced.discard(role_id)
            await self.announce(role_id)
        self._jobs_lost([job for job in self._remote_jobs.values() if not job.finished])

    def _left(self) -> None:
        self._roles_of.clear()
        self._watchers.clear()
        for question in tuple(self._questions.values()):
            question.give_up()

    def _jobs_lost(self, jobs: Sequence[RemoteJob]) -> None:
        """Their process is gone, or has lost its link and will return under another name."""
        lost = [job for job in jobs if job.cookie not in self._searching]
        if lost:
            self._searching.update(job.cookie for job in lost)
            self._spawn(self._search(lost))

    async def _search(self, jobs: list[RemoteJob]) -> None:
        """Search until somebody knows the jobs; those that nobody knows are lost."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _SEARCHED
        cookies = [job.cookie for job in jobs]
        try:
            while jobs:
                found, unanswered = await self.find([job.handle for job in jobs])
                jobs = [job for job in jobs if job.cookie not in found and not job.finished]
                if loop.time() > until and not unanswered:
                    for job in jobs:
                        job.lose()
                    return
                await asyncio.sleep(_SEARCH_AGAIN)
        finally:
            self._searching.difference_update(cookies)


class All(Peers):
    """The other workers, and the other replicas."""

    def __init__(self, workers: Peers, replicas: OtherReplicas) -> None:
        self._workers = workers
        self._replicas = replicas

    @property
    def roles(self) -> set[int]:
        return {*self._workers.roles, *self._replicas.roles}

    async def find(self, handles: Sequence[Handle]) -> tuple[dict[int, JobRecord], int]:
        found, unanswered = await self._workers.find(handles)
        if missing := [handle for handle in handles if handle[1] not in found]:
            theirs, more = await self._replicas.find(missing)
            found |= theirs
            unanswered = unanswered + more if len(theirs) < len(missing) else 0
        return found, unanswered

    async def jobs_of(self, roles: Collection[int]) -> tuple[list[JobRecord], int]:
        (first, missing), (second, more) = await asyncio.gather(
            self._workers.jobs_of(roles), self._replicas.jobs_of(roles)
        )
        return [*first, *second], missing + more

    async def cancel_job(self, job: RemoteJob) -> bool:
        peers = self._replicas if self._replicas.knows(job) else self._workers
        return await peers.cancel_job(job)

    async def cancel(self, request: CancelRequest) -> bool:
        return await self._workers.cancel(request) or await self._replicas.cancel(request)

    async def give_way(self) -> bool:
        return any(await asyncio.gather(self._workers.give_way(), self._replicas.give_way()))

    async def announce(self, role_id: int) -> None:
        await asyncio.gather(self._workers.announce(role_id), self._replicas.announce(role_id))

    def role_gone(self, role_id: int) -> None:
        self._workers.role_gone(role_id)
        self._replicas.role_gone(role_id)

    def job_ended(self, job: Job) -> None:
        self._workers.job_ended(job)
        self._replicas.job_ended(job)

    def extension_changed(self) -> None:
        self._workers.extension_changed()
        self._replicas.extension_changed()

    def leave_databases(self, sql: bytes) -> None:
        self._workers.leave_databases(sql)
        self._replicas.leave_databases(sql)


@contextlib.asynccontextmanager
async def linked(server: Server, group: bytes | None = None) -> AsyncIterator[None]:
    """Ask the replicas, and answer them, if a secret is configured.

    Args:
        server: the process.
        group: shared by the workers of one supervisor.
    """
    secret = server.runtime.replica_secret
    if secret is None:
        yield
        return
    link = Link(lambda: server.runtime, secret, group or secrets.token_bytes(GROUP))
    server.jobs.peers = All(server.jobs.peers, OtherReplicas(server, link))
    running = asyncio.get_running_loop().create_task(link.run())
    running.add_done_callback(_log_failure)
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("internal error; other replicas are not asked any more", exc_info=error)
