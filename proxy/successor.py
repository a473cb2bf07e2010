"""Starts the program again, to take over from us.

Invariant: once it has taken over, its parent is init (the service manager), not this process.
systemd waits for its own children only: it would not notice a crash of another's child, and
`systemctl stop` would kill all at once. So a process in between starts it, and dies on takeover.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Final

from proxy.log import logger

_GO_BETWEEN: Final = """
import os, signal, subprocess, sys
try:
    successor = subprocess.Popen(sys.argv[2:])
except OSError as error:
    sys.exit(f"pg-background-proxy: error: {error}")
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all three
with open(int(sys.argv[1]), "w") as pipe:
    pipe.write(str(successor.pid))
code = successor.wait()
sys.exit(code if code >= 0 else 128 - code)
"""


class Successor:
    """The new process. Raises OSError: it cannot be started.

    Args:
        environ: its environment.
        ended: called in the event loop when it has ended, with its exit code (a shell's code for a
            signal); or, after `let_go`, with any.

    Attributes:
        pid: of its process; None until known.
    """

    def __init__(self, environ: Mapping[str, str], ended: Callable[[int], None]) -> None:
        self.pid: int | None = None
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        try:
            self._go_between = subprocess.Popen(  # noqa: S603 - what we were started with
                [sys.executable, "-I", "-S", "-c", _GO_BETWEEN, str(writer), *_command()],
                stdin=subprocess.DEVNULL,
                env=environ,
                pass_fds=[writer],
            )
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        # A thread, as nobody may wait for a process that outlives us; pidfd_open may be missing.
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()

    def let_go(self) -> None:
        """It has taken over: remove the process between it and init."""
        self._go_between.kill()
        self._go_between.wait()

    def _watch(self, reader: int) -> None:
        with open(reader, encoding="ascii") as pipe:
            told = pipe.read()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if told:
                self._loop.call_soon_threadsafe(self._started, int(told))
            self._loop.call_soon_threadsafe(self._ended, self._go_between.wait())

    def _started(self, pid: int) -> None:
        self.pid = pid
        logger.info("started process %d to take over", pid)


def _command() -> list[str]:
    """Our command line: the program, which may have another interpreter now; or ``-m module``."""
    if os.access(sys.argv[0], os.X_OK):
        return sys.argv
    return [sys.executable, *sys.orig_argv[1:]]
