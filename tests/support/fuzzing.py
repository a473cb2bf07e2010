"""What the fuzzers share: hostile bytes for each phase, and the two ends that send them.

Invariant: what an attempt sends is determined before it begins, and does not depend on the answers.
An attempt ends within `LIMIT` seconds, whatever the other side does. So a failed attempt can be
repeated, and the same bytes can be sent directly and through the proxy.

`FUZZ_SECONDS` in the environment is the time that all fuzzers together take on one server.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protocol import messages as m
from protocol.framing import frame
from protocol.startup import StartupMessage, parse_startup_packet
from tests.support.recorder import b, c, cut, d, e, p, q
from tests.support.servers import Proxy, Server

SECONDS: Final = float(os.environ.get("FUZZ_SECONDS", "10"))
LIMIT: Final = 15.0
"""Seconds that one attempt may take; longer is a hang."""

T = TypeVar("T")


def fuzz(
    strategy: st.SearchStrategy[T],
    attempt: Callable[[T], None],
    share: float,
    after_each_batch: Callable[[], None],
) -> int:
    """Makes attempts with new values for a share of SECONDS; returns their number.

    The first one that fails is repeated, which tells whether it always fails.
    """
    end = time.monotonic() + SECONDS * share
    attempts = 0
    failed = False

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def batch(value: T) -> None:
        nonlocal attempts, failed
        if time.monotonic() > end and not failed:
            return
        attempts += 1
        try:
            attempt(value)
        except BaseException:
            failed = True
            raise

    while time.monotonic() < end:
        batch()
        after_each_batch()
    return attempts


# --- the client's end ----------------------------------------------------------------------------


def exchange(
    endpoint: Server | Proxy, pieces: Sequence[bytes], *, reset: bool = False, slow: bool = False
) -> bytes:
    """Everything that comes back for these pieces and the end of the stream.

    Args:
        endpoint: where to connect.
        pieces: sent one by one.
        reset: send RST instead of FIN; nothing is read then.
        slow: pause between the pieces, so that they also arrive one by one.

    Raises TimeoutError: the other side keeps the connection open.
    """
    with socket.create_connection((endpoint.host, endpoint.port), timeout=LIMIT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            for piece in pieces:
                sock.sendall(piece)
                if slow:
                    time.sleep(0.002)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def read_all(sock: socket.socket, limit: float = LIMIT) -> bytes:
    """Reads to the end of the stream, or its reset. Raises TimeoutError."""
    deadline = time.monotonic() + limit
    received = bytearray()
    while True:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            chunk = sock.recv(1 << 16)
        except ConnectionError:
            return bytes(received)
        if not chunk:
            return bytes(received)
        received += chunk


def messages_of(data: bytes) -> list[tuple[str, bytes]]:
    """The type and body of each message in an answer; an incomplete message has the type "?".

    The one-byte answers to SSLRequest and GSSENCRequest, which come first, have the type "N?".
    """
    found: list[tuple[str, bytes]] = []
    while data[:1] in (b"N", b"S", b"G") and data[1:2] != b"\0":
        found.append(("N?", data[:1]))
        data = data[1:]
    while len(data) >= 5:
        end = 1 + int.from_bytes(data[1:5], "big")
        if not 5 <= end <= len(data):
            break
        found.append((chr(data[0]), data[5:end]))
        data = data[end:]
    return [*found, ("?", data)] if data else found


def comparable(data: bytes, *, texts: bool = True) -> list[tuple[str, bytes]]:
    """The messages, without what differs from session to session; of errors, the fields that
    clients use.

    Args:
        data: an answer.
        texts: whether the texts of errors count, not only the SQLSTATE.
    """

    def compared(kind: str, body: bytes) -> tuple[str, bytes]:
        if kind == "K":
            return kind, b""
        if kind == "A":
            return kind, body[4:]
        if kind in "EN":
            fields = m.ErrorResponse.parse(body).fields
            kept = "SVCMDHP" if texts else "VC"
            return kind, repr([(name, fields.get(name)) for name in kept]).encode()
        return kind, _TABLE_OID.sub(b"", body) if kind == "T" else body

    return [compared(*message) for message in messages_of(data)]


def same_at_startup(stream: bytes, direct: bytes, proxied: bytes) -> bool:
    """Whether the proxy's answer to a client that has not logged in is the server's.

    The server judges a password message by its type, the proxy only when it is complete. It may
    never be complete. After SSLRequest and GSSENCRequest the server's own answer depends on how it
    was built, and on how much of the rest has arrived: there is nothing to compare.
    """
    if _ENCRYPTION_REQUEST.search(stream):
        return True
    ours, theirs = comparable(proxied, texts=False), comparable(direct, texts=False)
    return theirs in (ours, [*ours, ("E", _fatal(b"08P01"))])


def _fatal(sqlstate: bytes) -> bytes:
    return repr([("V", b"FATAL"), ("C", sqlstate)]).encode()


def is_whole(stream: bytes) -> bool:
    """Whether messages after the login end with a whole one, or break off in its body.

    The proxy passes on whole headers only, and whole Query and Parse messages. A server that gets a
    part of one may complain about that part instead of the end of the stream.
    """
    while len(stream) >= 5:
        end = 1 + int.from_bytes(stream[1:5], "big", signed=True)
        if end < 5:
            return True
        if end > len(stream):
            return stream[:1] not in (b"Q", b"P")
        stream = stream[end:]
    return not stream


_ENCRYPTION_REQUEST: Final = re.compile(rb"\x04\xd2\x16[/0]")


_TABLE_OID: Final = re.compile(rb"(?<=x\x00)\x00\x00..(?=\x00\x01\x00\x00\x00\x19)", re.DOTALL)
"""In a RowDescription, the OID of the table that PLAIN creates."""

# --- hostile bytes -------------------------------------------------------------------------------


@st.composite
def mutated(draw: st.DrawFn, strategy: st.SearchStrategy[bytes]) -> bytes:
    """Mostly the strategy's value itself; else with a few bytes changed, cut off or inserted."""
    data = bytearray(draw(strategy))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "insert", "length", "drop"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=6))
            case "length" if len(data) >= 5:
                start = draw(st.sampled_from([0, 1]))
                data[start : start + 4] = struct.pack("!I", draw(LENGTHS))
            case "drop":
                del data[at : at + draw(st.integers(1, 8))]
    return bytes(data)


