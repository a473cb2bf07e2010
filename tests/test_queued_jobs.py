"""Jobs that pg_background_submit queues where there is no room: pg_background.queue."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.conftest import StartProxy
from tests.support.api_clients import Client, Gate, quoted
from tests.support.background import failure, launch, message, wait_until
from tests.support.executors import executors
from tests.support.in_database import inside, one, with_extension
from tests.support.servers import Connection, Proxy, Server
from tests.test_workers import sessions

pytestmark = pytest.mark.every_server

Handle = tuple[int | None, int]

SUBMIT: Final = "SELECT (h).pid, (h).cookie FROM (SELECT pg_background_submit({}, NULL, {}) AS h) s"


def submit(conn: Connection, job: str, label: str = "x") -> Handle:
    """A job's handle; the pid is None if it is queued."""
    row = conn.execute(SUBMIT.format(quoted(job), quoted(label)).encode()).fetchone()
    assert row is not None
    return row[0], row[1]


def state(conn: Connection, handle: Handle) -> str | None:
    """As its outcome has it."""
    found: str | None = ask(conn, "outcome", handle, columns="state")
    return found


def ask(
    conn: Connection, name: str, handle: Handle, *more: object, columns: str | None = None
) -> Any:
    """What a function says of a job; one column of it."""
    pid, cookie = handle
    arguments = ", ".join(map(str, ("NULL" if pid is None else pid, cookie, *more)))
    call = f"pg_background_{name}({arguments})"
    return one(conn, f"SELECT {call}" if columns is None else f"SELECT {columns} FROM {call}")


def listed(conn: Connection) -> list[tuple[Any, ...]]:
    """Cookie, whether there is a pid, and state of the session's jobs."""
    rows = conn.execute("SELECT pid, cookie, state FROM pg_background_list").fetchall()
    return [(cookie, pid is not None, state) for pid, cookie, state in rows]


@pytest.fixture
def full(conn: Connection, gate: Gate) -> int:
    """A session whose one place a job has, that waits at the gate; that job's pid."""
    conn.execute("SET pg_background.max_workers = 1; SET pg_background.queue = on")
    return launch(conn, gate.sql)


def test_where_there_is_room_it_starts_at_once(conn: Connection) -> None:
    conn.execute("SET pg_background.queue = on")
    pid, cookie = submit(conn, "SELECT 1")
    assert pid is not None
    assert ask(conn, "wait", (pid, cookie)) is True
    assert state(conn, (pid, cookie)) == "stopped"
    # By the cookie too.
    assert state(conn, (None, cookie)) == "stopped"


def test_it_is_off_by_default(conn: Connection, gate: Gate, full: int) -> None:
    conn.execute("RESET pg_background.queue")
    assert one(conn, "SHOW pg_background.queue") == "off"
    error = failure(conn, "SELECT pg_background_submit('SELECT 1')")
    assert error.sqlstate == "53400"
    for word, shown in (("yes", "on"), ("f", "off"), ("TRUE", "on"), ("of", "off")):
        conn.execute(f"SET pg_background.queue = {word}".encode())
        assert one(conn, "SHOW pg_background.queue") == shown
    for word in ("o", "2", "maybe"):
        error = failure(conn, f"SET pg_background.queue = '{word}'".encode())
        assert message(error) == (
            "22023",
            'parameter "pg_background.queue" requires a Boolean value',
        )
    gate.open()


