"""Clients that leave in every state leave nothing behind in the server.

A conversation is recorded as bytes; a client sends the beginning of it, cut anywhere, and is gone.
Invariant: its backend ends, whatever was left incomplete; by TLS too, which cannot be half closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import pytest

from protocol import messages as m
from protocol.framing import HEADER_SIZE, MessageBuffer, unpack_length
from protocol.startup import SSLRequest, StartupMessage
from proxy.net import connection as connection_module
from proxy.net.connection import Connection as Side
from tests.conftest import StartProxy, upstream_of
from tests.support.background import wait_until
from tests.support.certificates import Certificates
from tests.support.in_database import with_extension
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Wire, gate
from tests.test_tls import tls_options

CALL: Final = b"SELECT pg_background_launch('SELECT 1')"
RESULT: Final = b"SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (n int)"
SYNC: Final = m.Sync()


def run(sql: bytes) -> list[m.Message]:
    """A statement in the extended protocol, without a Sync."""
    return [m.Parse(b"", sql), m.Bind(b"", b""), m.Describe(b"P", b""), m.Execute(b"")]


def junk(kind: bytes, length: int, body: bytes = b"") -> bytes:
    """A message with a length of its own."""
    return kind + struct.pack("!i", length) + body


CONVERSATIONS: Final[dict[str, list[m.Message | bytes]]] = {
    "queries": [m.Query(b"SELECT 1"), m.Query(b"SELECT 'a'; SELECT 'b'"), m.Query(b"SELECT 2")],
    "calls": [m.Query(CALL), m.Query(RESULT), m.Query(b"SELECT 1")],
    "a batch": [*run(b"SELECT 1"), *run(b"SELECT 2"), SYNC, *run(b"SELECT 3"), SYNC],
    "a batch with calls": [*run(RESULT), *run(CALL), *run(b"SELECT 1"), SYNC, m.Query(b"SELECT 1")],
    # The attack H5 of docs/security.md.
    "a query within a batch": [m.Parse(b"", CALL), m.Query(b"SELECT '%b'" % (b"x" * 65_000))],
    "a query behind a batch": [
        m.Parse(b"s", CALL),
        SYNC,
        m.Query(b"SELECT '%b'" % (b"x" * 65_000)),
    ],
    "a parameter": [
        m.Parse(b"s", b"SELECT pg_background_launch($1)"),
        m.Flush(),
        m.Bind(b"", b"s", parameters=(b"SELECT '%b'" % (b"x" * 65_000),)),
        m.Execute(b""),
        SYNC,
    ],
    "a transaction": [
        m.Query(b"BEGIN; CREATE TEMP TABLE t (a int)"),
        m.Query(CALL),
        *run(b"INSERT INTO t VALUES (1)"),
        SYNC,
        m.Query(b"SELECT 1/0"),
        m.Query(CALL),
        m.Query(b"COMMIT"),
    ],
    "copy": [
        m.Query(b"CREATE TEMP TABLE t (a text)"),
        m.Query(b"COPY t FROM STDIN"),
        m.CopyData(b"1\n"),
        m.CopyData(b"x" * 65_000 + b"\n"),
        m.CopyDone(),
        m.Query(CALL),
    ],
    "copy in a batch with a call": [
        m.Query(b"CREATE TEMP TABLE t (a text)"),
        *run(CALL),
        m.Parse(b"", b"COPY t FROM STDIN"),
        m.Bind(b"", b""),
        m.Execute(b""),
        SYNC,
        m.CopyData(b"1\n"),
        m.CopyData(b"x" * 65_000 + b"\n"),
        m.CopyDone(),
        SYNC,
    ],
    "copy that fails": [
        m.Query(b"CREATE TEMP TABLE t (a text)"),
        m.Query(b"COPY t FROM STDIN"),
        m.CopyData(b"1\n"),
        m.CopyFail(b"no"),
        m.Query(CALL),
    ],
    "a call to a function": [m.FunctionCall(1598, (), (b"3",), 0), m.Query(CALL)],
    "a result that is not read": [
        m.Query(b"SELECT repeat('x', 1000) FROM generate_series(1, 20000)"),
        m.Query(b"SELECT '%b'" % (b"x" * 400_000)),
        m.Query(CALL),
    ],
    "a job's result that is not read": [
        m.Query(
            b"SELECT * FROM pg_background_result(pg_background_launch("
            b"'SELECT repeat(''x'', 1000) FROM generate_series(1, 20000)'))"
        ),
        m.Query(b"SELECT '%b'" % (b"x" * 400_000)),
        m.Query(CALL),
    ],
    "an end": [*run(CALL), m.Terminate()],
    "junk after a call": [m.Parse(b"", CALL), junk(b"!", 100, b"x" * 50)],
    "a long message of no type": [m.Query(CALL), junk(b"!", 1 << 29, b"x" * 50)],
    "a length that cannot be": [m.Parse(b"", CALL), junk(b"Q", 3, b"SELECT")],
    "a length that cannot be, at once": [junk(b"Q", 3, b"SELECT"), m.Query(CALL)],
    "a length that is too much": [m.Parse(b"", CALL), junk(b"Q", 0x7FFFFFFF, b"SELECT")],
    "a length that is much": [m.Parse(b"", CALL), junk(b"Q", 0x3FFFFFF0, b"SELECT")],
    "a flush with a body": [m.Parse(b"", CALL), junk(b"H", 65_000, b"x" * 64_996), SYNC],
    "a sync with a body": [m.Parse(b"", CALL), junk(b"S", 65_000, b"x" * 64_996), SYNC],
}


def stream_of(name: str) -> bytes:
    return b"".join(
        part if isinstance(part, bytes) else part.serialize() for part in CONVERSATIONS[name]
    )


def cuts(stream: bytes) -> list[int]:
    """Where it is cut: around the beginning of each message, in the middle, and at the end."""
    starts = [0]
    while starts[-1] + HEADER_SIZE <= len(stream):
        length = max(unpack_length(stream, starts[-1] + 1)[0], 4)
        starts.append(min(starts[-1] + 1 + length, len(stream)))
    found = {len(stream), len(stream) - 1}
    for start, end in itertools.pairwise(starts):
        found |= {start, start + 1, start + 4, start + 5, start + 11, (start + end) // 2}
    return sorted(cut for cut in found if 0 < cut <= len(stream))


# Ways to leave


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """It says that it will send no more, and reads to the end. Which TLS cannot."""
    if not isinstance(connection, ssl.SSLSocket):
        connection.settimeout(10.0)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(65536):
                pass
    connection.close()


LEAVING: Final[tuple[Callable[[socket.socket], None], ...]] = (close, reset, half_close)


# Proxies, with and without TLS on each side


class Left:
    """Sees what is left of the clients of one proxy."""

    def __init__(self, server: Server, proxy: Proxy, *, tls: bool) -> None:
        self.server = server
        self._proxy = proxy
        self.tls = tls

    def connect(self) -> socket.socket:
        connection = socket.create_connection((self._proxy.host, self._proxy.port), timeout=20.0)
        if not self.tls:
            return connection
        connection.sendall(SSLRequest().serialize())
        assert connection.recv(1) == b"S"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(connection)

    def log_in(self, **parameters: str) -> socket.socket:
        connection = self.connect()
        given = {"user": "postgres", "database": "postgres", **parameters}
        startup = StartupMessage({k.encode(): v.encode() for k, v in given.items()})
        connection.sendall(startup.serialize())
        buffer = MessageBuffer()
        while not any(kind == m.ReadyForQuery.type for kind, _ in buffer):
            data = connection.recv(65536)
            assert data, "the connection was closed"
            buffer.feed(data)
        return connection

    def named(self, prefix: str) -> list[str]:
        """The names of the backends that are left."""
        with self.server.connect() as conn:
            rows = conn.execute(
                "SELECT application_name FROM pg_stat_activity WHERE starts_with("
                "application_name, %s)",
                [prefix],
            ).fetchall()
        return [name for (name,) in rows]

    def nothing(self, prefix: str) -> None:
        """Waits until nothing is left."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.named(prefix), 8.0)
        assert self.named(prefix) == []


