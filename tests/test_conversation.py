"""The conversation with functions in the database, on bytes: a function's half of it in Python."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import NoticeResponse
from protocol.values import parse_array
from proxy.api.functions import FUNCTIONS
from proxy.config.gucs import GUCS
from proxy.extension.conversation import (
    Answer,
    Call,
    Challenge,
    Handover,
    Message,
    NotOursError,
    Secrets,
    identity,
)

NONCE = b"0123456789abcdef" * 2
SPEAKER = b"PL/pgSQL function ext._pg_background_say() line 22 at RAISE"
VERSIONS = pytest.mark.parametrize("version", [90500, 110000])


def word(text: bytes | None) -> bytes:
    return b"-" if text is None else base64.b64encode(text)


def said(
    *words: bytes, verb: bytes = b"call", nonce: bytes = NONCE, context: bytes = SPEAKER
) -> Message:
    """What the function says."""
    text = b" ".join([b"t" * 32, nonce, verb, *words])
    fields = {"S": b"INFO", "V": b"INFO", "M": text, "R": b"exec_stmt_raise", "W": context}
    return Message.parse(NoticeResponse(fields))


def question(*arguments: bytes | None, name: str = "pg_background_launch") -> Message:
    function = identity(FUNCTIONS[name][0]).encode()
    own = [b"16" for _ in GUCS]
    settings = [b"work_mem", b"64", b"application_name", b"x"]
    count = b"%d" % len(arguments)
    words = [b"role", b"session", function, b"UTF8", *own, count, *arguments, *settings]
    return said(b"-", *map(word, words))


def hashed(text: bytes, version: int) -> bytes:
    if version >= 110000:
        return hashlib.sha256(text).hexdigest().encode()
    return b"".join(md5(text + end) for end in (b"a", b"b"))


def md5(text: bytes) -> bytes:
    return hashlib.md5(text, usedforsecurity=False).hexdigest().encode()


def deciphered(data: bytes, key: bytes, version: int) -> bytes:
    pad = b"".join(
        bytes.fromhex(hashed(b"%b%d" % (key, n), version).decode())
        for n in range(len(data) // 32 + 1)
    )
    return bytes(a ^ b for a, b in zip(data, pad, strict=False))


def test_a_question_says_who_calls_what() -> None:
    message = question(b"SELECT 1", None)
    call = Call(message)
    assert message.schema == b"ext"
    assert (call.role, call.session_role, call.encoding) == (b"role", b"session", b"UTF8")
    assert call.function.name == "pg_background_launch"
    assert call.argument_words == (word(b"SELECT 1"), b"-")
    # Not what belongs to the caller's connection.
    assert call.settings == ((b"work_mem", b"64"),)
    assert set(call.own_settings) == set(GUCS)


@pytest.mark.parametrize(
    "context",
    [
        b"PL/pgSQL function evil.say() line 1 at RAISE",
        b"PL/pgSQL function _pg_background_say() line 1 at RAISE",
        b'PL/pgSQL function "x._pg_background_say()"() line 1 at RAISE',
        b"",
    ],
)
def test_only_the_extensions_function_speaks(context: bytes) -> None:
    with pytest.raises(NotOursError):
        said(b"0", verb=b"next", context=context)


@pytest.mark.parametrize("verb", [b"call", b"custom", b"proof", b"next"])
def test_too_few_words(verb: bytes) -> None:
    with pytest.raises(NotOursError):
        said(verb=verb)


@given(st.lists(st.binary(max_size=20)))
def test_any_words_are_a_call_or_not_ours(words: list[bytes]) -> None:
    with contextlib.suppress(NotOursError):
        Call(said(*(w.replace(b" ", b"") for w in words)))


@VERSIONS
def test_proof(version: int) -> None:
    asked = question(b"SELECT 1", b"0")
    challenge = Challenge(asked, Call(asked), version)
    proof = hashed(challenge.word + asked.text, version)
    assert challenge.is_met_by(said(proof, b"10,16384", verb=b"proof"), challenge.proof())
    assert challenge.roles == {b"10", b"16384"}
    for forged in (
        said(hashed(asked.text, version), b"10", verb=b"proof"),
        said(proof, b"10", verb=b"proof", nonce=b"f" * 32),
        said(proof, b"10", verb=b"proof", context=SPEAKER.replace(b"ext", b"evil")),
    ):
        assert not challenge.is_met_by(forged, challenge.proof())


@VERSIONS
@pytest.mark.parametrize("room", [0, 1023, 16 * 1024])
@pytest.mark.parametrize("size", [0, 20, 33, 5000])
def test_an_answer_arrives(version: int, room: int, size: int) -> None:
    """Piece by piece, through application_name or the query, and only with the session's secret."""
    secrets = Secrets()
    signs = secrets.signs(NONCE, server_version=version)
    answer: Answer = [b"v", None, b"x" * size]
    handover = Handover(
        NONCE, signs, secrets.key(b"w", NONCE), answer, encoding=b"UTF8", server_version=version
    )
    handover.room = room
    hash = hashed(secrets.setting[32:] + NONCE, version)
    text, number, is_last = b"", 0, False
    while not is_last:
        name, comment = handover.piece(number)
        assert len(name) < 64
        assert len(comment) - len(b" */") <= room
        assert name[:12] == hash[:12]
        state, data = name[12:13], name[17:]
        assert name[13:17] == b"%04d" % number
        if state in b"qr":
            assert comment.startswith(b"/*" + hash[28:60] + name[13:17])
            assert comment.endswith(b" */")
            data = comment[38:-3]
        key = secrets.setting[32:] + b"w" + NONCE + b" %d " % number
        text += deciphered(base64.b64decode(data), key, version)
        is_last = state in b"aq"
        assert is_last == handover.is_last(number)
        number += 1
    assert parse_array(text) == answer


def test_locks_differ() -> None:
    signs = Secrets().signs(NONCE, server_version=150000)
    assert len({signs.lock(number) for number in range(100)}) == 100
    assert all(-(2**63) <= signs.lock(number) < 2**63 for number in range(100))
