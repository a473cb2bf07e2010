"""The protocol between the functions in the database and the proxy.

Invariant: text proves nothing. A question counts only with the rights of a role that the server
grants to the code that asks; `docs/security.md` has the model. There is no I/O here: `in_database`
holds the conversation; `sql/ask.sql` and `sql/answer.sql` are the functions' half, made with the
sizes and places defined here (`NAMES`).

A function speaks by an INFO message, which the server sends at once, in the middle of a statement:

    token nonce verb word word ...

``token`` is the session's, ``nonce`` is made up for each question, and each word is base64 of text
in the client's encoding, or ``-`` for NULL. The proxy takes the message off the stream and answers
through a channel (`channels`): an idle backend whose application_name every role can see, and whose
query only code with the rights of its login role. application_name announces the answer:

    tag state number data

``tag`` tells the function that this is for it. A function waits for an advisory lock, which the
channel holds until there is something to see. There are two: the word's, whose key is a hash of the
word, and which is held since the word was shown; and the question's, whose key is a part of the
hash of secret and nonce. The states:

- ``hw``: the question was heard; wait for the word's lock. ``gw``: the same with the question's.
  ``ht``: there is no lock; poll.
- ``pw``, ``pt``: prove it. The channel's query has a fresh random word, which the function must
  read. With ``pw`` the channel holds the question's lock; with ``pt`` it could not get it, and the
  function polls.
- ``a``: an answer, here as data, 32 bytes; ``b``: the same, with more to come.
- ``x``, ``y``: the same for a question that is not proven; the pad is made without a word.
- ``q``, ``r``: as ``a`` and ``b``, but the data is in the channel's query, behind a mark.

A question takes one message if a channel shows a word in advance. Beside the last piece of an
answer, and while it rests, a channel shows ``/*…w`` and a word that nobody has used yet. Until it
rests, it holds the word's lock. After that, it takes the question's when asked, since the function
may be trying the word's.

1. ``ask``. Its first word says whose the channel is: ``-`` means the session's login role. Code
   that cannot RESET ROLE (it runs as another owner) names that owner instead. Behind the call come
   the channel's pid; the proof, a hash of the word and of what the message says before; and the
   OIDs of the roles as which the calling code can run, by RESET ROLE and RESET SESSION
   AUTHORIZATION too. If the channel's login role is among them, the question counts, with the
   rights of that role and no others. A word serves for one question.
2. ``settings``, for a function that launches: the session's, with a proof by the same word,
   gathered while the question is on its way. If the session may have other custom settings, the
   answer is ``c`` and their names; another ``settings`` has those, and later ones include them.
3. The answer, in pieces: ``next`` asks for the next one.

While no answer announces that it was heard, the function sends ``still`` now and then, by which
its server notices if the connection to the proxy is gone.

Without such a word, or if it is used up or another session has the channel:

1. ``ask`` with ``-`` for the proof, or with an invalid one. The proxy takes or opens a channel of
   the login; for an owner's, with the owner's credentials if it has them.
2. The channel shows a word (``pw``).
3. ``proof``, with a hash of the word and of the question, and the roles. ``settings`` follow.
4. The answer.

Functions created by older proxies send ``call`` in place of ``ask``, with the settings and without
proof, and custom settings in a question of their own, ``custom``.

Tag, lock and mark are made of the nonce and a secret that the session and the proxy share. Answers
are enciphered with a pad made of secret, word and nonce, so they mean nothing to those who may see
all queries, or the server's log.

If no channel can be opened, the function cannot be told anything: when it says ``still``, the proxy
cancels the statement, and replaces the error by the reason (`refusal`).

The pieces of an answer are numbered. With each piece but the last, the channel takes the lock for
the next, whose key is the question's XOR the number, so that the function can wait for it at once.

An answer is a text[]: ``e`` and the fields of an error; ``v`` and the value, those of a composite
result, or the rows as a text[][]; ``n`` for no composite; ``c`` and names of custom settings;
``l``, a channel and a word that the function must send by NOTIFY, and the answer to a launch at
commit; or a block of a result (`blocks`), after which the next piece is that of the next block.

Members of pg_read_all_stats can read every word, and so can a role that inherits another, without
becoming it. So only messages raised by the extension's function `_pg_background_say` count. It adds
the roles itself: in the message the server names PL/pgSQL's RAISE and the function, and the channel
is asked whether that function is the extension's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC
from typing import Any, Final

from proxy.api.functions import Function
from proxy.api.values import text_form
from proxy.backends.channels import APPLICATION_NAME
from proxy.config.gucs import session_secret
from proxy.extension.questions import Call, Message
from proxy.sql.encodings import array_2_text, array_text

Answer = list[bytes | None]

# --- sizes and places, for both halves ---------------------------------------------------------

_TOKEN: Final = slice(0, 32)
_SECRET: Final = slice(32, 64)
"""Parts of the session's setting."""

