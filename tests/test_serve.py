"""The process: how it starts and ends, where it listens, whom it lets in, what it never logs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import errors

from protocol.startup import GSSENCRequest, SSLRequest, StartupMessage
from proxy.demo.embedded import free_port
from tests.conftest import StartProxy
from tests.support.background import wait_until
from tests.support.executors import executors as may_launch
from tests.support.servers import PASSWORDS, Connection, Proxy, Server
from tests.support.wire import Monitor, Wire, gate, launch, value

FETCH: Final = "SELECT * FROM pg_background_result(%s) AS (n int)"


# SIGTERM


def begin_to_stop(proxy: Proxy) -> None:
    """The first signal."""
    os.kill(proxy.pid, signal.SIGTERM)
    proxy.wait_for_log("shutting down")


def assert_stopped_cleanly(proxy: Proxy, server: Server, db: str, monitor: Monitor) -> None:
    assert proxy.wait() == 0
    wait_until(lambda: not monitor.backends(db))


def assert_terminated(conn: Connection) -> None:
    with pytest.raises(errors.AdminShutdown) as caught:
        conn.execute("SELECT 1")
    assert caught.value.diag.severity == "FATAL"
    assert conn.closed


def test_idle_sessions_are_ended_after_the_shutdown_timeout(
    server: Server, start_proxy: StartProxy, db: str, monitor: Monitor
) -> None:
    proxy = start_proxy("--shutdown-timeout", "500ms")
    with proxy.connect(dbname=db) as one, proxy.connect(dbname=db) as other:
        begin_to_stop(proxy)
        assert_stopped_cleanly(proxy, server, db, monitor)
        assert_terminated(one)
        assert_terminated(other)


def test_sessions_go_on_and_nobody_new_comes_in_until_the_shutdown_timeout(
    server: Server, start_proxy: StartProxy, db: str, monitor: Monitor
) -> None:
    proxy = start_proxy("--shutdown-timeout", "60s")
    with proxy.connect(dbname=db) as conn:
        begin_to_stop(proxy)
        wait_until(lambda: refuses(proxy))
        row = conn.execute(FETCH, [launch(conn, "SELECT 5")]).fetchone()
        assert row == (5,)
    # The last one to leave.
    assert_stopped_cleanly(proxy, server, db, monitor)


def refuses(proxy: Proxy) -> bool:
    try:
        socket.create_connection((proxy.host, proxy.port), timeout=10).close()
    except ConnectionRefusedError:
        return True
    return False


def test_running_job_may_end_before_the_proxy_does(
    server: Server, start_proxy: StartProxy, db: str, monitor: Monitor
) -> None:
    proxy = start_proxy("--shutdown-timeout", "60s")
    with server.connect(dbname=db) as direct, gate(server, db) as closed:
        direct.execute("CREATE TABLE done ()")
        with proxy.connect(dbname=db) as conn:
            pid = launch(conn, closed.sql + "INSERT INTO done DEFAULT VALUES")
            monitor.wait_until_at_gate(pid)
        begin_to_stop(proxy)
        assert monitor.state(pid) == ("active", "advisory")
        assert proxy.running
        closed.open()
        assert proxy.wait() == 0
        assert value(direct, "SELECT count(*) FROM done") == 1


def test_running_job_is_cancelled_after_the_shutdown_timeout(
    server: Server, start_proxy: StartProxy, db: str, monitor: Monitor
) -> None:
    proxy = start_proxy("--shutdown-timeout", "300ms")
    with gate(server, db) as closed:
        with proxy.connect(dbname=db) as conn:
            pid = launch(conn, closed.sql)
            monitor.wait_until_at_gate(pid)
        begin_to_stop(proxy)
        assert proxy.wait() == 0
        monitor.wait_until_gone(pid)  # the gate is closed still


def test_waiting_client_is_ended_and_its_job_cancelled(
    server: Server,
    start_proxy: StartProxy,
    db: str,
    monitor: Monitor,
    background: Callable[..., Future[Any]],
) -> None:
    proxy = start_proxy("--shutdown-timeout", "300ms")
    with gate(server, db) as closed, proxy.connect(dbname=db) as conn:
        pid = launch(conn, closed.sql)
        waiting = background(conn.execute, FETCH, [pid])
        monitor.wait_until_fetching(conn.info.backend_pid)
        begin_to_stop(proxy)
        with pytest.raises(errors.AdminShutdown):
            waiting.result(30)
        assert proxy.wait() == 0
        monitor.wait_until_gone(pid)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_it_at_once(
    server: Server, start_proxy: StartProxy, db: str, monitor: Monitor, second: int
) -> None:
    proxy = start_proxy("--shutdown-timeout", "1h")
    with gate(server, db) as closed, proxy.connect(dbname=db) as conn:
        pid = launch(conn, closed.sql)
        monitor.wait_until_at_gate(pid)
        begin_to_stop(proxy)
        assert proxy.running
        assert proxy.stop(second) == 0
        assert_terminated(conn)
        monitor.wait_until_gone(pid)


def test_client_that_does_not_read_does_not_hold_up_the_end(
    server: Server, start_proxy: StartProxy, db: str, monitor: Monitor
) -> None:
    proxy = start_proxy("--shutdown-timeout", "300ms")
    wire = Wire((proxy.host, proxy.port), receive_buffer=16384, database=db)
    pid = wire.launch("SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
    wire.send_query(f"SELECT * FROM pg_background_result({pid}) AS (r text)")
    monitor.wait_until_full(pid)
    begin_to_stop(proxy)
    assert proxy.wait() == 0
    wire.reset()
    wait_until(lambda: not monitor.backends(db))


# Where it listens, and to whom it passes on


def test_malformed_auth_file_is_one_clear_line(tmp_path: Path, server: Server) -> None:
    (tmp_path / "users").touch(mode=0o600)
    (tmp_path / "users").write_text('"alice" no quotes\n')
    with pytest.raises(TimeoutError) as caught:
        Proxy(f"host={server.host} port={server.port}", "--auth-file", str(tmp_path / "users"))
    [line] = [line for line in str(caught.value).splitlines() if "error:" in line]
    assert str(tmp_path / "users") in line
    assert "Traceback" not in str(caught.value)


def test_it_listens_on_several_addresses(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    port = free_port()
    proxy = start_proxy("--listen", f"127.0.0.1:{port}", "--listen", f"{tmp_path}:7777")
    proxy.wait_for_log("listening on Unix socket")
    for where in ({}, {"port": port}, {"host": str(tmp_path), "port": 7777}):
        with proxy.connect(**where) as conn:
            assert conn.execute(FETCH, [launch(conn, "SELECT 5")]).fetchone() == (5,)


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_it_listens_on_ipv6(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy("--listen", "[::1]:0")
    port = int(proxy.wait_for_log(r"listening on \[::1\]:(\d+)")[1])
    with proxy.connect(host="::1", port=port) as conn:
        assert conn.execute(FETCH, [launch(conn, "SELECT 5")]).fetchone() == (5,)


def test_second_upstream_is_tried_if_the_first_is_down(
    server: Server,
    start_proxy: StartProxy,
    monitor: Monitor,
    background: Callable[..., Future[Any]],
) -> None:
    hosts = f"host={server.host},{server.host} port={free_port()},{server.port}"
    proxy = start_proxy(upstream=hosts)
    with gate(server) as closed, proxy.connect() as conn:
        assert conn.execute(FETCH, [launch(conn, "SELECT 5")]).fetchone() == (5,)
        waiting = background(conn.execute, closed.sql)
        monitor.wait_until_at_gate(conn.info.backend_pid)
        conn.cancel_safe(timeout=30)  # goes to the second one too
        with pytest.raises(errors.QueryCanceled):
            waiting.result(30)


def test_jobs_and_cancel_requests_over_a_unix_socket(
    server: Server,
    start_proxy: StartProxy,
    tmp_path: Path,
    monitor: Monitor,
    background: Callable[..., Future[Any]],
) -> None:
    proxy = start_proxy(
        "--listen", f"{tmp_path}:7777", upstream=f"host={server.socket_dir} port={server.port}"
    )
    proxy.wait_for_log("listening on Unix socket")
    with gate(server) as closed, proxy.connect(host=str(tmp_path), port=7777) as conn:
        assert conn.execute(FETCH, [launch(conn, "SELECT 5")]).fetchone() == (5,)
        waiting = background(conn.execute, FETCH, [launch(conn, closed.sql)])
        monitor.wait_until_fetching(conn.info.backend_pid)
        conn.cancel_safe(timeout=30)
        with pytest.raises(errors.QueryCanceled):
            waiting.result(30)


# Startup packets

STARTUP: Final = StartupMessage({b"user": b"postgres", b"database": b"postgres"}).serialize()


@pytest.fixture
def stranger(proxy: Proxy) -> Iterator[Wire]:
    """A connection on which nothing was said yet."""
    with Wire((proxy.host, proxy.port), login=False) as wire:
        yield wire


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\0",
        b"\0\0\0\x07\0\0\0",
        b"\0\0\x27\x19" + STARTUP[4:],
        b"\x7f\xff\xff\xff" + STARTUP[4:],
        b"\xff\xff\xff\xff" + STARTUP[4:],
    ],
)
def test_garbage_is_hung_up_on(stranger: Wire, proxy: Proxy, garbage: bytes) -> None:
    stranger.send(garbage)
    with pytest.raises((EOFError, ConnectionResetError)):
        stranger.message()
    with proxy.connect() as conn:
        assert value(conn, "SELECT 1") == 1


def test_startup_packet_may_come_byte_by_byte(stranger: Wire) -> None:
    stranger.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in SSLRequest().serialize():
        stranger.send(bytes([byte]))
    assert stranger.socket.recv(10) == b"N"
    for byte in STARTUP:
        stranger.send(bytes([byte]))
    assert stranger.until_ready()[-1] == ("Z", b"I")


@pytest.mark.parametrize(
    "requests", [[SSLRequest()], [GSSENCRequest()], [GSSENCRequest(), SSLRequest()]]
)
def test_encryption_is_refused_and_the_startup_goes_on(stranger: Wire, requests: list[Any]) -> None:
    for request in requests:
        stranger.send(request.serialize())
        assert stranger.socket.recv(10) == b"N"
    stranger.send(STARTUP)
    assert stranger.until_ready()[-1] == ("Z", b"I")


def test_unknown_protocol_version_is_for_the_server_to_judge(stranger: Wire) -> None:
    stranger.send(StartupMessage({}, (2, 0)).serialize())
    answer = b""
    while data := stranger.socket.recv(1000):  # in the form of that version
        answer += data
    assert answer.startswith(b"E")
    assert b"unsupported frontend protocol 2.0" in answer


@pytest.mark.parametrize("database", ["none", "postgres"])
def test_failed_login_is_the_servers_own(proxy: Proxy, database: str) -> None:
    user = "nobody_of_that_name" if database == "postgres" else "postgres"
    with pytest.raises(psycopg.OperationalError, match=r"FATAL:  .*does not exist"):
        proxy.connect(user=user, dbname=database)


# Credentials


@pytest.fixture
def executors(server: Server) -> Iterator[None]:
    """The roles with passwords may launch jobs."""
    with server.connect() as direct, may_launch(direct, *PASSWORDS):
        yield


def passfile(server: Server, path: Path) -> list[str]:
    path.write_text(
        "".join(f"{server.host}:{server.port}:*:{role}:{pw}\n" for role, pw in PASSWORDS.items())
    )
    path.chmod(0o600)
    return ["--passfile", str(path)]


def auth_file_of_passwords(server: Server, path: Path) -> list[str]:
    path.touch(mode=0o600)
    path.write_text("".join(f'"{role}" "{pw}"\n' for role, pw in PASSWORDS.items()))
    return ["--auth-file", str(path)]


def auth_file_of_secrets(server: Server, path: Path) -> list[str]:
    with server.connect() as direct:
        secrets = direct.execute(
            "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = ANY(%s)", [list(PASSWORDS)]
        ).fetchall()
    path.touch(mode=0o600)
    path.write_text("".join(f'"{role}" "{secret}"\n' for role, secret in secrets))
    return ["--auth-file", str(path)]


@pytest.mark.usefixtures("executors")
@pytest.mark.parametrize("role", PASSWORDS)
@pytest.mark.parametrize("source", [passfile, auth_file_of_passwords, auth_file_of_secrets])
def test_jobs_log_in_with_what_the_files_have_and_nothing_of_it_is_logged(
    server: Server,
    start_proxy: StartProxy,
    tmp_path: Path,
    role: str,
    source: Callable[[Server, Path], list[str]],
) -> None:
    options = source(server, tmp_path / "secrets")
    proxy = start_proxy(*options, "--log-level", "debug")
    with proxy.connect(user=role, password=PASSWORDS[role]) as conn:
        pid = launch(conn, "SELECT 5")
        assert conn.execute(FETCH, [pid]).fetchone() == (5,)
    proxy.wait_for_log("launched")
    assert proxy.stop() == 0
    written = (tmp_path / "secrets").read_text()
    secrets = {*PASSWORDS.values(), *re.findall(r'md5\w{32}|SCRAM-SHA-256\$[^"]+', written)}
    assert [secret for secret in secrets if secret in proxy.log] == []


@pytest.mark.usefixtures("executors")
def test_job_uses_the_password_that_the_client_sent_in_clear_text(
    proxy: Proxy,
) -> None:
    with proxy.connect(user="pw_plain", password=PASSWORDS["pw_plain"]) as conn:
        assert conn.execute(FETCH, [launch(conn, "SELECT 5")]).fetchone() == (5,)


@pytest.mark.usefixtures("executors")
@pytest.mark.parametrize("role", ["pw_md5", "pw_scram"])
def test_launch_without_a_password_says_what_is_missing_and_the_session_lives_on(
    proxy: Proxy, role: str
) -> None:
    with proxy.connect(user=role, password=PASSWORDS[role]) as conn:
        with pytest.raises(errors.InvalidAuthorizationSpecification) as caught:
            launch(conn, "SELECT 5")
        diag = caught.value.diag
        assert diag.sqlstate == "28000"
        assert role in (diag.message_primary or "")
        assert "passfile" in (diag.message_hint or "")
        assert "auth_file" in (diag.message_hint or "")
        assert value(conn, "SELECT 1") == 1


@pytest.mark.usefixtures("executors")
def test_wrong_password_in_the_file_is_the_servers_refusal(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    (tmp_path / "users").touch(mode=0o600)
    (tmp_path / "users").write_text('"pw_scram" "wrong one"\n')
    proxy = start_proxy("--auth-file", str(tmp_path / "users"))
    with proxy.connect(user="pw_scram", password=PASSWORDS["pw_scram"]) as conn:
        with pytest.raises(psycopg.Error) as caught:
            launch(conn, "SELECT 5")
        assert caught.value.sqlstate == "28P01"
        assert "authentication failed" in (caught.value.diag.message_detail or "")
        assert caught.value.diag.message_hint
        assert value(conn, "SELECT 1") == 1
    assert "wrong one" not in proxy.log


def test_wrong_password_of_the_client_is_the_servers_refusal(proxy: Proxy) -> None:
    for role in PASSWORDS:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            proxy.connect(user=role, password="not it")