def _say(connection: socket.socket, data: bytes, *, listen: bool) -> None:
    """Sends it, as far as it is taken; `listen`: and waits until there is an answer."""
    connection.settimeout(0.2)
    with contextlib.suppress(OSError):
        connection.sendall(data)
    if listen:
        connection.settimeout(0.03)
        with contextlib.suppress(OSError):
            connection.recv(1000)


# Each half of the cuts, and TLS on either side, are in two of the four.
@pytest.fixture(
    scope="module",
    params=[
        "plain-plain",
        pytest.param("tls-plain", marks=pytest.mark.slow),
        pytest.param("plain-tls", marks=pytest.mark.slow),
        "tls-tls",
    ],
)
def left(
    request: pytest.FixtureRequest, server: Server, certificates: Certificates
) -> Iterator[Left]:
    """Client and server, each with and without TLS."""
    client, upstream = request.param.split("-")
    options = tls_options(certificates, "require") if client == "tls" else []
    with contextlib.ExitStack() as stack:
        behind = server
        conninfo = f"{upstream_of(server)} sslmode=disable"
        if upstream == "tls":
            try:
                behind = request.getfixturevalue("tls_server")
                conninfo = f"{upstream_of(behind)} sslmode=require"
            except pytest.skip.Exception:
                front = Proxy(conninfo, *tls_options(certificates, "require"))
                stack.enter_context(front)
                conninfo = f"host={front.host} port={front.port} sslmode=require"
        proxy = stack.enter_context(Proxy(conninfo, *options))
        yield Left(behind, proxy, tls=client == "tls")
        assert "Traceback" not in proxy.log, proxy.log


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_whatever_a_client_has_half_said_its_backend_ends(left: Left, name: str) -> None:
    stream = stream_of(name)
    # With and without TLS from the client the two halves of them.
    for number, cut in enumerate(cuts(stream)[left.tls :: 2]):
        leave = LEAVING[number % len(LEAVING)]
        connection = left.log_in(application_name=f"leaving {cut} {leave.__name__}")
        _say(connection, stream[:cut], listen=number % 2 > 0)
        leave(connection)
    left.nothing("leaving")


