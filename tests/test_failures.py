"""What breaks, breaks as it would without a proxy: backends killed, servers gone, clients vanished,
statements cancelled. The session lives on where it can, the job always does, and nothing is left.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import errors
from psycopg.pq import TransactionStatus

from protocol.messages import Query
from protocol.startup import CancelRequest, StartupMessage
from tests.conftest import StartProxy
from tests.support.background import wait_until
from tests.support.executors import executors
from tests.support.servers import Connection, Proxy, Server, start_psql
from tests.support.wire import Footprint, Gate, Monitor, Wire, error_of, gate, launch, value

# More than all buffers between a job and its reader take.
BIG_RESULT: Final = "SELECT repeat('x', 1000) FROM generate_series(1, 40000)"
FETCH: Final = "SELECT * FROM pg_background_result(%s) AS (n int)"


@pytest.fixture
def conn(proxy: Proxy, db: str) -> Iterator[Connection]:
    """A session through the proxy."""
    with proxy.connect(dbname=db) as conn:
        yield conn


@pytest.fixture
def closed_gate(server: Server, db: str) -> Iterator[Gate]:
    with gate(server, db) as closed_gate:
        yield closed_gate


@pytest.fixture
def nothing_left(proxy: Proxy, db: str, monitor: Monitor) -> Iterator[None]:
    """Afterwards no backend is left in the database, and no descriptor in the proxy."""
    footprint = Footprint(proxy)
    wait_until(lambda: not monitor.backends(db))
    before = footprint.fds
    yield
    wait_until(lambda: not monitor.backends(db))
    wait_until(lambda: footprint.fds <= before)


@pytest.fixture
def table(nothing_left: None, server: Server, db: str) -> None:
    """The database has a table `done`."""
    with server.connect(dbname=db) as direct:
        direct.execute("CREATE TABLE done ()")


JOB_DONE: Final = "INSERT INTO done DEFAULT VALUES"
# Behind a gate: one that is being cancelled when the gate opens does not get as far.
SLOWLY_DONE: Final = f"SELECT pg_sleep(0.2); {JOB_DONE}"


def wait_until_done(server: Server, db: str) -> None:
    """The job has committed, and once."""
    with server.connect(dbname=db) as direct:
        wait_until(lambda: value(direct, "SELECT count(*) FROM done"))
        assert value(direct, "SELECT count(*) FROM done") == 1


GoesOn = Callable[[int, int], None]


@pytest.fixture
def assert_job_goes_on(server: Server, db: str, closed_gate: Gate, monitor: Monitor) -> GoesOn:
    """Given the pids of a primary that ends and of its session's job: that waits at the gate, and
    commits when it opens.
    """

    def check(primary: int, job: int) -> None:
        monitor.wait_until_gone(primary)
        monitor.wait_until_at_gate(job)
        closed_gate.open()
        wait_until_done(server, db)

    return check


def fetch(conn: Connection, pid: int) -> list[tuple[Any, ...]]:
    return conn.execute(FETCH, [pid]).fetchall()


def pid_of(conn: Connection) -> int:
    """Of the primary backend."""
    return conn.info.backend_pid


def assert_lives(conn: Connection) -> None:
    """The session is good for everything, jobs too."""
    assert value(conn, "SELECT 1") == 1
    assert fetch(conn, launch(conn, "SELECT 2")) == [(2,)]


def assert_transaction_failed(conn: Connection) -> None:
    """Not only the driver says so, the server does."""
    assert conn.info.transaction_status == TransactionStatus.INERROR
    with pytest.raises(errors.InFailedSqlTransaction):
        conn.execute("SELECT 1")
    conn.execute("ROLLBACK")


# The job's backend dies


def test_killed_job_is_a_lost_connection_and_the_session_lives_on(
    conn: Connection, closed_gate: Gate, monitor: Monitor
) -> None:
    pid = launch(conn, closed_gate.sql + "SELECT 1")
    monitor.wait_until_at_gate(pid)
    monitor.terminate(pid)
    monitor.wait_until_gone(pid)
    with pytest.raises(errors.ConnectionFailure) as caught:
        fetch(conn, pid)
    assert caught.value.diag.message_primary == f"lost connection to worker process with PID {pid}"
    assert caught.value.diag.severity == "ERROR"
    assert "terminating connection due to administrator command" in (
        caught.value.diag.message_detail or ""
    ).replace("Terminating", "terminating")
    assert_lives(conn)
    with pytest.raises(errors.UndefinedObject):
        fetch(conn, pid)


def test_job_killed_while_its_caller_waits(
    conn: Connection, closed_gate: Gate, monitor: Monitor, background: Callable[..., Future[Any]]
) -> None:
    pid = launch(conn, closed_gate.sql + "SELECT 1")
    with conn.transaction(force_rollback=True):
        waiting = background(fetch, conn, pid)
        monitor.wait_until_fetching(pid_of(conn))
        monitor.terminate(pid)
        with pytest.raises(errors.ConnectionFailure, match=f"worker process with PID {pid}"):
            waiting.result(30)
        assert conn.info.transaction_status == TransactionStatus.INERROR
        with pytest.raises(errors.InFailedSqlTransaction):
            conn.execute("SELECT 1")
    assert_lives(conn)


@pytest.mark.parametrize("row_size", [100, 1000, 30_000])
def test_job_killed_with_half_its_result_unread(
    conn: Connection, monitor: Monitor, row_size: int
) -> None:
    """Its stream ends in the middle of a row, and the error must not become part of that row."""
    pid = launch(
        conn, f"SELECT repeat('x', {row_size}) FROM generate_series(1, {40_000_000 // row_size})"
    )
    monitor.wait_until_full(pid)
    monitor.terminate(pid)
    monitor.wait_until_gone(pid)
    with pytest.raises(errors.ConnectionFailure, match=f"worker process with PID {pid}"):
        conn.execute("SELECT * FROM pg_background_result(%s) AS (r text)", [pid])
    assert_lives(conn)


def test_job_killed_in_the_middle_of_a_row_that_is_passed_on_in_pieces(
    conn: Connection, proxy: Proxy, db: str, monitor: Monitor
) -> None:
    """There is no way to tell a client that a row has no end, but to hang up."""
    pid = launch(conn, "SELECT repeat('x', 40000000)")
    monitor.wait_until_full(pid)
    monitor.terminate(pid)
    monitor.wait_until_gone(pid)
    with pytest.raises(psycopg.OperationalError):
        conn.execute("SELECT * FROM pg_background_result(%s) AS (r text)", [pid])
    assert conn.closed
    with proxy.connect(dbname=db) as other:
        assert_lives(other)


@pytest.mark.parametrize("row_size", [100, 30_000])
def test_job_killed_while_a_slow_reader_is_in_the_middle_of_its_result(
    proxy: Proxy, db: str, monitor: Monitor, row_size: int
) -> None:
    with Wire((proxy.host, proxy.port), receive_buffer=16384, database=db) as wire:
        pid = wire.launch(
            f"SELECT repeat('x', {row_size}) FROM generate_series(1, {40_000_000 // row_size})"
        )
        wire.send_query(f"SELECT * FROM pg_background_result({pid}) AS (r text)")
        for _ in range(20):
            kind, _ = wire.message()
        assert kind == "D"
        monitor.wait_until_full(pid)
        monitor.terminate(pid)
        monitor.wait_until_gone(pid)
        answer = wire.until_ready()
        assert {len(body) for kind, body in answer if kind == "D"} == {row_size + 6}
        error = error_of(answer)
        assert error.sqlstate == "08006"
        assert error.message == b"lost connection to worker process with PID %d" % pid
        assert [kind for kind, _ in answer[-2:]] == ["E", "Z"]
        assert wire.query("SELECT 1")[-1] == ("Z", b"I")


def test_cancelled_job_gives_its_own_error_with_context(
    conn: Connection, closed_gate: Gate, monitor: Monitor
) -> None:
    pid = launch(conn, closed_gate.sql + "SELECT 1")
    monitor.wait_until_at_gate(pid)
    monitor.cancel(pid)
    monitor.wait_until_gone(pid)
    with pytest.raises(errors.QueryCanceled) as caught:
        fetch(conn, pid)
    diag = caught.value.diag
    assert diag.message_primary == "canceling statement due to user request"
    assert (diag.context or "").splitlines()[-1] == f"background worker, pid {pid}"
    assert_lives(conn)


# The server, or its primary backend, is gone


def test_server_crashes_while_jobs_run_and_a_client_waits(
    server: Server, proxy: Proxy, monitor: Monitor, background: Callable[..., Future[Any]]
) -> None:
    footprint = Footprint(proxy)
    before = footprint.fds
    with gate(server) as closed:
        waiter, owner = proxy.connect(), proxy.connect()
        jobs = [launch(conn, closed.sql + "SELECT 1") for conn in (waiter, waiter, owner)]
        for job in jobs:
            monitor.wait_until_at_gate(job)
        waiting = background(fetch, waiter, jobs[0])
        monitor.wait_until_fetching(pid_of(waiter))
        server.stop(immediate=True)
        try:
            with pytest.raises(psycopg.OperationalError):
                waiting.result(30)
            for conn in (waiter, owner):
                with pytest.raises(psycopg.OperationalError):
                    conn.execute("SELECT 1")
                assert conn.closed
            with pytest.raises(psycopg.OperationalError) as caught:
                proxy.connect()
            assert "FATAL:  could not connect to the server behind the proxy" in str(caught.value)
            assert "DETAIL:" in str(caught.value)
        finally:
            server.start()
    with proxy.connect() as conn:
        assert_lives(conn)
        for job in jobs:
            with pytest.raises(errors.UndefinedObject):
                fetch(conn, job)
    wait_until(lambda: footprint.fds <= before)


def test_no_server_at_connect_is_a_clean_57p03(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    upstream = tmp_path / "s"
    upstream.symlink_to(server.socket_dir)
    proxy = start_proxy(upstream=f"host={upstream} port={server.port}")
    upstream.unlink()
    with Wire((proxy.host, proxy.port), login=False) as wire:
        wire.send(StartupMessage({b"user": b"postgres"}).serialize())
        error = error_of([wire.message()])
        with pytest.raises(EOFError):
            wire.message()
    assert (error.severity, error.sqlstate) == ("FATAL", "57P03")
    assert error.message == b"could not connect to the server behind the proxy"
    assert error.fields["D"]


@pytest.mark.usefixtures("table")
def test_killed_primary_ends_the_wait_and_the_job_runs_on(
    conn: Connection,
    monitor: Monitor,
    closed_gate: Gate,
    background: Callable[..., Future[Any]],
    assert_job_goes_on: GoesOn,
) -> None:
    primary = pid_of(conn)
    pid = launch(conn, closed_gate.sql + SLOWLY_DONE)
    waiting = background(fetch, conn, pid)
    monitor.wait_until_fetching(primary)
    monitor.terminate(primary)
    with pytest.raises(errors.AdminShutdown, match="terminating connection"):
        waiting.result(30)
    assert conn.closed
    assert_job_goes_on(primary, pid)


# No connection for the job


@pytest.fixture
def limited(server: Server) -> Iterator[str]:
    """A role that may launch jobs, if there are connections."""
    with server.connect() as direct:
        direct.execute("CREATE ROLE limited LOGIN")
        with executors(direct, "limited"):
            yield "limited"
            wait_until(
                lambda: value(
                    direct, "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'limited'"
                )
            )
        direct.execute("DROP ROLE limited")


def assert_no_connection(conn: Connection, reason: str) -> None:
    """A launch fails for this reason, in and out of a transaction, and the session lives on."""
    with pytest.raises(errors.TooManyConnections) as caught:
        launch(conn, "SELECT 1")
    diag = caught.value.diag
    assert diag.sqlstate == "53300"
    assert diag.severity == "ERROR"
    assert diag.message_primary == "could not start a background worker"
    assert reason in (diag.message_detail or "")
    assert diag.message_hint
    assert value(conn, "SELECT 1") == 1
    conn.execute("BEGIN")
    with pytest.raises(errors.TooManyConnections):
        launch(conn, "SELECT 1")
    assert_transaction_failed(conn)


def test_roles_connection_limit(server: Server, proxy: Proxy, limited: str) -> None:
    with server.connect() as direct, proxy.connect(user=limited) as conn:
        direct.execute("ALTER ROLE limited CONNECTION LIMIT 1")
        assert_no_connection(conn, "too many connections for role")
        direct.execute("ALTER ROLE limited CONNECTION LIMIT -1")
        assert_lives(conn)


def test_databases_connection_limit(server: Server, proxy: Proxy, db: str, limited: str) -> None:
    with server.connect() as direct, proxy.connect(user=limited, dbname=db) as conn:
        direct.execute(f"ALTER DATABASE {db} CONNECTION LIMIT 1")
        assert_no_connection(conn, "too many connections for database")
        direct.execute(f"ALTER DATABASE {db} CONNECTION LIMIT -1")
        assert_lives(conn)


def test_servers_connection_limit(server: Server, proxy: Proxy, limited: str) -> None:
    taken: list[Connection] = []
    try:
        with proxy.connect(user=limited) as conn, proxy.connect() as superuser:
            with pytest.raises(psycopg.OperationalError):
                taken.extend(server.connect() for _ in range(1000))
            assert_no_connection(conn, "")
            assert_no_connection(superuser, "sorry, too many clients already")
            while taken:
                taken.pop().close()
            wait_until(lambda: can_launch(conn))
            wait_until(lambda: can_launch(superuser))
    finally:
        for other in taken:
            other.close()


def can_launch(conn: Connection) -> bool:
    """Backends that were told to end take a moment."""
    try:
        assert_lives(conn)
    except errors.TooManyConnections:
        return False
    return True


def test_server_takes_no_connections_any_more(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    upstream = tmp_path / "s"
    upstream.symlink_to(server.socket_dir)
    with start_proxy(upstream=f"host={upstream} port={server.port}").connect() as conn:
        upstream.unlink()
        with pytest.raises(errors.InsufficientResources) as caught:
            launch(conn, "SELECT 1")
        assert caught.value.sqlstate == "53000"
        assert caught.value.diag.message_detail
        assert caught.value.diag.message_hint
        upstream.symlink_to(server.socket_dir)
        assert_lives(conn)


# The client vanishes

WAYS_TO_VANISH: Final = {"RST": Wire.reset, "FIN": Wire.hang_up}


@pytest.fixture(params=WAYS_TO_VANISH)
def vanish(request: pytest.FixtureRequest) -> Callable[[Wire], None]:
    return WAYS_TO_VANISH[request.param]


@pytest.fixture
def wire(table: None, proxy: Proxy, db: str) -> Wire:
    """A session by hand; the database has a table `done`."""
    return Wire((proxy.host, proxy.port), database=db, receive_buffer=16384)


def test_client_vanishes_while_it_waits(
    wire: Wire, closed_gate: Gate, monitor: Monitor, vanish: Any, assert_job_goes_on: GoesOn
) -> None:
    pid = wire.launch(closed_gate.sql + SLOWLY_DONE)
    wire.send_query(f"SELECT pg_background_result({pid})")
    monitor.wait_until_fetching(wire.pid)
    vanish(wire)
    assert_job_goes_on(wire.pid, pid)


def test_client_vanishes_while_idle_with_a_job(
    wire: Wire, closed_gate: Gate, monitor: Monitor, vanish: Any, assert_job_goes_on: GoesOn
) -> None:
    pid = wire.launch(closed_gate.sql + SLOWLY_DONE)
    monitor.wait_until_at_gate(pid)
    vanish(wire)
    assert_job_goes_on(wire.pid, pid)


def test_client_vanishes_while_it_launches(
    wire: Wire, server: Server, db: str, monitor: Monitor, vanish: Any
) -> None:
    """Whether the job ran is a matter of moments; that all of it is over is not."""
    wire.send_query(f"SELECT pg_background_launch('{JOB_DONE}')")
    vanish(wire)
    monitor.wait_until_gone(wire.pid)


def test_client_vanishes_while_it_launches_many(
    wire: Wire, server: Server, db: str, monitor: Monitor, vanish: Any
) -> None:
    """Those that were launched run to their end."""
    wire.send_query(
        "SET pg_background.max_workers = 100;"
        f"SELECT pg_background_launch('{JOB_DONE}') FROM generate_series(1, 40)"
    )
    with server.connect(dbname=db) as direct:
        wait_until(lambda: value(direct, "SELECT count(*) FROM done"))
        vanish(wire)
        monitor.wait_until_gone(wire.pid)
        wait_until(lambda: len(monitor.backends(db)) == 1)
        assert 1 <= value(direct, "SELECT count(*) FROM done") <= 40


def test_client_vanishes_with_a_result_that_it_has_not_asked_for(
    wire: Wire, server: Server, db: str, monitor: Monitor, vanish: Any
) -> None:
    pid = wire.launch(f"{JOB_DONE}; {BIG_RESULT}")
    monitor.wait_until_full(pid)
    vanish(wire)
    wait_until_done(server, db)


@pytest.mark.parametrize("read", [0, 100_000])
def test_client_vanishes_with_a_result_that_it_does_not_read(
    wire: Wire, server: Server, db: str, monitor: Monitor, vanish: Any, read: int
) -> None:
    pid = wire.launch(f"{JOB_DONE}; {BIG_RESULT}")
    wire.send_query(f"SELECT * FROM pg_background_result({pid})")
    monitor.wait_until_full(pid)
    while read > 0:
        read -= len(wire.socket.recv(1000))
    monitor.wait_until_full(pid)
    vanish(wire)
    wait_until_done(server, db)


def test_client_vanishes_in_the_middle_of_a_message(
    wire: Wire, closed_gate: Gate, vanish: Any, assert_job_goes_on: GoesOn
) -> None:
    pid = wire.launch(closed_gate.sql + SLOWLY_DONE)
    wire.send(b"Q\0\0\1\0SELECT pg_background_result(")
    vanish(wire)
    assert_job_goes_on(wire.pid, pid)


def test_client_vanishes_with_a_pipeline_full_of_messages_behind_its_wait(
    wire: Wire, server: Server, db: str, closed_gate: Gate, monitor: Monitor, vanish: Any
) -> None:
    """More than the proxy is willing to hold, so it has stopped reading."""
    pid = wire.launch(closed_gate.sql + SLOWLY_DONE)
    wire.send_query(f"SELECT pg_background_result({pid})")
    monitor.wait_until_fetching(wire.pid)
    wire.socket.settimeout(1.0)
    message = Query(b"SELECT '%b'" % (b"x" * 100_000_000)).serialize()
    with pytest.raises(TimeoutError):
        wire.send(message)
    vanish(wire)
    closed_gate.open()
    wait_until_done(server, db)


@pytest.mark.usefixtures("table")
def test_psql_is_killed_while_it_waits(
    proxy: Proxy, db: str, closed_gate: Gate, monitor: Monitor, assert_job_goes_on: GoesOn
) -> None:
    client, primary = psql_that_waits(proxy, db, monitor, closed_gate.sql + SLOWLY_DONE)
    pid = backend_at_gate(monitor, db)
    client.kill()
    client.communicate(timeout=30)
    assert_job_goes_on(primary, pid)


def psql_that_waits(
    proxy: Proxy, db: str, monitor: Monitor, job: str
) -> tuple[subprocess.Popen[str], int]:
    """One that waits for the result of a job, and the pid of its backend."""
    query = f"SELECT pg_background_result(pg_background_launch('{job}'))"
    client = start_psql(proxy, "-c", query, dbname=db)
    [pid, *_] = wait_until(lambda: [b[0] for b in monitor.backends(db) if b[1] == "psql"])
    monitor.wait_until_fetching(pid)
    return client, int(pid)


def backend_at_gate(monitor: Monitor, db: str) -> int:
    """The pid of a job's backend that has come to its gate; a spare may be logging in beside it."""
    at_gate = ("active", "advisory")
    [pid, *_] = wait_until(
        lambda: [b[0] for b in monitor.backends(db) if monitor.state(b[0]) == at_gate]
    )
    return int(pid)


