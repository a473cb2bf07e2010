"""Traffic without calls is the same through the proxy, byte for byte, and calls work after it.

Each script runs direct and through the proxy. Invariant: the two lists of messages are equal. Then
a job is launched and fetched on the proxied connection: a relay that has miscounted waits for an
answer that never comes, or takes one for another.
"""

# ruff: noqa: E501 (the tables of scripts are read in rows)

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.framing import MessageBuffer, frame
from protocol.startup import StartupMessage
from protocol.values import oids
from proxy.session.named import NamedStatements
from proxy.session.relay import Relay
from proxy.session.reported import WATCHED, ReportedSettings
from proxy.statements.plan import Statement
from tests.conftest import StartProxy
from tests.support.background import wait_until
from tests.support.recorder import (
    END,
    READY,
    Closed,
    Frontend,
    H,
    S,
    Script,
    Sent,
    Wait,
    assert_same,
    b,
    c,
    cut,
    d,
    e,
    errors,
    kinds,
    masked,
    p,
    q,
    record,
    rows,
    serialized,
)
from tests.support.servers import Proxy, Server

pytestmark = pytest.mark.every_server


MEGABYTE = 1 << 20


TABLE = q("CREATE TEMPORARY TABLE t (a int, b text)")
COPY_READY = Wait(m.CopyInResponse)
BINARY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
BINARY_ROW = struct.pack(">hiiis", 2, 4, 1, 1, b"x")
MENTION = "pg_background_launch('SELECT 1')"

