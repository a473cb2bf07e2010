"""TLS from clients: who may come without, both ways to begin it, and what is refused before it.

Invariant: a client is a real one (psql, psycopg, asyncpg), or a socket that sends what none would.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from protocol import messages as m
from protocol.framing import MessageBuffer
from protocol.startup import GSSENCRequest, SSLRequest, StartupMessage
from proxy.config.keepalive import Keepalive
from proxy.demo.embedded import free_port
from tests.conftest import StartProxy, shared_proxy, upstream_of
from tests.support.certificates import Certificates
from tests.support.servers import REPOSITORY, Proxy, Server, clean_environment, psql, run_program

TIMEOUT = 10.0
STARTUP = StartupMessage({b"user": b"postgres", b"database": b"postgres"})
HANDSHAKE = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"


def tls_options(certificates: Certificates, mode: str) -> list[str]:
    return [
        *("--client-tls-sslmode", mode, "--client-tls-ca-file", str(certificates.ca)),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
    ]


@pytest.fixture(scope="module")
def tls_proxy(server: Server, certificates: Certificates) -> Iterator[Proxy]:
    """A proxy that offers TLS and demands nothing."""
    options = (*tls_options(certificates, "prefer"), "--log-level", "debug")
    with shared_proxy(upstream_of(server), *options) as proxy:
        yield proxy


@contextlib.contextmanager
def raw(proxy: Proxy, *sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection((proxy.host, proxy.port), timeout=TIMEOUT) as connection:
        if sent:
            connection.sendall(b"".join(sent))
        yield connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def error_in(data: bytes) -> m.ErrorResponse:
    ((kind, body),) = MessageBuffer(data)
    assert kind == m.ErrorResponse.type
    return m.ErrorResponse.parse(body)


def is_tls(conn: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether this client has TLS to the proxy."""
    return bool(conn.pgconn.ssl_in_use)


# Both ways to begin


@pytest.mark.parametrize(
    "params",
    [
        {"sslmode": "require"},
        {"sslmode": "verify-ca"},
        {"sslmode": "verify-full", "host": "localhost", "hostaddr": "127.0.0.1"},
        {"sslmode": "require", "sslnegotiation": "direct"},
        {"sslmode": "verify-full", "sslnegotiation": "direct"},
        {"sslmode": "require", "gssencmode": "disable", "ssl_max_protocol_version": "TLSv1.2"},
    ],
    ids=str,
)
def test_psycopg_by_tls(
    tls_proxy: Proxy, certificates: Certificates, params: dict[str, Any]
) -> None:
    with tls_proxy.connect(sslrootcert=str(certificates.ca), **params) as conn:
        assert is_tls(conn)
        pid = conn.execute("SELECT pg_background_launch('SELECT 42')").fetchone()
        assert pid is not None
        rows = conn.execute("SELECT * FROM pg_background_result(%s) AS (n int)", pid).fetchall()
        assert rows == [(42,)]


def test_a_client_without_tls_comes_in_too(tls_proxy: Proxy) -> None:
    with tls_proxy.connect(sslmode="disable") as conn:
        assert not is_tls(conn)
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_psql_by_tls(tls_proxy: Proxy, certificates: Certificates) -> None:
    ca = str(certificates.ca)
    done = psql(tls_proxy.port, "-c", "\\conninfo", sslmode="verify-ca", sslrootcert=ca)
    assert (done.returncode, done.stderr) == (0, "")
    assert "TLSv1.3" in done.stdout


async def test_asyncpg_by_tls(tls_proxy: Proxy, certificates: Certificates) -> None:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.set_alpn_protocols(["postgresql"])
    for direct in (False, True):
        conn = await asyncpg.connect(
            host="localhost",
            port=tls_proxy.port,
            user="postgres",
            database="postgres",
            ssl=context,
            direct_tls=direct,
            timeout=TIMEOUT,
        )
        assert await conn.fetchval("SELECT sum(n) FROM generate_series(1, 100000) n") == 5000050000
        await conn.close()


def test_a_large_result_and_a_large_parameter_by_tls(tls_proxy: Proxy) -> None:
    with tls_proxy.connect(sslmode="require") as conn:
        text = "ä" * 5_000_000
        assert conn.execute("SELECT %s::text", [text]).fetchone() == (text,)
        with conn.cursor().copy(
            "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT"
        ) as copy:
            assert sum(len(row) for row in copy) == 20000 * 1001


def test_the_protocol_name_is_negotiated(tls_proxy: Proxy, certificates: Certificates) -> None:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.set_alpn_protocols(["postgresql"])
    with raw(tls_proxy, SSLRequest().serialize()) as connection:
        assert connection.recv(1) == b"S"
        with context.wrap_socket(connection, server_hostname="localhost") as encrypted:
            assert encrypted.selected_alpn_protocol() == "postgresql"


