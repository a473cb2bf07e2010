"""What users make up is bounded: in memory, and in the messages between processes.

Invariant: it is cut where it is kept, and a mark says so. Nothing of it ever ends a process, and
reading it takes time in proportion to its size.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar
from unittest.mock import AsyncMock, Mock

import psycopg
import pytest

from protocol import messages as m
from protocol.framing import HEADER_SIZE, LongMessage
from protocol.messages import ErrorResponse, NoticeResponse, ReadyForQuery, RowDescription
from proxy import config
from proxy.jobs import launch as launches
from proxy.jobs.attempt import Attempt
from proxy.jobs.job import Job
from proxy.jobs.owner import Owner
from proxy.jobs.registry import CUT, cut_fields
from proxy.jobs.request import LaunchRequest
from proxy.server import Server as ProxyServer
from tests.conftest import StartProxy, upstream_of
from tests.support.background import run, wait_until
from tests.support.growth import LINEAR, growth
from tests.support.recorder import Frontend, S, b, errors, p
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Footprint
from tests.test_workers import Handle, launch, one, sessions, workers

MEGABYTE = 1024 * 1024
ERROR = "DO $$ BEGIN RAISE EXCEPTION '%', repeat('é', 6500000); END $$"
PROGRESS = "SELECT pg_background_progress(1, repeat('é', 6500000))"


@pytest.fixture(scope="module")
def pair(server: Server) -> Iterator[Proxy]:
    """A proxy with two workers, which live as long as it does."""
    with Proxy(upstream_of(server), "--workers", "2") as proxy:
        for number in (1, 2):
            proxy.wait_for_log(rf"worker {number} .* is ready")
        before = {worker.pid for worker in workers(proxy)}
        yield proxy
        assert {worker.pid for worker in workers(proxy)} == before
        assert "ERROR" not in proxy.log, proxy.log


@pytest.fixture
def both(pair: Proxy, scratch: str) -> Iterator[tuple[Connection, Connection]]:
    """A session in each of them."""
    with sessions(pair, dbname=scratch) as found:
        yield found


def wait_for(conn: Connection, handle: Handle) -> None:
    conn.execute("SELECT pg_background_wait_v2(%s, %s)", handle)


# Between processes (docs/security.md, H6)


@pytest.mark.parametrize(
    ("sql", "label"),
    [
        (ERROR, "x"),
        ("SELECT 1", "é" * 6_500_000),
        (PROGRESS, "x"),
        (ERROR, "\x01" * 13_000_000),
        (f"{PROGRESS}; SELECT '{'x' * 10_000}'", "x"),
    ],
    ids=["error", "label", "progress", "error and label", "progress and SQL"],
)
def test_no_text_of_a_job_ends_a_process(
    both: tuple[Connection, Connection], sql: str, label: str
) -> None:
    here, _ = both
    handles = [launch(here, sql, label) for _ in range(3)]
    for handle in handles:
        wait_for(here, handle)
    for conn in both:
        rows = conn.execute(
            "SELECT pid, cookie, last_error, label FROM pg_background_list_all() AS"
            " (pid int4, cookie int8, launched_at timestamptz, user_id oid, queue_size int4,"
            " state text, sql_preview text, last_error text, consumed bool, label text)"
        ).fetchall()
        found = {(pid, cookie): (error, name) for pid, cookie, error, name in rows}
        for handle in handles:
            error, name = found[handle]
            assert label.startswith(name)
            assert len(name.encode()) <= 1024
            if sql == ERROR:
                assert error == "é" * 2048 + "[...]"
            for function in ("outcome", "error_info", "result_info", "get_progress", "full_sql"):
                conn.execute(f"SELECT pg_background_{function}(%s, %s)", handle)
        text = one(conn, "SELECT (pg_background_get_progress(%s, %s)).progress_msg", handles[0])
        assert text in (None, "é" * 2048 + "[...]")


# Of 2000 ended jobs something is kept.
@pytest.mark.parametrize("jobs", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_list_of_many_jobs_with_all_that_is_kept(
    both: tuple[Connection, Connection], jobs: int
) -> None:
    here, there = both
    sql = f"/* {'x' * 600} */ DO $$ BEGIN RAISE EXCEPTION '%', repeat(chr(1), 9999); END $$"
    here.execute(
        "SELECT pg_background_run(%s, 0, 0, %s) FROM generate_series(1, %s)",
        [sql, "\x01" * 1024, jobs],
    )
    rows = there.execute("SELECT * FROM pg_background_list_all()").fetchall()
    assert len(rows) >= jobs
    full = [row for row in rows if row[7] == "\x01" * 4096 + "[...]" and row[9] == "\x01" * 1024]
    assert len(full) >= jobs - 10


def test_a_question_about_many_jobs(both: tuple[Connection, Connection]) -> None:
    """As many handles as one may ask for."""
    here, there = both
    handle = launch(here, "SELECT 1")
    wait_for(here, handle)
    unknown = ",".join(f'"({pid},{2**62})"' for pid in range(7_000))
    array = f'{{{unknown},"({handle[0]},{handle[1]})"}}'
    query = "SELECT * FROM pg_background_drain(%s)"
    rows = there.execute(query, [array]).fetchall()
    assert len(rows) == 7_001
    assert rows[-1][:3] == (*handle, "stopped")


# What is kept (docs/security.md, M1)


def raised(conn: Connection, size: int, queue_size: int = 0) -> tuple[Handle, str]:
    """A job whose error has this many characters; its message as it is fetched."""
    sql = f"DO $$ BEGIN RAISE EXCEPTION '%', repeat('é', {size}) || 'e'; END $$"
    row = conn.execute(
        "SELECT (pg_background_launch_v2(%s, %s)).*", [sql, queue_size], binary=True
    ).fetchone()
    assert row is not None
    wait_for(conn, row)
    with pytest.raises(psycopg.Error) as caught:
        conn.execute("SELECT * FROM pg_background_result(%s, %s) AS (x text)", row)
    assert caught.value.sqlstate == "P0001"
    return row, caught.value.diag.message_primary or ""


@pytest.mark.parametrize(
    ("size", "queue_size"), [(1, 0), (10_000, 0), (500_000, 0), (5_000_000, 20_000_000)]
)
def test_an_error_is_fetched_whole(conn: Connection, size: int, queue_size: int) -> None:
    handle, message = raised(conn, size, queue_size)
    assert message == "é" * size + "e"
    row = conn.execute("SELECT state FROM pg_background_outcome(%s, %s)", handle).fetchone()
    assert row == ("error",)


def test_an_error_that_is_larger_than_the_queue_is_cut(conn: Connection) -> None:
    _, message = raised(conn, 5_000_000)
    assert message.endswith("é[...]")
    assert MEGABYTE - 200 < len(message.encode()) <= MEGABYTE + 5
    assert message[:-5] == "é" * (len(message) - 5)


def test_a_notice_that_is_larger_than_the_queue_is_cut(conn: Connection) -> None:
    sql = "DO $$ BEGIN RAISE INFO '%', repeat('é', 5000000); RAISE INFO 'end'; END $$"
    said: list[str] = []
    conn.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    pid = one(conn, "SELECT pg_background_launch(%s)", [sql])
    conn.execute("SELECT * FROM pg_background_result(%s) AS (x text)", [pid])
    assert said[0].endswith("é[...]")
    assert said[1:] == ["end"]


def test_what_is_looked_at_is_cut_and_says_so(conn: Connection) -> None:
    sql = (
        "DO $$ BEGIN RAISE EXCEPTION USING message = repeat('a', 5000), detail = repeat('b', 4096),"
        " hint = repeat('c', 4097); END $$"
    )
    handle = launch(conn, sql)
    wait_for(conn, handle)
    query = "SELECT message, detail, hint FROM pg_background_error_info(%s, %s)"
    expected = ("a" * 4096 + "[...]", "b" * 4096, "c" * 4096 + "[...]")
    assert conn.execute(query, handle).fetchone() == expected
    assert one(conn, "SELECT error_message FROM pg_background_outcome(%s, %s)", handle) == (
        "a" * 4096 + "[...]"
    )


@pytest.mark.parametrize("what", ["error", "progress", "notice"])
def test_memory_is_not_kept(start_proxy: StartProxy, scratch: str, what: str) -> None:
    """The attack: each job leaves 10 MB in a table of what is known."""
    proxy = start_proxy()
    large = "repeat('x', 10000000)"
    say = f"DO $$ BEGIN RAISE {{}} '%', {large}; END $$"
    sql = {
        "error": say.format("EXCEPTION"),
        "notice": say.format("INFO"),
        "progress": f"SELECT pg_background_progress(1, {large})",
    }[what]

    def run(conn: Connection) -> None:
        handle = launch(conn, sql)
        if what == "notice":  # more than the queue takes, so the job waits for its reader
            conn.execute("SELECT * FROM pg_background_result(%s, %s) AS (x text)", handle)
        else:
            wait_for(conn, handle)

    with proxy.connect(dbname=scratch) as conn:
        run(conn)
        footprint = Footprint(proxy)
        before = footprint.rss
        for _ in range(8):
            run(conn)
        wait_until(lambda: footprint.rss - before < 40 * MEGABYTE)


# How long it takes (docs/security.md, H4)


class Still:
    """A backend of which nothing is needed but what it has sent."""

    pid = 1
    is_pooled = False
    parameters: ClassVar[dict[bytes, bytes]] = {}
    own_settings: ClassVar[dict[bytes, bytes]] = {b"pg_background_proxy.job": b"no"}
    takeover = None
    receiver = None

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def terminate(self) -> None: ...
    def forget_receiver(self) -> None: ...


def job(queue_size: int = 256 * MEGABYTE) -> Job:
    still: Any = Still()
    route: Any = None
    lease: Any = None
    made = Job(
        b"SELECT 1",
        queue_size=queue_size,
        role_id=1,
        cluster=b"",
        encoding=b"UTF8",
        route=route,
        user=b"",
        database=b"",
        lease=lease,
        on_finish=lambda job: None,
    )
    made.assign(
        Attempt(
            made,
            still,
            b"SELECT 1",
            session=Mock(notice=lambda body: False, failed=lambda error: error),
            keep_backend=lambda backend: None,
        )
    )
    return made


def feed(job: Job, data: bytes) -> int:
    """As a backend does; how many pieces it took, between each of which the loop runs."""
    attempt = job.attempt
    assert isinstance(attempt, Attempt)
    view = memoryview(data)
    turns = 0
    while view:
        size = min(len(view), 64 * 1024, attempt.room())
        attempt.feed(view[:size])
        view = view[size:]
        turns += 1
    return turns


def message_of(kind: str, size: int) -> bytes:
    fields = {"S": b"ERROR", "C": b"XX000", "M": b"x" * size}
    return {
        "error": lambda: ErrorResponse(fields).serialize(),
        "notice": lambda: NoticeResponse(fields).serialize(),
        "notices": lambda: NoticeResponse({**fields, "M": b"x" * 200}).serialize() * (size // 200),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "size"),
    # Four times and once both larger than what the allocator keeps: fresh memory costs more than
    # copying does. Of short ones there are as many as take as long.
    [("error", 160 * MEGABYTE), ("notice", 160 * MEGABYTE), ("notices", 8 * MEGABYTE)],
)
def test_a_job_reads_in_proportion_to_what_it_gets(kind: str, size: int) -> None:
    assert feed(job(), message_of(kind, size)) >= size // (64 * 1024)
    assert growth(lambda data: feed(job(), data), partial(message_of, kind), size) < LINEAR


def test_what_comes_behind_a_long_message_is_read(
    conn: Connection,
) -> None:
    """Cut anywhere, and whatever its size is."""
    body = ErrorResponse({"S": b"ERROR", "C": b"XX000", "M": b"x" * 200_000}).serialize()
    tail = NoticeResponse({"S": b"INFO", "C": b"00000", "M": b"tail"}).serialize()
    for first in (1, 5, 6, 65_536, len(body) - 1, len(body), len(body) + 1):
        one_job = job()
        view = memoryview(body + tail)
        feed(one_job, bytes(view[:first]))
        feed(one_job, bytes(view[first:]))
        assert one_job.fetched_error is not None
        assert len(one_job.fetched_error.message) == 200_000
        assert one_job.output.take_notice() is not None


def test_a_long_message_that_nobody_expects_ends_the_job() -> None:
    one_job = job(64)
    feed(one_job, b"T" + (1 << 28).to_bytes(4, "big"))
    feed(one_job, bytes(70_000))
    description = RowDescription(()).serialize()
    assert len(description) > HEADER_SIZE
    assert not one_job.finished


def test_fields_are_cut_where_a_character_ends() -> None:
    whole = ErrorResponse({"S": b"ERROR", "C": b"XX000", "M": "äöü".encode(), "D": b"more"})
    body = whole.serialize()[HEADER_SIZE:]
    for size in range(1, len(body)):
        long = LongMessage(ord("E"), len(body), size)
        assert long.feed(body) == len(body)
        fields = ErrorResponse.parse(cut_fields(long.body, b"UTF8")).fields
        for code, text in fields.items():
            given = whole.fields[code]
            assert text == given or given.startswith(text.removesuffix(CUT))
            text.decode()


async def test_a_job_that_has_ended_is_not_kept_until_its_timeout() -> None:
    """F2 of docs/security.md: the timer of pg_background_run_query, which may be a day."""
    server = ProxyServer(config.load())
    ended = job()
    server.jobs.limit(ended, 86_400_000)
    feed(ended, ReadyForQuery(b"I").serialize())
    assert ended.finished
    gone = weakref.ref(ended)
    server.jobs.limit(ended, 86_400_000)
    del ended
    gc.collect()
    assert gone() is None


async def test_a_job_that_runs_does_not_keep_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session may have ended long ago, with all that it had read."""

    class Session(Owner):
        launcher: Any = Mock(
            launch=lambda begin, *_, **__: begin(Still(), Mock()), setting=lambda *_: 64 * 1024
        )
        server_version: Any = 180000
        client_encoding: Any = b"UTF8"
        server_encoding: Any = b"UTF8"
        inject: Any = None
        cancel_statement: Any = None
        job_session: Any = staticmethod(lambda *_: Mock())

    monkeypatch.setattr(Attempt, "start", AsyncMock())
    session = Session(ProxyServer(config.load()).jobs)
    request, context = LaunchRequest(b"SELECT 1"), Mock(role_id=1)
    launched = await launches.launch(
        session, request, context, session.launcher, b"UTF8", waiting=contextlib.nullcontext
    )
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert not launched.finished
    assert gone() is None


