"""How the functions in the database and the proxy talk: what they say, and how it is written.

Invariant: text proves nothing. A question counts only with the rights of a role that the server
grants to the code that asks. `docs/security.md` has the model. There is no I/O here: `in_database`
holds the conversation, `sql/ask.sql` is the functions' half of it, made with
the sizes and places defined here (`NAMES`).

A function speaks by an INFO message, which the server sends at once, in the middle of a statement:

    token nonce verb word word ...

``token`` is the session's, ``nonce`` is made up for each question, and the words are base64 of text
in the client's encoding, ``-`` for NULL. The proxy takes the message off the stream and answers
through a channel (`channels`): an idle backend of a login role, whose application_name every role
can see, and whose query only code with the rights of that role. In application_name the answer is
announced:

    tag state number data

``tag`` tells the function that this is for it. The states:

- ``pw``, ``pt``: prove it. The channel's query has a fresh random word in it, which the function
  must read. With ``pw`` the channel holds an advisory lock on which the function can wait for the
  answer; with ``pt`` it could not get the lock, and the function looks again and again.
- ``a``: an answer, here as data, 32 bytes; ``b``: the same, but there is more.
- ``q`` and ``r``: the same, with the data in the channel's query, behind a mark.

A question goes like this:

1. ``call`` or ``custom``. Its first word says whose channel is to show the word to be read: ``-``
   for the role that the session has logged in as. Code that cannot RESET ROLE (it runs as another
   owner) names that owner instead, and the proxy logs in as him, if it has his credentials.
2. The channel shows the word.
3. ``proof``, with a hash of the word and of the whole first message, and the OIDs of the roles as
   which the calling code can run, by RESET ROLE and RESET SESSION AUTHORIZATION too. If the
   channel's login role is among them, the question counts from here on, with the rights of that
   role and no others.
4. The answer, piece by piece: ``next`` asks for the next one.

Tag, lock and mark come from the nonce and a secret that the session and the proxy share. Answers
are enciphered with a pad that is made of secret, word and nonce, so they mean nothing to those who
may see all queries, or the server's log.

Where no channel can be opened, nothing can be told to the function: the proxy cancels the
statement, and puts the reason in the place of that error.

The pieces of an answer are numbered. With each piece that is not the last the channel takes the
lock for the next one, whose key is that of the first XOR the number, so the function can wait for
that at once.

An answer is a text[]: ``e`` and the fields of an error; ``v`` and the value, those of a composite
result, or the rows as a text[][]; ``n`` for no composite; ``c`` and names of custom settings, whose
values the function tells with a question of its own, ``custom``; or a block of a result (`blocks`),
after which the next piece is that of the next block.

A member of pg_read_all_stats can read every word, and so can a role that inherits another, without
becoming it. So only messages count that the extension's function `_pg_background_say` raises. It
adds the roles itself: the server names PL/pgSQL's RAISE and the function in the message, and the
channel is asked whether the function is the extension's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final

from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    SQLError,
)
from protocol.messages import NoticeResponse
from proxy.api.functions import DECLARED, Function, Needs
from proxy.api.values import text_form
from proxy.config.gucs import GUCS, session_secret
from proxy.jobs.context import NOT_CARRIED_OVER
from proxy.sql.encodings import array_2_text, array_text

if TYPE_CHECKING:
    from proxy.jobs.job import Job

Answer = list[bytes | None]

SPEAKER: Final = "_pg_background_say"
"""The function without arguments that raises all messages of the others."""

# --- sizes and places, for both halves ---------------------------------------------------------

_TOKEN: Final = slice(0, 32)
_SECRET: Final = slice(32, 64)
"""Of the session's setting."""

_TAG: Final = slice(0, 12)
_LOCK: Final = slice(12, 28)
_MARK: Final = slice(28, 60)
"""Of the hash of a question: what its answers are known by in application_name, the key of the
advisory lock for its first piece, and what the channel's query begins with."""

_WORD: Final = 32
"""Characters of the word to be proven with."""

_DIGITS: Final = 4
"""Of the number of a piece in application_name and in a query."""

_COMMENT: Final = "/*"


def _part(text: str, part: slice) -> str:
    """As SQL says it."""
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
}
"""What the PL/pgSQL calls these, by the placeholder that stands for it there."""


def identity(function: Function) -> str:
    """What a call names its function by: name, parameters and result, so that an overload, and a
    dump that was restored with another version of the proxy, are told apart."""
    parameters = ", ".join(parameter.name for parameter in function.parameters)
    return f"{function.name}({parameters}) {function.result_type.name}"