def test_queued_jobs_run_in_order_when_there_is_room(
    conn: Connection, observer: Connection, gate: Gate, full: int
) -> None:
    observer.execute("DROP TABLE IF EXISTS ran; CREATE TABLE ran (id serial, number int)")
    handles = [submit(conn, f"INSERT INTO ran (number) VALUES ({n})") for n in range(5)]
    assert all(pid is None for pid, _ in handles)
    assert [state(conn, handle) for handle in handles] == ["queued"] * 5
    assert listed(conn)[1:] == [(cookie, False, "queued") for _, cookie in handles]
    assert ask(conn, "wait", handles[0], 100) is False
    assert ask(conn, "full_sql", handles[2]) == "INSERT INTO ran (number) VALUES (2)"
    assert ask(conn, "result_info", handles[2], columns="completed") is False
    gate.open()
    for handle in handles:
        assert ask(conn, "wait", handle) is True
        assert state(conn, handle) == "stopped"
        assert ask(conn, "result_info", handle, columns="command_tag") == "INSERT"
    assert observer.execute("SELECT number FROM ran ORDER BY id").fetchall() == [
        (number,) for number in range(5)
    ]
    # Now they have pids, and are known by these too.
    rows = conn.execute("SELECT pid, cookie FROM pg_background_list").fetchall()
    assert {cookie for _, cookie in rows} >= {cookie for _, cookie in handles}
    for pid, cookie in rows[1:]:
        assert state(conn, (pid, cookie)) == "stopped"
        assert state(conn, (pid + 1, cookie)) is None


def test_a_queued_job_that_is_cancelled_never_runs(
    conn: Connection, observer: Connection, gate: Gate, full: int
) -> None:
    observer.execute("DROP TABLE IF EXISTS never")
    first, second, third = (submit(conn, "CREATE TABLE never ()", label) for label in "abc")
    ask(conn, "cancel", first, 1000)
    assert one(conn, "SELECT pg_background_cancel_by_label('b', 1000)") == 1
    # All of the session's, that which runs too.
    assert one(conn, "SELECT pg_background_cancel_all()") == 2
    for handle in (first, second, third):
        assert ask(conn, "wait", handle) is True
        assert state(conn, handle) == "canceled"
        assert ask(conn, "error_info", handle, columns="sqlstate") == "57014"
    gate.open()
    wait_until(lambda: "running" not in str(listed(conn)))
    assert one(observer, "SELECT to_regclass('never')") is None
    assert one(conn, "SELECT pg_background_purge()") == 4
    assert listed(conn) == []


def test_one_that_may_be_tried_again_is_cancelled_as_well(
    conn: Connection, observer: Connection, gate: Gate, full: int
) -> None:
    observer.execute("DROP TABLE IF EXISTS never")
    call = "pg_background_submit('CREATE TABLE never ()', NULL, 'x', retries => 3)"
    cookie = one(conn, f"SELECT (h).cookie FROM (SELECT {call} AS h) s")
    assert state(conn, (None, cookie)) == "queued"
    ask(conn, "cancel", (None, cookie), 1000)
    assert ask(conn, "wait", (None, cookie)) is True
    assert state(conn, (None, cookie)) == "canceled"
    gate.open()
    wait_until(lambda: "running" not in str(listed(conn)))
    assert one(observer, "SELECT to_regclass('never')") is None


def test_a_detached_job_stays_queued(
    conn: Connection, observer: Connection, gate: Gate, full: int
) -> None:
    observer.execute("DROP TABLE IF EXISTS detached; CREATE TABLE detached (n int)")
    handle = submit(conn, "INSERT INTO detached VALUES (1)")
    ask(conn, "detach", handle)
    assert [cookie for cookie, *_ in listed(conn)] != [handle[1]]
    assert state(conn, handle) == "queued"
    error = failure(conn, f"SELECT pg_background_detach(NULL, {handle[1]})".encode())
    assert error.sqlstate == "42704"
    gate.open()
    assert ask(conn, "wait", handle) is True
    assert state(conn, handle) == "stopped"
    assert one(observer, "SELECT count(*) FROM detached") == 1
    assert len(listed(conn)) == 1


def test_queued_jobs_keep_no_launch_of_their_session_waiting(conn: Connection, gate: Gate) -> None:
    conn.execute("SET pg_background.max_workers = 1; SET pg_background.queue = on")
    first = submit(conn, gate.sql)
    assert first[0] is not None
    ask(conn, "detach", first)
    # The one that runs counts for what is submitted, though it is detached.
    queued = submit(conn, "SELECT 1")
    assert queued[0] is None
    pid = launch(conn, "SELECT 7")
    assert one(conn, f"SELECT * FROM pg_background_result({pid}) AS (n int)") == 7
    assert state(conn, queued) == "queued"
    gate.open()
    assert ask(conn, "wait", queued) is True
    assert state(conn, queued) == "stopped"