# fmt: off
SCRIPTS: dict[str, Script] = {
    # The simple protocol.
    "a query": [q("SELECT 1 AS n, 'x' AS t, NULL"), READY],
    "a query of several statements": [q("SELECT 1; SELECT 2; CREATE TEMP TABLE x(); TABLE x"), READY],
    "an empty query": [q(""), READY, q(" ; -- nothing\n"), READY],
    "a query in pieces of UTF-8": [q("SELECT 'ä€𝄞', 'пример'"), READY],
    "a syntax error": [q("SELECT 1; SELEC 2"), READY, q("SELECT 1"), READY],
    "an error in the middle": [q("SELECT 1; SELECT 1/0; SELECT 2"), READY],
    "a transaction": [q("BEGIN"), READY, TABLE, READY, q("COMMIT"), READY],
    "a failed transaction": [
        q("BEGIN"), READY, q("SELECT 1/0"), READY, q("SELECT 1"), READY, q("COMMIT"), READY],
    "a savepoint": [
        q("BEGIN; SAVEPOINT s; SELECT x"), READY, q("ROLLBACK TO s"), READY, q("COMMIT"), READY],
    "a commit that fails": [
        q("CREATE TEMP TABLE u (a int UNIQUE DEFERRABLE INITIALLY DEFERRED)"), READY,
        q("INSERT INTO u VALUES (1), (1)"), READY,
        p("INSERT INTO u VALUES (2), (2)"), b(), e(), S, READY],
    "several queries in flight": [q("SELECT 1"), q("SELECT x"), q(""), q("BEGIN"), Wait(m.ReadyForQuery, 4)],
    "many columns, no columns": [q("SELECT"), READY, q("SELECT " + ", ".join("1" * 300)), READY],
    "many rows": [q("SELECT i, repeat('x', i % 100) FROM generate_series(1, 5000) i"), READY],

    # The extended protocol.
    "everything about a statement": [
        p("SELECT $1::int, $2", "s", (0, oids.TEXT)), d(b"S", "s"), b("s", "p", (b"1", None)),
        d(b"P", "p"), e("p"), c(b"P", "p"), c(b"S", "s"), S, READY],
    "binary values": [
        p("SELECT $1::int, $2::float8"), b("", "", (b"\0\0\0\7", b"1.5"), (1, 0), (1,)), d(b"P"), e(),
        S, READY],
    "formats for each column": [
        p("SELECT 1, 2::int8, 'x'::text"), b(results=(1, 0, 1)), d(b"P"), e(), S, READY],
    "flush without sync": [
        p("SELECT 1"), H, Wait(m.ParseComplete), d(b"S"), H, Wait(m.RowDescription), b(), e(), H,
        Wait(m.CommandComplete), S, READY],
    "two flushes and no answer between": [p("SELECT 1"), H, H, b(), H, e(), S, READY],
    "describe of what returns nothing": [p("SET a.b = 'c'"), d(b"S"), b(), d(b"P"), e(), S, READY],
    "an empty statement": [p(""), d(b"S"), b(), d(b"P"), e(), S, READY],
    "rows in portions": [
        p("SELECT generate_series(1, 5)"), b(), e("", 2), H, Wait(m.PortalSuspended), e("", 2), H,
        Wait(m.PortalSuspended), e("", 2), e("", 2), S, READY],
    "a portal left half read": [
        q("BEGIN"), READY, p("SELECT generate_series(1, 5)"), b("", "p"), e("p", 2), S, READY,
        e("p", 1), S, READY, q("COMMIT"), READY, e("p", 1), S, READY],
    "statements executed again": [
        p("SELECT $1 || 'x'", "s"), S, READY,
        b("s", "", (b"1",)), e(), b("s", "", (b"2",)), e(), S, READY, b("s", "", (b"3",)), e(), S, READY],
    "a parse that fails": [p("SELEC"), b(), d(b"P"), e(), S, READY, p("SELECT 1"), b(), e(), S, READY],
    "a bind that fails": [p("SELECT $1::int"), b("", "", (b"x",)), d(b"P"), e(), S, READY],
    "an execute that fails": [p("SELECT 1/$1::int"), b("", "", (b"0",)), e(), p("SELECT 1"), S, READY],
    "no such statement, no such portal": [
        b("none"), S, READY, e("none"), S, READY, d(b"S", "none"), S, READY, d(b"P", "none"), S, READY,
        c(b"S", "none"), c(b"P", "none"), S, READY],
    "a statement of that name exists": [p("SELECT 1", "s"), p("SELECT 2", "s"), S, READY],
    "wrong numbers of parameters and formats": [
        p("SELECT $1::int, $2::int", "s"), S, READY, b("s", "", (b"1",)), S, READY,
        b("s", "", (b"1", b"2"), (0, 0, 0)), S, READY, b("s", "", (b"1", b"2"), (), (1, 1, 1)), S, READY],
    "several syncs in flight": [
        p("SELECT 1"), b(), e(), S, p("SELECT x"), b(), e(), S, p("SELECT 2"), b(), e(), S,
        Wait(m.ReadyForQuery, 3)],
    "syncs alone": [S, S, READY, S, Wait(m.ReadyForQuery, 2)],
    "flushes alone": [H, H, S, READY, H],
    "errors in two pipelines in flight": [
        p("SELECT x"), b(), e(), S, b("none"), e(), S, Wait(m.ReadyForQuery, 2)],
    "a query in the middle of a batch": [
        p("SELECT 1"), b(), e(), q("SELECT 2"), READY, p("SELECT 3"), b(), e(), S, READY],
    "a query in the middle of a failed batch": [
        p("SELECT x"), q("SELECT 2"), p("SELECT 3"), b(), e(), S, READY, q("SELECT 4"), READY],
    "a query after a failed batch was flushed": [
        p("SELECT x"), H, Wait(m.ErrorResponse), q("SELECT 2"), q("SELECT 3"), S, READY],
    "a query that fails in the middle of a batch": [
        p("SELECT 1"), b(), e(), q("SELECT x"), READY, q("SELECT 2"), READY],
    "a batch that ends in a flush": [p("SELECT 1"), b(), e(), H, Wait(m.CommandComplete)],
    "a batch that ends in nothing": [q("SELECT 1"), READY, p("SELECT 1"), b(), e()],
    "an insert before a failure is undone": [
        TABLE, READY, p("INSERT INTO t VALUES (1)"), b(), e(), p("SELECT 1/0"), b(), e(), S, READY,
        q("TABLE t"), READY],
    "begin and commit in a batch": [
        p("BEGIN"), b(), e(), p("SELECT 1"), b(), e(), p("COMMIT"), b(), e(), S, READY],

    # Function calls.
    "a function call": [
        m.FunctionCall(1395, (1,), (struct.pack(">d", -2.5),), 1), READY],  # abs(float8)
    "a function call with text": [m.FunctionCall(1395, (), (b"-3",), 0), READY],
    "a function call that fails": [m.FunctionCall(1395, (), (b"x",), 0), READY, q("SELECT 1"), READY],
    "no such function": [m.FunctionCall(1, (), (), 0), READY],
    "a function call in a batch": [
        p("SELECT 1"), b(), e(), m.FunctionCall(1395, (), (b"-3",), 0), READY, S, READY],
    "a function call in a failed batch": [
        p("SELECT x"), m.FunctionCall(1395, (), (b"-3",), 0), S, READY],
    "function calls in flight": [
        m.FunctionCall(1395, (), (b"-3",), 0), m.FunctionCall(1395, (), (b"-4",), 0),
        Wait(m.ReadyForQuery, 2)],

    # COPY.
    "copy out": [q("COPY (SELECT i, 'x' FROM generate_series(1, 500) i) TO STDOUT"), READY],
    "copy out in binary": [q("COPY (SELECT 1, 'x') TO STDOUT (FORMAT binary)"), READY],
    "copy out that fails": [q("COPY (SELECT 1/(3-i) FROM generate_series(1, 5) i) TO STDOUT"), READY],
    "copy out in a batch": [p("COPY (VALUES (1)) TO STDOUT"), b(), d(b"P"), e(), S, READY],
    "copy in": [
        TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, m.CopyData(b"1\ton"), m.CopyData(b"e\n"),
        m.CopyData(b""), m.CopyDone(), READY, q("TABLE t"), READY],
    "copy in binary": [
        TABLE, READY, q("COPY t FROM STDIN (FORMAT binary)"), COPY_READY,
        m.CopyData(BINARY_HEADER + BINARY_ROW), m.CopyData(b"\xff\xff"), m.CopyDone(), READY,
        q("TABLE t"), READY],
    "copy in of nothing": [TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, m.CopyDone(), READY],
    "copy in given up": [
        TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, m.CopyData(b"1\tx\n"),
        m.CopyFail(b"no more"), READY],
    "copy in of bad data": [
        TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, m.CopyData(b"x\tx\n1\tx\n"), READY,
        m.CopyData(b"1\tx\n"), m.CopyDone(), q("SELECT 1"), READY],
    "copy in of bad data, ended at once": [
        TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, m.CopyData(b"x\tx\n"), m.CopyDone(), READY],
    "two copies in a query": [
        TABLE, READY, q("COPY t FROM STDIN; SELECT 1; COPY t FROM STDIN; TABLE t"), COPY_READY,
        m.CopyData(b"1\tx\n"), m.CopyDone(), COPY_READY, m.CopyData(b"2\ty\n"), m.CopyDone(), READY],
    "copy in with flush and sync in it": [
        TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, H, m.CopyData(b"1\tx\n"), S, H, S,
        m.CopyDone(), READY],
    "copy in in a batch": [
        TABLE, READY, p("COPY t FROM STDIN"), b(), e(), H, COPY_READY, m.CopyData(b"1\tx\n"),
        m.CopyDone(), S, READY, q("TABLE t"), READY],
    "copy in with the extra sync of libpq": [
        TABLE, READY, p("COPY t FROM STDIN"), b(), d(b"P"), e(), S, COPY_READY,
        m.CopyData(b"1\tx\n"), m.CopyDone(), S, READY, q("TABLE t"), READY],
    "copy in with the extra sync, given up": [
        TABLE, READY, p("COPY t FROM STDIN"), b(), e(), S, COPY_READY, m.CopyData(b"1\tx\n"),
        m.CopyFail(b"no more"), S, READY, q("TABLE t"), READY],
    "copy in with the extra sync, bad data": [
        TABLE, READY, p("COPY t FROM STDIN"), b(), e(), S, COPY_READY, m.CopyData(b"x\tx\n"),
        Wait(m.ErrorResponse), m.CopyFail(b"late"), S, READY, q("TABLE t"), READY],
    "copy in that cannot begin, with the extra sync": [
        p("COPY none FROM STDIN"), b(), e(), S, READY, m.CopyDone(), S, READY],
    "copy data out of place": [m.CopyData(b"1"), m.CopyDone(), m.CopyFail(b""), q("SELECT 1"), READY],
    "copy done out of place, in a batch": [
        p("SELECT 1"), b(), e(), m.CopyDone(), p("SELECT 2"), b(), e(), S, READY],
    "copies one after another": [
        TABLE, READY, p("COPY t FROM STDIN"), b(), e(), m.CopyData(b"1\tx\n"), m.CopyDone(), S,
        q("COPY t FROM STDIN"), m.CopyData(b"2\tx\n"), m.CopyDone(), q("TABLE t"),
        Wait(m.ReadyForQuery, 3)],

    # What comes without being asked for.
    "a notification": [q("LISTEN c; NOTIFY c, 'payload'"), READY, q("UNLISTEN c"), READY],
    "a notification at the end of a batch": [
        q("LISTEN c"), READY, p("NOTIFY c"), b(), e(), p("SELECT 1"), b(), e(), S, READY],
    "notices": [
        q("DO $$ BEGIN RAISE NOTICE 'ä'; RAISE WARNING 'w' USING HINT = 'h'; END $$"), READY,
        q("DROP TABLE IF EXISTS none"), READY],
    "a notice in a batch": [p("DROP TABLE IF EXISTS none"), b(), e(), p("COMMIT"), b(), e(), S, READY],
    "settings that are reported": [
        q("SET application_name = 'x'; SET DateStyle = 'German'; SET client_encoding = 'LATIN1'"), READY,
        q("SELECT '\\xe4'::bytea, U&'\\00e4'"), READY, q("RESET ALL"), READY],
    "a setting that is rolled back": [
        q("BEGIN; SET LOCAL timezone = 'Asia/Tokyo'"), READY, q("ROLLBACK"), READY],
    "a cursor": [
        q("BEGIN; DECLARE c BINARY CURSOR FOR SELECT generate_series(1, 9); FETCH 2 c"), READY,
        p("FETCH 2 c"), b(), d(b"P"), e(), S, READY, q("CLOSE c; COMMIT"), READY],
    "prepare and execute in SQL": [
        q("PREPARE s AS SELECT $1::int"), READY, q("EXECUTE s(1)"), READY, b("s", "", (b"2",)), e(), S,
        READY, q("DEALLOCATE ALL"), READY],

    # pg_background is mentioned, but not called.
    "mentioned in a string": [q(f"SELECT $${MENTION}$$, 'pg_background', 'x pg_background_result(1)'"), READY],
    "mentioned in comments": [q(f"SELECT 1 /* {MENTION} */ -- pg_background_result(1)"), READY],
    "mentioned as names": [
        q('SELECT 1 AS pg_background, 2 AS "pg_background_launch", 3 pg_background_result'), READY,
        q("SELECT pg_background.pg_background_launch FROM (SELECT 1 AS pg_background_launch) pg_background"),
        READY],
    "a table of that name": [
        q("CREATE TEMP TABLE pg_background_launch (pg_background_result int)"), READY,
        q("INSERT INTO pg_background_launch (pg_background_result) VALUES (1)"), READY,
        q("SELECT pg_background_result FROM pg_background_launch"), READY],
    "another function of such a name": [
        q("SELECT pg_background_none(1)"), READY, q("SELECT my_pg_background_launch('x')"), READY,
        p("SELECT pg_background_launcher('x')"), S, READY],
    "mentioned in a parameter": [
        p("SELECT $1", "", (oids.TEXT,)), b("", "", (MENTION.encode(),)), e(), S, READY],
    "mentioned in names of the protocol": [
        p("SELECT 1", "pg_background_launch"), b("pg_background_launch", "pg_background_result(1)"),
        e("pg_background_result(1)"), c(b"S", "pg_background_launch"), S, READY],
    "mentioned in COPY data": [
        TABLE, READY, q("COPY t FROM STDIN"), COPY_READY, m.CopyData(f"1\tSELECT {MENTION}\n".encode()),
        m.CopyDone(), READY, q("COPY t TO STDOUT"), READY],
    "mentioned in a message of an error": [
        q(f"DO $_$ BEGIN RAISE EXCEPTION $${MENTION} does not exist$$; END $_$"), READY,
        q("DO $$ BEGIN RAISE 'pg_background_launch(x) does not exist' USING ERRCODE = '42883'; END $$"),
        READY],
    "a call in a malformed message": [
        frame(ord("Q"), b"SELECT pg_background_launch('SELECT 1')\0SELECT 2\0"), READY,
        frame(ord("Q"), b"SELECT pg_background_launch('SELECT 1')"), READY,
        frame(ord("P"), b"\0SELECT pg_background_launch('SELECT 1')"), S, READY],
    "prepared in SQL, mentioned in a string": [
        q("PREPARE s AS SELECT 'pg_background_launch(1)'"), READY, q("EXECUTE s"), READY],
}
# fmt: on


