"""A frontend on a raw socket, message by message, and a recorder of what servers answer.

Invariant: it sends what the test says, valid or not, cut where the test says. It keeps each message
that comes in, so two servers can be compared byte for byte. No read waits longer than its timeout.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

from protocol import messages as m
from protocol.framing import MessageBuffer
from protocol.startup import CancelRequest, GSSENCRequest, SSLRequest, StartupMessage
from tests.support.servers import Proxy, Server

TIMEOUT = 8.0
"""Seconds that a read waits at most."""

Sent: TypeAlias = (
    m.Message | StartupMessage | CancelRequest | SSLRequest | GSSENCRequest | bytes | bytearray
)


class Closed(Exception):  # noqa: N818 (what it says)
    """The server closed the connection; `messages` are those that came before."""

    def __init__(self, messages: list[m.BackendMessage]) -> None:
        super().__init__(f"connection closed after {messages}")
        self.messages = messages


class Frontend:
    """One connection. ``Frontend(proxy)`` logs in; with ``login=False`` it only connects."""

    def __init__(
        self,
        endpoint: Server | Proxy,
        *,
        login: bool = True,
        timeout: float = TIMEOUT,
        **parameters: str,
    ) -> None:
        self.socket = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = MessageBuffer()
        self.login: list[m.BackendMessage] = []
        self.key = m.BackendKeyData(0, b"")
        if login:
            try:
                self.log_in(**parameters)
            except BaseException:
                self.close()
                raise

    def log_in(self, **parameters: str) -> None:
        """Sends the startup packet for a role that needs no password, and waits for its answer."""
        given = {"user": "postgres", "database": "postgres", **parameters}
        self.send(StartupMessage({k.encode(): v.encode() for k, v in given.items()}))
        self.login = self.until_ready()
        (self.key,) = (message for message in self.login if isinstance(message, m.BackendKeyData))

    # Sending

    def send(self, *items: Sent) -> None:
        """Sends all in one piece."""
        self.socket.sendall(serialized(items))

    def send_cut(self, data: bytes, cuts: Iterable[int]) -> None:
        """Sends in pieces that begin at these offsets."""
        for piece in cut(data, cuts):
            self.socket.sendall(piece)

    # Receiving

    def receive(self) -> m.BackendMessage:
        """The next message; it must serialize to the same bytes again.

        Raises:
            TimeoutError: it has not come in time.
            Closed: it will not come.
        """
        while (message := self._buffer.next_message()) is None:
            try:
                chunk = self.socket.recv(1 << 20)
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise Closed([])
            self._buffer.feed(chunk)
        parsed = m.parse_backend(*message)
        assert parsed.serialize()[5:] == message[1]
        return parsed

    def until(
        self, found: Callable[[m.BackendMessage], bool], *, count: int = 1
    ) -> list[m.BackendMessage]:
        """Messages up to the `count`-th for which `found` is true. Raises as `receive` does."""
        messages: list[m.BackendMessage] = []
        while count:
            try:
                messages.append(self.receive())
            except Closed:
                raise Closed(messages) from None
            except TimeoutError:
                raise TimeoutError(f"only {messages} came") from None
            count -= found(messages[-1])
        return messages

    def until_type(
        self, type_: type[m.BackendMessage], *, count: int = 1
    ) -> list[m.BackendMessage]:
        """Messages up to the `count`-th of a type."""
        return self.until(lambda message: isinstance(message, type_), count=count)

    def until_ready(self, count: int = 1) -> list[m.BackendMessage]:
        """Messages up to the `count`-th ReadyForQuery."""
        return self.until_type(m.ReadyForQuery, count=count)

    def until_closed(self) -> list[m.BackendMessage]:
        """All messages up to the end of the connection."""
        try:
            return self.until(lambda _: False)
        except Closed as closed:
            return closed.messages

    def ask(self, *items: Sent) -> list[m.BackendMessage]:
        """Sends, and returns what comes up to ReadyForQuery."""
        self.send(*items)
        return self.until_ready()

    def query(self, sql: str) -> list[m.BackendMessage]:
        """The answer to a Query."""
        return self.ask(m.Query(sql.encode()))

    def value(self, sql: str) -> str:
        """The value in the first column of the only row of a Query."""
        answer = self.query(sql)
        assert len(rows(answer)) == 1, answer
        return (rows(answer)[0][0] or b"").decode()

    # The end

    def send_eof(self) -> None:
        """Sends FIN."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Sends RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serialized(items: Iterable[Sent]) -> bytes:
    """The bytes of messages, and bytes as they are."""
    return b"".join(
        bytes(item) if isinstance(item, bytes | bytearray) else item.serialize() for item in items
    )


