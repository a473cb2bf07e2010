"""Readers of values: each converts a setting's text, or raises ValueError.

Invariant: the message is one line and names the text, not the setting, which the caller knows.
"""

from __future__ import annotations

import ipaddress
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias

from proxy.config.gucs import parse_time_ms
from proxy.reasons import explain

MAX_PROCESSES: Final = 256

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

Sender: TypeAlias = Network | Literal["unix"]
"""Who may send PROXY protocol headers: a network, or clients of a Unix socket."""


def parse_seconds(text: str) -> float:
    """Reads a time such as ``500ms`` or ``2min``; a bare number is seconds."""
    seconds = parse_time_ms(text, unit="s") / 1000
    if seconds < 0:
        raise ValueError(f'invalid value: "{text}" is negative')
    return seconds


def parse_command(text: str) -> tuple[str, ...]:
    """Reads a program and its arguments, quoted as for a shell."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"invalid command: {str(error).lower()}") from None
    if not words:
        raise ValueError("invalid command: it is empty")
    return words


def parse_network(text: str) -> Network:
    """Reads an address or a network: ``192.0.2.7``, ``192.0.2.0/24``, ``2001:db8::/32``."""
    try:
        return ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise ValueError(f"invalid network: {error}") from None


def parse_timeout(text: str) -> float:
    """Reads a time like `parse_seconds`, or ``unlimited``, which is infinite."""
    return math.inf if text.strip().lower() == "unlimited" else parse_seconds(text)


def parse_path(text: str) -> Path:
    """Reads the path of a file that need not exist."""
    if not text.strip():
        raise ValueError("invalid path: it is empty")
    return Path(text).expanduser().absolute()


def parse_sender(text: str) -> Sender:
    """Reads an address or a network, or ``unix``."""
    return "unix" if text.strip().lower() == "unix" else parse_network(text)


def parse_min_duration(text: str) -> int:
    """Reads a minimum duration in milliseconds; -1 means never."""
    milliseconds = parse_time_ms(text)
    if milliseconds < -1:
        raise ValueError(f'invalid value: "{text}" (-1 or more)')
    return milliseconds


def parse_file(text: str) -> Path:
    """Reads the path of a readable file."""
    path = Path(text).expanduser()
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"cannot read {path}: {explain(error)}") from None


def parse_api_version(text: str) -> int:
    """Reads 1 or 2, also as 1.0 or 2.0."""
    if text.removesuffix(".0") not in ("1", "2"):
        raise ValueError(f'invalid API version: "{text}" (1 or 2)')
    return int(text[0])


def parse_switch(text: str) -> bool:
    """Reads on or off."""
    return one_of("on", "off")(text) == "on"


def one_of(*choices: str) -> Callable[[str], str]:
    """A reader of one of these words, in any case."""

    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f'invalid value: "{text}" (allowed: {", ".join(choices)})')
        return text.lower()

    return read


def parse_workers(text: str) -> int:
    """Reads a number of processes; ``auto`` means one for each available core."""
    if text.strip().lower() == "auto":
        affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    count = parse_count(text)
    if not 1 <= count <= MAX_PROCESSES:
        raise ValueError(f'invalid value: "{text}" (allowed: auto, 1 to {MAX_PROCESSES})')
    return count


def parse_count(text: str) -> int:
    """Reads a whole number, 0 to 2,147,483,647."""
    if not text.strip().isdecimal() or int(text) > 2**31 - 1:
        raise ValueError(f'invalid value: "{text}" is not a whole number')
    return int(text)
