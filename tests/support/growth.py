"""How the time of something grows with its input.

Invariant: it is this thread's CPU time, the least of several runs, without the garbage collector:
a busy machine makes none of them smaller. Quadratic work takes 16 times as long for four times the
input, on any machine.
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
"""Seconds: what is faster than that is fast enough, even if it could not be measured."""
LINEAR: Final = 8.0
"""What is below has grown linearly: half way, by factors, between 4 and 16."""


def cpu_time(work: Callable[[T], object], given: T, times: int, runs: int) -> float:
    """The least CPU time of ``runs`` runs, each of ``times`` times ``work``.

    What it raises of errors in the input is ignored.
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
    """How many times as long four times the input takes, 0 if that is no time at all.

    The small input is read four times in a row, so that both take as long to measure, and suffer
    alike. It measures again, longer, and at another size, as long as the answer is not below
    LINEAR: one size may be dear by accident, where a quote is the last and opens what nothing ends.
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
