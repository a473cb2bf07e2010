"""The table of `pg_background_history` in the life of a database: UPDATE, SET SCHEMA, DROP
EXTENSION, dumps; and where processes of the server or of the proxy are killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.background import failure, wait_until
from tests.support.clients import tool
from tests.support.in_database import one
from tests.support.pgbouncer import pgbouncer
from tests.support.servers import Connection, Proxy, Server, clean_environment, database

pytestmark = [pytest.mark.every_server, pytest.mark.usefixtures("executor_as_before")]

STATES = "SELECT label, state FROM pg_background_history ORDER BY label"


def record(conn: Connection, label: str, job: str = "SELECT 1", *, prefix: str = "") -> None:
    """A job whose end is in the history."""
    conn.execute(f"SELECT {prefix}pg_background_submit(%s, 0, %s)".encode(), [job, label])
    query = f"SELECT state FROM {prefix}pg_background_history WHERE label = %s".encode()
    wait_until(lambda: conn.execute(query, [label]).fetchall() not in ([], [("running",)]))


def test_an_update_creates_it(recording: Proxy, server: Server, db: str) -> None:
    """In a database whose objects an older proxy has made."""
    with recording.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
        with server.connect(dbname=db) as other:
            other.execute(
                "DROP VIEW pg_background_history; DROP TABLE _pg_background_history;"
                " DROP FUNCTION _pg_background_record(text[])"
            )
        conn.execute("SELECT pg_background_submit('SELECT 1', 0, 'before')")
        recording.wait_for_log(f"history: there is no table for the jobs .*{db}")
        assert conn.execute("SELECT state FROM pg_background_outcome(1, 1)").fetchall() == [(None,)]
        conn.execute("ALTER EXTENSION pg_background UPDATE")
        record(conn, "after")
        # And leaves its rows as they are.
        conn.execute("ALTER EXTENSION pg_background UPDATE")
        conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
        assert conn.execute(STATES).fetchall() == [("after", "stopped")]
        record(conn, "again")
        assert len(conn.execute(STATES).fetchall()) == 2


def test_it_moves_and_goes_with_the_extension(recording: Proxy, server: Server, db: str) -> None:
    with recording.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
        record(conn, "first")
        conn.execute("""CREATE SCHEMA "odd ""name' $1" """)
        conn.execute("""ALTER EXTENSION pg_background SET SCHEMA "odd ""name' $1" """)
        conn.execute("""SET search_path = "odd ""name' $1", public""")
        record(conn, "second")
        assert conn.execute(STATES).fetchall() == [("first", "stopped"), ("second", "stopped")]
        conn.execute("DROP EXTENSION pg_background")
        left = "SELECT relname FROM pg_class WHERE relname LIKE '%pg_background%'"
        assert conn.execute(left.encode()).fetchall() == []
        conn.execute("CREATE EXTENSION pg_background SCHEMA public")
        assert conn.execute(STATES).fetchall() == []


def test_what_depends_on_it_keeps_it(recording: Proxy, db: str) -> None:
    with recording.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
        conn.execute("CREATE VIEW nightly AS SELECT * FROM pg_background_history")
        conn.execute("ALTER EXTENSION pg_background UPDATE")
        assert failure(conn, "DROP EXTENSION pg_background").sqlstate == "2BP01"
        record(conn, "kept")
        assert one(conn, "SELECT label FROM nightly") == "kept"
        conn.execute("DROP EXTENSION pg_background CASCADE")


def test_a_table_of_another_role_is_not_taken(recording: Proxy, server: Server, db: str) -> None:
    with server.connect(dbname=db) as conn:
        conn.execute("SET ROLE alice; CREATE TABLE _pg_background_history (n int); RESET ROLE")
    with recording.connect(dbname=db) as conn:
        assert failure(conn, "CREATE EXTENSION pg_background").sqlstate in ("42710", "42703")
    with server.connect(dbname=db) as conn:
        conn.execute("DROP TABLE _pg_background_history")


@pytest.mark.parametrize("options", [[], ["-x", "-O"]], ids=["whole", "without privileges"])
def test_dump_and_restore(
    recording: Proxy, server: Server, db: str, tmp_path: Path, options: list[str]
) -> None:
    with recording.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
        record(conn, "dumped", "SELECT 1/0")
    dump = tmp_path / "dump.sql"
    where = ["-h", server.host, "-p", str(server.port), "-U", "postgres"]
    run(tool(server, "pg_dump"), *where, *options, "-f", str(dump), "-d", db)
    psql = tool(server, "psql")
    with database(server, f"{db}_restored") as restored:
        run(psql, "-X", "-q", *where, "-f", str(dump), "-d", restored)
        with recording.connect(dbname=restored) as conn:
            assert conn.execute(STATES).fetchall() == [("dumped", "error")]
            record(conn, "new")
            assert len(conn.execute(STATES).fetchall()) == 2
        with server.connect(dbname=restored, user="alice") as conn:
            # A privilege that was not restored is missing, and never one that nobody gave.
            table = "TABLE _pg_background_history"
            assert failure(conn, table).sqlstate == "42501"


def run(*command: Any) -> None:
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_backends_that_are_killed(server: Server, start_proxy: StartProxy) -> None:
    """With SIGKILL, at which the server ends all others, and starts anew: what the history says of
    each job is so, and no row is missing of those that it had."""
    own = Server(server.bin)
    try:
        own.set("synchronous_commit", "on")
        proxy = start_proxy("--history", "all", upstream=upstream_of(own))
        with proxy.connect() as conn:
            conn.execute("CREATE EXTENSION pg_background; CREATE TABLE done (label text)")
            record(conn, "before", "INSERT INTO done VALUES ('before')")
            rows = "SELECT pid FROM pg_background_submit(%s, 0, %s)"
            job = "INSERT INTO done VALUES ('{0}'); SELECT pg_sleep(60)"
            [[victim]] = conn.execute(rows, [job.format("victim"), "victim"]).fetchall()
            conn.execute(rows, [job.format("bystander"), "bystander"])
            wait_until(lambda: [r for r in conn.execute(STATES) if r[1] == "running"][1:] != [])
            os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "running" not in (states_of(own) or {"": "running"}).values())
        states = states_of(own) or {}
        assert states["before"] == "stopped"
        assert states["victim"] == "lost"
        assert states["bystander"] in ("lost", "error")
        with own.connect() as conn:
            assert conn.execute("SELECT label FROM done").fetchall() == [("before",)]
        with proxy.connect() as conn:
            record(conn, "later")
    finally:
        own.close()


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_behind_a_connection_pooler(
    server: Server, recording: Proxy, start_proxy: StartProxy, tmp_path: Path, mode: str
) -> None:
    with database(server, f"history_pooled_{mode}") as name:
        with recording.connect(dbname=name) as conn:
            conn.execute("CREATE EXTENSION pg_background")
        with pgbouncer(server, tmp_path, mode, ()) as bouncer:
            upstream = f"host=127.0.0.1 port={bouncer.port} sslmode=disable"
            proxy = start_proxy("--history", "all", upstream=upstream)
            with proxy.connect(dbname=name) as conn:
                conn.prepare_threshold = None
                record(conn, "well")
                record(conn, "failed", "SELECT 1/0")
                assert conn.execute(STATES).fetchall() == [("failed", "error"), ("well", "stopped")]
            proxy.stop()


def test_a_table_that_is_locked_for_a_while(recording: Proxy, server: Server, db: str) -> None:
    """Rows wait; jobs, and what they say to their sessions, do not."""
    with recording.connect(dbname=db) as conn, server.connect(dbname=db) as owner:
        conn.execute("CREATE EXTENSION pg_background")
        with owner.transaction():
            owner.execute("LOCK TABLE _pg_background_history IN EXCLUSIVE MODE")
            query = "SELECT state FROM pg_background_run($$SELECT 1$$, 0, 0, 'waits')"
            assert conn.execute(query).fetchall() == [("stopped",)]
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND database ="
            waiting += " (SELECT oid FROM pg_database WHERE datname = current_database())"
            wait_until(functools.partial(is_so, owner, waiting, 1))
        wait_until(lambda: conn.execute(STATES).fetchall() == [("waits", "stopped")])


def is_so(conn: Connection, query: str, expected: int) -> bool:
    return bool(one(conn, query) == expected)


def states_of(server: Server) -> dict[str, str] | None:
    """Each job's, by its label; None while the server starts anew."""
    try:
        with server.connect() as conn:
            return dict(conn.execute(STATES).fetchall())
    except psycopg.Error:
        return None


