"""The packets without a type byte."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation
from protocol.startup import (
    MAX_STARTUP_PACKET_LENGTH,
    CancelRequest,
    GSSENCRequest,
    RefusedStartup,
    SSLRequest,
    StartupMessage,
    parse_startup_packet,
    startup_packet_length,
)

Sent = StartupMessage | SSLRequest | GSSENCRequest | CancelRequest

strings = st.binary(max_size=30).map(lambda text: text.replace(b"\0", b" "))
packets: st.SearchStrategy[Sent] = st.one_of(
    st.builds(
        StartupMessage,
        st.dictionaries(strings.filter(bool), strings, max_size=6),
        st.tuples(st.just(3), st.integers(0, 65535)),
    ),
    st.just(SSLRequest()),
    st.just(GSSENCRequest()),
    st.builds(CancelRequest, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=256)),
)


@given(packets)
def test_a_packet_parses_back_to_itself(packet: Sent) -> None:
    wire = packet.serialize()
    assert startup_packet_length(wire[:4]) == len(wire) - 4
    assert parse_startup_packet(wire[4:]) == packet


def test_bytes_are_those_of_the_manual() -> None:
    assert SSLRequest().serialize() == bytes.fromhex("00000008 04d2162f")
    assert GSSENCRequest().serialize() == bytes.fromhex("00000008 04d21630")
    assert CancelRequest(7, b"key!").serialize() == bytes.fromhex(
        "00000010 04d2162e 00000007 6b657921"
    )
    assert (
        StartupMessage({b"user": b"me", b"database": b"db"}).serialize()
        == b"\0\0\0\x1d\0\3\0\0user\0me\0database\0db\0\0"
    )


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\0\3\0\0" + tail))
def test_garbage_raises_only_a_violation(body: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        parse_startup_packet(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\3\0",
        b"\x04\xd2\x16\x2e" + b"\0\0",
        b"\x04\xd2\x16\x2e" + b"\0\0\0\1" + b"k" * 257,
        b"\0\3\0\0" + b"a\0b\0" * 2500 + b"\0",
    ],
)
def test_a_malformed_packet_is_a_violation(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_startup_packet(body)


@pytest.mark.parametrize("length", [-1, 0, 4, 7, MAX_STARTUP_PACKET_LENGTH + 5, 2**31 - 1])
def test_a_length_out_of_bounds_is_a_violation(length: int) -> None:
    with pytest.raises(ProtocolViolation):
        startup_packet_length(length.to_bytes(4, "big", signed=True))


def test_a_length_word_cut_short_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        startup_packet_length(b"\0\0")


@pytest.mark.parametrize(
    ("body", "version"),
    [
        (b"\0\2\0\0" + b"x" * 292, (2, 0)),
        (b"\x04\xd2\x00\x01", (1234, 1)),
        *(
            (b"\0\3\0\0" + parameters, (3, 0))
            for parameters in (
                b"",
                b"user\0",
                b"user\0me",
                b"user\0me\0",
                b"user\0me\0\0\0",
                b"user\0me\0\0more",
                b"user\0me\0more\0\0",
                b"\0\0",
            )
        ),
    ],
)
def test_what_every_server_refuses(body: bytes, version: tuple[int, int]) -> None:
    assert parse_startup_packet(body) == RefusedStartup(version)


def test_the_last_byte_is_the_terminator_whatever_it_is() -> None:
    assert parse_startup_packet(b"\0\3\0\0user\0me\0x") == StartupMessage({b"user": b"me"})
    assert parse_startup_packet(b"\0\3\0\0x") == StartupMessage({})


def test_bytes_behind_the_code_of_a_request_do_not_matter() -> None:
    assert parse_startup_packet(b"\x04\xd2\x16\x2f" + b"x") == SSLRequest()
    assert parse_startup_packet(b"\x04\xd2\x16\x30" + b"x") == GSSENCRequest()


def test_of_a_parameter_given_twice_the_last_counts() -> None:
    assert parse_startup_packet(b"\0\3\0\0user\0a\0user\0b\0\0") == StartupMessage({b"user": b"b"})


@pytest.mark.parametrize("parameters", [{b"": b"x"}, {b"a\0b": b"x"}, {b"a": b"x\0y"}])
def test_what_would_read_as_something_else_is_not_serialized(
    parameters: dict[bytes, bytes],
) -> None:
    with pytest.raises(ValueError, match=r"."):
        StartupMessage(parameters).serialize()


def test_the_key_of_a_cancel_request_is_not_in_its_repr() -> None:
    assert "secret" not in repr(CancelRequest(1, b"secret")).replace("secret_key", "")


@pytest.mark.parametrize("given", [{}, {b"database": b""}])
def test_the_database_is_by_default_the_one_of_the_role(given: dict[bytes, bytes]) -> None:
    assert StartupMessage({b"user": b"me", **given}).database == b"me"
    assert StartupMessage(given).database == b""


@pytest.mark.parametrize(
    ("value", "is_replication", "is_physical"),
    [
        (None, False, False),
        (b"FALSE", False, False),
        (b"0", False, False),
        (b"true", True, True),
        (b"1", True, True),
        (b"Database", True, False),
    ],
)
def test_replication_is_physical_unless_it_names_the_database(
    value: bytes | None, is_replication: bool, is_physical: bool
) -> None:
    startup = StartupMessage({} if value is None else {b"replication": value})
    assert startup.is_replication is is_replication
    assert startup.is_physical_replication is is_physical