@pytest.mark.parametrize("leave", LEAVING)
def test_twenty_that_leave_in_the_middle_of_a_query_leave_nothing(
    left: Left, leave: Callable[[socket.socket], None]
) -> None:
    """The attack H5 of docs/security.md: Parse of a call, then six bytes of a Query."""
    stream = stream_of("a query within a batch")
    parse = m.Parse(b"", CALL).serialize()
    for number in range(20):
        connection = left.log_in(application_name=f"left {number}")
        connection.sendall(stream[: len(parse) + 6])
        leave(connection)
    left.nothing("left")


@pytest.mark.parametrize(
    ("leave", "size"), [(close, 350_000), (reset, 350_000), (reset, 20_000_000)]
)
def test_a_client_is_missed_although_nobody_reads_it(
    server: Server, proxy: Proxy, db: str, leave: Callable[[socket.socket], None], size: int
) -> None:
    """A call waits for a job, and more is behind it than the proxy is willing to hold: it does not
    read the client, so the event loop does not see it leave."""
    with gate(server, db) as closed:
        wire = Wire((proxy.host, proxy.port), database=db, application_name="unread")
        pid = wire.launch(closed.sql)
        wire.send_query(f"SELECT pg_background_result({pid})")
        _say(wire.socket, m.Query(b"SELECT '%b'" % (b"x" * size)).serialize(), listen=True)
        leave(wire.socket)
        Left(server, proxy, tls=False).nothing("unread")


WAITING: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    " AND wait_event IN ('advisory', 'PgSleep')"
)
INSIDE: Final = (
    "DO $$ BEGIN PERFORM inside($c$ (WITH l AS MATERIALIZED (SELECT * FROM"
    " pg_background_launch_v2('{}')) SELECT {}) $c$); END $$"
)


@pytest.fixture
def extended(server: Server, proxy: Proxy, db: str) -> Iterator[str]:
    """A database with the extension."""
    extension = with_extension(server, proxy, db)
    next(extension)
    yield db
    next(extension, None)


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize(
    "call",
    [
        "pg_background_wait(pid, cookie) FROM l",
        "count(*) FROM l, pg_background_result(l.pid, l.cookie) AS (n int)",
    ],
)
# No more than the proxy holds back: behind what it does not read, its end cannot be seen.
@pytest.mark.parametrize("behind", [b"", b"x" * 10_000_000], ids=["alone", "with more behind it"])
def test_a_client_that_leaves_ends_a_wait_inside_the_database(
    server: Server,
    proxy: Proxy,
    extended: str,
    call: str,
    leave: Callable[[socket.socket], None],
    behind: bytes,
) -> None:
    with gate(server, extended) as closed, server.connect() as conn:
        wire = Wire((proxy.host, proxy.port), database=extended, application_name="inside")
        wire.send_query(INSIDE.format(closed.sql, call))
        wait_until(lambda: conn.execute(WAITING, ["inside"]).fetchone() == (1,))
        _say(wire.socket, m.Query(behind).serialize() if behind else b"", listen=True)
        leave(wire.socket)
        Left(server, proxy, tls=False).nothing("inside")