# Cancel requests and timeouts

CANCELED: Final = "canceling statement due to user request"


def cancel_by_psycopg(conn: Connection) -> None:
    conn.cancel_safe(timeout=30)


def cancel_by_libpqs_old_way(conn: Connection) -> None:
    conn.pgconn.get_cancel().cancel()


@pytest.mark.parametrize("cancel", [cancel_by_psycopg, cancel_by_libpqs_old_way])
@pytest.mark.parametrize("in_transaction", [False, True])
def test_cancel_request_ends_the_wait(
    conn: Connection,
    closed_gate: Gate,
    monitor: Monitor,
    background: Callable[..., Future[Any]],
    cancel: Callable[[Connection], None],
    in_transaction: bool,
) -> None:
    if in_transaction:
        conn.execute("BEGIN")
    pid = launch(conn, closed_gate.sql + "SELECT 1")
    waiting = background(fetch, conn, pid)
    monitor.wait_until_fetching(pid_of(conn))
    cancel(conn)
    with pytest.raises(errors.QueryCanceled) as caught:
        waiting.result(30)
    assert caught.value.diag.message_primary == CANCELED
    if in_transaction:
        assert_transaction_failed(conn)
    assert_lives(conn)
    monitor.wait_until_at_gate(pid)  # the job was not cancelled
    with pytest.raises(errors.UndefinedObject, match=f"PID {pid} have already been consumed"):
        fetch(conn, pid)


