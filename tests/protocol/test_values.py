"""to_binary and parse_array on bytes alone; what a server says to it is in test_values_server."""

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation
from protocol.values import NoBinaryForm, oids, parse_array, to_binary
from protocol.values.arrays import Array
from protocol.values.oids import ARRAYS, OIDS, type_size

CONVERTED = sorted({*ARRAYS.values(), *ARRAYS, oids.UNKNOWN, oids.VOID})
TYPICAL = st.text("0123456789abcdefxINnulity.,:/+- {}[]=\\\"' yearsmond BC\n\0", max_size=40).map(
    str.encode
)


@given(st.sampled_from(CONVERTED), st.binary(max_size=40) | TYPICAL)
def test_garbage_raises_only_a_violation(oid: int, text: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        assert isinstance(to_binary(oid, text), bytes)


@pytest.mark.parametrize("oid", [0, oids.RECORD, oids.MONEY, oids.BIT, 16384, 2**32])
def test_a_type_that_we_do_not_convert_is_named(oid: int) -> None:
    with pytest.raises(NoBinaryForm) as caught:
        to_binary(oid, b"")
    assert caught.value.type_oid == oid
    assert str(oid) in str(caught.value)


@pytest.mark.parametrize(
    ("type_name", "text", "binary"),
    [
        ("bool", b"t", "01"),
        ("int4", b"-2", "fffffffe"),
        ("float8", b"1", "3ff0000000000000"),
        ("numeric", b"-12345.60", "0003 0001 4000 0002 0001 0929 1770"),
        ("numeric", b"0.00", "0000 0000 0000 0002"),
        ("jsonb", b"{}", "01 7b7d"),
        ("bytea", b"\\x00ff", "00ff"),
        ("bytea", b"a\\\\\\001", "61 5c 01"),
        ("date", b"1999-12-31", "ffffffff"),
        ("timestamptz", b"2000-01-01 05:30:00+05:30", "0000000000000000"),
        ("timetz", b"00:00:01-01", "00000000000f4240 00000e10"),
        ("interval", b"1 year -2 days +00:00:01", "00000000000f4240 fffffffe 0000000c"),
        ("inet", b"10.0.0.1", "02 20 00 04 0a000001"),
        ("char", b"\\303", "c3"),
    ],
)
def test_known_answers(type_name: str, text: bytes, binary: str) -> None:
    assert to_binary(OIDS[type_name], text) == bytes.fromhex(binary)


@pytest.mark.parametrize(
    ("type_name", "text"),
    [
        ("bool", b"true"),
        ("int2", b"32768"),
        ("int4", b"1_000"),
        ("int4", b" 1"),
        ("int4", b"1\n"),
        ("int8", b"9" * 5000),
        ("oid", b"-1"),
        ("float4", b"1e39"),
        ("float8", b"1e309"),
        ("float8", b"inf"),
        ("float8", b"-NaN"),
        ("numeric", b"1e5"),
        ("numeric", b"." + b"1" * 10),
        ("numeric", b"0." + b"1" * 20000),
        ("numeric", b"1" * 200_000),
        ("bytea", b"\\x0"),
        ("bytea", b"\\x0 0"),
        ("bytea", b"\\9"),
        ("bytea", b"\\"),
        ("uuid", b"a0eebc999c0b4ef8bb6d6bb9bd380a11"),
        ("date", b"15.01.2024"),
        ("date", b"01/15/2024"),
        ("date", b"2023-02-29"),
        ("date", b"1900-02-29"),
        ("date", b"2024-13-01"),
        ("date", b"2024-00-01"),
        ("date", b"2024-01-00"),
        ("date", b"0000-01-01"),
        ("date", b"9999999-01-01"),
        ("timestamp", b"Mon Jan 15 10:20:30 2024"),
        ("timestamp", b"2024-01-15 24:00:01"),
        ("timestamp", b"2024-01-15 10:60:00"),
        ("timestamp", b"999999-01-15 10:00:00"),
        ("timestamptz", b"2024-01-15 10:20:30"),
        ("timestamptz", b"2024-01-15 10:20:30 CET"),
        ("time", b"25:00:00"),
        ("interval", b""),
        ("interval", b"P1Y"),
        ("interval", b"@ 1 year"),
        ("interval", b"1 day "),
        ("interval", b"1 year2 mons"),
        ("interval", b"9999999999 days"),
        ("interval", b"9999999999:00:00"),
        ("inet", b"10.1"),
        ("inet", b"10.0.0.1/33"),
        ("inet", b"fe80::1%eth0"),
        ("macaddr", b"08:00:2b:01:02:03:04:05"),
        ("macaddr", b"08002b010203"),
        ("pg_lsn", b"0"),
        ("char", b"ab"),
        ("void", b"x"),
    ],
)
def test_text_that_the_type_does_not_write_is_a_violation(type_name: str, text: bytes) -> None:
    with pytest.raises(ProtocolViolation, match=type_name):
        to_binary(OIDS[type_name], text)


def test_a_datestyle_that_is_not_iso_is_named_as_the_reason() -> None:
    with pytest.raises(ProtocolViolation, match="DateStyle ISO"):
        to_binary(oids.DATE, b"15.01.2024")
    with pytest.raises(ProtocolViolation, match="IntervalStyle postgres"):
        to_binary(oids.INTERVAL, b"P1Y")


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers(number: int) -> None:
    assert to_binary(oids.INT8, b"%d" % number) == number.to_bytes(8, "big", signed=True)


@given(st.floats())
def test_floats(number: float) -> None:
    text = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(repr(number), repr(number))
    binary = struct.pack(">d", float("nan") if number != number else number)
    assert to_binary(oids.FLOAT8, text.encode()) == binary


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**40), max_value=10**40))
def test_numerics_have_the_value_and_the_scale_of_their_text(number: object) -> None:
    text = f"{number:f}"
    count, weight, sign, scale = struct.unpack_from(
        ">HhHH", binary := to_binary(oids.NUMERIC, text.encode())
    )
    digits = struct.unpack_from(f">{count}H", binary, 8)
    assert scale == len(text.partition(".")[2])
    assert not digits or (digits[0] and digits[-1])
    places = max(scale, 4 * (count - 1 - weight), 0)
    total = sum(digit * 10 ** (4 * (weight - at) + places) for at, digit in enumerate(digits))
    whole, _, fraction = text.lstrip("-").partition(".")
    assert total == int(whole + fraction.ljust(places, "0"))
    assert sign == (0x4000 if text.startswith("-") and total else 0)


