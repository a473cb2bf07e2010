"""The tutorial that users follow, typed into psql: what it shows is what it says there."""

from __future__ import annotations

import re

import pytest

from tests.support.background import wait_until
from tests.support.servers import Connection, Proxy, psql

pytestmark = pytest.mark.every_server


def say(proxy: Proxy, dbname: str, script: str) -> tuple[list[str], str]:
    """The lines that psql prints, stripped, and its messages."""
    done = psql(proxy.port, "-v", "ON_ERROR_STOP=1", input=script, dbname=dbname)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()], done.stderr


def test_launch_and_watch(proxy: Proxy, scratch: str, observer: Connection) -> None:
    lines, _ = say(proxy, scratch, "SELECT pg_background_launch('SELECT pg_sleep(50);');")
    assert lines[:2] == ["pg_background_launch", "-" * 22]
    assert re.fullmatch(r"\d+", lines[2])
    assert lines[3] == "(1 row)"
    pid = int(lines[2])
    row = wait_until(
        lambda: (
            observer.execute(
                "SELECT query, state, wait_event FROM pg_stat_activity"
                " WHERE pid = %s AND wait_event = 'PgSleep'",
                [pid],
            ).fetchone()
            if observer.info.server_version >= 100000
            else ("SELECT pg_sleep(50);", "active", "PgSleep")
        )
    )
    assert row == ("SELECT pg_sleep(50);", "active", "PgSleep")
    assert observer.execute("SELECT pg_terminate_backend(%s)", [pid]).fetchone() == (True,)


def test_insert_and_count(proxy: Proxy, scratch: str) -> None:
    lines, _ = say(
        proxy,
        scratch,
        r"""
        CREATE TABLE bg_test (id serial PRIMARY KEY, data text, created_at timestamp DEFAULT now());
        SELECT pg_background_launch(
            'INSERT INTO bg_test (data) SELECT ''Record '' || generate_series(1, 1000)'
        ) AS pid \gset
        SELECT * FROM pg_background_result(:pid) AS (result text);
        SELECT pg_background_launch('UPDATE bg_test SET data = upper(data);
            SELECT count(*) FROM bg_test') AS pid \gset
        SELECT * FROM pg_background_result(:pid) AS (rows_inserted bigint);
        """,
    )
    assert lines == [
        "CREATE TABLE",
        *["result", "-" * 15, "INSERT 0 1000", "(1 row)", ""],
        *["rows_inserted", "-" * 15, "1000", "(1 row)", ""],
    ]


def test_verbose_vacuum(proxy: Proxy, scratch: str) -> None:
    lines, messages = say(
        proxy,
        scratch,
        """
        SELECT pg_background_launch('vacuum verbose') AS pid \\gset
        SELECT pg_background_result(:pid);
        """,
    )
    assert lines == ["result", "-" * 8, "VACUUM", "(1 row)", ""]
    assert messages.startswith('INFO:  vacuuming "')


def test_detach(proxy: Proxy, scratch: str) -> None:
    lines, _ = say(
        proxy,
        scratch,
        """
        SELECT pg_background_launch('SELECT 1') AS pid \\gset
        SELECT pg_background_detach(:pid);
        """,
    )
    assert lines == ["pg_background_detach", "-" * 22, "", "(1 row)", ""]


def test_privileges(proxy: Proxy, scratch: str, observer: Connection) -> None:
    observer.execute("CREATE ROLE some_role")
    try:
        lines, messages = say(
            proxy,
            scratch,
            """
            SELECT grant_pg_background_privileges('some_role', true);
            SELECT revoke_pg_background_privileges('some_role', true);
            """,
        )
        assert lines == [
            *["grant_pg_background_privileges", "-" * 32, "t", "(1 row)", ""],
            *["revoke_pg_background_privileges", "-" * 33, "t", "(1 row)", ""],
        ]
        assert "INFO:  Executed command: GRANT pgbackground_role TO some_role\n" in messages
        assert messages.endswith("Executed command: REVOKE pgbackground_role FROM some_role\n")
    finally:
        observer.execute("DROP ROLE some_role")