def call(client: Frontend, *before: Sent) -> None:
    """Launches a job and fetches it, after other messages in the same flight."""
    launch = q("SELECT pg_background_launch('SELECT 42 AS n') AS pid")
    client.send(*before, launch)
    client.until(lambda message: isinstance(message, m.RowDescription) and _is_pid(message))
    answer = client.until_ready()
    assert kinds(answer) == "DCZ", answer
    [[pid]] = rows(answer)
    answer = client.query(f"SELECT * FROM pg_background_result({(pid or b'').decode()}) AS (n int)")
    assert kinds(answer) == "TDCZ", answer
    assert rows(answer) == [(b"42",)]


def _is_pid(message: m.RowDescription) -> bool:
    return [field.name for field in message.fields] == [b"pid"]


@pytest.fixture
def script(request: pytest.FixtureRequest, server: Server) -> Script:
    """One of SCRIPTS."""
    if server.version >= 180000 and request.param == "a function call in a batch":
        pytest.skip("the server itself fails: unexpected state STARTED")
    return SCRIPTS[request.param]


every_script = pytest.mark.parametrize("script", SCRIPTS, indirect=True)


def both(server: Server, proxy: Proxy, script: Script, **options: Any) -> list[m.BackendMessage]:
    """Runs a script direct and through the proxy, compares, and makes a call at the end."""
    with Frontend(server) as client:
        waiting = options.get("waiting", True)
        direct = masked(record(client, script, waiting=waiting), client.key.pid)
    with Frontend(proxy) as client:
        proxied = masked(record(client, script, **options), client.key.pid)
        assert_same(direct, proxied)
        call(client)
    return direct