def cut(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """Pieces that begin at these offsets."""
    edges = sorted({0, len(data), *(at for at in cuts if 0 < at < len(data))})
    for start, end in itertools.pairwise(edges):
        yield data[start:end]


def rows(messages: Iterable[m.BackendMessage]) -> list[tuple[bytes | None, ...]]:
    """The values of the DataRow messages."""
    return [message.values for message in messages if isinstance(message, m.DataRow)]


def errors(messages: Iterable[m.BackendMessage]) -> list[m.ErrorResponse]:
    """The ErrorResponse messages."""
    return [message for message in messages if isinstance(message, m.ErrorResponse)]


def kinds(messages: Iterable[m.BackendMessage]) -> str:
    """The types of messages, as one word."""
    return "".join(chr(message.type) for message in messages)


# --- short names for long scripts ----------------------------------------------------------------


def q(sql: str) -> m.Query:
    return m.Query(sql.encode())


def p(sql: str, name: str = "", types: tuple[int, ...] = ()) -> m.Parse:
    return m.Parse(name.encode(), sql.encode(), types)


def b(
    statement: str = "",
    portal: str = "",
    parameters: tuple[bytes | None, ...] = (),
    formats: tuple[int, ...] = (),
    results: tuple[int, ...] = (),
) -> m.Bind:
    return m.Bind(portal.encode(), statement.encode(), formats, parameters, results)


def d(kind: bytes, name: str = "") -> m.Describe:
    return m.Describe(kind, name.encode())


def e(portal: str = "", max_rows: int = 0) -> m.Execute:
    return m.Execute(portal.encode(), max_rows)


def c(kind: bytes, name: str = "") -> m.Close:
    return m.Close(kind, name.encode())


H = m.Flush()
S = m.Sync()


# --- the recorder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """In a script: wait for this many messages of a type."""

    type: type[m.BackendMessage]
    count: int = 1


READY = Wait(m.ReadyForQuery)

Script: TypeAlias = Sequence["Sent | Wait"]

END = (S, q("ROLLBACK; SELECT 'the end'"))
"""What `record` adds to every script: whatever state the script left, this query gets its row."""


def record(
    frontend: Frontend,
    script: Script,
    *,
    waiting: bool = True,
    cuts: Callable[[bytes], Iterable[int]] | None = None,
) -> list[m.BackendMessage]:
    """Everything that a server answers to a script.

    Args:
        frontend: a connection; it is idle afterwards.
        script: what to send, and which answers to wait for in between.
        waiting: if false, all is sent at once, without a wait for answers.
        cuts: where each piece between two waits is cut.
    """
    answers: list[m.BackendMessage] = []
    unsent: list[Sent] = []

    def flush() -> None:
        data = serialized(unsent)
        unsent.clear()
        frontend.send_cut(data, cuts(data) if cuts else ())

    for item in script:
        if not isinstance(item, Wait):
            unsent.append(item)
        elif waiting:
            flush()
            answers += frontend.until_type(item.type, count=item.count)
    unsent += END
    flush()
    answers += frontend.until(lambda message: message == m.DataRow((b"the end",)))
    return answers + frontend.until_ready()


def masked(messages: Iterable[m.BackendMessage], own_pid: int) -> list[m.BackendMessage]:
    """The messages, without what differs from session to session: pids, keys, OIDs of tables, and
    names of temporary schemas."""
    tables: dict[int, int] = {}

    def field(field: m.Field) -> m.Field:
        if field.table_oid < 16384:
            return field
        return replace(field, table_oid=tables.setdefault(field.table_oid, len(tables) + 16384))

    def mask(message: m.BackendMessage) -> m.BackendMessage:
        match message:
            case m.RowDescription(fields):
                return m.RowDescription(tuple(map(field, fields)))
            case m.NotificationResponse(pid) if pid == own_pid:
                return replace(message, pid=0)
            case m.BackendKeyData():
                return m.BackendKeyData(0, b"")
            case m.ErrorResponse(fields) if fields.get("s", b"").startswith(b"pg_temp_"):
                return message.with_fields(s=b"pg_temp")
        return message

    return [mask(message) for message in messages]


def assert_same(direct: Sequence[m.BackendMessage], proxied: Sequence[m.BackendMessage]) -> None:
    """Asserts that the messages are the same: first as values, which are easier to read, then as
    bytes."""
    for number, pair in enumerate(zip(direct, proxied, strict=False)):
        assert pair[0] == pair[1], f"message {number}: direct {pair[0]}, by the proxy {pair[1]}"
    assert len(direct) == len(proxied), f"{kinds(direct)} direct, {kinds(proxied)} by the proxy"
    assert serialized(proxied) == serialized(direct)
