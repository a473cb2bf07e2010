"""A worker process that hangs is noticed, gets no clients, and is replaced; and callers are told.

Workers are stopped by SIGSTOP, or their event loop is blocked by a signal handler that sleeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import psutil
import psycopg
import pytest
from psycopg import errors

from tests.conftest import StartProxy
from tests.support.background import run, wait_until
from tests.support.in_database import with_extension
from tests.support.servers import Connection, Proxy, Server
from tests.test_workers import SLEEPS, launch, one, sessions, state, worker_of, workers

T = TypeVar("T")

LIST: Final = "SELECT pid FROM pg_background_list_all()"
HANGS: Final = r"WARNING:  worker \d \(PID {pid}\) does not answer; it has 1 sessions"
INCOMPLETE: Final = "the list of background workers is incomplete"
WORKER: Final = "a background worker"
BACK: Final = r"LOG:  worker \d \(PID {pid}\) answers again"

BLOCKED: Final = """\
import signal, sys, time
if "proxy.workers.worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))
"""


@contextlib.contextmanager
def stopped(proxy: Proxy, conn: Connection) -> Iterator[psutil.Process]:
    """The worker of a session hangs, and the supervisor has noticed."""
    worker = psutil.Process(worker_of(proxy, conn))
    worker.suspend()
    try:
        proxy.wait_for_log(HANGS.format(pid=worker.pid))
        yield worker
    finally:
        worker.resume()


def warnings(conn: Connection) -> list[tuple[str | None, ...]]:
    """Severity, SQLSTATE, message, detail and hint of those that come from now on."""
    found: list[tuple[str | None, ...]] = []

    def note(said: errors.Diagnostic) -> None:
        texts = (said.message_primary, said.message_detail, said.message_hint)
        found.append((said.severity, said.sqlstate, *texts))

    conn.add_notice_handler(note)
    return found


def quickly(call: Callable[[], T]) -> T:
    """It does not wait for the five seconds that a process has to answer."""
    began = time.monotonic()
    found = call()
    assert time.monotonic() - began < 4
    return found


def test_it_gets_no_clients_until_it_answers_again(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "0")
    with sessions(proxy) as (hung, kept), contextlib.ExitStack() as stack:
        with stopped(proxy, hung) as worker:
            others = worker_of(proxy, kept)
            for _ in range(6):
                assert worker_of(proxy, stack.enter_context(proxy.connect())) == others
        proxy.wait_for_log(BACK.format(pid=worker.pid))
        assert one(hung, "SELECT 1") == 1
        for _ in range(6):
            assert worker_of(proxy, stack.enter_context(proxy.connect())) == worker.pid
        assert "ERROR" not in proxy.log


def test_clients_that_it_has_not_taken_go_to_the_others(
    server: Server, start_proxy: StartProxy
) -> None:
    """Before it was found to hang, it got half of them; it does not get them when it goes on."""
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "0")
    with sessions(proxy) as (hung, kept), contextlib.ExitStack() as stack:
        others = worker_of(proxy, kept)
        worker = psutil.Process(worker_of(proxy, hung))
        threads = stack.enter_context(ThreadPoolExecutor(8))
        worker.suspend()
        try:
            connecting = [threads.submit(proxy.connect) for _ in range(8)]
            conns = [stack.enter_context(conn.result(20)) for conn in connecting]
            assert {worker_of(proxy, conn) for conn in conns} == {others}
        finally:
            worker.resume()
        proxy.wait_for_log(BACK.format(pid=worker.pid))
        # It has one session, and the other one nine or more.
        for _ in range(8):
            assert worker_of(proxy, stack.enter_context(proxy.connect())) == worker.pid
        assert all(one(conn, "SELECT 1") == 1 for conn in (hung, kept, *conns))


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGUSR1])
def test_it_is_killed_and_replaced(
    server: Server, start_proxy: StartProxy, tmp_path: Path, how: signal.Signals
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "5s", env={"PYTHONPATH": path})
    with sessions(proxy) as (hung, kept):
        kept.execute("CREATE TEMP TABLE mine AS SELECT 1")
        worker = worker_of(proxy, hung)
        launch(hung, "SELECT pg_sleep(3)")
        os.kill(worker, how)
        proxy.wait_for_log(HANGS.format(pid=worker))
        proxy.wait_for_log(
            rf"ERROR:  worker \d \(PID {worker}\) has not answered for 5 seconds and is killed:"
            " its 1 sessions and their jobs are lost"
        )
        proxy.wait_for_log(rf"\(PID {worker}\) was terminated by signal 9: Killed; it is started")
        with pytest.raises(psycopg.OperationalError):
            hung.execute("SELECT 1")
        wait_until(lambda: proxy.log.count("is ready") == 3)
        assert worker not in {found.pid for found in workers(proxy)}
        assert one(kept, "SELECT count(*) FROM mine") == 1
        with sessions(proxy) as both:
            for conn in both:
                assert run(conn, "SELECT 7") == [(7,)]
    server.wait_for_no_clients()
    assert proxy.stop() == 0


def test_one_that_is_alone_is_replaced_too(server: Server, start_proxy: StartProxy) -> None:
    """Both hang, and who connects meanwhile waits for a new one."""
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "5s")
    for number in (1, 2):
        proxy.wait_for_log(rf"worker {number} .* is ready")
    for worker in workers(proxy):
        worker.suspend()
    proxy.wait_for_log("and new clients wait for it")
    with proxy.connect() as conn:
        assert one(conn, "SELECT 1") == 1
    assert proxy.stop() == 0


def test_one_that_is_only_busy_is_left_alone(server: Server, start_proxy: StartProxy) -> None:
    """For more seconds in all than it may hang."""
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "5s")
    with sessions(proxy) as (busy, _):
        worker = psutil.Process(worker_of(proxy, busy))
        for _ in range(4):
            worker.suspend()
            time.sleep(2)
            worker.resume()
            assert one(busy, "SELECT 1") == 1
        assert "does not answer" not in proxy.log
        assert "ERROR" not in proxy.log


def test_a_supervisor_that_was_stopped_itself_blames_nobody(
    server: Server, start_proxy: StartProxy
) -> None:
    """As on a machine that was suspended."""
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "4s")
    with sessions(proxy) as both:
        supervisor = psutil.Process(proxy.pid)
        stopped_too = [supervisor, *workers(proxy)]
        for processes in ([supervisor], stopped_too):
            for process in processes:
                process.suspend()
            time.sleep(7)
            for process in processes:
                process.resume()
            time.sleep(2.5)
            assert all(one(conn, "SELECT 1") == 1 for conn in both)
    assert "does not answer" not in proxy.log
    assert proxy.stop() == 0


def test_who_asks_is_told_that_not_all_have_answered(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "0", "--spares", "0")
    with sessions(proxy, dbname=db) as (hung, asking):
        theirs, ours = launch(hung, SLEEPS), launch(asking, SLEEPS)
        pids = {(theirs[0],), (ours[0],)}
        told = warnings(asking)
        assert set(asking.execute(LIST).fetchall()) == pids
        assert not told
        with stopped(proxy, hung):
            assert quickly(lambda: asking.execute(LIST).fetchall()) == [(ours[0],)]
            assert quickly(lambda: state(asking, theirs)) is None
            assert told == [
                (
                    *("WARNING", "01000", message),
                    "1 of the proxy's processes did not answer in time.",
                    "Call the function again later; a process that hangs is replaced.",
                )
                for message in (INCOMPLETE, f"cannot tell whether PID {theirs[0]} is {WORKER}")
            ]
            told.clear()
            with pytest.raises(errors.UndefinedObject):
                asking.execute("SELECT pg_background_wait_v2(%s, %s)", theirs)
            assert len(told) == 1
            # What is known here needs nobody else.
            told.clear()
            assert state(asking, ours) == "running"
            assert not told
        proxy.wait_for_log("answers again")
        assert set(asking.execute(LIST).fetchall()) == pids
        assert not told
        for conn, handle in ((hung, theirs), (asking, ours)):
            conn.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)


def test_code_in_the_database_is_told_too(server: Server, start_proxy: StartProxy, db: str) -> None:
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "0", "--spares", "0")
    with (
        contextlib.contextmanager(with_extension)(server, proxy, db),
        sessions(proxy, dbname=db) as (hung, asking),
        stopped(proxy, hung),
    ):
        told = warnings(asking)
        asking.execute("DO $$ BEGIN PERFORM pg_background_outcome(7, 8); END $$")
        assert [message for _, _, message, *_ in told] == [f"cannot tell whether PID 7 is {WORKER}"]


def test_who_wants_to_cancel_its_job_is_told(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "0", "--spares", "0")
    with sessions(proxy, dbname=db) as (hung, asking):
        handle = launch(hung, SLEEPS)
        told = warnings(asking)
        cancel = "SELECT pg_background_cancel_v2(%s, %s, 30000)"
        with stopped(proxy, hung), pytest.raises(errors.UndefinedObject):
            asking.execute(cancel, handle)
        assert len(told) == 1
        proxy.wait_for_log("answers again")
        asking.execute(cancel, handle)
        assert state(asking, handle) == "canceled"


def test_one_that_goes_on_is_known_to_those_that_came_meanwhile(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy("--workers", "2", "--hung-worker-timeout", "0", "--spares", "0")
    with sessions(proxy, dbname=db) as (hung, lost):
        theirs = launch(hung, SLEEPS)
        with stopped(proxy, hung) as worker:
            os.kill(worker_of(proxy, lost), signal.SIGKILL)
            wait_until(lambda: proxy.log.count("is ready") == 3)
            new = proxy.connect(dbname=db)
        with new:
            assert worker_of(proxy, new) != worker.pid
            proxy.wait_for_log("answers again")
            wait_until(lambda: new.execute(LIST).fetchall() == [(theirs[0],)])
        hung.execute("SELECT pg_background_cancel_v2(%s, %s)", theirs)
