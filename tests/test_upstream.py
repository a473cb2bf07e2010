"""The way to the server: TLS in all its modes, several hosts, Unix sockets, cancel requests.

Invariant: what a mode means is libpq's to say. The server in these tests is PostgreSQL where it was
built with TLS, else another proxy in front of one, which has TLS in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from protocol.messages import Query
from protocol.startup import StartupMessage
from proxy.auth.credentials import CredentialStore
from proxy.backends.upstream import Dialer, HostState
from proxy.config import Host, load
from proxy.config.keepalive import Keepalive
from proxy.demo.embedded import free_port
from tests.conftest import StartProxy
from tests.support.background import wait_until
from tests.support.certificates import Certificates
from tests.support.listening import listening
from tests.support.servers import Proxy, Server, clean_environment, psql, run_program
from tests.support.wire import Wire, error_of
from tests.test_tls import raw, rest, tls_options

JOB = "SELECT * FROM pg_background_result(pg_background_launch('SELECT 42')) AS (n int)"


@pytest.fixture(scope="module")
def front(server: Server, certificates: Certificates) -> Iterator[Proxy]:
    """A server that demands TLS: a proxy before PostgreSQL."""
    upstream = f"host={server.host} port={server.port}"
    with Proxy(upstream, *tls_options(certificates, "require")) as proxy:
        yield proxy


def refused(upstream: str, *options: str) -> str:
    """The one line of a proxy that does not start."""
    done = run_program(
        *("serve", "--listen", "127.0.0.1:0"),
        *("--upstream", upstream, "--server-required", "on", *options),
    )
    assert done.returncode in (1, 2), done.stderr
    (line,) = done.stderr.splitlines()
    return line


# TLS


@pytest.mark.parametrize(
    "params",
    [
        "sslmode=prefer",
        "sslmode=require",
        "sslmode=require sslrootcert={ca}",
        "sslmode=verify-ca sslrootcert={ca} hostaddr=127.0.0.1 host=elsewhere.invalid",
        "sslmode=verify-full sslrootcert={ca}",
        "sslmode=verify-full sslrootcert={ca} hostaddr=127.0.0.1 host=localhost",
        "sslmode=require sslnegotiation=direct",
        "sslmode=verify-full sslrootcert={ca} sslnegotiation=direct",
    ],
)
def test_the_server_is_reached_by_tls(
    front: Proxy, start_proxy: StartProxy, certificates: Certificates, params: str
) -> None:
    params = params.format(ca=certificates.ca)
    host = "" if "host=" in params else f"host={front.host}"
    proxy = start_proxy(upstream=f"{host} port={front.port} {params}")
    proxy.wait_for_log(r"passing on to .* \(TLS\)")
    with proxy.connect() as conn:
        assert conn.execute(JOB).fetchone() == (42,)
        text = "x" * 1_000_000
        assert conn.execute("SELECT %s::text", [text]).fetchone() == (text,)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("sslmode=verify-ca sslrootcert={stranger}", "certificate verify failed"),
        ("sslmode=require sslrootcert={stranger}", "certificate verify failed"),
        ("sslmode=verify-full sslrootcert={ca} hostaddr=127.0.0.1 host=db.example", "db.example"),
        ("sslmode=verify-ca sslrootcert=/no/such/file", "sslrootcert: cannot read /no/such/file"),
        ("sslmode=require sslcert=/no/such/file", "sslcert: cannot read /no/such/file"),
    ],
)
def test_a_server_that_is_not_who_it_should_be(
    front: Proxy, certificates: Certificates, params: str, message: str
) -> None:
    params = params.format(ca=certificates.ca, stranger=certificates.stranger.cert)
    host = "" if "host=" in params else f"host={front.host}"
    assert message in refused(f"{host} port={front.port} {params}")


def test_a_server_without_tls(server: Server, start_proxy: StartProxy) -> None:
    """The embedded one has none; Debian's has it turned off in these tests."""
    for mode in ("disable", "allow", "prefer"):
        proxy = start_proxy(upstream=f"host={server.host} port={server.port} sslmode={mode}")
        with proxy.connect() as conn:
            assert conn.execute(JOB).fetchone() == (42,)
    for params in ("sslmode=require", "sslmode=require sslnegotiation=direct"):
        line = refused(f"host={server.host} port={server.port} {params}")
        assert "cannot reach the server" in line
    assert "does not support SSL" in refused(
        f"host={server.host} port={server.port} sslmode=require"
    )


