"""The other worker processes, as one of them sees them: what they know, and what it tells them.

Invariant: a process asks all the others when it needs to know something, and believes the answers;
nothing that changes is kept in two places. Two exceptions are pushed, because they must be there
before the question: the end of a job that a peer has seen running, and the roles
whose jobs a process knows, which a launch of a new role waits for (`context` reads the rights of
these roles before the call is made). The supervisor hands questions and answers on, tells who was
asked, and who is gone; a question is over when all have answered or are gone, or after a time.
Between two processes messages come in the order in which they were sent.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from protocol.startup import CancelRequest
from proxy.jobs.job import Job
from proxy.jobs.peers import Peers
from proxy.jobs.registry import Handle, JobRecord, RemoteJob
from proxy.log import logger
from proxy.server import Server
from proxy.workers.bus import PIECE, Channel
from proxy.workers.messages import (
    Answer,
    Ask,
    Asked,
    CancelJob,
    CancelStatement,
    ExtensionChanged,
    FindJobs,
    GiveWay,
    Gone,
    JobEnded,
    LeaveDatabases,
    ListJobs,
    Message,
    NewRole,
    News,
    Question,
    RoleGone,
    Roles,
    Told,
)

_PATIENCE: Final = 5.0
"""Seconds that a process which does not answer is waited for."""

_AT_ONCE: Final = 1000
"""Jobs that are asked for with one question."""

_SNAPSHOT_SIZE: Final = 400
"""About how many bytes a snapshot is beside its texts."""

_CANCELING: Final = 60.0
"""The same, when it is to tell the server something and connect_timeout sets no limit."""


class _Question:
    """One that was asked, until it is over."""

    def __init__(self, take: Callable[[int, Any], bool]) -> None:
        self._take = take
        self._missing: set[int] | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def asked(self, peers: Iterable[int]) -> None:
        """Wait for these peers."""
        self._missing = set(peers)
        self._check(enough=False)

    def answer(self, peer: int, answer: Any, *, more: bool) -> None:
        """An answer has come; `more`: a part of one. None: the peer could not tell."""
        enough = answer is not None and not self.over.done() and self._take(peer, answer)
        if enough or not more:
            self.gone(peer, enough=enough)

    def gone(self, peer: int, *, enough: bool = False) -> None:
        """One will not any more."""
        if self._missing is not None:
            self._missing.discard(peer)
        self._check(enough=enough)

    def _check(self, *, enough: bool) -> None:
        if not self.over.done() and (enough or not (self._missing or self._missing is None)):
            self.over.set_result(None)


class OtherWorkers(Peers):
    """Those at the other end of the channel."""

    def __init__(self, server: Server, channel: Channel) -> None:
        self._server = server
        self._jobs = server.jobs
        self._channel = channel
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        # What they have told us: of which roles they know jobs.
        self._roles_of: defaultdict[int, set[int]] = defaultdict(set)
        # What we have told them.
        self._announced: set[int] = set()
        # Jobs of theirs that somebody here holds on to.
        self._stand_ins: weakref.WeakValueDictionary[Handle, RemoteJob] = (
            weakref.WeakValueDictionary()
        )
        # Who has seen a job of ours running.
        self._watchers: dict[Handle, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self) -> None:
        """From now on we are one of several; returns when their roles are known."""
        self._jobs.peers = self
        self._channel.lost.add_done_callback(lambda _: self._left_alone())

        def take(peer: int, roles: list[int]) -> bool:
            self._roles_of[peer].update(roles)
            return False

        await self._ask(Roles(), take)

    # What the sessions ask

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles whose jobs they know."""
        return set().union(*self._roles_of.values()) if self._roles_of else set()

    async def find(self, handles: Sequence[Handle]) -> dict[Handle, JobRecord]:
        """Those of these jobs that they know."""
        missing = set(handles)
        found: dict[Handle, JobRecord] = {}

        def take(peer: int, snapshots: list[dict[str, Any]]) -> bool:
            for job in self._stand_ins_for(peer, snapshots):
                found[job.handle] = job
                missing.discard(job.handle)
            return not missing

        for start in range(0, len(handles), _AT_ONCE):
            await self._ask(FindJobs(handles[start : start + _AT_ONCE]), take)
        return found

    async def jobs_of(self, roles: Collection[int]) -> list[JobRecord]:
        """All that they know of jobs of these roles."""
        found: list[JobRecord] = []

        def take(peer: int, snapshots: list[dict[str, Any]]) -> bool:
            found.extend(self._stand_ins_for(peer, snapshots))
            return False

        await self._ask(ListJobs(sorted(roles)), take)
        return found

    def _stand_ins_for(self, peer: int, snapshots: list[dict[str, Any]]) -> list[RemoteJob]:
        jobs = [
            job.update(snapshot)
            if (job := self._stand_ins.get((snapshot["pid"], snapshot["cookie"]))) is not None
            else RemoteJob(peer, snapshot)
            for snapshot in snapshots
        ]
        self._stand_ins.update((job.handle, job) for job in jobs)
        return jobs

    async def cancel_job(self, job: RemoteJob) -> None:
        """Have its process tell the server to stop it."""
        await self._ask(CancelJob(*job.handle), to=job.owner, patience=self._canceling)

    async def cancel(self, request: CancelRequest) -> bool:
        """Forward a cancel request to the worker that owns the session."""
        known: list[bool] = []

        def take(peer: int, is_known: bool) -> bool:
            if is_known:
                known.append(True)
            return is_known

        ask = CancelStatement(request.pid, request.secret_key.decode("latin-1"))
        await self._ask(ask, take, patience=self._canceling)
        return bool(known)

    @property
    def _canceling(self) -> float:
        return _PATIENCE + (self._server.runtime.config.connect_timeout or _CANCELING)

    async def give_way(self) -> bool:
        """Have them close their spares; whether there were any."""
        had: list[bool] = []

        def take(peer: int, had_some: bool) -> bool:
            had.append(had_some)
            return False

        await self._ask(GiveWay(), take)
        return any(had)

    # What they must be told

    async def announce(self, role_id: int) -> None:
        """We know jobs of this role; returns when all know that."""
        if role_id not in self._announced:
            await self._ask(NewRole(role_id))
            self._announced.add(role_id)
            if role_id not in self._jobs.registry.roles:
                self.role_gone(role_id)

    def role_gone(self, role_id: int) -> None:
        """We know none of this role any more."""
        if role_id in self._announced:
            self._announced.discard(role_id)
            self._channel.send(Told(RoleGone(role_id)))

    def job_ended(self, job: Job) -> None:
        """One of ours."""
        for peer in self._watchers.pop(job.handle, ()):
            self._channel.send(Told(JobEnded(job.snapshot(whole=False)), to=peer))

    def extension_changed(self) -> None:
        """A command about the extension has done its work in some database."""
        self._channel.send(Told(ExtensionChanged()))

    def leave_databases(self, sql: bytes) -> None:
        """A statement here is about to drop, rename or copy databases."""
        self._channel.send(Told(LeaveDatabases(sql.decode("latin-1"))))

    # Asking

    async def _ask(
        self,
        ask: Ask,
        take: Callable[[int, Any], bool] = lambda peer, answer: False,
        *,
        to: int | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        """Ask all of them, or one. `take` is given each answer as it comes, and returns whether no
        other is wanted; `patience` is in seconds."""
        if self._channel.lost.done():
            return
        number = next(self._numbers)
        question = self._questions[number] = _Question(take)
        self._channel.send(Question(number, ask, to))
        try:
            await asyncio.wait_for(question.over, patience)
        except TimeoutError:
            logger.warning("a worker does not answer (%s)", type(ask).__name__)
        finally:
            del self._questions[number]

    # What comes in

    def receive(self, message: Message) -> None:
        """A message that the supervisor has handed on, or made."""
        match message:
            case Question():
                task = asyncio.get_running_loop().create_task(self._answer(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Asked(number, peers):
                if (question := self._questions.get(number)) is not None:
                    question.asked(peers)
            case Answer(number):
                if (question := self._questions.get(number)) is not None:
                    question.answer(message.sender, message.body, more=message.more)
            case Told(news):
                self._told(message.sender, news)
            case Gone(peer):
                self._gone(peer)

    def _told(self, peer: int, news: News) -> None:
        match news:
            case RoleGone(role_id):
                self._roles_of[peer].discard(role_id)
            case LeaveDatabases(sql):
                self._jobs.spares.leave(sql.encode("latin-1"))
            case ExtensionChanged():
                self._server.extension_changes += 1
            case JobEnded(snapshot):
                job = self._stand_ins.get((snapshot["pid"], snapshot["cookie"]))
                if job is not None:
                    job.update(snapshot)

    def _gone(self, peer: int) -> None:
        self._roles_of.pop(peer, None)
        for watchers in self._watchers.values():
            watchers.discard(peer)
        for question in tuple(self._questions.values()):
            question.gone(peer)
        for job in tuple(self._stand_ins.values()):
            if job.owner == peer:
                job.lose()

    def _left_alone(self) -> None:
        """The supervisor is gone, so no answer will come."""
        for question in self._questions.values():
            question.asked(())

    # Answering

    async def _answer(self, question: Question) -> None:
        answer = Answer(question.number, question.sender, None)
        try:
            body = await self._answer_to(question.sender, question.ask)
            if isinstance(body, Iterator):
                await self._send_pieces(answer, body)
                return
        except Exception:
            logger.exception("internal error; a question of another worker has no answer")
            body = None
        self._channel.send(replace(answer, body=body))

    async def _send_pieces(self, answer: Answer, snapshots: Iterator[dict[str, Any]]) -> None:
        """Answer a piece at a time, as fast as it is read."""
        piece: list[dict[str, Any]] = []
        size = 0
        for snapshot in snapshots:
            piece.append(snapshot)
            size += _SNAPSHOT_SIZE + len(snapshot["sql"]) + len(snapshot["label"] or "")
            size += sum(map(len, (snapshot["error"] or {}).values()))
            if size > PIECE:
                self._channel.send(replace(answer, body=piece, more=True))
                piece, size = [], 0
                await asyncio.sleep(0)
                await self._channel.drain()
        self._channel.send(replace(answer, body=piece))

    async def _answer_to(self, peer: int, ask: Ask) -> Any:
        registry = self._jobs.registry
        match ask:
            case Roles():
                return sorted(registry.roles)
            case NewRole(role_id):
                self._roles_of[peer].add(role_id)
                return True
            case FindJobs(handles):
                known = [registry.get(pid, cookie) for pid, cookie in handles]
                return self._snapshots(peer, filter(None, known), whole=True)
            case ListJobs(roles):
                return self._snapshots(
                    peer, [job for job in registry if job.role_id in roles], whole=False
                )
            case CancelJob(pid, cookie):
                job = registry.get(pid, cookie)
                if job is not None and not job.finished:
                    await self._jobs.cancel(job)
                return True
            case CancelStatement(pid, secret_key):
                request = CancelRequest(pid, secret_key.encode("latin-1"))
                if request not in self._server.keys:
                    return False
                await self._server.cancel(request)
                return True
            case GiveWay():
                return self._jobs.spares.give_way()

    def _snapshots(
        self, peer: int, jobs: Iterable[Job], *, whole: bool
    ) -> Iterator[dict[str, Any]]:
        """As they are when they are told: one that ends in between is told as ended."""
        found = list(jobs)
        for job in found:
            if not job.finished:
                self._watchers.setdefault(job.handle, set()).add(peer)
        return (job.snapshot(whole=whole) for job in found)
