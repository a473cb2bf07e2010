"""What the extension's users write (API.md), typed into psql as it stands there, with the functions
in the database."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.background import wait_until
from tests.support.servers import Connection, Proxy, Server, database, psql

pytestmark = pytest.mark.every_server


@pytest.fixture(scope="module")
def dbname(server: Server, proxy: Proxy) -> Iterator[str]:
    with database(server, "examples") as name:
        done = psql(
            proxy.port,
            *("-v", "ON_ERROR_STOP=1"),
            input="CREATE EXTENSION pg_background; CREATE TABLE t (n int);"
            "INSERT INTO t VALUES (1); CREATE TABLE audit_log (at timestamptz, e text);",
            dbname=name,
        )
        assert done.returncode == 0, done.stderr
        yield name


@pytest.fixture
def observer(server: Server, dbname: str) -> Iterator[Connection]:
    with server.connect(dbname=dbname) as conn:
        yield conn


def say(proxy: Proxy, dbname: str, script: str) -> list[str]:
    """The lines that psql prints, unaligned, without headings."""
    done = psql(proxy.port, "-At", "-v", "ON_ERROR_STOP=1", input=script, dbname=dbname)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tutorial(proxy: Proxy, dbname: str) -> None:
    lines = say(
        proxy,
        dbname,
        r"""
        SELECT pg_background_launch('SELECT pg_sleep(50);') AS pid \gset
        DO $$ BEGIN -- until the backend has been given a CPU
          FOR i IN 1..1000 LOOP
            PERFORM pg_stat_clear_snapshot();
            EXIT WHEN EXISTS (SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(50);');
            PERFORM pg_sleep(0.01);
          END LOOP;
        END $$;
        SELECT backend_type, query FROM pg_stat_activity WHERE pid = :pid;
        SELECT pg_terminate_backend(:pid);
        CREATE TABLE bg_test (id serial PRIMARY KEY, data text, created_at timestamp DEFAULT now());
        SELECT pg_background_launch('INSERT INTO bg_test (data) SELECT ''Record '' || generate_series(1, 1000)') AS pid \gset
        SELECT * FROM pg_background_result(:pid) AS (result text);
        SELECT pg_background_launch('SELECT count(*) FROM bg_test') AS pid \gset
        SELECT * FROM pg_background_result(:pid) AS (rows_inserted bigint);
        SELECT pg_background_launch('vacuum verbose bg_test') AS pid \gset
        SELECT pg_background_result(:pid);
        SELECT pg_background_launch('SELECT 1') AS pid \gset
        SELECT pg_background_detach(:pid);
        CREATE ROLE some_role;
        SELECT grant_pg_background_privileges('some_role', true);
        SELECT revoke_pg_background_privileges('some_role', true);
        DROP ROLE some_role;
        SELECT count(*) > 0 FROM (SELECT backend_type FROM pg_stat_activity) s
          WHERE backend_type = 'client backend';
        DROP TABLE bg_test;
        """,  # noqa: E501
    )
    assert lines == [
        *("DO", "pg_background|SELECT pg_sleep(50);", "t"),
        *("CREATE TABLE", "INSERT 0 1000", "1000"),
        *("VACUUM", "", "CREATE ROLE", "t", "t", "DROP ROLE", "t", "DROP TABLE"),
    ]


def test_objects(proxy: Proxy, dbname: str) -> None:
    lines = say(proxy, dbname, r"\dx+ pg_background")
    assert "function pg_background_launch(text,integer)" in lines


def test_launch_in_a_block(proxy: Proxy, dbname: str, observer: Connection) -> None:
    lines = say(
        proxy,
        dbname,
        """
        DO $$ DECLARE h pg_background_handle; BEGIN
          SELECT * INTO h FROM pg_background_launch_v2('INSERT INTO t SELECT 1');  PERFORM pg_background_detach_v2(h.pid, h.cookie); END $$;
        """,  # noqa: E501
    )
    assert lines == ["DO"]
    wait_until(lambda: observer.execute("SELECT count(*) FROM t").fetchone() == (2,))
    observer.execute("DELETE FROM t")


def test_handles_in_psql(proxy: Proxy, dbname: str) -> None:
    lines = say(
        proxy,
        dbname,
        r"""
        SELECT (h).pid AS p, (h).cookie AS c FROM (SELECT pg_background_launch_v2('SELECT 1', 65536) AS h) s \gset
        SELECT * FROM pg_background_result_v2(:p, :c) AS (n int);
        SELECT (pg_background_launch_v2('VACUUM t', 0, 'nightly')).* \gset h_
        SELECT pg_background_wait(:h_pid, :h_cookie);
        SELECT label, state FROM pg_background_list WHERE pid = :h_pid;
        SELECT command_tag, completed FROM pg_background_result_info_v2(:h_pid, :h_cookie);
        """,  # noqa: E501
    )
    assert lines == ["1", "t", "nightly|stopped", "VACUUM|t"]


def test_nested_calls(proxy: Proxy, dbname: str, observer: Connection) -> None:
    observer.execute("DELETE FROM t")
    lines = say(
        proxy,
        dbname,
        """
        SELECT * FROM pg_background_result(pg_background_launch('SELECT count(*) FROM t')) AS (n bigint);
        SELECT pg_background_detach(pg_background_launch('SELECT 1'));
        """,  # noqa: E501
    )
    assert lines == ["0", ""]


def test_launch_for_each_row(proxy: Proxy, dbname: str) -> None:
    lines = say(
        proxy,
        dbname,
        """
        SELECT pg_background_launch(format('VACUUM (ANALYZE) %I', tablename)) FROM pg_tables WHERE schemaname = 'public';
        SELECT l.pid, pg_background_wait_v2_timeout(l.pid, l.cookie, 60000) FROM pg_tables t, LATERAL pg_background_launch_v2(format('ANALYZE %I', tablename), 0, 'a-' || tablename) l WHERE schemaname = 'public';
        """,  # noqa: E501
    )
    assert len(lines) == 6  # audit_log, t and the extension's own table
    assert all(re.fullmatch(r"\d+", line) for line in lines[:3])
    assert all(re.fullmatch(r"\d+\|t", line) for line in lines[3:])


def test_autonomous_transaction(proxy: Proxy, dbname: str, observer: Connection) -> None:
    say(
        proxy,
        dbname,
        """
        CREATE FUNCTION log_audit(e text) RETURNS void LANGUAGE plpgsql AS $$ DECLARE h pg_background_handle; BEGIN
          h := pg_background_submit_v2(format('INSERT INTO audit_log VALUES (now(), %L)', e));  PERFORM pg_background_detach_v2(h.pid, h.cookie); END $$;
        BEGIN;
        SELECT log_audit('it''s an audit row');
        ROLLBACK;
        """,  # noqa: E501
    )
    rows = wait_until(lambda: observer.execute("SELECT e FROM audit_log").fetchall())
    assert rows == [("it's an audit row",)]


def test_settings(proxy: Proxy, dbname: str) -> None:
    lines = say(
        proxy,
        dbname,
        """
        SHOW pg_background.max_workers; SHOW pg_background.default_queue_size;
        SET pg_background.worker_timeout = '5min'; SHOW pg_background.worker_timeout;
        """,
    )
    assert lines == ["16", "64kB", "SET", "5min"]


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("pg_background_list_v2() AS (pid int4, cookie int8, launched_at timestamptz, user_id oid,"
         " queue_size int4, state text, sql_preview text, last_error text, consumed bool)", 9),
        ("pg_background_list() AS (pid int4, cookie int8, launched_at timestamptz, user_id oid,"
         " queue_size int4, state text, sql_preview text, last_error text, consumed bool,"
         " label text)", 10),
        ("pg_background_list", 10),
        ("pg_background_activity", 17),
        ("pg_background_stats_v2()", 7),
        ("pg_background_stats()", 8),
        ("pg_background_get_progress_v2(:pid, :cookie)", 2),
        ("pg_background_result_info_v2(:pid, :cookie)", 4),
        ("pg_background_result_info(:pid, :cookie)", 6),
        ("pg_background_error_info_v2(:pid, :cookie)", 5),
        ("pg_background_outcome_v2(:pid, :cookie)", 12),
        ("pg_background_status_v2(:pid, :cookie)", 1),
        ("pg_background_run_v2('SELECT 1')", 14),
        ("pg_background_run_query_v2('SELECT 1, 2') AS (a int, b int)", 2),
        ("pg_background_drain_v2(ARRAY[(:pid, :cookie)::pg_background_handle], 1000)", 12),
        ("pg_background_wait_any_v2(ARRAY[(:pid, :cookie)::pg_background_handle])", 2),
    ],
)  # fmt: skip
def test_rows_of_functions_and_views_in_queries(
    proxy: Proxy, dbname: str, query: str, columns: int
) -> None:
    """Inside a statement that the proxy does not serve, and that the server must."""
    lines = say(
        proxy,
        dbname,
        r"SELECT * FROM pg_background_launch_v2('SELECT 1') \gset"
        "\nSELECT pg_background_wait_v2(:pid, :cookie);\n"
        f"WITH f AS (SELECT * FROM {query}) SELECT f.* FROM f, generate_series(1, 2);",
    )
    assert lines[0] == ""
    assert len(lines) == 3
    assert lines[1] == lines[2]
    assert lines[1].count("|") == columns - 1 or "_status_" in query
