"""A proxy that is out of file descriptors says so, to the client and in the log, and lives on."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from protocol import messages as m
from tests.conftest import StartProxy
from tests.support.background import wait_until
from tests.support.certificates import Certificates
from tests.support.recorder import Closed, Frontend, errors, rows
from tests.support.servers import Proxy


@pytest.fixture(params=["one process", "workers", "TLS"])
def limited(
    request: pytest.FixtureRequest, start_proxy: StartProxy, certificates: Certificates
) -> Proxy:
    """A proxy, of each kind."""
    match request.param:
        case "workers":
            return start_proxy("--workers", "2")
        case "TLS":
            own = certificates.server
            files = ("--client-tls-cert-file", str(own.cert), "--client-tls-key-file", str(own.key))
            return start_proxy("--client-tls-sslmode", "allow", *files)
    return start_proxy()


def processes(proxy: Proxy) -> list[psutil.Process]:
    """Those that hold sessions: the workers, if there are any."""
    own = psutil.Process(proxy.pid)
    return own.children() or [own]


def leave(process: psutil.Process, room: int) -> None:
    """Let it have this many descriptors more."""
    limit = max(int(name) for name in _open(process)) + 1 + room
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))


def _open(process: psutil.Process) -> list[str]:
    return [path.name for path in Path(f"/proc/{process.pid}/fd").iterdir()]


@pytest.fixture
def soft_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A soft limit of ours, which children inherit, below the hard one."""
    monkeypatch.setattr(Proxy, "forks", None)  # no children of ours
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(soft, 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_the_soft_limit_is_raised(
    start_proxy: StartProxy, soft_limit: int, options: tuple[str, ...]
) -> None:
    proxy = start_proxy(*options, "--log-level", "debug")
    for process in processes(proxy):
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > soft_limit
    proxy.wait_for_log(rf"raised the limit of open files from {soft_limit} to {hard}")


def test_who_finds_no_room_is_told_so(limited: Proxy) -> None:
    with Frontend(limited) as frontend:  # what is opened once is open now
        frontend.query("SELECT 1")
    for process in processes(limited):
        leave(process, 8)
    sessions: list[Frontend] = []
    refusals: list[m.ErrorResponse] = []
    while len(refusals) < 5:
        assert len(sessions) < 40
        frontend = Frontend(limited, login=False)
        try:
            frontend.log_in()
            sessions.append(frontend)
        except Closed as closed:
            refusals += errors(closed.messages) or [m.ErrorResponse({})]
            frontend.close()
    assert sessions
    for refusal in refusals:
        assert refusal.sqlstate == "53300"
        assert refusal.fields["S"] == b"FATAL"
        assert b"ulimit -n" in refusal.fields["H"]
    limited.wait_for_log(r"ERROR: .*too many open files \(the limit is \d+\).*ulimit -n")
    # Once in some seconds, by each process.
    assert limited.log.count("too many open files") <= 3
    for frontend in sessions:
        assert rows(frontend.query("SELECT 7")) == [(b"7",)]
        frontend.close()

    def serves() -> bool:
        try:
            with Frontend(limited) as frontend:
                return rows(frontend.query("SELECT 8")) == [(b"8",)]
        except (Closed, ConnectionError):
            return False

    wait_until(serves)


def test_a_job_without_a_descriptor_says_whose_limit_it_is(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--spares", "0")
    with Frontend(proxy) as frontend:
        frontend.query("SELECT 1")
        leave(psutil.Process(proxy.pid), 0)
        [error] = errors(frontend.query("SELECT pg_background_launch('SELECT 1')"))
        assert error.sqlstate == "53000"
        assert b"ulimit -n" in error.fields["H"]
        assert b"max_connections" not in error.fields["H"]
        assert rows(frontend.query("SELECT 7")) == [(b"7",)]
    proxy.wait_for_log(r"could not connect to the server: too many open files")