def test_ctrl_c_in_psql_ends_the_wait(
    proxy: Proxy, db: str, monitor: Monitor, closed_gate: Gate
) -> None:
    client, _ = psql_that_waits(proxy, db, monitor, closed_gate.sql + "SELECT 1")
    client.send_signal(signal.SIGINT)
    said, _ = client.communicate(timeout=30)
    assert "Cancel request sent" in said
    assert f"ERROR:  {CANCELED}" in said


@pytest.mark.parametrize("wait", [True, False], ids=["client waits", "client hangs up at once"])
def test_raw_cancel_request_ends_the_wait(
    wire: Wire, closed_gate: Gate, monitor: Monitor, wait: bool
) -> None:
    pid = wire.launch(closed_gate.sql + "SELECT 1")
    wire.send_query(f"SELECT pg_background_result({pid})")
    monitor.wait_until_fetching(wire.pid)
    wire.request_cancel(wait=wait)
    error = error_of(wire.until_ready())
    assert (error.sqlstate, error.message.decode()) == ("57014", CANCELED)
    assert wire.query("SELECT 1")[-1] == ("Z", b"I")
    closed_gate.open()
    wire.close()


@pytest.mark.parametrize("wait", [True, False], ids=["client waits", "client hangs up at once"])
def test_raw_cancel_request_of_a_running_query_is_passed_on(
    wire: Wire, closed_gate: Gate, monitor: Monitor, wait: bool
) -> None:
    wire.send_query(closed_gate.sql)
    monitor.wait_until_at_gate(wire.pid)
    wire.request_cancel(wait=wait)
    error = error_of(wire.until_ready())
    assert (error.sqlstate, error.message.decode()) == ("57014", CANCELED)
    closed_gate.open()
    wire.close()


