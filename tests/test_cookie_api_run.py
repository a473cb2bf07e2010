"""Functions that launch and wait at once, and those that wait for several: run, run_query, drain,
wait_any.
"""

from __future__ import annotations

import threading
import time
from typing import Final

import psutil
import pytest

from tests.support.api_clients import Client, Gate, Handle, Refused, handles_sql, quoted
from tests.support.background import failure, message, notices, wait_until
from tests.support.servers import Connection, Proxy

RUN: Final = [
    *("pid", "cookie", "state", "consumed", "completed", "has_error", "row_count"),
    *("command_tag", "sqlstate", "error_message", "label", "launched_at", "timed_out"),
    "elapsed_ms",
]


# --- run ---


@pytest.mark.parametrize("name", ["run_v2", "run"])
def test_run(client: Client, name: str) -> None:
    for arguments, expected in (
        ("'SELECT generate_series(1, 3)'", ("stopped", "f", "3", "SELECT", None, None, None)),
        ("'SELECT 1', 64, 20000, 'x'", ("stopped", "f", "1", "SELECT", None, None, "x")),
        ("'SELECT 1', NULL, NULL, NULL", ("stopped", "f", "1", "SELECT", None, None, None)),
        (
            "label => 'y', sql => 'SELECT 1/0'",
            ("error", "t", None, None, "22012", "division by zero", "y"),
        ),
    ):
        columns = (
            "state, has_error, row_count, command_tag, sqlstate, error_message, label,"
            " completed, timed_out"
        )
        sql = f"SELECT {columns} FROM pg_background_{name}({arguments})"
        assert client.texts(sql) == [(*expected, "t", "f")]
    [row] = client.texts(f"SELECT (pg_background_{name}('SELECT 1')).*")
    assert len(row) == len(RUN)
    assert int(row[-1] or -1) >= 0
    assert client.rows("SELECT * FROM pg_background_list") == []


def test_columns_of_run(conn: Connection) -> None:
    for name in ("run_v2", "run"):
        for sql in ("SELECT * FROM pg_background_{}('')", "SELECT (pg_background_{}('')).*"):
            description = conn.execute(sql.format(name)).description
            assert description is not None
            assert [column.name for column in description] == RUN
            assert [column.type_code for column in description][-2:] == [16, 20]


def test_run_of_null(client: Client) -> None:
    refused = Refused("22004", "sql must not be null")
    for call in ("run_v2(NULL)", "run(NULL)"):
        assert client.error(f"SELECT pg_background_{call}") == refused
    for call in ("run_query_v2(NULL)", "run_query(NULL, 0, 50, 'x')"):
        assert client.error(f"SELECT * FROM pg_background_{call} AS (n int)") == refused


def test_run_that_takes_too_long(client: Client, observer: Connection, gate: Gate) -> None:
    observer.execute("DROP TABLE IF EXISTS run_late; CREATE TABLE run_late (n int)")
    job = f"INSERT INTO run_late VALUES (1); {gate.sql}; INSERT INTO run_late VALUES (2)"
    columns = "state, sqlstate, timed_out, completed, elapsed_ms"
    sql = f"SELECT {columns} FROM pg_background_run({quoted(job)}, 0, 50)"
    [row] = client.texts(sql)
    assert row[:4] == ("canceled", "57014", "t", "t")
    # Since the job began, which is less than the limit where it took long to begin.
    assert int(row[4] or 0) > 0
    assert client.one("SELECT workers_timed_out FROM pg_background_stats()") == "1"
    gate.open()
    assert observer.execute("SELECT count(*) FROM run_late").fetchone() == (0,)


def test_run_never_waits_for_a_reader(client: Client) -> None:
    job = "SELECT repeat('x', 1000) FROM generate_series(1, 30000)"
    sql = f"SELECT row_count FROM pg_background_run({quoted(job)}, 64, 20000)"
    assert client.one(sql) == "30000"


@pytest.mark.parametrize("how", ["cancel", "statement_timeout"])
@pytest.mark.parametrize("call", ["run({})", "run_query({})"])
def test_interrupted_run_stops_its_job(
    conn: Connection, observer: Connection, gate: Gate, how: str, call: str
) -> None:
    job = f"{gate.sql} /* {how} {call} */"
    if how == "statement_timeout":
        # The job's own limit is another.
        conn.execute("SET statement_timeout = 200; SET pg_background.worker_timeout = '1h'")
    else:
        threading.Timer(0.2, conn.cancel_safe).start()
    error = failure(conn, f"SELECT * FROM pg_background_{call.format('%s')}", [job])
    assert error.sqlstate == "57014"
    conn.execute("RESET statement_timeout")
    query = "SELECT 1 FROM pg_stat_activity WHERE query = %s"
    wait_until(lambda: observer.execute(query, [job]).fetchone() is None)