def test_queued_jobs_outlive_their_session_and_keep_its_limit(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection, gate: Gate
) -> None:
    observer.execute("DROP TABLE IF EXISTS at_once; CREATE TABLE at_once (n int)")
    counts = (
        "INSERT INTO at_once SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name LIKE 'pg_background:limited:%' AND state = 'active';"
        " SELECT pg_sleep(0.05)"
    )
    with proxy.connect(dbname=scratch) as other:
        other.execute("SET pg_background.max_workers = 2; SET pg_background.queue = on")
        pids = [launch(other, gate.sql) for _ in range(2)]
        handles = [submit(other, counts, "limited") for _ in range(8)]
    assert all(state(conn, handle) == "queued" for handle in handles)
    assert pids
    gate.open()
    for handle in handles:
        assert ask(conn, "wait", handle) is True
        assert state(conn, handle) == "stopped"
    assert one(observer, "SELECT count(*) FROM at_once") == 8
    assert one(observer, "SELECT max(n) FROM at_once") <= 2


def test_what_others_may_do_with_it(
    proxy: Proxy, scratch: str, conn: Connection, gate: Gate, full: int
) -> None:
    handle = submit(conn, "SELECT 1")
    with proxy.connect(dbname=scratch) as other:
        assert state(other, handle) == "queued"
        rows = other.execute("SELECT cookie, pid, state FROM pg_background_list_all()").fetchall()
        assert [row[1:] for row in rows if row[0] == handle[1]] == [(None, "queued")]
        ask(other, "cancel", handle)
        assert state(other, handle) == "canceled"
    with (
        executors(conn, "alice"),
        proxy.connect(dbname=scratch, user="alice") as stranger,
    ):
        assert state(stranger, handle) is None
        error = failure(stranger, f"SELECT pg_background_cancel(NULL, {handle[1]})".encode())
        assert error.sqlstate in ("42501", "42704")
    gate.open()


def test_its_result_is_not_to_be_had(conn: Connection, gate: Gate, full: int) -> None:
    _, cookie = submit(conn, "SELECT 1")
    error = failure(conn, f"SELECT * FROM pg_background_result(NULL, {cookie})".encode())
    assert message(error) == (
        "0A000",
        "results are disabled for this cookie (submitted via submit_v2)",
    )
    error = failure(conn, "SELECT pg_background_cancel(NULL, 4711)")
    assert message(error) == (
        "42704",
        "no background worker has this cookie",
    )
    # A cookie that is NULL names nothing.
    assert one(conn, "SELECT pg_background_wait(NULL, NULL)") is None
    assert one(conn, "SELECT pg_background_detach(1, NULL)") is None
    gate.open()


def test_arrays_of_handles(conn: Connection, gate: Gate, full: int) -> None:
    handles = [submit(conn, "SELECT 1") for _ in range(3)]
    rows = ", ".join(f"ROW(NULL, {cookie})" for _, cookie in handles)
    array = f"ARRAY[{rows}]::record[]"
    assert one(conn, f"SELECT (pg_background_wait_any({array}, 50)).cookie") is None
    gate.open()
    assert one(conn, f"SELECT (pg_background_wait_any({array}, 20000)).pid") is not None
    drained = conn.execute(f"SELECT * FROM pg_background_drain({array}, 20000)".encode()).fetchall()
    assert [(row[1], row[2]) for row in drained] == [(cookie, "stopped") for _, cookie in handles]


