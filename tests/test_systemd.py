"""systemd's protocols: what the service manager is told, and the sockets that it hands over.

The manager's end of sd_notify(3) is a datagram socket of the test's. The sockets come from
systemd-socket-activate where that is at hand, and from a program of ours that does as it does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.background import run, wait_until
from tests.support.servers import REPOSITORY, STOP_TIMEOUT, Server, running

UNITS = REPOSITORY / "deploy" / "systemd"
STOPPING = r"STOPPING=1\nEXTEND_TIMEOUT_USEC=(\d+)"
WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
HAND_OVER = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": "x"}
os.execv(sys.executable, [sys.executable, "-m", "proxy", "serve", *sys.argv[2:]])
"""
_number = itertools.count(1)


class Manager:
    """Gets what the proxy says, as datagrams."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(address.replace("@", "\0", 1))

    def hears(self, pattern: str) -> re.Match[str] | None:
        """What has been said so far, if it has that."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.said.append(self._socket.recv(4096).decode())
        return next((found for one in self.said if (found := re.fullmatch(pattern, one))), None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        found = wait_until(lambda: self.hears(pattern))
        assert found is not None
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"@pgbg-test-{os.getpid()}-{next(_number)}"
    manager = Manager(name if request.param == "abstract" else str(tmp_path / "notify"))
    yield manager
    manager.close()


@WORKERS
def test_the_manager_is_told_of_start_reload_and_end(
    server: Server, start_proxy: StartProxy, manager: Manager, tmp_path: Path, workers: str
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("")
    env = {"NOTIFY_SOCKET": manager.address}
    proxy = start_proxy("--config", str(file), "--workers", workers, env=env)
    manager.wait_for("READY=1")
    proxy.connect().close()
    manager.wait_for(f"STATUS=Passing on to 127.0.0.1:{server.port}")
    for content, words in (("", "was read again"), ("max_workers = 0", "stays as it was")):
        manager.said.clear()
        file.write_text(content)
        before = time.monotonic_ns() // 1000
        os.kill(proxy.pid, signal.SIGHUP)
        reloading = manager.wait_for(r"RELOADING=1\nMONOTONIC_USEC=(\d+)")
        assert before <= int(reloading[1]) <= time.monotonic_ns() // 1000
        manager.wait_for("READY=1")
        assert manager.said == [reloading[0], "READY=1"]
        proxy.wait_for_log(words)
    manager.said.clear()
    assert proxy.stop() == 0
    manager.wait_for(STOPPING)
    assert len(manager.said) == 1


@WORKERS
@pytest.mark.parametrize(
    ("timeout", "wanted"), [("0", 0), ("30s", 30), ("2h", 7200), ("unlimited", 86400 * 365)]
)
def test_the_manager_is_asked_to_wait_for_sessions_and_jobs(
    start_proxy: StartProxy, tmp_path: Path, workers: str, timeout: str, wanted: int
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager):
        env = {"NOTIFY_SOCKET": manager.address}
        proxy = start_proxy("--workers", workers, "--shutdown-timeout", timeout, env=env)
        manager.wait_for("READY=1")
        assert proxy.stop() == 0
        microseconds = int(manager.wait_for(STOPPING)[1])
        assert wanted * 10**6 < microseconds < 2**63


@WORKERS
def test_it_is_ready_without_its_server_and_says_so(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager), socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        upstream = f"host=127.0.0.1 port={nobody.getsockname()[1]}"
        env = {"NOTIFY_SOCKET": manager.address}
        start_proxy("--workers", workers, upstream=upstream, env=env)
        manager.wait_for("READY=1")
        manager.wait_for("STATUS=Looking for the server: cannot reach .*refused")


@WORKERS
def test_the_watchdog_is_fed_as_long_as_it_lives(
    start_proxy: StartProxy, manager: Manager, workers: str
) -> None:
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    proxy = start_proxy("--workers", workers, env=env)
    manager.wait_for("READY=1")
    wait_until(lambda: manager.hears("") or manager.said.count("WATCHDOG=1") >= 5)
    os.kill(proxy.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(proxy.pid).status() == psutil.STATUS_STOPPED)
        manager.hears("")
        manager.said.clear()
        time.sleep(0.5)
        manager.hears("")
        assert manager.said == []  # so systemd would end it
    finally:
        os.kill(proxy.pid, signal.SIGCONT)
    manager.wait_for("WATCHDOG=1")


@pytest.mark.parametrize("env", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}])
def test_a_watchdog_for_another_is_not_fed(
    start_proxy: StartProxy, tmp_path: Path, env: dict[str, str]
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager):
        given = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000", **env}
        proxy = start_proxy(env=given)
        manager.wait_for("READY=1")
        assert proxy.stop() == 0
        manager.wait_for(STOPPING)
        assert "WATCHDOG=1" not in manager.said


