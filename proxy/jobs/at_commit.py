"""Jobs that start when the transaction that launched them commits, and never if it rolls back.

Invariant: the server decides. The caller's transaction sends, by NOTIFY, a word that only it and
the proxy know. If the word is heard (`listener`), the transaction has committed, and with it each
savepoint around the call. If the transaction ends and the word does not come, the job is forgotten,
as if never launched. If this cannot be known, because the listening connection was lost, the job
fails and does not run. A word serves for one job, once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Final, NamedTuple

from protocol.errors import (
    CONFIGURATION_LIMIT_EXCEEDED,
    CONNECTION_FAILURE,
    FEATURE_NOT_SUPPORTED,
    TRANSACTION_ROLLBACK,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.messages import ErrorResponse
from proxy.backends.backend import no_backend
from proxy.backends.identity import Login
from proxy.backends.listener import Listener, Open, PooledError, listen, new_word
from proxy.jobs.job import Job
from proxy.log import logger
from proxy.reasons import explain

MAX_SQL: Final = 64 * 1024 * 1024
"""Bytes of SQL in pending jobs of one login role."""

_SETTLE_AFTER: Final = 0.05
"""Seconds after the end of a transaction in which most words arrive unasked."""

_LOOK_INTERVAL: Final = 0.1
_LOOK_MAX_INTERVAL: Final = 2.0
"""Seconds between checks of a backend's end, and between attempts to listen: at first, at most."""

_TRIES: Final = 5
"""Failed attempts to listen again, after which jobs of finished transactions fail."""

_MAX_FAILURES: Final = 30
"""Consecutive failures to check whether a backend has ended."""

_READ_ONLY: Final = "25006"

_PREPARES: Final = b"\0RAtPrepare_Notify\0"
"""The routine field of the error that refuses PREPARE TRANSACTION after NOTIFY."""

_FAILURES: Final = (SQLError, OSError, ProtocolViolation, PooledError)


class Notification(NamedTuple):
    """What the caller's transaction must send: NOTIFY's channel and payload."""

    channel: bytes
    word: bytes


class Pending:
    """A job whose transaction has not committed, as far as is known.

    Attributes:
        job: the job.
        size: bytes of its SQL.
        word: tells of the commit.
        is_over: whether the transaction has ended.
        is_doubtful: whether the word may have come while nobody listened.
    """

    def __init__(
        self,
        job: Job,
        size: int,
        *,
        mine: set[Pending],
        start: Callable[[], Awaitable[None]],
        forget: Callable[[], None],
    ) -> None:
        """
        Args:
            job: has no backend yet.
            size: bytes of its SQL.
            mine: its owner's pending jobs, to which it belongs while it waits.
            start: runs it; raises nothing.
            forget: called if its transaction was rolled back.
        """
        self.job = job
        self.size = size
        self.word = new_word()
        self.is_over = False
        self.is_doubtful = False
        self._mine = mine
        self._start: Callable[[], Awaitable[None]] | None = start
        self._forget: Callable[[], None] | None = forget
        mine.add(self)

    async def start(self) -> None:
        """Run the job."""
        start = self._start
        self.let_go()
        if start is not None:
            await start()

    def withdraw(self) -> None:
        """Forget the job, as if never launched."""
        forget = self._forget
        self.let_go()
        if forget is not None:
            forget()

    def let_go(self) -> None:
        """The job no longer waits."""
        # It may be remembered for long, without its SQL.
        self._start = self._forget = None
        self._mine.discard(self)