def test_job_of_a_run_has_its_label(client: Client, observer: Connection, gate: Gate) -> None:
    seen: list[object] = []

    def look() -> None:
        query = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE %s"
        seen.append(wait_until(lambda: observer.execute(query, ["pg_background:ran:%"]).fetchone()))
        gate.open()

    thread = threading.Thread(target=look)
    thread.start()
    launcher = client.one("SELECT pg_backend_pid()")
    sql = f"SELECT state FROM pg_background_run({quoted(gate.sql)}, label => 'ran')"
    assert client.one(sql) == "stopped"
    thread.join()
    assert seen == [(f"pg_background:ran:{launcher}",)]


# --- run_query ---


@pytest.mark.parametrize("name", ["run_query_v2", "run_query"])
def test_run_query(client: Client, name: str) -> None:
    job = quoted("SELECT n, 'x' || n FROM generate_series(1, 2) n")
    for arguments in (job, f"{job}, 64, 20000, 'x', 'n int, t text'", f"sql => {job}"):
        sql = f"SELECT * FROM pg_background_{name}({arguments}) AS (n int, t text)"
        assert client.texts(sql) == [("1", "x1"), ("2", "x2")]
        assert client.texts(
            f"SELECT t FROM pg_background_{name}({arguments}) r (n int, t text)"
        ) == [
            ("x1",),
            ("x2",),
        ]
    assert client.rows("SELECT * FROM pg_background_list") == []


def test_run_query_without_a_definition_has_the_jobs_columns(conn: Connection) -> None:
    cursor = conn.execute("SELECT * FROM pg_background_run_query('SELECT 1 AS a, 2 AS b')")
    assert cursor.description is not None
    assert [column.name for column in cursor.description] == ["a", "b"]
    assert cursor.fetchall() == [(1, 2)]
    assert conn.execute("SELECT pg_background_run_query('VACUUM')").fetchall() == [("VACUUM",)]


def test_run_query_raises_the_jobs_error(client: Client) -> None:
    for job, refused in (
        ("SELECT 1/0", Refused("22012", "division by zero")),
        (
            "DO $$ BEGIN RAISE 'm' USING ERRCODE = 'XX123', HINT = 'h'; END $$",
            Refused("XX123", "m", "h"),
        ),
    ):
        sql = f"SELECT * FROM pg_background_run_query({quoted(job)}) AS (n int)"
        assert client.error(sql) == refused
    mismatch = "remote query result rowtype does not match the specified FROM clause rowtype"
    sql = "SELECT * FROM pg_background_run_query('SELECT 1') AS (n text)"
    assert client.error(sql) == Refused("42804", mismatch)


def test_run_query_that_takes_too_long(client: Client, gate: Gate) -> None:
    job = quoted(f"{gate.sql}; SELECT 1")
    sql = f"SELECT * FROM pg_background_run_query({job}, 0, 50) AS (n int)"
    assert client.error(sql).sqlstate == "57014"
    assert client.one("SELECT workers_timed_out FROM pg_background_stats()") == "1"


def test_notices_of_a_run_query_come_through(conn: Connection) -> None:
    with notices(conn) as collected:
        conn.execute(
            "SELECT * FROM pg_background_run_query(%s) AS (n int)",
            ["DO $$ BEGIN RAISE NOTICE 'hey'; END $$; SELECT 1"],
        )
    assert [notice["message_primary"] for notice in collected] == ["hey"]


# --- drain ---


@pytest.mark.parametrize("name", ["drain_v2", "drain"])
def test_drain_gives_outcomes_in_input_order_and_detaches(
    client: Client, gate: Gate, name: str
) -> None:
    slow = client.launch(gate.sql, "slow")
    failed = client.launch("SELECT 1/0", "failed")
    fast = client.launch("SELECT 1", "fast")
    gate.wait_for(slow)
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    unknown = Handle(999999, 5)
    array = handles_sql([slow, failed, unknown, fast])
    sql = f"SELECT label, state, pid FROM pg_background_{name}({array})"
    assert client.texts(sql) == [
        ("slow", "stopped", str(slow.pid)),
        ("failed", "error", str(failed.pid)),
        (None, None, "999999"),
        ("fast", "stopped", str(fast.pid)),
    ]
    opener.join()
    assert client.rows("SELECT * FROM pg_background_list") == []


def test_drain_has_one_deadline_for_all(client: Client, gate: Gate) -> None:
    jobs = [client.launch(gate.sql) for _ in range(3)]
    start = time.monotonic()
    rows = client.texts(f"SELECT state FROM pg_background_drain({handles_sql(jobs * 40)}, 100)")
    assert 0.1 <= time.monotonic() - start < 10  # one deadline for each would make 12
    assert rows == [("running",)] * 120


def test_drain_of_a_job_that_nobody_reads(client: Client) -> None:
    handle = client.launch("SELECT repeat('x', 1000) FROM generate_series(1, 30000)")
    sql = f"SELECT row_count FROM pg_background_drain({handles_sql([handle])}, 20000)"
    assert client.one(sql) == "30000"