_FUNCTIONS: Final = {identity(function).encode(): function for function in DECLARED}

_NARROW: Final = 32
"""Bytes of an answer that application_name has room for."""

_BEFORE_DATA: Final = len(_COMMENT) + _MARK.stop - _MARK.start + _DIGITS
"""Characters of a query before the data: the comment's begin, the mark and the number."""

_LEAST_ROOM: Final = 256
"""Characters of a query with less of which it is not used."""

_LONGEST_NUMBER: Final = 9

LARGEST_QUESTION: Final = 1024 * 1024
"""Bytes of a question other than a call that carries SQL."""

_LARGEST_STEP: Final = 1024
"""Bytes of a message that goes on with a question."""

_MOST_WORDS: Final = 8192

LONGEST_LINE: Final = 1024
"""Bytes of a line of CONTEXT that are looked at."""

# The function in the first line of CONTEXT. Around it are words in whatever language; quotation
# marks of theirs stand around the whole (Korean) or nowhere.
_SIGNATURE: Final = rb'("(?:[^"]|"")*"|[a-z_][a-z0-9_]*)\.(?:%b|"%b")\(\)' % (
    (SPEAKER.encode(),) * 2
)
_SPEAKER: Final = re.compile(rb'[^"]*?(?:%b(?!")|(?<= )"%b" )' % (_SIGNATURE, _SIGNATURE))


# --- questions ---------------------------------------------------------------------------------


class NotOursError(Exception):
    """A message that no body of ours has sent."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a function, taken apart, but not decoded.

    Attributes:
        text: the whole.
        schema: of the function that speaks, as the server has told it.
        nonce: made up for the question that it belongs to.
        verb: what kind it is.
        words: as they stand there.
    """

    text: bytes
    schema: bytes
    nonce: bytes
    verb: bytes
    words: tuple[bytes, ...]

    @classmethod
    def parse(cls, notice: NoticeResponse) -> Message:
        """Raises NotOursError for what no function of ours has said."""
        if notice.severity != "INFO" or notice.fields.get("R") != b"exec_stmt_raise":
            raise NotOursError
        line = notice.fields.get("W", b"")[:LONGEST_LINE].partition(b"\n")[0]
        speaker = _SPEAKER.match(line)
        if speaker is None:
            raise NotOursError
        schema = speaker[1] or speaker[2]
        if schema.startswith(b'"'):
            schema = schema[1:-1].replace(b'""', b'"')
        text = notice.message
        _, nonce, verb, *words = [*text.split(b" ", _MOST_WORDS), b"", b""]
        del words[-2:]
        if len(nonce) != 32 or not nonce.isalnum() or verb not in _VERBS:
            raise NotOursError
        if verb not in (b"call", b"custom") and len(text) > _LARGEST_STEP:
            raise NotOursError
        if len(words) < _VERBS[verb]:
            raise NotOursError
        return cls(text, schema, nonce, verb, tuple(words))


_VERBS: Final = {b"call": 5, b"custom": 3, b"proof": 2, b"next": 1}
"""How many words each has at least."""


def parse_number(word: bytes) -> int:
    """Of a piece. Raises NotOursError."""
    if not word.isdigit() or len(word) > _LONGEST_NUMBER:
        raise NotOursError
    return int(word)


def decoded(word: bytes) -> bytes | None:
    """What a word says. Raises NotOursError."""
    if word == b"-":
        return None
    try:
        text = base64.b64decode(word, validate=True)
    except ValueError:
        raise NotOursError from None
    if b"\0" in text:
        raise NotOursError
    return text


