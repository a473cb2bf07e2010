"""Calls from inside the database that wait, end early, come in numbers, or are disturbed.

Whatever happens to a call: its session gets a plain error or the right answer, and nothing of it is
left behind.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator

import psutil
import psycopg
import pytest

from tests.conftest import StartProxy
from tests.support import background
from tests.support.background import failure, has_ended, message, notices, wait_until
from tests.support.in_database import (
    handle,
    inside,
    one,
    wait_until_nothing_is_left,
    with_extension,
)
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Wire

pytestmark = pytest.mark.every_server

# What a session that waits in the database is seen to wait for.
WAITING = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s AND wait_event = 'advisory'"


@pytest.fixture(autouse=True, scope="module")
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the extension."""
    yield from with_extension(server, proxy, scratch)


@pytest.fixture(autouse=True)
def nothing_is_left(observer: Connection) -> Iterator[None]:
    """After each test."""
    yield
    wait_until_nothing_is_left(observer)


class Background:
    """A statement in a thread of its own."""

    def __init__(self, conn: Connection, query: str) -> None:
        self.error: psycopg.Error | None = None
        self.seconds = 0.0

        def run() -> None:
            begin = time.monotonic()
            try:
                conn.execute(query.encode())
            except psycopg.Error as error:
                self.error = error
            self.seconds = time.monotonic() - begin

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def join(self, timeout: float = 20.0) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive()


WAIT = "DO $$ BEGIN PERFORM pg_background_wait({}, {}); END $$"
FETCH = "DO $$ BEGIN PERFORM * FROM pg_background_result({}, {}) AS (t text); END $$"


# --- waiting ---------------------------------------------------------------------------------


def test_waiting_costs_no_cpu(proxy: Proxy, conn: Connection, observer: Connection) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    backend = psutil.Process(conn.info.backend_pid)
    waiting = Background(conn, WAIT.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [backend.pid]).fetchone())
    time.sleep(0.4)
    processes = [backend, psutil.Process(proxy.pid)]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(2.0)
    used = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    observer.execute("SELECT pg_cancel_backend(%s)", [pid])
    waiting.join()
    assert waiting.error is None
    assert used <= 0.03


def test_a_wait_ends_with_its_job(conn: Connection, observer: Connection) -> None:
    waits = []
    for _ in range(5):
        pid, cookie = handle(conn, "SELECT pg_sleep(0.3)")
        begin = time.monotonic()
        inside(conn, f"pg_background_wait({pid}, {cookie})")
        waits.append(time.monotonic() - begin)
    assert min(waits) > 0.2
    # Not with the next time that it looks, which would come later each time.
    assert min(waits) < 0.45


def test_time_out_of_a_wait(conn: Connection) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    begin = time.monotonic()
    assert inside(conn, f"pg_background_wait({pid}, {cookie}, 300)") == "false"
    assert 0.3 <= time.monotonic() - begin < 15
    inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)")


def test_lock_timeout_is_not_for_us(conn: Connection) -> None:
    conn.execute("SET lock_timeout = '10ms'; SET deadlock_timeout = '10ms'")
    pid, cookie = handle(conn, "SELECT pg_sleep(0.5)")
    assert inside(conn, f"pg_background_wait({pid}, {cookie})") == "true"
    assert one(conn, "SHOW lock_timeout") == "10ms"


@pytest.mark.parametrize("query", [WAIT, FETCH])
def test_statement_timeout(conn: Connection, observer: Connection, query: str) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(60)::text")
    conn.execute("SET statement_timeout = '300ms'")
    begin = time.monotonic()
    error = failure(conn, query.format(pid, cookie).encode())
    assert message(error) == ("57014", "canceling statement due to statement timeout")
    assert time.monotonic() - begin < 15
    # The job is another matter.
    assert not has_ended(observer, pid)
    inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)")


@pytest.mark.parametrize("query", [WAIT, FETCH])
def test_cancel(conn: Connection, observer: Connection, query: str) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(60)::text")
    waiting = Background(conn, query.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [conn.info.backend_pid]).fetchone())
    conn.cancel()
    waiting.join()
    assert waiting.error is not None
    assert message(waiting.error) == ("57014", "canceling statement due to user request")
    assert inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)") == ""


