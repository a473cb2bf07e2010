"""Proxies as forks of one process that has imported the program.

Python takes 0.2 s of a core to import the proxy, and the tests start hundreds of them. Here one
process, the fork server, imports it once, and forks for each proxy. A fork goes on as if it were
``python -m proxy``, with arguments, environment, output and session of its own. Its worker
processes are forks, too.

Run as a program, with the descriptor of a socket, this is the fork server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, Self

_REPOSITORY: Final = Path(__file__).parents[2]
_REQUEST: Final = 1 << 17  # bytes
_TIMEOUT: Final = 20.0


class Fork:
    """A process, with as much of the interface of `subprocess.Popen` as the tests need."""

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
            subprocess.TimeoutExpired: it still runs.
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
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The fork server, for its clients. It ends with `close`, or when this process ends."""

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
            args: the arguments of ``python -m proxy``.
            env: its whole environment; without variables that Python reads when it starts.
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
        """Ends the fork server. Running forks go on."""
        self._requests.close()
        self._process.wait(_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(requests: socket.socket) -> list[str] | None:
    """Forks for each request. Returns in each fork, with its arguments; else None at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the watchers of forks
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
    """Reports a fork's pid and, when it has ended, its exit code; then ends this process."""
    with contextlib.suppress(OSError):  # the client may be gone
        os.write(status, b"%d" % pid)
    _, ended = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        os.write(status, b"%d" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


class _WorkerFork:
    """What a supervisor uses of an `asyncio.subprocess.Process`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._loop = asyncio.get_running_loop()
        self._code: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self._has_ended)

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        self._code.set_result(os.waitstatus_to_exitcode(status))

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    def kill(self) -> None:
        if self._code.done():
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGKILL)


def _fork_workers() -> None:
    """From now on, this process forks where it would start a worker."""
    start: Any = asyncio.create_subprocess_exec
    program = (sys.executable, "-P", "-m", "proxy.workers.worker")

    async def start_or_fork(*command: str, **options: Any) -> Any:
        if command[:-2] != program:
            return await start(*command, **options)
        with warnings.catch_warnings():
            # The log has a thread. The fork uses nothing of it.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        return _WorkerFork(pid) if pid else _become_worker(*command[-2:])

    asyncio.create_subprocess_exec = start_or_fork  # type: ignore[assignment]


def _become_worker(*fds: str) -> NoReturn:
    """Goes on as a worker's program does. What the supervisor had stays as it is."""
    code = 1
    try:
        os.setsid()
        gc.freeze()
        asyncio._set_running_loop(None)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        logging.getLogger().handlers.clear()
        lowest = 3
        for fd in sorted(map(int, fds)):
            os.closerange(lowest, fd)
            lowest = fd + 1
        os.closerange(lowest, os.sysconf("SC_OPEN_MAX"))
        ended = worker.main(list(fds))
        code = 0 if ended is None else ended if isinstance(ended, int) else 1
        if isinstance(ended, str):
            print(ended, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        log.flush()
        os._exit(code)


def _main() -> int:
    loop.has_uvloop()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        args = _serve(requests)
    if args is None:
        return 0
    _fork_workers()
    return cli.main(args)


if __name__ == "__main__":
    # Only in the fork server, not in its clients.
    import proxy.server
    import proxy.workers.supervisor  # noqa: F401
    from proxy import cli, log, loop
    from proxy.workers import worker

    sys.exit(_main())
