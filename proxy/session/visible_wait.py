"""Makes the wait of a direct call visible in the server, where the session would look idle.

Invariant: while a call waits for longer than `VISIBLE_AFTER`, its primary backend sleeps, again and
again. So pg_stat_activity shows an active session with the client's statement, timeouts for idle
sessions do not apply, and what ends a statement there ends the call: pg_cancel_backend(),
pg_terminate_backend(), a shutdown of the server. The next sleep is queued in the server before the
last one ends; a cancel between two would be lost, as in an idle session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

from proxy.jobs.interrupts import VISIBLE_AFTER
from proxy.jobs.registry import JobRecord
from proxy.session.exchange import Exchange

_SHARE: Final = 0.05
_SHORTEST: Final = 0.01
_LONGEST: Final = 0.5
"""A sleep takes this share of the time that the call has waited, within these bounds (seconds). The
client learns of the end of the job at most two sleeps late."""

_LAGS: Final = 4.0
"""A sleep takes at least this many times the last delay of our event loop, within the same bounds:
the next must be queued in time."""

_SHOWN: Final = 1000
"""Characters of the client's statement; pg_stat_activity shows 1024 bytes by default."""

_CONCURRENTLY: Final = b"concurrently"


class VisibleWait:
    """What the server does while one call waits (an `interrupts.ServerWait`)."""

    def __init__(self, primary: Exchange, statement: bytes, codec: str) -> None:
        """`statement`: the client's, in the encoding `codec`."""
        self._primary = primary
        self._statement = statement
        self._codec = codec

    def may_wait_for(self, jobs: Collection[JobRecord]) -> bool:
        """False if a job might wait for this transaction: CREATE INDEX CONCURRENTLY and the like
        wait for the end of all that have a snapshot."""
        return not any(_CONCURRENTLY in job.full_sql.lower() for job in jobs)

    async def until(self, done: asyncio.Future[None]) -> None:
        """Sleep in the server until `done`.

        Raises BatchFailedError, ConnectionError: the call was ended there.
        """
        primary, waited, comment = self._primary, VISIBLE_AFTER, self._comment()
        # If the call's transaction has ended, the sleeps are in another.
        reopened = await primary.reopen()
        clock = asyncio.get_running_loop().time
        seconds = lag = 0.0
        begun = clock()
        try:
            while not done.done():
                expected, seconds = seconds, max(waited * _SHARE, _SHORTEST, lag * _LAGS)
                seconds = min(seconds, _LONGEST)
                waited += seconds
                queued = primary.ask(
                    b"/* %b */ SELECT pg_catalog.pg_sleep(%.3f)" % (comment, seconds)
                )
                await primary.settle(leave=queued)
                begun, lag = clock(), clock() - begun - expected
            await primary.settle()
        finally:
            if reopened:
                primary.sync_ahead()

    def _comment(self) -> bytes:
        """The client's statement, made safe for a comment."""
        shown = self._statement.decode(self._codec, "ignore")[:_SHOWN]
        return shown.replace("/*", "/ *").replace("*/", "* /").encode(self._codec, "ignore")
