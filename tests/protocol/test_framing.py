"""Framing: however a stream is cut into chunks, the same messages come out of it."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation
from protocol.framing import MessageBuffer, frame

messages = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=20)), max_size=8)


def cut(stream: bytes, data: st.DataObject) -> list[bytes]:
    """The stream in chunks, some of them perhaps empty."""
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    return [
        stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)
    ]


@given(messages, st.data())
def test_any_cut_of_a_stream_gives_the_same_messages(
    sent: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    buffer = MessageBuffer()
    received: list[tuple[int, bytes]] = []
    for chunk in cut(b"".join(frame(*message) for message in sent), data):
        buffer.feed(chunk)
        received += buffer
    assert received == sent
    assert len(buffer) == 0
    assert buffer.take_rest() == b""


def test_one_byte_at_a_time_gives_the_same_messages() -> None:
    sent = [(ord("Q"), b"SELECT 1\0"), (ord("S"), b""), (ord("X"), b"")]
    buffer = MessageBuffer()
    received: list[tuple[int, bytes]] = []
    for byte in b"".join(frame(*message) for message in sent):
        buffer.feed(bytes((byte,)))
        received += buffer
    assert received == sent


@given(messages, st.binary(max_size=4))
def test_what_is_not_whole_is_held_and_can_be_taken_back(
    sent: list[tuple[int, bytes]], rest: bytes
) -> None:
    buffer = MessageBuffer(b"".join(frame(*message) for message in sent) + rest)
    for message in sent:
        assert buffer.next_message() == message
    assert buffer.next_message() is None
    assert len(buffer) == len(rest)
    assert buffer.take_rest() == rest
    assert len(buffer) == 0
    buffer.feed(frame(1, b"next"))
    assert buffer.next_message() == (1, b"next")


def test_messages_may_be_fed_and_taken_in_turn() -> None:
    buffer = MessageBuffer(frame(1, b"a") + frame(2, b"b"))
    assert buffer.next_message() == (1, b"a")
    buffer.feed(memoryview(frame(3, b"c")))
    assert list(buffer) == [(2, b"b"), (3, b"c")]


@pytest.mark.parametrize("length", [3, 0, -1, -(2**31)])
def test_a_length_that_cannot_be_is_a_violation(length: int) -> None:
    buffer = MessageBuffer(b"Q" + length.to_bytes(4, "big", signed=True) + b"SELECT")
    with pytest.raises(ProtocolViolation, match="impossible length"):
        buffer.next_message()


@given(st.binary(max_size=60))
def test_garbage_raises_only_a_violation_and_ends(stream: bytes) -> None:
    buffer = MessageBuffer(stream)
    try:
        received = list(buffer)
    except ProtocolViolation:
        return
    whole = b"".join(frame(*message) for message in received)
    assert whole + buffer.take_rest() == stream


def test_a_big_length_field_allocates_nothing() -> None:
    tracemalloc.start()
    buffer = MessageBuffer()
    buffer.feed(b"d\x7f\xff\xff\xff")
    for _ in range(100):
        assert buffer.next_message() is None
        buffer.feed(b"x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000
