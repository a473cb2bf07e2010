"""Several processes on one port: ``serve --workers``.

What one of them knows, all know: whatever test of the functions passes with one process passes with
several (``pytest --workers 2`` runs them so). Here is what concerns the processes themselves, and
calls from a session of one about the jobs of another.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

import psutil
import psycopg
import pytest
from psycopg import errors

from tests.conftest import StartProxy, shared_proxy, upstream_of
from tests.support.api_clients import Gate
from tests.support.background import failure, run, spares_of, wait_until, wait_until_ended
from tests.support.certificates import Certificates
from tests.support.servers import (
    REPOSITORY,
    Connection,
    Proxy,
    Server,
    psql,
    start_psql,
)

Handle: TypeAlias = tuple[int, int]

SLEEPS: Final = "SELECT pg_sleep(60)"


@pytest.fixture(scope="module")
def pair(server: Server) -> Iterator[Proxy]:
    """A proxy with two workers."""
    with shared_proxy(upstream_of(server), "--workers", "2", "--log-level", "debug") as proxy:
        yield proxy


@pytest.fixture
def both(pair: Proxy, scratch: str) -> Iterator[tuple[Connection, Connection]]:
    """A session in each of the two workers."""
    with sessions(pair, dbname=scratch) as found:
        yield found


@contextlib.contextmanager
def sessions(proxy: Proxy, **params: Any) -> Iterator[tuple[Connection, Connection]]:
    """A session in each of two workers."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(proxy.connect(**params))]

        def has_both() -> bool:
            # Who had a session that has just ended may be preferred.
            found.append(stack.enter_context(proxy.connect(**params)))
            return worker_of(proxy, found[-1]) != worker_of(proxy, found[0])

        wait_until(has_both)
        yield found[0], found[-1]


def workers(proxy: Proxy) -> list[psutil.Process]:
    """Its processes, less the supervisor."""
    found: list[psutil.Process] = psutil.Process(proxy.pid).children()
    return found


def worker_of(proxy: Proxy, conn: Connection) -> int:
    """The pid of the worker that has a session."""
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        ours = sock.getsockname()[:2]
    for worker in workers(proxy):
        if any(found.raddr == ours for found in worker.net_connections()):
            return int(worker.pid)
    raise AssertionError("no worker has it")


def launch(conn: Connection, sql: str, label: str = "x") -> Handle:
    row = conn.execute(
        "SELECT (pg_background_launch_v2(%s, 0, %s)).*", [sql, label], binary=True
    ).fetchone()
    assert row is not None
    return (row[0], row[1])


def one(conn: Connection, query: str, args: Any = ()) -> Any:
    """The one value of a row."""
    row = conn.execute(query, args).fetchone()
    assert row is not None
    return row[0]


def state(conn: Connection, handle: Handle) -> str | None:
    found: str | None = one(
        conn, "SELECT state FROM pg_background_outcome(%s::int4, %s::int8)", handle
    )
    return found


# Who gets the clients


def test_one_process_unless_told(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "1")
    assert not workers(proxy)
    assert "worker" not in proxy.log
    assert proxy.stop() == 0


def test_a_worker_for_each_core(server: Server, start_proxy: StartProxy) -> None:
    cores = len(os.sched_getaffinity(0))
    proxy = start_proxy("--workers", "auto")
    if cores > 1:
        proxy.wait_for_log(rf"worker {cores} \(PID \d+\) is ready")
        assert len(workers(proxy)) == cores
    assert proxy.stop() == 0


