"""Limits of the whole proxy: max_jobs, max_jobs_per_role, max_jobs_per_database, in one process and
in several."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests.conftest import StartProxy
from tests.support.api_clients import Gate
from tests.support.background import failure, launch, message, wait_until, wait_until_ended
from tests.support.executors import executors
from tests.support.in_database import one
from tests.support.servers import Connection, Server
from tests.support.statement import Statement
from tests.test_workers import worker_of, workers

WORKERS: Final = ("1", "3")
TOO_MANY: Final = ("53400", "too many background workers")
LAUNCH: Final = "SELECT pg_background_launch('SELECT 1')"


class Scene:
    """A proxy with limits, and sessions of it."""

    def __init__(self, start_proxy: StartProxy, workers: str, database: str) -> None:
        self._start_proxy = start_proxy
        self._workers = workers
        self._database = database
        self.sessions: list[Connection] = []

    def start(self, *options: str) -> None:
        self.proxy = self._start_proxy("--workers", self._workers, *options)
        for number in range(1, int(self._workers) + 1) if self._workers != "1" else ():
            self.proxy.wait_for_log(rf"worker {number} \(PID \d+\) is ready")

    def connect(self, **params: Any) -> Connection:
        """A session; so many after each other are spread over the workers."""
        conn = self.proxy.connect(dbname=params.pop("dbname", self._database), **params)
        self.sessions.append(conn)
        return conn

    def waiting(self, observer: Connection, job: str = "SELECT 1") -> Statement:
        """A launch that waits, in a session of its own."""
        conn = self.connect()
        conn.execute("SET pg_background.launch_timeout = '1min'")
        statement = Statement(conn, f"SELECT pg_background_launch($job${job}$job$)")
        statement.wait_until_it_waits(observer)
        return statement


@pytest.fixture(params=WORKERS)
def scene(request: pytest.FixtureRequest, start_proxy: StartProxy, scratch: str) -> Iterator[Scene]:
    """A proxy with one process, or with several."""
    scene = Scene(start_proxy, request.param, scratch)
    yield scene
    for session in scene.sessions:
        session.close()


def test_no_more_jobs_run_than_all_may_have(scene: Scene, observer: Connection, gate: Gate) -> None:
    scene.start("--max-jobs", "3")
    pids = [launch(scene.connect(), gate.sql) for _ in range(3)]
    for _ in range(3):
        error = failure(scene.connect(), LAUNCH.encode())
        assert message(error) == TOO_MANY
        assert error.diag.message_detail == "max_jobs allows 3 background workers, and so many run."
    # A session that has detached its job has not ended it.
    one(scene.sessions[0], f"SELECT pg_background_detach({pids[0]})")
    assert failure(scene.connect(), LAUNCH.encode()).sqlstate == "53400"
    one(scene.sessions[1], f"SELECT pg_cancel_backend({pids[1]})")
    wait_until_ended(observer, pids[1])
    launch(scene.connect(), gate.sql)
    assert failure(scene.connect(), LAUNCH.encode()).sqlstate == "53400"
    gate.open()


def test_launches_of_all_sessions_wait_in_the_order_in_which_they_came(
    scene: Scene, observer: Connection, gate: Gate
) -> None:
    scene.start("--max-jobs", "1")
    launch(scene.connect(), gate.sql)
    observer.execute("DROP TABLE IF EXISTS came; CREATE TABLE came (id serial, number int)")
    waiting = [
        scene.waiting(observer, f"INSERT INTO came (number) VALUES ({number})")
        for number in range(9)
    ]
    # Who does not wait does not overtake those who do.
    assert failure(scene.connect(), LAUNCH.encode()).sqlstate == "53400"
    gate.open()
    assert all(statement.value > 0 for statement in waiting)
    query = "SELECT number FROM came ORDER BY id"
    wait_until(lambda: len(observer.execute(query).fetchall()) == 9)
    assert observer.execute(query).fetchall() == [(number,) for number in range(9)]


def test_a_role_at_its_limit_keeps_no_other_waiting(
    scene: Scene, observer: Connection, gate: Gate
) -> None:
    scene.start("--max-jobs", "3", "--max-jobs-per-role", "1")
    launch(scene.connect(), gate.sql)
    error = failure(scene.connect(), LAUNCH.encode())
    assert error.diag.message_detail == (
        'max_jobs_per_role allows 1 background workers of role "postgres", and so many run.'
    )
    waiting = [scene.waiting(observer) for _ in range(4)]
    with executors(observer, "alice"):
        assert launch(scene.connect(user="alice"), "SELECT 1") > 0
    assert not any(statement.is_over for statement in waiting)
    gate.open()
    assert all(statement.value > 0 for statement in waiting)


def test_a_database_at_its_limit_keeps_no_other_waiting(
    scene: Scene, observer: Connection, gate: Gate, db: str
) -> None:
    scene.start("--max-jobs-per-database", "1")
    launch(scene.connect(), gate.sql)
    waiting = scene.waiting(observer)
    assert launch(scene.connect(dbname=db), "SELECT 1") > 0
    assert not waiting.is_over
    gate.open()
    assert waiting.value > 0


def test_a_wait_that_ends_leaves_its_place(scene: Scene, observer: Connection, gate: Gate) -> None:
    scene.start("--max-jobs", "1")
    launch(scene.connect(), gate.sql)
    cancelled, gone, served = (scene.waiting(observer) for _ in range(3))
    scene.sessions[1].cancel_safe(timeout=10)
    assert cancelled.error.sqlstate == "57014"
    scene.sessions[2].pgconn.finish()
    gate.open()
    assert served.value > 0
    assert gone.error is not None
    wait_until(lambda: launch(scene.sessions[3], "SELECT 1") > 0)


def test_a_failed_launch_gives_its_slot_back(
    scene: Scene, server: Server, observer: Connection
) -> None:
    scene.start("--max-jobs", "1", "--spares", "0")
    conn = scene.connect()
    allow = f"ALTER DATABASE {observer.info.dbname} ALLOW_CONNECTIONS"
    with server.connect(dbname="postgres") as admin:
        for _ in range(3):
            admin.execute(f"{allow} false".encode())
            error = failure(conn, LAUNCH.encode())
            admin.execute(f"{allow} true".encode())
            assert message(error) == ("53000", "could not start a background worker")
    assert launch(conn, "SELECT 1") > 0


def test_limits_can_be_changed_while_jobs_run(
    scene: Scene, observer: Connection, gate: Gate, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("")
    scene.start("--config", str(file))
    launch(scene.connect(), gate.sql)
    launch(scene.connect(), gate.sql)

    def reload(text: str) -> None:
        file.write_text(text)
        os.kill(scene.proxy.pid, signal.SIGHUP)

    reload("max_jobs = 2\n")
    wait_until(lambda: _is_refused(scene))
    # Those that ran before count.
    assert failure(scene.connect(), LAUNCH.encode()).sqlstate == "53400"
    waiting = [scene.waiting(observer, gate.sql) for _ in range(2)]
    reload("max_jobs = 3\n")
    assert waiting[0].value > 0
    assert not waiting[1].is_over
    reload("")
    assert waiting[1].value > 0
    assert launch(scene.connect(), "SELECT 1") > 0
    gate.open()


def _is_refused(scene: Scene) -> bool:
    """Whether no worker launches any more."""
    refused = 0
    for _ in range(6):
        conn = scene.connect()
        try:
            pid = launch(conn, "SELECT 1")
        except psycopg.Error:
            refused += 1
        else:
            conn.execute(f"SELECT * FROM pg_background_result({pid}) AS (n int)".encode())
    return refused == 6


def test_a_worker_that_is_killed_gives_its_slots_back(
    start_proxy: StartProxy, scratch: str, observer: Connection, gate: Gate
) -> None:
    scene = Scene(start_proxy, "2", scratch)
    scene.start("--max-jobs", "2")
    first, second = workers(scene.proxy)
    sessions: dict[int, Connection] = {}
    while len(sessions) < 2:
        conn = scene.connect()
        sessions[worker_of(scene.proxy, conn)] = conn
    for _ in range(2):
        launch(sessions[first.pid], gate.sql)
    sessions[second.pid].execute("SET pg_background.launch_timeout = '1min'")
    # It waits in the one that dies, too, in front of the other.
    lost = scene.connect()
    while worker_of(scene.proxy, lost) != first.pid:
        lost = scene.connect()
    lost.execute("SET pg_background.launch_timeout = '1min'")
    dying = Statement(lost, LAUNCH)
    dying.wait_until_it_waits(observer)
    waiting = Statement(sessions[second.pid], LAUNCH)
    waiting.wait_until_it_waits(observer)
    first.kill()
    assert waiting.value > 0
    assert dying.error is not None
    gate.open()
    for session in scene.sessions:
        session.close()


def test_a_worker_that_hangs_keeps_no_other_waiting(
    start_proxy: StartProxy, scratch: str, observer: Connection, gate: Gate
) -> None:
    scene = Scene(start_proxy, "2", scratch)
    scene.start("--max-jobs", "1", "--hung-worker-timeout", "0")
    hung, other = workers(scene.proxy)
    by_worker: dict[int, Connection] = {}
    while len(by_worker) < 2:
        conn = scene.connect()
        by_worker[worker_of(scene.proxy, conn)] = conn
    launch(by_worker[other.pid], gate.sql)
    by_worker[hung.pid].execute("SET pg_background.launch_timeout = '1min'")
    first = Statement(by_worker[hung.pid], LAUNCH)
    first.wait_until_it_waits(observer)
    hung.suspend()
    try:
        scene.proxy.wait_for_log("does not answer")
        gate.open()
        by_worker[other.pid].execute("SET pg_background.launch_timeout = '20s'")
        assert launch(by_worker[other.pid], "SELECT 1") > 0
    finally:
        hung.resume()
    assert first.value > 0
    for session in scene.sessions:
        session.close()
