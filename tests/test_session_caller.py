"""Launches that are interrupted, at the moments that no client can choose."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import SQLError
from proxy.api import calls
from proxy.config import Config
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.queue import JobQueue
from proxy.jobs.request import LaunchRequest
from proxy.session.caller import SessionCaller
from proxy.session.session import Session


@pytest.mark.parametrize("first", ["launched", "interrupted"])
def test_a_launch_that_ends_as_its_wait_is_interrupted_leaves_no_job(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Otherwise a session that has ended would get a job, which is never fetched or detached."""
    dropped: list[object] = []
    job = object()

    async def scene() -> None:
        opened = asyncio.Event()

        async def launch(*_: object, **__: object) -> object:
            await opened.wait()
            return job

        monkeypatch.setattr(calls, "launch", launch)
        session: Any = SimpleNamespace(
            launcher=None,
            client_encoding=b"UTF8",
            drop=dropped.append,
            jobs=(),
            service=SimpleNamespace(registry=SimpleNamespace(running=set())),
        )
        caller = SessionCaller(session, SimpleNamespace(), Interrupts())  # type: ignore[arg-type]
        caller._context = SimpleNamespace()  # type: ignore[assignment]
        calling = asyncio.create_task(caller.launch(LaunchRequest(b"SELECT 1")))
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


def test_a_session_that_is_closed_stays_so() -> None:
    """What its relay had held began an interception, and the session ended twice: a worker that
    lost a client twice counted too few."""
    session = object.__new__(Session)
    session._phase = None
    session.relay = SimpleNamespace()  # type: ignore[assignment]
    session.take_over(b"", [])
    assert session._phase is None


def test_a_queued_job_whose_launch_breaks_ends_with_an_error() -> None:
    """Else it would be queued for ever, and hold its place in the bounds."""
    ended: list[Any] = []
    job: Any = SimpleNamespace(user=b"alice", end_with=ended.append)

    async def scene() -> None:
        queue = JobQueue(Config(max_queued_jobs=1))

        async def launch() -> None:
            raise RuntimeError

        queue.add(job, 10, launch())
        with pytest.raises(SQLError, match="too many queued"):
            queue.check(b"alice", 10)
        await asyncio.sleep(0.01)
        queue.check(b"alice", 10)

    asyncio.run(scene())
    assert [error.sqlstate for error in ended] == ["XX000"]
