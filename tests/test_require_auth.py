"""A false server gets no password, and cannot use up memory.

The false servers are on this machine; ``127.1`` is a name of it that does not look local, and
stands for a host on a network.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from proxy.config import parse_upstream
from tests.conftest import StartProxy
from tests.support.listening import listening
from tests.support.servers import PASSWORDS, Server
from tests.test_login import auth_file, job_role, upstream

SECRET = "S3CRETPW"

OFFER = 10, b"SCRAM-SHA-256\0\0"

FalseServer = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def false_server() -> Iterator[tuple[FalseServer, list[bytes]]]:
    """Starts a server without TLS that a function speaks for, once the startup packet has come; and
    what clients have said to it after that."""
    heard: list[bytes] = []
    with contextlib.ExitStack() as stop:

        def start(speak: Callable[[socket.socket], None]) -> int:
            def serve(connection: socket.socket) -> None:
                if len(connection.recv(1000)) == 8:
                    connection.sendall(b"N")
                    connection.recv(1000)
                speak(connection)
                while data := connection.recv(1000):
                    heard.append(data)

            return stop.enter_context(listening(serve))

        yield start, heard


def request(kind: int, data: bytes = b"") -> bytes:
    return b"R" + struct.pack("!ii", 8 + len(data), kind) + data


def asks(*requests: tuple[int, bytes]) -> Callable[[socket.socket], None]:
    """Sends each after what came for the one before; NONCE is the client's in it."""

    def speak(connection: socket.socket) -> None:
        nonce = b""
        for kind, data in requests:
            connection.sendall(request(kind, data.replace(b"NONCE", nonce)))
            if (kind, data) != requests[-1]:
                found = re.search(rb"r=([^,]*)", connection.recv(1000))
                nonce = found[1] if found else b""

    return speak


def looks_around(start_proxy: StartProxy, tmp_path: Path, conninfo: str) -> str:
    """A proxy that logs in as auth_user to see which server is which; why it could not."""
    with pytest.raises(TimeoutError, match="cannot reach the server") as caught:
        start_proxy(
            *("--auth-user", "lookup", "--auth-file", auth_file(tmp_path, lookup=SECRET)),
            *("--server-required", "on"),
            upstream=f"{conninfo} target_session_attrs=primary connect_timeout=2",
        )
    return str(caught.value)


def test_a_false_server_gets_no_password_of_ours_in_clear(
    start_proxy: StartProxy,
    tmp_path: Path,
    false_server: tuple[FalseServer, list[bytes]],
) -> None:
    start, heard = false_server
    port = start(asks((3, b"")))
    for given in ("", "sslmode=disable", "require_auth=scram-sha-256", "require_auth=!password"):
        looks_around(start_proxy, tmp_path, f"host=127.1 port={port} {given}")
    assert SECRET.encode() not in b"".join(heard)
    # As libpq does, if it is told to.
    looks_around(start_proxy, tmp_path, f"host=127.1 port={port} require_auth=password")
    assert SECRET.encode() in b"".join(heard)


def test_a_false_server_does_not_choose_how_fast_it_may_guess(
    start_proxy: StartProxy,
    tmp_path: Path,
    false_server: tuple[FalseServer, list[bytes]],
) -> None:
    """SCRAM with one iteration: an answer would be a hash of the password, all but bare."""
    start, heard = false_server
    salt = b64encode(b"salt")
    for iterations in (1, 2, 4095):
        port = start(
            asks(
                OFFER,
                (11, b"r=NONCEx,s=%b,i=%d" % (salt, iterations)),
            )
        )
        looks_around(start_proxy, tmp_path, f"host=127.1 port={port}")
    assert b"p=" not in b"".join(heard)
    port = start(asks(OFFER, (11, b"r=NONCEx,s=%b,i=4096" % salt)))
    looks_around(start_proxy, tmp_path, f"host=127.1 port={port}")
    assert b"p=" in b"".join(heard)
    # scram_iterations of PostgreSQL 16 may be small; libpq takes it, and so do we on this machine.
    heard.clear()
    port = start(asks(OFFER, (11, b"r=NONCEx,s=%b,i=1" % salt)))
    looks_around(start_proxy, tmp_path, f"host=127.0.0.1 port={port}")
    assert b"p=" in b"".join(heard)


@pytest.mark.parametrize(
    ("given", "warns"),
    [
        ("host=127.1", True),
        ("host=127.1 sslmode=disable", True),
        ("host=127.1 require_auth=scram-sha-256", False),
        ("host=127.1 require_auth=scram-sha-256,none", True),
        ("host=127.0.0.1", False),
        ("host=localhost", False),
        ("host=127.1 hostaddr=127.0.0.1", False),
    ],
)
def test_secrets_for_an_unverified_server_are_warned_of(
    server: Server, start_proxy: StartProxy, tmp_path: Path, given: str, *, warns: bool
) -> None:
    proxy = start_proxy(
        *("--auth-file", auth_file(tmp_path, a="b")), upstream=f"{given} port={server.port}"
    )
    assert ("nothing proves that 127.1" in proxy.log) == warns