def test_wrong_cancel_key_does_nothing(wire: Wire, closed_gate: Gate, monitor: Monitor) -> None:
    pid = wire.launch(closed_gate.sql + "SELECT 42 AS n")
    wire.send_query(f"SELECT pg_background_result({pid})")
    monitor.wait_until_fetching(wire.pid)
    wrong = bytes([wire.key.secret_key[0] ^ 1]) + wire.key.secret_key[1:]
    wire.request_cancel(CancelRequest(wire.pid, wrong))
    wire.request_cancel(CancelRequest(wire.pid + 1, wire.key.secret_key))
    closed_gate.open()
    assert [body[6:] for kind, body in wire.until_ready() if kind == "D"] == [b"42"]
    wire.close()


def test_cancel_request_ends_the_launch_of_many(
    wire: Wire, server: Server, db: str, monitor: Monitor
) -> None:
    """Each launch may wait for a connection; the statement can be cancelled between them."""
    wire.query("SET pg_background.max_workers = 1000")
    wire.send_query(
        "SELECT pg_background_launch('INSERT INTO done DEFAULT VALUES')"
        " FROM generate_series(1, 1000)"
    )
    with server.connect(dbname=db) as direct:
        wait_until(lambda: value(direct, "SELECT count(*) FROM done"))
    wire.request_cancel()
    answer = wire.until_ready()
    assert error_of(answer).sqlstate == "57014"
    wire.close()