@every_script
def test_the_messages_are_the_same(server: Server, proxy: Proxy, script: Script) -> None:
    both(server, proxy, script)


@pytest.mark.one_server
@every_script
def test_the_messages_are_the_same_sent_byte_by_byte(
    server: Server, proxy: Proxy, script: Script
) -> None:
    both(server, proxy, script, cuts=lambda data: range(len(data)))


@every_script
def test_the_messages_are_the_same_sent_all_at_once(
    server: Server, proxy: Proxy, script: Script
) -> None:
    both(server, proxy, script, waiting=False)


@pytest.mark.turns(3)
@every_script
def test_a_call_in_the_same_flight_comes_after_them(proxy: Proxy, script: Script) -> None:
    sent = [item for item in (*script, *END) if not isinstance(item, Wait)]
    with Frontend(proxy) as client:
        call(client, *sent)
        call(client)


def test_the_login_is_the_same(server: Server, proxy: Proxy) -> None:
    parameters: dict[str, Any] = {
        "application_name": "x",
        "options": "-c search_path=a,b",
        "DateStyle": "German",
    }
    with Frontend(server, **parameters) as direct, Frontend(proxy, **parameters) as proxied:
        assert_same(masked(direct.login, 0), masked(proxied.login, 0))


def test_a_login_that_fails_is_the_same(server: Server, proxy: Proxy) -> None:
    startup = StartupMessage({b"user": b"postgres", b"database": b"none"})
    answers = []
    for endpoint in (server, proxy):
        with Frontend(endpoint, login=False) as client:
            client.send(startup)
            answers.append(client.until_closed())
    assert_same(*answers)
    assert kinds(answers[0]) == "RE"


def test_queries_may_follow_the_startup_packet_at_once(server: Server, proxy: Proxy) -> None:
    startup = StartupMessage({b"user": b"postgres", b"database": b"postgres"})
    answers = []
    for endpoint in (server, proxy):
        with Frontend(endpoint, login=False) as client:
            client.send(startup, q("SELECT 1"), p("SELECT 2"), b(), e(), S)
            client.until_ready()
            answers.append(client.until_ready(2))
    assert_same(*answers)


def test_a_call_may_follow_the_startup_packet_at_once(proxy: Proxy) -> None:
    startup = StartupMessage({b"user": b"postgres", b"database": b"postgres"})
    with Frontend(proxy, login=False) as client:
        call(client, startup)


def test_notifications_come_while_nothing_is_asked(server: Server, proxy: Proxy) -> None:
    with Frontend(proxy) as client, server.connect() as other:
        client.query("LISTEN c")
        other.execute("NOTIFY c, 'one'")
        notification = client.receive()
        pid = other.info.backend_pid
        assert notification == m.NotificationResponse(pid, b"c", b"one")
        call(client)


def test_a_terminated_backend_says_so(server: Server, proxy: Proxy) -> None:
    answers = []
    for endpoint in (server, proxy):
        with Frontend(endpoint) as client, server.connect() as other:
            other.execute("SELECT pg_terminate_backend(%s)", [client.key.pid])
            answers.append(client.until_closed())
    assert_same(*answers)
    assert [error.sqlstate for error in errors(answers[0])] == ["57P01"]


