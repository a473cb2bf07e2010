"""LIKE in the proxy is the server's."""

from __future__ import annotations

import random
from typing import Any

import psycopg
import pytest

from protocol.errors import SQLError
from proxy.api.like import like
from tests.support.servers import Server

ALPHABET = ("a", "b", "é", "%", "%", "_", "\\")


def outcome(text: str, pattern: str, codec: str = "utf-8") -> bool | str | None:
    try:
        return like(text.encode(codec), pattern.encode(codec), codec)
    except SQLError as error:
        return error.sqlstate


def test_like_is_the_servers(server: Server) -> None:
    chance = random.Random(10)
    with server.connect() as conn:
        for _ in range(3000):
            text = "".join(chance.choices("abé", k=chance.randrange(7)))
            pattern = "".join(chance.choices(ALPHABET, k=chance.randrange(7)))
            expected: Any
            try:
                [expected] = conn.execute("SELECT %s LIKE %s", [text, pattern]).fetchone() or [None]
            except psycopg.errors.InvalidEscapeSequence as error:
                expected = error.sqlstate
            assert outcome(text, pattern) == expected, (text, pattern)


@pytest.mark.parametrize(
    ("text", "pattern", "matches"),
    [
        ("a" * 5000, "%a" * 2000 + "b", False),
        ("a" * 5000, "%_a" * 2000 + "%", True),
        ("ab" * 2000 + "c", "%" + "a_" * 1000 + "c", True),
        ("é_%", "_\\_\\%", True),
        ("x", "\\x", True),
        ("line\nline", "%e_l%", True),
    ],
)
def test_like(text: str, pattern: str, matches: bool) -> None:
    assert outcome(text, pattern) is matches


@pytest.mark.parametrize("codec", ["euc_jp", "cp932", "big5", "gb18030", "latin_1"])
def test_a_character_is_one_of_the_encoding(codec: str) -> None:
    letter = "é" if codec == "latin_1" else "中"
    assert outcome(f"a{letter}b", "a_b", codec) is True
    assert outcome(f"a{letter}b", "a__b", codec) is False
    # One whose second byte is that of a backslash.
    if codec in ("cp932", "big5"):
        both = {"cp932": "表", "big5": "功"}[codec]
        assert both.encode(codec)[1:] == b"\\"
        assert outcome(f"{both}%", f"{both}%", codec) is True
        assert outcome(f"{both}x", f"{both}\\%", codec) is False