_TAG: Final = slice(0, 12)
_LOCK: Final = slice(12, 28)
_MARK: Final = slice(28, 60)
"""Parts of the hash of a question: the tag of its answers in application_name, the key of the
advisory lock for the first piece, and the mark at the beginning of the channel's query."""

_WORD: Final = 32
"""Characters of a word."""

_DIGITS: Final = 4
"""Digits of a piece's number in application_name and in a query."""

_COMMENT: Final = "/*"

_OFFER: Final = b"w%b "
"""A word that is shown in advance. Data cannot look like that: the blank would be its 34th
character, and base64 comes in fours."""


def _part(text: str, part: slice) -> str:
    """The part as SQL's substr() takes it."""
    if part.start == 0:
        return f"left({text}, {part.stop})"
    return f"substr({text}, {part.start + 1}, {part.stop - part.start})"


NAMES: Final = {
    "token": _part("session", _TOKEN),
    "secret": f"substr(session, {_SECRET.start + 1})",
    "setting_size": str(_SECRET.stop),
    "tag": _part("hash", _TAG),
    "tag_seen": _part("a.application_name", _TAG),
    "state_seen": f"substr(a.application_name, {_TAG.stop + 1})",
    "lock": _part("hash", _LOCK),
    "mark": _part("hash", _MARK),
    "word": f"left(shown, {_WORD})",
    "number_seen": f"substr(state, 2, {_DIGITS})",
    "number_wanted": f"to_char(number % {10**_DIGITS}, 'FM{'0' * _DIGITS}')",
    "number_pattern": "." * _DIGITS,
    "narrow_data": f"substr(state, {_DIGITS + 2})",
    "comment": _COMMENT,
    "resting": APPLICATION_NAME.decode(),
    "offer": f"substring(shown, '^/[*][0-9a-f]*w([0-9a-f]{{{_WORD}}}) ')",
    "data": f"CASE WHEN substr(shown, {_WORD + 2}, 1) = ' ' THEN substr(shown, {_WORD + 3})"
    " ELSE shown END",
}
"""Placeholders in the PL/pgSQL, and what they stand for."""


_NARROW: Final = 32
"""Bytes of an answer that fit into application_name."""

_BEFORE_DATA: Final = len(_COMMENT) + _MARK.stop - _MARK.start + _DIGITS + len(_OFFER) - 2 + _WORD
"""Characters of a query before the data: the comment's beginning, mark, number, and a word."""

_LEAST_ROOM: Final = 256
"""Characters that a query must show to be used."""


# --- secrets and proof -------------------------------------------------------------------------


class Secrets:
    """What the session and the proxy share, and what is derived from it.

    Attributes:
        token: 32 hexadecimal digits, with which our messages begin.
        setting: the setting in the session's startup packet.
    """

    def __init__(self, setting: bytes | None = None) -> None:
        """`setting`: the one that the session has, if any."""
        self.setting = setting or session_secret()
        self.token, self._secret = self.setting[_TOKEN], self.setting[_SECRET]

    def marks(
        self, nonce: bytes, *, server_version: int, first_lock: int | None = None
    ) -> AnswerMarks:
        """The marks of the answers to one question; nobody else can guess them."""
        return AnswerMarks(_hash(self._secret + nonce, server_version), first_lock)

    def key(self, word: bytes, nonce: bytes) -> bytes:
        """The key that enciphers the answers to one question."""
        return b"%b%b%b " % (self._secret, word, nonce)


