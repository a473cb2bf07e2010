"""A new process takes the sockets over from one that runs: no connection is refused, no session or
job is lost, and whatever goes wrong with the new one, the old one goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
import pytest
from psycopg import errors

from proxy.config import ConfigError, load
from tests.conftest import StartProxy, upstream_of
from tests.support.background import launch, result, wait_until
from tests.support.http import address, ask
from tests.support.servers import STOP_TIMEOUT, Connection, Proxy, Server, running
from tests.support.wire import Monitor, gate
from tests.test_systemd import HAND_OVER, STOPPING, Manager

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
OTHER_USER: Final = 65534


Heirs = Callable[..., Proxy]


@pytest.fixture
def start_heirs(start_proxy: StartProxy) -> Iterator[Heirs]:
    """Starts a proxy that may start others with SIGUSR2; they end with the test."""
    started: list[Proxy] = []

    def start(*options: str, env: dict[str, str] | None = None) -> Proxy:
        # No fork of the tests': it is to start itself again.
        started.append(start_proxy(*options, env={"PYTHONUNBUFFERED": "1", **(env or {})}))
        return started[-1]

    yield start
    for proxy in started:
        for heir in heirs(proxy):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(heir).kill()


def heirs(proxy: Proxy) -> list[int]:
    """The processes that have been started to take over."""
    return [int(pid) for pid in re.findall(r"started process (\d+) to take over", proxy.log)]


def socket_of(folder: Path) -> str:
    return str(folder / "takeover")


class Stream:
    """Connections without end, of several clients at once, by several ways."""

    def __init__(self, *connects: Callable[[], Connection]) -> None:
        self.failures: list[Exception] = []
        self.count = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[one]) for one in connects]
        for thread in self._threads:
            thread.start()

    def _run(self, connect: Callable[[], Connection]) -> None:
        while not self._stop.is_set():
            try:
                with connect() as conn:
                    assert conn.execute("SELECT 42").fetchall() == [(42,)]
                self.count += 1
            except (psycopg.Error, OSError) as error:
                self.failures.append(error)
                return

    def wait_for_more(self, many: int) -> None:
        wanted = self.count + many
        wait_until(lambda: self.count >= wanted or self.failures, 60.0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT)
        assert not self.failures, self.failures
        assert not any(thread.is_alive() for thread in self._threads)


def taken_over(old: Proxy, new: Proxy) -> None:
    """Waits until the new one is in the old one's place."""
    new.wait_for_log(f"taking over from process {old.pid}")
    old.wait_for_log(f"process {new.pid} has taken over")
    assert new.port == old.port