def test_each_has_as_many_clients(server: Server, pair: Proxy) -> None:
    for count in (2, 8, 20):
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as threads:
            connecting = [threads.submit(pair.connect) for _ in range(count)]
            conns = [stack.enter_context(conn.result()) for conn in connecting]
            shares = Counter(worker_of(pair, conn) for conn in conns)
            assert sorted(shares.values()) == [count // 2, count // 2]
            assert all(one(conn, "SELECT 1") == 1 for conn in conns)
        assert server.wait_for_no_clients() == []


def test_the_worker_with_the_fewest_clients_gets_the_next(server: Server, pair: Proxy) -> None:
    with contextlib.ExitStack() as stack:
        conns = [stack.enter_context(pair.connect()) for _ in range(8)]
        emptied = worker_of(pair, conns[0])
        leaving = [conn for conn in conns if worker_of(pair, conn) == emptied]
        for conn in leaving:
            conn.close()
        wait_until(lambda: len(server.clients()) == 8 - len(leaving))
        time.sleep(0.1)  # the supervisor is told a moment later
        for _ in range(len(leaving)):
            assert worker_of(pair, stack.enter_context(pair.connect())) == emptied


def test_many_clients_at_once(server: Server, pair: Proxy) -> None:
    """More than a socket between two processes holds: they wait in the backlog."""
    count = 1000
    wait_until(lambda: len(workers(pair)) == 2)
    pids = {worker.pid for worker in workers(pair)}
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection((pair.host, pair.port), timeout=20))
            for _ in range(count)
        ]
        for sock in sockets:
            sock.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # SSLRequest
        assert all(sock.recv(1) == b"N" for sock in sockets)
        shares = [len(worker.net_connections()) for worker in workers(pair)]
        assert min(shares) >= count // 2
    assert {worker.pid for worker in workers(pair)} == pids


