"""The other worker processes, as one of them sees them: what they know, and what it tells them.

Invariant: a process asks all others when it needs to know something, and believes the answers;
nothing that changes is kept in two places. Two things are pushed, since they must be known before
they are asked for: the end of a job that a peer has seen running, and the roles whose jobs a
process knows. A launch by a new role waits for the latter (`context` reads rights on these roles
before the call is made). The supervisor forwards questions and answers, and says who was asked and
who is gone (`question`). A question also goes to
processes that hang, so that they learn what they must know, but they are not waited for. The asker
is told how many have not answered. Between two processes messages arrive in the order sent.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from types import UnionType
from typing import Any, Final, Protocol

from protocol.errors import CONNECTION_FAILURE, SQLError
from protocol.startup import CancelRequest
from proxy.admin.figures import collect
from proxy.admin.jobs_page import JobsPage
from proxy.console.actions import Found, kill, running
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
    NewsItem,
    Order,
    OrderKind,
    Outcome,
    Question,
    RoleGone,
    Roles,
    ShowJobs,
)
from proxy.workers.question import OpenQuestion

_TIMEOUT: Final = 5.0
"""Seconds to wait for a process that does not answer."""

_MAX_JOBS_PER_QUESTION: Final = 1000
"""Jobs in one question."""

_SNAPSHOT_SIZE: Final = 400
"""Approximate bytes of a snapshot without its texts."""

_CANCELING: Final = 60.0
"""Seconds in addition for the server to be told something, where connect_timeout sets no limit."""


class Bus(Protocol):
    """Carries messages to the others (`bus.WorkerPipe`).

    Attributes:
        lost: done when no more answers will come.
    """

    @property
    def lost(self) -> asyncio.Future[None]: ...

    def send(self, message: Message) -> None:
        """Send a message."""

    async def drain(self) -> None:
        """Wait until most has been sent."""


class OtherWorkers(Peers):
    """The workers at the other end of the pipe."""

    _name = "a worker"
    """A peer's name in the log."""

    _answered: type | UnionType = Ask
    """The questions that are answered."""

    _announcing = _TIMEOUT
    """Seconds to wait until all know a new role."""

    def __init__(self, server: Server, bus: Bus) -> None:
        self._server = server
        self._jobs = server.jobs
        self._jobs_page = JobsPage(server.jobs)
        self._bus = bus
        self._numbers = itertools.count(1)
        self._questions: dict[int, OpenQuestion] = {}
        # Orders that the supervisor has not answered.
        self._orders: dict[int, asyncio.Future[tuple[Any, Sequence[str] | None]]] = {}
        # The roles of which each peer knows jobs.
        self._roles_of: defaultdict[int, set[int]] = defaultdict(set)
        # The roles that we have announced.
        self._announced: set[int] = set()
        # Jobs of peers that somebody here refers to, by cookie.
        self._remote_jobs: weakref.WeakValueDictionary[int, RemoteJob] = (
            weakref.WeakValueDictionary()
        )
        # Peers that have seen a job of ours before its end, by its cookie.
        self._watchers: dict[int, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self) -> None:
        """Become one of several; returns when the peers' roles are known."""
        self._jobs.peers = self
        self._bus.lost.add_done_callback(lambda _: self._left_alone())
        await self._learn_roles()

    async def _learn_roles(self) -> None:
        def take(peer: int, roles: list[int]) -> bool:
            self._roles_of[peer].update(roles)
            return False

        await self._ask(Roles(), take, lasting=True)

    # Called by sessions

    @property
    def roles(self) -> set[int]:
        """OIDs of the roles of which peers know jobs."""
        return set().union(*self._roles_of.values()) if self._roles_of else set()

    async def find(self, handles: Sequence[Handle]) -> tuple[dict[int, JobRecord], int]:
        missing = {cookie for _, cookie in handles}
        found: dict[int, JobRecord] = {}
        unanswered = 0

        def take(peer: int, snapshots: list[dict[str, Any]]) -> bool:
            for job in self._remote_jobs_of(peer, snapshots):
                found[job.cookie] = job
                missing.discard(job.cookie)
            return not missing

        for start in range(0, len(handles), _MAX_JOBS_PER_QUESTION):
            ask = FindJobs(handles[start : start + _MAX_JOBS_PER_QUESTION])
            unanswered = max(unanswered, await self._ask(ask, take))
        return found, unanswered if missing else 0

    async def jobs_of(self, roles: Collection[int]) -> tuple[list[JobRecord], int]:
        found: list[JobRecord] = []

        def take(peer: int, snapshots: list[dict[str, Any]]) -> bool:
            found.extend(self._remote_jobs_of(peer, snapshots))
            return False

        return found, await self._ask(ListJobs(sorted(roles)), take)

    def _remote_jobs_of(self, peer: int, snapshots: list[dict[str, Any]]) -> list[RemoteJob]:
        jobs = [
            job.update(snapshot)
            if (job := self._remote_jobs.get(snapshot["cookie"])) is not None
            else RemoteJob(peer, snapshot)
            for snapshot in snapshots
        ]
        for job in jobs:
            job.owner = peer
            self._remote_jobs[job.cookie] = job
        return jobs

    def knows(self, job: RemoteJob) -> bool:
        """Whether the job is a peer's."""
        return self._remote_jobs.get(job.cookie) is job

    async def cancel_job(self, job: RemoteJob) -> bool:
        return await self.cancel_found(job.owner, job.handle)

    async def cancel(self, request: CancelRequest) -> bool:
        """Forward a cancel request to the worker that has the session."""
        ask = CancelStatement(request.pid, request.secret_key.decode("latin-1"))
        is_known, _ = await self._ask_whose(ask, self._forwarding)
        return is_known

    @property
    def _canceling(self) -> float:
        return _TIMEOUT + (self._server.runtime.config.connect_timeout or _CANCELING)

    @property
    def _forwarding(self) -> float:
        return self._canceling

    async def give_way(self) -> bool:
        answers, _ = await self._ask_all(GiveWay())
        return any(had_some for _, had_some in answers)

    # Called by the console

    async def table(self, name: str) -> tuple[list[Row], int]:
        """The peers' rows for a table, and how many did not answer."""
        answers, unanswered = await self._ask_all(ConsoleTable(name))
        return [row for _, rows in answers for row in rows], unanswered

    async def jobs_with_pid(self, pid: int) -> tuple[list[Found], int]:
        """The peers' jobs that run with this pid, and how many did not answer."""
        answers, unanswered = await self._ask_all(JobsWithPid(pid))
        found = [Found(peer, (pid, cookie)) for peer, jobs in answers for pid, cookie in jobs]
        return found, unanswered

    async def cancel_found(self, owner: int, handle: Handle) -> bool:
        """`cancel_job` for a job found by `jobs_with_pid`."""
        return not await self._ask(CancelJob(*handle), to=owner, timeout=self._canceling)

    async def kill(self, session: str) -> tuple[bool, int]:
        """End a peer's session. Returns whether there was one, and how many did not answer."""
        return await self._ask_whose(KillSession(session))

    async def order(self, what: OrderKind, worker: int = 0) -> Any:
        """Have the supervisor carry out an order. Returns the body of its Outcome.

        Raises SQLError: it refuses, or is gone.
        """
        number = next(self._numbers)
        outcome = self._orders[number] = asyncio.get_running_loop().create_future()
        self._bus.send(Order(number, what, worker))
        try:
            async with asyncio.timeout(_TIMEOUT):
                body, error = await outcome
        except TimeoutError:
            body, error = None, [CONNECTION_FAILURE, "the supervisor does not answer", "", ""]
        finally:
            del self._orders[number]
        if error is not None:
            sqlstate, message, detail, hint = error
            raise SQLError(sqlstate, message, detail=detail or None, hint=hint or None)
        return body

    # News

    async def announce(self, role_id: int) -> None:
        if role_id not in self._announced:
            await self._ask(NewRole(role_id), timeout=self._announcing)
            self._announced.add(role_id)
            if role_id not in self._jobs.registry.roles:
                self.role_gone(role_id)

    def role_gone(self, role_id: int) -> None:
        if role_id in self._announced:
            self._announced.discard(role_id)
            self._bus.send(News(RoleGone(role_id)))

    def job_ended(self, job: Job) -> None:
        for peer in self._watchers.pop(job.cookie, ()):
            self._bus.send(News(JobEnded(job.snapshot(whole=False)), to=peer))

    def extension_changed(self) -> None:
        self._bus.send(News(ExtensionChanged()))

    def leave_databases(self, sql: bytes) -> None:
        self._bus.send(News(LeaveDatabases(sql.decode("latin-1"))))

    # Asking

    async def _ask(
        self,
        ask: Ask,
        take: Callable[[int, Any], bool] = lambda peer, answer: False,
        *,
        to: int | None = None,
        timeout: float = _TIMEOUT,
        lasting: bool = False,
    ) -> int:
        """Ask all peers, or one, for `timeout` seconds. Returns how many have not answered. `take`
        gets each answer, and returns whether it is the last wanted; if `lasting`, late ones too."""
        if self._bus.lost.done():
            return 0
        number = next(self._numbers)
        question = self._questions[number] = OpenQuestion(take, lasting=lasting)
        self._bus.send(Question(number, ask, to))
        try:
            await asyncio.wait_for(question.over, timeout)
        except TimeoutError:
            logger.warning("%s does not answer (%s)", self._name, type(ask).__name__)
        finally:
            if not (lasting and question.unanswered):
                del self._questions[number]
        return question.unanswered

    async def _ask_all(self, ask: Ask) -> tuple[list[tuple[int, Any]], int]:
        """All answers, each with its peer's number, and how many have not answered."""
        answers: list[tuple[int, Any]] = []

        def take(peer: int, answer: Any) -> bool:
            answers.append((peer, answer))
            return False

        return answers, await self._ask(ask, take)

    async def _ask_whose(self, ask: Ask, timeout: float = _TIMEOUT) -> tuple[bool, int]:
        """Ask until a peer says yes. Returns whether one does, and how many have not answered."""
        is_known = False

        def take(peer: int, answer: bool) -> bool:
            nonlocal is_known
            is_known = is_known or answer
            return answer

        unanswered = await self._ask(ask, take, timeout=timeout)
        return is_known, unanswered

    def figures(self) -> Figures:
        """The figures for the supervisor to add up."""
        return collect(self._jobs, len(self._server.sessions))

    # Input

    def receive(self, message: Message) -> None:
        """Handle a message forwarded or made by the supervisor."""
        match message:
            case Question():
                self._spawn(self._answer(message))
            case Asked(number, peers, hanging):
                if (question := self._questions.get(number)) is not None:
                    question.asked(peers, hanging)
            case Answer(number):
                if (question := self._questions.get(number)) is not None:
                    question.answer(message.sender, message.body, more=message.more)
            case News(item):
                self._hear(message.sender, item)
            case Outcome(number, body, error):
                outcome = self._orders.get(number)
                if outcome is not None and not outcome.done():
                    outcome.set_result((body, error))
            case Gone(peer):
                self._gone(peer)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hear(self, peer: int, item: NewsItem) -> None:
        match item:
            case RoleGone(role_id):
                self._roles_of[peer].discard(role_id)
            case LeaveDatabases(sql):
                self._jobs.leave(sql.encode("latin-1"))
            case ExtensionChanged():
                self._server.extension_changes += 1
            case JobEnded(snapshot):
                job = self._remote_jobs.get(snapshot["cookie"])
                if job is not None:
                    job.update(snapshot)

    def _gone(self, peer: int) -> None:
        self._roles_of.pop(peer, None)
        for watchers in self._watchers.values():
            watchers.discard(peer)
        for question in tuple(self._questions.values()):
            question.gone(peer)
        self._jobs_lost([job for job in self._remote_jobs.values() if job.owner == peer])

    def _jobs_lost(self, jobs: Sequence[RemoteJob]) -> None:
        """The process that runs these jobs is gone."""
        for job in jobs:
            job.lose()

    def _left_alone(self) -> None:
        """The supervisor is gone, so no answers will come."""
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
        self._bus.send(replace(answer, body=body))

    async def _send_pieces(
        self, answer: Answer, parts: Iterator[dict[str, Any]] | Iterator[Row]
    ) -> None:
        """Answer piece by piece, as fast as it is read. `parts`: snapshots of jobs, or rows."""
        piece: list[dict[str, Any] | Row] = []
        size = 0
        for part in parts:
            piece.append(part)
            size += _SNAPSHOT_SIZE + _size_of_texts(part)
            if size > PIECE:
                self._bus.send(replace(answer, body=piece, more=True))
                piece, size = [], 0
                await asyncio.sleep(0)
                await self._bus.drain()
        self._bus.send(replace(answer, body=piece))

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
                return await self._jobs_page.show()

    def _snapshots(
        self, peer: int, jobs: Iterable[Job], *, whole: bool
    ) -> Iterator[dict[str, Any]]:
        """Snapshots made when they are sent, so a job that ends meanwhile is reported as ended."""
        found = list(jobs)
        for job in found:
            if not job.finished:
                self._watchers.setdefault(job.cookie, set()).add(peer)
        return (job.snapshot(whole=whole) for job in found)


def _size_of_texts(part: dict[str, Any] | Row) -> int:
    """Approximate bytes of the texts."""
    if isinstance(part, list):
        return sum(len(value) for value in part if isinstance(value, str))
    errors = (part["error"] or {}).values()
    return sum(map(len, (part["sql"], part["label"] or "", *errors)))
