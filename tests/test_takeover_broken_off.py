"""A takeover that one of the two breaks off: never do both take connections, nor none, nor is the
file of a Unix socket gone at which one of them listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from proxy.net import takeover
from proxy.net.sockets import CLIENTS, TAKEOVER, Listening
from tests.conftest import StartProxy
from tests.support.background import wait_until
from tests.support.servers import Proxy
from tests.test_takeover import WORKERS, socket_of

Background = Callable[..., Future[Any]]


class OldOne:
    """A predecessor that does what it should not, or when it should not."""

    def __init__(self, folder: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(socket_of(folder))
        self._listening.listen()
        self._listening.settimeout(20)
        self._clients = socket.create_server(("127.0.0.1", 0))

    def hand_over(self) -> socket.socket:
        """Gives a successor the sockets; the connection to it."""
        link, _ = self._listening.accept()
        link.settimeout(20)
        for one, use, asked in (
            (self._listening, TAKEOVER, ""),
            (self._clients, CLIENTS, "127.0.0.1:0"),
        ):
            said = {"use": use, "asked": asked, "has_header": False}
            socket.send_fds(link, [json.dumps(said).encode()], [one.fileno()])
        link.send(b'{"sockets": 2, "version": 1}')
        return link

    def close(self) -> None:
        self._listening.close()
        self._clients.close()


@pytest.fixture
def old_one(tmp_path: Path) -> Iterator[OldOne]:
    old_one = OldOne(tmp_path)
    yield old_one
    old_one.close()


@contextlib.contextmanager
def new_one(folder: Path) -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """A successor that has been given the sockets, and says nothing yet."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link,
        contextlib.ExitStack() as all_,
    ):
        link.settimeout(20)
        link.connect(socket_of(folder))
        sockets: list[socket.socket] = []
        while not (message := socket.recv_fds(link, 4096, 1))[0].startswith(b'{"sockets"'):
            sockets += [all_.enter_context(socket.socket(fileno=fd)) for fd in message[1]]
        yield link, sockets


def started(start_proxy: StartProxy, folder: Path, *options: str) -> Proxy:
    """A proxy that can be taken over from."""
    proxy = start_proxy("--takeover", socket_of(folder), *options)
    proxy.connect().close()
    return proxy


# The old one has lost patience, and goes on


@pytest.mark.parametrize("said", ["nothing", "nothing, and ready is not read", "paused"])
def test_a_new_one_that_is_refused_does_not_serve(
    start_proxy: StartProxy, tmp_path: Path, old_one: OldOne, background: Background, said: str
) -> None:
    """It finds the connection closed, as if the old one were gone."""

    def refuse() -> None:
        with old_one.hand_over() as link:
            if said == "nothing, and ready is not read":
                assert link.recv(4096, socket.MSG_PEEK) == b'"ready"'
            if said == "paused":
                assert link.recv(4096) == b'"ready"'
                link.shutdown(socket.SHUT_RD)
                link.send(b'"paused"')
            link.send(b'{"refused": "it is too late"}')

    refused = background(refuse)
    new = start_proxy("--takeover", socket_of(tmp_path))
    refused.result(20)
    assert new.wait() == 1
    assert f"takeover: process {os.getpid()} refuses: it is too late" in new.log


