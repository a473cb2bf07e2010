"""The certain end of a job that is cancelled: the server terminates its backend.

Invariant: no code catches a termination, as it may a cancel request: once the server has it,
nothing more of the job commits. A job counts as canceled only if its transaction did not commit
before. The pid is the job's as long as its connection is open, so that is held until the server has
answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from protocol.errors import CONNECTION_FAILURE, QUERY_CANCELED, SQLError
from protocol.messages import ErrorResponse
from proxy.backends.backend import Backend, number
from proxy.backends.channels import Channel
from proxy.reasons import explain

Lease = Callable[[], Awaitable[Channel]]
"""Lends a channel of the login role that the job's backend has. Raises SQLError, OSError."""

_TERMINATE: Final = b"""
SELECT CAST(a.backend_xid AS pg_catalog.text),
       pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot()),
       pg_catalog.pg_terminate_backend(a.pid)
FROM pg_catalog.pg_stat_get_activity(%d) a"""

_STATUS: Final = b"SELECT pg_catalog.txid_status(%d)"

_LOOK_AGAIN: Final = 0.02
"""Seconds between looks at a transaction whose backend is still ending it."""


class Termination:
    """Of one job.

    Attributes:
        sent: done when the server was told; whether that is so, or there is nothing to stop.
        is_sent: whether the server may have been told.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.is_sent = False
        self._is_asking = False
        self._ended: Backend | None = None
        # The transaction ID that the job had then; None if it had not written anything.
        self._xid: int | None = None
        self._found = False

    async def send(self, channel: Channel) -> None:
        """Have the server terminate the backend. Raises ServerError, OSError, ProtocolViolation."""
        self.is_sent = self._is_asking = True
        try:
            rows = await channel.query(_TERMINATE % self._pid)
        finally:
            self._is_asking = False
            if self._ended is not None:
                self._ended.terminate()
        for xid, xmax, _ in rows:
            self._found = True
            self._xid = None if xid is None else _with_epoch(number(xid), number(xmax))

    def let_go(self, backend: Backend) -> None:
        """Close the connection of the job, which has ended, as soon as its pid need not stay its
        own."""
        if self._is_asking:
            self._ended = backend
        else:
            backend.terminate()

    async def has_rolled_back(self, channel: Channel) -> bool:
        """Whether the job's transaction is aborted for certain, now that its connection is closed.

        Raises ServerError, OSError, ProtocolViolation.
        """
        if self._xid is None:
            return self._found
        while True:
            [(status,)] = await channel.query(_STATUS % self._xid)
            if status != b"in progress":
                return status == b"aborted"
            await asyncio.sleep(_LOOK_AGAIN)


def _with_epoch(xid: int, near: int) -> int:
    """The transaction ID of 64 bits whose lower half is `xid`, and which is nearest to another."""
    return near - ((near - xid + 2**31) % 2**32 - 2**31)


def canceled(fatal: ErrorResponse | None) -> ErrorResponse:
    """The error of a job that was terminated because it was to be cancelled: what a cancel request
    gives. `fatal`: what the server said; where the job was then, it says in CONTEXT."""
    error = SQLError(QUERY_CANCELED, "canceling statement due to user request").response()
    context = None if fatal is None else fatal.fields.get("W")
    return error if context is None else error.with_fields(W=context)


def lost_connection(pid: int, error: Exception, fatal: ErrorResponse | None) -> ErrorResponse:
    """The error of a job whose connection ended. `fatal`: what the server said before that."""
    reason = fatal.message.decode("utf-8", "replace") if fatal else explain(error)
    return SQLError(
        CONNECTION_FAILURE,
        f"lost connection to worker process with PID {pid}",
        detail=f"{reason[:1].upper()}{reason[1:]}.",
    ).response()
