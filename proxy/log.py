"""The log: one event a line on stderr, in the form of PostgreSQL's own log.

Invariant: text from clients and servers stays text. No control character of it reaches a terminal,
and no line of it can be taken for an event.

Everything logs to the logger ``proxy``. Passwords and keys are never logged, and SQL only at the
level debug.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Final

logger: Final = logging.getLogger("proxy")

# The names in PostgreSQL's log.
_SEVERITIES: Final = {"INFO": "LOG", "CRITICAL": "FATAL"}

_HARMFUL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # changes of direction
    "\u2028\u2029\ud800-\udfff]"  # line and paragraph separators; surrogates
)


def printable(text: str) -> str:
    """The text with control characters written as escapes.

    Line feeds and tabs stay: the caller sees to the beginning of lines.
    """
    return _HARMFUL.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


class PostgresFormatter(logging.Formatter):
    """``2026-11-22 06:40:01.123 UTC [4711] LOG:  listening on 127.0.0.1:6543``.

    `who`: the name of this process, if there are several; it follows the pid.
    """

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who and f" {who}"

    def format(self, record: logging.LogRecord) -> str:
        """Formats one event. Further lines begin with a tab, so none can be taken for an event."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        severity = _SEVERITIES.get(record.levelname, record.levelname)
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        text = printable(text).replace("\n", "\n\t")
        return (
            f"{when}.{int(record.msecs):03d} UTC [{record.process}]{self._who} {severity}:  {text}"
        )


def configure(level: str, *, who: str = "") -> None:
    """Sends the log to stderr, from a level on: debug, info, warning or error. `who`: the name of
    this process, if there are several."""
    handler = logging.StreamHandler()
    handler.setFormatter(PostgresFormatter(who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")  # libraries
    set_level(level)


def set_level(level: str) -> None:
    """Logs from a level on: debug, info, warning or error."""
    logger.setLevel(level.upper())
