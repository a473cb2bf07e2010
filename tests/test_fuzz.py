"""Fuzzing: whatever bytes come, from clients or from what should be a server, the proxy lives on.

Invariant: an attempt ends in time; the proxy writes no traceback, and keeps no descriptor and no
memory; a new session works afterwards; and where a server answers by itself, the proxy's answer is
the same. ``FUZZ_SECONDS=600 pytest tests/test_fuzz.py`` is the long run.

What the fuzzers found has tests of its own, at the end.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import strategies as st

from protocol import messages as m
from protocol.startup import StartupMessage
from tests.conftest import upstream_of
from tests.support.fuzzing import (
    CALLS,
    LIMIT,
    LOGIN,
    PLAIN,
    SECONDS,
    Script,
    Upstream,
    comparable,
    cut_at,
    exchange,
    frontend_stream,
    fuzz,
    is_whole,
    messages_of,
    same_at_startup,
    scripts,
    startups,
)
from tests.support.recorder import Frontend, b, e, kinds, p, q
from tests.support.servers import Proxy, Server

pytestmark = pytest.mark.timeout(SECONDS + 120)

MEGABYTE = 1 << 20
STARTUP = StartupMessage({b"user": b"postgres", b"database": b"postgres"}).serialize()
CUTS = st.lists(st.floats(0, 1), max_size=4)


class Watched:
    """A proxy, and what it needed when it had served one client and one job."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._process = psutil.Process(proxy.pid)
        self._serves()
        self._fds = self._idle_fds()
        self._rss = self._process.memory_info().rss

    def check(self) -> None:
        """Nothing of what it has been through shows."""
        self._serves()
        assert self.proxy.running
        assert "Traceback" not in self.proxy.log, self.proxy.log
        assert "internal error" not in self.proxy.log, self.proxy.log
        assert "RuntimeWarning" not in self.proxy.log, self.proxy.log
        deadline = time.monotonic() + 10.0
        while (fds := self._process.num_fds()) > self._fds and time.monotonic() < deadline:
            time.sleep(0.02)
        assert fds <= self._fds, self._process.net_connections()
        assert self._process.memory_info().rss - self._rss < 48 * MEGABYTE

    def _idle_fds(self) -> int:
        time.sleep(0.3)  # the session of before has ended by now
        return int(self._process.num_fds())

    def _serves(self) -> None:
        with self.proxy.connect() as conn:
            row = conn.execute("SELECT pg_background_launch('SELECT 6 * 7')").fetchone()
            assert row is not None
            sql = f"SELECT * FROM pg_background_result({row[0]}) AS (answer int)"
            assert conn.execute(sql).fetchone() == (42,)


@pytest.fixture(scope="module")
def watched(server: Server) -> Iterator[Watched]:
    """A proxy for the fuzzers alone."""
    with Proxy(upstream_of(server)) as proxy:
        yield Watched(proxy)


@pytest.fixture(scope="module")
def upstream(server: Server) -> Iterator[Upstream]:
    """A server that may be none."""
    with Upstream(server) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def misled(upstream: Upstream) -> Iterator[Watched]:
    """A proxy before it."""
    with Proxy(f"host={upstream.host} port={upstream.port} connect_timeout=2") as proxy:
        yield Watched(proxy)


# --- the fuzzers ---------------------------------------------------------------------------------


def test_fuzzed_startup_is_answered_as_by_the_server(server: Server, watched: Watched) -> None:
    def attempt(tried: tuple[bytes, list[float], bool]) -> None:
        stream, cuts, slow = tried
        pieces = cut_at(stream, cuts)
        proxied = exchange(watched.proxy, pieces, slow=slow)
        direct = exchange(server, pieces, slow=slow)
        assert same_at_startup(stream, direct, proxied), (comparable(direct), comparable(proxied))

    fuzz(st.tuples(startups(), CUTS, st.booleans()), attempt, 0.25, watched.check)