def test_a_cancel_that_is_caught(conn: Connection) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    conn.execute("SET statement_timeout = '300ms'")
    with notices(conn) as heard:
        conn.execute(
            f"DO $$ BEGIN PERFORM pg_background_wait({pid}, {cookie}); EXCEPTION WHEN"
            f" query_canceled THEN PERFORM pg_background_cancel({pid}, {cookie}, 5000);"
            " RAISE NOTICE '%', (pg_background_run('SELECT 1')).command_tag; END $$".encode()
        )
    assert [n["message_primary"] for n in heard] == ["SELECT"]


def test_run_that_is_interrupted_stops_its_job(conn: Connection, observer: Connection) -> None:
    conn.execute("SET statement_timeout = '300ms'")
    query = "DO $$ BEGIN PERFORM pg_background_run('SELECT pg_sleep(61)'); END $$"
    assert failure(conn, query).sqlstate == "57014"
    runs = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(61)'"
    wait_until(lambda: not observer.execute(runs).fetchone())
    query = (
        "DO $$ BEGIN PERFORM * FROM pg_background_run_query('SELECT pg_sleep(61)', 0, 0)"
        " AS (t text); END $$"
    )
    assert failure(conn, query).sqlstate == "57014"
    wait_until(lambda: not observer.execute(runs).fetchone())


# --- the session goes --------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["hang_up", "reset", "close"])
@pytest.mark.parametrize("query", [WAIT, FETCH])
def test_the_client_goes_in_the_middle(
    proxy: Proxy, scratch: str, observer: Connection, end: str, query: str
) -> None:
    wire = Wire((proxy.host, proxy.port), database=scratch)
    [row] = [
        body
        for kind, body in wire.query(
            "SELECT inside('pg_background_launch_v2(''SELECT pg_sleep(60)'')')"
        )
        if kind == "D"
    ]
    pid, cookie = row[6:].decode().strip("()").split(",")
    wire.send_query(query.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [wire.pid]).fetchone())
    begin = time.monotonic()
    getattr(wire, end)()
    wait_until(lambda: has_ended(observer, wire.pid))
    assert time.monotonic() - begin < 15
    # The job runs on to its end.
    assert not has_ended(observer, int(pid))
    observer.execute("SELECT pg_cancel_backend(%s)", [int(pid)])


def test_the_proxy_shuts_down(start_proxy: StartProxy, scratch: str, observer: Connection) -> None:
    proxy = start_proxy("--shutdown-timeout", "0.5s")
    conn = proxy.connect(dbname=scratch)
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    waiting = Background(conn, WAIT.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [conn.info.backend_pid]).fetchone())
    assert proxy.stop() == 0
    waiting.join()
    assert waiting.error is not None
    assert waiting.error.sqlstate in ("57P01", None)
    wait_until(lambda: has_ended(observer, conn.info.backend_pid), 5.0)


def test_the_proxy_is_killed(start_proxy: StartProxy, scratch: str, observer: Connection) -> None:
    proxy = start_proxy()
    conn = proxy.connect(dbname=scratch)
    backend = conn.info.backend_pid
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    waiting = Background(conn, WAIT.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [backend]).fetchone())
    proxy.kill()
    waiting.join()
    wait_until(lambda: has_ended(observer, backend), 5.0)
    observer.execute("SELECT pg_terminate_backend(%s)", [pid])


