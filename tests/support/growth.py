"""How the time that something takes grows with its input.

Invariant: the time is this thread's CPU time, the least of several runs, without the garbage
collector, so a busy machine cannot make it smaller. On any machine, quadratic work takes 16 times
as long for four times the input.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Final, TypeVar

from protocol.errors import SQLError

T = TypeVar("T")

NO_TIME: Final = 0.004
"""Seconds. Anything faster is fast enough, even if it is too fast to be measured."""
LINEAR: Final = 8.0
"""A ratio below this means linear growth. It is the geometric mean of 4 and 16."""


def cpu_time(work: Callable[[T], object], given: T, times: int, runs: int) -> float:
    """The least CPU time of ``runs`` runs, each of which does ``work`` ``times`` times.

    Errors in the input, which ``work`` raises, are ignored.
    """
    least = float("inf")
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(runs):
            started = time.thread_time()
            for _ in range(times):
                with contextlib.suppress(ValueError, SQLError):  # LexError, ProtocolViolation
                    work(given)
            least = min(least, time.thread_time() - started)
    finally:
        if collects:
            gc.enable()
    return least


def growth(work: Callable[[T], object], make: Callable[[int], T], size: int) -> float:
    """How many times as long four times the input takes; 0 if it takes no time to speak of.

    The small input is read four times in a row, so that both measurements take as long, and are
    disturbed alike. While the result is not below LINEAR, it measures again, longer and at another
    size: at one size the input may be expensive by accident, if its last quote opens a constant
    that nothing ends.
    """
    if cpu_time(work, make(size), 1, 1) < NO_TIME:
        return 0
    grown = float("inf")
    for runs in (1, 2, 4, 8, 16, 32):
        short = cpu_time(work, make(size // 4), 4, runs)
        grown = min(grown, 4 * cpu_time(work, make(size), 1, runs) / max(short, NO_TIME / 2))
        if grown < LINEAR:
            break
        size -= size // 32
    return grown