def test_a_unix_socket(server: Server, start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy("--workers", "2", "--listen", f"{tmp_path}:6543")
    proxy.wait_for_log("listening on Unix socket")
    with (
        psycopg.connect(f"host={tmp_path} port=6543 user=postgres", autocommit=True) as conn,
        psycopg.connect(f"host={tmp_path} port=6543 user=postgres", autocommit=True) as other,
    ):
        assert run(conn, "SELECT 3") == [(3,)]
        assert run(other, "SELECT 4") == [(4,)]
        shares = [len(worker.net_connections("unix")) for worker in workers(proxy)]
        assert shares[0] == shares[1]
    assert proxy.stop() == 0
    assert not list(tmp_path.iterdir())


def test_tls_in_all_workers(
    server: Server, start_proxy: StartProxy, certificates: Certificates
) -> None:
    proxy = start_proxy("--workers", "2", *tls_options(certificates))
    with sessions(proxy, sslmode="verify-full", sslrootcert=certificates.ca) as both:
        for conn in both:
            assert conn.pgconn.ssl_in_use
            assert run(conn, "SELECT 3") == [(3,)]
    if psycopg.pq.version() >= 170000:
        with proxy.connect(sslmode="require", sslnegotiation="direct") as conn:
            assert one(conn, "SELECT 1") == 1


def tls_options(certificates: Certificates) -> list[str]:
    return [
        *("--client-tls-sslmode", "prefer"),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
    ]


# A worker dies


def test_a_killed_worker_is_replaced_and_the_others_do_not_notice(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy("--workers", "2", "--spares", "0")
    with sessions(proxy, dbname=db) as (lost, kept), server.connect(dbname=db) as observer:
        gate = Gate(observer)
        ours = launch(kept, f"{gate.sql}; SELECT 5")
        theirs = launch(lost, f"{gate.sql}; SELECT 6")
        kept.execute("CREATE TEMP TABLE mine AS SELECT 1")
        kept.execute("BEGIN")
        killed = worker_of(proxy, lost)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            lost.execute("SELECT 1")
        proxy.wait_for_log(r"ERROR:  worker \d \(PID \d+\) was terminated by signal 9: Killed")
        wait_until(lambda: len(workers(proxy)) == 2)
        assert killed not in {worker.pid for worker in workers(proxy)}
        assert kept.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        assert one(kept, "SELECT count(*) FROM mine") == 1
        kept.execute("COMMIT")
        # What the dead one knew is gone with it.
        assert state(kept, theirs) is None
        # The new one serves.
        with sessions(proxy, dbname=db) as both:
            for conn in both:
                assert run(conn, "SELECT 7") == [(7,)]
                assert state(conn, ours) == "running"
        gate.open()
        query = "SELECT n FROM pg_background_result(%s::int4, %s::int8) AS (n int)"
        assert one(kept, query, ours) == 5
    assert server.wait_for_no_clients() == []
    assert proxy.stop() == 0


def test_one_that_dies_again_and_again(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2")
    for turn in range(3):
        wait_until(lambda turn=turn: proxy.log.count("is ready") == 2 + turn)  # type: ignore[misc]
        os.kill(workers(proxy)[0].pid, signal.SIGKILL)
        with proxy.connect() as conn:  # any worker
            assert one(conn, "SELECT 1") == 1
    assert proxy.stop() == 0


def test_clients_wait_while_there_is_no_worker(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2")
    proxy.wait_for_log("worker 1 .* is ready")
    proxy.wait_for_log("worker 2 .* is ready")
    for worker in workers(proxy):
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.05)
    with proxy.connect() as conn:
        assert one(conn, "SELECT 1") == 1


def test_clients_that_a_worker_has_not_taken_go_to_others_when_it_dies(
    server: Server, start_proxy: StartProxy
) -> None:
    proxy = start_proxy("--workers", "2")
    with sessions(proxy) as (stopped, _), ThreadPoolExecutor(6) as threads:
        victim = psutil.Process(worker_of(proxy, stopped))
        victim.suspend()
        connecting = [threads.submit(proxy.connect) for _ in range(6)]
        time.sleep(0.5)
        assert not all(conn.done() for conn in connecting)
        victim.kill()
        for conn in connecting:
            with conn.result(20) as served:
                assert one(served, "SELECT 1") == 1


def test_who_waits_for_a_job_of_a_worker_that_dies_is_told(
    server: Server,
    start_proxy: StartProxy,
    db: str,
    background: Callable[..., Future[Any]],
) -> None:
    proxy = start_proxy("--workers", "2", "--spares", "0")
    with sessions(proxy, dbname=db) as (owner, other), server.connect() as observer:
        handle = launch(owner, "SELECT pg_sleep(3)")
        waiting = background(one, other, "SELECT pg_background_wait(%s::int4, %s::int8)", handle)
        query = (
            "SELECT state, error_message FROM pg_background_drain("
            "ARRAY[ROW(%s, %s)::pg_background_handle])"
        )
        with proxy.connect(dbname=db) as third:
            if worker_of(proxy, third) == worker_of(proxy, other):
                draining = background(lambda: third.execute(query % handle).fetchall())
            else:
                draining = None
            time.sleep(0.3)
            assert not waiting.done()
            os.kill(worker_of(proxy, owner), signal.SIGKILL)
            assert waiting.result(10) is True
            if draining is not None:
                lost = f"lost connection to worker process with PID {handle[0]}"
                assert draining.result(10) == [("error", lost)]
        wait_until_ended(observer, handle[0])


def test_a_question_to_a_worker_that_dies_is_answered_by_the_others(
    server: Server, start_proxy: StartProxy, db: str, background: Callable[..., Future[Any]]
) -> None:
    proxy = start_proxy("--workers", "2")
    with sessions(proxy, dbname=db) as (stopped, asking):
        assert not asking.execute("SELECT * FROM pg_background_list_all()").fetchall()
        victim = psutil.Process(worker_of(proxy, stopped))
        victim.suspend()
        asked = background(state, asking, (1, 2))
        time.sleep(0.3)
        assert not asked.done()
        victim.kill()
        began = time.monotonic()
        assert asked.result(10) is None
        assert time.monotonic() - began < 4  # five seconds after the question it would give up


def test_a_worker_that_hangs_is_not_waited_for_for_ever(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy("--workers", "2")
    with sessions(proxy, dbname=db) as (stopped, asking):
        assert run(asking, "SELECT 1") == [(1,)]
        victim = psutil.Process(worker_of(proxy, stopped))
        victim.suspend()
        try:
            # What does not concern it does not wait for it.
            assert run(asking, "SELECT 2") == [(2,)]
            assert state(asking, launch(asking, "SELECT 3")) is not None
            # What may, does for a while.
            assert state(asking, (1, 2)) is None
            proxy.wait_for_log("a worker does not answer")
        finally:
            victim.resume()
        assert one(stopped, "SELECT 1") == 1


# A worker that cannot start

BROKEN: Final = """\
import os, sys
if "proxy.workers.worker" in sys.orig_argv and os.path.exists(os.environ["BROKEN"]):
    os._exit(7)
"""


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file; as long as it exists, workers end as soon as they begin. And the environment."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    file = tmp_path / "broken"
    return file, {"PYTHONPATH": path, "BROKEN": str(file)}


def test_a_worker_that_cannot_start_ends_all(
    server: Server, start_proxy: StartProxy, broken: tuple[Path, dict[str, str]]
) -> None:
    file, env = broken
    file.touch()
    with contextlib.suppress(TimeoutError):  # whichever comes first
        proxy = start_proxy("--workers", "2", env=env)
        assert proxy.wait() == 1
        assert re.search(r"error: worker \d could not be started: it exited with .* 7", proxy.log)


def test_a_worker_that_cannot_start_again_is_tried_while_others_serve(
    server: Server, start_proxy: StartProxy, broken: tuple[Path, dict[str, str]], db: str
) -> None:
    file, env = broken
    proxy = start_proxy("--workers", "2", env=env)
    with sessions(proxy, dbname=db) as (lost, kept):
        file.touch()
        os.kill(worker_of(proxy, lost), signal.SIGKILL)
        proxy.wait_for_log("could not be started: it exited with exit code 7; it is tried again")
        with proxy.connect() as conn:
            assert one(conn, "SELECT 1") == 1
        file.unlink()
        wait_until(lambda: proxy.log.count("is ready") == 3)
        assert one(kept, "SELECT 1") == 1
        # No worker is left, and none can start.
        file.touch()
        for worker in workers(proxy):
            worker.kill()
        assert proxy.wait() == 1
        assert proxy.log.splitlines()[-1].endswith("it exited with exit code 7")


# Cancel requests


def test_a_cancel_request_reaches_the_session_whichever_worker_gets_it(
    server: Server,
    pair: Proxy,
    both: tuple[Connection, Connection],
    background: Callable[..., Future[Any]],
) -> None:
    crossed = "a cancel request was for a session of another worker"
    before = pair.log.count(crossed)
    handle = launch(both[0], SLEEPS)
    waits = "SELECT pg_background_wait(%s::int4, %s::int8)"
    for turn in range(30):
        # Connections go to both in turns: to the session's own worker, and to the other.
        conn = both[turn // 2 % 2]
        # In the server; in the proxy, for a job of its own and for one of the other worker.
        query, args = ((SLEEPS, ()), (waits, handle))[turn // 4 % 2]
        waiting = background(conn.execute, query, args)
        time.sleep(0.05)
        while not waiting.done():
            conn.cancel_safe(timeout=10)
            time.sleep(0.01)
        with pytest.raises(errors.QueryCanceled, match="due to user request"):
            waiting.result()
        assert one(conn, "SELECT 1") == 1
    assert state(both[1], handle) == "running"
    both[1].execute("SELECT pg_background_cancel(%s::int4, %s::int8, 5000)", handle)
    # Of 30 and more, nearly half.
    assert pair.log.count(crossed) - before > 5


def test_psql_is_interrupted(server: Server, pair: Proxy, db: str) -> None:
    """Ctrl-C in psql, which opens a connection of its own for the cancel request."""
    count = "SELECT count(*) FROM pg_stat_activity WHERE query = %s AND state = 'active'"
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query = %s"
    waits = f"SELECT pg_background_result(pg_background_launch('{SLEEPS}'))"
    with server.connect() as observer:
        for _ in range(4):
            client = start_psql(pair, "-c", waits, dbname=db)
            wait_until(lambda: one(observer, count, [SLEEPS]))
            time.sleep(0.1)
            client.send_signal(signal.SIGINT)
            said, _ = client.communicate(timeout=20)
            assert "canceling statement due to user request" in said
            observer.execute(cancel, [SLEEPS])
            wait_until(lambda: not one(observer, count, [SLEEPS]))


# Jobs of another worker's sessions: see `test_jobs_elsewhere` too


def test_who_may_touch_a_job_is_the_same_in_all_workers(
    server: Server, both: tuple[Connection, Connection], pair: Proxy, scratch: str
) -> None:
    """Also in the moment after the first launch of a role."""
    roles = [f"launcher_{number}" for number in range(8)]
    with server.connect() as admin:
        for role in roles:
            admin.execute(f"CREATE ROLE {role} LOGIN")
        admin.execute("CREATE ROLE reader")
        both[0].execute("SELECT grant_pg_background_privileges('reader')")
        for role in roles:
            both[0].execute(f"SELECT grant_pg_background_privileges('{role}')")
    try:
        for role in roles:
            with sessions(pair, dbname=scratch, user=role) as (here, there):
                handle = launch(here, SLEEPS)
                for conn in both:  # superusers
                    assert state(conn, handle) == "running"
                assert state(there, handle) == "running"
                both[0].execute("SET ROLE reader")
                both[1].execute("SET ROLE reader")
                cancel = "SELECT pg_background_cancel(%s::int4, %s::int8)"
                for conn in both:
                    assert state(conn, handle) is None
                    assert failure(conn, cancel, handle).sqlstate == "42501"
                    conn.execute("RESET ROLE")
                there.execute("SELECT pg_background_cancel(%s::int4, %s::int8, 5000)", handle)
                rows = there.execute("SELECT pid, state FROM pg_background_list_all()").fetchall()
                assert rows == [(handle[0], "canceled")]
    finally:
        wait_until(lambda: not [c for c in server.clients() if c[3] == SLEEPS])
        time.sleep(1.2)  # their spares
        with server.connect() as admin:
            for role in (*roles, "reader"):
                admin.execute(f"REVOKE pgbackground_role FROM {role}")
                admin.execute(f"DROP ROLE {role}")


def test_spares_of_all_workers_give_way(server: Server, start_proxy: StartProxy, db: str) -> None:
    proxy = start_proxy("--workers", "2", "--spare-lifetime", "60s", "--spares", "2")
    others: list[Connection] = []
    with sessions(proxy, dbname=db) as (here, there), server.connect() as observer:
        run(there, "SELECT 1")
        wait_until(lambda: len(spares_of(observer, there)) >= 2)
        try:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    others.append(server.connect())
            # It has none of its own that could.
            assert run(here, "SELECT 1") == [(1,)]
        finally:
            for other in others:
                other.close()


# The end


@pytest.fixture
def drained(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> Iterator[tuple[Proxy, list[int], Path]]:
    """A proxy with two workers and a Unix socket, their pids, the socket; all must end."""
    proxy = start_proxy("--workers", "2", "--listen", f"{tmp_path}:6543", "--spares", "0")
    proxy.wait_for_log("worker 1 .* is ready")
    proxy.wait_for_log("worker 2 .* is ready")
    pids = [worker.pid for worker in workers(proxy)]
    assert len(pids) == 2
    yield proxy, pids, tmp_path / ".s.PGSQL.6543"
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    assert server.wait_for_no_clients() == []


def test_sessions_and_jobs_of_all_workers_may_end(
    server: Server, drained: tuple[Proxy, list[int], Path], db: str
) -> None:
    proxy, _, path = drained
    assert path.exists()
    with server.connect(dbname=db) as observer:
        observer.execute("CREATE TABLE done ()")
        gate = Gate(observer)
        with sessions(proxy, dbname=db) as (here, there):
            handle = launch(here, f"{gate.sql}; INSERT INTO done DEFAULT VALUES")
            ended = launch(here, "SELECT 1")
            here.execute("SELECT pg_background_wait(%s::int4, %s::int8)", ended)
            os.kill(proxy.pid, signal.SIGTERM)
            proxy.wait_for_log("worker 1 LOG:  shutting down")
            proxy.wait_for_log("worker 2 LOG:  shutting down")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((proxy.host, proxy.port))
            assert not path.exists()
            assert run(there, "SELECT 1") == [(1,)]
            here.close()
            assert state(there, handle) == "running"
            gate.open()
            query = "SELECT pg_background_wait(%s::int4, %s::int8, 20000)"
            assert one(there, query, handle) is True
            # A worker without sessions and jobs is still asked what it knows.
            time.sleep(0.3)
            assert state(there, handle) == state(there, ended) == "stopped"
            assert proxy.running
        assert proxy.wait() == 0
        assert one(observer, "SELECT count(*) FROM done") == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_all_at_once(
    drained: tuple[Proxy, list[int], Path], second: int, db: str
) -> None:
    proxy, _, _ = drained
    with sessions(proxy, dbname=db) as (here, there):
        launch(here, SLEEPS)
        os.kill(proxy.pid, signal.SIGTERM)
        proxy.wait_for_log("worker 2 LOG:  shutting down")
        os.kill(proxy.pid, second)
        assert proxy.wait() == 0
        for conn in (here, there):
            with pytest.raises(errors.AdminShutdown):
                conn.execute("SELECT 1")


def test_the_shutdown_timeout_holds_for_all(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2", "--shutdown-timeout", "300ms")
    with sessions(proxy) as both:
        began = time.monotonic()
        assert proxy.stop() == 0
        assert time.monotonic() - began > 0.3
        for conn in both:
            with pytest.raises(errors.AdminShutdown):
                conn.execute("SELECT 1")


def test_workers_end_with_a_supervisor_that_is_killed(
    drained: tuple[Proxy, list[int], Path],
) -> None:
    proxy, _, _ = drained
    with sessions(proxy) as both:
        launch(both[0], SLEEPS)
        proxy.kill()
        for conn in both:
            with pytest.raises(errors.AdminShutdown):
                conn.execute("SELECT 1")


def test_a_worker_that_hangs_is_killed_in_the_end(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2", "--shutdown-timeout", "60s")
    with sessions(proxy) as (stopped, _):
        psutil.Process(worker_of(proxy, stopped)).suspend()
        os.kill(proxy.pid, signal.SIGTERM)
        proxy.wait_for_log("shutting down")
        assert proxy.stop() == 0
        assert "has not ended in time" in proxy.log


def test_sigterm_to_a_worker_drains_and_replaces_it(
    server: Server, start_proxy: StartProxy
) -> None:
    proxy = start_proxy("--workers", "2")
    with sessions(proxy) as (leaving, staying):
        drained = worker_of(proxy, leaving)
        os.kill(drained, signal.SIGTERM)
        proxy.wait_for_log("worker . LOG:  shutting down: 1 sessions")
        for _ in range(4):
            with proxy.connect() as conn:
                assert worker_of(proxy, conn) == worker_of(proxy, staying)
        assert one(leaving, "SELECT 1") == 1
        leaving.close()
        proxy.wait_for_log("exited with exit code 0; it is started again")
        wait_until(lambda: proxy.log.count("is ready") == 3)
        assert drained not in {worker.pid for worker in workers(proxy)}
        assert one(staying, "SELECT 1") == 1


def test_signals_of_a_whole_group_are_as_one(server: Server, start_proxy: StartProxy) -> None:
    """Systemd sends SIGTERM to all processes of a service."""
    proxy = start_proxy("--workers", "2", "--shutdown-timeout", "60s")
    with sessions(proxy) as both:
        for process in (*workers(proxy), psutil.Process(proxy.pid)):
            process.send_signal(signal.SIGTERM)
        proxy.wait_for_log("worker 1 LOG:  shutting down: 1 sessions")
        proxy.wait_for_log("worker 2 LOG:  shutting down: 1 sessions")
        time.sleep(0.2)
        for conn in both:
            assert one(conn, "SELECT 1") == 1
    assert proxy.wait() == 0


# SIGHUP


def config_file(folder: Path, **settings: str | int) -> Path:
    file = folder / "proxy.toml"
    lines = (f"{name} = {value!r}\n" for name, value in settings.items())
    file.write_text("".join(lines))
    return file


def reload(proxy: Proxy, said: str) -> None:
    """SIGHUP; waits for a line of the log that is not there yet."""
    before = proxy.log.count(said)
    os.kill(proxy.pid, signal.SIGHUP)
    wait_until(lambda: proxy.log.count(said) > before)
    time.sleep(0.1)  # the workers


COUNTS: Final = pytest.mark.parametrize("count", ["1", "2"])
READ_AGAIN: Final = "LOG:  the configuration was read again"


@COUNTS
def test_sighup_reads_the_configuration_again(
    server: Server, start_proxy: StartProxy, tmp_path: Path, count: str
) -> None:
    file = config_file(tmp_path, max_workers=3)
    proxy = start_proxy("--workers", count, "--config", str(file))
    shown = "SHOW pg_background.max_workers"
    with contextlib.ExitStack() as stack:
        before = [stack.enter_context(proxy.connect()) for _ in range(4)]
        assert {one(conn, shown) for conn in before} == {"3"}
        config_file(tmp_path, max_workers=5, api_version=2)
        reload(proxy, READ_AGAIN)
        after = [stack.enter_context(proxy.connect()) for _ in range(4)]
        assert {one(conn, shown) for conn in after} == {"5"}
        # Sessions stay as they began, and go on.
        assert {one(conn, shown) for conn in before} == {"3"}
        launched = one(after[0], "SELECT pg_background_launch('SELECT 1')")
        assert not isinstance(launched, int)
        if count == "2":
            victim = worker_of(proxy, after[0])
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: proxy.log.count("is ready") == 3)
            with sessions(proxy) as both:
                assert {one(conn, shown) for conn in both} == {"5"}


@COUNTS
def test_a_wrong_configuration_is_not_taken(
    server: Server, start_proxy: StartProxy, tmp_path: Path, count: str
) -> None:
    file = config_file(tmp_path, max_workers=3)
    proxy = start_proxy("--workers", count, "--config", str(file))
    file.write_text("max_workers = 0\n")
    reload(proxy, "ERROR:  the configuration stays as it was")
    assert f"{file}: max_workers:" in proxy.log
    file.write_text("auth_file = 'nowhere'\n")
    reload(proxy, "ERROR:  the configuration stays as it was")
    with proxy.connect() as conn:
        assert one(conn, "SHOW pg_background.max_workers") == "3"


@COUNTS
def test_what_cannot_be_changed_is_said(
    server: Server,
    start_proxy: StartProxy,
    tmp_path: Path,
    count: str,
    certificates: Certificates,
) -> None:
    file = config_file(tmp_path, max_workers=3, tcp_keepidle=60)
    proxy = start_proxy("--workers", count, "--config", str(file))
    config_file(
        tmp_path,
        max_workers=4,
        tcp_keepidle=61,
        client_tls_sslmode="require",
        client_tls_cert_file=str(certificates.server.cert),
        client_tls_key_file=str(certificates.server.key),
    )
    reload(proxy, READ_AGAIN)
    for name in ("tcp_keepidle", "client_tls_sslmode"):
        assert f"{name} cannot be changed without restarting the proxy" in proxy.log
    with proxy.connect() as conn:
        assert one(conn, "SHOW pg_background.max_workers") == "4"
        assert not conn.pgconn.ssl_in_use


@COUNTS
def test_certificates_are_read_again(
    server: Server, start_proxy: StartProxy, tmp_path: Path, count: str, certificates: Certificates
) -> None:
    cert, key = tmp_path / "proxy.pem", tmp_path / "proxy.key"

    def install(pair: Any) -> None:
        cert.write_bytes(pair.cert.read_bytes())
        key.touch(mode=0o600)
        key.write_bytes(pair.key.read_bytes())
        key.chmod(0o600)

    install(certificates.stranger)
    proxy = start_proxy(
        *("--workers", count, "--client-tls-sslmode", "require"),
        *("--client-tls-cert-file", str(cert), "--client-tls-key-file", str(key)),
    )
    verified: dict[str, Any] = {"sslmode": "verify-full", "sslrootcert": certificates.ca}
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        proxy.connect(**verified)
    with proxy.connect(sslmode="require") as before:
        install(certificates.server)
        reload(proxy, READ_AGAIN)
        for _ in range(4):
            with proxy.connect(**verified) as conn:
                assert one(conn, "SELECT 1") == 1
        assert one(before, "SELECT 1") == 1
    cert.write_text("no certificate")
    reload(proxy, "ERROR:  the configuration stays as it was")
    with proxy.connect(**verified) as conn:
        assert one(conn, "SELECT 1") == 1


def test_psql_through_two_workers(server: Server, pair: Proxy, db: str) -> None:
    script = (
        "SELECT (pg_background_launch_v2('SELECT 42 AS answer')).* \\gset h_\n"
        f"\\c {db}\n"
        "SELECT pg_background_wait(:h_pid, :h_cookie);\n"
        "SELECT state FROM pg_background_outcome(:h_pid, :h_cookie);\n"
    )
    for _ in range(3):
        done = psql(pair.port, "-At", input=script)
        assert done.stdout.splitlines()[-2:] == ["t", "stopped"], done.stderr


def test_the_workers_run_the_code_of_their_supervisor(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2", env={"PYTHONUNBUFFERED": "1"})  # no fork of the tests'
    for worker in workers(proxy):
        # Until its exec, it has the environment of its parent.
        path = wait_until(functools.partial(_python_path, worker)).split(os.pathsep)
        assert path[0] == str(REPOSITORY)


def _python_path(worker: psutil.Process) -> str:
    return str(worker.environ().get("PYTHONPATH", ""))
