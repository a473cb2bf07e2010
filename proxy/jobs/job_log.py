"""Logs jobs: one line at the end, and at the level debug one at the start.

Invariant: SQL and messages may quote secrets, so the log has only the SQLSTATE; with
``log_job_sql`` also the beginning of the SQL.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Final

from proxy.config import Config
from proxy.jobs.job import Job
from proxy.log import Event, Milliseconds, Value, logger
from proxy.sql.recoding import readable

OFF: Final = -1
"""The value of log_min_job_duration that logs no job."""

_MILLISECOND: Final = timedelta(milliseconds=1)


def started(job: Job, config: Config) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(Event("job launched", _names(job) | _sql(job, config)))


def ended(job: Job, config: Config) -> None:
    assert job.finished_at is not None
    took = (job.finished_at - job.launched_at) / _MILLISECOND
    failed = job.error is not None or job.is_abandoned
    least = config.log_min_job_duration
    if least == OFF or not (failed or took >= least):
        return
    values: dict[str, Value] = {
        "state": job.state_for_operators,
        "duration": Milliseconds(took),
        "rows": None if failed else job.row_count,
        "sqlstate": None if job.error is None else job.error.sqlstate,
    }
    logger.info(Event("job ended", _names(job) | values | _sql(job, config)))


def _names(job: Job) -> dict[str, Value]:
    return {
        "pid": job.pid or None,
        "label": None if job.label is None else readable(job.label, job.encoding),
        "user": _text(job.user),
        "database": _text(job.database),
    }


def _sql(job: Job, config: Config) -> dict[str, Value]:
    return {"sql": readable(job.preview, job.encoding)} if config.log_job_sql else {}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
