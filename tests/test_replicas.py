"""Two proxies in front of one server, behind HAProxy, and who listens in between.

What each knows of the other one's jobs: `test_jobs_elsewhere`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, get_args

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors

from proxy.config import load
from proxy.runtime import Runtime
from proxy.workers.messages import (
    Answer,
    Ask,
    CancelJob,
    JobEnded,
    News,
    NewsItem,
    Question,
    encode,
)
from proxy.workers.replica_link import _Conversation
from proxy.workers.sealed import MAX_RECIPIENTS, PIECE, VERSION, Seal, new_name
from tests.conftest import StartProxy, upstream_of
from tests.support.api_clients import Gate
from tests.support.background import failure, notices, run, spares_of, wait_until
from tests.support.haproxy import HAProxy, haproxy
from tests.support.replicas import SECRET, Replicas, options, replicas, secret_in
from tests.support.servers import Connection, Proxy, Server
from tests.test_workers import SLEEPS, Handle, launch, one, state

OTHER: Final = "another, of replicas that know nothing of the first ones"
LINKS: Final = (
    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pg-background-proxy:%'"
)

WAIT: Final = "SELECT pg_background_wait(%s::int4, %s::int8)"
LIST: Final = "SELECT pid FROM pg_background_list_all()"


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return secret_in(tmp_path_factory.mktemp("secret") / "secret")


@pytest.fixture(scope="module")
def pair(server: Server, secret_file: Path) -> Iterator[Replicas]:
    with replicas(upstream_of(server), *options(secret_file), "--log-level", "debug") as found:
        yield found


@pytest.fixture(scope="module")
def balancer(pair: Replicas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    """HAProxy in front of the two."""
    servers = [f"127.0.0.1:{proxy.port}" for proxy in pair]
    with haproxy(tmp_path_factory.mktemp("haproxy"), *servers) as found:
        yield found


@pytest.fixture
def both(pair: Replicas, scratch: str) -> Iterator[tuple[Connection, Connection]]:
    """A session at each of the two."""
    with pair.sessions(dbname=scratch) as found:
        yield found


def end(conn: Connection, handle: Handle) -> None:
    conn.execute("SELECT pg_background_cancel(%s::int4, %s::int8, 20000)", handle)


def wait_until_waiting(observer: Connection, conn: Connection) -> None:
    """Until the proxy waits in pg_background_wait, and the server does not."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'ClientRead'"
        " AND query ~ 'pg_background_wait'"
    )
    wait_until(lambda: one(observer, query, [conn.info.backend_pid]))


