"""The log: one event a line on stderr, in the form of PostgreSQL's own log.

Everything logs to the logger ``proxy``. Passwords and keys are never logged, and SQL only at the
level debug.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Final, TextIO

logger: Final = logging.getLogger("proxy")

# PostgreSQL's names: what an operator reads in the server's log, in the same place.
_SEVERITIES: Final = {"INFO": "LOG", "CRITICAL": "FATAL"}


class PostgresFormatter(logging.Formatter):
    """``2026-11-22 06:40:01.123 UTC [4711] LOG:  listening on 127.0.0.1:6543``.

    `who`: which of several processes this is; it stands behind the pid.
    """

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who and f" {who}"

    def format(self, record: logging.LogRecord) -> str:
        """Writes one event; further lines of it begin with a tab, so none can pass for another."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        severity = _SEVERITIES.get(record.levelname, record.levelname)
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        text = text.replace("\r", "\\r").replace("\n", "\n\t")
        return (
            f"{when}.{int(record.msecs):03d} UTC [{record.process}]{self._who} {severity}:  {text}"
        )


def configure(level: str, stream: TextIO | None = None, *, who: str = "") -> None:
    """Sends the log to stderr from a level on: debug, info, warning or error. `who`: which of
    several processes this is."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(PostgresFormatter(who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")  # libraries
    set_level(level)


def set_level(level: str) -> None:
    """From now on: debug, info, warning or error."""
    logger.setLevel(level.upper())