class Call:
    """A call, as its question says it.

    Attributes:
        encoding: the client_encoding of its words.
        role, session_role: names of the current role, and of the session's.
        argument_words: its arguments, not decoded.
        own_settings: the ``pg_background.`` settings.
        settings: of the session, if they are needed.
        custom_settings: names of those whose values the function is asked for.
        launched: the jobs that it has started.
    """

    def __init__(self, message: Message) -> None:
        """Raises SQLError for what no function of ours has said, NotOursError."""
        words = message.words
        own = 5 + len(GUCS)
        try:
            role, session_role, name, encoding, *texts = map(decoded, words[1:own])
            count = int(decoded(words[own]) or b"")
            self.argument_words = words[own + 1 : own + 1 + count]
            settings = [decoded(word) for word in words[own + 1 + count :]]
            pairs = list(zip(settings[::2], settings[1::2], strict=True))
        except (ValueError, LookupError):
            raise NotOursError from None
        if count < 0 or len(self.argument_words) != count:
            raise NotOursError
        self._function = _FUNCTIONS.get(name or b"")
        self.encoding, self.role, self.session_role = (
            encoding or b"",
            role or b"",
            session_role or b"",
        )
        self.own_settings = {
            name: text.decode("utf-8", "replace")
            for name, text in zip(GUCS, texts, strict=True)
            if text is not None
        }
        self.settings = tuple(
            (name or b"", value or b"")
            for name, value in pairs
            if name is not None and name not in NOT_CARRIED_OVER
        )
        self.custom_settings: tuple[bytes, ...] = ()
        self.launched: list[Job] = []

    @property
    def function(self) -> Function:
        """What is called. Raises SQLError if we do not know it."""
        if self._function is None:
            raise malformed()
        return self._function

    @property
    def is_known(self) -> bool:
        """Whether there is such a function."""
        return self._function is not None

    def check_size(self, size: int) -> None:
        """Raises NotOursError for a message larger than the call can be."""
        carries_sql = self._function is not None and Needs.SETTINGS in self._function.needs
        if size > LARGEST_QUESTION and not carries_sql:
            raise NotOursError


def malformed() -> SQLError:
    """What a call that is not in the table comes to."""
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        "pg-background-proxy does not know this function",
        hint="The extension's objects may be of another version: ALTER EXTENSION pg_background"
        " UPDATE.",
    )


def no_login(role: bytes, error: SQLError) -> SQLError:
    """Why there is no channel of the role that the calling code runs as."""
    if not error.sqlstate.startswith("28"):
        return error
    name = role.decode("utf-8", "replace")
    return SQLError(
        INSUFFICIENT_PRIVILEGE,
        f'cannot start a background worker as role "{name}"',
        detail=f'The calling code runs as "{name}" (as the owner of a SECURITY DEFINER function, a'
        " table or an index), so the background worker must log in as that role, which failed:"
        f" {(error.detail or error.message).rstrip('.')}.",
        hint=f'Give the proxy the password of role "{name}" in its passfile or auth_file, or set'
        " auth_query; the role must have LOGIN.",
    )


def unprovable() -> SQLError:
    """The channel has no query to show a word in."""
    return SQLError(
        OBJECT_NOT_IN_PREREQUISITE_STATE,
        "calls from inside the database are not served here",
        detail="The server shows no queries, by which the calling code could prove its role.",
        hint="Set track_activities to on.",
    )


# --- secrets and proof -------------------------------------------------------------------------


class Secrets:
    """What the session and the proxy share, and what is made from it.

    Attributes:
        token: 32 hexadecimal digits; a message of ours begins with it.
        setting: what goes into the session's startup packet.
    """

    def __init__(self, setting: bytes | None = None) -> None:
        """`setting`: what the session has been given already, if anything."""
        self.setting = setting or session_secret()
        self.token, self._secret = self.setting[_TOKEN], self.setting[_SECRET]

    def signs(self, nonce: bytes, *, server_version: int) -> Signs:
        """What the function knows the answers to one question by; it cannot be guessed."""
        return Signs(_hash(self._secret + nonce, server_version))

    def key(self, word: bytes, nonce: bytes) -> bytes:
        """What the answers to one question are enciphered with."""
        return b"%b%b%b " % (self._secret, word, nonce)


class Signs:
    """What the answers to one question are known by.

    Attributes:
        tag: what application_name begins with.
        mark: what a query begins with, behind the comment's begin.
    """

    def __init__(self, hash: bytes) -> None:
        """`hash`: 64 hexadecimal digits."""
        self.tag, self.mark = hash[_TAG], hash[_MARK]
        self._lock = int.from_bytes(bytes.fromhex(hash[_LOCK].decode()), "big", signed=True)

    def lock(self, number: int) -> int:
        """The key of the advisory lock for a piece."""
        return self._lock ^ number

    def ask_for_proof(self) -> bytes:
        """The SELECT by which a channel asks for the proof, and takes the lock for the answer."""
        return (
            b"SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.set_config('application_name',"
            b" CASE WHEN pg_catalog.pg_try_advisory_lock(%d) THEN '%bpw' ELSE '%bpt' END, false)"
            % (self.lock(0), self.tag, self.tag)
        )

    def comment(self, text: bytes) -> bytes:
        """What the query begins with that shows a text."""
        return b"%b%b%b*/" % (_COMMENT.encode(), self.mark, text)


