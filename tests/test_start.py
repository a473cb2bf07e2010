"""The proxy comes up before its server does, and serves when the server is there."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from proxy.demo.embedded import free_port
from tests.conftest import StartProxy, upstream_of
from tests.support.background import run, wait_until
from tests.support.servers import STOP_TIMEOUT, Proxy, Server, running

pytestmark = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture(scope="module")
def further(server: Server) -> Iterator[Server]:
    """A further server like ``server``."""
    further = Server(server.bin)
    try:
        yield further
    finally:
        further.close()


@pytest.fixture
def late(further: Server) -> Server:
    """A server that is not running."""
    further.stop()
    return further


def refusal(proxy: Proxy) -> str:
    with pytest.raises(psycopg.OperationalError) as caught:
        proxy.connect().close()
    return str(caught.value)


def test_it_serves_once_the_server_is_there(
    late: Server, start_proxy: StartProxy, workers: str
) -> None:
    proxy = start_proxy("--workers", workers, upstream=upstream_of(late))
    proxy.wait_for_log("WARNING:  cannot reach the server .*clients are refused until it is there")
    before = refusal(proxy)
    assert "FATAL:  could not connect to the server behind the proxy" in before
    assert "DETAIL:  " in before
    assert "passing on to" not in proxy.log
    late.start()
    proxy.wait_for_log(f"passing on to 127.0.0.1:{late.port}")
    with proxy.connect() as conn:
        assert run(conn, "SELECT 42", "n int") == [(42,)]
    late.stop()
    assert refusal(proxy) == before
    assert proxy.log.count("cannot reach the server") == 1  # for one reason, however often it looks
    assert proxy.stop() == 0


def test_it_stops_while_it_looks(late: Server, start_proxy: StartProxy, workers: str) -> None:
    proxy = start_proxy("--workers", workers, upstream=upstream_of(late))
    assert proxy.stop() == 0


def test_it_does_not_wait_for_a_server_that_is_silent(
    server: Server, start_proxy: StartProxy, workers: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"host=127.0.0.1 port={silent.getsockname()[1]} connect_timeout=3600"
        proxy = start_proxy("--workers", workers, upstream=upstream)
        assert proxy.stop() == 0


def test_it_looks_where_a_reload_tells_it_to(
    server: Server, late: Server, tmp_path: Path, workers: str
) -> None:
    file, log = tmp_path / "proxy.toml", tmp_path / "log"
    port = free_port()

    def configure(behind: Server) -> None:
        file.write_text(f'listen = "127.0.0.1:{port}"\nupstream = "{upstream_of(behind)}"\n')

    configure(late)
    command = (sys.executable, "-m", "proxy", "serve", "--config", str(file), "--workers", workers)
    with running(*command, log=log) as process:
        wait_until(lambda: "cannot reach the server" in log.read_text())
        configure(server)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: f"passing on to 127.0.0.1:{server.port}" in log.read_text())
        psycopg.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres").close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT) == 0