def test_fuzzed_messages_are_answered_as_by_the_server(server: Server, watched: Watched) -> None:
    def attempt(tried: tuple[list[bytes], list[float]]) -> None:
        messages, cuts = tried
        stream = b"".join(messages)
        pieces = [STARTUP, *cut_at(stream, cuts)]
        proxied = exchange(watched.proxy, pieces)
        if not is_whole(stream):
            return
        direct = exchange(server, pieces)
        assert comparable(proxied) == comparable(direct)

    fuzz(st.tuples(frontend_stream(PLAIN), CUTS), attempt, 0.25, watched.check)


def test_fuzzed_messages_with_calls_end_in_time(watched: Watched) -> None:
    def attempt(tried: tuple[list[bytes], list[float], int]) -> None:
        messages, cuts, vanishes = tried
        pieces = [STARTUP, *cut_at(b"".join(messages), cuts)]
        if vanishes:
            exchange(watched.proxy, pieces, reset=True)
        else:
            kinds = [kind for kind, _ in messages_of(exchange(watched.proxy, pieces))]
            assert "?" not in kinds

    messages = frontend_stream([*CALLS, *CALLS, *PLAIN])
    fuzz(
        st.tuples(messages, CUTS, st.integers(0, 5).map(lambda n: not n)),
        attempt,
        0.25,
        watched.check,
    )


def test_a_fuzzed_server_ends_its_own_session_only(misled: Watched, upstream: Upstream) -> None:
    def attempt(tried: tuple[Script, bool]) -> None:
        script, is_job = tried
        number = upstream.add(script)
        given = {"fuzz.side" if is_job else "fuzz.primary": number}
        given |= {"user": "postgres", "database": "postgres"}
        startup = StartupMessage({k.encode(): v.encode() for k, v in given.items()}).serialize()
        password = m.PasswordMessage(b"secret").serialize()
        call = q("SELECT pg_background_launch('SELECT 1') AS pid").serialize()
        result = q("SELECT * FROM pg_background_result(4711) AS (x int)").serialize()
        sent = startup + (b"" if is_job else password) + call + result
        with socket.create_connection((misled.proxy.host, misled.proxy.port), LIMIT) as sock:
            sock.sendall(sent)
            sock.settimeout(0.1 if script.end == "stay" or is_job else LIMIT)
            with contextlib.suppress(ConnectionError):
                try:
                    while sock.recv(1 << 16):
                        pass
                except TimeoutError:
                    assert script.end == "stay" or is_job or None in script.pieces, "a hang"
        upstream.wait_until_done()

    fuzz(st.tuples(scripts(), st.booleans()), attempt, 0.25, misled.check)


# --- what they found -----------------------------------------------------------------------------


CALL = q("SELECT pg_background_launch('SELECT 1')")
COPY = q("CREATE TEMP TABLE t (x text); COPY t FROM STDIN")
BAD_FLUSH = b"H\0\0\0\5\0"
BAD_SYNC = b"S\0\0\0\5\0"


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "before",
    [
        [q("CREATE TEMP TABLE t (x text)"), p("COPY t FROM STDIN"), b(), e()],
        [COPY],
        [COPY, m.CopyData(b"x\n")],
    ],
)
def test_a_call_amid_copy_data_is_answered_by_the_server(
    server: Server, watched: Watched, before: list[m.Message], waits: bool
) -> None:
    """The session hung, and outlived its client: the proxy waited for the end of the COPY."""
    answers = []
    for endpoint in (server, watched.proxy):
        with Frontend(endpoint) as client:
            client.send(*before)
            if waits:
                client.until_type(m.CopyInResponse)
            client.send(CALL)
            answers.append(client.until_closed()[-2:])
    assert answers[0] == answers[1]
    assert [error.type for error in answers[0]] == [ord("E")] * 2


def test_a_call_after_a_malformed_flush_is_skipped_as_by_the_server(
    server: Server, watched: Watched
) -> None:
    """The session hung, and outlived its client: the server skips all up to a Sync."""
    for endpoint in (server, watched.proxy):
        with Frontend(endpoint) as client:
            client.send(BAD_FLUSH)
            client.until_type(m.ErrorResponse)
            client.send(CALL, m.Sync())
            assert kinds(client.until_ready()) == "Z"
            client.send(q(""), BAD_FLUSH, q("SELECT 1"), CALL, m.CopyFail(b""))
            client.send_eof()
            assert kinds(client.until_closed()) == "IZE"


