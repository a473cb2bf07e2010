"""Types whose value is a number, a byte string or an address.

Invariant: a conversion reads what the type's output function writes; anything else is a
`ProtocolViolation`. Binary forms are those of the types' send functions, which the manual does not
describe; so the docstrings here do.
"""

from __future__ import annotations

import binascii
import ipaddress
import re
import struct
from collections.abc import Callable

from protocol.wire import ProtocolViolation

_INTEGER = re.compile(rb"-?[0-9]{1,20}")
_FLOAT = re.compile(rb"(-?)(?:([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)|Infinity|NaN)")
_NUMERIC = re.compile(rb"(-?)([0-9]+)(?:\.([0-9]+))?")
_ESCAPED = re.compile(rb"\\(?:\\|([0-3][0-7][0-7]))|([^\\]+)")
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PG_LSN = re.compile(rb"([0-9A-F]{1,8})/([0-9A-F]{1,8})")
_MACADDR = re.compile(rb"[0-9a-f]{2}(?::[0-9a-f]{2}){5}(?:(?::[0-9a-f]{2}){2})?")
_INET = re.compile(rb"([0-9.]+|[0-9a-f:.]*:[0-9a-f:.]*)(?:/([0-9]{1,3}))?")

_NUMERIC_SPECIAL = {  # 0x20 is not a scale: numeric_send writes the infinities' flags there
    b"NaN": struct.pack(">HhHH", 0, 0, 0xC000, 0),
    b"Infinity": struct.pack(">HhHH", 0, 0, 0xD000, 0x20),
    b"-Infinity": struct.pack(">HhHH", 0, 0, 0xF000, 0x20),
}
_MAX_DISPLAY_SCALE = 0x3FFF


def bad_text(type_name: str) -> ProtocolViolation:
    """The error for malformed text, without the text: that is the user's data."""
    return ProtocolViolation(f"cannot convert this text of type {type_name} to its binary form")


def integer(type_name: str, code: str) -> Callable[[bytes], bytes]:
    """A conversion to the integer with `struct` code `code`."""
    form = struct.Struct(f">{code}")

    def convert(text: bytes) -> bytes:
        if not _INTEGER.fullmatch(text):
            raise bad_text(type_name)
        try:
            return form.pack(int(text))
        except struct.error:
            raise bad_text(type_name) from None

    return convert


def float_(type_name: str, code: str) -> Callable[[bytes], bytes]:
    """A conversion to the IEEE 754 number with `struct` code `code`."""
    form = struct.Struct(f">{code}")

    def convert(text: bytes) -> bytes:
        match = _FLOAT.fullmatch(text)
        if match is None or text == b"-NaN":
            raise bad_text(type_name)
        number = float(text)
        if match[2] and number in (float("inf"), float("-inf")):
            raise bad_text(type_name)
        try:
            return form.pack(number)
        except OverflowError:
            raise bad_text(type_name) from None

    return convert


def raw(text: bytes) -> bytes:
    """Character types: both forms are the same."""
    return text


def void(text: bytes) -> bytes:
    """Nothing, in either form."""
    if text:
        raise bad_text("void")
    return b""


def bool_(text: bytes) -> bytes:
    """One byte, 1 or 0."""
    if text == b"t":
        return b"\1"
    if text == b"f":
        return b"\0"
    raise bad_text("bool")


def char(text: bytes) -> bytes:
    r"""``"char"``: one byte. Its text is empty for NUL, and ``\ooo`` if the high bit is set."""
    if len(text) == 1:
        return text
    if not text:
        return b"\0"
    if len(text) == 4 and (match := _ESCAPED.fullmatch(text)) and match[1]:
        return bytes((int(match[1], 8),))
    raise bad_text("char")


def jsonb(text: bytes) -> bytes:
    """A version byte, then the text."""
    return b"\1" + text


def bytea(text: bytes) -> bytes:
    r"""The bytes themselves, from ``\x`` and hex digits or the older escape form."""
    if text.startswith(b"\\x"):
        try:
            return binascii.unhexlify(text[2:])
        except binascii.Error:
            raise bad_text("bytea") from None
    parts = []
    at = 0
    while at < len(text):
        match = _ESCAPED.match(text, at)
        if match is None:
            raise bad_text("bytea")
        octal, plain = match.groups()
        parts.append(plain or (bytes((int(octal, 8),)) if octal else b"\\"))
        at = match.end()
    return b"".join(parts)


def uuid(text: bytes) -> bytes:
    """Sixteen bytes."""
    if not _UUID.fullmatch(text):
        raise bad_text("uuid")
    return binascii.unhexlify(text.replace(b"-", b""))


def pg_lsn(text: bytes) -> bytes:
    """An unsigned 64-bit number; the text has its halves in hexadecimal."""
    match = _PG_LSN.fullmatch(text)
    if match is None:
        raise bad_text("pg_lsn")
    return struct.pack(">II", int(match[1], 16), int(match[2], 16))


def macaddr(type_name: str, size: int) -> Callable[[bytes], bytes]:
    """A conversion to `size` bytes."""

    def convert(text: bytes) -> bytes:
        digits = text.replace(b":", b"")
        if not _MACADDR.fullmatch(text) or len(digits) != 2 * size:
            raise bad_text(type_name)
        return binascii.unhexlify(digits)

    return convert


def network(type_name: str) -> Callable[[bytes], bytes]:
    """A conversion of inet or cidr: family (2 IPv4, 3 IPv6), bits of the netmask, whether it is a
    cidr, length, address."""

    def convert(text: bytes) -> bytes:
        match = _INET.fullmatch(text)
        if match is None:
            raise bad_text(type_name)
        try:
            address = ipaddress.ip_address(match[1].decode("ascii"))
        except ValueError:
            raise bad_text(type_name) from None
        bits = address.max_prefixlen if match[2] is None else int(match[2])
        if bits > address.max_prefixlen:
            raise bad_text(type_name)
        family = 2 if address.version == 4 else 3
        return bytes((family, bits, type_name == "cidr", len(address.packed))) + address.packed

    return convert


def numeric(text: bytes) -> bytes:
    """Digits in base 10000: their count, weight of the first, sign, display scale, digits.

    The value is the sum of digit[i] * 10000 ** (weight - i); zeros at either end are not stored.
    The display scale is the number of decimal places in the text.
    """
    if text in _NUMERIC_SPECIAL:
        return _NUMERIC_SPECIAL[text]
    match = _NUMERIC.fullmatch(text)
    if match is None:
        raise bad_text("numeric")
    sign, whole, fraction = match[1], match[2], match[3] or b""
    scale = len(fraction)
    whole = whole.rjust(-(-len(whole) // 4) * 4, b"0")
    fraction = fraction.ljust(-(-scale // 4) * 4, b"0")
    both = whole + fraction
    digits = [int(both[at : at + 4]) for at in range(0, len(both), 4)]
    weight = len(whole) // 4 - 1
    first = next((at for at, digit in enumerate(digits) if digit), len(digits))
    while len(digits) > first and not digits[-1]:
        digits.pop()
    digits = digits[first:]
    weight = weight - first if digits else 0
    if scale > _MAX_DISPLAY_SCALE or not -0x8000 <= weight <= 0x7FFF or len(digits) > 0xFFFF:
        raise bad_text("numeric")
    header = (len(digits), weight, 0x4000 if sign and digits else 0, scale)
    return struct.pack(f">HhHH{len(digits)}H", *header, *digits)