# Queues together (docs/security.md, M1)


def test_queues_together_hold_no_more_than_their_budget(server: Server, scratch: str) -> None:
    """Ten of 5 MB without a reader; then all are read, and nothing is missing."""
    options = ("--queue-memory", "4MB", "--role-queue-memory", "2MB")
    with Proxy(upstream_of(server), *options) as proxy, proxy.connect(dbname=scratch) as conn:
        assert len(run(conn, "SELECT n, repeat('x', 1000) FROM generate_series(1, 999) n")) == 999
        footprint = Footprint(proxy)
        before = footprint.rss
        sql = "SELECT n, repeat('x', 2000) FROM generate_series(1, 5000) n"
        launching = "SELECT pg_background_launch(%s, 20000000)"
        pids = [one(conn, launching, [sql]) for _ in range(10)]
        with server.connect() as direct:
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
            wait_until(lambda: direct.execute(waiting).fetchone() != (0,))
        assert footprint.rss - before < 16 * MEGABYTE
        query = "SELECT * FROM pg_background_result(%s) AS (n int, x text)"
        for pid in (pids.pop(0), *reversed(pids)):
            assert [n for n, _ in conn.execute(query, [pid])] == list(range(1, 5001))
        assert "ERROR" not in proxy.log


def test_results_that_nobody_fetches_are_bounded(server: Server, scratch: str) -> None:
    """F11 of docs/security.md: a session launches on and on. Those that find the budget used up
    wait for their reader, and then the limit of running jobs is met; nothing is lost by that."""
    budget = 4 * MEGABYTE
    options = ("--role-queue-memory", "4MB", "--max-workers", "8")
    with Proxy(upstream_of(server), *options) as proxy, proxy.connect(dbname=scratch) as conn:
        assert run(conn, "SELECT 1") == [(1,)]
        footprint = Footprint(proxy)
        before = footprint.rss
        launched: list[int] = []

        def launch_on() -> None:
            while len(launched) < 1000:
                sql = "SELECT pg_background_launch('SELECT repeat(''x'', 50000)')"
                launched.append(one(conn, sql))

        with pytest.raises(psycopg.errors.ConfigurationLimitExceeded, match="too many"):
            launch_on()
        # Those whose result is held whole, and those that wait.
        assert budget // 50_100 <= len(launched) <= budget // 50_000 + 1 + 8
        # A job costs some 20 kB beside its rows.
        assert footprint.rss - before < budget + 10 * MEGABYTE
        query = "SELECT * FROM pg_background_result(%s) AS (x text)"
        for pid in launched:
            assert one(conn, query, [pid]) == "x" * 50_000


