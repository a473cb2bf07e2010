"""The conversation with functions in the database, on bytes: a function's half of it in Python."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import NoticeResponse
from protocol.values import parse_array
from proxy.api.functions import FUNCTIONS
from proxy.config.gucs import GUCS
from proxy.extension.conversation import Answer, AnswerPieces, Challenge, Secrets, new_word
from proxy.extension.questions import Call, Message, NotOursError, identity, settings_of

NONCE = b"0123456789abcdef" * 2
SPEAKER = b"PL/pgSQL function ext._pg_background_say() line 22 at RAISE"
ROLES = b"10,16384"
VERSIONS = pytest.mark.parametrize("version", [100000, 110000])


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
    counts = b"%d:%d" % (len(GUCS), len(arguments))
    words = [b"role", b"session", function, b"UTF8", counts, *own, *arguments, *settings]
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


def test_a_proof_with_roles_of_somebody_else() -> None:
    """The speaker adds its caller's to whatever it was told to say."""
    with pytest.raises(NotOursError):
        said(b"0" * 64, b"10", b"16384", verb=b"proof")


@pytest.mark.parametrize("verb", [b"ask", b"settings", b"call", b"custom", b"proof", b"next"])
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
    marks = secrets.marks(NONCE, server_version=version)
    answer: Answer = [b"v", None, b"x" * size]
    pieces = AnswerPieces(
        NONCE, marks, secrets.key(b"w", NONCE), answer, encoding=b"UTF8", server_version=version
    )
    pieces.room = room
    hash = hashed(secrets.setting[32:] + NONCE, version)
    text, number, is_last = b"", 0, False
    while not is_last:
        name, comment = pieces.piece(number)
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
        assert is_last == pieces.is_last(number)
        number += 1
    assert parse_array(text) == answer


def asked(proof: bytes = b"-", roles: bytes = ROLES) -> Message:
    """The same question, as it comes with a proof."""
    return said(*question(b"SELECT 1", b"0").words, b"4711", proof, roles, verb=b"ask")


@VERSIONS
def test_a_question_with_its_proof(version: int) -> None:
    word_ = b"0" * 32
    text = asked().text
    assert text.endswith(b" 4711")
    good = asked(hashed(word_ + text, version))
    call = Call(good)
    assert (good.channel, good.text, call.function.name) == (b"4711", text, "pg_background_launch")
    challenge = Challenge(good, call, version, word_)
    assert challenge.is_met_by(good, challenge.proof())
    assert challenge.roles == {b"10", b"16384"}
    for forged in (asked(), asked(hashed(text, version)), asked(hashed(b"1" * 32 + text, version))):
        challenge = Challenge(forged, Call(forged), version, word_)
        assert not challenge.is_met_by(forged, challenge.proof())
    # The speaker's is the last word, whatever it was told to say before that.
    words = question(b"SELECT 1", b"0").words
    forged = said(*words, b"4711", hashed(word_ + text, version), b"1", b"2", verb=b"ask")
    assert forged.roles == b"2"
    challenge = Challenge(forged, call, version, word_)
    assert not challenge.is_met_by(forged, challenge.proof())


@VERSIONS
def test_settings_come_with_a_proof_too(version: int) -> None:
    word_ = b"0" * 32
    good = asked(hashed(word_ + asked().text, version))
    challenge = Challenge(good, Call(good), version, word_)
    words = [*map(word, (b"work_mem", b"64", b"application_name", b"x", b"my.own")), b"-"]
    text = said(*words, b"-", verb=b"settings").text
    told = said(*words, hashed(word_ + text, version), verb=b"settings")
    assert challenge.is_continued_by(told, challenge.proof_of(told))
    # Not what belongs to the caller's connection, nor what is not set.
    assert settings_of(told.words) == ((b"work_mem", b"64"),)
    for forged in (
        said(*words, hashed(text, version), verb=b"settings"),
        said(*words, told.proof, verb=b"settings", nonce=b"f" * 32),
        said(*words, told.proof, verb=b"settings", context=SPEAKER.replace(b"ext", b"evil")),
        said(*words[:4], told.proof, verb=b"settings"),
    ):
        assert not challenge.is_continued_by(forged, challenge.proof_of(forged))


@pytest.mark.parametrize("size", [0, 20, 33, 5000])
def test_the_last_piece_comes_with_a_word(size: int) -> None:
    secrets = Secrets()
    marks = secrets.marks(NONCE, server_version=150000)
    pieces = AnswerPieces(
        NONCE,
        marks,
        b"",
        [b"v", b"x" * size],
        may_offer=True,
        encoding=b"UTF8",
        server_version=150000,
    )
    pieces.room = 1023
    last = pieces.after - 1
    assert pieces.is_last(last)
    assert not any(pieces.is_last(number) for number in range(last))
    offer = new_word()
    _, comment = pieces.piece(last, offer)
    found = re.match(rb"/[*][0-9a-f]*w([0-9a-f]{32}) (?:[A-Za-z0-9+/=]+ )?[*]/$", comment)
    assert found is not None
    assert found[1] == offer
    assert len(comment) <= 1023 + len(b" */")
    assert not any(b"w" + offer in pieces.piece(number)[1] for number in range(last + 1))


def test_locks_differ() -> None:
    marks = Secrets().marks(NONCE, server_version=150000)
    assert len({marks.lock(number) for number in range(100)}) == 100
    assert all(-(2**63) <= marks.lock(number) < 2**63 for number in range(100))
