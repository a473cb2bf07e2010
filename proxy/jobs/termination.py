"""Ends a cancelled job for certain: the server terminates its backend.

Invariant: code can catch a cancel request, but no termination: once the server has it, nothing more
of the job commits. A job counts as canceled only if its transaction had not committed. The pid is
the job's as long as its connection is open, so this stays open until the server has answered.
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

LendChannel = Callable[[], Awaitable[Channel]]
"""Lends a channel with a job's login. Raises SQLError, OSError, ProtocolViolation."""

_TERMINATE: Final = b"""
SELECT CAST(a.backend_xid AS pg_catalog.text),
       pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot()),
       pg_catalog.pg_terminate_backend(a.pid)
FROM pg_catalog.pg_stat_get_activity(%d) a"""

_STATUS: Final = b"SELECT pg_catalog.txid_status(%d)"

_LOOK_AGAIN: Final = 0.02
"""Seconds before checking again on a transaction whose backend is still ending it."""


class Termination:
    """The termination of one job.

    Attributes:
        sent: resolved after the attempt: whether the server was told, or had nothing to stop.
        is_sent: whether the server may have been told.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.is_sent = False
        self._is_asking = False
        self._ended: Backend | None = None
        # The job's transaction ID at that time; None if it had written nothing.
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
        """Close the connection of a job that has ended, once its pid may be reused."""
        if self._is_asking:
            self._ended = backend
        else:
            backend.terminate()

    async def has_rolled_back(self, channel: Channel) -> bool:
        """Whether the job's transaction has certainly aborted; its connection is closed.

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
    """The 64-bit transaction ID nearest to `near` whose lower half is `xid`."""
    return near - ((near - xid + 2**31) % 2**32 - 2**31)


def canceled(fatal: ErrorResponse | None) -> ErrorResponse:
    """The error of a job that was cancelled by termination: that of a cancel request. `fatal`: the
    server's own error, whose CONTEXT tells where the job was."""
    error = SQLError(QUERY_CANCELED, "canceling statement due to user request").response()
    context = None if fatal is None else fatal.fields.get("W")
    return error if context is None else error.with_fields(W=context)


def lost_connection(pid: int, error: Exception, fatal: ErrorResponse | None) -> ErrorResponse:
    """The error of a job whose connection was lost. `fatal`: the server's last error."""
    reason = fatal.message.decode("utf-8", "replace") if fatal else explain(error)
    return SQLError(
        CONNECTION_FAILURE,
        f"lost connection to worker process with PID {pid}",
        detail=f"{reason[:1].upper()}{reason[1:]}.",
    ).response()