@pytest.mark.parametrize("extended", [False, True])
def test_a_query_in_the_middle_of_a_copy_is_answered_the_same(
    server: Server, proxy: Proxy, extended: bool
) -> None:
    """A FATAL error from PostgreSQL 14 on."""
    answers = []
    for endpoint in (server, proxy):
        with Frontend(endpoint) as client:
            client.ask(TABLE)
            copy = "COPY t FROM STDIN"
            client.send(*([p(copy), b(), e(), H] if extended else [q(copy)]))
            client.until_type(m.CopyInResponse)
            client.send(q("SELECT 1"), m.Terminate())
            answers.append(client.until_closed())
    assert_same(*answers)


def test_a_malformed_message_ends_the_session_in_the_servers_words(
    server: Server, proxy: Proxy
) -> None:
    for bad in (b"!\0\0\0\4", b"Q\0\0\0\3", b"Q\xff\xff\xff\xff", b"Q\0\0\0\6ab", b"B\0\0\0\5x"):
        answers = []
        for endpoint in (server, proxy):
            with Frontend(endpoint) as client:
                client.send(q("SELECT 1"), bad, S)
                client.send_eof()
                answers.append(client.until_closed())
        assert_same(*answers)


# --- big ones ----------------------------------------------------------------------------------


@pytest.fixture
def peak(proxy: Proxy) -> Iterator[list[int]]:
    """The resident memory of the proxy, sampled while the test runs; bytes."""
    process = psutil.Process(proxy.pid)
    samples = [process.memory_info().rss]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield samples
    done.set()
    thread.join(5.0)


def assert_bounded(peak: list[int]) -> None:
    assert max(peak) - peak[0] < 30 * MEGABYTE


def assert_streamed(client: Frontend, peak: list[int], size: int) -> None:
    """An answer of more than so many bytes, of which the proxy keeps few at a time."""
    total, end = 0, b""
    while not end.endswith(b"Z\0\0\0\5I"):
        chunk = client.socket.recv(MEGABYTE)
        assert chunk, "closed"
        total += len(chunk)
        end = (end + chunk)[-6:]
    assert total > size
    assert_bounded(peak)
    call(client)


@pytest.mark.one_server
def test_a_row_of_100_mb_is_streamed(proxy: Proxy, peak: list[int]) -> None:
    with Frontend(proxy) as client:
        client.send(q("SELECT repeat('x', 100000000)"))
        assert_streamed(client, peak, 100_000_000)


@pytest.mark.one_server
def test_a_parameter_of_100_mb_is_streamed(proxy: Proxy, peak: list[int]) -> None:
    big = bytes(100_000_000).replace(b"\0", b"x")
    with Frontend(proxy) as client:
        answer = client.ask(p("SELECT length($1)"), b("", "", (big,)), e(), S)
        assert rows(answer) == [(b"100000000",)]
        assert_bounded(peak)
        # The same where the relay has a statement with a call to look out for.
        client.ask(p("SELECT pg_background_launch($1)", "s"), S)
        answer = client.ask(p("SELECT length($1)"), b("", "", (big,)), e(), S)
        assert rows(answer) == [(b"100000000",)]
        assert_bounded(peak)
        call(client)


@pytest.mark.one_server
def test_100_mb_of_copy_are_streamed_both_ways(proxy: Proxy, peak: list[int]) -> None:
    piece = m.CopyData(b"pg_background_launch('x')" * 40 + b"\n").serialize() * 1000
    count = 100_000_000 // len(piece)
    with Frontend(proxy) as client:
        client.query("CREATE TEMP TABLE t (a text)")
        client.send(q("COPY t FROM STDIN"))
        client.until_type(m.CopyInResponse)
        for _ in range(count):
            client.send(piece)
        answer = client.ask(m.CopyDone())
        assert answer[0] == m.CommandComplete(b"COPY %d" % (count * 1000))
        client.send(q("COPY t TO STDOUT"))
        assert_streamed(client, peak, count * len(piece))


@pytest.mark.one_server
def test_a_slow_reader_stops_the_server(proxy: Proxy, server: Server, peak: list[int]) -> None:
    """Nothing is read until the backend waits for the client; then all of it is there."""
    with Frontend(proxy) as client, server.connect() as other:
        client.send(q("SELECT repeat('x', 1000) FROM generate_series(1, 100000)"))
        query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'ClientWrite'"
        wait_until(lambda: other.execute(query, [client.key.pid]).fetchone())
        assert_bounded(peak)
        assert_streamed(client, peak, 100_000_000)


@pytest.mark.one_server
def test_a_slow_server_stops_the_client(start_proxy: StartProxy) -> None:
    """A client that writes to a server that does not read comes to a halt."""
    with fake_server() as (port, accepted):
        proxy = start_proxy(upstream=f"host=127.0.0.1 port={port} sslmode=disable")
        process = psutil.Process(proxy.pid)
        with Frontend(proxy, login=False) as client:
            client.send(StartupMessage({b"user": b"x"}))
            with accepted(1) as backend:
                backend.recv(1000)
                backend.sendall(LOGIN)
                client.until_ready()
                before = process.memory_info().rss
                client.send(b"d" + (1 << 30).to_bytes(4, "big"))
                sent = 0
                client.socket.settimeout(2.0)
                with contextlib.suppress(TimeoutError):
                    while sent < 200 * MEGABYTE:
                        sent += client.socket.send(bytes(MEGABYTE))
                assert sent < 100 * MEGABYTE
                assert process.memory_info().rss - before < 30 * MEGABYTE


