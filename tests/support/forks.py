"""Proxies as forks of one process that has imported the program.

Python takes 0.2 s of a core to import the proxy, and the tests start hundreds of them. Here one
process, the fork server, imports it once, and forks for each proxy that is asked for. A fork goes
on as ``python -m proxy`` does, with arguments, environment, output and session of its own.

Run as a program, with the descriptor of a socket, this is the fork server.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

_REPOSITORY: Final = Path(__file__).parents[2]
_REQUEST: Final = 1 << 17  # bytes
_TIMEOUT: Final = 20.0


class Fork:
    """A process, with as much of `subprocess.Popen` as the tests need."""

    def __init__(self, args: Sequence[str], status: socket.socket) -> None:
        self.args = args
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()
        self.pid = int(status.recv(32))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Waits for the end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        with self._lock:
            if self.returncode is None:
                self._status.settimeout(timeout)
                try:
                    self.returncode = int(self._status.recv(32))
                except (BlockingIOError, TimeoutError):
                    raise subprocess.TimeoutExpired(self.args, timeout) from None
                self._status.close()
            return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal if it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once if it runs."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The fork server, for who asks it to fork. It ends with `close`, and with us."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(_TIMEOUT)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=_REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(
        self, args: Sequence[str], env: Mapping[str, str], *, stdout: int, stderr: int
    ) -> Fork:
        """Starts the proxy with these arguments, at the top of the checkout.

        Args:
            args: what stands behind ``python -m proxy``.
            env: all of its environment; nothing that Python reads when it starts.
            stdout: a descriptor to write to; as for `subprocess.Popen`, it stays open here.
            stderr: the same.
        """
        request = json.dumps([args, dict(env)]).encode()
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        status.settimeout(_TIMEOUT)
        with theirs:
            socket.send_fds(self._requests, [request], [stdout, stderr, theirs.fileno()])
        return Fork(args, status)

    def close(self) -> None:
        """Ends it. Forks that run go on."""
        self._requests.close()
        self._process.wait(_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(requests: socket.socket) -> list[str] | None:
    """Forks for each request. Returns in each fork, with its arguments; else None at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who watches a fork
    while True:
        request, fds, _, _ = socket.recv_fds(requests, _REQUEST, 3)
        if not request:
            return None
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            stdout, stderr, status = fds
            if pid := os.fork():
                os.close(stdout)
                os.close(stderr)
                _watch(pid, status)
            os.setsid()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for fd in fds:
                os.close(fd)
            args, env = json.loads(request)
            os.environ.clear()
            os.environ.update(env)
            return list(args)
        for fd in fds:
            os.close(fd)


def _watch(pid: int, status: int) -> None:
    """Tells a fork's pid and, when it has ended, its exit code; then ends, too."""
    with contextlib.suppress(OSError):  # nobody wants to know any more
        os.write(status, b"%d" % pid)
    _, ended = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        os.write(status, b"%d" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


def _main() -> int:
    import proxy.server
    import proxy.workers.supervisor  # noqa: F401
    from proxy import cli, loop

    loop.has_uvloop()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        args = _serve(requests)
    return 0 if args is None else cli.main(args)


if __name__ == "__main__":
    sys.exit(_main())