def wait_until_in_server(observer: Connection, conn: Connection) -> None:
    """Until a wait of the session is seen in the server."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
    wait_until(lambda: one(observer, query, [conn.info.backend_pid]))


def listens(pair: Replicas) -> int:
    return sum(
        proxy.log.count("other replicas can be asked now") for proxy in (pair.first, pair.second)
    )


# Behind the balancer


def test_many_sessions_are_served_as_by_one(balancer: HAProxy, scratch: str) -> None:
    def serve(number: int) -> list[Any]:
        with balancer.connect(dbname=scratch) as conn:
            found = [run(conn, f"SELECT {number}") for _ in range(5)]
            handle = launch(conn, f"SELECT {number}")
            assert one(conn, WAIT, handle) is True
            return found

    with ThreadPoolExecutor(8) as threads:
        for number, found in enumerate(threads.map(serve, range(16))):
            assert found == [[(number,)]] * 5


def test_a_cancel_request_reaches_the_session_whichever_replica_gets_it(
    pair: Replicas,
    balancer: HAProxy,
    scratch: str,
    background: Callable[..., Future[Any]],
    both: Any,
) -> None:
    """Connections go to both in turn, so the request goes to the other one. Where the server waits
    too, it could do its part; it does not for a job with CONCURRENTLY."""
    crossed = "a cancel request was for a session of another worker"
    before = pair.first.log.count(crossed) + pair.second.log.count(crossed)
    handle = launch(both[0], f"{SLEEPS} /* concurrently */")
    try:
        for _ in range(10):
            with balancer.connect(dbname=scratch) as conn:
                waiting = background(conn.execute, WAIT, handle)
                wait_until_waiting(both[1], conn)
                conn.cancel_safe(timeout=10)
                with pytest.raises(errors.QueryCanceled, match="due to user request"):
                    waiting.result(10)
                assert one(conn, "SELECT 1") == 1
    finally:
        end(both[0], handle)
    assert pair.first.log.count(crossed) + pair.second.log.count(crossed) == before + 10


def test_a_cancel_request_for_a_statement_reaches_the_server(
    balancer: HAProxy, scratch: str, background: Callable[..., Future[Any]], both: Any
) -> None:
    active = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    for _ in range(4):
        with balancer.connect(dbname=scratch) as conn:
            waiting = background(conn.execute, "SELECT pg_sleep(60)")
            wait_until(
                lambda pid=conn.info.backend_pid: one(both[0], active, [pid])  # type: ignore[misc]
            )
            conn.cancel_safe(timeout=10)
            with pytest.raises(errors.QueryCanceled, match="due to user request"):
                waiting.result(10)


# Who may do what


def test_who_may_touch_a_job_is_the_same_at_both(
    server: Server, pair: Replicas, both: tuple[Connection, Connection], scratch: str
) -> None:
    """Also in the moment after the first launch of a role."""
    with server.connect() as admin:
        admin.execute("CREATE ROLE owns LOGIN; CREATE ROLE reads; CREATE ROLE member")
        for role in ("owns", "reads", "member"):
            both[0].execute(f"SELECT grant_pg_background_privileges('{role}')")
        admin.execute("GRANT owns TO member")
    try:
        with pair.sessions(dbname=scratch, user="owns") as (here, there):
            handle = launch(here, SLEEPS)
            for conn in both:  # superusers
                assert state(conn, handle) == "running"
                conn.execute("SET ROLE member")
                assert state(conn, handle) == "running"
                conn.execute("SET ROLE reads")
                assert state(conn, handle) is None
                assert conn.execute(LIST).fetchall() == []
                cancel = "SELECT pg_background_cancel(%s::int4, %s::int8)"
                assert failure(conn, cancel, handle).sqlstate == "42501"
                conn.execute("RESET ROLE")
            assert there.execute(LIST).fetchall() == [(handle[0],)]
            end(there, handle)
            assert state(here, handle) == "canceled"
    finally:
        wait_until(lambda: not [c for c in server.clients() if c[3] == SLEEPS])
        for conn in both:
            conn.execute("RESET ROLE")
        with server.connect() as admin:
            wait_until(
                lambda: (
                    not one(admin, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'owns'")
                )
            )
            for role in ("owns", "reads", "member"):
                admin.execute(f"REVOKE pgbackground_role FROM {role}")
            admin.execute("DROP ROLE member; DROP ROLE owns; DROP ROLE reads")


# A hostile role on the channel


class Eavesdropper:
    """What a role can do that has found out the channel, which it cannot guess."""

    def __init__(self, server: Server) -> None:
        self._conn = server.connect(user="alice")
        self.channel = Seal(SECRET.encode()).channel
        self._conn.execute(f"LISTEN {self.channel}")

    def heard(self) -> list[str]:
        return [notify.payload for notify in self._conn.notifies(timeout=0.5)]

    def say(self, *payloads: str) -> None:
        self._conn.cursor().executemany(
            "SELECT pg_notify(%s, %s)", [(self.channel, payload) for payload in payloads]
        )

    def flood(self, count: int) -> None:
        self._conn.execute(
            "SELECT pg_notify(%s, 'x' || g) FROM generate_series(1, %s) g", [self.channel, count]
        )

    def say_often(self, payload: str, count: int) -> None:
        # In transactions of their own: one says the same only once.
        loop = f"LOOP PERFORM pg_notify('{self.channel}', '{payload}'); COMMIT; END LOOP"
        self._conn.execute(f"DO $$ BEGIN FOR i IN 1..{count} {loop}; END $$")

    def close(self) -> None:
        self._conn.close()


@pytest.fixture
def hostile(server: Server) -> Iterator[Eavesdropper]:
    hostile = Eavesdropper(server)
    yield hostile
    hostile.close()


def test_who_listens_learns_nothing_of_a_job(
    both: tuple[Connection, Connection], hostile: Eavesdropper
) -> None:
    handle = launch(both[0], "SELECT 'tell nobody'", "label of a secret")
    assert one(both[1], WAIT, handle) is True
    assert (handle[0],) in both[1].execute(LIST).fetchall()
    heard = hostile.heard()
    assert heard
    everything = b"".join(map(base64.b64decode, heard))
    cookie = str(handle[1]).encode()
    for told in (b"tell nobody", b"label of", b"FindJobs", b"snapshot", b"handles", cookie):
        assert told not in everything
        assert base64.b64encode(told)[:-4] not in everything


def test_what_was_said_once_does_nothing_when_it_is_said_again(
    balancer: HAProxy,
    both: tuple[Connection, Connection],
    hostile: Eavesdropper,
    scratch: str,
    background: Callable[..., Future[Any]],
) -> None:
    """A cancel request would end what the session does now."""
    handle = launch(both[0], f"{SLEEPS} /* concurrently */")
    with balancer.connect(dbname=scratch) as conn:
        canceled = background(conn.execute, WAIT, handle)
        wait_until_waiting(both[0], conn)
        conn.cancel_safe(timeout=10)
        with pytest.raises(errors.QueryCanceled):
            canceled.result(10)
        recorded = hostile.heard()
        assert len(recorded) >= 2
        waiting = background(conn.execute, WAIT, handle)
        wait_until_waiting(both[0], conn)
        for _ in range(3):
            hostile.say(*recorded)
        # What is asked after these is answered after them.
        for asking in both:
            assert state(asking, (1, 2)) is None
            assert state(asking, handle) == "running"
        assert not waiting.done()
        end(both[1], handle)
        assert waiting.result(20).fetchone() == (True,)


def test_messages_without_the_secret_are_nothing(
    both: tuple[Connection, Connection], hostile: Eavesdropper, server: Server
) -> None:
    handle = launch(both[0], SLEEPS)
    with server.connect() as observer:
        names = [
            bytes.fromhex(name.rpartition(":")[2])
            for [name] in observer.execute(
                "SELECT application_name FROM pg_stat_activity"
                " WHERE application_name LIKE 'pg-background-proxy:%'"
            )
        ]
    assert len(names) == 2
    forged: list[str] = []
    for text in (
        encode(Question(1, CancelJob(*handle))),
        encode(News(JobEnded({"pid": handle[0], "cookie": handle[1]}))),
        encode(Answer(1, 0, [])),
    ):
        # With another secret; then true messages, changed.
        forged += [
            Seal(b"x" * 40).close(sender, 10**9, names, text, more=False)
            for sender in (*names, b"s" * 16)
        ]
    assert state(both[1], handle) == "running"
    for payload in hostile.heard():
        data = bytearray(base64.b64decode(payload))
        for place in (0, 16, 23, 24, 25, 41, -33, -1):
            changed = bytearray(data)
            changed[place] ^= 1
            forged.append(base64.b64encode(changed).decode())
    hostile.say(*forged, "", "x", "AAAA", base64.b64encode(bytes(200)).decode())
    assert state(both[1], handle) == "running"
    end(both[1], handle)
    assert state(both[0], handle) == "canceled"


@pytest.mark.parametrize("what", ["made up", "heard before", "heard of one who is gone"])
def test_a_flood_does_not_last(
    pair: Replicas, both: tuple[Connection, Connection], hostile: Eavesdropper, what: str
) -> None:
    """They are deaf for a moment, and serve their clients."""
    handle = launch(both[0], SLEEPS)
    flooded = "somebody who has not got the secret floods them"
    floods = [proxy.log.count(flooded) for proxy in pair]
    before = listens(pair)
    match what:
        case "made up":
            hostile.flood(20_000)
        case "heard before":
            assert state(both[1], handle) == "running"
            hostile.say_often(hostile.heard()[0], 1100)
        case "heard of one who is gone":
            seal, gone = Seal(SECRET.encode()), new_name(b"they are")
            hostile.say(*(seal.close(gone, n, [gone], b"", more=False) for n in range(1, 1100)))
    for proxy, so_often in zip(pair, floods, strict=True):
        wait_until(lambda proxy=proxy, n=so_often: proxy.log.count(flooded) > n)  # type: ignore[misc]
    assert run(both[1], "SELECT 1") == [(1,)]
    wait_until(lambda: listens(pair) >= before + 2)
    wait_until(lambda: state(both[1], handle) == "running")
    end(both[1], handle)


def test_who_joins_while_others_speak_hears_them_from_the_first_byte(server: Server) -> None:
    """What has come between LISTEN and that may end within a message."""
    runtime = Runtime(load({"upstream": upstream_of(server), "auth_user": "postgres"}))
    seal = Seal(OTHER.encode())

    async def join() -> dict[bytes, bool]:
        backend = await runtime.dialer.login_as_auth_user(runtime.config.upstream.hosts[0])
        try:
            await backend.rows(f"LISTEN {seal.channel}".encode())
            with server.connect() as conn:
                notify = (
                    "SELECT pg_notify(%s, repeat('x', 7900) || g) FROM generate_series(1, 50) g"
                )
                conn.execute(notify, [seal.channel])
            while not backend._inbox._buffer:  # noqa: ASYNC110 - it is to be read only later
                await asyncio.sleep(0)
            conversation = _Conversation(backend, seal, new_name(b"together"))
            await conversation.join()
            return await conversation.members()
        finally:
            backend.terminate()

    assert asyncio.run(join()) == {}


# A link that is lost


def test_a_wait_outlives_a_link_that_is_lost(
    pair: Replicas,
    both: tuple[Connection, Connection],
    gate: Gate,
    server: Server,
    background: Callable[..., Future[Any]],
) -> None:
    here, there = both
    handle = launch(here, gate.sql)
    waiting = background(one, there, WAIT, handle)
    with server.connect() as observer:
        wait_until_in_server(observer, there)
        for _ in range(2):
            before = listens(pair)
            assert observer.execute(LINKS.replace("pid", "pg_terminate_backend(pid)")).fetchall()
            wait_until(lambda before=before: listens(pair) >= before + 2)  # type: ignore[misc]
            assert not waiting.done()
    # Who waits is known again, and what it may.
    with pair.second.connect(dbname=there.info.dbname) as third:
        assert state(third, handle) == "running"
    gate.open()
    assert waiting.result(30) is True


def test_a_reload_takes_the_link_elsewhere(server: Server, tmp_path: Path, db: str) -> None:
    secret_in(tmp_path / "secret", OTHER)
    file = tmp_path / "proxy.toml"
    settings = 'replica_secret_file = "secret"\nauth_user = "postgres"\nauth_query = ""\n'
    file.write_text(settings)
    with replicas(upstream_of(server), "--config", str(file)) as pair:
        file.write_text(f'{settings}auth_dbname = "{db}"\n')
        for proxy in pair:
            os.kill(proxy.pid, signal.SIGHUP)
        wait_until(lambda: listens(pair) == 4)
        with pair.sessions() as (here, there):
            handle = launch(here, SLEEPS)
            assert state(there, handle) == "running"
            end(there, handle)


def test_a_replica_that_hangs_is_not_waited_for(server: Server, tmp_path: Path, db: str) -> None:
    options_ = options(secret_in(tmp_path / "secret", OTHER))
    with replicas(upstream_of(server), *options_) as pair, pair.sessions(dbname=db) as both:
        here, there = both
        handle = launch(here, SLEEPS)
        stopped = psutil.Process(pair.first.pid)
        stopped.suspend()
        try:

            def is_passed_over() -> bool:
                asked = pair.second.log.count("a replica does not answer")
                with notices(there) as said:
                    assert state(there, handle) is None
                assert [notice["sqlstate"] for notice in said] == ["01000"]
                return pair.second.log.count("a replica does not answer") == asked

            # The first ones wait for it.
            wait_until(is_passed_over)
            launch(there, "SELECT 1")
        finally:
            stopped.resume()
        wait_until(lambda: state(there, handle) == "running")
        end(there, handle)


def test_without_a_link_an_answer_is_said_to_be_incomplete(
    server: Server, start_proxy: StartProxy, secret_file: Path
) -> None:
    """As long as the replicas cannot be asked; what is known here is."""
    proxy = start_proxy(*options(secret_file), "--auth-dbname", "no_such_database")
    proxy.wait_for_log(r'other replicas cannot be asked: .*"no_such_database" does not exist')
    with proxy.connect() as conn:
        handle = launch(conn, "SELECT 1")
        assert one(conn, WAIT, handle) is True
        with notices(conn) as said:
            assert (handle[0],) in conn.execute(LIST).fetchall()
        assert [notice["sqlstate"] for notice in said] == ["01000"]


@pytest.mark.slow
def test_a_job_whose_replica_has_died_is_lost(
    server: Server,
    tmp_path: Path,
    background: Callable[..., Future[Any]],
    db: str,
) -> None:
    with replicas(upstream_of(server), *options(secret_in(tmp_path / "secret", OTHER))) as pair:
        first = pair.first.connect(dbname=db)
        with first, pair.second.connect(dbname=db) as there, server.connect() as observer:
            handle = launch(first, "SELECT pg_sleep(5)")
            waiting = background(one, there, WAIT, handle)
            wait_until_in_server(observer, there)
            pair.first.kill()
            assert waiting.result(60) is True
            assert state(there, handle) is None


# With several processes each


def test_workers_of_all_replicas_know_a_job_once(server: Server, tmp_path: Path, db: str) -> None:
    secret_file = secret_in(tmp_path / "secret", OTHER)
    with replicas(
        upstream_of(server), *options(secret_file), "--workers", "2", "--shutdown-timeout", "1s"
    ) as pair:
        for proxy in (pair.first, pair.second):
            wait_until(lambda proxy=proxy: proxy.log.count("can be asked now") == 2)  # type: ignore[misc]
        with contextlib.ExitStack() as stack:
            conns = [
                stack.enter_context(proxy.connect(dbname=db))
                for proxy in (pair.first, pair.second) * 4
            ]
            handles = [launch(conn, SLEEPS) for conn in conns]
            pids = sorted(pid for pid, _ in handles)
            for conn in conns:
                with notices(conn) as said:
                    assert sorted(pid for [pid] in conn.execute(LIST)) == pids
                assert said == []  # all have answered
                assert [state(conn, handle) for handle in handles] == ["running"] * 8
            for conn, handle in zip(conns, reversed(handles), strict=True):
                end(conn, handle)
            assert {state(conns[0], handle) for handle in handles} == {"canceled"}


# What else they tell each other


def test_the_spares_of_all_replicas_leave_a_database_that_is_dropped(
    server: Server, tmp_path: Path
) -> None:
    secret_file = secret_in(tmp_path / "secret", OTHER)
    with (
        replicas(upstream_of(server), *options(secret_file), "--spare-lifetime", "60s") as pair,
        pair.sessions() as (here, _),
        server.connect() as observer,
    ):
        observer.execute("CREATE DATABASE dropped")
        with pair.second.connect(dbname="dropped") as there:
            assert run(there, "SELECT 1") == [(1,)]
            wait_until(lambda: spares_of(observer, there))
        here.execute("DROP DATABASE dropped")  # else: it is being accessed by other users


# Without the secret


def test_without_a_secret_replicas_do_not_know_each_other(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    """As docs/limits.md says."""
    with start_proxy().connect(dbname=db) as here, start_proxy().connect(dbname=db) as there:
        handle = launch(here, SLEEPS)
        assert there.execute(LIST).fetchall() == []
        assert state(there, handle) is None
        assert failure(there, WAIT, handle).sqlstate == "42704"
        end(here, handle)


@pytest.mark.parametrize(
    ("text", "mode", "others", "error"),
    [
        (SECRET, 0o644, ["--auth-user", "postgres"], "has group or world access; chmod 600"),
        ("short", 0o600, ["--auth-user", "postgres"], "has 5 bytes, and needs 32"),
        (SECRET, 0o600, [], "replica_secret_file: needs auth_user"),
    ],
)
def test_a_secret_that_is_none_is_refused(
    tmp_path: Path, text: str, mode: int, others: list[str], error: str
) -> None:
    file = secret_in(tmp_path / "secret", text)
    file.chmod(mode)
    with pytest.raises(TimeoutError, match=re.escape(error)):
        Proxy("host=127.0.0.1 port=1", "--replica-secret-file", str(file), *others)


# What is sealed


@given(
    text=st.binary(max_size=5000),
    number=st.integers(0, 2**64 - 1),
    recipients=st.lists(st.binary(min_size=16, max_size=16), max_size=64),
    more=st.booleans(),
    sender=st.binary(min_size=16, max_size=16),
    data=st.data(),
)
def test_a_sealed_message_is_whole_or_nothing(
    text: bytes,
    number: int,
    recipients: list[bytes],
    more: bool,
    sender: bytes,
    data: st.DataObject,
) -> None:
    seal = Seal(SECRET.encode())
    payload = seal.close(sender, number, recipients, text, more=more)
    assert len(payload) < 8000 or len(text) > PIECE
    assert seal.open(payload.encode()) == (sender, number, tuple(recipients), more, text)
    raw = bytearray(base64.b64decode(payload))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    changed = base64.b64encode(raw)
    for stranger, given_ in ((seal, changed), (Seal(b"y" * 32), payload.encode())):
        with pytest.raises(ValueError, match="no proof"):
            stranger.open(given_)


def test_the_longest_message_is_a_payload() -> None:
    seal = Seal(SECRET.encode())
    names = [bytes([n]) * 16 for n in range(MAX_RECIPIENTS)]
    assert len(seal.close(b"s" * 16, 1, names, bytes(PIECE), more=True)) < 8000


@given(payload=st.binary(max_size=300))
def test_what_is_not_sealed_is_refused(payload: bytes) -> None:
    for given_ in (payload, base64.b64encode(payload)):
        with pytest.raises(ValueError, match="no proof|not base64"):
            Seal(SECRET.encode()).open(given_)


MESSAGES: Final = """
Answer(number, to, body, more, sender)
CancelJob(pid, cookie)
CancelStatement(pid, secret_key)
ConsoleTable(name)
ExtensionChanged()
FindJobs(handles)
GiveWay()
JobEnded(snapshot)
JobsWithPid(pid)
KillSession(session)
LeaveDatabases(sql)
ListJobs(roles)
Measure()
NewRole(role_id)
News(item, to, sender)
Question(number, ask, to, sender)
RoleGone(role_id)
Roles()
ShowJobs()
""".strip().split("\n")


def test_other_messages_are_of_another_version() -> None:
    """Replicas of two releases must not half understand each other. If this fails, the messages
    have changed: raise `sealed.VERSION`, and write down here what they are now."""
    classes = get_args(Question | Answer | News | Ask | NewsItem)
    shapes = sorted(
        f"{cls.__name__}({', '.join(field.name for field in fields(cls))})" for cls in classes
    )
    assert (VERSION, shapes) == (b"2", MESSAGES)