def test_the_channel_is_killed(conn: Connection, observer: Connection) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    waiting = Background(conn, WAIT.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [conn.info.backend_pid]).fetchone())
    kill = (
        "SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE l.locktype = 'advisory' AND l.granted"
        " AND a.application_name ~ '^[0-9a-f]{12}[gh]w$'"
    )
    wait_until(lambda: observer.execute(kill).fetchone())
    waiting.join()
    assert waiting.error is not None
    assert waiting.error.sqlstate == "08006"
    inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)")


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.one_server
@pytest.mark.parametrize("number", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_launches_in_a_loop(conn: Connection, scratch: str, number: int) -> None:
    conn.execute("CREATE TABLE many (n int)")
    conn.execute("SET pg_background.max_workers = 1000")
    conn.execute(
        f"DO $$ DECLARE h pg_background_handle; BEGIN FOR i IN 1..{number} LOOP"
        " h := pg_background_submit_v2('INSERT INTO many VALUES (' || i || ')');"
        " IF i % 20 = 0 THEN PERFORM pg_background_wait(h.pid, h.cookie);"
        " PERFORM pg_background_purge(); END IF; END LOOP; END $$".encode()
    )
    query = "SELECT count(*), count(DISTINCT n), sum(n) FROM many"
    expected = (number, number, number * (number + 1) // 2)
    wait_until(lambda: conn.execute(query).fetchone() == expected)
    conn.execute("DROP TABLE many")


@pytest.mark.one_server
@pytest.mark.parametrize("turns", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_50_sessions_at_once(proxy: Proxy, scratch: str, turns: int) -> None:
    errors: list[BaseException] = []
    begin = threading.Barrier(50)

    def run(number: int) -> None:
        try:
            with proxy.connect(dbname=scratch, connect_timeout=60) as conn:
                begin.wait(60)
                for turn in range(turns):
                    text = f"{number} {turn} " + "x" * 1500
                    query = (
                        "WITH l AS (SELECT pg_background_launch_v2(%s) AS h) SELECT r.t"
                        " FROM l, pg_background_result_v2((h).pid, (h).cookie) AS r(t text)"
                    )
                    assert one(conn, query, [f"SELECT '{text}'::text"]) == text
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]


def test_few_connections(server: Server, start_proxy: StartProxy, scratch: str) -> None:
    """When the server has no slot for a further channel, sessions wait for one."""
    with server.connect(dbname=scratch) as admin:
        admin.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 9")
        admin.execute("GRANT pgbackground_role TO crowded")
    proxy = start_proxy()
    errors: list[BaseException] = []
    begin = threading.Barrier(6)

    def run() -> None:
        try:
            with proxy.connect(dbname=scratch, user="crowded") as conn:
                begin.wait(20)
                for _ in range(5):
                    inside(conn, "(pg_background_stats()).workers_launched")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors, errors[0]
    proxy.stop()
    with server.connect(dbname=scratch) as admin:
        wait_until(
            lambda: (
                not admin.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE usename = 'crowded'"
                ).fetchone()
            )
        )
        admin.execute("DROP OWNED BY crowded; DROP ROLE crowded")


# --- others --------------------------------------------------------------------------------------


def test_an_owner_that_is_the_session_user_passes_custom_settings_on(
    proxy: Proxy, scratch: str, observer: Connection
) -> None:
    """The function asks a second time for itself as the owner, in each of its two questions."""
    observer.execute("SELECT grant_pg_background_privileges('alice')")
    observer.execute(
        "CREATE FUNCTION shows() RETURNS json LANGUAGE sql SECURITY DEFINER AS"
        " $$ SELECT to_json(pg_background_run('SHOW my.word')) $$"
    )
    observer.execute("ALTER FUNCTION shows() OWNER TO alice")
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("SET my.word = 'x'")
        conn.execute("SET SESSION AUTHORIZATION alice")
        begin = time.monotonic()
        run = one(conn, "SELECT shows()")
        assert (run["state"], run["completed"]) == ("stopped", True), run
        assert time.monotonic() - begin < 15
    observer.execute("DROP FUNCTION shows()")
    observer.execute("SELECT revoke_pg_background_privileges('alice')")


def test_two_sessions_do_not_disturb_each_other(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection
) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(2)")
    waiting = Background(conn, WAIT.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [conn.info.backend_pid]).fetchone())
    with proxy.connect(dbname=scratch) as other:
        for _ in range(20):
            assert (
                inside(other, "n FROM pg_background_run_query('SELECT 1', 0, 0) AS (n int)") == "1"
            )
            assert inside(other, "(pg_background_stats()).workers_active") == "0"
        error = failure(other, f"DO $$ BEGIN PERFORM pg_background_detach({pid}); END $$".encode())
        assert message(error) == ("42704", f"PID {pid} is not attached to this session")
    waiting.join()
    assert waiting.error is None


def test_others_cannot_answer_or_hold_up(
    server: Server, scratch: str, conn: Connection, observer: Connection
) -> None:
    pid, cookie = handle(conn, "SELECT pg_sleep(1)::text")
    waiting = Background(conn, FETCH.format(pid, cookie))
    wait_until(lambda: observer.execute(WAITING, [conn.info.backend_pid]).fetchone())
    with server.connect(dbname=scratch, user="alice") as stranger:
        # Who shows the same name, and holds the same lock.
        query = (
            "SELECT application_name FROM pg_stat_activity WHERE application_name"
            " ~ '^[0-9a-f]{12}[gh]w$'"
        )
        wait_until(lambda: stranger.execute(query).fetchone())
        name = one(stranger, query)
        stranger.execute(
            "SELECT set_config('application_name', %s, false)", [f"{name[:12]}a0000AAAA"]
        )
        taking = Background(
            stranger,
            "SELECT pg_advisory_lock((classid::int8 << 32) | objid::int8) FROM pg_locks"
            " WHERE locktype = 'advisory' AND granted",
        )
        waiting.join()
        assert waiting.error is None
        assert waiting.seconds < 10
        taking.join()