@pytest.mark.parametrize(
    "handles",
    [
        "ARRAY[ROW({0})]",
        "ARRAY[({0})]::pg_background_handle[]",
        "ARRAY[ROW({0})::pg_background_handle]",
        "ARRAY[CAST(ROW({0}) AS pg_background_handle)]",
        "'{{\"({1})\"}}'",
        "'{{\"({1})\"}}'::pg_background_handle[]",
        "handles => ARRAY[ROW({0})], timeout_ms => 20000",
        "(SELECT array_agg(ROW({0})))",
    ],
)
def test_handles_are_written_in_many_ways(client: Client, handles: str) -> None:
    handle = client.launch("SELECT 1")
    array = handles.format(handle.sql, f"{handle.pid},{handle.cookie}")
    assert client.texts(f"SELECT pid, state FROM pg_background_drain({array})") == [
        (str(handle.pid), "stopped")
    ]


def test_handles_as_a_parameter(conn: Connection) -> None:
    for cast in ("", "::text", "::pg_background_handle[]"):
        row = conn.execute("SELECT (pg_background_launch_v2('SELECT 1')).*").fetchone()
        assert row is not None
        array = '{{"({},{})"}}'.format(*row)
        sql = f"SELECT pid, state FROM pg_background_drain(%s{cast})"
        assert conn.execute(sql, [array]).fetchall() == [(row[0], "stopped")]


def test_drain_of_nothing(client: Client) -> None:
    for array in ("NULL", "'{}'", "ARRAY[]::pg_background_handle[]"):
        for name in ("drain_v2", "drain"):
            assert client.rows(f"SELECT * FROM pg_background_{name}({array})") == []
            assert client.rows(f"SELECT * FROM pg_background_{name}({array}, 50)") == []
    assert client.rows("SELECT * FROM pg_background_drain('{}', NULL)") == []


@pytest.mark.parametrize(
    "array", ["'{NULL}'", "'{\"(1)\"}'", "'{\"(1,)\"}'", "'{\"(x,1)\"}'", "'{\"(1,2,3)\"}'", "'x'"]
)
def test_what_are_no_handles(conn: Connection, array: str) -> None:
    for call in (f"drain({array})", f"wait_any({array}, 5)"):
        error = failure(conn, f"SELECT * FROM pg_background_{call}")
        assert message(error) == (
            "22P02",
            "invalid input syntax for type pg_background_handle[]",
        )


# --- wait_any ---


@pytest.mark.parametrize("name", ["wait_any_v2", "wait_any"])
def test_wait_any_gives_the_first_to_end(client: Client, gate: Gate, name: str) -> None:
    slow = client.launch(gate.sql)
    second = client.launch("SELECT pg_sleep(0.1)")
    array = handles_sql([slow, second])
    for shape in ("SELECT * FROM {}", "SELECT ({}).*"):
        rows = client.texts(shape.format(f"pg_background_{name}({array})"))
        assert rows == [(str(second.pid), str(second.cookie))]
    assert client.call(name, array, 20000) == f"({second.pid},{second.cookie})"


def test_wait_any_of_several_that_have_ended_gives_the_earliest(client: Client) -> None:
    first, second = client.ended("SELECT 1"), client.ended("SELECT 1/0")
    array = handles_sql([second, first])
    assert client.call("wait_any", array) == f"({first.pid},{first.cookie})"


def test_wait_any_that_times_out(client: Client, gate: Gate) -> None:
    array = handles_sql([client.launch(gate.sql), client.launch(gate.sql)])
    assert client.call("wait_any", array, 50) is None
    sql = f"SELECT * FROM pg_background_wait_any({array}, 1)"
    assert client.texts(sql) == [(None, None)]
    assert client.call("wait_any", "'{}'") is None
    assert client.call("wait_any", "'{}'", 50) is None


def test_wait_any_with_an_unknown_handle(client: Client) -> None:
    handle = client.launch("SELECT 1")
    array = handles_sql([handle, Handle(999999, 1)])
    refused = Refused("42704", "PID 999999 is not attached to this session")
    assert client.error(f"SELECT pg_background_wait_any({array})") == refused
    wrong = client.error(f"SELECT pg_background_wait_any(ARRAY[ROW({handle.pid}, 1)])")
    assert (wrong.sqlstate, wrong.message) == ("55000", f"cookie mismatch for PID {handle.pid}")


def test_wait_any_does_not_poll(proxy: Proxy, conn: Connection, gate: Gate) -> None:
    row = conn.execute("SELECT (pg_background_launch_v2(%s)).*", [gate.sql]).fetchone()
    assert row is not None
    process = psutil.Process(proxy.pid)
    before = process.cpu_times()
    sql = f"SELECT pg_background_wait_any({handles_sql([Handle(*row)])}, 1000)"
    assert conn.execute(sql).fetchone() == (None,)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1
