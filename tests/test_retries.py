"""Jobs that are tried again: which errors, how often, and what ends it.

How often a job was tried is counted by a sequence, which no rollback undoes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from proxy.jobs import retries
from tests.support.api_clients import Client, Gate, Refused, quoted
from tests.support.background import failure, wait_until
from tests.support.in_database import one, with_extension
from tests.support.servers import Connection, Proxy, Server

pytestmark = pytest.mark.every_server

FLAKY = """
CREATE SEQUENCE IF NOT EXISTS tries;
CREATE OR REPLACE FUNCTION flaky(failures int, state text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE n bigint := nextval('tries');
BEGIN
  IF n <= failures THEN
    RAISE EXCEPTION USING ERRCODE = state, MESSAGE = format('attempt %s', n);
  END IF;
  RETURN n;
END $$;
CREATE TABLE IF NOT EXISTS tried (n bigint);
"""
PROCEDURE = """
CREATE OR REPLACE PROCEDURE flaky_procedure(failures int) LANGUAGE plpgsql AS $$
BEGIN PERFORM flaky(failures, '40001'); END $$;
"""


@pytest.fixture(autouse=True)
def flaky(observer: Connection) -> None:
    observer.execute(FLAKY)
    if observer.info.server_version >= 110000:
        observer.execute(PROCEDURE)
    observer.execute("ALTER SEQUENCE tries RESTART; TRUNCATE tried")


def tries(observer: Connection) -> int:
    last, is_called = observer.execute("SELECT last_value, is_called FROM tries").fetchall()[0]
    return int(last) if is_called else 0


def run(job: str, further: object, *, timeout_ms: int = 0) -> str:
    return (
        "SELECT state, sqlstate, error_message, attempts, timed_out"
        f" FROM pg_background_run({quoted(job)}, 0, {timeout_ms}, 'again', retries => {further})"
    )


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "53200", "57P03"])
def test_what_may_pass_is_tried_again(client: Client, observer: Connection, sqlstate: str) -> None:
    job = f"INSERT INTO tried SELECT flaky(2, '{sqlstate}')"
    assert client.texts(run(job, 3)) == [("stopped", None, None, "3", "f")]
    assert tries(observer) == 3
    assert observer.execute("SELECT n FROM tried").fetchall() == [(3,)]
    assert client.one("SELECT workers_launched FROM pg_background_stats()") == "1"


@pytest.mark.parametrize(
    "sqlstate", ["08006", "22012", "40003", "55P03", "57014", "57P01", "P0001"]
)
def test_other_errors_are_the_end(client: Client, observer: Connection, sqlstate: str) -> None:
    [row] = client.texts(run(f"SELECT flaky(1, '{sqlstate}')", 3))
    assert row == ("error", sqlstate, "attempt 1", "1", "f")
    assert tries(observer) == 1


def test_the_last_error_stays_when_attempts_are_used_up(
    client: Client, observer: Connection
) -> None:
    [row] = client.texts(run("SELECT flaky(9, '40001')", 2))
    assert row == ("error", "40001", "attempt 3", "3", "f")
    assert tries(observer) == 3


def test_never_by_default(client: Client, observer: Connection) -> None:
    for number, call in enumerate(("'{}', 0, 0, NULL", "'{}', 0, 0, NULL, 0", "'{}'"), 1):
        arguments = call.format("SELECT flaky(9, ''40001'')")
        assert client.one(f"SELECT (pg_background_run({arguments})).state") == "error"
        assert tries(observer) == number


def test_bounds(client: Client) -> None:
    refused = Refused("22023", "retries must be between 0 and 10")
    for number in ("-1", "11", "2147483647"):
        assert client.error(run("SELECT 1", number)) == refused
        submit = f"SELECT pg_background_submit('SELECT 1', 0, NULL, {number})"
        assert client.error(submit) == refused
    assert client.texts(run("SELECT 1", "NULL")) == [("stopped", None, None, "1", "f")]
    assert client.error("SELECT pg_background_run(NULL, 0, 0, NULL, 1)").sqlstate == "22004"
    long = "SELECT 1 --" + "x" * 1024 * 1024
    assert client.error(run(long, 1)) == Refused(
        "54000", "the SQL string is too long to be tried again"
    )


def test_submit(client: Client, observer: Connection) -> None:
    sql = quoted("INSERT INTO tried SELECT flaky(2, '40P01')")
    [[pid, cookie]] = client.texts(
        f"SELECT * FROM pg_background_submit({sql}, 0, 'x', retries => 2)"
    )
    handle = f"{pid}, {cookie}"
    assert client.call("wait", handle) == "t"
    columns = "state, has_error, label"
    assert client.texts(f"SELECT {columns} FROM pg_background_outcome({handle})") == [
        ("stopped", "f", "x")
    ]
    assert '"attempts": 3' in str(client.call("status_v2", handle))
    assert tries(observer) == 3
    assert client.texts("SELECT pid FROM pg_background_list") == [(pid,)]


def test_a_detached_job_is_tried_again(client: Client, observer: Connection) -> None:
    sql = quoted("INSERT INTO tried SELECT flaky(2, '40001')")
    client.rows(
        "SELECT pg_background_detach(h.pid, h.cookie) FROM"
        f" pg_background_submit({sql}, 0, NULL, 5) h"
    )
    wait_until(lambda: observer.execute("SELECT n FROM tried").fetchall() == [(3,)])


def test_it_outlives_its_session(proxy: Proxy, scratch: str, observer: Connection) -> None:
    with proxy.connect(dbname=scratch) as conn:
        job = "INSERT INTO tried SELECT flaky(3, '40001')"
        conn.execute(f"SELECT pg_background_submit($${job}$$, 0, NULL, 5)".encode())
    wait_until(lambda: observer.execute("SELECT n FROM tried").fetchall() == [(4,)])


def test_what_may_have_committed_is_refused(client: Client, observer: Connection) -> None:
    for job, word in (
        ("CALL flaky_procedure(1)", "CALL"),
        ("DO $$BEGIN PERFORM flaky(1, '40001'); END$$", "DO"),
        ("VACUUM tried", "VACUUM"),
        ("CREATE INDEX CONCURRENTLY ON tried (n)", "CREATE"),
        ("/* SELECT */ ANALYZE", "ANALYZE"),
    ):
        [row] = client.texts(run(job, 3))
        assert row == (
            *("error", "0A000", f"a job of {word} alone cannot be tried again", "1", "f"),
        )
    assert tries(observer) == 0


@pytest.mark.parametrize(
    "job",
    [
        "SELECT 1; CALL flaky_procedure(2)",
        "((SELECT flaky(2, '40001')))",
        "WITH f AS (SELECT flaky(2, '40001') AS n) INSERT INTO tried SELECT n FROM f",
    ],
)
def test_what_is_one_transaction_is_not(client: Client, observer: Connection, job: str) -> None:
    if "CALL" in job and observer.info.server_version < 110000:
        pytest.skip("there are no procedures before version 11")
    assert client.texts(run(job, 3)) == [("stopped", None, None, "3", "f")]
    assert tries(observer) == 3


def test_a_lost_connection_is_the_end(client: Client, observer: Connection, gate: Gate) -> None:
    sql = quoted(f"SELECT flaky(0, '40001'); {gate.sql}")
    [[pid, cookie]] = client.texts(f"SELECT * FROM pg_background_submit({sql}, 0, NULL, 5)")
    wait_until(lambda: tries(observer) == 1)
    observer.execute("SELECT pg_terminate_backend(%s)", [int(str(pid))])
    gate.open()
    assert client.call("wait", pid, cookie) == "t"
    columns = "state, sqlstate"
    outcome = f"SELECT {columns} FROM pg_background_outcome({pid}, {cookie})"
    assert client.texts(outcome) == [("error", "08006")]
    assert tries(observer) == 1


def test_time_out_holds_over_all_attempts(client: Client, observer: Connection) -> None:
    [row] = client.texts(run("SELECT flaky(99, '40001')", 10, timeout_ms=2500))
    assert row[0] == "canceled"
    assert row[4] == "t"
    started = int(row[3] or 0)
    assert 2 <= started < 11
    # The last may be canceled before it comes to the function.
    assert tries(observer) in (started - 1, started)


def test_statement_timeout_holds_over_all_attempts(conn: Connection, observer: Connection) -> None:
    conn.execute("SET statement_timeout = 2500")
    error = failure(conn, run("SELECT flaky(99, '40001')", 10))
    assert error.sqlstate == "57014"
    counted = tries(observer)
    assert 2 <= counted < 11
    conn.execute("RESET statement_timeout")
    # Nothing goes on behind the caller's back.
    active = conn.execute("SELECT workers_active FROM pg_background_stats()").fetchall()
    assert active == [(0,)]
    assert tries(observer) == counted


def test_cancel_in_a_pause(client: Client, observer: Connection) -> None:
    sql = quoted("SELECT flaky(99, '40001')")
    [[pid, cookie]] = client.texts(f"SELECT * FROM pg_background_submit({sql}, 0, NULL, 10)")
    wait_until(lambda: tries(observer) >= 3)  # the pauses are long by now
    client.call("cancel", pid, cookie, 5000)
    outcome = f"SELECT state, sqlstate FROM pg_background_outcome({pid}, {cookie})"
    assert client.texts(outcome) == [("canceled", "57014")]
    assert client.texts("SELECT workers_canceled, workers_active FROM pg_background_stats()") == [
        ("1", "0")
    ]


def test_cancel_of_a_later_attempt(client: Client, observer: Connection, gate: Gate) -> None:
    """It ends the backend that the job runs on then, not the one of its pid."""
    sql = quoted(f"SELECT flaky(1, '40001'); {gate.sql}; INSERT INTO tried VALUES (1)")
    [[pid, cookie]] = client.texts(f"SELECT * FROM pg_background_submit({sql}, 0, 'late', 10)")
    waiting = (
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pg_background:late:%%'"
        " AND wait_event = 'advisory'"
    )
    wait_until(lambda: observer.execute(waiting.encode()).fetchall() != [])
    [[backend]] = observer.execute(waiting.encode()).fetchall()
    assert str(backend) != pid
    client.call("cancel", pid, cookie, 5000)
    outcome = f"SELECT state FROM pg_background_outcome({pid}, {cookie})"
    assert client.one(outcome) == "canceled"
    gate.open()
    assert (
        observer.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [backend]).fetchall()
        == []
    )
    assert observer.execute("SELECT * FROM tried").fetchall() == []


def test_each_attempt_has_the_role_and_the_settings_of_the_call(
    conn: Connection, observer: Connection
) -> None:
    observer.execute("CREATE TABLE seen (who text, zone text); CREATE ROLE retrying SUPERUSER")
    try:
        conn.execute("SET TimeZone = 'Asia/Tokyo'")
        conn.execute("SET ROLE retrying")
        job = (
            "INSERT INTO seen VALUES (current_user, current_setting('TimeZone'));"
            " RESET TimeZone; RESET ROLE; SELECT flaky(2, '40001')"
        )
        [row] = conn.execute(run(job, 3)).fetchall()
        assert (row[0], row[3]) == ("stopped", 3)
        assert observer.execute("SELECT * FROM seen").fetchall() == [("retrying", "Asia/Tokyo")]
    finally:
        observer.execute("DROP TABLE seen; DROP ROLE retrying")


def test_serialization_failures_of_real_transactions(
    conn: Connection, observer: Connection
) -> None:
    """Jobs that add to one row under REPEATABLE READ: without further attempts some fail."""
    observer.execute("INSERT INTO tried VALUES (0)")
    conn.execute("SET default_transaction_isolation = 'repeatable read'")
    job = "UPDATE tried SET n = n + 1 WHERE pg_sleep(0.01) IS NOT NULL"
    handles = [
        conn.execute("SELECT * FROM pg_background_submit(%s, 0, NULL, 10)", [job]).fetchall()[0]
        for _ in range(5)
    ]
    for handle in handles:
        assert conn.execute("SELECT pg_background_wait(%s, %s)", handle).fetchall() == [(True,)]
    states = [
        conn.execute("SELECT state FROM pg_background_outcome(%s, %s)", handle).fetchall()[0][0]
        for handle in handles
    ]
    assert states == ["stopped"] * 5
    assert observer.execute("SELECT n FROM tried").fetchall() == [(5,)]


# --- from inside the database ---


@pytest.fixture(scope="module")
def _extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    yield from with_extension(server, proxy, scratch)


@pytest.mark.usefixtures("_extension")
def test_from_inside(conn: Connection, observer: Connection) -> None:
    job = "SELECT flaky(2, '40001')"
    run_it = f"pg_background_run($j${job}$j$, 0, 0, NULL, retries => 2)"
    expression = f"(r.state, r.attempts) FROM {run_it} r"
    assert one(conn, "SELECT inside(%s)", [expression]) == "(stopped,3)"
    observer.execute("ALTER SEQUENCE tries RESTART")
    job = "INSERT INTO tried SELECT flaky(2, '40001')"
    expression = f"pg_background_submit($j${job}$j$, 0, NULL, retries => 2)"
    one(conn, "SELECT inside(%s)", [expression])
    wait_until(lambda: observer.execute("SELECT n FROM tried").fetchall() == [(3,)])
    observer.execute("ALTER SEQUENCE tries RESTART")
    with pytest.raises(psycopg.Error) as caught:
        conn.execute("SELECT inside($$pg_background_submit('SELECT 1', 0, NULL, 11)$$)")
    assert caught.value.sqlstate == "22023"


@pytest.mark.usefixtures("_extension")
def test_no_room_on_the_server(proxy: Proxy, scratch: str, observer: Connection) -> None:
    """A launch that the server has no connection for is an attempt, too, of `run`."""
    observer.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 1 IN ROLE pgbackground_role")
    observer.execute("GRANT ALL ON tried, tries TO crowded")
    left = "SELECT 1 FROM pg_stat_activity WHERE usename = 'crowded'"
    try:
        with proxy.connect(dbname=scratch, user="crowded") as conn:
            assert failure(conn, run("SELECT 1", 0)).sqlstate == "53300"
            assert failure(conn, run("SELECT 1", 1)).sqlstate == "53300"
            with ThreadPoolExecutor(1) as pool:
                rows = pool.submit(lambda: conn.execute(run("SELECT 1", 10)).fetchall())
                proxy.wait_for_log(r"tried again: sqlstate=53300 attempts=2")
                observer.execute("ALTER ROLE crowded CONNECTION LIMIT 5")
                [row] = rows.result(timeout=60)
            assert row[0] == "stopped"
            assert row[3] >= 3
    finally:
        wait_until(lambda: observer.execute(left).fetchall() == [])
        observer.execute("DROP OWNED BY crowded; DROP ROLE crowded")


def test_pauses_grow_and_are_bounded() -> None:
    for attempts in range(1, 40):
        longest = min(0.1 * 2 ** (attempts - 1), 5.0)
        found = [retries.pause_after(attempts, "40001") for _ in range(50)]
        assert all(longest / 2 <= seconds <= longest for seconds in found)
        assert len(set(found)) > 1