class PendingJobs:
    """The pending jobs of a process."""

    def __init__(self, most: int, lifetime: float) -> None:
        """
        Args:
            most: limit for one login role.
            lifetime: seconds for which an unused listener is kept.
        """
        self.most = most
        self.lifetime = lifetime
        self._followers: dict[Login, _Follower] = {}
        self._count: Counter[bytes] = Counter()
        self._size: Counter[bytes] = Counter()

    async def add(self, login: Login, open_one: Open, pending: Pending) -> Notification:
        """Start a job once its word comes. Returns what its transaction must send.

        Args:
            login: of the job.
            open_one: opens a backend of that login; raises SQLError.
            pending: the job.

        Raises SQLError: nothing can be heard; 53400: there are too many jobs.
        """
        self._check(login.user, pending.size)
        self._count[login.user] += 1
        self._size[login.user] += pending.size
        try:
            while not (follower := self._follower(login, open_one)).listens:
                await follower.expect()
        except BaseException:
            self.done(login, pending)
            raise
        follower.add(pending)
        return Notification(follower.channel, pending.word)

    def _follower(self, login: Login, open_one: Open) -> _Follower:
        follower = self._followers.get(login)
        if follower is None:
            follower = self._followers[login] = _Follower(self, login)
        follower.open_one = open_one
        return follower

    def _check(self, role: bytes, size: int) -> None:
        name = role.decode("utf-8", "replace")
        if self._count[role] >= self.most:
            raise SQLError(
                CONFIGURATION_LIMIT_EXCEEDED,
                "too many background workers wait for a commit",
                detail=f'{self._count[role]} are pending for role "{name}", and the proxy allows'
                f" {self.most} (max_pending_jobs).",
                hint="Commit more often, or launch one job that does the work of many.",
            )
        if self._size[role] + size > MAX_SQL:
            raise SQLError(
                CONFIGURATION_LIMIT_EXCEEDED,
                "too much SQL of background workers waits for a commit",
                detail=f'The jobs that are pending for role "{name}" may have'
                f" {MAX_SQL // 1024**2} MB of it.",
                hint="Commit more often, or put the data into a table.",
            )

    def done(self, login: Login, pending: Pending) -> None:
        """The job no longer counts."""
        for used, amount in ((self._count, 1), (self._size, pending.size)):
            used[login.user] -= amount
            if not used[login.user]:
                del used[login.user]

    def gone(self, login: Login) -> None:
        """A follower has nothing left to do."""
        del self._followers[login]

    # Called by owners

    def transaction_ended(self, mine: Collection[Pending]) -> None:
        """The transaction of these jobs has ended; those whose word does not come are forgotten."""
        for pending in mine:
            pending.is_over = True
        for follower in self._of(mine):
            follower.settle()

    def owner_gone(self, mine: Collection[Pending], pid: int) -> None:
        """The session of these jobs is closed; its backend, `pid`, may still be committing."""
        for follower in self._of(mine):
            follower.spawn(follower.until_gone(tuple(p for p in mine if p in follower), pid))

    async def catch_up(self, mine: Collection[Pending]) -> None:
        """Wait until those of these jobs have started whose transactions have committed by now."""
        for follower in self._of(mine):
            await asyncio.shield(follower.spawn(follower.catch_up()))

    def _of(self, mine: Collection[Pending]) -> list[_Follower]:
        followers = tuple(self._followers.values())
        return [one for one in followers if any(pending in one for pending in mine)]

    # Giving up connections

    def give_way(self) -> bool:
        """Close listeners that nobody needs. Returns whether there were any."""
        return self.leave(lambda login: True)

    def leave(self, matches: Callable[[Login], bool]) -> bool:
        """Close those of some logins that nobody needs. Returns whether there were any."""
        found = [one for login, one in self._followers.items() if matches(login)]
        return sum(one.give_way() for one in found) > 0