@pytest.mark.parametrize(
    ("mode", "hba", "encrypted"),
    [
        ("prefer", "hostnossl", False),
        ("prefer", "hostssl", True),
        ("allow", "hostssl", True),
        ("allow", "hostnossl", False),
    ],
)
def test_a_second_try_where_pg_hba_demands_it(
    tls_server: Server, start_proxy: StartProxy, mode: str, hba: str, encrypted: bool
) -> None:
    tls_server.set_hba(["local all all trust", f"{hba} all all 127.0.0.1/32 trust"])
    try:
        upstream = f"host={tls_server.host} port={tls_server.port} sslmode={mode}"
        proxy = start_proxy(upstream=upstream)
        sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        with proxy.connect() as conn:
            assert conn.execute(sql).fetchone() == (encrypted,)
            # A job, too, and so does a cancel request, which goes by the same route.
            assert conn.execute(JOB).fetchone() == (42,)
            _cancel_works(conn)
        with pytest.raises(psycopg.OperationalError, match='role "none" does not exist'):
            proxy.connect(user="none")
        strict = start_proxy(upstream=upstream.replace(mode, "disable" if encrypted else "require"))
        with pytest.raises(psycopg.OperationalError, match="no pg_hba.conf entry"):
            strict.connect()
    finally:
        tls_server.set_hba(None)


def test_a_cancel_request_of_an_unknown_session_goes_to_every_host(
    server: Server, start_proxy: StartProxy
) -> None:
    """It may be another proxy's, or that of a process that has handed over."""
    hosts = f"host=127.0.0.1,{server.host} port={free_port()},{server.port}"
    own, other = start_proxy(upstream=hosts), start_proxy(upstream=hosts)
    active = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    with (
        Wire((own.host, own.port)) as session,
        Wire((other.host, other.port)) as wire,
        server.connect() as observer,
    ):
        session.send_query("SELECT pg_sleep(60)")
        wait_until(lambda: observer.execute(active, [session.key.pid]).fetchone() == (1,))
        wire.request_cancel(session.key)
        assert error_of(session.until_ready()).sqlstate == "57014"
    assert "could not pass on a cancel request" not in other.log


