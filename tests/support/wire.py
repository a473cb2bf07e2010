"""A client that speaks the protocol by hand, for what no driver does: read slowly, stop in the
middle of a message, vanish. Also a `Gate` that jobs wait at.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, Final, Self

import psutil

from protocol.framing import MessageBuffer
from protocol.messages import BackendKeyData, ErrorResponse, Query, Terminate
from protocol.startup import CancelRequest, StartupMessage
from tests.support.background import wait_until
from tests.support.servers import Connection, Proxy, Server

TIMEOUT: Final = 20.0

_gate_number = itertools.count(7_000_000)


class Gate:
    """A gate: a job waits for it if its SQL begins with the gate's."""

    def __init__(self, server: Server, dbname: str = "postgres") -> None:
        self._conn = server.connect(dbname=dbname)
        self._key = next(_gate_number)
        self._conn.execute("SELECT pg_advisory_lock(%s)", [self._key])
        self.sql = f"SELECT pg_advisory_xact_lock_shared({self._key}); "

    def wait_until_one_waits(self) -> None:
        """Waits until a job is seen to wait for the gate."""
        waits = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
        wait_until(lambda: self._conn.execute(waits, [self._key]).fetchall())

    def open(self) -> None:
        self._conn.close()


@contextlib.contextmanager
def gate(server: Server, dbname: str = "postgres") -> Iterator[Gate]:
    """A closed gate. It opens at the end of the block at the latest."""
    gate = Gate(server, dbname)
    try:
        yield gate
    finally:
        gate.open()


class Monitor:
    """Looks at the server through a connection of its own."""

    def __init__(self, server: Server) -> None:
        self._conn = server.connect(application_name="monitor")

    def state(self, pid: int) -> tuple[Any, ...] | None:
        """State and wait_event of a backend; None if there is no such backend."""
        return self._conn.execute(
            "SELECT state, wait_event FROM pg_stat_activity WHERE pid = %s", [pid]
        ).fetchone()

    def backends(self, dbname: str) -> list[tuple[Any, ...]]:
        """The backends of a database: pid, application_name, state, query."""
        return self._conn.execute(
            "SELECT pid, application_name, state, query FROM pg_stat_activity"
            " WHERE datname = %s AND pid <> pg_backend_pid()"
            " AND backend_type IN ('client backend', 'pg_background')",
            [dbname],
        ).fetchall()

    def wait_until_gone(self, pid: int) -> None:
        wait_until(lambda: self.state(pid) is None)

    def wait_until_at_gate(self, pid: int) -> None:
        """Waits until a job runs, and has come to its gate."""
        wait_until(lambda: self.state(pid) == ("active", "advisory"))

    def wait_until_full(self, pid: int) -> None:
        """Waits until a job cannot send more because its result is not read."""
        wait_until(lambda: self.state(pid) == ("active", "ClientWrite"))

    def wait_until_fetching(self, pid: int) -> None:
        """Waits until the session with this primary backend waits in pg_background_result: the
        backend has evaluated the arguments, and gets nothing more for now.
        """
        wait_until(
            lambda: (
                self._conn.execute(
                    "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'ClientRead'"
                    " AND query ~ 'pg_background_result' AND query !~ 'pg_background_launch'",
                    [pid],
                ).fetchone()
                is not None
            )
        )

    def terminate(self, pid: int) -> None:
        assert self._conn.execute("SELECT pg_terminate_backend(%s)", [pid]).fetchone() == (True,)

    def cancel(self, pid: int) -> None:
        assert self._conn.execute("SELECT pg_cancel_backend(%s)", [pid]).fetchone() == (True,)

    def close(self) -> None:
        self._conn.close()


class Footprint:
    """The resources of a proxy process."""

    def __init__(self, proxy: Proxy) -> None:
        self._process = psutil.Process(proxy.pid)

    @property
    def fds(self) -> int:
        return int(self._process.num_fds())

    @property
    def rss(self) -> int:
        """Resident memory in bytes."""
        return int(self._process.memory_info().rss)


