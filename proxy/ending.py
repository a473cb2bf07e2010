"""The end of a process: how long sessions and jobs may go on once it accepts no more clients.

Invariant: `now` is set when the time is over, or somebody has lost patience; it is never reset.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from proxy.config import Config


class Ending:
    """The end of one process.

    Args:
        config: returns the current configuration.

    Attributes:
        begun: set when no more clients are accepted.
        now: set when sessions and jobs must end.
        is_taken_over: whether another process serves new clients.
        on_signal: called on each signal.
    """

    def __init__(self, config: Callable[[], Config]) -> None:
        self._config = config
        self.begun = asyncio.Event()
        self.now = asyncio.Event()
        self.is_taken_over = False
        self.on_signal: Callable[[], None] | None = None
        self._is_told = False
        self._timer: asyncio.TimerHandle | None = None

    def signalled(self) -> None:
        """SIGTERM or the like: end within shutdown_timeout; the second time, at once."""
        if self._is_told:
            self.now.set()
        else:
            self._is_told = True
            self._within(self._config().shutdown_timeout)
        if self.on_signal is not None:
            self.on_signal()

    def taken_over(self) -> None:
        """Another process serves new clients: end within takeover_timeout."""
        self.is_taken_over = True
        if not self._is_told:
            self._within(self._config().takeover_timeout)

    def at_once(self) -> None:
        self.begun.set()
        self.now.set()

    def _within(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds < math.inf:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.now.set)
        self.begun.set()