class _Follower:
    """Follows the commits of one login."""

    def __init__(self, jobs: PendingJobs, login: Login) -> None:
        self.open_one: Open
        self.channel = b""
        self._jobs = jobs
        self._login = login
        self._listener: Listener | None = None
        self._opening: asyncio.Task[Listener] | None = None
        self._by_word: dict[bytes, Pending] = {}
        self._settling: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, pending: Pending) -> bool:
        return self._by_word.get(pending.word) is pending

    def add(self, pending: Pending) -> None:
        """Wait for the word of one more job."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._by_word[pending.word] = pending
        pending.job.when_finished(lambda: self._ended(pending))

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run this in a task of its own."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Listening

    @property
    def listens(self) -> bool:
        """Whether commits are heard now."""
        return self._listener is not None and self._listener.is_alive

    async def expect(self) -> None:
        """Make sure that commits are heard. Raises SQLError."""
        try:
            await self._listening()
        except PooledError:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "background workers cannot start at commit behind a connection pooler",
                detail="The proxy reaches the server through a connection pooler, which does not"
                " pass on notifications.",
                hint="Have the proxy connect to the server itself.",
            ) from None
        except ServerError as error:
            if error.sqlstate == _READ_ONLY:
                raise on_standby() from None
            raise
        except (OSError, ProtocolViolation) as error:
            raise no_backend(explain(error)) from None
        finally:
            self._rest()

    async def _listening(self) -> Listener:
        if self._listener is not None and self._listener.is_alive:
            return self._listener
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
        # Others wait for it too.
        return await asyncio.shield(self._opening)

    async def _open(self) -> Listener:
        try:
            self._listener = await listen(
                self._login, self.open_one, self._heard, self._lost, self.channel or None
            )
            self.channel = self._listener.channel
            return self._listener
        finally:
            self._opening = None

    def _lost(self) -> None:
        for pending in self._by_word.values():
            pending.is_doubtful = True
        if self._by_word:
            logger.warning(
                "the connection was lost that listens for commits of user %s in database %s",
                *(name.decode("utf-8", "replace") for name in self._login[:0:-1]),
            )
            self.spawn(self._listen_again())

    async def _listen_again(self) -> None:
        delay = _LOOK_INTERVAL
        while self._by_word and not self.listens:
            try:
                await self._listening()
            except _FAILURES as error:
                logger.info("cannot listen for commits: %s", explain(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LOOK_MAX_INTERVAL)

    def give_way(self) -> bool:
        """Close the connection unless it is needed. Returns whether it was closed."""
        if self._by_word or self._opening is not None:
            return False
        listened = self.listens
        if self._idle is not None:
            self._idle.cancel()
        if self._listener is not None:
            self._listener.close()
        self._jobs.gone(self._login)
        return listened

    def _rest(self) -> None:
        if not self._by_word and self._idle is None:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._jobs.lifetime, self.give_way)

    # Outcomes

    def _heard(self, word: bytes) -> None:
        pending = self._by_word.pop(word, None)
        if pending is not None:
            self.spawn(self._run(pending))

    async def _run(self, pending: Pending) -> None:
        try:
            await pending.start()
        finally:
            self._jobs.done(self._login, pending)
            self._rest()

    def _ended(self, pending: Pending) -> None:
        """The job has ended: if it was still waiting, it must not start."""
        if self._by_word.pop(pending.word, None) is not None:
            pending.let_go()
            self._jobs.done(self._login, pending)
            self._rest()

    def settle(self) -> None:
        """Transactions have ended: find out which have committed."""
        if self._settling is None or self._settling.done():
            self._settling = self.spawn(self._settle())

    async def _settle(self) -> None:
        tries = 0
        while self._over:
            await asyncio.sleep(_SETTLE_AFTER if not tries else _LOOK_MAX_INTERVAL)
            if not (over := self._over):
                return
            try:
                await self.catch_up()
            except _FAILURES as error:
                tries += 1
                logger.info("cannot tell which transactions have committed: %s", explain(error))
                if tries < _TRIES:
                    continue
                for pending in over:
                    pending.is_doubtful = True
            tries = 0
            for pending in over:
                if pending in self:
                    self._has_not_come(pending)

    @property
    def _over(self) -> list[Pending]:
        return [pending for pending in self._by_word.values() if pending.is_over]

    async def catch_up(self) -> None:
        """Wait until all words have been heard that were sent by commits before this call.

        Raises SQLError, OSError, ProtocolViolation, PooledError.
        """
        await (await self._listening()).catch_up()

    def _has_not_come(self, pending: Pending) -> None:
        if not pending.is_doubtful:
            pending.withdraw()
        else:
            logger.warning("a job that was pending is not started: its commit is not known")
            pending.job.end_with(
                SQLError(
                    CONNECTION_FAILURE,
                    "cannot tell whether the transaction of the background worker has committed",
                    detail="The connection was lost on which the proxy is told of commits.",
                    hint="It did not run. Launch it again if its transaction has committed.",
                ).response()
            )

    async def until_gone(self, mine: Collection[Pending], pid: int) -> None:
        """Wait for the end of the transaction of these jobs, or of its backend, `pid`."""
        began: bytes | None = None
        failures = 0
        delay = _LOOK_INTERVAL
        while any(pending in self for pending in mine):
            try:
                start = await (await self._listening()).start_of(pid)
            except _FAILURES as error:
                logger.debug("cannot tell whether a backend has ended: %s", explain(error))
                failures += 1
                if failures == _MAX_FAILURES:
                    break
            else:
                failures = 0
                if start is None or (began is not None and start != began):
                    break
                began = start
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LOOK_MAX_INTERVAL)
        self._jobs.transaction_ended(mine)


def rolled_back() -> SQLError:
    """The error for those who wait for a job whose transaction was rolled back."""
    return SQLError(
        TRANSACTION_ROLLBACK,
        "the transaction that has launched the background worker was rolled back",
    )


def on_standby() -> SQLError:
    """The error of a launch at commit where no transaction can commit."""
    return SQLError(
        _READ_ONLY,
        "background workers cannot start at commit during recovery",
        detail="The server is a standby, where no transaction can notify of its commit.",
        hint="Launch the job at once, with pg_background_launch, or connect to the primary.",
    )


def cannot_prepare(error: bytes) -> bytes | None:
    """The replacement for an ErrorResponse with this body that refuses to prepare a transaction
    after NOTIFY: the same with a HINT. None for other errors."""
    if _PREPARES not in error:
        return None
    return (
        ErrorResponse.parse(error)
        .with_fields(
            H=b"Jobs that start at commit (pg_background_launch_at_commit, or the setting"
            b" pg_background.launch_at_commit) cannot be launched in a transaction that is"
            b" prepared. Launch them after COMMIT PREPARED."
        )
        .serialize()
    )