@pytest.mark.parametrize(("before", "after"), [("1", "1"), ("2", "2"), ("1", "2"), ("2", "1")])
def test_nobody_is_refused_and_nothing_is_lost(
    server: Server,
    start_proxy: StartProxy,
    db: str,
    monitor: Monitor,
    tmp_path: Path,
    before: str,
    after: str,
) -> None:
    options = (
        *("--takeover", socket_of(tmp_path), "--listen", f"{tmp_path}:7777"),
        *("--admin-listen", "127.0.0.1:0", "--shutdown-timeout", "0", "--spares", "0"),
    )
    old = start_proxy(*options, "--workers", before)
    old.wait_for_log("listening on Unix socket")
    site = address(old)
    wait_until(lambda: (tmp_path / "takeover").exists())
    ways: tuple[Callable[[], Connection], ...] = (
        lambda: old.connect(dbname=db),
        lambda: old.connect(dbname=db),
        lambda: old.connect(dbname=db, host=tmp_path, port=7777),
    )
    with contextlib.ExitStack() as stack:
        closed = stack.enter_context(gate(server, db))
        sessions = [stack.enter_context(ways[n % 3]()) for n in range(40)]
        pids = [launch(conn, f"{closed.sql}SELECT {n}") for n, conn in enumerate(sessions[:20])]
        left = old.connect(dbname=db)
        alone = launch(left, closed.sql + "SELECT 1")  # a job whose session is gone
        left.close()
        for pid in (*pids, alone):
            monitor.wait_until_at_gate(pid)
        with Stream(*ways) as stream:
            stream.wait_for_more(10)
            new = start_proxy(*options, "--workers", after)
            taken_over(old, new)
            stream.wait_for_more(30)
        # HTTP, too, is the new one's.
        assert address(new) == site
        assert ask(f"{site}/healthz").status == 200
        # The old one goes on with what it has, though its shutdown_timeout is 0.
        assert old.running
        for conn in sessions:
            assert conn.execute("SELECT 1").fetchall() == [(1,)]
        assert all(monitor.state(pid) == ("active", "advisory") for pid in (*pids, alone))
        more = [launch(conn, f"SELECT {n}") for n, conn in enumerate(sessions[20:30])]
        closed.open()
        for n, (conn, pid) in enumerate(zip(sessions, pids, strict=False)):
            assert result(conn, pid, "n int") == [(n,)]
        for n, (conn, pid) in enumerate(zip(sessions[20:30], more, strict=True)):
            assert result(conn, pid, "n int") == [(n,)]
        monitor.wait_until_gone(alone)
        for conn in sessions[1:]:
            conn.close()
        assert sessions[0].execute("SELECT 1").fetchall() == [(1,)]
        assert old.running
    # It ends with its last session, and leaves the new one's sockets where they are.
    assert old.wait() == 0
    new.wait_for_log(f"process {old.pid}, which has handed over, has ended")
    for way in ways:
        way().close()
    assert new.stop() == 0
    assert not (tmp_path / ".s.PGSQL.7777").exists()
    assert not (tmp_path / "takeover").exists()


@WORKERS
def test_sigusr2_starts_the_successor_and_systemd_follows_it(
    start_heirs: Heirs, tmp_path: Path, workers: str
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager):
        env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
        options = ("--takeover", socket_of(tmp_path), "--workers", workers)
        old = start_heirs(*options, env=env)
        manager.wait_for("READY=1")
        with old.connect() as conn:
            manager.said.clear()
            os.kill(old.pid, signal.SIGUSR2)
            pid = int(manager.wait_for(r"MAINPID=(\d+)")[1])
            assert pid != old.pid
            successor = psutil.Process(pid)
            # systemd sees the end of its own children only.
            assert psutil.Process(old.pid) not in successor.parents()
            # The new one speaks once the manager listens to it, and the old one no more.
            manager.wait_for("READY=1")
            assert "READY=1" not in manager.said[: manager.said.index(f"MAINPID={pid}")]
            assert not any("STOPPING=1" in one for one in manager.said)
            wait_until(lambda: manager.hears("STATUS=Passing on to .*"))
            manager.said.clear()
            manager.wait_for("WATCHDOG=1")
            assert conn.execute("SELECT 1").fetchall() == [(1,)]
            old.connect().close()
            # And so on.
            successor.send_signal(signal.SIGUSR2)
            third = psutil.Process(int(manager.wait_for(r"MAINPID=(\d+)")[1]))
            manager.wait_for("READY=1")
            old.connect().close()
            wait_until(lambda: f"waiting for process {old.pid}" in old.log)
        wait_until(lambda: not old.running)
        wait_until(lambda: not successor.is_running())
        old.connect().close()
        manager.hears("")  # which holds a few messages only
        third.terminate()
        manager.wait_for(STOPPING)
        wait_until(lambda: not third.is_running())