def test_a_proxy_that_ends_leaves_no_function_waiting_for_it(
    server: Server, start_proxy: StartProxy, extended: str
) -> None:
    """F8 of docs/security.md: a function that asks goes on asking unless it is told."""
    proxy = start_proxy("--shutdown-timeout", "0")
    ask = "PERFORM inside('pg_background_launch(''SELECT 1'')')"
    with contextlib.ExitStack() as stack, server.connect() as conn:
        for _ in range(8):
            wire = Wire((proxy.host, proxy.port), database=extended, application_name="asking")
            stack.callback(wire.socket.close)
            wire.send_query(f"DO $$ BEGIN {ask}; RAISE INFO ''; LOOP {ask}; END LOOP; END $$")
            assert wire.message()[0] == "N"
        wait_until(lambda: conn.execute(WAITING, ["asking"]).fetchone() != (0,))
        proxy.stop()
        Left(server, proxy, tls=False).nothing("asking")


@pytest.fixture
def late(server: Server, extended: str) -> str:
    """A database with a function that asks after a while."""
    with server.connect(dbname=extended) as conn:
        conn.execute(
            "CREATE FUNCTION late() RETURNS void LANGUAGE plpgsql AS $$"
            " BEGIN PERFORM pg_sleep(1.5); PERFORM inside('pg_background_launch(''SELECT 1'')');"
            " END $$"
        )
    return extended


def _ask_late(proxy: Proxy, dbname: str, conn: Connection) -> Wire:
    """A session whose backend is in that function, and has not asked."""
    wire = Wire((proxy.host, proxy.port), database=dbname, application_name="late")
    for sql in ("SELECT inside('pg_background_launch(''SELECT 1'')')", "SELECT 1"):
        wire.query(sql)
    wire.send_query("SELECT late()")
    sleeping = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'late'"
        " AND wait_event = 'PgSleep'"
    )
    wait_until(lambda: conn.execute(sleeping).fetchone() == (1,))
    return wire


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_proxy_that_ends_leaves_no_function_that_asks_later(
    server: Server, start_proxy: StartProxy, late: str, workers: str
) -> None:
    """It would not know that there is nobody any more, and ask for 18 seconds."""
    proxy = start_proxy("--shutdown-timeout", "0", "--workers", workers)
    with server.connect() as conn, _ask_late(proxy, late, conn):
        proxy.stop()
        Left(server, proxy, tls=False).nothing("late")


@pytest.mark.parametrize("leave", LEAVING)
def test_a_client_that_leaves_leaves_no_function_that_asks_later(
    server: Server, proxy: Proxy, late: str, leave: Callable[[socket.socket], None]
) -> None:
    with server.connect() as conn:
        leave(_ask_late(proxy, late, conn).socket)
        Left(server, proxy, tls=False).nothing("late")


async def test_a_closed_connection_is_aborted_if_nobody_takes_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The net under all this: that of a connection which the other side does not read."""
    loop = asyncio.get_running_loop()
    looks: list[Callable[[], None]] = []

    def call_later(delay: float, look: Callable[..., None], *args: object) -> None:
        """Time passes when the test says so."""
        assert delay == connection_module.LINGER
        looks.append(partial(look, *args))

    lost = loop.create_future()
    ours, theirs = socket.socketpair()
    connection = Side(lambda data: None, lambda _: None, lambda _, error: lost.set_result(error))
    await loop.create_unix_connection(lambda: connection, sock=ours)
    connection.write(b"x" * 10_000_000)
    with theirs, monkeypatch.context() as patched:
        patched.setattr(loop, "call_later", call_later)
        connection.close()
        for _ in range(5):  # as long as it takes something, it is waited for
            left = connection.transport.get_write_buffer_size()
            theirs.recv(1_000_000)
            while connection.transport.get_write_buffer_size() == left:  # noqa: ASYNC110
                await asyncio.sleep(0)
            looks.pop()()
            await asyncio.sleep(0)
            assert not lost.done()
        looks.pop()()
        assert not looks
        patched.undo()
        await asyncio.wait_for(lost, 10.0)
