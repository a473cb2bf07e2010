"""A caller's request to launch a job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """The arguments of one call that launches.

    Attributes:
        sql: what the job runs.
        queue_size: for its results, in bytes; 0 or less means the setting's.
        label: of the job.
        keeps_rows: whether its rows are kept to be fetched.
        retries: how many attempts may follow one that fails by chance; then no rows are kept.
        may_queue: whether it is queued if there is no room and pg_background.queue is on.
    """

    sql: bytes
    queue_size: int = 0
    label: bytes | None = None
    keeps_rows: bool = True
    retries: int = 0
    may_queue: bool = False