def test_the_supervisor_alone_speaks(start_proxy: StartProxy, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager):
        env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000000", "LISTEN_FDS": "1"}
        proxy = start_proxy("--workers", "2", env=env)
        manager.wait_for("READY=1")
        workers = psutil.Process(proxy.pid).children()
        assert len(workers) == 2
        for worker in workers:
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"} & set(worker.environ())
        assert manager.said.count("READY=1") == 1


@pytest.mark.parametrize("address", ["/no/such/socket", "vsock:2:1234", "@nobody-is-there"])
def test_a_manager_that_does_not_hear_stops_nothing(start_proxy: StartProxy, address: str) -> None:
    proxy = start_proxy(env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"})
    with proxy.connect() as conn:
        assert run(conn, "SELECT 1", "n int") == [(1,)]
    assert proxy.stop() == 0


# Sockets that are handed over


@contextlib.contextmanager
def handed_over(
    server: Server, log: Path, *sockets: socket.socket, options: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A proxy that is started with these sockets."""
    fds = [listening.fileno() for listening in sockets]
    starter = (sys.executable, "-c", HAND_OVER, ",".join(map(str, fds)))
    command = (*starter, "--upstream", upstream_of(server), *options)
    with running(*command, log=log, pass_fds=fds) as process:
        yield process


def works(**where: object) -> bool:
    with psycopg.connect(user="postgres", dbname="postgres", connect_timeout=20, **where) as conn:  # type: ignore[arg-type]
        return run(conn, "SELECT 42", "n int") == [(42,)]


@WORKERS
def test_clients_come_by_the_sockets_that_are_handed_over(
    server: Server, tmp_path: Path, workers: str
) -> None:
    log = tmp_path / "log"
    path = tmp_path / ".s.PGSQL.6543"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = tcp.getsockname()[1]
        options = ("--workers", workers, "--listen", "127.0.0.1:1")  # which it may not, nor does
        for _ in range(2):  # it is started again with the same ones
            with handed_over(server, log, tcp, unix, options=options) as process:
                # A client may come before the proxy is there.
                assert works(host="127.0.0.1", port=port)
                assert works(host=str(tmp_path), port=6543)
                process.send_signal(signal.SIGTERM)
                assert process.wait(STOP_TIMEOUT) == 0
            assert path.exists()
            assert f"listening on 127.0.0.1:{port}, of the service manager" in log.read_text()
            assert f"listening on Unix socket {path}, of the" in log.read_text()


def test_a_socket_that_does_not_listen_is_an_error_of_one_line(
    server: Server, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        with handed_over(server, log, datagrams) as process:
            assert process.wait(STOP_TIMEOUT) == 1
    [line] = [line for line in log.read_text().splitlines() if "error" in line]
    assert "LISTEN_FDS: file descriptor 3 is no listening stream socket" in line


def test_systemd_socket_activate_starts_it(server: Server, tmp_path: Path) -> None:
    program = shutil.which("systemd-socket-activate")
    if program is None:
        pytest.skip("no systemd-socket-activate")
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = (sys.executable, "-m", "proxy", "serve", "--upstream", upstream_of(server))
    with running(program, "--listen", f"127.0.0.1:{port}", *command, log=log) as process:
        wait_until(lambda: "Listening on" in log.read_text())
        assert works(host="127.0.0.1", port=port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT) == 0
        assert f"listening on 127.0.0.1:{port}, of the service manager" in log.read_text()


def test_the_units_are_valid(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    for unit in UNITS.iterdir():
        text = unit.read_text().replace(
            "/opt/pg-background-proxy/bin/pg-background-proxy", sys.executable
        )
        (tmp_path / unit.name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    assert len(units) == 2
    done = subprocess.run(
        [analyze, "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