def test_the_standard_loop_has_tls_too(server: Server, certificates: Certificates) -> None:
    """Without uvloop: asyncio's own start_tls, both ways."""
    port = free_port()
    program = (
        "import sys; sys.modules['uvloop'] = None\n"
        "from proxy.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    upstream = f"host={server.host} port={server.port}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", program, "serve", "--listen", f"127.0.0.1:{port}"),
            *("--upstream", upstream, *tls_options(certificates, "require")),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "listening" in line:
                break
        for negotiation in ("postgres", "direct"):
            with psycopg.connect(
                f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=require"
                f" sslnegotiation={negotiation} connect_timeout=10"
            ) as conn:
                assert conn.execute("SELECT length(repeat('x', 3000000))").fetchone() == (3000000,)
                text = "x" * 3_000_000
                assert conn.execute("SELECT %s", [text]).fetchone() == (text,)
    finally:
        process.terminate()
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    assert "Traceback" not in log, log
    assert "Exception" not in log, log


# What is demanded


def test_required_tls_is_demanded(
    server: Server, start_proxy: StartProxy, certificates: Certificates, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    proxy = start_proxy(*tls_options(certificates, "require"), "--listen", f"{tmp_path}:1")
    with proxy.connect(sslmode="prefer") as conn:
        assert is_tls(conn)
    with pytest.raises(psycopg.OperationalError, match="FATAL:  SSL required") as caught:
        proxy.connect(sslmode="disable")
    assert "client_tls_sslmode = require" in str(caught.value)
    # A Unix socket has no TLS and needs none; a cancel request may come without, as with libpq.
    with psycopg.connect(f"host={tmp_path} port=1 user=postgres dbname=postgres") as conn:
        assert not is_tls(conn)


def test_a_client_certificate_is_demanded(
    start_proxy: StartProxy, certificates: Certificates
) -> None:
    proxy = start_proxy(*tls_options(certificates, "verify-full"))
    alice: dict[str, Any] = {"sslcert": certificates.alice.cert, "sslkey": certificates.alice.key}
    with proxy.connect(sslmode="require", **alice) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    stranger: dict[str, Any] = {
        "sslcert": certificates.stranger.cert,
        "sslkey": certificates.stranger.key,
    }
    for wrong in ({"sslcertmode": "disable"}, stranger):
        with pytest.raises(psycopg.OperationalError):
            proxy.connect(sslmode="require", **wrong)


def test_without_tls_a_request_for_it_is_declined(proxy: Proxy) -> None:
    with raw(proxy) as connection:
        for request in (GSSENCRequest(), SSLRequest()):
            connection.sendall(request.serialize())
            assert connection.recv(1) == b"N"
        connection.sendall(STARTUP.serialize())
        assert connection.recv(1) == b"R"
    with pytest.raises(psycopg.OperationalError, match="does not support SSL"):
        proxy.connect(sslmode="require")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client_tls_cert_file": "ca"}, "client_tls_cert_file and client_tls_key_file: "),
        ({"client_tls_key_file": "nothing"}, "client_tls_cert_file and client_tls_key_file: "),
        ({"client_tls_ca_file": "nothing"}, "has no certificate in PEM format"),
    ],
)
def test_a_file_that_cannot_be_used_is_said(
    certificates: Certificates, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.touch(mode=0o600)
    nothing.write_text("nothing\n")
    files = {"ca": certificates.ca, "nothing": nothing}
    changed = [
        text
        for name, file in options.items()
        for text in (f"--{name.replace('_', '-')}", str(files[file]))
    ]
    done = run_program(
        *("serve", "--listen", "127.0.0.1:0"),
        *(*tls_options(certificates, "verify-ca"), *changed),
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Before the handshake


def test_bytes_behind_the_request_are_refused(tls_proxy: Proxy, certificates: Certificates) -> None:
    """Somebody in between could have put them there (CVE-2021-23214)."""
    context = ssl.create_default_context(cafile=str(certificates.ca))
    with raw(tls_proxy, SSLRequest().serialize() + STARTUP.serialize()) as connection:
        assert connection.recv(1) == b"S"
        with context.wrap_socket(connection, server_hostname="localhost") as encrypted:
            error = error_in(encrypted.recv(1000))
    assert (error.severity, error.sqlstate) == ("FATAL", "08P01")
    assert error.message == b"received unencrypted data after SSL request"


def test_plain_bytes_in_place_of_the_handshake_are_not_taken(tls_proxy: Proxy) -> None:
    with raw(tls_proxy, SSLRequest().serialize()) as connection:
        assert connection.recv(1) == b"S"
        connection.sendall(STARTUP.serialize())
        received = rest(connection)  # a TLS alert at most
    assert not received.startswith((b"R", b"E"))


@pytest.mark.parametrize("alpn", [None, ["http/1.1"]])
def test_direct_tls_without_the_protocols_name_is_hung_up_on(
    tls_proxy: Proxy, certificates: Certificates, alpn: list[str] | None
) -> None:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    if alpn:
        context.set_alpn_protocols(alpn)
    with (
        raw(tls_proxy) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as encrypted,
    ):
        encrypted.sendall(STARTUP.serialize())
        assert encrypted.recv(1000) == b""
    tls_proxy.wait_for_log("without ALPN protocol negotiation extension")


def test_direct_tls_is_not_negotiated_again(tls_proxy: Proxy, certificates: Certificates) -> None:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.set_alpn_protocols(["postgresql"])
    with (
        raw(tls_proxy) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as encrypted,
    ):
        encrypted.sendall(SSLRequest().serialize())
        error = error_in(encrypted.recv(1000))
    assert error.message.startswith(b"unsupported frontend protocol 1234.5679: server supports 3.0")


def test_old_tls_is_refused(tls_proxy: Proxy) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.minimum_version = ssl.TLSVersion.TLSv1
    with raw(tls_proxy, SSLRequest().serialize()) as connection:
        assert connection.recv(1) == b"S"
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            context.wrap_socket(connection)


# Those who say nothing, or too little


def test_a_login_that_stalls_is_ended(
    server: Server, start_proxy: StartProxy, certificates: Certificates
) -> None:
    server.set_hba(["host all all 127.0.0.1/32 scram-sha-256"])
    try:
        proxy = start_proxy(*tls_options(certificates, "prefer"), "--client-login-timeout", "500ms")
        beginnings = {
            "nothing": [],
            "half a length": [b"\0\0"],
            "half a packet": [STARTUP.serialize()[:-3]],
            "a request for TLS": [SSLRequest().serialize()],
            "half a handshake": [SSLRequest().serialize(), b""],
            "half of direct TLS": [HANDSHAKE[:7]],
        }
        for name, sent in beginnings.items():
            with raw(proxy, *sent) as connection:
                if name == "half a handshake":
                    assert connection.recv(1) == b"S"
                    connection.sendall(HANDSHAKE[:7])
                assert rest(connection) in (b"", b"S"), name
        # Who has said who it is, gets a word.
        startup = StartupMessage({b"user": b"pw_scram", b"database": b"postgres"})
        with raw(proxy, startup.serialize()) as connection:
            request, error = MessageBuffer(rest(connection))
        assert request[0] == m.AuthenticationOk.type
        response = m.ErrorResponse.parse(error[1])
        assert (response.severity, response.sqlstate) == ("FATAL", "57014")
        assert response.message == b"canceling authentication due to timeout"
    finally:
        server.set_hba(None)


def test_a_login_that_dribbles_is_ended(start_proxy: StartProxy) -> None:
    """A byte now and then does not start the time anew."""
    proxy = start_proxy("--client-login-timeout", "700ms")
    with raw(proxy) as connection:
        connection.settimeout(0.1)
        sent = 0
        for byte in STARTUP.serialize():
            try:
                connection.sendall(bytes([byte]))
                sent += 1
                assert connection.recv(1) == b""
                break
            except TimeoutError:
                pass
            except (ConnectionResetError, BrokenPipeError):
                break
        assert sent < len(STARTUP.serialize())


def test_after_the_login_the_time_is_gone(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--client-login-timeout", "300ms")
    with proxy.connect() as conn:
        assert conn.execute("SELECT pg_sleep(0.6)").fetchone() == ("",)
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_a_client_that_goes_away_leaves_nothing(tls_proxy: Proxy, server: Server) -> None:
    for sent in ([], [SSLRequest().serialize()], [HANDSHAKE[:7]], [HANDSHAKE]):
        with raw(tls_proxy, *sent):
            pass
    with tls_proxy.connect(sslmode="require") as conn:
        conn.execute("SELECT 1")
    assert server.wait_for_no_clients() == []


def test_keepalives_of_clients(start_proxy: StartProxy) -> None:
    options = ("--tcp-keepidle", "77", "--tcp-keepintvl", "7", "--tcp-keepcnt", "4")
    proxy = start_proxy(*options, "--tcp-user-timeout", "9000")
    with proxy.connect(sslmode="disable") as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    # What a listening socket has, those have that it accepts.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        Keepalive(idle=77, interval=7, count=4, user_timeout=9000).apply(listening)
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            got = [
                accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                if hasattr(socket, name)
            ]
    assert got == [77, 7, 4, 9000][: len(got)]


async def test_many_clients_by_tls(tls_proxy: Proxy) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["postgresql"])

    async def one(number: int) -> int:
        conn = await asyncpg.connect(
            host="127.0.0.1",
            port=tls_proxy.port,
            user="postgres",
            database="postgres",
            ssl=context,
            direct_tls=bool(number % 2),
            timeout=60,
        )
        value: int = await conn.fetchval("SELECT $1::int", number)
        await conn.close()
        return value

    assert await asyncio.gather(*map(one, range(60))) == list(range(60))