LENGTHS: Final = st.one_of(
    st.sampled_from([0, 1, 3, 4, 5, 7, 8, 9, 12, 9999, 10000, 10001, 10004, 10005, 65536]),
    st.sampled_from([0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x16030100]),
    st.integers(0, 64),
)

_WORDS: Final = st.one_of(
    st.sampled_from(
        [b"", b"on", b"off", b"database", b"postgres", b"UTF8", b"LATIN1", b"2s", b"7"]
    ),
    st.binary(max_size=12).map(lambda word: word.replace(b"\0", b"")),
    st.integers(60, 11000).map(lambda size: b"x" * size),
)
_NAMES: Final = st.one_of(
    st.sampled_from(
        [
            *(b"user", b"database", b"options", b"application_name", b"client_encoding"),
            *(b"replication", b"DateStyle", b"statement_timeout", b"work_mem", b"is_superuser"),
            *(b"_pq_.", b"_pq_.compression", b"_pq_.x", b"pg_background.max_workers", b"a.b"),
        ]
    ),
    st.binary(min_size=1, max_size=8).map(lambda name: name.replace(b"\0", b"")),
)
_USERS: Final = st.sampled_from([b"postgres"] * 6 + [b"alice", b"nobody", b"pw_plain", b"pw_scram"])
_VERSIONS: Final = st.one_of(
    st.just((3, 0)),
    st.sampled_from(
        [(3, 0), (3, 1), (3, 2), (3, 9999), (3, 65535), (2, 0), (4, 0), (0, 0), (1, 1)]
    ),
)


@st.composite
def startup_packets(draw: st.DrawFn) -> bytes:
    """A StartupMessage, or one with wrong parts."""
    user = [(b"user", draw(_USERS))] if draw(st.integers(0, 9)) else []
    database = [(b"database", b"postgres")] if draw(st.integers(0, 9)) else []
    others = draw(st.lists(st.tuples(_NAMES, _WORDS), max_size=3, unique_by=lambda pair: pair[0]))
    # If a name comes twice, the proxy passes on only the last one.
    pairs = draw(st.permutations(list({**dict(others), **dict(user), **dict(database)}.items())))
    body = struct.pack("!HH", *draw(_VERSIONS))
    body += b"".join(name + b"\0" + value + b"\0" for name, value in pairs)
    body += draw(st.sampled_from([b"\0"] * 8 + [b"", b"\0\0", b"\0x"]))
    return struct.pack("!i", len(body) + 4) + body