def test_clients_get_a_handle_without_a_pid(client: Client, gate: Gate) -> None:
    client.rows("SET pg_background.max_workers = 1")
    client.rows("SET pg_background.queue = on")
    client.launch(gate.sql)
    [[pid, cookie]] = client.rows(SUBMIT.format("'SELECT 1'", "'x'"))
    assert pid is None
    [[handle]] = client.texts("SELECT pg_background_submit('SELECT 2')")
    assert handle is not None
    assert handle.startswith("(,")
    assert client.one(f"SELECT (pg_background_outcome(NULL, {cookie})).state") == "queued"
    states = client.texts("SELECT pid, state FROM pg_background_list")
    assert states[1:] == [(None, "queued"), (None, "queued")]
    activity = client.texts("SELECT pid, pgbg_state, query FROM pg_background_activity")
    assert activity[1:] == [(None, "queued", None)] * 2
    gate.open()
    assert client.call("wait", "NULL", cookie) == "t"


def test_a_launch_that_the_server_refuses_is_an_error_of_the_job(
    start_proxy: StartProxy, server: Server, scratch: str, conn: Connection, gate: Gate
) -> None:
    proxy = start_proxy("--spares", "0")
    with server.connect(dbname=scratch) as admin:
        admin.execute("CREATE ROLE soon_gone LOGIN")
        with (
            executors(admin, "soon_gone"),
            proxy.connect(dbname=scratch, user="soon_gone") as session,
        ):
            session.execute("SET pg_background.max_workers = 1; SET pg_background.queue = on")
            launch(session, gate.sql)
            handle = submit(session, "SELECT 1")
            admin.execute("ALTER ROLE soon_gone NOLOGIN")
            gate.open()
            assert ask(session, "wait", handle) is True
            assert state(session, handle) == "error"
            assert ask(session, "error_info", handle, columns="sqlstate") == "28000"
        admin.execute("DROP ROLE soon_gone")
    proxy.wait_for_log("job ended: .*user=soon_gone .*state=error .*sqlstate=28000")


# --- bounds --------------------------------------------------------------------------------------


def test_no_more_are_queued_than_a_role_may_have(
    start_proxy: StartProxy, scratch: str, gate: Gate
) -> None:
    proxy = start_proxy("--max-queued-jobs", "3", "--max-workers", "1", "--queue", "on")
    with proxy.connect(dbname=scratch) as conn, proxy.connect(dbname=scratch) as other:
        launch(conn, gate.sql)
        handles = [submit(conn, "SELECT 1") for _ in range(3)]
        launch(other, gate.sql)
        for session in (conn, other):
            error = failure(session, "SELECT pg_background_submit('SELECT 1')")
            assert message(error) == ("53400", "too many queued background workers")
            assert error.diag.message_detail == (
                '3 jobs of role "postgres" are queued, and max_queued_jobs is 3.'
            )
        ask(conn, "cancel", handles[1])
        assert submit(conn, "SELECT 1")[0] is None
        gate.open()
        assert ask(conn, "wait", handles[2]) is True


def test_their_memory_is_bounded(start_proxy: StartProxy, scratch: str, gate: Gate) -> None:
    proxy = start_proxy("--role-queue-memory", "1MB", "--max-workers", "1", "--queue", "on")
    with proxy.connect(dbname=scratch) as conn:
        launch(conn, gate.sql)
        long = f"SELECT 1 -- {'x' * 400_000}"
        handles = [submit(conn, long) for _ in range(2)]
        error = failure(conn, "SELECT pg_background_submit(%s)", [long])
        assert message(error) == ("53400", "too many queued background workers")
        gate.open()
        for handle in handles:
            assert ask(conn, "wait", handle) is True
            assert state(conn, handle) == "stopped"


# --- other kinds of room, other processes --------------------------------------------------------


def test_the_proxys_limit(start_proxy: StartProxy, scratch: str, gate: Gate) -> None:
    proxy = start_proxy("--max-jobs", "2", "--queue", "on")
    with proxy.connect(dbname=scratch) as conn, proxy.connect(dbname=scratch) as other:
        for session in (conn, other):
            launch(session, gate.sql)
        handles = [submit(session, "SELECT 1") for session in (conn, other, conn)]
        assert [state(conn, handle) for handle in handles] == ["queued"] * 3
        gate.open()
        for handle in handles:
            assert ask(conn, "wait", handle) is True
            assert state(conn, handle) == "stopped"


