"""The other worker processes, as one of them sees them: what they know, and what it tells them.

Invariant: a process asks all the others when it needs to know something, and believes the answers;
nothing that changes is kept in two places. Two exceptions are pushed, because they must be there
before the question: the end of a job that a peer has seen running, and the roles
whose jobs a process knows, which a launch of a new role waits for (`context` reads the rights of
these roles before the call is made). The supervisor hands questions and answers on, tells who was
asked, and who is gone; a question is over when all have answered or are gone, or after a time. It
goes to a process that hangs too, which is told what it must know when it goes on, but is not waited
for. Who asks is told how many have not answered.
Between two processes messages come in the order in which they were sent.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from types import UnionType
from typing import Any, Final, Protocol

from protocol.errors import CONNECTION_FAILURE, SQLError
from protocol.startup import CancelRequest
from proxy.admin.figures import collect
from proxy.admin.overview import Overview
from proxy.console.process import Found, kill, running
from proxy.console.tables import Row, rows
from proxy.jobs.job import Job
from proxy.jobs.peers import Peers
from proxy.jobs.registry import Handle, JobRecord, RemoteJob
from proxy.log import logger
from proxy.server import Server
from proxy.stats import Figures
from proxy.workers.bus import PIECE
from proxy.workers.messages import (
    Answer,
    Ask,
    Asked,
    CancelJob,
    CancelStatement,
    ConsoleTable,
    ExtensionChanged,
    FindJobs,
    GiveWay,
    Gone,
    JobEnded,
    JobsWithPid,
    KillSession,
    LeaveDatabases,
    ListJobs,
    Measure,
    Message,
    NewRole,
    News,
    Order,
    Outcome,
    Question,
    RoleGone,
    Roles,
    ShowJobs,
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


class Bus(Protocol):
    """What messages to the others go by (`bus.Channel`).

    Attributes:
        lost: done when no answer will come any more.
    """

    @property
    def lost(self) -> asyncio.Future[None]: ...

    def send(self, message: Message) -> None:
        """Send a message."""

    async def drain(self) -> None:
        """Wait until most of what was sent is gone."""


class _Question:
    """One that was asked, until it is over; a `lasting` one takes answers that come later, too."""

    def __init__(self, take: Callable[[int, Any], bool], *, lasting: bool) -> None:
        self._take = take
        self._lasting = lasting
        self._missing: set[int] | None = None
        # Those that hang, and those that could not tell.
        self._silent: set[int] = set()
        self._failed: set[int] = set()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def asked(self, peers: Iterable[int], hanging: Iterable[int] = ()) -> None:
        """Wait for these peers, and not for others that hang."""
        self._missing = set(peers)
        self._silent.update(hanging)
        self._check(enough=False)

    def answer(self, peer: int, answer: Any, *, more: bool) -> None:
        """An answer has come; `more`: a part of one. None: the peer could not tell."""
        is_wanted = self._lasting or not self.over.done()
        enough = answer is not None and is_wanted and self._take(peer, answer)
        if answer is None:
            self._failed.add(peer)
        if enough or not more:
            self._said_all(peer, enough=enough)

    def gone(self, peer: int) -> None:
        """One will not any more, and knows nothing."""
        self._failed.discard(peer)
        self._said_all(peer, enough=False)

    def give_up(self) -> None:
        """No answer will come, and there may be somebody who knows."""
        self._missing = None
        if not self.over.done():
            self.over.set_result(None)

    def _said_all(self, peer: int, *, enough: bool) -> None:
        self._silent.discard(peer)
        if self._missing is not None:
            self._missing.discard(peer)
        self._check(enough=enough)

    @property
    def unanswered(self) -> int:
        """How many have not answered."""
        if self._missing is None:
            return 1  # the supervisor has not said whom it has asked
        return len(self._silent | self._failed | self._missing)

    def _check(self, *, enough: bool) -> None:
        if not self.over.done() and (enough or not (self._missing or self._missing is None)):
            self.over.set_result(None)


class OtherWorkers(Peers):
    """Those at the other end of the channel."""

    _name = "a worker"
    """What one of them is called in the log."""

    _answered: type | UnionType = Ask
    """What is answered."""

    def __init__(self, server: Server, channel: Bus) -> None:
        self._server = server
        self._jobs = server.jobs
        self._overview = Overview(server.jobs)
        self._channel = channel
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        # What the supervisor has not answered yet.
        self._orders: dict[int, asyncio.Future[tuple[Any, Sequence[str] | None]]] = {}
        # What they have told us: of which roles they know jobs.
        self._roles_of: defaultdict[int, set[int]] = defaultdict(set)
        # What we have told them.
        self._announced: set[int] = set()
        # Jobs of theirs that somebody here holds on to, by cookie.
        self._stand_ins: weakref.WeakValueDictionary[int, RemoteJob] = weakref.WeakValueDictionary()
        # Who has seen a job of ours, by its cookie, before it ended.
        self._watchers: dict[int, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self) -> None:
        """From now on we are one of several; returns when their roles are known."""
        self._jobs.peers = self
        self._channel.lost.add_done_callback(lambda _: self._left_alone())
        await self._learn_roles()

    async def _learn_roles(self) -> None:
        def take(peer: int, roles: list[int]) -> bool:
            self._roles_of[peer].update(roles)
            return False

        await self._ask(Roles(), take, lasting=True)

    # What the sessions ask

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles whose jobs they know."""
        return set().union(*self._roles_of.values()) if self._roles_of else set()

    async def find(self, handles: Sequence[Handle]) -> tuple[dict[int, JobRecord], int]:
        """Those of these jobs that they know, by cookie; how many did not answer of those that may
        know the rest."""
        missing = {cookie for _, cookie in handles}
        found: dict[int, JobRecord] = {}
        unanswered = 0

        def take(peer: int, snapshots: list[dict[str, Any]]) -> bool:
            for job in self._stand_ins_for(peer, snapshots):
                found[job.cookie] = job
                missing.discard(job.cookie)
            return not missing

        for start in range(0, len(handles), _AT_ONCE):
            ask = FindJobs(handles[start : start + _AT_ONCE])
            unanswered = max(unanswered, await self._ask(ask, take))
        return found, unanswered if missing else 0

    async def jobs_of(self, roles: Collection[int]) -> tuple[list[JobRecord], int]:
        """All that they know of jobs of these roles; how many did not answer."""
        found: list[JobRecord] = []

        def take(peer: int, snapshots: list[dict[str, Any]]) -> bool:
            found.extend(self._stand_ins_for(peer, snapshots))
            return False

        return found, await self._ask(ListJobs(sorted(roles)), take)

    def _stand_ins_for(self, peer: int, snapshots: list[dict[str, Any]]) -> list[RemoteJob]:
        jobs = [
            job.update(snapshot)
            if (job := self._stand_ins.get(snapshot["cookie"])) is not None
            else RemoteJob(peer, snapshot)
            for snapshot in snapshots
        ]
        for job in jobs:
            job.owner = peer
            self._stand_ins[job.cookie] = job
        return jobs

    def knows(self, job: RemoteJob) -> bool:
        """Whether it is one of theirs."""
        return self._stand_ins.get(job.cookie) is job

    async def cancel_job(self, job: RemoteJob) -> bool:
        """Have its process tell the server to stop it; whether it has answered."""
        ask = CancelJob(*job.handle)
        return not await self._ask(ask, to=job.owner, patience=self._canceling)

    async def cancel(self, request: CancelRequest) -> bool:
        """Forward a cancel request to the worker that owns the session."""
        known: list[bool] = []

        def take(peer: int, is_known: bool) -> bool:
            if is_known:
                known.append(True)
            return is_known

        ask = CancelStatement(request.pid, request.secret_key.decode("latin-1"))
        await self._ask(ask, take, patience=self._forwarding)
        return bool(known)

    @property
    def _canceling(self) -> float:
        return _PATIENCE + (self._server.runtime.config.connect_timeout or _CANCELING)

    @property
    def _forwarding(self) -> float:
        return self._canceling

    @property
    def _announcing(self) -> float:
        return _PATIENCE

    async def give_way(self) -> bool:
        """Have them close their spares; whether there were any."""
        had: list[bool] = []

        def take(peer: int, had_some: bool) -> bool:
            had.append(had_some)
            return False

        await self._ask(GiveWay(), take)
        return any(had)

    # What the console asks

    async def table(self, name: str) -> tuple[list[Row], int]:
        """What they know for a table; and how many did not answer."""
        found: list[Row] = []

        def take(peer: int, rows: list[Row]) -> bool:
            found.extend(rows)
            return False

        return found, await self._ask(ConsoleTable(name), take)

    async def jobs_with_pid(self, pid: int) -> tuple[list[Found], int]:
        """Their jobs that run with a PID; and how many did not answer."""
        found: list[Found] = []

        def take(peer: int, handles: list[Sequence[int]]) -> bool:
            found.extend(Found(peer, (pid, cookie)) for pid, cookie in handles)
            return False

        return found, await self._ask(JobsWithPid(pid), take)

    async def cancel_found(self, owner: int, handle: Handle) -> bool:
        """The same as `cancel_job`, of one that was found so."""
        return not await self._ask(CancelJob(*handle), to=owner, patience=self._canceling)

    async def kill(self, session: str) -> tuple[bool, int]:
        """Have a session ended; whether it was one of theirs, and how many did not answer."""
        known: list[bool] = []

        def take(peer: int, is_known: bool) -> bool:
            if is_known:
                known.append(True)
            return is_known

        unanswered = await self._ask(KillSession(session), take)
        return bool(known), unanswered

    async def order(self, what: str, worker: int = 0) -> Any:
        """Have the supervisor do something; the body of its Outcome.

        Raises SQLError: it does not, or is gone.
        """
        number = next(self._numbers)
        outcome = self._orders[number] = asyncio.get_running_loop().create_future()
        self._channel.send(Order(number, what, worker))
        try:
            async with asyncio.timeout(_PATIENCE):
                body, error = await outcome
        except TimeoutError:
            body, error = None, [CONNECTION_FAILURE, "the supervisor does not answer", "", ""]
        finally:
            del self._orders[number]
        if error is not None:
            sqlstate, message, detail, hint = error
            raise SQLError(sqlstate, message, detail=detail or None, hint=hint or None)
        return body

    # What they must be told

    async def announce(self, role_id: int) -> None:
        """We know jobs of this role; returns when all know that."""
        if role_id not in self._announced:
            await self._ask(NewRole(role_id), patience=self._announcing)
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
        for peer in self._watchers.pop(job.cookie, ()):
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
        lasting: bool = False,
    ) -> int:
        """Ask all of them, or one; how many have not answered. `take` is given each answer as it
        comes, and returns whether no other is wanted; if `lasting`, also those that come late.
        `patience` is in seconds."""
        if self._channel.lost.done():
            return 0
        number = next(self._numbers)
        question = self._questions[number] = _Question(take, lasting=lasting)
        self._channel.send(Question(number, ask, to))
        try:
            await asyncio.wait_for(question.over, patience)
        except TimeoutError:
            logger.warning("%s does not answer (%s)", self._name, type(ask).__name__)
        finally:
            if not (lasting and question.unanswered):
                del self._questions[number]
        return question.unanswered

    def figures(self) -> Figures:
        """What the supervisor adds up."""
        return collect(self._jobs, len(self._server.sessions))

    # What comes in

    def receive(self, message: Message) -> None:
        """A message that the supervisor has handed on, or made."""
        match message:
            case Question():
                task = asyncio.get_running_loop().create_task(self._answer(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Asked(number, peers, hanging):
                if (question := self._questions.get(number)) is not None:
                    question.asked(peers, hanging)
            case Answer(number):
                if (question := self._questions.get(number)) is not None:
                    question.answer(message.sender, message.body, more=message.more)
            case Told(news):
                self._told(message.sender, news)
            case Outcome(number, body, error):
                outcome = self._orders.get(number)
                if outcome is not None and not outcome.done():
                    outcome.set_result((body, error))
            case Gone(peer):
                self._gone(peer)

    def _told(self, peer: int, news: News) -> None:
        match news:
            case RoleGone(role_id):
                self._roles_of[peer].discard(role_id)
            case LeaveDatabases(sql):
                self._jobs.leave(sql.encode("latin-1"))
            case ExtensionChanged():
                self._server.extension_changes += 1
            case JobEnded(snapshot):
                job = self._stand_ins.get(snapshot["cookie"])
                if job is not None:
                    job.update(snapshot)

    def _gone(self, peer: int) -> None:
        self._roles_of.pop(peer, None)
        for watchers in self._watchers.values():
            watchers.discard(peer)
        for question in tuple(self._questions.values()):
            question.gone(peer)
        self._jobs_lost([job for job in self._stand_ins.values() if job.owner == peer])

    def _jobs_lost(self, jobs: Sequence[RemoteJob]) -> None:
        """Who runs them is gone."""
        for job in jobs:
            job.lose()

    def _left_alone(self) -> None:
        """The supervisor is gone, so no answer will come."""
        for question in self._questions.values():
            question.asked(())

    # Answering

    async def _answer(self, question: Question) -> None:
        answer = Answer(question.number, question.sender, None)
        try:
            if not isinstance(question.ask, self._answered):
                raise TypeError(f"{type(question.ask).__name__} is not answered")
            body = await self._answer_to(question.sender, question.ask)
            if isinstance(body, Iterator):
                await self._send_pieces(answer, body)
                return
        except Exception:
            logger.exception("internal error; a question of %s has no answer", self._name)
            body = None
        self._channel.send(replace(answer, body=body))

    async def _send_pieces(
        self, answer: Answer, parts: Iterator[dict[str, Any]] | Iterator[Row]
    ) -> None:
        """Answer a piece at a time, as fast as it is read. `parts`: snapshots of jobs, or rows."""
        piece: list[dict[str, Any] | Row] = []
        size = 0
        for part in parts:
            piece.append(part)
            size += _SNAPSHOT_SIZE + _size_of_texts(part)
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
                return sorted(registry.roles | self._announced)
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
                return self._jobs.give_way()
            case ConsoleTable(name):
                return rows(name, self._server)
            case JobsWithPid(pid):
                return running(self._jobs, pid)
            case KillSession(session):
                return kill(self._server, session)
            case Measure():
                return self.figures()
            case ShowJobs():
                return await self._overview.show()

    def _snapshots(
        self, peer: int, jobs: Iterable[Job], *, whole: bool
    ) -> Iterator[dict[str, Any]]:
        """As they are when they are told: one that ends in between is told as ended."""
        found = list(jobs)
        for job in found:
            if not job.finished:
                self._watchers.setdefault(job.cookie, set()).add(peer)
        return (job.snapshot(whole=whole) for job in found)


def _size_of_texts(part: dict[str, Any] | Row) -> int:
    """About how many bytes they take."""
    if isinstance(part, list):
        return sum(len(value) for value in part if isinstance(value, str))
    errors = (part["error"] or {}).values()
    return sum(map(len, (part["sql"], part["label"] or "", *errors)))
