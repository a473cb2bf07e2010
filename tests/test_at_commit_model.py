"""Transactions of any shape: a job that starts at commit has run if, and only if, the row is there
that was written beside its launch. The server is the model."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.background import wait_until
from tests.support.examples import examples
from tests.support.in_database import with_extension
from tests.support.servers import Connection, Proxy, Server

_numbers = itertools.count(1)

_LAUNCH: Final = "SELECT pg_background_submit_at_commit('INSERT INTO ran VALUES ({n})')"
_BESIDE: Final = "INSERT INTO kept VALUES ({n}); "
_BLOCK: Final = (
    "DO $$ BEGIN INSERT INTO kept VALUES ({n}); PERFORM"
    " pg_background_submit_at_commit('INSERT INTO ran VALUES ({n})'); %s"
    " EXCEPTION WHEN division_by_zero THEN NULL; END $$"
)

LAUNCHES: Final = {
    "direct": _BESIDE + _LAUNCH,
    "first": _LAUNCH + "; " + _BESIDE,
    "inside": _BLOCK % "",
    "undone": _BLOCK % "RAISE division_by_zero;",
    "setting": "SET pg_background.launch_at_commit = on; "
    + _BESIDE
    + "SELECT pg_background_submit('INSERT INTO ran VALUES ({n})')",
    "fails": _BESIDE + _LAUNCH + "; SELECT 1/0",
    "commits": "CALL commits({n})",
}
OTHERS: Final = (
    *("BEGIN", "BEGIN ISOLATION LEVEL SERIALIZABLE", "COMMIT", "COMMIT", "ROLLBACK"),
    *("SAVEPOINT a", "SAVEPOINT b", "ROLLBACK TO a", "ROLLBACK TO b", "RELEASE a", "RELEASE b"),
    *("COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "SELECT 1/0", "SELECT 1", "kill", "leave"),
)
STEPS: Final = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([*LAUNCHES, *OTHERS])), min_size=4, max_size=24
)


@pytest.fixture(autouse=True, scope="module")
def tables(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """What the steps need."""
    for _ in with_extension(server, proxy, scratch):
        with server.connect(dbname=scratch) as conn:
            conn.execute("CREATE TABLE kept (n int); CREATE TABLE ran (n int)")
            conn.execute(
                "CREATE PROCEDURE commits(n int) LANGUAGE plpgsql AS $$ BEGIN"
                " FOREACH n IN ARRAY ARRAY[n, -n] LOOP INSERT INTO kept VALUES (n);"
                " PERFORM pg_background_submit_at_commit(format('INSERT INTO ran VALUES (%s)', n));"
                " IF n > 0 THEN COMMIT; ELSE ROLLBACK; END IF; END LOOP; END $$"
            )
        yield


def undecided(conn: Connection) -> bool:
    """Whether a job of ours has not ended. The proxy says so itself: it is asked often."""
    jobs = conn.execute("SELECT state, sql_preview FROM pg_background_list_all()").fetchall()
    return any(
        state in ("pending", "queued", "running") and sql.startswith("INSERT INTO ran")
        for state, sql in jobs
    )


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_jobs_run_if_their_transaction_commits(
    proxy: Proxy,
    scratch: str,
    conn: Connection,
    observer: Connection,
    steps: list[tuple[int, str]],
) -> None:
    clients = [proxy.connect(dbname=scratch) for _ in range(2)]
    for client in clients:
        client.execute("SET pg_background.max_workers = 5")
    for session, step in steps:
        client = clients[session]
        if step == "kill":
            observer.execute(
                "SELECT pg_terminate_backend(%s, 5000)"
                if observer.info.server_version >= 140000
                else "SELECT pg_terminate_backend(%s)",
                [client.info.backend_pid],
            )
        if step in ("kill", "leave"):
            client.close()
            clients[session] = proxy.connect(dbname=scratch)
            continue
        sql = LAUNCHES.get(step, step).format(n=next(_numbers))
        with contextlib.suppress(psycopg.Error):
            client.execute(sql.encode())
    for client in clients:
        client.close()
    wait_until(lambda: not undecided(conn))
    [kept, ran] = [
        sorted(n for (n,) in observer.execute(f"SELECT n FROM {table}"))
        for table in ("kept", "ran")
    ]
    assert ran == kept