LOGIN = serialized(
    [
        m.AuthenticationOk(),
        m.ParameterStatus(b"client_encoding", b"UTF8"),
        m.ParameterStatus(b"standard_conforming_strings", b"on"),
        m.BackendKeyData(1234, b"key!"),
        m.ReadyForQuery(b"I"),
    ]
)


@contextlib.contextmanager
def fake_server() -> Iterator[Any]:
    """A port, and a function that gives its n-th connection (the proxy's own probe is number 0)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []
        came = threading.Condition()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    if not connections:
                        connection.sendall(b"N")
                    with came:
                        connections.append(connection)
                        came.notify_all()

        def accepted(number: int) -> socket.socket:
            with came:
                assert came.wait_for(lambda: len(connections) > number, 10.0)
            connections[number].settimeout(10.0)
            return connections[number]

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], accepted
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5.0)
            for connection in connections:
                connection.close()


# --- the end of a connection -------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["startup", "session"])
def test_a_client_that_vanishes_leaves_nothing(server: Server, proxy: Proxy, sent: str) -> None:
    """Cut off at many points, by a close or by a reset, in the middle of messages too."""
    startup = StartupMessage({b"user": b"postgres", b"database": b"postgres"}).serialize()
    script = serialized(
        [
            q("CREATE TEMP TABLE t (a int, b text)"),
            p("SELECT pg_background_launch($1)", "s"),
            b("s", "", (b"SELECT pg_sleep(0.01)",)),
            e(),
            S,
            q("COPY t FROM STDIN"),
            m.CopyData(b"1\tx\n"),
            m.CopyDone(),
            q("SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (a int)"),
        ]
    )
    points = range(len(startup)) if sent == "startup" else range(0, len(script), 7)
    for point in points:
        client = Frontend(proxy, login=sent == "session")
        client.send((startup if sent == "startup" else script)[:point])
        if point % 2:
            client.reset()
        else:
            client.close()
    assert server.wait_for_no_clients() == []
    with Frontend(proxy) as client:
        call(client)


def test_a_client_that_vanishes_during_a_wait_ends_it(server: Server, proxy: Proxy) -> None:
    """Its backend goes at once; the job does not, it runs on."""
    with server.connect() as other:
        with Frontend(proxy) as client:
            [[pid]] = rows(client.query("SELECT pg_background_launch('SELECT pg_sleep(100)')"))
            job = int(pid or b"")
            client.send(q(f"SELECT * FROM pg_background_result({job}) AS (a text)"))
            wait_until(lambda: _sleeping(other) == job)
        wait_until(lambda: not _is_there(other, client.key.pid))
        assert _sleeping(other) == job
        other.execute("SELECT pg_terminate_backend(%s)", [job])
    assert server.wait_for_no_clients() == []


def _sleeping(connection: Any) -> Any:
    """The pid of the backend that sleeps, if there is one."""
    row = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    ).fetchone()
    return row and row[0]


def _is_there(connection: Any, pid: int) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    return connection.execute(query, [pid]).fetchone() is not None


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_stops_reading_a_result_and_vanishes_leaves_nothing(
    server: Server, proxy: Proxy, reset: bool
) -> None:
    job = "SELECT repeat(''x'', 1000) FROM generate_series(1, 50000)"
    with Frontend(proxy) as client:
        client.send(
            q(f"SELECT * FROM pg_background_result(pg_background_launch('{job}')) AS (a text)")
        )
        client.until_type(m.DataRow)
        if reset:
            client.reset()
    assert server.wait_for_no_clients() == []


def test_terminate_ends_both_connections(server: Server, proxy: Proxy) -> None:
    with Frontend(proxy) as client:
        client.send(q("SELECT 1"), m.Terminate())
        assert kinds(client.until_closed()) == "TDCZ"
    assert server.wait_for_no_clients() == []


def test_terminate_in_the_middle_of_a_copy(server: Server, proxy: Proxy) -> None:
    if server.version < 140000:
        pytest.skip("the server answers with an error, and stays")
    answers = []
    for endpoint in (server, proxy):
        with Frontend(endpoint) as client:
            client.query("CREATE TEMP TABLE t (a int)")
            client.send(q("COPY t FROM STDIN"))
            client.until_type(m.CopyInResponse)
            client.send(m.CopyData(b"1\n"), m.Terminate())
            answers.append(client.until_closed())
    assert_same(*answers)


@pytest.mark.parametrize(
    "script",
    [
        [q("SELECT 1"), q("SELECT generate_series(1, 10000)")],
        [p("SELECT 1"), b(), e(), S],
        [p("SELECT 1"), b(), e()],
        [q("SELECT 1"), b"Q\0\0\1\0half a query"],
    ],
    ids=["queries", "a batch", "a batch without sync", "half a query"],
)
def test_a_client_that_will_send_no_more_gets_its_answers(
    server: Server, proxy: Proxy, script: list[Sent]
) -> None:
    answers = []
    for endpoint in (server, proxy):
        with Frontend(endpoint) as client:
            client.send(*script)
            client.send_eof()
            answers.append(client.until_closed())
    assert_same(*answers)
    assert server.wait_for_no_clients() == []


@pytest.mark.parametrize("goodbye", [False, True], ids=["end of file", "Terminate"])
def test_a_client_that_will_send_no_more_gets_the_answer_to_its_calls(
    server: Server, proxy: Proxy, goodbye: bool
) -> None:
    with Frontend(proxy) as client:
        launch = "SELECT pg_background_launch('SELECT 1')"
        client.send(q(launch), p(launch), b(), e(), S, q("SELECT 1"))
        if goodbye:
            client.send(m.Terminate())
        client.send_eof()
        assert kinds(client.until_closed()) == "TDCZ12DCZTDCZ"
    assert server.wait_for_no_clients() == []


@pytest.mark.one_server
def test_a_server_that_closes_closes_the_client(start_proxy: StartProxy) -> None:
    """What it said last arrives, then the end; even in the middle of a message."""
    with fake_server() as (port, accepted):
        proxy = start_proxy(upstream=f"host=127.0.0.1 port={port} sslmode=disable")
        half = b"D\0\0\1\0half"
        answer = b"Z\0\0\0\5I"  # to the query of the proxy's own
        said = [(b"", b""), (LOGIN, LOGIN), (LOGIN + answer + half, LOGIN + half)]
        for number, (last, expected) in enumerate(said, 1):
            with Frontend(proxy, login=False) as client:
                client.send(StartupMessage({b"user": b"x"}))
                with accepted(number) as backend:
                    backend.recv(1000)
                    backend.sendall(last)
                got = b""
                while chunk := client.socket.recv(1000):
                    got += chunk
                assert got == expected


# --- any cut -----------------------------------------------------------------------------------


class Side:
    """A connection of the relay that only remembers what was written to it."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