@pytest.mark.parametrize("role", ["alice", "monitor"])
def test_what_others_see(
    proxy: Proxy, observer: Connection, server: Server, scratch: str, role: str
) -> None:
    """No role, not one that sees all queries, and not the server's log have what a job returns, nor
    the words that answers are enciphered with."""
    job = "SELECT repeat('do not' || ' tell', 50), pg_sleep(0.02)::text FROM generate_series(1, 20)"
    observer.execute("CREATE ROLE monitor LOGIN IN ROLE pg_read_all_stats")
    observer.execute(f"ALTER DATABASE {scratch} SET log_min_duration_statement = 0".encode())
    before = server.cluster.log_size()
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        with server.connect(dbname=scratch, user=role) as stranger:
            while not stop.is_set():
                rows = stranger.execute("SELECT application_name, query FROM pg_stat_activity")
                seen.update(text for row in rows for text in row if text)

    looking = threading.Thread(target=look, daemon=True)
    try:
        looking.start()
        with proxy.connect(dbname=scratch) as conn:
            session = one(conn, "SHOW pg_background_proxy.session")
            for _ in range(3):
                handle(conn, "SELECT 'short'")
                query = f"a FROM pg_background_run_query($j${job}$j$, 0, 0) r(a text, b text)"
                assert "do not tell" in inside(conn, query)
    finally:
        stop.set()
        looking.join()
        observer.execute(f"ALTER DATABASE {scratch} RESET log_min_duration_statement".encode())
        observer.execute("DROP ROLE monitor")
    log = server.log(before)
    assert any(len(text) > 12 and text[12] in "abqrp" for text in seen)
    for shown, is_shown in ((log, True), ("\n".join(seen), role == "monitor")):
        assert ("/*" in shown) == is_shown
        for secret in (session[:32], session[32:], *_as_base64(b"do not tell" * 3)):
            assert secret not in shown


def _as_base64(text: bytes) -> Iterator[str]:
    """How a text looks in the middle of a longer one."""
    for shift in range(3):
        yield base64.b64encode(b"x" * shift + text)[4:-4].decode()


# --- encodings, progress ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("UTF8", 'ä"\\€{},'), ("LATIN1", 'äöü"\\'), ("SJIS", '表ソ\\"能,'), ("GBK", "乗\\中国")],
)
def test_encodings(start_proxy: StartProxy, scratch: str, encoding: str, text: str) -> None:
    # One of its own, since others would list these jobs.
    with start_proxy() as proxy, proxy.connect(dbname=scratch, client_encoding=encoding) as conn:
        expression = "t FROM pg_background_run_query($j$SELECT $t${}$t$::text$j$, 0, 0) AS (t text)"
        assert inside(conn, expression.format(text)) == text
        expression = (
            "(pg_background_outcome(h.pid, h.cookie)).label"
            " FROM pg_background_launch_v2('', 0, '{}') h"
        )
        assert inside(conn, expression.format(text)) == text


def test_progress_is_seen_at_once(conn: Connection, observer: Connection) -> None:
    # The job cannot have committed: it waits.
    observer.execute("SELECT pg_advisory_lock(424242)")
    conn.execute(
        "CREATE FUNCTION reports() RETURNS void LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_background_progress(150, 'über'); PERFORM pg_advisory_xact_lock(424242);"
        " PERFORM pg_background_report_progress(NULL); END $$"
    )
    pid, cookie = handle(conn, "SELECT reports()")
    progress = f"pg_background_get_progress({pid}, {cookie})"
    wait_until(lambda: inside(conn, progress) == "(100,über)")
    observer.execute("SELECT pg_advisory_unlock_all()")
    inside(conn, f"pg_background_wait({pid}, {cookie})")
    assert inside(conn, progress) == "(,)"


def test_a_large_notice_passes(conn: Connection) -> None:
    with notices(conn) as heard:
        conn.execute("DO $$ BEGIN RAISE NOTICE '%', repeat('x', 3000000); END $$")
    assert [len(str(n["message_primary"])) for n in heard] == [3000000]


def test_a_large_statement(conn: Connection) -> None:
    text = "y" * 3_000_000
    query = "WITH l AS (SELECT pg_background_launch(%s) AS pid) SELECT pid FROM l"
    pid = one(conn, query, [f"SELECT length('{text}')"])
    assert background.result(conn, pid, "n int") == [(3_000_000,)]
