"""The event loop that a process of the proxy runs on."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any


def has_uvloop() -> bool:
    """Whether `run` will use uvloop, which takes less CPU time than asyncio's own loop."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


def run(main: Coroutine[Any, Any, int]) -> int:
    """Runs a coroutine to its end, on uvloop if it is installed."""
    # Modules stay. Without this each full garbage collection examines them all, for 20 ms.
    gc.freeze()
    if not has_uvloop():
        return asyncio.run(main)
    import uvloop

    code: int = uvloop.run(main)
    return code