def _cancel_works(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    """A cancel request reaches the backend that it is for."""
    canceller = threading.Timer(0.2, conn.cancel_safe, kwargs={"timeout": 10})
    canceller.start()
    with pytest.raises(psycopg.errors.QueryCanceled):
        conn.execute("SELECT pg_sleep(20)")
    canceller.join(10)


def test_cancel_requests_go_by_tls(front: Proxy, start_proxy: StartProxy) -> None:
    """Neither end of the way takes them in plain text: libpq sends them as it has connected."""
    proxy = start_proxy(upstream=f"host={front.host} port={front.port} sslmode=require")
    with proxy.connect() as conn:
        _cancel_works(conn)


def test_a_client_that_sends_no_more_gets_its_answers(
    front: Proxy, start_proxy: StartProxy
) -> None:
    """TLS cannot be half closed: the server is told in the words of the protocol."""
    proxy = start_proxy(upstream=f"host={front.host} port={front.port} sslmode=require")
    startup = StartupMessage({b"user": b"postgres", b"database": b"postgres"})
    query = Query(b"SELECT 'answer' FROM pg_sleep(0.2)").serialize()
    for cut in (len(query), len(query) - 3):
        with raw(proxy, startup.serialize(), query[:cut]) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert (b"answer" in rest(connection)) == (cut == len(query))


class Impostor:
    """Somebody in the place of the server, with an answer to SSLRequest."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(20)
        self.port = self._listening.getsockname()[1]
        self.received = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listening.accept()
            with connection:
                connection.settimeout(20)
                connection.recv(8)
                connection.sendall(self._answer)
                while data := connection.recv(1000):
                    self.received += data

    def close(self) -> None:
        self._listening.close()
        self._thread.join(20)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SR\0\0\0\x08\0\0\0\0", "received unencrypted data after SSL response"),
        (b"E\0\0\0\x08", "received invalid response to SSL negotiation"),
        (b"X", "received invalid response to SSL negotiation"),
        (b"N", "server does not support SSL, but SSL was required"),
    ],
)
def test_nothing_is_sent_to_a_server_that_answers_wrong(answer: bytes, message: str) -> None:
    """Bytes before the handshake could be somebody's in between (CVE-2021-23222)."""
    impostor = Impostor(answer)
    assert message in refused(f"host=127.0.0.1 port={impostor.port} sslmode=require")
    impostor.close()
    assert impostor.received == b""


# Hosts


def test_the_next_host_is_tried(server: Server, start_proxy: StartProxy) -> None:
    dead = free_port()
    proxy = start_proxy(
        upstream=f"host=127.0.0.1,no-such-host.invalid,{server.socket_dir},127.0.0.1"
        f" port={dead},1,{server.port},{server.port}"
    )
    with proxy.connect() as conn:
        assert conn.execute("SELECT inet_server_addr()").fetchone() == (None,)
        assert conn.execute(JOB).fetchone() == (42,)
        _cancel_works(conn)


def test_a_host_that_does_not_answer_has_its_time(server: Server, start_proxy: StartProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        proxy = start_proxy(
            upstream=f"host=127.0.0.1,127.0.0.1 port={port},{server.port} connect_timeout=1"
        )
        with proxy.connect() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)


def test_all_reasons_are_told(server: Server, start_proxy: StartProxy) -> None:
    line = refused(f"host=127.0.0.1,{server.socket_dir} port=1,2")
    assert "127.0.0.1:1: " in line
    assert f"{server.socket_dir}:2: " in line


@pytest.mark.parametrize(
    ("attrs", "primary", "standby", "reads_only"),
    [
        ("any", True, True, True),
        ("read-write", True, False, False),
        ("read-only", False, True, True),
        ("primary", True, False, True),
        ("standby", False, True, False),
    ],
)
def test_what_target_session_attrs_mean(
    attrs: str, primary: bool, standby: bool, reads_only: bool
) -> None:
    assert HostState(in_recovery=False, read_only=False).has(attrs) is primary
    assert HostState(in_recovery=True, read_only=True).has(attrs) is standby
    assert HostState(in_recovery=False, read_only=True).has(attrs) is reads_only


def test_the_host_with_the_attributes_is_found(server: Server, start_proxy: StartProxy) -> None:
    """Two servers, one of which reads only; then they change their parts."""
    other = Server(server.bin)
    try:
        with other.connect() as conn:
            conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        other.cluster.reload()
        upstream = f"host=127.0.0.1,127.0.0.1 port={other.port},{server.port}"
        port = "SELECT inet_server_port()"
        for attrs, expected in (
            ("read-write", server.port),
            ("primary", other.port),
            ("read-only", other.port),
            ("prefer-standby", other.port),
        ):
            proxy = start_proxy(
                *("--auth-user", "alice"), upstream=f"{upstream} target_session_attrs={attrs}"
            )
            with proxy.connect() as conn:
                assert conn.execute(port).fetchone() == (expected,), attrs
        line = refused(f"{upstream} target_session_attrs=standby", "--auth-user", "alice")
        assert f"127.0.0.1:{other.port}: session is not standby" in line
        line = refused(f"{upstream} target_session_attrs=primary", "--auth-user", "pw_scram")
        assert 'no password for role "pw_scram", which is the auth_user' in line or (
            "asks for SCRAM-SHA-256" in line
        )
        # What was found is forgotten after a while.
        proxy = start_proxy(
            *("--auth-user", "alice"), upstream=f"{upstream} target_session_attrs=read-only"
        )
        with other.connect() as conn:
            conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
        other.cluster.reload()

        def is_noticed() -> bool:
            try:
                proxy.connect().close()
            except psycopg.OperationalError as error:
                return "session is not read-only" in str(error)
            return False

        wait_until(is_noticed, 15.0)
    finally:
        other.close()


def test_a_host_that_is_starting_up_is_passed_over(
    server: Server, start_proxy: StartProxy, fake_server: Callable[[bytes], int]
) -> None:
    """57P03 before the login: as libpq does, the next one."""
    starting = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
    port = fake_server(b"E" + (len(starting) + 4).to_bytes(4, "big") + starting)
    upstream = f"host=127.0.0.1,127.0.0.1 sslmode=disable port={port},"
    proxy = start_proxy(upstream=f"{upstream}{server.port}")
    with proxy.connect() as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    alone = start_proxy(upstream=f"host=127.0.0.1 sslmode=disable port={port}")
    with pytest.raises(psycopg.OperationalError, match="the database system is starting up"):
        alone.connect()


@pytest.fixture
def fake_server() -> Iterator[Callable[[bytes], int]]:
    """Starts a server that answers every startup packet with the same bytes; its port."""
    with contextlib.ExitStack() as stop:

        def start(answer: bytes) -> int:
            def serve(connection: socket.socket) -> None:
                connection.sendall(b"N" if len(connection.recv(1000)) == 8 else answer)

            return stop.enter_context(listening(serve))

        yield start


# Sockets


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6_on_both_sides(server: Server, start_proxy: StartProxy) -> None:
    front = start_proxy("--listen", "[::1]:0")
    port = front.wait_for_log(r"listening on \[::1\]:(\d+)")[1]
    proxy = start_proxy("--listen", "[::1]:0", upstream=f"postgresql://[::1]:{port}/")
    port = proxy.wait_for_log(r"listening on \[::1\]:(\d+)")[1]
    done = psql(int(port), "-Atc", JOB, host="::1")
    assert (done.stdout, done.stderr) == ("42\n", "")


def test_unix_sockets_on_both_sides(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    proxy = start_proxy(
        *("--listen", f"{tmp_path}:7"),
        upstream=f"host={server.socket_dir} port={server.port} sslmode=require",
    )
    assert proxy.running  # sslmode is of no concern to a Unix socket, as in libpq
    done = psql(7, "-Atc", JOB, host=str(tmp_path), sslmode="prefer")
    assert (done.stdout, done.stderr) == ("42\n", "")


def test_keepalives_to_the_server(server: Server) -> None:
    config = load(
        {
            "upstream": f"host={server.host} port={server.port} keepalives_idle=33"
            " keepalives_interval=5 keepalives_count=3 tcp_user_timeout=7000"
        }
    )
    assert config.upstream.keepalive == Keepalive(True, 33, 5, 3, 7000)

    async def options() -> list[int]:
        dialer = Dialer(config, CredentialStore(None, None))
        route, protocol = await dialer.connect(_Kept)
        assert route.host == Host(server.host, server.port)
        sock = protocol.transport.get_extra_info("socket")
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        found = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
        protocol.transport.close()
        return found

    if sys.platform == "linux":
        assert asyncio.run(options()) == [33, 5, 3, 7000]


class _Kept(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport


# The protocol


def test_protocol_3_2_and_its_long_cancel_keys(server: Server, start_proxy: StartProxy) -> None:
    if psycopg.pq.version() < 180000:
        pytest.skip("this libpq does not speak protocol 3.2")
    proxy = start_proxy()
    with proxy.connect(max_protocol_version="latest") as conn:
        version = conn.pgconn.full_protocol_version
        assert version == (30002 if server.version >= 180000 else 30000)
        _cancel_works(conn)
        assert conn.execute(JOB).fetchone() == (42,)


def test_replication_goes_through_as_it_is(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    for replication in ("true", "database"):
        done = psql(proxy.port, "-Atc", "IDENTIFY_SYSTEM", replication=replication)
        assert done.stderr == ""
        assert done.stdout.count("|") == 3
    # Our settings are for sessions alone; and nothing is served there.
    done = psql(proxy.port, "-Atc", "SHOW pg_background.max_workers", replication="database")
    assert "unrecognized configuration parameter" in done.stderr
    done = psql(proxy.port, "-Atc", JOB, replication="database")
    assert "does not exist" in done.stderr


def test_wal_is_streamed(server: Server, start_proxy: StartProxy, tmp_path: Path) -> None:
    """CopyBoth, by the server's own client."""
    proxy = start_proxy()
    with server.connect() as conn:
        conn.execute("SELECT pg_switch_wal()")
        # There is WAL behind the end asked for, so there is no wait for the server to write some.
        row = conn.execute("SELECT pg_logical_emit_message(false, 'test', 'here')").fetchone()
        conn.execute("SELECT pg_logical_emit_message(false, 'test', 'and beyond')")
        conn.execute("CHECKPOINT")
    assert row is not None
    target = tmp_path / "wal"
    target.mkdir()
    done = subprocess.run(
        [
            *(server.bin / "pg_receivewal", "-h", proxy.host, "-p", str(proxy.port)),
            *("-U", "postgres", "-D", str(target), "--endpos", row[0], "--no-loop"),
        ],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(target.iterdir())
