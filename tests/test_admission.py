"""Whom the proxy lets try to log in, and what the server is told of who it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from protocol.startup import CancelRequest, StartupMessage
from proxy.config import ConfigError, load
from tests.conftest import StartProxy
from tests.support.background import launch, run, wait_until
from tests.support.servers import Proxy, Server
from tests.support.wire import Wire, error_of


def refusal(proxy: Proxy, **params: Any) -> tuple[str, str]:
    """Severity and message, for a client whose login packet is its first."""
    names = {"user": "postgres", "database": "postgres", **params}
    with Wire((proxy.host, proxy.port), login=False) as wire:
        wire.send(StartupMessage({k.encode(): v.encode() for k, v in names.items()}).serialize())
        error = error_of([wire.message()])
        with pytest.raises(EOFError):
            wire.message()
    assert error.sqlstate == "28000"
    assert error.fields["D"]
    return error.severity, error.message.decode()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_allow_from(server: Server, start_proxy: StartProxy, tmp_path: Path, workers: str) -> None:
    for networks, allowed in (
        (["127.0.0.0/8"], True),
        (["192.0.2.0/24", "127.0.0.1"], True),
        (["192.0.2.0/24", "::1"], False),
        (["127.0.0.2/32"], False),
    ):
        options = [part for network in networks for part in ("--allow-from", network)]
        proxy = start_proxy(
            *(*options, "--workers", workers, "--listen", f"{tmp_path}:7777"),
            *("--log-connections", "on"),
        )
        proxy.wait_for_log("Unix socket")
        start = server.cluster.log_size()
        if allowed:
            proxy.connect().close()
        else:
            message = 'no connections are taken from host "127.0.0.1"'
            assert refusal(proxy) == ("FATAL", message)
            proxy.wait_for_log("connection refused: user=postgres .* sqlstate=28000")
            assert server.log(start) == ""
        proxy.connect(host=tmp_path, port=7777).close()  # a Unix socket always may
        assert proxy.stop() == 0


def test_a_cancel_request_from_elsewhere_cancels_nothing(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy("--allow-from", "192.0.2.0/24", "--listen", f"{tmp_path}:7777")
    proxy.wait_for_log("Unix socket")
    with proxy.connect(host=tmp_path, port=7777) as conn:
        pid = conn.info.backend_pid
        with Wire((proxy.host, proxy.port), login=False) as wire:
            wire.send(CancelRequest(pid, b"1234").serialize())
            wire.message()  # told so, and hung up on
            with pytest.raises(EOFError):
                wire.message()
        assert run(conn, "SELECT 1", "n int") == [(1,)]


def test_allow_roles_and_databases(start_proxy: StartProxy) -> None:
    proxy = start_proxy(
        *("--allow-roles", "postgres", "--allow-roles", "älice"),
        *("--allow-databases", "postgres"),
    )
    with proxy.connect() as conn:
        assert launch(conn, "SELECT 1")
    assert refusal(proxy, user="alice") == (
        "FATAL",
        'role "alice" is not allowed to connect',
    )
    assert refusal(proxy, user="Postgres")[1] == 'role "Postgres" is not allowed to connect'
    for given in ({"database": "template1"}, {"replication": "true"}):
        name = given.get("database", "replication")
        message = f'connections to database "{name}" are not allowed'
        assert refusal(proxy, **given) == ("FATAL", message)
    with pytest.raises(psycopg.OperationalError, match="älice"):  # it is asked for at the server
        proxy.connect(user="älice", dbname="postgres")


def test_the_database_is_the_roles_name_by_default(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--allow-databases", "alice")
    with pytest.raises(psycopg.OperationalError, match='database "alice" does not exist'):
        psycopg.connect(host=proxy.host, port=proxy.port, user="alice")
    with pytest.raises(psycopg.OperationalError, match='database "postgres" are not allowed'):
        proxy.connect()


def test_replication_that_is_allowed(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--allow-databases", "replication")
    with proxy.connect(replication="true") as conn:
        assert conn.execute("IDENTIFY_SYSTEM").fetchone()


def test_lists_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('allow_from = ["10.0.0.0/8", "2001:db8::/32"]\nallow_roles = "alice"\n')
    settings = load(file=file)
    assert [str(network) for network in settings.allow_from] == ["10.0.0.0/8", "2001:db8::/32"]
    assert settings.allow_roles == ("alice",)
    assert settings.allow_databases == ()
    for wrong in ("10.0.0.1/8", "nowhere", "10.0.0.0/33"):
        file.write_text(f'allow_from = "{wrong}"')
        with pytest.raises(ConfigError, match="allow_from: invalid network"):
            load(file=file)


@pytest.mark.every_server
@pytest.mark.parametrize(
    ("name", "kept"),
    [("psql", "psql - "), ("", ""), ("x" * 63, f"{'x' * 40}")],
)
def test_application_name_add_host(
    server: Server, start_proxy: StartProxy, tmp_path: Path, name: str, kept: str
) -> None:
    proxy = start_proxy("--application-name-add-host", "on", "--listen", f"{tmp_path}:7777")
    proxy.wait_for_log("Unix socket")
    with proxy.connect(application_name=name) as conn, server.connect() as direct:
        port = local_port(conn)
        [shown] = direct.execute(
            "SELECT application_name FROM pg_stat_activity WHERE pid = %s", [conn.info.backend_pid]
        ).fetchone() or [""]
        assert shown.startswith(kept)
        assert shown.endswith(f"{' - ' if name else ''}127.0.0.1:{port}")
        assert len(shown) <= 63
        assert conn.info.parameter_status("application_name") == shown
        job = launch(conn, "SELECT pg_sleep(60)")  # jobs have names of their own
        query = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
        assert wait_until(lambda: direct.execute(query, [job]).fetchone() == ("pg_background",))
        conn.execute("SELECT pg_terminate_backend(%s)", [job])
        conn.execute("SET application_name = 'mine'")
        assert conn.execute("SHOW application_name").fetchone() == ("mine",)
    with proxy.connect(host=tmp_path, port=7777, application_name="psql") as conn:
        assert conn.execute("SHOW application_name").fetchone() == ("psql - [local]",)


def local_port(conn: psycopg.Connection[Any]) -> int:
    import socket

    with socket.socket(fileno=socket.dup(conn.fileno())) as same:
        return int(same.getsockname()[1])
