"""The functions that launch jobs and return at once, as `calls` has the others.

Invariant: whether a job starts at once or at commit is the function's to say, or the setting's; all
else is the same.
"""

from __future__ import annotations

import functools

from proxy.api.calls import Caller, Row, given, handle_of
from proxy.jobs.job import Job
from proxy.jobs.retries import checked


async def _launch(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None,
    label: bytes | None = None,
    *,
    keep_rows: bool = True,
    retries: int = 0,
    at_commit: bool = False,
    may_queue: bool = False,
) -> Job:
    if at_commit or caller.launches_at_commit:
        start = caller.launch_at_commit
    else:
        start = functools.partial(caller.launch, may_queue=may_queue)
    return await start(
        given(sql), queue_size or 0, label=label, keep_rows=keep_rows, retries=retries
    )


async def launch(caller: Caller, sql: bytes, queue_size: int = 0) -> int | None:
    return (await _launch(caller, sql, queue_size)).pid or None


async def launch_v2(
    caller: Caller, sql: bytes | None, queue_size: int | None = 0, label: bytes | None = None
) -> Row:
    return handle_of(await _launch(caller, sql, queue_size, label))


async def submit(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None = 0,
    label: bytes | None = None,
    retries: int | None = 0,
) -> Row:
    further = checked(retries, sql)
    return handle_of(
        await _launch(
            caller, sql, queue_size, label, keep_rows=False, retries=further, may_queue=True
        )
    )


async def launch_at_commit(
    caller: Caller, sql: bytes | None, queue_size: int | None = 0, label: bytes | None = None
) -> Row:
    return handle_of(await _launch(caller, sql, queue_size, label, at_commit=True))


async def submit_at_commit(
    caller: Caller, sql: bytes | None, queue_size: int | None = 0, label: bytes | None = None
) -> Row:
    job = await _launch(caller, sql, queue_size, label, keep_rows=False, at_commit=True)
    return handle_of(job)
