"""The settings ``pg_background.*`` of a session, and PostgreSQL's notation for sizes and times.

Invariant: values are read and shown as by guc.c: ``64kB``, ``5min``, ``1.5MB``, a bare number in
the setting's own unit, units case-sensitive. A ValueError has a message for the user.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_MEMORY_UNITS: Final[Mapping[str, float]] = {
    "B": 1,
    "kB": 1024,
    "MB": 1024**2,
    "GB": 1024**3,
    "TB": 1024**4,
}
_TIME_UNITS: Final[Mapping[str, float]] = {
    "us": 0.001,
    "ms": 1,
    "s": 1000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}
# By `Guc.unit`. A plain number has the single unit "".
_UNITS: Final[Mapping[str, Mapping[str, float]]] = {
    "": {"": 1},
    "B": _MEMORY_UNITS,
    "ms": _TIME_UNITS,
}
_VALUE: Final = re.compile(
    r"\s*(?P<number>[+-]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))"
    r"\s*(?P<unit>[A-Za-z]*)\s*",
    re.ASCII,
)
# The settings' own limits are tighter; this only keeps numbers printable.
_LARGEST: Final = 2**63


def parse_memory(text: str) -> int:
    """Reads a size such as ``64kB``, in bytes; a bare number is bytes."""
    return _parse(text, _MEMORY_UNITS, "B")


def parse_time_ms(text: str, *, unit: str = "ms") -> int:
    """Reads a time such as ``5min``, in milliseconds; a bare number is in `unit`."""
    return _parse(text, _TIME_UNITS, unit)


def _parse(text: str, units: Mapping[str, float], default_unit: str) -> int:
    match = _VALUE.fullmatch(text)
    if match is None:
        raise ValueError(f'invalid value: "{text}"')
    unit = match["unit"] or default_unit
    if unit not in units and default_unit == "":
        raise ValueError(f'invalid value: "{text}"')
    if unit not in units:
        names = [f'"{name}"' for name in units]
        listed = f"{', '.join(names[:-1])}, and {names[-1]}"
        raise ValueError(f'invalid value: "{text}"; valid units are {listed}')
    try:
        number = _number(match["number"]) * units[unit]
    except ValueError:
        raise ValueError(f'invalid value: "{text}"') from None
    if not abs(number) < _LARGEST:
        raise ValueError(f'invalid value: "{text}"; value exceeds integer range')
    return round(number)  # halves to even, as rint() does


def _number(digits: str) -> float:
    sign, body = (-1, digits[1:]) if digits[0] == "-" else (1, digits.removeprefix("+"))
    if body[:2] in ("0x", "0X"):
        return sign * int(body, 16)
    if re.match("0[0-7]*[89]", body):
        raise ValueError("strtol() with base 0 stops there")
    if body.isdigit() and body[0] == "0" and set(body) <= set("01234567"):
        return sign * int(body, 8)  # as strtol() with base 0
    return sign * (int(body) if body.isdigit() and len(body) < 20 else float(body))


def _format(value: int, units: Mapping[str, float]) -> str:
    if value <= 0:
        return str(value)
    fitting = [name for name, factor in units.items() if factor >= 1 and value % factor == 0]
    return f"{value // int(units[fitting[-1]])}{fitting[-1]}"


@dataclass(frozen=True, slots=True)
class Guc:
    """One setting of a session: its name, default, and range, in bytes or milliseconds."""

    name: str
    default: str
    minimum: int
    maximum: int
    unit: str = ""
    """``B``, ``ms``, or empty for a plain number."""

    def parse(self, text: str) -> int:
        """Reads a value: a number, bytes or milliseconds.

        Raises:
            ValueError: malformed or out of range, in PostgreSQL's words.
        """
        try:
            value = _parse(text, _UNITS[self.unit], self.unit)
            if self.maximum < 2**31 <= abs(value):  # not an int in the server
                raise ValueError("; value exceeds integer range")
        except ValueError as error:
            detail = str(error).partition("; ")[2]
            message = f'invalid value for parameter "{self.name}": "{text}"'
            raise ValueError(f"{message}; {detail}" if detail else message) from None
        if not self.minimum <= value <= self.maximum:
            unit = f" {self.unit}" if self.unit else ""
            raise ValueError(
                f'{value}{unit} is outside the valid range for parameter "{self.name}"'
                f" ({self.minimum}{unit} .. {self.maximum}{unit})"
            )
        return value

    def show(self, text: str) -> str:
        """The value as SHOW prints it: 65536 bytes as ``64kB``. Raises as `parse` does."""
        return _format(self.parse(text), _UNITS[self.unit])


class Switch(Guc):
    """A setting that is on or off: 1 or 0."""

    __slots__ = ()

    def parse(self, text: str) -> int:
        """Reads PostgreSQL's Boolean values, which may be abbreviated."""
        word = text.strip().lower()
        found = {
            value
            for name, value in _SWITCHES.items()
            if word and name.startswith(word) and not (word == "o" and name in ("on", "off"))
        }
        if len(found) != 1:
            raise ValueError(f'parameter "{self.name}" requires a Boolean value')
        return found.pop()

    def show(self, text: str) -> str:
        return "on" if self.parse(text) else "off"


_SWITCHES: Final = {"on": 1, "true": 1, "yes": 1, "1": 1, "off": 0, "false": 0, "no": 0, "0": 0}

MAX_WORKERS: Final = Guc("pg_background.max_workers", "16", 1, 1000)
DEFAULT_QUEUE_SIZE: Final = Guc("pg_background.default_queue_size", "64kB", 4096, 268_435_456, "B")
WORKER_TIMEOUT: Final = Guc("pg_background.worker_timeout", "0", 0, 2_147_483_647, "ms")
LAUNCH_TIMEOUT: Final = Guc("pg_background.launch_timeout", "0", 0, 2_147_483_647, "ms")
LAUNCH_AT_COMMIT: Final = Switch("pg_background.launch_at_commit", "off", 0, 1)
QUEUE: Final = Switch("pg_background.queue", "off", 0, 1)

# Objects in databases know the first ones, so new ones go to the end.
GUCS: Final[Mapping[str, Guc]] = {
    guc.name: guc
    for guc in (
        MAX_WORKERS,
        DEFAULT_QUEUE_SIZE,
        WORKER_TIMEOUT,
        LAUNCH_TIMEOUT,
        LAUNCH_AT_COMMIT,
        QUEUE,
    )
}
SESSION_SETTING: Final = b"pg_background_proxy.session"
"""The setting that the proxy puts into a session's startup packet: 32 hexadecimal digits that begin
the session's messages, and 32 secret ones."""


def session_secret() -> bytes:
    """A new value of SESSION_SETTING."""
    return secrets.token_hex(32).encode()


JOB_SETTING: Final = b"pg_background_proxy.job"
"""The setting of a job's backend: the word that begins its progress reports."""
