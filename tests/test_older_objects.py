"""A database whose extension an older proxy has created: its functions are served as before, and
ALTER EXTENSION UPDATE brings the new ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.background import failure, message
from tests.support.in_database import handle, inside, launch, one, rows, with_extension
from tests.support.servers import Connection, Proxy, Server

pytestmark = pytest.mark.every_server

_OLDER = Path(__file__).with_name("support") / "older_objects.sql"
_ASKS = "SELECT count(*) FROM pg_proc WHERE proname = '_pg_background_answer'"


@pytest.fixture(autouse=True, scope="module")
def older(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the functions of before."""
    for _ in with_extension(server, proxy, scratch):
        with server.connect(dbname=scratch) as conn:
            conn.execute("DROP FUNCTION _pg_background_ask, _pg_background_answer")
            conn.execute(_OLDER.read_bytes())
        yield


def test_older_functions_are_served(conn: Connection) -> None:
    assert one(conn, _ASKS) == 0
    conn.execute("SET work_mem = '5MB'; SET my.own = 'x'")
    for _ in range(3):
        job = "SELECT current_setting('work_mem'), current_setting('my.own')"
        assert rows(conn, job, "a text, b text") == [("5MB", "x")]
    many = "SELECT i, md5(i::text) FROM generate_series(1, 2000) i"
    assert len(rows(conn, many, "i int, t text")) == 2000
    assert inside(conn, f"pg_background_detach({launch(conn, 'SELECT 1')})") == ""
    error = failure(conn, "DO $$ BEGIN PERFORM pg_background_detach(999999); END $$")
    assert message(error) == ("42704", "PID 999999 is not attached to this session")


def test_an_update_brings_the_new_ones(proxy: Proxy, scratch: str, conn: Connection) -> None:
    conn.execute("ALTER EXTENSION pg_background UPDATE")
    assert one(conn, _ASKS) == 1
    for _ in range(3):
        assert rows(conn, "SELECT 1", "n int") == [(1,)]
    pid, cookie = handle(conn, "SELECT 1")
    assert inside(conn, f"pg_background_detach_v2({pid}, {cookie})") == ""
    with proxy.connect(dbname=scratch) as other:
        assert rows(other, "SELECT 2", "n int") == [(2,)]