def test_the_successor_is_what_the_program_is_now(server: Server, tmp_path: Path) -> None:
    """A new version is installed beside the old one, and a link leads to it from then on."""
    log, current = tmp_path / "log", tmp_path / "current"
    for version in ("one", "two"):
        program = tmp_path / version / "pg-background-proxy"
        program.parent.mkdir()
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom proxy.cli import main\n"
            f"print('this is version {version}', file=sys.stderr)\nsys.exit(main())\n"
        )
        program.chmod(0o755)
    current.symlink_to("one")
    serve = ("serve", "--listen", "127.0.0.1:0", "--upstream", upstream_of(server))
    takeover = ("--takeover", socket_of(tmp_path))
    with running(str(current / "pg-background-proxy"), *serve, *takeover, log=log) as old:
        wait_until(lambda: (tmp_path / "takeover").exists())
        current.unlink()
        current.symlink_to("two")
        old.send_signal(signal.SIGUSR2)
        assert old.wait(STOP_TIMEOUT) == 0
        [heir] = re.findall(r"started process (\d+) to take over", log.read_text())
        successor = psutil.Process(int(heir))
        successor.terminate()
        successor.wait(STOP_TIMEOUT)
    said = [line for line in log.read_text().splitlines() if line.startswith("this is version")]
    assert said == ["this is version one", "this is version two"]


