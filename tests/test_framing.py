"""Finding message boundaries: whatever the lengths are, a run ends where one by one it would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.framing import HEADER_SIZE, frame, skip_run, unpack_length

ROW = ord("D")


def one_by_one(data: bytes, position: int) -> tuple[int, int]:
    """The same, the simple way."""
    kind = data[position]
    count = 0
    while position + HEADER_SIZE <= len(data) and data[position] == kind:
        (length,) = unpack_length(data, position + 1)
        if length < 4 or position + 1 + length > len(data):
            break
        position += 1 + length
        count += 1
    return position, count


runs = st.lists(
    st.tuples(
        st.sampled_from([ROW, ROW, ROW, ord("d"), ord("C")]),
        st.integers(0, 40),
        st.integers(1, 3000),
    ),
    min_size=1,
    max_size=6,
)


@given(runs, st.binary(max_size=3), st.integers(0, 60))
def test_skip_run_ends_where_one_by_one_would(
    runs: list[tuple[int, int, int]], filling: bytes, cut: int
) -> None:
    """Runs of messages of one length, cut off anywhere; `filling` looks like headers at times."""
    data = b"".join(
        frame(kind, (filling * size)[:size].ljust(size, b"D")) * count for kind, size, count in runs
    )
    data = data[: max(len(data) - cut, HEADER_SIZE)]
    assert skip_run(data, 0) == one_by_one(data, 0)


@given(st.binary(min_size=HEADER_SIZE, max_size=200), st.integers(0, 2000), st.integers(0, 9))
def test_skip_run_stops_at_what_is_no_message(rest: bytes, count: int, size: int) -> None:
    data = frame(ROW, b"x" * size) * count + rest
    assert skip_run(data, 0) == one_by_one(data, 0)


@pytest.mark.parametrize("last", [b"D\0\0\0\x09", b"C\0\0\0\x09", b"D\0\0\0\x08", b"D\0\0\x01\x09"])
def test_one_header_differs_in_a_long_run(last: bytes) -> None:
    row = frame(ROW, b"12345")
    for before in range(100):
        data = row * before + last + b"12345" + row * 100
        assert skip_run(data, 0) == one_by_one(data, 0)
