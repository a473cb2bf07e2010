"""A statement that waits in the server while the test goes on."""

from __future__ import annotations

import threading
from typing import Any, Final

import psycopg

from tests.support.background import wait_until
from tests.support.in_database import one
from tests.support.servers import Connection

WAITING: Final = (
    "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event IN ('PgSleep', 'advisory')"
)
"""Whether the server shows that a session waits."""


class Statement:
    """A statement in a thread of its own."""

    def __init__(self, conn: Connection, sql: str) -> None:
        self._value: Any = None
        self._error: psycopg.Error | None = None

        def run() -> None:
            try:
                self._value = one(conn, sql)
            except psycopg.Error as error:
                self._error = error

        self._conn = conn
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the statement has ended."""
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Sends a cancel request while the statement runs."""
        self._conn.cancel_safe(timeout=20)

    def join(self) -> None:
        """Waits for the statement's end."""
        self._thread.join(30)
        assert self.is_over

    @property
    def value(self) -> Any:
        """The value that the statement returns."""
        self.join()
        assert self._error is None, self._error
        return self._value

    @property
    def error(self) -> psycopg.Error:
        """The error of the statement."""
        self.join()
        assert self._error is not None, self._value
        return self._error

    def wait_until_it_waits(self, observer: Connection) -> None:
        """Waits until the server shows that the statement waits."""
        pid = self._conn.info.backend_pid
        wait_until(lambda: observer.execute(WAITING, [pid]).fetchone())
        assert not self.is_over
