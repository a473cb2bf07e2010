"""Launches that are interrupted, at the moments that no client can choose."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.jobs.interrupts import Interrupts
from proxy.session.caller import SessionCaller


@pytest.mark.parametrize("first", ["launched", "interrupted"])
def test_a_launch_that_ends_as_its_wait_is_interrupted_leaves_no_job(first: str) -> None:
    """Otherwise a session that has ended would get a job, which is never fetched or detached."""
    dropped: list[object] = []
    job = object()

    async def scene() -> None:
        opened = asyncio.Event()

        async def launch(*_: object, **__: object) -> object:
            await opened.wait()
            return job

        session: Any = SimpleNamespace(launch=launch, drop=dropped.append, jobs=())
        caller = SessionCaller(session, SimpleNamespace(), Interrupts())  # type: ignore[arg-type]
        caller._context = SimpleNamespace()  # type: ignore[assignment]
        calling = asyncio.create_task(caller.launch(b"SELECT 1", 0))
        await asyncio.sleep(0.01)
        if first == "launched":
            opened.set()
        calling.cancel()
        opened.set()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await asyncio.sleep(0.01)

    asyncio.run(scene())
    assert dropped == ([job] if first == "launched" else [])
