"""Converts the functions' arguments and results between the server's text and Python values.

Invariant: text is in the encoding of its session, and stays bytes.
"""

from __future__ import annotations

from datetime import datetime, tzinfo
from typing import Any, Final

from protocol.errors import (
    INVALID_TEXT_REPRESENTATION,
    PROGRAM_LIMIT_EXCEEDED,
    ProtocolViolation,
    SQLError,
)
from protocol.values import parse_array
from protocol.values.records import parse_record, record_text
from proxy.api.functions import BOOL, HANDLES, TEXT, Type
from proxy.jobs.registry import NO_PID

_MAX_HANDLES_SIZE: Final = 256 * 1024
"""Bytes of an array of handles as text; each handle has about thirty characters."""


def decode_argument(type: Type, text: bytes | None) -> Any:
    """The Python value of an argument. Raises SQLError 22P02."""
    if text is None or type == TEXT:
        return text
    if type == BOOL:
        return text[:1] == b"t"
    if type != HANDLES:
        return int(text)
    if len(text) > _MAX_HANDLES_SIZE:
        raise SQLError(
            PROGRAM_LIMIT_EXCEEDED,
            "too many handles in one call",
            detail=f"The array has more than {_MAX_HANDLES_SIZE // 1024} kB.",
            hint="Call the function for some thousands of them at a time.",
        )
    try:
        handles = [parse_record(element or b"") for element in parse_array(text)]
        return [
            (NO_PID if pid is None else int(pid), int(cookie or b"")) for pid, cookie in handles
        ]
    except (ValueError, ProtocolViolation):
        raise SQLError(
            INVALID_TEXT_REPRESENTATION,
            f"invalid input syntax for type {type.name}",
            detail="Each handle is a pair of pid and cookie.",
        ) from None


def text_form(value: Any, type: Type, zone: tzinfo) -> bytes | None:
    """A value as PostgreSQL prints it, timestamps in this time zone. Text is unchanged."""
    if value is None or isinstance(value, bytes):
        return value
    if type.columns:
        pairs = zip(value, type.columns, strict=False)
        return record_text([text_form(part, column.type, zone) for part, column in pairs])
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, datetime):
        return _timestamptz(value.astimezone(zone)).encode()
    if isinstance(value, float):
        text = repr(value)
        return text.removesuffix(".0").encode()
    return str(value).encode()


def _timestamptz(value: datetime) -> str:
    text = value.replace(tzinfo=None).isoformat(sep=" ")
    if value.microsecond:
        text = text.rstrip("0")
    offset = value.strftime("%z")
    hours, rest = offset[:3], offset[3:]
    groups = [rest[i : i + 2] for i in range(0, len(rest), 2)]
    while groups and groups[-1] == "00":
        groups.pop()
    return f"{text}{':'.join([hours, *groups])}"