@pytest.mark.one_server
def test_worker_processes_that_are_killed(server: Server, start_proxy: StartProxy, db: str) -> None:
    """The jobs of the one that is gone are lost; those of the others are told by all."""
    proxy = start_proxy("--workers", "2", "--history", "all")
    with proxy.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
    with server.connect(dbname=db) as observer:
        running = "SELECT count(*) FROM pg_background_history WHERE state = 'running'"
        count = "SELECT count(*) FROM pg_background_history"
        for number in range(3):
            workers = psutil.Process(proxy.pid).children()
            conns = [proxy.connect(dbname=db) for _ in range(8)]
            for index, conn in enumerate(conns):
                for job, kind in (("SELECT pg_sleep(1.5)", "long"), ("SELECT 1", "short")):
                    label = f"{number}.{index}.{kind}"
                    conn.execute("SELECT pg_background_submit(%s, 0, %s)", [job, label])
            wait_until(functools.partial(is_so, observer, count, 16 * (number + 1)))
            workers[number % 2].send_signal(signal.SIGKILL)
            for conn in conns:
                conn.close()
            wait_until(functools.partial(is_so, observer, running, 0))
        states: dict[str, str] = dict(observer.execute(STATES).fetchall())
        assert {state for label, state in states.items() if "short" in label} == {"stopped"}
        assert {state for label, state in states.items() if "long" in label} == {"stopped", "lost"}
    with proxy.connect(dbname=db) as conn:
        listed = conn.execute("SELECT * FROM pg_background_list_all()").fetchall()
        assert {(row[9], row[5]) for row in listed} >= {
            (label, state) for label, state in states.items() if state == "lost"
        }