DROP = "DROP EXTENSION IF EXISTS pg_background"
"""Served by an interception, with the server's own answer."""


@pytest.mark.parametrize("bad", [BAD_SYNC, BAD_FLUSH])
@pytest.mark.parametrize(
    "before",
    [
        [p(DROP)],
        [p(DROP), b(), e()],
        [p(DROP), b(), e(), m.Flush()],
        [p(DROP), m.Describe(b"P", b"none")],
        [p("SELECT 1"), b(), e(), p(DROP), b(), e()],
    ],
)
def test_a_malformed_sync_or_flush_in_an_interception_is_answered_by_the_server(
    server: Server, watched: Watched, before: list[m.Message], bad: bytes
) -> None:
    """The proxy took it for a Sync, and sent one of its own."""
    after = [q("SELECT 2"), m.Sync(), q("SELECT 3")]
    pieces = [message.serialize() for message in before] + [bad]
    pieces += [message.serialize() for message in after]
    for stream in (pieces, [b"".join(pieces)]):
        direct, proxied = (exchange(one, [STARTUP, *stream]) for one in (server, watched.proxy))
        assert comparable(proxied) == comparable(direct)


@pytest.mark.parametrize("size", [9990, 10000, 10001])
def test_a_startup_packet_of_the_greatest_length_is_taken(
    server: Server, watched: Watched, size: int
) -> None:
    """The server refused it without a word: the proxy's own settings had made it too long."""
    given = {b"user": b"postgres", b"application_name": b""}
    missing = size + 4 - len(StartupMessage(given).serialize())
    stream = StartupMessage({**given, b"application_name": b"x" * missing}).serialize()
    direct, proxied = (exchange(endpoint, [stream]) for endpoint in (server, watched.proxy))
    assert same_at_startup(stream, direct, proxied)
    assert (messages_of(direct)[-1:] == [("Z", b"I")]) == (size <= 10000)


def test_an_error_of_60_mb_is_not_gathered_in_quadratic_time(watched: Watched) -> None:
    """It took 16 seconds, and no other client was served meanwhile."""
    sql = "DO $$BEGIN RAISE EXCEPTION '%', repeat('x', 60000000); END$$"
    with Frontend(watched.proxy, timeout=LIMIT) as client, Frontend(watched.proxy) as other:
        client.send(q(sql))
        end = time.monotonic() + LIMIT
        slowest = 0.0
        while time.monotonic() < end:
            begin = time.monotonic()
            other.query("SELECT 1")
            slowest = max(slowest, time.monotonic() - begin)
            if _has_answer(client):
                break
        assert kinds(client.until_ready()) == "EZ"
        assert slowest < 2.0


def _has_answer(client: Frontend) -> bool:
    client.socket.setblocking(False)
    try:
        return bool(client.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        client.socket.settimeout(LIMIT)


def test_sessions_cut_off_as_their_call_arrives_leave_no_warning(watched: Watched) -> None:
    """A task that was cancelled before it began left a coroutine that was never awaited."""
    for _ in range(30):
        exchange(watched.proxy, [STARTUP, CALL.serialize()], reset=True)
    watched.check()
    assert "RuntimeWarning" not in watched.proxy.log


@pytest.mark.parametrize("body", [b"", b"xyz"])
@pytest.mark.parametrize("kind", [b"K", b"S", b"Z", b"E", b"G"])
def test_a_servers_message_of_the_wrong_shape_ends_its_session_at_most(
    misled: Watched, upstream: Upstream, kind: bytes, body: bytes
) -> None:
    login = b"".join(message.serialize() for message in LOGIN)
    for length in (len(body) + 4, 3, 0, 0xFFFFFFFF):
        garbage = kind + length.to_bytes(4, "big") + body
        number = upstream.add(Script([login, None, garbage], "close"))
        given = {b"user": b"postgres", b"fuzz.primary": number.encode()}
        exchange(misled.proxy, [StartupMessage(given).serialize(), q("SELECT 1").serialize()])
        upstream.wait_until_done()
    misled.check()
