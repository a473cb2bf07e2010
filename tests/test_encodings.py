"""Arrays in client encodings: what is written is read back, whatever bytes the characters have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sql.encodings import array_text, codec, parse_array

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
