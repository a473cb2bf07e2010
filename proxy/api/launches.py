"""The functions that launch jobs and return at once; `calls` has the others.

Invariant: the function or the setting decides when a job starts; all else is the same.
"""

from __future__ import annotations

from proxy.api.calls import Caller, Row, given, handle_of
from proxy.jobs.job import Job
from proxy.jobs.request import LaunchRequest
from proxy.jobs.retries import checked


async def _launch(caller: Caller, request: LaunchRequest, *, at_commit: bool = False) -> Job:
    if at_commit or caller.launches_at_commit:
        return await caller.launch_at_commit(request)
    return await caller.launch(request)


async def launch(caller: Caller, sql: bytes, queue_size: int = 0) -> int | None:
    return (await _launch(caller, LaunchRequest(sql, queue_size))).pid or None


async def launch_v2(
    caller: Caller, sql: bytes | None, queue_size: int | None = 0, label: bytes | None = None
) -> Row:
    return handle_of(await _launch(caller, LaunchRequest(given(sql), queue_size or 0, label)))


async def submit(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None = 0,
    label: bytes | None = None,
    retries: int | None = 0,
) -> Row:
    request = LaunchRequest(
        given(sql),
        queue_size or 0,
        label,
        keeps_rows=False,
        retries=checked(retries, sql),
        may_queue=True,
    )
    return handle_of(await _launch(caller, request))


async def launch_at_commit(
    caller: Caller, sql: bytes | None, queue_size: int | None = 0, label: bytes | None = None
) -> Row:
    request = LaunchRequest(given(sql), queue_size or 0, label)
    return handle_of(await _launch(caller, request, at_commit=True))


async def submit_at_commit(
    caller: Caller, sql: bytes | None, queue_size: int | None = 0, label: bytes | None = None
) -> Row:
    request = LaunchRequest(given(sql), queue_size or 0, label, keeps_rows=False)
    return handle_of(await _launch(caller, request, at_commit=True))
