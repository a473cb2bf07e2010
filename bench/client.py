"""A client that costs next to nothing, so that the figures are those of the way to the server.

libpq logs in. After that we use its socket: messages are sent as prepared, and only the end of an
answer is looked at.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Final, Self

from psycopg import pq

from protocol.framing import MessageBuffer
from protocol.messages import DataRow, ErrorResponse, Query

TIMEOUT: Final = 60.0
_READY: Final = b"Z\0\0\0\5I"


class BenchError(Exception):
    """Something could not be measured; the message says why."""


class Session:
    """One connection. Nothing here waits for longer than TIMEOUT seconds."""

    def __init__(self, conninfo: str) -> None:
        self._libpq = _connect(conninfo)
        self._socket = socket.socket(fileno=self._libpq.socket)
        self._socket.settimeout(TIMEOUT)
        self._buffer = memoryview(bytearray(256 * 1024))

    def value(self, sql: str) -> str:
        """The one value that a query returns; "" for NULL or no row.

        Raises:
            BenchError: the server's error.
        """
        self._socket.sendall(Query(sql.encode()).serialize())
        answer = bytearray()
        while not answer.endswith(_READY):
            answer += self._buffer[: self._receive()]
        value = b""
        for kind, body in MessageBuffer(bytes(answer)):
            if kind == ErrorResponse.type:
                raise BenchError(ErrorResponse.parse(body).message.decode(errors="replace"))
            if kind == DataRow.type:
                value = DataRow.parse(body).values[0] or b""
        return value.decode()

    def skim(self, sql: str, tag: str) -> int:
        """Runs a query and drops its answer; returns the answer's length in bytes.

        Raises:
            BenchError: the answer does not end with this command tag.
        """
        self._socket.sendall(Query(sql.encode()).serialize())
        return self._skim(tag)

    def copy_in(self, sql: str, data: bytes, tag: str) -> int:
        """Runs COPY FROM STDIN with these CopyData messages; returns their length in bytes."""
        self._socket.sendall(Query(sql.encode()).serialize())
        if self._buffer[: self._receive()].tobytes()[:1] != b"G":
            raise BenchError("the server did not answer with CopyInResponse")
        self._socket.sendall(data)
        self._skim(tag)
        return len(data)

    def close(self) -> None:
        """Terminates and closes."""
        self._socket.detach()  # libpq closes it
        self._libpq.finish()

    def _skim(self, tag: str) -> int:
        total, tail = 0, b""
        while not tail.endswith(_READY):
            size = self._receive()
            total += size
            tail = (tail + self._buffer[max(0, size - 128) : size].tobytes())[-128:]
        if not tail.endswith(tag.encode() + b"\0" + _READY):
            raise BenchError(f"the answer does not end with {tag}: {tail!r}")
        return total

    def _receive(self) -> int:
        size = self._socket.recv_into(self._buffer)
        if size == 0:
            raise BenchError("the connection was closed")
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(conninfo: str) -> pq.abc.PGconn:
    """Step by step, since PQconnectdb would hold Python's lock while it waits, without limit."""
    libpq = pq.PGconn.connect_start(conninfo.encode())
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        match libpq.connect_poll():
            case pq.PollingStatus.OK:
                return libpq
            case pq.PollingStatus.READING:
                _wait(libpq.socket, select.POLLIN)
            case pq.PollingStatus.WRITING:
                _wait(libpq.socket, select.POLLOUT)
            case _:
                break
    message = libpq.get_error_message().strip()
    libpq.finish()
    raise BenchError(message)


def _wait(file: int, event: int) -> None:
    poll = select.poll()
    poll.register(file, event)
    poll.poll(TIMEOUT * 1000)