@pytest.mark.parametrize("row_size", [1000, 10_000_000])
def test_cancel_request_while_a_result_is_half_read(
    wire: Wire, monitor: Monitor, row_size: int
) -> None:
    """The error comes after a whole row."""
    pid = wire.launch(
        f"SELECT repeat('x', {row_size}) FROM generate_series(1, {40_000_000 // row_size})"
    )
    wire.send_query(f"SELECT * FROM pg_background_result({pid}) AS (r text)")
    assert wire.message()[0] == "T"
    wire.receive()  # the beginning of a row
    monitor.wait_until_full(pid)
    wire.request_cancel()
    answer = wire.until_ready()
    assert {len(body) for kind, body in answer if kind == "D"} == {row_size + 6}
    assert error_of(answer).sqlstate == "57014"
    assert [kind for kind, _ in answer[-2:]] == ["E", "Z"]
    wire.close()


def test_statement_timeout_ends_the_wait(
    conn: Connection, closed_gate: Gate, monitor: Monitor
) -> None:
    pid = launch(conn, closed_gate.sql + "SELECT 1")
    conn.execute("SET statement_timeout = '300ms'")
    conn.execute("BEGIN")
    with pytest.raises(errors.QueryCanceled) as caught:
        fetch(conn, pid)
    assert caught.value.diag.message_primary == "canceling statement due to statement timeout"
    assert_transaction_failed(conn)
    monitor.wait_until_at_gate(pid)
    conn.execute("SET statement_timeout = 0")
    assert_lives(conn)


