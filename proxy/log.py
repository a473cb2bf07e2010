"""The log: one event a line on stderr, in the form of PostgreSQL's own log, or as JSON.

Invariant: text from clients and servers stays text: its control characters never reach a terminal,
and none of its lines can be taken for an event. Nobody waits for the log: a thread writes it, and
what piles up unread is dropped, counted, and reported later.

Everything logs to the logger ``proxy``. Messages to be searched or counted are `Event`s, whose
values have their own keys in JSON. Passwords, keys and error messages of clients' SQL, which may
quote values, are never logged; SQL itself only with ``log_job_sql``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Final

logger: Final = logging.getLogger("proxy")

_STDERR: Final = 2

# The names in PostgreSQL's log
_SEVERITIES: Final = {"INFO": "LOG", "CRITICAL": "FATAL"}

_HARMFUL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # changes of direction
    "\u2028\u2029\ud800-\udfff]"  # line and paragraph separators; surrogates
)


def printable(text: str) -> str:
    """The text with control characters written as escapes.

    Line feeds and tabs stay: the caller takes care of the beginnings of lines.
    """
    return _HARMFUL.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


# Values that need no quotes, since their end is clear
_PLAIN: Final = re.compile(r"[^\s\"=\\]*")

_KEYS: Final = {
    "user": "user",
    "database": "dbname",
    "host": "remote_host",
    "port": "remote_port",
    "sqlstate": "state_code",
    "sql": "statement",
    "pid": "backend_pid",
    "duration": "duration_ms",
}
"""Names in a line of text and the keys in JSON where they differ. These are PostgreSQL's jsonlog's,
if it has such a key; its ``pid`` is the logging process."""


class Milliseconds(float):
    """A duration: ``12.345ms`` in a line of text, a number in JSON."""

    def __str__(self) -> str:
        return f"{float(self):.3f}ms"


Value = str | int | Milliseconds | None


class Event:
    """An event with values: ``job ended: pid=4711 user=alice state=error``.

    Args:
        name: of the event.
        values: by name; None is omitted.
        text: replaces the values in the message.
    """

    __slots__ = ("_text", "name", "values")

    def __init__(self, name: str, values: Mapping[str, Value], text: str | None = None) -> None:
        self.name = name
        self.values = values
        self._text = text

    def __str__(self) -> str:
        return f"{self.name}: {listed(self.values) if self._text is None else self._text}"


def listed(values: Mapping[str, Value]) -> str:
    """``name=value``, separated by blanks; values that need it are in double quotes."""
    return " ".join(f"{name}={_word(value)}" for name, value in values.items() if value is not None)


def _word(value: str | int | Milliseconds) -> str:
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    for mark, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(mark, escape)
    return f'"{text}"'


class PostgresFormatter(logging.Formatter):
    """``2026-11-22 06:40:01.123 UTC [4711] LOG:  listening on 127.0.0.1:6543``.

    `who`: the name of this process, if there are several; follows the pid.
    """

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who and f" {who}"

    def format(self, record: logging.LogRecord) -> str:
        """Formats one event. Further lines begin with a tab, so none can be taken for an event."""
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        text = printable(text).replace("\n", "\n\t")
        return f"{_when(record)} [{record.process}]{self._who} {_severity(record)}:  {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Its keys are in docs/operation.md.

    `who`: the name of this process, if there are several.
    """

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Value] = {
            "timestamp": _when(record),
            "pid": record.process,
            "error_severity": _severity(record),
            "message": record.getMessage(),
        }
        if self._who:
            said["process"] = self._who
        if isinstance(record.msg, Event):
            event = record.msg
            said["event"] = event.name
            said |= {_KEYS.get(name, name): value for name, value in event.values.items()}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        given = {key: value for key, value in said.items() if value is not None}
        text = json.dumps(given, ensure_ascii=False, separators=(",", ":"))
        return _HARMFUL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _when(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d} UTC"


def _severity(record: logging.LogRecord) -> str:
    return _SEVERITIES.get(record.levelname, record.levelname)


_FORMATTERS: Final[Mapping[str, type[PostgresFormatter | JsonFormatter]]] = {
    "text": PostgresFormatter,
    "json": JsonFormatter,
}
FORMATS: Final = tuple(_FORMATTERS)


_MAX_UNWRITTEN: Final = 4 * 1024 * 1024
"""Bytes of the log that may wait to be written."""

_LAST_WORDS: Final = 1.0
"""Seconds to wait for the log at the end, at most twice."""


class BackgroundHandler(logging.Handler):
    """Writes to a file descriptor, in a thread of its own.

    Args:
        fd: the descriptor; an error, such as a full disk, loses the events concerned.
        most: bytes that may wait. A single event may always wait, however long.
    """

    def __init__(self, fd: int, most: int = _MAX_UNWRITTEN) -> None:
        super().__init__()
        self._fd = fd
        self._most = most
        self._waiting: deque[bytes] = deque()
        self._size = 0  # of events that wait or are being written
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue an event, or drop it."""
        event = self._bytes(record)
        with self._changed:
            if self._size and self._size + len(event) > self._most:
                self._dropped += 1
                return
            self._own_up()
            self._put(event)
            self._changed.notify_all()

    def _bytes(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode("utf-8", "backslashreplace")

    def _put(self, event: bytes) -> None:
        self._waiting.append(event)
        self._size += len(event)

    def _own_up(self) -> None:
        if self._dropped:
            said = "dropped %d events of the log, which was not read fast enough"
            values = ("proxy", logging.WARNING, __file__, 0, said, (self._dropped,), None)
            self._dropped = 0
            self._put(self._bytes(logging.LogRecord(*values)))

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                events = self._next()
            with contextlib.suppress(OSError):
                self._write_all(events)
            with self._changed:
                self._size -= len(events)
                if not self._size:
                    self._own_up()
                self._changed.notify_all()

    def _next(self) -> bytes:
        """As many events as a pipe writes atomically, since other processes write to it too."""
        events = self._waiting.popleft()
        while self._waiting and len(events) + len(self._waiting[0]) <= select.PIPE_BUF:
            events += self._waiting.popleft()
        return events

    def _write_all(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody who shares it has made it non-blocking
                select.select([], [self._fd], [])

    def flush(self) -> None:
        """Wait a moment until everything is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._size, _LAST_WORDS)

    def close(self) -> None:
        """Write the rest; no more events come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join(_LAST_WORDS)
        super().close()


_name = ""
"""The name of this process, if there are several."""


def configure(level: str, format: str = "text", *, who: str = "") -> None:
    """Sends the log to stderr, from a level on: debug, info, warning or error. `format`: one of
    FORMATS. `who`: the name of this process, if there are several."""
    global _name
    _name = who
    if sys.stderr is None:
        # It was closed. No connection may get its number, or a client would receive the log.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
    root = logging.getLogger()
    root.handlers[:] = [BackgroundHandler(_STDERR)]
    root.setLevel("WARNING")  # libraries
    change(level, format)


def change(level: str, format: str) -> None:
    logger.setLevel(level.upper())
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_FORMATTERS[format](_name))


def flush() -> None:
    """Wait a moment until the log is written, since other output follows on stderr."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def is_json() -> bool:
    """Whether stderr carries JSON objects, one a line."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)
