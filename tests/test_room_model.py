"""Room against a model: jobs that are launched, that wait and that are queued, in any order, and
backends and processes that die. None is lost, none runs twice, none starves.

Each job waits at a gate of its own, and then notes in a table that it has run; so which jobs run is
seen in pg_locks, and nothing depends on time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from dataclasses import dataclass, field
from typing import Final

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.conftest import StartProxy, upstream_of
from tests.support.background import wait_until
from tests.support.examples import examples
from tests.support.in_database import one
from tests.support.servers import Connection, Proxy, Server
from tests.support.statement import Statement
from tests.test_workers import worker_of, workers

MOST: Final = 4
MOST_OF_SESSION: Final = 2
SESSIONS: Final = st.integers(0, 2)
WHICH: Final = st.integers(0, 50)

_ids = itertools.count(1)


@dataclass
class Job:
    """What the model knows of a job. `state`: ``open`` while it is queued, waits or runs."""

    id: int
    session: Session
    cookie: int | None = None
    state: str = "open"


@dataclass
class Session:
    """A client; `waiting`: its launch that waits for room."""

    conn: Connection
    worker: int
    waiting: tuple[Statement, Job] | None = None
    jobs: list[Job] = field(default_factory=list)


class Room(RuleBasedStateMachine):
    proxy: Proxy
    keeper: Connection
    database: str
    workers: int

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[int, Job] = {}
        self.sessions = [self._connect() for _ in range(3)]

    def _connect(self) -> Session:
        conn = self.proxy.connect(dbname=self.database)
        conn.execute(
            f"SET pg_background.max_workers = {MOST_OF_SESSION};"
            " SET pg_background.launch_timeout = '1min'; SET pg_background.queue = on".encode()
        )
        return Session(conn, worker_of(self.proxy, conn) if self.workers > 1 else 0)

    def _new(self, session: Session) -> tuple[Job, str]:
        job = Job(next(_ids), session)
        self.keeper.execute("SELECT pg_advisory_lock(%s)", [job.id])
        self.jobs[job.id] = job
        session.jobs.append(job)
        return job, (
            f"SELECT pg_advisory_xact_lock_shared({job.id}); INSERT INTO ran VALUES ({job.id})"
        )

    # What there is

    def _running(self) -> dict[int, int]:
        """Ids of the jobs that run, and the pids of their backends."""
        rows = self.keeper.execute(
            "SELECT objid::int, pid FROM pg_locks"
            " WHERE locktype = 'advisory' AND NOT granted AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchall()
        assert len({id for id, _ in rows}) == len(rows), "a job runs twice"
        return dict(rows)

    def _open(self, *, running: bool) -> list[Job]:
        """Those that have not ended: that run, or do not yet."""
        runs = self._running()
        return [
            job for job in self.jobs.values() if job.state == "open" and (job.id in runs) is running
        ]

    def _ask(self, sql: str) -> object:
        """In a session that lives as long as that."""
        with self.proxy.connect(dbname=self.database) as conn:
            return one(conn, sql)

    def _state(self, job: Job) -> object:
        return self._ask(f"SELECT (pg_background_outcome(NULL, {job.cookie})).state")

    def _has_run(self, job: Job) -> bool:
        return bool(one(self.keeper, "SELECT count(*) FROM ran WHERE id = %s", [job.id]))

    def _settle(self) -> None:
        """Statements whose launch has its place by now have returned."""
        runs = self._running()
        for session in self.sessions:
            if session.waiting is not None and session.waiting[1].id in runs:
                statement, job = session.waiting
                job.cookie = statement.value
                session.waiting = None

    def _one_that_runs(self, which: int) -> Job | None:
        self._settle()
        running = self._open(running=True)
        return running[which % len(running)] if running else None

    # What happens. What runs depends on more than the steps, so the rules have no preconditions.

    @rule(number=SESSIONS)
    def submit(self, number: int) -> None:
        session = self.sessions[number]
        if session.waiting is not None:
            return
        job, sql = self._new(session)
        row = session.conn.execute("SELECT (pg_background_submit(%s)).*", [sql]).fetchone()
        assert row is not None
        pid, job.cookie = row
        if pid is None:
            assert self._state(job) in ("queued", "running")

    @rule(number=SESSIONS)
    def launch(self, number: int) -> None:
        session = self.sessions[number]
        if session.waiting is not None:
            return
        job, sql = self._new(session)
        call = f"SELECT cookie FROM pg_background_launch_v2($job${sql}$job$)"
        session.waiting = Statement(session.conn, call), job
        self._settle()

    @rule(which=WHICH)
    def finish(self, which: int) -> None:
        if (job := self._one_that_runs(which)) is None:
            return
        self.keeper.execute("SELECT pg_advisory_unlock(%s)", [job.id])
        wait_until(lambda: self._state(job) == "stopped")
        assert self._has_run(job)
        job.state = "stopped"

    @rule(which=WHICH)
    def cancel_queued(self, which: int) -> None:
        queued = [job for job in self._open(running=False) if job.cookie is not None]
        if queued:
            self._cancel(queued[which % len(queued)])

    @rule(which=WHICH)
    def cancel_running(self, which: int) -> None:
        if (job := self._one_that_runs(which)) is not None:
            self._cancel(job)

    def _cancel(self, job: Job) -> None:
        self._ask(f"SELECT pg_background_cancel(NULL, {job.cookie}, 20000)")
        assert self._state(job) == "canceled"
        job.state = "canceled"

    @rule(which=WHICH)
    def backend_dies(self, which: int) -> None:
        if (job := self._one_that_runs(which)) is None:
            return
        self.keeper.execute("SELECT pg_terminate_backend(%s)", [self._running()[job.id]])
        wait_until(lambda: self._state(job) == "error")
        job.state = "error"

    @rule()
    def cancel_a_wait(self) -> None:
        session = next((session for session in self.sessions if session.waiting), None)
        if session is None or session.waiting is None:
            return
        statement, job = session.waiting
        statement.cancel()
        session.waiting = None
        try:
            job.cookie = statement.value
        except AssertionError:
            assert statement.error.sqlstate == "57014"
            job.state = "never"

    @rule(number=SESSIONS)
    def client_leaves(self, number: int) -> None:
        session = self.sessions[number]
        if session.waiting is not None:
            statement, job = session.waiting
            session.conn.pgconn.finish()
            assert statement.error is not None
            # It may have got its place at that moment.
            wait_until(lambda: job.id in self._running() or not self._is_known(job))
            job.state = "left"
        session.conn.close()
        self.sessions[number] = self._connect()

    def _is_known(self, job: Job) -> bool:
        with self.proxy.connect(dbname=self.database) as conn:
            rows = conn.execute("SELECT * FROM pg_background_list_all()").fetchall()
        return any(f"({job.id})" in str(row) and "running" in row for row in rows)

    @precondition(lambda self: self.workers > 1)
    @rule(number=SESSIONS)
    def process_dies(self, number: int) -> None:
        killed = self.sessions[number].worker
        [process] = [process for process in workers(self.proxy) if process.pid == killed]
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        for job in self.jobs.values():
            if job.session.worker == killed and job.state == "open":
                job.state = "lost"
        # The server notices (client_connection_check_interval) and ends what they ran.
        lost = {job.id for job in self.jobs.values() if job.state == "lost"}
        wait_until(lambda: not lost & set(self._running()))
        wait_until(lambda: len(workers(self.proxy)) == self.workers)
        for place, session in enumerate(self.sessions):
            if session.worker != killed:
                continue
            if session.waiting is not None:
                assert session.waiting[0].error is not None
            session.conn.close()
            self.sessions[place] = self._connect_again()

    def _connect_again(self) -> Session:
        """The new process may not serve yet."""

        def connect() -> Session | None:
            with contextlib.suppress(psycopg.OperationalError):
                return self._connect()
            return None

        found = wait_until(connect)
        assert found is not None
        return found

    # What must be so

    @invariant()
    def no_limit_is_passed(self) -> None:
        runs = self._running()
        assert len(runs) <= MOST
        for session in self.sessions:
            assert sum(job.id in runs for job in session.jobs) <= MOST_OF_SESSION

    @invariant()
    def none_starves(self) -> None:
        """Where there is room for a job, it comes to run."""

        def all_have_what_they_can() -> bool:
            runs = self._running()
            if len(runs) == MOST:
                return True
            return not any(
                job.id not in runs
                and sum(other.id in runs for other in job.session.jobs) < MOST_OF_SESSION
                for job in self.jobs.values()
                if job.state == "open"
            )

        wait_until(all_have_what_they_can)
        self._settle()

    def teardown(self) -> None:
        """All gates open: all that are left run, each once."""
        for id in self.jobs:
            self.keeper.execute("SELECT pg_advisory_unlock(%s)", [id])
        for session in self.sessions:
            if session.waiting is not None:
                statement, job = session.waiting
                job.cookie = statement.value
        for job in self.jobs.values():
            if job.state == "open":
                wait_until(lambda job=job: self._state(job) == "stopped")  # type: ignore[misc]
                job.state = "stopped"
        for session in self.sessions:
            session.conn.close()
        rows = self.keeper.execute("SELECT id, count(*) FROM ran GROUP BY id").fetchall()
        ran = {id for id, count in rows if id in self.jobs}
        assert all(count == 1 for _, count in rows)
        stopped = {job.id for job in self.jobs.values() if job.state == "stopped"}
        left = {job.id for job in self.jobs.values() if job.state == "left"}
        assert ran - left == stopped


# A process that dies again and again is started again later each time.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "examples_made"), [(1, 45), (2, 15)])
def test_jobs_get_their_room_as_in_the_model(
    start_proxy: StartProxy, server: Server, db: str, number: int, examples_made: int
) -> None:
    proxy = start_proxy("--workers", str(number), "--max-jobs", str(MOST))
    with server.connect(dbname=db) as keeper:
        keeper.execute("CREATE TABLE ran (id int)")
        keeper.execute(
            f"ALTER DATABASE {db} SET client_connection_check_interval = '50ms'".encode()
        )

        class Machine(Room):
            def __init__(self) -> None:
                self.proxy, self.keeper, self.database, self.workers = proxy, keeper, db, number
                super().__init__()

        Machine.TestCase.settings = settings(
            max_examples=examples(examples_made),
            stateful_step_count=20,
            deadline=None,
            # Shrinking takes minutes, and hypothesis prints the steps anyway.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        Machine.TestCase().runTest()


def test_backends_that_are_killed(server: Server, start_proxy: StartProxy) -> None:
    """With SIGKILL, at which the server ends all others, and starts anew: what was queued runs once
    or never, and what is said of each job is so."""
    own = Server(server.bin)
    try:
        own.set("synchronous_commit", "on")
        with own.connect() as conn:
            conn.execute("CREATE TABLE ran (id int)")
        proxy = start_proxy(
            *("--max-workers", "3", "--queue", "on", "--max-jobs", "4"), upstream=upstream_of(own)
        )
        cookies: dict[int, int] = {}

        def submit(conn: Connection) -> None:
            id = next(_ids)
            sql = f"INSERT INTO ran VALUES ({id}); SELECT pg_sleep(0.1)"
            cookies[id] = one(conn, "SELECT (pg_background_submit(%s)).cookie", [sql])

        for _ in range(3):
            with contextlib.closing(_connected(proxy)) as conn:
                for _ in range(30):
                    submit(conn)
                wait_until(functools.partial(_has_one_stopped, conn, cookies))
                while not _kill_one(conn):  # where submitting is slow all have ended by now
                    submit(conn)
        with contextlib.closing(_connected(proxy)) as conn:
            _what_is_said_is_so(conn, cookies)
    finally:
        own.close()


def _has_one_stopped(conn: Connection, cookies: dict[int, int]) -> bool:
    return any(_state(conn, cookie) == "stopped" for cookie in cookies.values())


def _state(conn: Connection, cookie: int) -> str:
    state: str = one(conn, f"SELECT (pg_background_outcome(NULL, {cookie})).state")
    return state


def _what_is_said_is_so(conn: Connection, cookies: dict[int, int]) -> None:
    def states_now() -> dict[int, str]:
        return {id: _state(conn, cookie) for id, cookie in cookies.items()}

    wait_until(lambda: set(states_now().values()) <= {"stopped", "error"})
    states = states_now()
    rows = conn.execute("SELECT id, count(*) FROM ran GROUP BY id").fetchall()
    ran: dict[int, int] = dict(rows)
    assert set(ran.values()) <= {1}
    stopped = {id for id in cookies if states[id] == "stopped"}
    assert stopped <= set(ran)
    # Of one whose connection was lost, the server alone knows.
    for id in set(ran) - stopped:
        call = f"SELECT (pg_background_error_info(NULL, {cookies[id]})).sqlstate"
        assert one(conn, call) == "08006"
    assert stopped
    assert "error" in states.values()


def _kill_one(conn: Connection) -> bool:
    """The backend of a job that runs; whether there was one."""
    jobs = "SELECT pid FROM pg_stat_activity WHERE query ~ '^INSERT INTO ran' LIMIT 1"
    for (victim,) in conn.execute(jobs).fetchall():
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            return True
    return False


def _connected(proxy: Proxy) -> Connection:
    """A session, as soon as the server has started anew."""

    def connect() -> Connection | None:
        with contextlib.suppress(psycopg.OperationalError):
            conn = proxy.connect()
            with contextlib.suppress(psycopg.OperationalError):
                conn.execute("SELECT 1")
                return conn
            conn.close()
        return None

    found = wait_until(connect)
    assert found is not None
    return found