class AnswerMarks:
    """By what the answers to one question are recognised.

    Attributes:
        tag: the beginning of application_name.
        mark: the beginning of a query, after the comment's.
    """

    def __init__(self, hash: bytes, first_lock: int | None = None) -> None:
        """
        Args:
            hash: 64 hexadecimal digits.
            first_lock: the key of the lock for the first piece, if it was taken in advance.
        """
        self.tag, self.mark = hash[_TAG], hash[_MARK]
        self._lock = _lock_key(hash[_LOCK])
        self._first_lock = self._lock if first_lock is None else first_lock

    def lock(self, number: int) -> int:
        """The key of the advisory lock for a piece."""
        return self._lock ^ number if number else self._first_lock

    def announce(self, *, take_lock: bool) -> bytes:
        """The SELECT by which a channel tells the function to wait for the lock."""
        if not take_lock:
            return b"SELECT pg_catalog.set_config('application_name', '%bhw', false)" % self.tag
        return (
            b"SELECT pg_catalog.set_config('application_name', CASE WHEN"
            b" pg_catalog.pg_try_advisory_lock(%d) THEN '%bgw' ELSE '%bht' END, false)"
            % (self.lock(0), self.tag, self.tag)
        )

    def ask_for_proof(self) -> bytes:
        """The SELECT by which a channel asks for the proof, and takes the answer's lock."""
        return (
            b"SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.set_config('application_name',"
            b" CASE WHEN pg_catalog.pg_try_advisory_lock(%d) THEN '%bpw' ELSE '%bpt' END, false)"
            % (self.lock(0), self.tag, self.tag)
        )

    def comment(self, text: bytes) -> bytes:
        """The beginning of a query that shows a text."""
        return b"%b%b%b*/" % (_COMMENT.encode(), self.mark, text)


def offered(word: bytes) -> bytes:
    """The beginning of a query that shows a word in advance."""
    return b"%b%b*/" % (_COMMENT.encode(), _OFFER % word)


def lock_of(word: bytes, server_version: int) -> int:
    """The key of the advisory lock that goes with a word shown in advance."""
    return _lock_key(_hash(word, server_version)[:16])


def _lock_key(digits: bytes) -> int:
    return int.from_bytes(bytes.fromhex(digits.decode()), "big", signed=True)


def _hash(text: bytes, server_version: int) -> bytes:
    """64 hexadecimal digits, the same as in `bodies`; before 11 there is no SHA-2."""
    if server_version >= 110000:
        return hashlib.sha256(text).hexdigest().encode()
    halves = [hashlib.md5(text + end, usedforsecurity=False) for end in (b"a", b"b")]
    return b"".join(half.hexdigest().encode() for half in halves)


