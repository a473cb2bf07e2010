"""Jobs against a model: launch, wait, cancel, fetch, detach, look, come and go, in any order.

The model is a few dictionaries. Jobs either end by themselves, or wait at a gate that never opens,
so nothing depends on time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.conftest import StartProxy
from tests.support.api_clients import Gate, Handle
from tests.support.background import wait_until
from tests.support.examples import examples
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Footprint

SESSIONS = st.integers(0, 1)
LABELS = st.sampled_from([None, "a", "b"])
WHICH = st.integers(0, 50)

# What jobs do, and how that ends.
KINDS = {
    "SELECT generate_series(1, 3)": "stopped",
    "CREATE TEMP TABLE t (n int)": "stopped",
    "SELECT 1/0": "error",
    "SELECT repeat('x', 1000) FROM generate_series(1, 40)": "stopped",
    "gate": "running",
}


@dataclass
class Expected:
    """What the model knows of a job."""

    handle: Handle
    sql: str
    state: str
    label: str | None
    keeps_rows: bool
    session: int | None
    """Where it is attached."""


class Jobs(RuleBasedStateMachine):
    proxy: Proxy
    database: str
    gate_sql: str

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Expected] = []
        self.sessions: list[Connection] = [self._connect(), self._connect()]
        # What earlier examples have left to be known for a while.
        self.history = set(self._known(0))

    def _connect(self) -> Connection:
        return self.proxy.connect(dbname=self.database)

    def _known(self, session: int) -> dict[int, str]:
        """Cookies and states of all jobs that are known."""
        sql = "SELECT cookie, state FROM pg_background_list_all()"
        return dict(self.sessions[session].execute(sql).fetchall())

    def _ask(self, session: int, sql: str, *parameters: Any) -> Any:
        row = self.sessions[session].execute(sql, parameters or None).fetchone()
        assert row is not None
        return row[0] if len(row) == 1 else row

    def _sqlstate(self, session: int, sql: str) -> str | None:
        try:
            self.sessions[session].execute(sql)
        except psycopg.Error as error:
            return error.sqlstate
        return None

    def _job(self, which: int) -> Expected:
        return self.jobs[which % len(self.jobs)]

    def _latest(self, session: int, job: Expected) -> Expected | None:
        """The session's latest job with the same pid: a backend may run several."""
        same = [other for other in self.jobs if other.handle.pid == job.handle.pid]
        return next((other for other in same[::-1] if other.session == session), None)

    # Starting

    @rule(
        session=SESSIONS,
        kind=st.sampled_from(sorted(KINDS)),
        label=LABELS,
        name=st.sampled_from(["launch_v2", "submit"]),
    )
    def launch(self, session: int, kind: str, label: str | None, name: str) -> None:
        sql = self.gate_sql if kind == "gate" else kind
        call = f"SELECT (pg_background_{name}(%s, NULL, %s)).*"
        running = sum(job.session == session and job.state == "running" for job in self.jobs)
        if running >= 14:
            return
        handle = Handle(*self._ask(session, call, sql, label))
        job = Expected(handle, sql, KINDS[kind], label, name == "launch_v2", session)
        self.jobs.append(job)
        if job.state != "running":
            # The queue holds all that these jobs say, so they end without a reader.
            assert self._ask(session, f"SELECT pg_background_wait({handle.sql}, 20000)") is True

    # Waiting, stopping

    @precondition(lambda self: self.jobs)
    @rule(session=SESSIONS, which=WHICH)
    def wait(self, session: int, which: int) -> None:
        job = self._job(which)
        done = self._ask(session, f"SELECT pg_background_wait_v2_timeout({job.handle.sql}, 1)")
        assert done is (job.state != "running")

    @precondition(lambda self: self.jobs)
    @rule(session=SESSIONS, which=WHICH)
    def cancel(self, session: int, which: int) -> None:
        job = self._job(which)
        self._ask(session, f"SELECT pg_background_cancel({job.handle.sql}, 20000)")
        if job.state == "running":
            job.state = "canceled"

    @rule(session=SESSIONS, label=st.sampled_from(["a", "b", "%", "_", "x"]))
    def cancel_by_label(self, session: int, label: str) -> None:
        hit = [
            job
            for job in self.jobs
            if job.session == session
            and job.state == "running"
            and job.label is not None
            and label in (job.label, "%", "_")
        ]
        call = "SELECT pg_background_cancel_by_label(%s, 20000)"
        assert self._ask(session, call, label) == len(hit)
        for job in hit:
            job.state = "canceled"

    @precondition(lambda self: self.jobs)
    @rule(session=SESSIONS, which=WHICH)
    def detach(self, session: int, which: int) -> None:
        job = self._job(which)
        sqlstate = self._sqlstate(session, f"SELECT pg_background_detach({job.handle.sql})")
        if job.session == session:
            assert sqlstate is None
            job.session = None
        else:
            assert sqlstate == ("55000" if self._latest(session, job) else "42704")

    @rule(session=SESSIONS, name=st.sampled_from(["purge", "detach_all"]))
    def detach_many(self, session: int, name: str) -> None:
        gone = [
            job
            for job in self.jobs
            if job.session == session and (name == "detach_all" or job.state != "running")
        ]
        assert self._ask(session, f"SELECT pg_background_{name}()") == len(gone)
        for job in gone:
            job.session = None

    @rule(session=SESSIONS, picks=st.lists(WHICH, max_size=3, unique=True))
    def drain(self, session: int, picks: list[int]) -> None:
        jobs = (
            list({job.handle: job for job in map(self._job, picks)}.values()) if self.jobs else []
        )
        rows = ", ".join(f"ROW({job.handle.sql})" for job in jobs)
        sql = (
            f"SELECT pid, state FROM pg_background_drain(ARRAY[{rows}]::pg_background_handle[], 1)"
        )
        found = self.sessions[session].execute(sql).fetchall()
        assert found == [(job.handle.pid, job.state) for job in jobs]
        for job in jobs:
            if job.session == session:
                job.session = None

    # Results

    @precondition(lambda self: self.jobs)
    @rule(session=SESSIONS, which=WHICH, cookie=st.booleans())
    def fetch(self, session: int, which: int, *, cookie: bool) -> None:
        job = self._job(which)
        if not cookie:
            job = self._latest(session, job) or job
        if job.state == "running" and job.session == session and job.keeps_rows:
            return
        call = f"pg_background_result({job.handle.sql if cookie else job.handle.pid})"
        if job.session != session:
            assert self._sqlstate(session, f"SELECT * FROM {call}") == "42704"
        elif not job.keeps_rows:
            assert self._sqlstate(session, f"SELECT * FROM {call}") == "0A000"
        elif job.state in ("error", "canceled"):
            expected = "22012" if job.state == "error" else "57014"
            assert self._sqlstate(session, f"SELECT * FROM {call}") == expected
            job.session = None
        else:
            rows = self.sessions[session].execute(f"SELECT * FROM {call}").fetchall()
            assert rows == {
                "SELECT generate_series(1, 3)": [(1,), (2,), (3,)],
                "CREATE TEMP TABLE t (n int)": [("CREATE TABLE",)],
            }.get(job.sql, [("x" * 1000,)] * 40)
            job.session = None

    # Sessions

    @rule(session=SESSIONS, politely=st.booleans())
    def reconnect(self, session: int, *, politely: bool) -> None:
        if not politely:
            with contextlib.suppress(psycopg.Error):
                self.sessions[session].execute("SELECT pg_terminate_backend(pg_backend_pid())")
        self.sessions[session].close()
        self.sessions[session] = self._connect()
        for job in self.jobs:
            if job.session == session:
                job.session = None

    # Looking

    @invariant()
    def what_sessions_see_is_what_is_expected(self) -> None:
        for number, session in enumerate(self.sessions):
            listed = session.execute(
                "SELECT pid, cookie, state, label FROM pg_background_list"
            ).fetchall()
            assert sorted(listed, key=str) == sorted(
                ((*job.handle, job.state, job.label) for job in self.jobs if job.session == number),
                key=str,
            )
            known = self._known(number)
            assert {cookie: known[cookie] for cookie in known.keys() - self.history} == {
                job.handle.cookie: job.state for job in self.jobs
            }

    @precondition(lambda self: self.jobs)
    @rule(session=SESSIONS, which=WHICH)
    def outcome(self, session: int, which: int) -> None:
        job = self._job(which)
        columns = "state, label, completed, has_error"
        call = f"SELECT {columns} FROM pg_background_outcome({job.handle.sql})"
        assert self._ask(session, call) == (
            *(job.state, job.label, job.state != "running"),
            job.state in ("error", "canceled"),
        )

    def teardown(self) -> None:
        for job in self.jobs:
            if job.state == "running":
                self._ask(0, f"SELECT pg_background_cancel({job.handle.sql}, 20000)")
        for session in self.sessions:
            session.close()


def test_jobs_are_as_in_the_model(start_proxy: StartProxy, server: Server, db: str) -> None:
    proxy = start_proxy()
    with server.connect(dbname="postgres") as observer, server.connect(dbname=db) as keeper:
        gate = Gate(keeper)
        footprint = Footprint(proxy)
        before = footprint.fds

        class Machine(Jobs):
            def __init__(self) -> None:
                self.proxy, self.database, self.gate_sql = proxy, db, gate.sql
                super().__init__()

            def teardown(self) -> None:
                super().teardown()
                backends = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> %s"
                left = [db, keeper.info.backend_pid]
                wait_until(lambda: not observer.execute(backends, left).fetchall())
                wait_until(lambda: footprint.fds <= before)

        Machine.TestCase.settings = settings(
            max_examples=examples(25),
            stateful_step_count=25,
            deadline=None,
            # Shrinking takes minutes, and hypothesis prints the steps anyway.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        Machine.TestCase().runTest()
        gate.open()
