"""`JobInput`: a stream is taken apart in the same way wherever it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation
from protocol.framing import HEADER_SIZE, frame
from protocol.kinds import B
from protocol.messages import ErrorResponse
from proxy.backends.backend import READ_SIZE
from proxy.jobs.job_input import JobInput, Message
from proxy.jobs.registry import CUT
from proxy.jobs.rows import Rows

LIMIT = 3 * READ_SIZE
READY = frame(B.READY_FOR_QUERY, b"I")

SIZES = st.sampled_from([0, 1, 7, 300, READ_SIZE - HEADER_SIZE, READ_SIZE, 2 * READ_SIZE + 1])
PARTS = st.lists(st.tuples(st.sampled_from([B.DATA_ROW, B.COMMAND_COMPLETE]), SIZES), max_size=6)
CUTS = st.lists(st.integers(1, READ_SIZE) | st.integers(1, 12), max_size=20)


def chunks(stream: bytes, cuts: Iterable[int]) -> Iterator[memoryview]:
    """As a backend reads: at most READ_SIZE at once."""
    at = 0
    for size in itertools.chain(cuts, itertools.repeat(READ_SIZE)):
        if at >= len(stream):
            break
        yield memoryview(stream)[at : at + size]
        at += size


def read(stream: bytes, cuts: Iterable[int] = ()) -> list[Rows | Message]:
    job_input = JobInput(LIMIT, b"UTF8")
    return [item for chunk in chunks(stream, cuts) for item in job_input.read(chunk)]


@settings(max_examples=300, deadline=None)
@given(PARTS, CUTS)
def test_cut_anywhere_it_is_the_same(parts: list[tuple[int, int]], cuts: list[int]) -> None:
    sent = [(kind, b"%c" % (97 + i) * size) for i, (kind, size) in enumerate(parts)]
    stream = b"".join(frame(*message) for message in sent)
    job_input = JobInput(LIMIT, b"UTF8")
    found = bytearray()
    count, is_cut = 0, False
    for chunk in chunks(stream, cuts):
        for item in job_input.read(chunk):
            if isinstance(item, Rows):
                assert item.data
                found += item.data
                count += item.count
                is_cut = item.cut
            else:
                assert not is_cut
                found += frame(*item)
    assert bytes(found) == stream
    assert count == sum(kind == B.DATA_ROW for kind, _ in sent)
    assert not is_cut
    assert job_input.is_empty
    assert not job_input.missing


@pytest.mark.parametrize("step", [1, 1000, READ_SIZE])
def test_of_a_long_error_the_beginning_is_kept(step: int) -> None:
    error = frame(B.ERROR_RESPONSE, b"SERROR\0C22000\0M" + b"m" * 2 * LIMIT + b"\0\0")
    kept, ready = read(error + READY, [step] * 20)
    assert isinstance(kept, Message)
    assert ready == Message(B.READY_FOR_QUERY, b"I")
    message = ErrorResponse.parse(kept.body).message
    assert message.endswith(CUT)
    assert set(message.removesuffix(CUT)) == set(b"m")
    assert LIMIT - 100 < len(message) < LIMIT + len(CUT)


def test_what_follows_the_end_is_noticed() -> None:
    job_input = JobInput(LIMIT, b"UTF8")
    (_,) = job_input.read(memoryview(READY))
    assert job_input.is_empty
    for item in job_input.read(memoryview(READY + b"N")):
        assert item == Message(B.READY_FOR_QUERY, b"I")
        assert not job_input.is_empty


@pytest.mark.parametrize(
    "stream",
    [b"D\0\0\0\3", b"C\xff\xff\xff\xff", frame(B.COMMAND_COMPLETE, b"x" * (LIMIT + 1))],
    ids=["short", "negative", "long"],
)
def test_a_message_that_cannot_be(stream: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        read(stream + READY)