class Told:
    """The relay's session: notes what it is told."""

    watchword = b"WATCHWORD"

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.taken: bytes | None = None
        self.custom_settings = self
        self.reported = ReportedSettings()
        self.named = NamedStatements(self.reported, self)  # type: ignore[arg-type]

    def mentioned(self, sql: bytes) -> None:
        self.events.append(("settings", sql))

    def login_request(self, body: bytes) -> None:
        self.events.append(("request", body))

    def login_response(self, body: bytes) -> None:
        self.events.append(("response", body))

    def backend_key(self, body: bytes) -> None:
        self.events.append(("key", body))

    def calls(self, kind: int, body: bytes) -> list[Statement] | None:
        return [Statement(body)] if b"CALL" in body else None

    def unread(self) -> None:
        self.events.append(("unread",))

    def notice(self, body: bytes) -> bool:
        self.events.append(("notice", body))
        return self.watchword in body

    def statement_ended(self) -> None:
        self.events.append(("ended",))

    def ready(self) -> None:
        self.events.append(("ready",))

    def complaint(self, error: bytes) -> bytes | None:
        return b"E\0\0\0\5\0" if b"REPLACE" in error else None

    def take_over(self, data: bytes, statements: list[Statement]) -> None:
        self.taken = data


def relayed(data: bytes, cuts: list[int], *, from_client: bool) -> tuple[bytes, bytes | None, Any]:
    """What a relay passes on of a stream, what it hands over, and what it tells its session."""
    client, server, told = Side(), Side(), Told()
    relay = Relay(client, server, told)  # type: ignore[arg-type]
    receive = relay.from_client if from_client else relay.from_server
    for piece in cut(data, cuts):
        if told.taken is None:
            receive(piece)
        else:
            told.taken += piece
    written, other = (server, client) if from_client else (client, server)
    assert other.written == b""
    reported = {name: told.reported[name] for name in WATCHED}
    return written.written, told.taken, (told.events, relay.status, reported)


FRONTEND_STREAM = serialized(
    [
        m.PasswordMessage(b"secret"),
        q("SET a.b = 'pg_background'"),
        p("SELECT 'pg_background'", "s"),
        b("s", "p" * 300, (b"x" * 20000, b"pg_background_launch("), (0, 1)),
        d(b"P"),
        e("p", 3),
        H,
        S,
        c(b"S", "s"),
        m.FunctionCall(1, (), (b"x",), 0),
        m.CopyData(b"Q\0\0\0\4pg_background" * 100),
        m.CopyDone(),
        q(""),
    ]
)
CALL = q("SELECT pg_background CALL")
FOR_US = m.NoticeResponse({"M": b"WATCHWORD and more" + b"." * 1000})
BACKEND_STREAM = serialized(
    [
        m.AuthenticationMD5Password(b"salt"),
        m.AuthenticationOk(),
        m.ParameterStatus(b"client_encoding", b"UTF8"),
        m.BackendKeyData(1, b"key!"),
        m.ReadyForQuery(b"T"),
        m.RowDescription((m.Field(b"n", 0, 0, 23, 4, -1, 0),)),
        m.DataRow((b"E\0\0\0\5Z\0\0\0\5I" * 1000, None)),
        m.CommandComplete(b"SELECT 1"),
        m.NoticeResponse({"M": b"note"}),
        FOR_US,
        m.NoticeResponse({"M": b"a long note" * 100}),
        m.ErrorResponse({"M": b"REPLACE me"}),
        m.ErrorResponse({"M": b"no"}),
        m.CopyInResponse(0, (0,)),
        m.ReadyForQuery(b"E"),
    ]
)


def cuts_of(stream: bytes) -> st.SearchStrategy[list[int]]:
    edge = st.integers(0, 400) | st.integers(len(stream) - 400, len(stream))
    return st.lists(edge | st.integers(0, len(stream)), max_size=30)


