"""Dates, times and intervals.

Invariant: the text has DateStyle ISO (any order of day and month) and IntervalStyle postgres, the
defaults and what drivers set. Other styles are ambiguous (is 01/02/2024 in January?) and raise a
`ProtocolViolation` that says so.

In binary, dates are days since 2000-01-01; times of day and timestamps are microseconds (timestamps
since 2000-01-01 00:00:00, in UTC if they have a time zone). The largest and smallest number are
infinity and -infinity. The calendar is proleptic Gregorian, with 1 AD after 1 BC; Python's datetime
spans only 1 to 9999 AD, so it is not used.
"""

from __future__ import annotations

import re
import struct

from protocol.wire import ProtocolViolation

_DATE = rb"([0-9]{4,7})-([0-9]{2})-([0-9]{2})"
_MINUTES = rb":([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,6}))?"
_TIME = rb"([0-9]{2})" + _MINUTES
_ZONE = rb"([+-])([0-9]{2})(?::([0-9]{2})(?::([0-9]{2}))?)?"
_DATE_TEXT = re.compile(rb"%b( BC)?" % _DATE)
_TIMESTAMP_TEXT = re.compile(rb"%b %b( BC)?" % (_DATE, _TIME))
_TIMESTAMPTZ_TEXT = re.compile(rb"%b %b%b( BC)?" % (_DATE, _TIME, _ZONE))
_TIME_TEXT = re.compile(_TIME)
_TIMETZ_TEXT = re.compile(_TIME + _ZONE)
_INTERVAL_TEXT = re.compile(
    rb"(?:([+-]?[0-9]{1,10}) years?(?: |$))?"
    rb"(?:([+-]?[0-9]{1,10}) mons?(?: |$))?"
    rb"(?:([+-]?[0-9]{1,10}) days?(?: |$))?"
    rb"(?:([+-]?)([0-9]{2,10})%b)?" % _MINUTES
)

_DAY = 86_400_000_000
_INT4_MAX, _INT8_MAX = 2**31 - 1, 2**63 - 1
_DATE_INFINITY = {
    b"infinity": struct.pack(">i", _INT4_MAX),
    b"-infinity": struct.pack(">i", -_INT4_MAX - 1),
}
_TIMESTAMP_INFINITY = {
    b"infinity": struct.pack(">q", _INT8_MAX),
    b"-infinity": struct.pack(">q", -_INT8_MAX - 1),
}
_INTERVAL_INFINITY = {
    b"infinity": struct.pack(">qii", _INT8_MAX, _INT4_MAX, _INT4_MAX),
    b"-infinity": struct.pack(">qii", -_INT8_MAX - 1, -_INT4_MAX - 1, -_INT4_MAX - 1),
}

_MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_Groups = tuple[bytes | None, ...]


def date(text: bytes) -> bytes:
    """Days since 2000-01-01, as int4."""
    if text in _DATE_INFINITY:
        return _DATE_INFINITY[text]
    *ymd, bc = _match(_DATE_TEXT, text, "date")
    return _pack(">i", "date", _days(ymd, bc, "date"))


def timestamp(text: bytes) -> bytes:
    """Microseconds since 2000-01-01 00:00:00, as int8."""
    if text in _TIMESTAMP_INFINITY:
        return _TIMESTAMP_INFINITY[text]
    groups = _match(_TIMESTAMP_TEXT, text, "timestamp")
    days = _days(groups[:3], groups[7], "timestamp")
    return _pack(">q", "timestamp", days * _DAY + _time_of_day(groups[3:7], "timestamp"))


def timestamptz(text: bytes) -> bytes:
    """Microseconds since 2000-01-01 00:00:00 UTC, as int8."""
    if text in _TIMESTAMP_INFINITY:
        return _TIMESTAMP_INFINITY[text]
    groups = _match(_TIMESTAMPTZ_TEXT, text, "timestamptz")
    local = _days(groups[:3], groups[11], "timestamptz") * _DAY
    local += _time_of_day(groups[3:7], "timestamptz")
    return _pack(">q", "timestamptz", local - _offset(groups[7:11]) * 1_000_000)


def time(text: bytes) -> bytes:
    """Microseconds since midnight, as int8."""
    return _pack(">q", "time", _time_of_day(_match(_TIME_TEXT, text, "time"), "time"))


def timetz(text: bytes) -> bytes:
    """Microseconds since local midnight, as int8, and the zone, seconds *west* of UTC, as int4."""
    groups = _match(_TIMETZ_TEXT, text, "timetz")
    return _pack(">qi", "timetz", _time_of_day(groups[:4], "timetz"), -_offset(groups[4:]))


def interval(text: bytes) -> bytes:
    """Microseconds as int8, days as int4, months as int4: three fields, each with its own sign."""
    if text in _INTERVAL_INFINITY:
        return _INTERVAL_INFINITY[text]
    years, months, days, sign, *hms = _match(_INTERVAL_TEXT, text, "interval")
    if not text or text.endswith(b" "):
        raise _bad_text("interval")
    microseconds = _microseconds(tuple(hms))
    return _pack(
        ">qii",
        "interval",
        -microseconds if sign == b"-" else microseconds,
        int(days or 0),
        int(years or 0) * 12 + int(months or 0),
    )


def _days(ymd: list[bytes | None] | _Groups, bc: bytes | None, type_name: str) -> int:
    """Days from 2000-01-01 to this date."""
    year, month, day = (int(number or 0) for number in ymd)
    if not (year and 1 <= month <= 12):
        raise _bad_text(type_name)
    if bc:
        year = 1 - year
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if not 1 <= day <= _MONTH_DAYS[month - 1] + (month == 2 and leap):
        raise _bad_text(type_name)
    before = year - 1  # whole years from the start of the year 1, and their leap days
    days = before * 365 + before // 4 - before // 100 + before // 400
    days += sum(_MONTH_DAYS[: month - 1]) + (month > 2 and leap) + day - 1
    return days - 730_119


def _microseconds(hms: _Groups) -> int:
    hours, minutes, seconds, fraction = hms
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return whole * 1_000_000 + int((fraction or b"").ljust(6, b"0"))


def _time_of_day(hms: _Groups, type_name: str) -> int:
    microseconds = _microseconds(hms)
    if microseconds > _DAY:  # 24:00:00 is valid
        raise _bad_text(type_name)
    return microseconds


def _offset(zone: _Groups) -> int:
    """Seconds east of UTC."""
    sign, hours, minutes, seconds = zone
    offset = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return -offset if sign == b"-" else offset


def _match(pattern: re.Pattern[bytes], text: bytes, type_name: str) -> _Groups:
    match = pattern.fullmatch(text)
    if match is None:
        raise _bad_text(type_name)
    return match.groups()


def _pack(form: str, type_name: str, *numbers: int) -> bytes:
    try:
        return struct.pack(form, *numbers)
    except struct.error:
        raise _bad_text(type_name) from None


def _bad_text(type_name: str) -> ProtocolViolation:
    style = "IntervalStyle postgres" if type_name == "interval" else "DateStyle ISO"
    return ProtocolViolation(f"cannot convert this text of type {type_name}: it is not {style}")
