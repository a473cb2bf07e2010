"""The PROXY protocol: the header is read whole and nothing else, from named load balancers only,
and then the client's address counts wherever an address does.

HAProxy itself sends it where it is at hand; all else is sent by hand, by the specification
(https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import socket
import ssl
import struct
import sys
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.startup import SSLRequest, StartupMessage
from proxy.config import ConfigError, load
from proxy.net import proxy_protocol
from proxy.net.peer import Peer
from proxy.net.proxy_protocol import LONGEST_V1, SIGNATURE, HeaderError, Source, Wanted
from tests.conftest import StartProxy, upstream_of
from tests.support.background import run, wait_until
from tests.support.certificates import Certificates
from tests.support.fuzzing import cut_at
from tests.support.haproxy import haproxy
from tests.support.servers import Proxy, Server, running
from tests.support.wire import Wire, error_of
from tests.test_systemd import HAND_OVER

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
CLIENT: Final = "192.0.2.7"
V1: Final = b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 6543\r\n"
ADDRESSES_4: Final = bytes((192, 0, 2, 7, 192, 0, 2, 1)) + struct.pack("!HH", 50000, 6543)
ADDRESSES_6: Final = (
    ipaddress.ip_address("2001:db8::7").packed
    + ipaddress.ip_address("2001:db8::1").packed
    + struct.pack("!HH", 50000, 6543)
)
UNIX: Final = b"/run/client".ljust(108, b"\0") * 2
TLVS: Final = b"\x03\x00\x04\xde\xad\xbe\xef" + b"\x05\x00\x02id" + b"\x04\x00\x00"
LONGEST_LINE: Final = b"PROXY UNKNOWN " + b"x" * (LONGEST_V1 - 16) + b"\r\n"


def v2(command: int, family: int, body: bytes = b"", size: int | None = None) -> bytes:
    return (
        SIGNATURE
        + struct.pack("!BBH", command, family, len(body) if size is None else size)
        + (body)
    )


GOOD: Final = (
    (V1, Source(CLIENT, 50000)),
    (b"PROXY TCP4 255.255.255.255 0.0.0.0 0 65535\r\n", Source("255.255.255.255", 0)),
    (b"PROXY TCP6 2001:DB8::7 ::1 65535 1\r\n", Source("2001:db8::7", 65535)),
    (
        b"PROXY TCP6 " + b"ffff:" * 7 + b"ffff " + b"ffff:" * 7 + b"ffff 65535 65535\r\n",
        Source("ffff:" * 7 + "ffff", 65535),
    ),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN any \r thing\r\n", None),
    (LONGEST_LINE, None),
    (v2(0x21, 0x11, ADDRESSES_4), Source(CLIENT, 50000)),
    (v2(0x21, 0x11, ADDRESSES_4 + TLVS), Source(CLIENT, 50000)),
    (v2(0x21, 0x11, ADDRESSES_4 + b"\0" * (65535 - 12)), Source(CLIENT, 50000)),
    (v2(0x21, 0x21, ADDRESSES_6 + TLVS), Source("2001:db8::7", 50000)),
    (v2(0x21, 0x31, UNIX), None),
    (v2(0x21, 0x12, ADDRESSES_4), None),
    (v2(0x21, 0x00), None),
    (v2(0x21, 0x00, b"whatever"), None),
    (v2(0x20, 0x00), None),
    (v2(0x20, 0x11, ADDRESSES_4), None),
    (v2(0x20, 0x77, b"x" * 300), None),  # what a LOCAL connection says is skipped
)

BAD: Final = (
    b"\0\0\0\x08\x04\xd2\x16\x2f",  # SSLRequest
    b"GET / HTTP/1.1\r\n\r\n",
    b"PROXY",  # and no more
    b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\r\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 \r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 -1\r\n",
    b"PROXY TCP4 01.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 ::1 ::1 1 1\r\n",
    b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n",
    b"PROXY TCP6 ::1 :::1 1 1\r\n",
    b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY UNKNOWNX\r\n",
    b"PROXY TCP4\r\n",
    LONGEST_LINE[:-2] + b"x\r\n",
    b"PROXY TCP4 " + b"1" * 200,
    SIGNATURE[:-1] + b"\r",
    v2(0x11, 0x11, ADDRESSES_4),
    v2(0x31, 0x11, ADDRESSES_4),
    v2(0x22, 0x11, ADDRESSES_4),
    v2(0x21, 0x10, ADDRESSES_4),
    v2(0x21, 0x01, ADDRESSES_4),
    v2(0x21, 0x13, ADDRESSES_4),
    v2(0x21, 0x41, ADDRESSES_4),
    v2(0x21, 0x11, ADDRESSES_4[:-1]),
    v2(0x21, 0x21, ADDRESSES_6[:-1]),
    v2(0x21, 0x31, UNIX[:-1]),
    v2(0x21, 0x11, ADDRESSES_4, size=13),  # and then the end
)


# The header alone


def read(data: bytes, pieces: list[bytes]) -> tuple[Source | None, bytes]:
    """What a header in these pieces says, and what is left of them."""
    reader = proxy_protocol.header()
    wanted = next(reader)
    seen = b""
    most = len(SIGNATURE) + LONGEST_V1 + 4096
    for n, piece in enumerate(pieces):
        seen += piece
        while seen:
            assert 0 < wanted.most <= most
            part = seen[: wanted.most]
            end = part.find(wanted.end) if wanted.end else -1
            taken, seen = seen[: end + 1 or len(part)], seen[end + 1 or len(part) :]
            try:
                wanted = reader.send(taken)
            except StopIteration as stop:
                return stop.value, seen + b"".join(pieces[n + 1 :])
    raise HeaderError("it has no end")


@pytest.mark.parametrize(("header", "source"), GOOD)
def test_a_header_says_where_the_client_is(header: bytes, source: Source | None) -> None:
    assert read(header, [header + header]) == (source, header)
    assert read(header, [bytes((byte,)) for byte in header]) == (source, b"")


@pytest.mark.parametrize("header", BAD)
def test_what_is_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(HeaderError):
        read(header, [header])
    with pytest.raises(HeaderError):
        read(header, [bytes((byte,)) for byte in header])


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, Source | None]:
    """One that a sender may send, of either version."""
    version: Literal[4, 6] = draw(st.sampled_from([4, 6]))
    addresses = st.ip_addresses(v=version)
    source, destination = draw(addresses), draw(addresses)
    ports = draw(st.tuples(st.integers(0, 65535), st.integers(0, 65535)))
    if draw(st.booleans()):
        line = f"PROXY TCP{version} {source} {destination} {ports[0]} {ports[1]}\r\n"
        return line.encode(), Source(str(source), ports[0])
    tlvs = draw(st.binary(max_size=6000))
    body = source.packed + destination.packed + struct.pack("!HH", *ports) + tlvs
    command = draw(st.sampled_from([0x20, 0x21]))
    header = v2(command, 0x11 if version == 4 else 0x21, body)
    return header, Source(str(source), ports[0]) if command == 0x21 else None


@given(headers(), st.binary(max_size=50), st.lists(st.floats(0, 1, exclude_max=True), max_size=6))
def test_a_header_is_read_whole_and_nothing_behind_it(
    header: tuple[bytes, Source | None], behind: bytes, cuts: list[float]
) -> None:
    data, source = header
    assert read(data, cut_at(data + behind, cuts)) == (source, behind)


@given(headers(), st.data())
@example((V1, None), None)
def test_a_spoiled_header_is_refused_or_read_within_its_bounds(
    header: tuple[bytes, Source | None], data: st.DataObject | None
) -> None:
    spoiled = bytearray(header[0])
    if data is not None:
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(len(spoiled), 64) - 1))
            match data.draw(st.integers(0, 2)):
                case 0:
                    spoiled[at] = data.draw(st.integers(0, 255))
                case 1:
                    del spoiled[at]
                case 2:
                    spoiled[at:at] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(HeaderError):
        source, left = read(bytes(spoiled), [bytes(spoiled)])
        taken = spoiled[: len(spoiled) - len(left)]
        assert taken.startswith((b"PROXY ", SIGNATURE))
        if taken.startswith(b"PROXY "):
            assert taken.endswith(b"\r\n")
            assert len(taken) <= LONGEST_V1
        else:
            assert len(taken) == 16 + int.from_bytes(taken[14:16])
        if source is not None:
            ipaddress.ip_address(source.host)
            assert 0 <= source.port <= 65535


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    if not data.startswith((b"PROXY ", SIGNATURE)):
        with pytest.raises(HeaderError):
            read(data, [data])


@given(headers(), st.binary(min_size=1, max_size=50), st.floats(0, 1, exclude_max=True))
def test_a_socket_is_left_with_what_the_client_has_sent(
    header: tuple[bytes, Source | None], behind: bytes, cut: float
) -> None:
    async def take() -> tuple[Peer, bytes]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            task = asyncio.create_task(proxy_protocol.receive(ours, 10))
            for piece in cut_at(header[0] + behind, [cut]):
                theirs.sendall(piece)
                await asyncio.sleep(0)
            peer = await task
            return peer, ours.recv(100)

    peer, left = asyncio.run(take())
    assert peer.name == (header[1] or "")
    assert peer.sender is not None
    assert left == behind


def test_wanted_is_never_more_than_a_header() -> None:
    reader = proxy_protocol.header()
    assert next(reader) == Wanted(12)
    assert reader.send(b"PROXY UNKNOW") == Wanted(95, b"\n")


# Settings


def test_the_listeners_that_ask_for_it(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(
        'listen = ["127.0.0.1:1", "[::1]:2?proxy_protocol=on", "/run/x:3?proxy_protocol=off",'
        ' "/run/y:4?proxy_protocol=on"]\n'
        'proxy_protocol_from = ["10.0.0.0/8", "unix"]\n'
    )
    config = load(file=file)
    assert [address.proxy_protocol for address in config.listen] == [False, True, False, True]
    assert [str(address) for address in config.listen] == [
        *("127.0.0.1:1", "[::1]:2?proxy_protocol=on"),
        *("/run/x:3", "/run/y:4?proxy_protocol=on"),
    ]
    assert list(map(str, config.proxy_protocol_from)) == ["10.0.0.0/8", "unix"]
    for wrong in ("127.0.0.1:1?", "127.0.0.1:1?proxy_protocol", "127.0.0.1:1?tls=on"):
        file.write_text(f'listen = "{wrong}"')
        with pytest.raises(ConfigError, match=r"listen: invalid address: .*proxy_protocol=on\)"):
            load(file=file)
    file.write_text('listen = "127.0.0.1:1?proxy_protocol=on"')
    with pytest.raises(ConfigError, match="listen: proxy_protocol=on needs proxy_protocol_from"):
        load(file=file)
    file.write_text('proxy_protocol_from = "haproxy"')
    with pytest.raises(ConfigError, match="proxy_protocol_from: invalid network"):
        load(file=file)
    file.write_text('admin_listen = "127.0.0.1:1?proxy_protocol=on"')
    with pytest.raises(ConfigError, match="admin_listen: invalid address"):
        load(file=file)


# The proxy


class Behind(Wire):
    """A session by hand, behind a header."""

    def __init__(self, port: int, header: bytes, **options: Any) -> None:
        self._header = header
        super().__init__(("127.0.0.1", port), **options)

    def _connect(self, receive_buffer: int | None = None) -> socket.socket:
        client = super()._connect(receive_buffer)
        client.sendall(self._header)
        return client


class Listening:
    """A proxy that listens for headers, at a TCP port and at a Unix socket, and without as well.

    Attributes:
        port: where headers are to come.
        folder: of the Unix socket, whose port is 7777.
    """

    def __init__(self, start: StartProxy, folder: Path, *options: str, **more: Any) -> None:
        believed = more.pop("believed", ("127.0.0.1", "unix"))
        self.folder = folder
        self.proxy: Proxy = start(
            *("--listen", "127.0.0.1:0?proxy_protocol=on"),
            *("--listen", f"{folder}:7777?proxy_protocol=on"),
            *(part for one in believed for part in ("--proxy-protocol-from", one)),
            *("--log-connections", "on", *options),
        )
        found = self.proxy.wait_for_log(r"listening on 127\.0\.0\.1:(\d+), with the PROXY protocol")
        self.port = int(found[1])
        self.proxy.wait_for_log("listening on Unix socket .*7777, with the PROXY protocol")


def startup(**names: str) -> bytes:
    names = {"user": "postgres", "database": "postgres", **names}
    return StartupMessage({k.encode(): v.encode() for k, v in names.items()}).serialize()


@WORKERS
def test_the_clients_address_counts_wherever_an_address_does(
    server: Server, start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    listening = Listening(
        *(start_proxy, tmp_path, "--workers", workers, "--application-name-add-host", "on"),
        *("--allow-from", "192.0.2.0/24", "--allow-from", "2001:db8::/32"),
        *(
            "--log-disconnections",
            "on",
            "--admin-users",
            "postgres",
            "--listen",
            f"{tmp_path}:8888",
        ),
    )
    proxy = listening.proxy
    proxy.wait_for_log("8888")
    for header, host, shown in (
        (V1, CLIENT, CLIENT),
        (v2(0x21, 0x21, ADDRESSES_6 + TLVS), "2001:db8::7", "[2001:db8::7]"),
    ):
        with Behind(listening.port, header, application_name="app") as wire:
            [(_, row)] = [m for m in wire.query("SHOW application_name") if m[0] == "D"]
            assert row.endswith(f"app - {shown}:50000".encode())
            with proxy.connect(host=tmp_path, port=8888, dbname="pg_background_proxy") as console:
                sessions = console.execute("SHOW SESSIONS").fetchall()
                assert any((host, 50000) in itertools.pairwise(row) for row in sessions)
        proxy.wait_for_log(f"connection received: host={host} port=50000")
        proxy.wait_for_log(f"connection authorized: .* host={host} port=50000")
        proxy.wait_for_log(f"disconnection: .* host={host} port=50000")
    # Elsewhere in the log, the load balancer's address does not stand for theirs.
    assert "host=127.0.0.1" not in proxy.log
    with Behind(listening.port, V1.replace(b"192.0.2.7", b"198.51.100.7"), login=False) as wire:
        wire.send(startup())
        error = error_of([wire.message()])
        assert error.message == b'no connections are taken from host "198.51.100.7"'
    # What is nobody else's has the load balancer's own address.
    with Behind(listening.port, v2(0x20, 0), login=False) as wire:
        wire.send(startup())
        error = error_of([wire.message()])
        assert error.message == b'no connections are taken from host "127.0.0.1"'


@WORKERS
@pytest.mark.parametrize("header", [header for header, _ in GOOD[::3]])
def test_a_session_behind_each_kind_of_header(
    start_proxy: StartProxy, tmp_path: Path, workers: str, header: bytes
) -> None:
    listening = Listening(start_proxy, tmp_path, "--workers", workers)
    for where in (("127.0.0.1", listening.port), str(tmp_path / ".s.PGSQL.7777")):
        # The header and the startup packet in one piece, and byte by byte.
        for piece in (1, 70000):
            with Wire(where, login=False) as wire:
                data = header + startup()
                for at in range(0, len(data) if len(data) < 1000 else 0, piece):
                    wire.send(data[at : at + piece])
                if len(data) >= 1000:
                    wire.send(data)
                messages = wire.until_ready()
                assert "R" in [kind for kind, _ in messages]
                assert [kind for kind, _ in wire.query("SELECT 1")][-3:] == ["D", "C", "Z"]


@WORKERS
def test_what_is_no_header_is_hung_up_on_and_logged(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    listening = Listening(start_proxy, tmp_path, "--workers", workers)
    proxy = listening.proxy
    for header in BAD:
        with (
            contextlib.suppress(OSError),  # it may have hung up already, with bytes unread
            socket.create_connection(("127.0.0.1", listening.port), timeout=20) as client,
        ):
            client.sendall(header)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    proxy.wait_for_log(
        "WARNING:  PROXY protocol: the connection does not begin with a header; the connection"
    )
    # The others are counted; and nothing of this has harmed anybody.
    wait_until(lambda: says_how_many(listening))
    with Behind(listening.port, V1) as wire:
        assert wire.query("SELECT 1")
    with proxy.connect() as conn:
        assert run(conn, "SELECT 1", "n int") == [(1,)]


def says_how_many(listening: Listening) -> bool:
    """Whether the log has counted the complaints that it has left out; makes one more."""
    with socket.create_connection(("127.0.0.1", listening.port), timeout=20) as client:
        client.sendall(b"x")
        with contextlib.suppress(ConnectionResetError):
            client.recv(1)
    return "more before it)" in listening.proxy.log


@WORKERS
def test_only_named_load_balancers_are_believed(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    listening = Listening(
        *(start_proxy, tmp_path, "--workers", workers), believed=["192.0.2.0/24", "127.0.0.2"]
    )
    for where, who in (
        (("127.0.0.1", listening.port), 'host "127.0.0.1"'),
        (str(tmp_path / ".s.PGSQL.7777"), "a Unix socket"),
    ):
        with Wire(where, login=False) as wire:
            with contextlib.suppress(OSError):
                wire.send(V1 + startup())
            with pytest.raises((EOFError, ConnectionError)):
                wire.message()
        if workers == "1" and who != "a Unix socket":
            listening.proxy.wait_for_log(f"PROXY protocol: {who} is not in proxy_protocol_from")
    with socket.socket() as client:
        client.settimeout(20)
        client.bind(("127.0.0.2", 0))
        client.connect(("127.0.0.1", listening.port))
        client.sendall(V1 + startup())
        assert client.recv(1) == b"R"


@WORKERS
def test_a_header_that_does_not_come_ends_the_connection(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    listening = Listening(
        start_proxy, tmp_path, "--workers", workers, "--client-login-timeout", "300ms"
    )
    for sent in (b"", b"PROXY TC", SIGNATURE):
        with socket.create_connection(("127.0.0.1", listening.port), timeout=20) as client:
            client.sendall(sent)
            assert client.recv(1) == b""
    # Who has left again, as a load balancer does to see who is there, is not worth a line.
    listening.proxy.wait_for_log("PROXY protocol: the header did not come in time")


def test_a_listener_without_the_setting_takes_no_header(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy("--log-connections", "on", "--proxy-protocol-from", "127.0.0.1")
    with Wire((proxy.host, proxy.port), login=False) as wire:
        wire.send(V1 + startup())
        with pytest.raises((EOFError, ConnectionError)):
            wire.message()
    proxy.wait_for_log("invalid length of startup packet")
    assert CLIENT not in proxy.log


@WORKERS
def test_tls_begins_behind_the_header(
    start_proxy: StartProxy, certificates: Certificates, tmp_path: Path, workers: str
) -> None:
    listening = Listening(
        *(start_proxy, tmp_path, "--workers", workers, "--client-tls-sslmode", "require"),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
    )
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.set_alpn_protocols(["postgresql"])
    # By a Unix socket, too, which has no TLS else: the client is not on this machine.
    for where in (("127.0.0.1", listening.port), str(tmp_path / ".s.PGSQL.7777")):
        for direct in (False, True):
            with Wire(where, login=False) as wire:
                wire.send(V1)
                if not direct:
                    wire.send(SSLRequest().serialize())
                    assert wire.socket.recv(1) == b"S"
                with context.wrap_socket(wire.socket, server_hostname="localhost") as secured:
                    wire.socket = secured
                    wire.send(startup())
                    assert wire.until_ready()
        with Wire(where, login=False) as wire:
            wire.send(V1 + startup())
            assert error_of([wire.message()]).message == b"SSL required"
    listening.proxy.wait_for_log(f"connection authorized: .* SSL enabled .* host={CLIENT}")


@pytest.mark.parametrize(
    ("header", "where", "asked"),
    [
        (V1, "tcp", False),
        (V1, "unix", False),
        (V1.replace(b"192.0.2.7", b"127.0.0.1"), "unix", True),
        (v2(0x20, 0), "unix", True),
        (v2(0x20, 0), "tcp", True),
    ],
)
def test_no_password_in_clear_text_from_another_machine(
    start_proxy: StartProxy, tmp_path: Path, header: bytes, where: str, asked: bool
) -> None:
    listening = Listening(start_proxy, tmp_path, "--auth-type", "plain")
    path = str(tmp_path / ".s.PGSQL.7777")
    with Wire(("127.0.0.1", listening.port) if where == "tcp" else path, login=False) as wire:
        wire.send(header + startup(user="pw_scram"))
        kind, body = wire.message()
        assert (kind, body) == ("R", struct.pack("!I", 3)) if asked else kind == "E"


@pytest.mark.parametrize("header", [V1, v2(0x20, 0), v2(0x21, 0x31, UNIX), b"PROXY UNKNOWN\r\n"])
def test_a_load_balancer_of_our_own_user_opens_no_door_to_the_console(
    start_proxy: StartProxy, tmp_path: Path, header: bytes
) -> None:
    """Over a Unix socket the system tells the load balancer's user, not the client's."""
    file = tmp_path / "users.txt"
    file.write_text('"boss" "secret"\n')
    file.chmod(0o600)
    listening = Listening(start_proxy, tmp_path, "--admin-users", "boss", "--auth-file", str(file))
    with Wire(str(tmp_path / ".s.PGSQL.7777"), login=False) as wire:
        wire.send(header + startup(user="boss", database="pg_background_proxy"))
        kind, body = wire.message()
        assert (kind, body[:4]) == ("R", struct.pack("!I", 10))  # SCRAM, not AuthenticationOk
    assert listening.proxy.running


# HAProxy


@WORKERS
@pytest.mark.parametrize(
    "options",
    [
        "send-proxy",
        "send-proxy-v2",
        "send-proxy-v2 proxy-v2-options crc32c,unique-id,authority",
        "send-proxy-v2 check check-send-proxy inter 100ms",
    ],
)
@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_haproxy_tells_where_the_client_is(
    server: Server,
    start_proxy: StartProxy,
    tmp_path: Path,
    workers: str,
    options: str,
    where: str,
) -> None:
    listening = Listening(
        *(start_proxy, tmp_path, "--workers", workers, "--application-name-add-host", "on"),
    )
    path = tmp_path / ".s.PGSQL.7777"
    address = f"127.0.0.1:{listening.port}" if where == "tcp" else f"unix@{path}"
    with haproxy(tmp_path, f"{address} {options}") as found, found.connect() as conn:
        with socket.socket(fileno=os.dup(conn.fileno())) as same:
            own = same.getsockname()[1]
        assert conn.info.parameter_status("application_name") == f"127.0.0.1:{own}"
        listening.proxy.wait_for_log(f"connection authorized: .* host=127.0.0.1 port={own}")
        assert run(conn, "SELECT 42", "n int") == [(42,)]
    assert "PROXY protocol:" not in listening.proxy.log


def test_haproxy_passes_tls_through(
    start_proxy: StartProxy, certificates: Certificates, tmp_path: Path
) -> None:
    listening = Listening(
        *(start_proxy, tmp_path, "--client-tls-sslmode", "require"),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
    )
    path = tmp_path / ".s.PGSQL.7777"
    for address in (f"127.0.0.1:{listening.port}", f"unix@{path}"):
        with (
            haproxy(tmp_path, f"{address} send-proxy-v2") as found,
            found.connect(sslmode="verify-full", sslrootcert=str(certificates.ca)) as conn,
        ):
            assert conn.pgconn.ssl_in_use
            assert run(conn, "SELECT 42", "n int") == [(42,)]


def test_a_socket_unit_asks_for_it_by_its_name(server: Server, tmp_path: Path) -> None:
    """FileDescriptorName=proxy_protocol."""
    starter = HAND_OVER.replace('"x"', '"proxy_protocol:x"')
    assert starter != HAND_OVER
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as x:
        fds = [one.fileno(), x.fileno()]
        command = (sys.executable, "-c", starter, ",".join(map(str, fds)))
        options = ("--upstream", upstream_of(server), "--proxy-protocol-from", "127.0.0.1")
        with running(*command, *options, log=tmp_path / "log", pass_fds=fds):
            with Behind(one.getsockname()[1], V1) as wire:
                assert wire.query("SELECT 1")
            with Wire(x.getsockname()) as wire:
                assert wire.query("SELECT 1")