FLOODS = {
    "R": b"R\x7f\xff\xff\xff\0\0\0\x0a" + b"x" * 100_000,
    "an R of 2001": request(10, b"x" * (2001 - 8)),
    **{
        kind: kind.encode() + struct.pack("!i", 0x7FFFFFFF) + b"x" * 100_000
        for kind in "ESNKZvTDCp"
    },
    "an E of 30001": b"E" + struct.pack("!i", 30_001) + b"x" * 29_997,
    "many N": b"N\0\0\x40\0" + b"x" * (0x4000 - 4),
    "many S": request(0) + b"S\0\0\x40\0" + b"x" * (0x4000 - 4),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_what_a_server_says_before_the_login_is_done_is_short(
    start_proxy: StartProxy,
    tmp_path: Path,
    false_server: tuple[FalseServer, list[bytes]],
    kind: str,
) -> None:
    """The connection is given up before it has swallowed ten megabytes."""
    start, _ = false_server
    swallowed: list[int] = []

    def flood(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sent = 0
        try:
            if kind == "an E of 30001":
                connection.sendall(FLOODS[kind])
                assert connection.recv(1) == b""
            first = True
            while sent < 50_000_000:
                chunk = FLOODS[kind] if first or kind.startswith("many") else b"x" * 65536
                connection.sendall(chunk.removeprefix(b"" if first else request(0)))
                sent += len(chunk)
                first = False
        except OSError:
            pass
        swallowed.append(sent)

    port = start(flood)
    looks_around(start_proxy, tmp_path, f"host=127.0.0.1 port={port}")
    proxy = start_proxy(upstream=f"host=127.0.0.1 port={port}")
    if kind != "many S":  # after AuthenticationOk it is for the client
        with pytest.raises(psycopg.OperationalError):
            proxy.connect(connect_timeout=10)
    assert max(swallowed, default=0) < 10_000_000


# libpq is what it is measured by

VALUES = [
    *("password", "md5", "scram-sha-256", "none", "gss", "sspi"),
    *("!password", "!md5", "!scram-sha-256", "!none", "!gss"),
    *("password,md5", "md5,scram-sha-256", "scram-sha-256,none", "!password,!md5", "!none,!md5"),
    *("password,md5,gss,sspi,scram-sha-256,none", "!gss,!sspi,!scram-sha-256,!none"),
]


@pytest.mark.parametrize("value", VALUES)
def test_logins_are_judged_as_libpq_judges_them(
    server: Server, start_proxy: StartProxy, value: str
) -> None:
    """Those that pass through, and with them the jobs' own."""
    proxy = start_proxy(upstream=upstream(server, require_auth=value))
    for role in (*PASSWORDS, "postgres"):
        login: dict[str, Any] = {"user": role, "password": PASSWORDS.get(role, "")}
        try:
            server.connect(**login, require_auth=value).close()
        except psycopg.OperationalError:
            with pytest.raises(psycopg.OperationalError, match="method is not allowed"):
                proxy.connect(**login)
        else:
            with proxy.connect(**login) as conn:
                assert conn.execute("SELECT current_user").fetchone() == (role,)


def test_jobs_are_judged_too(server: Server, start_proxy: StartProxy, tmp_path: Path) -> None:
    """pg_hba.conf changes under a session: the job's login is another than the client's."""
    proxy = start_proxy(
        *("--auth-file", auth_file(tmp_path, postgres="x"), "--spares", "0"),
        upstream=upstream(server, require_auth="scram-sha-256,none"),
    )
    try:
        with proxy.connect() as conn:
            assert job_role(conn) == "postgres"
            server.set_hba(["local all all trust", "host all all 127.0.0.1/32 password"])
            with pytest.raises(psycopg.Error) as caught:
                job_role(conn)
    finally:
        server.set_hba(None)
    assert "require_auth allows scram-sha-256, none" in str(caught.value.diag.message_detail)


def test_a_job_sends_no_password_of_ours_to_a_host_that_nothing_proves(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = auth_file(tmp_path, postgres="x", alice="x", pw_plain=PASSWORDS["pw_plain"])
    upstreams = {
        "host=127.1": False,
        "host=127.1 require_auth=password,none": True,
        "host=127.0.0.1": True,
    }
    for given, allowed in upstreams.items():
        proxy = start_proxy(
            *("--auth-file", file, "--spares", "0"), upstream=f"{given} port={server.port}"
        )
        server.set_hba(["local all all trust", "host all all 127.0.0.1/32 trust"])
        try:
            with proxy.connect(user="postgres") as conn:
                server.set_hba(["local all all trust", "host all all 127.0.0.1/32 password"])
                with pytest.raises(psycopg.Error) as caught:
                    job_role(conn)
        finally:
            server.set_hba(None)
        # The password is wrong: a server that has got it says so.
        detail = str(caught.value.diag.message_detail)
        assert ("password authentication failed" in detail) == allowed, detail
        if not allowed:
            assert "sslmode=prefer verifies nothing" in detail
            assert "require_auth=password" in str(caught.value.diag.message_hint)
        # What the client has sent itself goes the client's way.
        with proxy.connect(user="pw_plain", password=PASSWORDS["pw_plain"]) as conn:
            assert conn.execute("SELECT current_user").fetchone() == ("pw_plain",)


@pytest.mark.parametrize(
    "value",
    [
        *VALUES,
        *("", "x", "password,!md5", "!password,md5", "md5,md5", "!md5,!md5", "password,", ",md5"),
        *("password md5", "PASSWORD", "!", "!!md5", "none,none", "scram-sha-256-plus", "creds"),
    ],
)
def test_the_word_is_read_as_libpq_reads_it(value: str) -> None:
    try:
        # Nothing listens at this port: the error tells whether the setting was read.
        psycopg.connect(make_conninfo("host=127.0.0.1 port=1", require_auth=value))
    except psycopg.OperationalError as error:
        fine = "require_auth" not in str(error)
    text = make_conninfo("host=a", require_auth=value)
    if fine:
        parse_upstream(text)
    else:
        with pytest.raises(ValueError, match="require_auth"):
            parse_upstream(text)