def _enciphered(data: bytes, key: bytes, server_version: int) -> bytes:
    """Data XOR a pad made of the key."""
    pad = b"".join(
        bytes.fromhex(_hash(b"%b%d" % (key, n), server_version).decode())
        for n in range((len(data) + 31) // 32)
    )[: len(data)]
    number = int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")
    return number.to_bytes(len(data), "big")


def new_word() -> bytes:
    """A random word, used once."""
    return secrets.token_hex(_WORD // 2).encode()


class Challenge:
    """A question whose function has yet to prove its rights.

    Attributes:
        question: the message.
        call: the call in it.
        word: shown by a channel to those who have the rights of its login role.
        lock: the key of the lock that goes with a word shown in advance.
        found: the server's answer about the role in the question; empty if there is none.
        roles: OIDs of the roles as which the calling code can run, once proven.
    """

    def __init__(
        self, question: Message, call: Call, server_version: int, offered: bytes | None = None
    ) -> None:
        """`offered`: the word shown in advance; otherwise a new one is made."""
        self.question = question
        self.call = call
        self.word = new_word() if offered is None else offered
        self.lock = None if offered is None else lock_of(offered, server_version)
        self.found: tuple[bytes | None, ...] = ()
        self.roles: frozenset[bytes] = frozenset()
        self._server_version = server_version

    @property
    def size(self) -> int:
        """Bytes that the proof covers."""
        return len(self.word) + len(self.question.text)

    def proof(self) -> bytes:
        """The proof by a function that has read the word."""
        return self.proof_of(self.question)

    def proof_of(self, message: Message) -> bytes:
        """The proof for a message that continues the question."""
        return _hash(self.word + message.text, self._server_version)

    def is_met_by(self, message: Message, proof: bytes) -> bool:
        """Whether the message has the proof, and the same sender as the question."""
        self.roles = frozenset(message.roles.split(b","))
        return self.is_continued_by(message, proof)

    def is_continued_by(self, message: Message, proof: bytes) -> bool:
        """The same for a message without roles."""
        if (message.nonce, message.schema) != (self.question.nonce, self.question.schema):
            return False
        return hmac.compare_digest(message.proof, proof)


# --- answers -----------------------------------------------------------------------------------


class AnswerPieces:
    """An answer, or a block of one, while its pieces are shown.

    Attributes:
        nonce: of the question.
        marks: by which its pieces are recognised.
        may_offer: whether to show the function a word for the next question.
        narrow: whether the function may be unable to see the channel's query.
        is_refusal: whether the question is not proven, so that its word is not known.
        room: how many characters of a query the channel shows.
    """

    def __init__(
        self,
        nonce: bytes,
        marks: AnswerMarks,
        key: bytes,
        answer: Answer,
        *,
        may_offer: bool = False,
        encoding: bytes,
        server_version: int,
    ) -> None:
        """
        Args:
            nonce: of the question.
            marks: of the question.
            key: enciphers the pieces.
            answer: the first.
            may_offer: whether a word may be shown beside the last piece.
            encoding: of the answer.
            server_version: as server_version_num, e.g. 150004.
        """
        self.may_offer = may_offer
        self.nonce = nonce
        self.marks = marks
        self.narrow = self.is_refusal = False
        self.room = 0
        self._key = key
        self._encoding = encoding
        self._server_version = server_version
        self._answer = array_text(answer, encoding)
        self._first = 0  # the number of its first piece
        # A prepared piece: its number and size, and its data.
        self._ready: tuple[tuple[int, int], bytes] | None = None

    def go_on(self, answer: Answer, number: int) -> None:
        """From this number on, the pieces are those of another block."""
        self._ready = None
        self._answer = array_text(answer, self._encoding)
        self._first = number

    @property
    def _states(self) -> tuple[bytes, bytes]:
        return (b"x", b"y") if self.is_refusal else (b"a", b"b")

    @property
    def is_narrow(self) -> bool:
        """Whether the pieces are shown in application_name."""
        return self.narrow or self.room < _LEAST_ROOM or len(self._answer) <= _NARROW

    @property
    def _size(self) -> int:
        return _NARROW if self.is_narrow else (self.room - _BEFORE_DATA) // 4 * 3

    def _data(self, number: int) -> bytes:
        """The data of one piece, as shown."""
        start = (number - self._first) * self._size
        key = b"%b%d " % (self._key, number)
        data = _enciphered(self._answer[start : start + self._size], key, self._server_version)
        return base64.b64encode(data)

    def prepare(self, number: int) -> None:
        """Prepare a piece while the function handles the one before."""
        self._ready = ((number, self._size), self._data(number))

    def is_last(self, number: int) -> bool:
        return len(self._answer) <= (number - self._first + 1) * self._size

    @property
    def after(self) -> int:
        """The number that follows the last piece."""
        return self._first + max(1, -(-len(self._answer) // self._size))

    def piece(self, number: int, offer: bytes | None = None) -> tuple[bytes, bytes]:
        """What application_name and the beginning of the query show for one piece.

        Args:
            number: of the piece.
            offer: a word for the next question, to be shown beside it.
        """
        place = (number, self._size)
        if self._ready is None or self._ready[0] != place:
            self._ready = (place, self._data(number))
        data = self._ready[1]
        count = b"%0*d" % (_DIGITS, number % 10**_DIGITS)
        is_last = self.is_last(number)
        if self.is_narrow:
            comment = b"" if offer is None else offered(offer)
            last, others = self._states
            return self.marks.tag + (last if is_last else others) + count + data, comment
        before = b"" if offer is None else _OFFER % offer
        # A blank, since the data may end in "/", and comments nest.
        comment = self.marks.comment(b"%b%b%b " % (count, before, data))
        return self.marks.tag + (b"q" if is_last else b"r") + count, comment


def answer_of(value: Any, function: Function, encoding: bytes) -> Answer:
    """The answer for a function's result."""
    columns = function.columns
    if not columns:
        return [b"v", text_form(value, function.result_type, UTC)]

    def texts(row: Sequence[Any]) -> Answer:
        return [text_form(v, c.type, UTC) for v, c in zip(row, columns, strict=False)]

    if function.returns_set:
        return [b"v", array_2_text([texts(row) for row in value], encoding)]
    return [b"n"] if value is None else [b"v", *texts(value)]