_REQUESTS: Final = st.sampled_from(
    [
        *(struct.pack("!iHH", 8, 1234, code) for code in (5679, 5680)),
        *(struct.pack("!iHH", 8, 1234, code) for code in (5678, 5681, 0)),
        struct.pack("!iHHi", 12, 1234, 5679, 0),
        struct.pack("!iHHii", 16, 1234, 5678, 1, 2),
        struct.pack("!iHHi", 12, 1234, 5678, 99),
        struct.pack("!iHHi", 12 + 300, 1234, 5678, 99) + b"k" * 300,
        bytes.fromhex("16030100f0010000ec0303") + b"\x55" * 40,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
)

AFTER_LOGIN: Final = st.sampled_from(
    [b"", q("SELECT 1").serialize(), m.Terminate().serialize(), m.PasswordMessage(b"x").serialize()]
)


@st.composite
def startups(draw: st.DrawFn) -> bytes:
    """The whole stream of a client that logs in, tries to, or does not even try."""
    requests = draw(st.lists(mutated(_REQUESTS), max_size=2)) if draw(st.booleans()) else []
    packet = draw(mutated(startup_packets())) if draw(st.integers(0, 5)) else b""
    return b"".join([*requests, packet, draw(AFTER_LOGIN), draw(AFTER_LOGIN)])


CALLS: Final = [
    q("SELECT pg_background_launch('SELECT 1')"),
    q("SELECT pg_background_launch('SELECT 1'), 2; SELECT 3"),
    q("SELECT 1; SELECT pg_background_detach(pg_background_launch('SELECT 2'))"),
    q("BEGIN; SELECT pg_background_launch('SELECT 1/0'); SELECT 1/0"),
    q("SELECT * FROM pg_background_result(1) AS (x int)"),
    q("SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (x int)"),
    q("SELECT pg_background_launch("),
    q("SELECT pg_background_launch('SELECT 1') FROM generate_series(1, 2)"),
    q("SELECT pg_background_launch('COPY pg_class TO STDOUT')"),
    p("SELECT pg_background_launch($1)"),
    p("SELECT pg_background_launch($1, $2)", "s"),
    p("SELECT pg_background_result(pg_background_launch($1))", "s"),
    p("SELECT * FROM pg_background_result($1) AS (x int)", types=(23,)),
    p("SELECT pg_background_launch(($1", "t"),
    p("SELECT 1 FROM pg_extension WHERE extname = $1 AND extversion = 'x'", "s"),
    p("DROP EXTENSION IF EXISTS pg_background", "s"),
    p("COMMENT ON EXTENSION pg_background IS 'x'", "t"),
    b(parameters=(b"SELECT 7",)),
    b("s", "p", (b"SELECT 7", b"65536")),
    b("s", "", (b"SELECT 7",), results=(1,)),
    b(parameters=(None,)),
    b("s", "p", (b"\xff\xfe", b"x"), (0, 1), (0, 1, 7)),
]

PLAIN: Final = [
    *map(q, ["", ";", "SELECT 1", "SELECT 1; SELECT 1/0; SELECT 2", "BEGIN", "COMMIT", "ROLLBACK"]),
    *map(
        q, ["SELECT 'pg_background_launch'", "SELECT 1 -- pg_background_launch", "SELECT 'pg_back"]
    ),
    *map(q, ["CREATE TEMP TABLE IF NOT EXISTS t (x text)", "COPY t FROM STDIN", "TABLE t"]),
    *map(q, ["COPY (SELECT generate_series(1, 3)) TO STDOUT", "SET a.b = 'c'", "SHOW a.b"]),
    *map(q, ["LISTEN c", "NOTIFY c, 'x'", "DEALLOCATE ALL", "DISCARD ALL", "SAVEPOINT a"]),
    q("DO $$BEGIN RAISE NOTICE 'pg_background_launch'; END$$"),
    *map(
        q,
        [
            "SELECT count(*) > 0 AS x FROM pg_extension; SELECT 1",
            "SELECT 'ä'; SELECT 1/0, nope FROM pg_catalog.pg_extension e",
            "COPY t FROM STDIN; SELECT 1 FROM pg_stat_activity LIMIT 1",
            "DROP EXTENSION IF EXISTS pg_background; SELECT 2",
            "SELECT 1; DROP EXTENSION pg_background",
        ],
    ),
    q("DECLARE c CURSOR FOR SELECT generate_series(1, 9)"),
    q("FETCH 2 FROM c"),
    *map(
        p, ["", "SELECT 1", "SELECT $1::int", "SELECT generate_series(1, 5)", "COPY t FROM STDIN"]
    ),
    p("SELECT 'pg_background_result', $1", "s"),
    p("SELECT set_config('a.b', $1, false)", "s", (25,)),
    p("SELECT $1 + $2", "t", (23, 20)),
    p("SELEC", "t"),
    b(),
    b(parameters=(b"7",)),
    b("s", "p", (b"x",)),
    b("t", "", (b"1", b"2"), (0,), (1,)),
    b("none", "p"),
    *(d(kind, name) for kind in (b"S", b"P") for name in ("", "s", "p")),
    *(e(name, rows) for name in ("", "p") for rows in (0, 2)),
    e("c", 1),
    *(c(kind, name) for kind in (b"S", b"P") for name in ("", "s", "p")),
    m.Flush(),
    m.Sync(),
    m.Sync(),
    m.Sync(),
    m.CopyData(b"a line\n"),
    m.CopyData(b"pg_background_launch\tx\n\\.\n"),
    m.CopyDone(),
    m.CopyFail(b"no more"),
    m.PasswordMessage(b"secret"),
]

_FUNCTION_CALL: Final = frame(
    ord("F"), struct.pack("!ihhhicich", 177, 1, 0, 2, 1, b"3", 1, b"4", 0)
)  # int4pl(3, 4), as text


def frontend_stream(items: Sequence[m.Message]) -> st.SearchStrategy[list[bytes]]:
    """Messages after the login in any order, some of them damaged."""
    single = st.sampled_from([*(item.serialize() for item in items), _FUNCTION_CALL])
    hostile = st.one_of(
        mutated(single),
        st.binary(max_size=9),
        st.builds(lambda kind, length: bytes([kind]) + struct.pack("!I", length), _KINDS, LENGTHS),
        st.builds(frame, _KINDS, st.binary(max_size=20)),
    )
    return st.builds(
        lambda good, bad, more: [*good, *bad, *more],
        st.lists(single, max_size=8),
        st.one_of(st.just([]), st.lists(hostile, max_size=2)),
        st.lists(single, max_size=4),
    )


_KINDS: Final = st.one_of(st.sampled_from(list(b"QPBEDCSHFXdcfp")), st.integers(0, 255))

# --- the server's end ------------------------------------------------------------------------

LOGIN: Final = [
    m.AuthenticationOk(),
    m.ParameterStatus(b"server_version", b"15.1"),
    m.ParameterStatus(b"client_encoding", b"UTF8"),
    m.BackendKeyData(4711, b"keyy"),
    m.ReadyForQuery(b"I"),
]

ANSWERS: Final = [
    *LOGIN,
    m.AuthenticationCleartextPassword(),
    m.AuthenticationMD5Password(b"salt"),
    m.AuthenticationSASL((b"SCRAM-SHA-256",)),
    m.AuthenticationSASL((b"SCRAM-SHA-256-PLUS", b"OTHER")),
    m.AuthenticationSASL(()),
    m.AuthenticationSASLContinue(b"r=x,s=y,i=1"),
    m.AuthenticationSASLFinal(b"v=x"),
    m.AuthenticationGSS(),
    m.ErrorResponse({"S": b"ERROR", "V": b"ERROR", "C": b"42883", "M": b"no pg_background_x"}),
    m.ErrorResponse({"S": b"FATAL", "V": b"FATAL", "C": b"57P01", "M": b"going"}),
    m.NoticeResponse({"S": b"NOTICE", "C": b"00000", "M": b"hear"}),
    m.RowDescription(()),
    m.DataRow((b"1", None)),
    m.DataRow((b"4711", b"x", b"y", b"{}", None)),
    m.CommandComplete(b"SELECT 1"),
    m.ReadyForQuery(b"T"),
    m.ParseComplete(),
    m.BindComplete(),
    m.NoData(),
    m.PortalSuspended(),
    m.CloseComplete(),
    m.EmptyQueryResponse(),
    m.ParameterDescription((23,)),
    m.NotificationResponse(1, b"c", b"p"),
    m.CopyInResponse(0, (0,)),
    m.CopyOutResponse(0, (0,)),
    m.CopyBothResponse(0, ()),
    m.CopyData(b"x\n"),
    m.CopyDone(),
]

_BACKEND_KINDS: Final = st.one_of(
    st.sampled_from(list(b"RSKZENTDC123nstIAGHWVdcv")), st.integers(0, 255)
)


@dataclass(frozen=True)
class Script:
    """What the fake server sends, and how it ends. None: wait until the proxy sends something."""

    pieces: list[bytes | None]
    end: str


def scripts() -> st.SearchStrategy[Script]:
    """Servers that misbehave from the first byte on, or after the login."""
    single = st.sampled_from([message.serialize() for message in ANSWERS])
    hostile = st.one_of(
        mutated(single),
        st.binary(max_size=30),
        st.builds(
            lambda kind, length, rest: bytes([kind]) + struct.pack("!I", length) + rest,
            _BACKEND_KINDS,
            LENGTHS,
            st.binary(max_size=8),
        ),
        st.builds(frame, _BACKEND_KINDS, st.binary(max_size=20)),
    )
    login = b"".join(message.serialize() for message in LOGIN)
    row = b"".join(
        message.serialize()
        for message in (
            m.RowDescription(()),
            m.DataRow((b"4711",)),
            m.CommandComplete(b"SELECT 1"),
            m.ReadyForQuery(b"I"),
        )
    )
    return st.builds(
        lambda start, rest, end: Script([*start, *rest], end),
        st.sampled_from([[], [login], [login, None], [login, None, row], [login, None, row, None]]),
        st.lists(st.one_of(st.none(), single, hostile, hostile), max_size=6),
        st.sampled_from(["close", "close", "reset", "stay"]),
    )


class Upstream:
    """Stands in front of a real server, and plays a script in its place if a client asks for that.

    In the startup packet, ``fuzz.primary = N`` is for the client's own connection, and
    ``fuzz.side = N`` for its jobs' connections. All other connections go to the real server.
    """

    host = "127.0.0.1"

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener = socket.create_server((self.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.scripts: dict[bytes, Script] = {}
        self._playing = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def add(self, script: Script) -> str:
        """Adds a script; returns its number for a startup packet."""
        number = str(len(self.scripts) + 1)
        self.scripts[number.encode()] = script
        return number

    def wait_until_done(self) -> None:
        """Waits until every script has been played, and the proxy has closed its end."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._playing, LIMIT), "not closed"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(120.0)
            packet = _receive_packet(sock)
            if packet == _SSL_REQUEST:
                sock.sendall(b"N")
                packet = _receive_packet(sock)
            startup = parse_startup_packet(packet[4:]) if packet else None
            given = startup.parameters if isinstance(startup, StartupMessage) else {}
            is_job = given.get(b"application_name", b"").startswith(b"pg_background")
            script = self.scripts.get(given.get(b"fuzz.side" if is_job else b"fuzz.primary", b""))
            if script is None:
                self._pass_on(sock, packet)
                return
            with self._changed:
                self._playing += 1
            try:
                _play(sock, script)
            finally:
                with self._changed:
                    self._playing -= 1
                    self._changed.notify_all()

    def _pass_on(self, sock: socket.socket, packet: bytes) -> None:
        with socket.create_connection((self._server.host, self._server.port)) as real:
            real.sendall(packet)
            back = threading.Thread(target=_pump, args=(real, sock), daemon=True)
            back.start()
            _pump(sock, real)
            back.join(LIMIT)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_SSL_REQUEST: Final = struct.pack("!iHH", 8, 1234, 5679)


def _receive_packet(sock: socket.socket) -> bytes:
    packet = b""
    while len(packet) < 4 or len(packet) < int.from_bytes(packet[:4], "big"):
        chunk = sock.recv(1 if len(packet) < 4 else int.from_bytes(packet[:4], "big") - len(packet))
        if not chunk:
            return b""
        packet += chunk
    return packet


def _play(sock: socket.socket, script: Script) -> None:
    sock.settimeout(LIMIT)
    for piece in script.pieces:
        if piece is None:
            if not sock.recv(1 << 16):
                return
        elif piece:
            sock.sendall(piece)
    if script.end == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif script.end == "close":
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    else:
        read_all(sock)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def cut_at(data: bytes, cuts: Sequence[float]) -> list[bytes]:
    """The pieces of a stream; each cut is a share of its length."""
    return list(cut(data, (int(share * len(data)) for share in cuts)))