def test_sessions_of_other_processes_know_it(
    start_proxy: StartProxy, scratch: str, gate: Gate
) -> None:
    proxy = start_proxy("--workers", "2", "--max-workers", "1", "--queue", "on")
    with sessions(proxy, dbname=scratch) as (here, there):
        launch(here, gate.sql)
        cancelled, runs = (submit(here, "SELECT 1") for _ in range(2))
        assert state(there, cancelled) == state(there, runs) == "queued"
        ask(there, "cancel", cancelled)
        assert state(there, cancelled) == state(here, cancelled) == "canceled"
        assert ask(there, "wait", runs, 50) is False
        gate.open()
        assert ask(there, "wait", runs) is True
        assert state(there, runs) == "stopped"
        assert ask(there, "outcome", runs, columns="pid") is not None


def test_the_proxy_ends_when_they_have_run(
    start_proxy: StartProxy, scratch: str, observer: Connection, gate: Gate
) -> None:
    observer.execute("DROP TABLE IF EXISTS last_words; CREATE TABLE last_words (n int)")
    proxy = start_proxy("--max-workers", "1", "--queue", "on")
    with proxy.connect(dbname=scratch) as conn:
        launch(conn, gate.sql)
        for number in range(3):
            submit(conn, f"INSERT INTO last_words VALUES ({number})")
    gate.open()
    assert proxy.stop() == 0
    assert one(observer, "SELECT count(*) FROM last_words") == 3


def test_what_has_not_run_when_the_proxy_ends_is_logged(
    start_proxy: StartProxy, scratch: str, observer: Connection, gate: Gate
) -> None:
    observer.execute("DROP TABLE IF EXISTS unsaid")
    proxy = start_proxy("--max-workers", "1", "--queue", "on", "--shutdown-timeout", "100ms")
    with proxy.connect(dbname=scratch) as conn:
        launch(conn, gate.sql)
        submit(conn, "CREATE TABLE unsaid ()")
    assert proxy.stop() == 0
    assert "ending what still runs: 0 sessions, 2 jobs" in proxy.log
    assert re.search("job ended: label=x .*state=canceled", proxy.log)
    gate.open()
    assert one(observer, "SELECT to_regclass('unsaid')") is None


# --- from inside the database --------------------------------------------------------------------


@pytest.fixture
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The database has the extension."""
    yield from with_extension(server, proxy, scratch)


AUDIT: Final = """
CREATE FUNCTION audit(event text) RETURNS void LANGUAGE plpgsql SET pg_background.queue = on AS $$
DECLARE h pg_background_handle;
BEGIN
  h := pg_background_submit(format('INSERT INTO audited VALUES (%L)', event));
  PERFORM pg_background_detach(h.pid, h.cookie);
END $$
"""


@pytest.mark.usefixtures("extension")
def test_functions_queue_too(proxy: Proxy, scratch: str, observer: Connection, gate: Gate) -> None:
    observer.execute("DROP TABLE IF EXISTS audited; CREATE TABLE audited (event text)")
    observer.execute(AUDIT)
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.max_workers = 1")
        launch(conn, gate.sql)
        for number in range(5):
            conn.execute(f"SELECT audit('{number}')".encode())
        assert len(listed(conn)) == 1
        conn.execute("SET pg_background.queue = on")
        handle = inside(conn, "pg_background_submit('SELECT 1')")
        cookie = int(handle.strip("(,)"))
        assert inside(conn, f"(pg_background_outcome(NULL, {cookie})).state") == "queued"
        assert inside(conn, f"pg_background_wait(NULL, {cookie}, 10)") == "false"
        assert inside(conn, "pg_background_wait(NULL, NULL, 10)") is None
        gate.open()
        assert inside(conn, f"pg_background_wait(NULL, {cookie})") == "true"
        assert inside(conn, f"(pg_background_outcome(NULL, {cookie})).state") == "stopped"
    wait_until(lambda: one(observer, "SELECT count(*) FROM audited") == 5)
    observer.execute("DROP FUNCTION audit; DROP TABLE audited")