@WORKERS
def test_a_successor_that_cannot_serve_leaves_the_old_one_serving(
    start_heirs: Heirs, tmp_path: Path, workers: str
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("")
    options = ("--takeover", socket_of(tmp_path), "--workers", workers, "--config", str(file))
    old = start_heirs(*options)
    old.connect().close()
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        closed = nobody.getsockname()[1]
        wrong = (
            ("max_workrs = 1", 2, "unknown key"),
            (f'admin_listen = "127.0.0.1:{port}"', 1, "cannot listen on 127.0.0.1"),
            ('client_tls_sslmode = "require"', 2, "needs client_tls_cert_file"),
            (f'takeover_timeout = 1\npassfile = "{tmp_path}"', 2, "passfile"),
        )
        # Another line may follow, which says why nothing was handed over.
        ended = r"process that was to take over has ended: exit code (\d+)"
        for n, (content, code, said) in enumerate(wrong):
            file.write_text(content)
            os.kill(old.pid, signal.SIGUSR2)
            codes = wait_until(lambda n=n: re.findall(ended, old.log)[n:])  # type: ignore[misc]
            assert codes == [str(code)]
            assert said in old.log
            old.connect().close()
        file.write_text('server_required = "on"\n')
        upstream = f"host=127.0.0.1 port={closed}"
        lost = subprocess.run(
            [
                *(sys.executable, "-m", "proxy", "serve", "--listen", "127.0.0.1:0"),
                *("--upstream", upstream, *options),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert lost.returncode == 1
        assert "cannot reach the server" in lost.stderr
    wait_until(lambda: "not handed over to process" in old.log)
    old.connect().close()
    # Then it is put right.
    file.write_text("max_workers = 7")
    os.kill(old.pid, signal.SIGUSR2)
    old.wait_for_log("has taken over")
    with old.connect() as conn:
        assert conn.execute("SHOW pg_background.max_workers").fetchall() == [("7",)]
    wait_until(lambda: not old.running)
    successor = psutil.Process(heirs(old)[-1])
    successor.terminate()
    successor.wait(STOP_TIMEOUT)


def test_a_successor_that_is_killed_as_it_takes_over(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Each step of the conversation may be the last one."""
    old = start_proxy("--takeover", socket_of(tmp_path))
    wait_until(lambda: (tmp_path / "takeover").exists())
    for said in ([], [b'"ready"'], [b'"readyness"'], [b"\xff"], [b'"ready"', b'"stop"']):
        before = old.log.count("not handed over")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(20)
            link.connect(socket_of(tmp_path))
            received: list[int] = []
            while not (message := socket.recv_fds(link, 4096, 1))[0].startswith(b'{"sockets"'):
                received += message[1]
            for one in said:
                link.send(one)
            if said[:1] == [b'"ready"']:
                assert link.recv(4096) == b'"paused"'
        for descriptor in received:
            os.close(descriptor)
        assert len(received) == 2
        wait_until(lambda before=before: old.log.count("not handed over") > before)  # type: ignore[misc]
        old.connect().close()
    with start_proxy("--takeover", socket_of(tmp_path)) as new:
        taken_over(old, new)
        assert old.wait() == 0


def test_sigusr2_where_nothing_can_be_taken_over(start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    os.kill(proxy.pid, signal.SIGUSR2)
    proxy.wait_for_log("no other process can take over: takeover is not set")
    proxy.connect().close()


@WORKERS
def test_it_is_the_same_on_asyncios_own_loop(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    env = {"PYTHONPATH": str(tmp_path)}
    options = ("--takeover", socket_of(tmp_path), "--admin-listen", "127.0.0.1:0")
    old = start_proxy(*options, "--workers", workers, env=env)
    old.wait_for_log("uvloop is not installed")
    site = address(old)
    with old.connect() as conn:
        new = start_proxy(*options, "--workers", workers, env=env)
        taken_over(old, new)
        assert conn.execute("SELECT 1").fetchall() == [(1,)]
    assert old.wait() == 0
    assert address(new) == site
    assert ask(f"{site}/healthz").status == 200
    assert new.stop() == 0


def test_two_successors_at_once(start_proxy: StartProxy, tmp_path: Path) -> None:
    old = start_proxy("--takeover", socket_of(tmp_path))
    wait_until(lambda: (tmp_path / "takeover").exists())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as slow:
        slow.settimeout(20)
        slow.connect(socket_of(tmp_path))
        assert slow.recv(4096)
        with pytest.raises(TimeoutError, match="refuses: another process takes over just now"):
            start_proxy("--takeover", socket_of(tmp_path))
    old.wait_for_log("not handed over to process .*: another process takes over just now")
    old.wait_for_log(f"not handed over to process {os.getpid()}: ")
    new = start_proxy("--takeover", socket_of(tmp_path))
    taken_over(old, new)


@WORKERS
def test_sigterm_to_the_new_one_ends_both(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    options = ("--takeover", socket_of(tmp_path), "--workers", workers)
    old = start_proxy(*options, "--shutdown-timeout", "unlimited")
    with old.connect() as conn:
        new = start_proxy(*options, "--shutdown-timeout", "unlimited")
        taken_over(old, new)
        new.connect().close()
        os.kill(new.pid, signal.SIGTERM)
        new.wait_for_log(f"waiting for process {old.pid}")
        assert conn.execute("SELECT 1").fetchall() == [(1,)]
        os.kill(new.pid, signal.SIGTERM)  # at once
        assert old.wait() == 0
        assert new.wait() == 0
        with pytest.raises(errors.AdminShutdown):
            conn.execute("SELECT 1")


@WORKERS
def test_the_old_one_may_be_given_a_time(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    options = ("--takeover", socket_of(tmp_path), "--workers", workers)
    old = start_proxy(*options, "--takeover-timeout", "100ms", "--shutdown-timeout", "unlimited")
    with old.connect() as conn:
        new = start_proxy(*options, "--takeover-timeout", "unlimited", "--shutdown-timeout", "1ms")
        taken_over(old, new)
        assert old.wait() == 0
        with pytest.raises(errors.AdminShutdown):
            conn.execute("SELECT 1")
    with new.connect() as conn:
        newer = start_proxy(*options)
        taken_over(new, newer)
        assert conn.execute("SELECT 1").fetchall() == [(1,)]
        os.kill(new.pid, signal.SIGTERM)  # from now on its shutdown_timeout counts
        assert new.wait() == 0
        with pytest.raises(errors.AdminShutdown):
            conn.execute("SELECT 1")


def test_addresses_may_come_and_go(start_proxy: StartProxy, tmp_path: Path) -> None:
    takeover = ("--takeover", socket_of(tmp_path))
    old = start_proxy(*takeover, "--listen", f"{tmp_path}:1", "--listen", "127.0.0.2:0")
    gone = int(old.wait_for_log(r"listening on 127\.0\.0\.2:(\d+)")[1])
    wait_until(lambda: (tmp_path / "takeover").exists())
    new = start_proxy(*takeover, "--listen", f"{tmp_path}:2", "--listen", "127.0.0.3:0")
    taken_over(old, new)
    assert old.wait() == 0
    new.connect(host=tmp_path, port=2).close()
    new.connect(host="127.0.0.3", port=int(new.wait_for_log(r"127\.0\.0\.3:(\d+)")[1])).close()
    wait_until(lambda: not (tmp_path / ".s.PGSQL.1").exists())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", gone))
    # Who has given a second proxy the path of the first one can see it.
    new.wait_for_log(rf"not listening on 127\.0\.0\.2:{gone} any more")
    new.wait_for_log(r"not listening on Unix socket .*\.s\.PGSQL\.1 any more")


def test_sockets_of_the_service_manager_are_handed_on(server: Server, tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / ".s.PGSQL.7777"
    serve = ("--upstream", upstream_of(server), "--takeover", socket_of(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = tcp.getsockname()[1]
        fds = [tcp.fileno(), unix.fileno()]
        starter = (sys.executable, "-c", HAND_OVER, ",".join(map(str, fds)))
        with running(*starter, *serve, log=log, pass_fds=fds) as old:
            wait_until(lambda: (tmp_path / "takeover").exists())
            tcp.close()
            unix.close()
            program = (sys.executable, "-m", "proxy", "serve", *serve)
            # It has an address of its own, which it leaves alone, as the old one did.
            with running(*program, "--listen", "127.0.0.1:1", log=tmp_path / "new") as new:
                assert old.wait(STOP_TIMEOUT) == 0
                for where in ({"host": "127.0.0.1", "port": port}, {"host": str(tmp_path)}):
                    params: dict[str, Any] = {"port": 7777, **where, "user": "postgres"}
                    psycopg.connect(dbname="postgres", connect_timeout=20, **params).close()
                new.send_signal(signal.SIGTERM)
                assert new.wait(STOP_TIMEOUT) == 0
    assert path.exists()  # it is systemd's


@WORKERS
def test_a_session_of_the_old_one_is_cancelled_through_the_new_one(
    start_proxy: StartProxy, monitor: Monitor, server: Server, tmp_path: Path, workers: str
) -> None:
    options = ("--takeover", socket_of(tmp_path), "--workers", workers)
    old = start_proxy(*options)
    with old.connect() as conn, gate(server, "postgres") as closed:
        pid = launch(conn, closed.sql)
        monitor.wait_until_at_gate(pid)
        new = start_proxy(*options)
        taken_over(old, new)
        waits = f"SELECT * FROM pg_background_result({pid}) AS (n int)"
        for query in ("SELECT pg_sleep(60)", waits):
            canceling = threading.Thread(target=cancel_until_done, args=[conn])
            canceling.start()
            with pytest.raises(errors.QueryCanceled):
                conn.execute(query)
            canceling.join(STOP_TIMEOUT)


@pytest.mark.parametrize(("before", "after"), [("1", "2"), ("2", "1")])
def test_as_replicas_they_know_of_each_others_jobs(
    server: Server, start_proxy: StartProxy, tmp_path: Path, before: str, after: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x" * 64)
    secret.chmod(0o600)
    options = (
        *("--takeover", socket_of(tmp_path), "--replica-secret-file", str(secret)),
        *("--auth-user", "postgres"),
    )
    old = start_proxy(*options, "--workers", before)
    with old.connect() as conn, gate(server) as closed:
        pid = launch(conn, closed.sql)
        new = start_proxy(*options, "--workers", after)
        taken_over(old, new)
        with new.connect() as other:
            listed = "SELECT pid, state FROM pg_background_list_all()"
            wait_until(lambda: (pid, "running") in other.execute(listed).fetchall())


def cancel_until_done(conn: Connection) -> None:
    """Until the statement has begun and ended: a request may come before it does."""
    active = psycopg.pq.TransactionStatus.ACTIVE
    wait_until(lambda: conn.pgconn.transaction_status == active)

    def is_done() -> bool:
        conn.cancel_safe(timeout=5)
        return conn.pgconn.transaction_status != active

    wait_until(is_done)


# Whose sockets they are


def test_only_the_own_user_can_connect(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy("--takeover", socket_of(tmp_path))
    proxy.connect().close()
    wait_until(lambda: (tmp_path / "takeover").exists())
    assert stat.S_IMODE((tmp_path / "takeover").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_where_others_write_is_refused(
    start_proxy: StartProxy, tmp_path: Path, mode: int
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(TimeoutError, match="must belong to this user or to root"):
        start_proxy("--takeover", str(folder / "takeover"))
    with pytest.raises(TimeoutError, match="No such file or directory"):
        start_proxy("--takeover", str(tmp_path / "nowhere" / "takeover"))


def test_a_file_that_is_no_socket_is_left_alone(start_proxy: StartProxy, tmp_path: Path) -> None:
    (tmp_path / "takeover").write_text("something")
    proxy = start_proxy("--takeover", socket_of(tmp_path))
    assert proxy.wait() == 1
    assert "is something else than a socket" in proxy.log
    assert (tmp_path / "takeover").read_text() == "something"


def let_through(path: Path) -> None:
    """Let other users come to a folder of pytest's."""
    for folder in (path, *path.parents):
        if "pytest-of-" in str(folder):
            folder.chmod(0o755)


def as_other_user(code: str, *args: str) -> subprocess.Popen[str]:
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    code = f"import os, socket, sys; os.setuid({OTHER_USER})\n{code}"
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


STEAL: Final = """
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.settimeout(20)
try:
    link.connect(sys.argv[1])
    print(*socket.recv_fds(link, 4096, 1)[:2])
except OSError as error:
    print(type(error).__name__)
"""


def test_another_user_gets_no_socket(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy("--takeover", socket_of(tmp_path))
    wait_until(lambda: (tmp_path / "takeover").exists())
    let_through(tmp_path)
    with as_other_user(STEAL, socket_of(tmp_path)) as thief:
        assert thief.communicate(timeout=30)[0] == "PermissionError\n"
    # And if the file's mode did not keep it away:
    (tmp_path / "takeover").chmod(0o666)
    with as_other_user(STEAL, socket_of(tmp_path)) as thief:
        said = thief.communicate(timeout=30)[0]
        assert "refused" in said
        assert said.endswith("[]\n")
    proxy.wait_for_log(f"not handed over .*: process {thief.pid} belongs to another user")
    proxy.connect().close()


def test_nothing_is_taken_from_another_users_process(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Or it could hand over sockets at which it listens itself."""
    let_through(tmp_path)
    tmp_path.chmod(0o777)
    code = (
        "link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "link.bind(sys.argv[1]); link.listen(); print('listens', flush=True); input()\n"
    )
    with as_other_user(code, socket_of(tmp_path)) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listens\n"
        tmp_path.chmod(0o755)
        try:
            with pytest.raises(TimeoutError, match="belongs to another user"):
                start_proxy("--takeover", socket_of(tmp_path))
        finally:
            other.communicate("\n", timeout=30)


# Settings


def test_unlimited_is_a_time(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('shutdown_timeout = "Unlimited"\ntakeover = "run/takeover"\n')
    config = load(file=file)
    assert config.shutdown_timeout == config.takeover_timeout == float("inf")
    assert config.takeover == tmp_path / "run/takeover"
    assert load().takeover is None
    for wrong in ('shutdown_timeout = "-1"', 'takeover_timeout = "ever"'):
        file.write_text(wrong)
        with pytest.raises(ConfigError):
            load(file=file)


@pytest.mark.slow
def test_an_old_one_that_does_not_answer_keeps_its_sockets(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    old = start_proxy("--takeover", socket_of(tmp_path))
    wait_until(lambda: (tmp_path / "takeover").exists())
    os.kill(old.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError, match=f"process {old.pid} does not answer"):
            start_proxy("--takeover", socket_of(tmp_path))
    finally:
        os.kill(old.pid, signal.SIGCONT)
    old.connect().close()
