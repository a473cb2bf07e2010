"""What a client does that wants to harm the others: each of `DEEDS`, on a connection of its own.

Invariant: a deed ends within some seconds, whatever the other side does, and does not check whether
it has worked. All is done as one role without rights, which may have `CONNECTIONS` connections.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Final

from protocol import messages as m
from protocol.startup import CancelRequest, SSLRequest, StartupMessage
from tests.support.recorder import b, e, p, q
from tests.support.servers import Proxy

ROLE: Final = "hostile"
CONNECTIONS: Final = 120
LIMIT: Final = 5.0
"""Seconds that a deed waits for anything, at most."""


class Villain:
    """One hostile client.

    Attributes:
        deeds: how many it has done.
    """

    def __init__(self, proxy: Proxy, dbname: str, seed: int) -> None:
        self._proxy = proxy
        self._random = random.Random(seed)
        self._startup = StartupMessage(
            {b"user": ROLE.encode(), b"database": dbname.encode()}
        ).serialize()
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE
        self.deeds = 0

    def do(self, deed: Callable[[Villain], None]) -> None:
        """Does one of DEEDS; whether it works does not matter."""
        with contextlib.suppress(OSError, EOFError):
            deed(self)
        self.deeds += 1

    # Connections

    @contextlib.contextmanager
    def connection(self, *, login: bool = True) -> Iterator[socket.socket]:
        """A connection with or without TLS, logged in; it is left in one of several ways."""
        sock = socket.create_connection((self._proxy.host, self._proxy.port), LIMIT)
        try:
            if self._random.random() < 0.5:
                sock.sendall(SSLRequest().serialize())
                if sock.recv(1) == b"S":
                    sock = self._tls.wrap_socket(sock)
            if login:
                sock.sendall(self._startup)
                self.until_ready(sock)
            yield sock
        finally:
            self._leave(sock)

    def _leave(self, sock: socket.socket) -> None:
        way = self._random.randrange(4)
        with contextlib.suppress(OSError):
            if way == 0:
                sock.sendall(m.Terminate().serialize())
            elif way == 1:
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(0.3)
                while sock.recv(1 << 16):
                    pass
            elif way == 2:
                linger = b"\1\0\0\0\0\0\0\0"
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()

    def until_ready(self, sock: socket.socket, seconds: float = LIMIT) -> bytes:
        """Reads up to a ReadyForQuery; returns the last 4 kB."""
        deadline = time.monotonic() + seconds
        tail = b""
        while tail[-6:-1] != b"Z\0\0\0\5":
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            data = sock.recv(1 << 16)
            if not data:
                raise EOFError
            tail = (tail + data)[-4096:]
        return tail

    def query(self, sql: str) -> None:
        """Sends a statement, and mostly waits for its answer for a time."""
        with self.connection() as sock:
            sock.sendall(q(sql).serialize())
            if self._random.random() < 0.8:
                self.until_ready(sock)

    # Deeds

    def reads_badly(self) -> None:
        """Statements that once took the proxy more than linear time."""
        self.query(self._random.choice(STATEMENTS)())

    def half_a_message(self) -> None:
        """Sends an open batch and a part of a message; then leaves."""
        with self.connection() as sock:
            begun = self._random.choice(BEGUN)
            sock.sendall(b"".join(message.serialize() for message in begun))
            whole = q("SELECT " + "x" * self._random.choice([10, 65_500])).serialize()
            sock.sendall(whole[: self._random.randrange(1, min(len(whole), 100))])
            time.sleep(self._random.choice([0, 0.05]))

    def leaves_during_a_call(self) -> None:
        """Waits for the result of a sleeping job, directly or from inside; then leaves."""
        with self.connection() as sock:
            sock.sendall(q(self._random.choice(WAITS)).serialize())
            time.sleep(self._random.choice([0, 0.02, 0.2]))

    def huge_error(self) -> None:
        """Raises a huge error in the session, in a job, or in a job that a function launches."""
        size = self._random.choice([100_000, 3_000_000])
        error = f"DO $e$ BEGIN RAISE EXCEPTION '%', repeat('é', {size}); END $e$"
        call = f"pg_background_result(pg_background_launch($j${error}$j$)) AS (t text)"
        sqls = [error, f"SELECT * FROM {call}", f"DO $d$ BEGIN PERFORM * FROM {call}; END $d$"]
        self.query(self._random.choice(sqls))

    def forges(self) -> None:
        """Raises messages with the session's token, many or long, itself or by the extension."""
        body = self._random.choice(SAID)
        count = self._random.choice([1, 300])
        self.query(
            "DO $d$ DECLARE token text := left(current_setting('pg_background_proxy.session'), 32);"
            f" BEGIN FOR i IN 1..{count} LOOP {body} END LOOP; END $d$"
        )

    def random_bytes(self) -> None:
        with self.connection(login=self._random.random() < 0.5) as sock:
            sock.sendall(self._random.randbytes(self._random.choice([5, 500, 50_000])))
            sock.settimeout(0.3)
            while sock.recv(1 << 16):
                pass

    def cancels(self) -> None:
        """Sends cancel requests with keys that may be another client's."""
        for _ in range(20):
            key = CancelRequest(self._random.randrange(1, 1 << 20), self._random.randbytes(4))
            address = (self._proxy.host, self._proxy.port)
            with socket.create_connection(address, LIMIT) as sock:
                sock.sendall(key.serialize())

    def prepares(self) -> None:
        """Prepares many statements, with and without calls, under long names."""
        with self.connection() as sock:
            for number in range(200):
                name = "s" * self._random.choice([1, 60, 300]) + str(number)
                sql = "SELECT pg_background_launch($1)" if number % 2 else "SELECT $1::text"
                sock.sendall(p(sql, name).serialize() + m.Describe(b"S", name.encode()).serialize())
            sock.sendall(m.Sync().serialize())
            self.until_ready(sock)

    def logs_in(self) -> None:
        """Opens many connections at once, most of which never log in."""
        with contextlib.ExitStack() as stack:
            for _ in range(15):
                address = (self._proxy.host, self._proxy.port)
                sock = stack.enter_context(socket.create_connection(address, LIMIT))
                piece = self._startup[: self._random.randrange(len(self._startup) + 1)]
                sock.sendall(piece)
            time.sleep(0.1)

    def does_not_read(self) -> None:
        with self.connection() as sock:
            sock.sendall(q(self._random.choice(LARGE)).serialize())
            time.sleep(0.3)

    def many_jobs(self) -> None:
        """Launches many jobs, with large labels, settings and queues; then leaves."""
        label = "x" * self._random.choice([10, 100_000])
        sql = f"SELECT pg_background_launch_v2('SELECT pg_sleep(1)', 1000000, '{label}')"
        with self.connection() as sock:
            sock.sendall(q("SET pg_background.max_workers = 1000; SET my.own = 'x'").serialize())
            self.until_ready(sock)
            for _ in range(6):
                sock.sendall(q(sql).serialize())
            time.sleep(0.2)

    def copies(self) -> None:
        """Copies into a table, and leaves in the middle; or calls amid the data."""
        with self.connection() as sock:
            sock.sendall(q("CREATE TEMP TABLE t (x text); COPY t FROM STDIN").serialize())
            sock.sendall(m.CopyData(b"x\n" * 1000).serialize() * 5)
            if self._random.random() < 0.5:
                sock.sendall(q("SELECT pg_background_launch('SELECT 1')").serialize())
            else:
                sock.sendall(b"d\0\1\0\0abc")


