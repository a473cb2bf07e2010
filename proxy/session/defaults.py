"""Gives a session the defaults of our settings at the end of its login.

Invariant: to the client, the login looks like any other. The server's messages up to ReadyForQuery
are passed on; then our query runs, and the client's first message waits for its end. The query sets
only what neither the server nor the client has set, so the precedence is the server's. If it fails,
the session goes on without, and launches use the defaults all the same. Behind a pooler nothing is
set, since it would stay with a connection that others use.

The query waits for ReadyForQuery: a server that refuses a session after AuthenticationOk closes the
connection, and anything already sent to it would cost us its last error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from protocol.errors import ProtocolViolation
from protocol.framing import MessageBuffer, frame
from protocol.kinds import B
from protocol.messages import DataRow, ErrorResponse, Query
from proxy.net.connection import Connection
from proxy.sql.text import literal

_LONGEST: Final = 1024 * 1024
"""Limit of a message in bytes; these are parameters, notices and our row."""
_PASSED_ON: Final = (B.PARAMETER_STATUS, B.NOTICE_RESPONSE, B.NOTIFICATION_RESPONSE)
"""May come with the answer to our query, without being part of it."""


def defaults_query(defaults: Mapping[str, str], pid: int) -> bytes:
    """The SELECT that gives a session the defaults of settings that have no value. Its first column
    is whether `pid` is the backend's.

    Args:
        defaults: by name.
        pid: as told at login; a pooler tells another than the backend's.
    """
    is_backends = b"pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %d" % pid
    columns = [is_backends]
    for name, value in defaults.items():
        setting = literal(name.encode())
        columns.append(
            b"CASE WHEN %b AND COALESCE(pg_catalog.current_setting(%b, true), '')"
            b" OPERATOR(pg_catalog.=) '' THEN pg_catalog.set_config(%b, %b, false) END"
            % (is_backends, setting, setting, literal(value.encode()))
        )
    return b"SELECT " + b", ".join(columns)


class LoginEnd:
    """The rest of one login. Messages are passed on as they arrive, so that a server's last error
    is with the client before the connection's end is noticed.

    Args:
        client, server: their connections, whose input comes here.
        pass_on: takes what is for the client.
        query: our query, made once the server is ready for one.

    Attributes:
        is_pooled: whether there is a pooler in between, if the answer has told.
    """

    def __init__(
        self,
        client: Connection,
        server: Connection,
        pass_on: Callable[[bytes], None],
        query: Callable[[], bytes],
    ) -> None:
        self._server = server
        self._pass_on = pass_on
        self._query = query
        self._buffer = MessageBuffer()
        self._buffer.limit = lambda kind: _LONGEST
        self._asked = False
        self.is_pooled = False
        self._answered = asyncio.get_running_loop().create_future()
        self._early = bytearray()
        client.receive = self._early.extend
        client.pause_reading()
        server.receive = self._feed

    async def run(self, from_client: bytes, from_server: bytes) -> tuple[bytes, bytes]:
        """Run until the query is answered. Takes what client and server have sent since
        AuthenticationOk, and returns what is left for the relay: all of the client, and what the
        server has sent behind the answer.

        Raises ProtocolViolation.
        """
        self._early += from_client
        self._feed(from_server)
        await self._answered
        return bytes(self._early), self._buffer.take_rest()

    def _feed(self, data: bytes) -> None:
        self._buffer.feed(data)
        if self._answered.done():
            return
        try:
            self._follow()
        except ProtocolViolation as error:
            self._answered.set_exception(error)

    def _follow(self) -> None:
        passed = b""
        for kind, body in self._buffer:
            is_ready = kind == B.READY_FOR_QUERY
            if is_ready and self._asked:
                self._answered.set_result(None)
                break
            if self._asked and kind == B.DATA_ROW:
                self.is_pooled = DataRow.parse(body).values[0] == b"f"
            if not self._asked or _is_for_client(kind, body):
                passed += frame(kind, body)
            if is_ready:
                self._pass_on(passed)
                passed = b""
                self._asked = True
                self._server.write(Query(self._query()).serialize())
        if passed:
            self._pass_on(passed)


def _is_for_client(kind: int, body: bytes) -> bool:
    """Whether a message within our query's answer is not part of it, or is a last error."""
    if kind == B.ERROR_RESPONSE:
        return ErrorResponse.parse(body).severity in ("FATAL", "PANIC")
    return kind in _PASSED_ON
