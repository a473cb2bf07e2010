"""The defaults of our settings, given to a session at the end of its login.

Invariant: the client sees a login as any other. What the server says up to its ReadyForQuery is
passed on; then one query of ours is asked, and the client's first message waits until it has been
answered. The query sets only what nothing on the server and no word of the client's has set: so our
settings have the server's precedence. If it fails, the session goes on without them, and launches
take the defaults all the same. Behind a pooler, where what is set would stay with another's
connection, nothing is set.

The query waits for the server's ReadyForQuery: a server that refuses the session after it has
accepted the login closes the connection, and what it was sent by then would cost us its last words.
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
"""A message may have this many bytes; these are parameters, notices and our row."""
_PASSED_ON: Final = (B.PARAMETER_STATUS, B.NOTICE_RESPONSE, B.NOTIFICATION_RESPONSE)
"""What comes with our answer and is not a part of it."""


def defaults_query(defaults: Mapping[str, str], pid: int) -> bytes:
    """The SELECT that gives a session the defaults of settings that it has no value for. Its first
    column is whether the pid is the backend's.

    Args:
        defaults: by name.
        pid: that the server has told; a pooler has told another than the backend's.
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
    """The rest of one login. Messages are passed on as they come in, so that the last words of a
    server are with the client before its end is noticed.

    Args:
        server: its connection, whose data come here.
        pass_on: gets what is for the client.
        query: the query of ours, asked for once the server waits for one.

    Attributes:
        is_pooled: whether there is a pooler in between, as far as the server has answered.
    """

    def __init__(
        self,
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
        server.receive = self._feed

    async def run(self, received: bytes) -> bytes:
        """Run until the query is answered. Returns what the server has sent after that.

        Args:
            received: what the server has said behind AuthenticationOk.

        Raises ProtocolViolation.
        """
        self._feed(received)
        await self._answered
        return self._buffer.take_rest()

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
    """Of the answer to our query: what comes of itself, and a server's last words."""
    if kind == B.ERROR_RESPONSE:
        return ErrorResponse.parse(body).severity in ("FATAL", "PANIC")
    return kind in _PASSED_ON