DEEDS: Final = [
    *(Villain.reads_badly, Villain.half_a_message, Villain.leaves_during_a_call),
    *(Villain.huge_error, Villain.forges, Villain.random_bytes, Villain.cancels),
    *(Villain.prepares, Villain.logs_in, Villain.does_not_read, Villain.many_jobs),
    Villain.copies,
]

_LAUNCH: Final = "pg_background_launch('SELECT pg_sleep(1)')"

# Each is made when it is needed, because it is long.
STATEMENTS: Final[list[Callable[[], str]]] = [
    lambda: (
        "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '42883',"
        " MESSAGE = repeat('a', 40000) || 'pg_background'; END $$"
    ),
    lambda: "SELECT pg_background_launch('x') FROM t" + " JOIN a" * 25,
    lambda: "SELECT pg_background_launch('x') FROM t" + " LEFT JOIN a" * 20,
    lambda: "SELECT pg_background_launch('x') FROM t" + " JOIN LATERAL f(x)" * 20,
    lambda: "SELECT pg_background_cancel_by_label('" + "%a" * 30 + "b')",
    lambda: "SELECT 1 FROM " + ",".join(["pg_stat_activity"] * 3000),
    lambda: "SELECT 'pg_stat_activity'" + ",1" * 500_000,
    lambda: "INSERT INTO t VALUES ('pg_background')" + ",(1)" * 250_000,
    lambda: "SELECT pg_background_launch" + "(" * 100_000 + ")" * 100_000,
    # The server itself takes quadratic time for this.
    lambda: "SELECT pg_background_launch('x') /*" + "/*" * 3_000,
    lambda: "SELECT pg_background_launch(" + "'x' || " * 50_000 + "'')",
]

BEGUN: Final[list[list[m.Message]]] = [
    [],
    [p("SELECT pg_background_launch('SELECT 1')")],
    [p("SELECT pg_background_launch('SELECT 1')"), b(), e()],
    [p("SELECT 1"), b(), e()],
    [q(f"SELECT * FROM pg_background_result({_LAUNCH}) AS (t text)")],
    [q("BEGIN")],
]

WAITS: Final = [
    f"SELECT * FROM pg_background_result({_LAUNCH}) AS (t text)",
    f"DO $d$ BEGIN PERFORM * FROM pg_background_result({_LAUNCH}) AS (t text); END $d$",
    f"SELECT {_LAUNCH}; SELECT pg_sleep(1)",
    "SELECT pg_sleep(1)",
]

SAID: Final = [
    "RAISE INFO '%', token;",
    "RAISE INFO '% % next 1', token, md5('x');",
    "RAISE INFO '% % call % %', token, md5('x'), repeat('QUFB ', 5000), i;",
    "PERFORM set_config('pg_background_proxy.message', concat(token, ' ', md5('x'), ' next ', i),"
    " true); PERFORM public._pg_background_say();",
    "PERFORM set_config('pg_background_proxy.message', concat(token, ' ', md5('x'), ' call - ',"
    " repeat('QUFB ', 1000)), true); PERFORM public._pg_background_say();",
    "PERFORM set_config('pg_background_proxy.message', concat(token, ' ', md5('x'), ' proof ',"
    " md5('x')), true); PERFORM public._pg_background_say();",
]

LARGE: Final = [
    "SELECT repeat('x', 1000) FROM generate_series(1, 20000)",
    "SELECT * FROM pg_background_result(pg_background_launch("
    "$$SELECT repeat('x', 1000) FROM generate_series(1, 20000)$$)) AS (t text)",
    "DO $d$ BEGIN FOR i IN 1..2000 LOOP RAISE NOTICE '%', repeat('x', 2000); END LOOP; END $d$",
]