def _hash(text: bytes, server_version: int) -> bytes:
    """64 hexadecimal digits; `bodies` has the same, and before 11 there is no SHA-2."""
    if server_version >= 110000:
        return hashlib.sha256(text).hexdigest().encode()
    halves = [hashlib.md5(text + end, usedforsecurity=False) for end in (b"a", b"b")]
    return b"".join(half.hexdigest().encode() for half in halves)


def _enciphered(data: bytes, key: bytes, server_version: int) -> bytes:
    """Data XOR a pad that is made of the key."""
    pad = b"".join(
        bytes.fromhex(_hash(b"%b%d" % (key, n), server_version).decode())
        for n in range((len(data) + 31) // 32)
    )[: len(data)]
    number = int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")
    return number.to_bytes(len(data), "big")


class Challenge:
    """A question whose function has yet to prove the rights that it calls with.

    Attributes:
        question: the message.
        call: what it says.
        word: what a channel shows to those who have the rights of its login role.
        found: what the server says about the role that the question names; empty if there is none.
        roles: OIDs of those as which the calling code can run, once it is met.
    """

    def __init__(self, question: Message, call: Call, server_version: int) -> None:
        self.question = question
        self.call = call
        self.word = secrets.token_hex(_WORD // 2).encode()
        self.found: tuple[bytes | None, ...] = ()
        self.roles: frozenset[bytes] = frozenset()
        self._server_version = server_version

    @property
    def size(self) -> int:
        """Bytes that the proof is made of."""
        return len(self.word) + len(self.question.text)

    def proof(self) -> bytes:
        """What only a function can say that has read the word."""
        return _hash(self.word + self.question.text, self._server_version)

    def is_met_by(self, message: Message, proof: bytes) -> bool:
        """Whether the message has the proof, and comes from where the question came from."""
        if (message.nonce, message.schema) != (self.question.nonce, self.question.schema):
            return False
        self.roles = frozenset(message.words[1].split(b","))
        return hmac.compare_digest(message.words[0], proof)


# --- answers -----------------------------------------------------------------------------------


class Handover:
    """An answer, or a block of one, that is being handed over.

    Attributes:
        nonce: of the question.
        signs: what its pieces are known by.
        narrow: whether the function may be unable to see the channel's query.
        room: how many characters of a query the channel shows.
    """

    def __init__(
        self,
        nonce: bytes,
        signs: Signs,
        key: bytes,
        answer: Answer,
        *,
        encoding: bytes,
        server_version: int,
    ) -> None:
        """`key`: what the pieces are enciphered with. `encoding`: of the answer."""
        self.nonce = nonce
        self.signs = signs
        self.narrow = False
        self.room = 0
        self._key = key
        self._encoding = encoding
        self._server_version = server_version
        self._answer = array_text(answer, encoding)
        self._first = 0  # the number of its first piece

    def go_on(self, answer: Answer, number: int) -> None:
        """The pieces from this number on are those of another block."""
        self._answer = array_text(answer, self._encoding)
        self._first = number

    @property
    def is_narrow(self) -> bool:
        """Whether it goes through application_name."""
        return self.narrow or self.room < _LEAST_ROOM or len(self._answer) <= _NARROW

    @property
    def _size(self) -> int:
        return _NARROW if self.is_narrow else (self.room - _BEFORE_DATA) // 4 * 3

    def is_last(self, number: int) -> bool:
        """Whether it is the last one."""
        return len(self._answer) <= (number - self._first + 1) * self._size

    def piece(self, number: int) -> tuple[bytes, bytes]:
        """What application_name and the beginning of the query show of one piece."""
        start = (number - self._first) * self._size
        key = b"%b%d " % (self._key, number)
        data = _enciphered(self._answer[start : start + self._size], key, self._server_version)
        data = base64.b64encode(data)
        count = b"%0*d" % (_DIGITS, number % 10**_DIGITS)
        is_last = self.is_last(number)
        if self.is_narrow:
            return self.signs.tag + (b"a" if is_last else b"b") + count + data, b""
        # A blank, since the data may end in "/": comments nest.
        comment = self.signs.comment(b"%b%b " % (count, data))
        return self.signs.tag + (b"q" if is_last else b"r") + count, comment


def answer_of(value: Any, function: Function, encoding: bytes) -> Answer:
    """The answer that has what a function returns."""
    columns = function.columns
    if not columns:
        return [b"v", text_form(value, function.result_type, UTC)]

    def texts(row: Sequence[Any]) -> Answer:
        return [text_form(v, c.type, UTC) for v, c in zip(row, columns, strict=False)]

    if function.returns_set:
        return [b"v", array_2_text([texts(row) for row in value], encoding)]
    return [b"n"] if value is None else [b"v", *texts(value)]
