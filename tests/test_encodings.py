"""Arrays in client encodings: what is written is read back, whatever bytes the characters have. And
texts that go from one to another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire import ProtocolViolation
from proxy.sql import encodings
from proxy.sql.encodings import (
    CODECS,
    array_text,
    codec,
    is_valid,
    parse_array,
    parse_array_in_turns,
)
from proxy.sql.recoding import beginning, recoded

# 表, ポ and 能 end in a backslash or a brace in SJIS; the others are what an array quotes.
CHARACTERS = 'a表ポ能ソ{}",\\ \tNULL'


@pytest.mark.parametrize("encoding", [b"UTF8", b"SJIS", b"BIG5", b"GBK", b"UHC", b"JOHAB"])
@given(texts=st.lists(st.none() | st.text(CHARACTERS)))
def test_an_array_is_read_back(encoding: bytes, texts: list[str | None]) -> None:
    elements = [None if text is None else text.encode(codec(encoding), "replace") for text in texts]
    assert parse_array(array_text(elements, encoding), encoding) == elements


def test_quotes_are_not_seen_within_characters() -> None:
    ends_in_backslash = "表".encode("cp932")
    assert ends_in_backslash[-1:] == b"\\"
    text = b'{%b,"%b\\"",NULL}' % (ends_in_backslash, ends_in_backslash)
    expected = [ends_in_backslash, ends_in_backslash + b'"', None]
    assert parse_array(text, b"SJIS") == expected


PARTS = st.sampled_from(["\\", '"', "'", ",", "{", "}", "a", "é", " ", "NULL", "1", '"1', "\\\\"])


@given(
    texts=st.lists(st.none() | st.lists(PARTS, max_size=8).map("".join)),
    turn=st.integers(1, 12),
    encoding=st.sampled_from([b"UTF8", b"SJIS", b"SQL_ASCII"]),
)
def test_an_array_that_is_read_in_turns_is_the_same(
    texts: list[str | None], turn: int, encoding: bytes
) -> None:
    elements = [
        None
        if t is None
        else t.replace("é", "ソ").encode("cp932")
        if encoding == b"SJIS"
        else t.encode()
        for t in texts
    ]
    text = array_text(elements, encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_YIELD_AFTER", turn)
        *turns, found = parse_array_in_turns(text, encoding)
    assert found == elements
    assert not any(turns)


@given(text=st.lists(st.sampled_from(list('{},"\\ a0')), max_size=12), turn=st.integers(1, 6))
def test_what_is_no_array_is_none_in_turns_either(text: list[str], turn: int) -> None:
    literal = "".join(text).encode()
    expected: list[bytes | None] | None
    try:
        expected = parse_array(literal, b"UTF8")
    except ProtocolViolation:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_YIELD_AFTER", turn)
        try:
            *_, found = parse_array_in_turns(literal, b"UTF8")
        except ProtocolViolation:
            found = None
    assert found == expected


@given(
    text=st.binary(max_size=30),
    source=st.sampled_from([*CODECS, b"SQL_ASCII", b"EUC_TW"]),
    target=st.sampled_from([*CODECS]),
)
def test_what_arrives_is_valid(text: bytes, source: bytes, target: bytes) -> None:
    found = recoded(text, source, target)
    # The server's own may have characters that Python does not know.
    assert source == target or is_valid(found, CODECS[target]) or source == b"SQL_ASCII"
    assert recoded(text, source, b"SQL_ASCII") == text


@given(text=st.text(max_size=40), size=st.integers(0, 60), encoding=st.sampled_from([*CODECS]))
def test_a_beginning_is_whole_characters(text: str, size: int, encoding: bytes) -> None:
    whole = text.encode(CODECS[encoding], "ignore")
    start = beginning(whole, size, encoding)
    assert whole.startswith(start)
    assert len(start) <= size
    assert is_valid(start, CODECS[encoding])