def test_the_configuration_stands_above_the_session(server: Server, scratch: str) -> None:
    options = ("--max-session-workers", "2", "--max-queue-size", "128kB")
    with Proxy(upstream_of(server), *options) as proxy, proxy.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.max_workers = 1000")
        conn.execute("SET pg_background.default_queue_size = '256MB'")
        for _ in range(2):
            launch(conn, "SELECT pg_sleep(2)")
        with pytest.raises(psycopg.errors.ConfigurationLimitExceeded) as caught:
            launch(conn, "SELECT 1")
        assert "max_session_workers" in str(caught.value.diag.message_detail)
        sizes = conn.execute("SELECT queue_size FROM pg_background_list").fetchall()
        assert set(sizes) == {(128 * 1024,)}


# Names of statements and portals


@pytest.mark.parametrize("kind", ["statements", "portals"])
def test_what_was_not_made_leaves_no_name(server: Server, kind: str) -> None:
    """A pipeline of statements or portals that fails with the first, again and again."""
    call = "SELECT pg_background_launch($1), 1 / $2::int"
    names = [f"{number:03}" + "n" * 950 for number in range(1000)]
    bad = "SELECT pg_background_launch('SELECT 1'), nosuch"
    pipeline: list[m.Message]
    if kind == "statements":
        pipeline = [p(bad, names[0]), *(p(call, name) for name in names)]
    else:
        pipeline = [b("s", name, (b"x", b"nan" if name is names[0] else b"1")) for name in names]
    with Proxy(upstream_of(server)) as proxy, Frontend(proxy, timeout=60.0) as frontend:
        frontend.send(p(call, "s"), S)
        frontend.until_ready()
        footprint = Footprint(proxy)
        for repetition in range(8):
            if repetition == 3:
                before = footprint.rss
            frontend.send(*pipeline, S)
            assert errors(frontend.until_ready())
        assert footprint.rss - before < 3 * MEGABYTE
        assert "Traceback" not in proxy.log