def test_statement_timeout_ends_a_wait_in_the_middle_of_a_result(
    conn: Connection, closed_gate: Gate
) -> None:
    sql = closed_gate.sql.removesuffix("; ")
    pid = launch(
        conn,
        f"SELECT CASE WHEN i > 5000 THEN ({sql})::text ELSE 'row' END"
        " FROM generate_series(1, 5001) i",
    )
    conn.execute("SET statement_timeout = '500ms'")
    with pytest.raises(errors.QueryCanceled, match="due to statement timeout"):
        conn.execute("SELECT * FROM pg_background_result(%s) AS (r text)", [pid])
    conn.execute("SET statement_timeout = 0")
    assert_lives(conn)


@pytest.mark.parametrize("begin", ["BEGIN", ""], ids=["transaction block", "no block"])
@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "idle_session_timeout"])
def test_a_session_that_waits_is_not_idle(conn: Connection, setting: str, begin: str) -> None:
    if conn.info.server_version < 140000 and setting == "idle_session_timeout":
        pytest.skip("there is no such setting yet")
    pid = launch(conn, "SELECT pg_sleep(1.2); SELECT 7")
    if begin:
        conn.execute(begin)
    # One message, so that the session cannot be found idle between the two.
    rows = conn.execute(
        f"SET {setting} = '500ms'; SELECT * FROM pg_background_result({pid}) AS (n int);"
        f" SET {setting} = 0"
    )
    rows.nextset()
    assert rows.fetchall() == [(7,)]
    assert value(conn, "SELECT 1") == 1


