"""The functions that launch a job and wait for it in one call.

Invariant: only the call knows the job of `run`, so the job never outlives it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from protocol.errors import SQLError
from proxy.api.calls import Caller, Row, given, outcome_of, time_limit, wait_for, wait_until
from proxy.jobs import retries as retry
from proxy.jobs.job import Job
from proxy.jobs.request import LaunchRequest

RUN_GRACE_MS: Final = 1000
"""Milliseconds that `run` gives a job to stop when its time is over."""


async def run(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None = 0,
    timeout_ms: int | None = 0,
    label: bytes | None = None,
) -> Row:
    job, timed_out = await _run(caller, sql, queue_size, timeout_ms, label, retries=0)
    return (*outcome_of(caller, job), timed_out, job.elapsed_ms)


async def run_with_retries(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None,
    timeout_ms: int | None,
    label: bytes | None,
    retries: int | None,
) -> Row:
    further = retry.checked(retries, sql)
    job, timed_out = await _run(caller, sql, queue_size, timeout_ms, label, retries=further)
    return (*outcome_of(caller, job), timed_out, job.elapsed_ms, job.attempts)


async def _run(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None,
    timeout_ms: int | None,
    label: bytes | None,
    *,
    retries: int,
) -> tuple[Job, bool]:
    """A job that has ended, and whether because the time, shared by all attempts, was up."""
    loop = asyncio.get_running_loop()
    limit = time_limit(timeout_ms or 0)
    until = None if limit is None else loop.time() + limit / 1000
    failed = 0
    while True:
        try:
            job = await caller.launch(
                LaunchRequest(
                    given(sql),
                    queue_size or 0,
                    label,
                    keeps_rows=False,
                    retries=retries - failed,
                )
            )
            break
        except SQLError as error:
            if failed == retries or not retry.may_pass(error.sqlstate):
                raise
            failed += 1
            again = loop.time() + retry.pause_after(failed, error.sqlstate)
            if until is not None and again >= until:
                raise
        await caller.wait((), again)
    job.attempts += failed
    try:
        timed_out = not await wait_until([job], caller, until)
        if timed_out:
            job.timed_out = True
            await caller.cancel_job(job)
            await wait_for([job], caller, RUN_GRACE_MS)
    except BaseException:
        # The caller is interrupted. Nobody else could stop the job.
        await caller.cancel_job(job)
        raise
    finally:
        caller.jobs.remove(job)
    return job, timed_out


async def run_query(
    caller: Caller,
    sql: bytes | None,
    queue_size: int | None = 0,
    timeout_ms: int | None = 0,
    label: bytes | None = None,
    col_def: bytes | None = None,
) -> Job:
    job = await caller.launch(LaunchRequest(given(sql), queue_size or 0, label))
    job.has_handle = False
    limit = time_limit(timeout_ms or 0)
    if limit is not None:
        caller.limit(job, limit)
    return job