def quoted(element: bytes | None) -> bytes:
    if element is None:
        return b"NULL"
    return b'"%b"' % element.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


@given(st.lists(st.none() | st.binary(max_size=12), max_size=6))
def test_an_array_that_was_written_is_read(elements: list[bytes | None]) -> None:
    assert parse_array(b"{%b}" % b",".join(map(quoted, elements))) == elements


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        (b"{}", []),
        (b" { } ", []),
        (b"{a}", [b"a"]),
        (b"{ a b , c }", [b"a b", b"c"]),
        (b"{NULL,null,nUlL}", [None, None, None]),
        (b'{"NULL",n\\ull}', [b"NULL", b"null"]),
        (b'{"",a\\,b,\\ ,a\\ }', [b"", b"a,b", b" ", b"a "]),
        (b'{"a\\"b\\\\c",{}'.replace(b"{}", b"d}"), [b'a"b\\c', b"d"]),
        (b"[5:6]={a,b}", [b"a", b"b"]),
        (b"[2] = {a,b}", [b"a", b"b"]),
    ],
)
def test_array_literals_are_read_as_the_manual_says(
    text: bytes, elements: list[bytes | None]
) -> None:
    assert parse_array(text) == elements


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"a",
        b"{",
        b"}",
        b"{a",
        b"{a,}",
        b"{,a}",
        b"{a}b",
        b'{"a}',
        b'{"a"b}',
        b'{a"b"}',
        b"{a\\",
        b"{a}{b}",
        b"{{a},b}",
        b"{a,{b}}",
        b"{{a},{b,c}}",
        b"{{}}",
        b"[1:3]={a,b}",
        b"[1:0]={}",
        b"[1:2]{a,b}",
        b"[2147483647:2147483648]={a,b}",
        b"{" * 7 + b"1" + b"}" * 7,
        b"{" * 100_000,
        b"[1:1]" * 100_000,
    ],
)
def test_a_malformed_array_is_a_violation(text: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        to_binary(1009, text)


@given(st.lists(st.sampled_from([*b'{},"\\ \x83a', b"NULL", b'"a"', b"[1:2]="]), max_size=9))
def test_a_short_cut_reads_what_the_whole_parser_reads(parts: list[int | bytes]) -> None:
    text = b"{%b}" % b"".join(bytes((p,)) if isinstance(p, int) else p for p in parts)
    try:
        array = Array.parse(text)
    except ProtocolViolation:
        with pytest.raises(ProtocolViolation):
            parse_array(text)
        return
    if len(array.dimensions) < 2:
        assert parse_array(text) == array.elements


def test_one_dimension_is_not_two() -> None:
    with pytest.raises(ProtocolViolation):
        parse_array(b"{{a},{b}}")


def test_the_bounds_of_an_array_are_kept() -> None:
    assert to_binary(1007, b"[0:0][-1:0]={{1,NULL}}") == bytes.fromhex(
        "00000002 00000001 00000017 00000001 00000000 00000002 ffffffff 00000004 00000001 ffffffff"
    )


@pytest.mark.parametrize(
    "text",
    [
        b"{" + b"a " * 500_000,
        b'{"' + b"\\a" * 500_000,
        b"{" + b"\\a" * 500_000,
        b" " * 1_000_000,
    ],
)
def test_a_long_hostile_array_takes_no_longer_than_its_length(text: bytes) -> None:
    start = time.thread_time()
    with pytest.raises(ProtocolViolation):
        parse_array(text)
    assert time.thread_time() - start < 1.0


def test_sizes_of_types() -> None:
    assert [type_size(OIDS[name]) for name in ("int4", "text", "void", "record", "bool")] == [
        *(4, -1, 4, -1, 1)
    ]
    assert type_size(16384) == -1