@pytest.mark.parametrize("begin", ["BEGIN", "SELECT 1"], ids=["transaction block", "no block"])
@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "idle_session_timeout"])
@pytest.mark.parametrize("cursor", [psycopg.Cursor, psycopg.ClientCursor])
def test_a_session_that_waits_in_a_statement_of_its_own_is_not_idle(
    conn: Connection, setting: str, begin: str, cursor: Any
) -> None:
    if conn.info.server_version < 140000 and setting == "idle_session_timeout":
        pytest.skip("there is no such setting yet")
    conn.cursor_factory = cursor
    pid = launch(conn, "SELECT pg_sleep(1.2); SELECT 7")
    conn.execute(f"SET {setting} = '600ms'")
    conn.execute(begin)
    assert fetch(conn, pid) == [(7,)]
    conn.execute(f"SET {setting} = 0")
    conn.execute("COMMIT" if begin == "BEGIN" else begin)
    assert_lives(conn)


def test_a_transaction_goes_on_after_its_wait(
    conn: Connection, closed_gate: Gate, monitor: Monitor, background: Callable[..., Future[Any]]
) -> None:
    conn.execute("CREATE TABLE t (n int)")
    conn.execute("BEGIN")
    conn.execute("INSERT INTO t VALUES (1)")
    pid = launch(conn, closed_gate.sql + "SELECT count(*)::int FROM t")
    waiting = background(fetch, conn, pid)
    monitor.wait_until_fetching(pid_of(conn))
    closed_gate.open()
    assert waiting.result(30) == [(0,)]  # it does not see what is not committed
    assert conn.info.transaction_status == TransactionStatus.INTRANS
    conn.execute("INSERT INTO t VALUES (2)")
    conn.execute("COMMIT")
    assert value(conn, "SELECT count(*) FROM t") == 2