class Wire:
    """A session by hand. A message from the server is (type, body), with the type as a character.

    Args:
        address: host and port, or the path of a Unix socket.
        parameters: of the StartupMessage.
    """

    def __init__(
        self,
        address: tuple[str, int] | str,
        *,
        receive_buffer: int | None = None,
        login: bool = True,
        **parameters: str,
    ) -> None:
        self._address = address
        self.socket = self._connect(receive_buffer)
        self._buffer = MessageBuffer()
        self.key = CancelRequest(0, b"")
        self.pid = 0
        if login:
            parameters = {"user": "postgres", "database": "postgres", **parameters}
            self.send(
                StartupMessage({k.encode(): v.encode() for k, v in parameters.items()}).serialize()
            )
            for kind, body in self.until_ready():
                if kind == "K":
                    key = BackendKeyData.parse(body)
                    self.pid = key.pid
                    self.key = CancelRequest(key.pid, key.secret_key)

    def _connect(self, receive_buffer: int | None = None) -> socket.socket:
        unix = isinstance(self._address, str)
        client = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(TIMEOUT)
        client.connect(self._address)
        return client

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def query(self, sql: str) -> list[tuple[str, bytes]]:
        """Sends a Query; returns its whole answer."""
        self.send_query(sql)
        return self.until_ready()

    def send_query(self, sql: str) -> None:
        self.send(Query(sql.encode()).serialize())

    def message(self) -> tuple[str, bytes]:
        """The next message. Raises EOFError if the connection was closed instead."""
        while (message := self._buffer.next_message()) is None:
            self.receive()
        return chr(message[0]), message[1]

    def receive(self, size: int = 256 * 1024) -> None:
        """Reads once. Raises EOFError if the connection was closed instead."""
        data = self.socket.recv(size)
        if not data:
            raise EOFError
        self._buffer.feed(data)

    def skim(self, pauses: Iterator[float]) -> dict[str, list[int]]:
        """Reads up to ReadyForQuery; returns only the lengths of the messages, by type.

        Sleeps before each read of at most 4 kB, for the next time in `pauses`; then reads fast.
        Nothing may have been read ahead.
        """
        lengths: dict[str, list[int]] = {}
        buffer = memoryview(bytearray(1024 * 1024))
        while "Z" not in lengths:
            header = b""
            while len(header) < 5:
                data = self.socket.recv(5 - len(header))
                assert data, "the connection was closed"
                header += data
            kind, length = header[:1].decode(), int.from_bytes(header[1:]) - 4
            lengths.setdefault(kind, []).append(length)
            while length:
                pause = next(pauses, 0.0)
                time.sleep(pause)
                size = self.socket.recv_into(buffer, min(length, 4096 if pause else len(buffer)))
                assert size, "the connection was closed"
                length -= size
        return lengths

    def until_ready(self) -> list[tuple[str, bytes]]:
        """The messages up to ReadyForQuery, that one included."""
        messages = [self.message()]
        while messages[-1][0] != "Z":
            messages.append(self.message())
        return messages

    def launch(self, sql: str) -> int:
        """Launches a job; returns its pid."""
        quoted = sql.replace("'", "''")
        answer = self.query(f"SELECT pg_background_launch('{quoted}')")
        [row] = [body for kind, body in answer if kind == "D"]
        return int(row[6:])

    def request_cancel(self, key: CancelRequest | None = None, *, wait: bool = True) -> None:
        """A CancelRequest on a connection of its own; `wait` until the other side closes it."""
        with self._connect() as other:
            other.sendall((self.key if key is None else key).serialize())
            if wait:
                assert other.recv(1) == b""

    def close(self) -> None:
        """Sends Terminate and closes."""
        with contextlib.suppress(OSError):
            self.send(Terminate().serialize())
        self.socket.close()

    def hang_up(self) -> None:
        """Sends FIN without Terminate."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def reset(self) -> None:
        """Sends RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def error_of(messages: list[tuple[str, bytes]]) -> ErrorResponse:
    """The one error among these messages."""
    [error] = [ErrorResponse.parse(body) for kind, body in messages if kind == "E"]
    return error


def value(conn: Connection, sql: str, *parameters: Any) -> Any:
    """The one value that a query returns."""
    row = conn.execute(sql, parameters or None).fetchone()
    assert row is not None
    return row[0]


def launch(conn: Connection, sql: str) -> int:
    """Launches a job; returns its pid."""
    return int(value(conn, "SELECT pg_background_launch(%s)", sql))