def test_what_has_come_in_time_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has said "taken" serves, and cannot know that the other was about to lose patience."""
    monkeypatch.setattr(takeover, "_ANSWER", 0)
    done: list[str] = []

    async def pause() -> None:
        done.append("paused")

    async def hand_over(said: list[bytes]) -> bytes:
        listening = takeover.listen(tmp_path / "takeover")
        ended = asyncio.Event()

        def log(what: str) -> None:
            done.append(what)
            ended.set()

        with (
            listening.socket,
            socket.create_server(("127.0.0.1", 0)) as clients,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link,
        ):
            offer = takeover.Offer(
                listening,
                lambda: [Listening(clients, CLIENTS)],
                pause=pause,
                resume=lambda: log("resumed"),
                hand_on=lambda pid: log("handed on"),
                stop=lambda: None,
            )
            link.connect(socket_of(tmp_path))
            for one in said:
                link.send(one)
            await asyncio.wait_for(ended.wait(), 20)
            offer.close()
            return await asyncio.to_thread(last_word, link)

    assert asyncio.run(hand_over([b'"ready"', b'"taken"'])) == b'"released"'
    assert b'{"refused": "process' in asyncio.run(hand_over([b'"ready"']))
    assert done == ["paused", "handed on", "paused", "resumed"]


def last_word(link: socket.socket) -> bytes:
    """The last message before the other side hangs up."""
    link.settimeout(20)
    last = b""
    while message := link.recv(4096):
        last = message
    return last


# SIGTERM


@WORKERS
def test_an_old_one_that_ends_leaves_the_files_of_its_sockets(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    """The new one takes over once it is ready, and would listen where nobody could connect."""
    old = started(start_proxy, tmp_path, "--listen", f"{tmp_path}:7777", "--workers", workers)
    with new_one(tmp_path) as (link, sockets):
        os.kill(old.pid, signal.SIGTERM)
        assert link.recv(4096) == b""
        assert old.wait() == 0
        path = str(tmp_path / ".s.PGSQL.7777")
        [unix] = [one for one in sockets if one.getsockname() == path]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            unix.accept()[0].close()
        assert (tmp_path / "takeover").exists()
    # Whoever comes next finds nobody there.
    new = started(start_proxy, tmp_path, "--listen", f"{tmp_path}:7777", "--workers", workers)
    assert new.stop() == 0
    assert not (tmp_path / "takeover").exists()


def test_a_new_one_that_is_to_end_lets_the_old_one_go_on(
    start_proxy: StartProxy, tmp_path: Path, old_one: OldOne, background: Background
) -> None:
    for is_ready in (False, True):
        handed = background(old_one.hand_over)
        new = start_proxy("--takeover", socket_of(tmp_path), "--workers", "2")
        with handed.result(20) as link:
            if is_ready:
                assert link.recv(4096) == b'"ready"'
            os.kill(new.pid, signal.SIGTERM)
            new.wait_for_log("shutting down: 2 workers" if is_ready else "shutting down")
            if is_ready:
                link.send(b'"paused"')
            with contextlib.suppress(ConnectionResetError):  # it may have ended without reading
                assert link.recv(4096) == b""
            # It does not wait for the old one.
            assert new.wait() == 0


def test_a_new_one_that_ends_at_once_has_the_old_one_end(
    start_proxy: StartProxy, tmp_path: Path, old_one: OldOne, background: Background
) -> None:
    """Also between "taken" and "released"."""
    handed = background(old_one.hand_over)
    new = start_proxy("--takeover", socket_of(tmp_path))
    with handed.result(20) as link:
        assert link.recv(4096) == b'"ready"'
        link.send(b'"paused"')
        assert link.recv(4096) == b'"taken"'
        os.kill(new.pid, signal.SIGTERM)
        assert link.recv(4096) == b'"stop"'
        link.send(b'"released"')
        new.wait_for_log(f"waiting for process {os.getpid()}, which has handed over")
    assert new.wait() == 0


# SIGUSR2


def test_a_successor_is_followed_where_linux_has_no_descriptors_of_processes(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Before Linux 5.3, and where a container's seccomp profile is older than pidfd_open."""
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.pidfd_open\n")
    file = tmp_path / "proxy.toml"
    file.write_text("")
    options = ("--takeover", socket_of(tmp_path), "--config", str(file))
    old = start_proxy(*options, env={"PYTHONPATH": str(tmp_path)})
    old.connect().close()
    file.write_text("max_workrs = 1")
    ended = "the process that was to take over has ended: exit code 2"
    for n in range(2):
        os.kill(old.pid, signal.SIGUSR2)
        wait_until(lambda n=n: old.log.count(ended) > n)  # type: ignore[misc]
    old.connect().close()


# Descriptors


def test_descriptors_that_nobody_has_asked_for_are_closed(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    old = started(start_proxy, tmp_path)
    process = psutil.Process(old.pid)
    wait_until(lambda: "socket" not in str(process.net_connections("tcp")[1:]))
    before = process.num_fds()
    for said in (b'"no"', b'{"use": "clients"}', b"[" * 4000, b"x" * 5000, b"\0"):
        with new_one(tmp_path) as (link, _):
            socket.send_fds(link, [said], [0, 1, 2])
            assert link.recv(4096).startswith(b'{"refused"')
            assert link.recv(4096) == b""
    wait_until(lambda: process.num_fds() <= before)
    old.connect().close()


def test_without_descriptors_nobody_takes_over_for_a_while(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    """And the old one does not spin."""
    old = started(start_proxy, tmp_path)
    process = psutil.Process(old.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (3, hard))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(20)
        link.connect(socket_of(tmp_path))
        old.wait_for_log("could not let another process take over: too many open files")
        process.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
        assert link.recv(4096).startswith(b'{"use"')


# Without a predecessor


def test_who_has_no_address_to_listen_at_leaves_the_socket_alone(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Of two that are started at once, both without a predecessor, the second would make it
    impossible to take over from the first."""
    path = tmp_path / "takeover"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        first.bind(str(path))  # and does not listen yet
        was = path.stat().st_ino
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(TimeoutError, match="cannot listen on 127"):
                start_proxy("--takeover", str(path), "--listen", f"127.0.0.1:{port}")
        assert path.stat().st_ino == was