@given(cuts_of(FRONTEND_STREAM + CALL.serialize()))
def test_any_cut_of_the_clients_stream_gives_the_same(cuts: list[int]) -> None:
    stream = FRONTEND_STREAM + CALL.serialize() + FRONTEND_STREAM
    written, taken, events = relayed(stream, cuts, from_client=True)
    assert written == FRONTEND_STREAM
    assert taken == CALL.serialize() + FRONTEND_STREAM
    assert events == relayed(FRONTEND_STREAM, [], from_client=True)[2]


@given(cuts_of(BACKEND_STREAM))
def test_any_cut_of_the_servers_stream_gives_the_same(cuts: list[int]) -> None:
    replaced = m.ErrorResponse({"M": b"REPLACE me"}).serialize()
    expected = BACKEND_STREAM.replace(replaced, b"E\0\0\0\5\0").replace(FOR_US.serialize(), b"")
    result = relayed(BACKEND_STREAM, cuts, from_client=False)
    assert result[0] == expected
    assert result == relayed(BACKEND_STREAM, [], from_client=False)


def test_any_cut_of_the_last_answer_settles_a_batch() -> None:
    """A call waits for what precedes it in its batch. The server may send the end of that as the
    rest of a message, with nothing behind it."""
    asked = serialized([p("SELECT"), b("", ""), e()])
    answer = serialized([m.ParseComplete(), m.BindComplete(), m.CommandComplete(b"SELECT 0")])

    async def settled(point: int) -> None:
        relay = Relay(Side(), Side(), Told())  # type: ignore[arg-type]
        relay.from_server(m.ReadyForQuery(b"I").serialize())
        relay.from_client(asked)
        settling = asyncio.ensure_future(relay.settle())
        await asyncio.sleep(0)
        for piece in cut(answer, [point]):
            assert not settling.done()
            relay.from_server(piece)
        async with asyncio.timeout(10):
            await settling

    for point in range(1, len(answer)):
        asyncio.run(settled(point))


@pytest.mark.parametrize("stream", [FRONTEND_STREAM, BACKEND_STREAM], ids=["client", "server"])
def test_each_single_cut_gives_the_same(stream: bytes) -> None:
    from_client = stream is FRONTEND_STREAM
    expected = relayed(stream, [], from_client=from_client)
    points = [*range(700), *range(700, len(stream), 97), *range(len(stream) - 300, len(stream))]
    for point in points:
        assert relayed(stream, [point], from_client=from_client) == expected


@given(st.lists(st.binary(max_size=40), max_size=6), st.booleans())
def test_garbage_is_passed_on_and_ends_nothing(chunks: list[bytes], from_client: bool) -> None:
    """The other side judges bytes that are not the protocol."""
    client, server = Side(), Side()
    relay = Relay(client, server, Told())  # type: ignore[arg-type]
    source = Garbage(relay.from_client if from_client else relay.from_server)
    if from_client:
        relay._client = source  # type: ignore[assignment]
    else:
        relay._server = source  # type: ignore[assignment]
    for chunk in chunks:
        source.receive(chunk)
    data = b"".join(chunks)
    written = (server if from_client else client).written
    assert data.startswith(written) or len(written) <= len(data) + 5


class Garbage(Side):
    def __init__(self, receive: Any) -> None:
        super().__init__()
        self.receive = receive


def test_random_scripts_in_random_pieces(server: Server, proxy: Proxy) -> None:
    """Sessions of many scripts in a row, cut at random."""
    generator = random.Random(1)
    names = sorted(SCRIPTS.keys() - {"a function call in a batch"})
    for _ in range(5):
        chosen = generator.sample(names, 12)
        script: list[Sent | Wait] = []
        for name in chosen:
            script += [*SCRIPTS[name], *END, q("DISCARD ALL"), Wait(m.ReadyForQuery, 1)]
        both(
            server,
            proxy,
            script,
            waiting=False,
            cuts=lambda data: generator.sample(range(len(data)), 40),
        )


@pytest.mark.one_server
def test_the_buffer_of_the_recorder_is_empty_after_a_script(server: Server) -> None:
    """The recorder itself: it has read everything that was answered."""
    with Frontend(server) as client:
        record(client, SCRIPTS["a query"])
        client.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.socket.recv(1)
        assert isinstance(client._buffer, MessageBuffer)
        assert len(client._buffer) == 0


@pytest.mark.one_server
def test_a_proxy_that_is_stopped_says_goodbye(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--shutdown-timeout", "0")
    with Frontend(proxy) as client:
        assert proxy.stop(signal.SIGTERM) == 0
        with pytest.raises(Closed) as closed:
            client.until_ready()
    assert [error.sqlstate for error in errors(closed.value.messages)] == ["57P01"]


@pytest.mark.turns(3)
@pytest.mark.parametrize("length", [0, 3, -1, -5, -6, -(2**31), 2**30])
@pytest.mark.parametrize("kind", "QPBDECS")
def test_a_message_of_an_impossible_length_ends_the_session(
    server: Server, proxy: Proxy, kind: str, length: int
) -> None:
    """At rest and behind a message of the same batch; what follows looks like messages."""
    if length == 2**30 and server.version < 140000:
        pytest.skip("the server waits for so long a message")
    broken = kind.encode() + struct.pack(">i", length) + serialized([e(), S])
    for before in ((), (b(),)):
        said: list[list[m.BackendMessage]] = []
        for port in (server, proxy):
            with Frontend(port) as client:
                client.query("SELECT 1")
                client.send(*before, broken)
                with pytest.raises(Closed) as closed:
                    client.until_ready()
                said.append(closed.value.messages)
        assert said[0] == said[1]
