"""What the functions in the database say: their messages, taken apart, and the calls in them.

`conversation` has the whole of it, and what the proxy says.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    SQLError,
)
from protocol.messages import NoticeResponse
from proxy.api.functions import DECLARED, Function, Needs
from proxy.config.gucs import GUCS
from proxy.jobs.context import NOT_CARRIED_OVER
from proxy.sql.recoding import readable

if TYPE_CHECKING:
    from proxy.jobs.at_commit import Notification
    from proxy.jobs.job import Job

Settings = tuple[tuple[bytes, bytes], ...]

SPEAKER: Final = "_pg_background_say"
"""The function without arguments that raises all messages of the others."""

_LONGEST_NUMBER: Final = 9

_FEWEST_SETTINGS: Final = 3
"""``pg_background.`` settings that objects of before know."""

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


def identity(function: Function) -> str:
    """What a call names its function by: name, parameters and result, so that an overload, and a
    dump that was restored with another version of the proxy, are told apart."""
    parameters = ", ".join(parameter.name for parameter in function.parameters)
    return f"{function.name}({parameters}) {function.result_type.name}"


_FUNCTIONS: Final = {identity(function).encode(): function for function in DECLARED}


class NotOursError(Exception):
    """A message that no body of ours has sent."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a function, taken apart, but not decoded.

    Attributes:
        text: the whole, or what its proof is made over.
        schema: of the function that speaks, as the server has told it.
        nonce: made up for the question that it belongs to.
        verb: what kind it is.
        words: as they stand there, but for the next three.
        channel: of ``ask``, whose word the proof is made with: its pid, or ``-``.
        proof: of ``ask``, ``settings`` and ``proof``; ``-`` for none.
        roles: of ``ask`` and ``proof``: OIDs of those as which the calling code can run.
    """

    text: bytes
    schema: bytes
    nonce: bytes
    verb: bytes
    words: tuple[bytes, ...]
    channel: bytes = b"-"
    proof: bytes = b"-"
    roles: bytes = b""

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
        if verb in (b"proof", b"next", b"still") and len(text) > _LARGEST_STEP:
            raise NotOursError
        if len(words) < _VERBS[verb]:
            raise NotOursError
        if verb == b"proof" and len(words) != _VERBS[verb]:
            # The last word is the speaker's own, which makes it one too many after others.
            raise NotOursError
        if verb == b"ask":
            # From the end, since the speaker adds the last word; the first ones may be too many.
            text, proof, roles = text.rsplit(b" ", 2)
            *words, channel = words[:-2]
            return cls(text, schema, nonce, verb, tuple(words), channel, proof, roles)
        if verb == b"settings":
            *words, proof = words
            text = text.rsplit(b" ", 1)[0]
            return cls(text, schema, nonce, verb, tuple(words), proof=proof)
        if verb == b"proof":
            return cls(text, schema, nonce, verb, tuple(words), proof=words[0], roles=words[1])
        return cls(text, schema, nonce, verb, tuple(words))


_VERBS: Final = {
    b"ask": 8,
    b"settings": 1,
    b"next": 1,
    b"still": 0,
    b"call": 5,
    b"custom": 3,
    b"proof": 2,
}
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
        settings: of the session, if it says them; ``ask`` is followed by them instead.
        custom_settings: names of those whose values the function is asked for.
        launched: the jobs that it has started.
        notification: what its transaction is to send.
        is_asked: whether its function knows of words that are shown in advance.
    """

    def __init__(self, message: Message) -> None:
        """Raises SQLError for what no function of ours has said, NotOursError."""
        words = message.words
        try:
            role, session_role, name, encoding = map(decoded, words[1:5])
            own_settings, count, rest = _parts(words)
            self.argument_words = rest[:count]
            self.settings = settings_of(rest[count:])
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
            name: text.decode("utf-8", "replace") for name, text in own_settings.items()
        }
        self.custom_settings: tuple[bytes, ...] = ()
        self.launched: list[Job] = []
        self.notification: Notification | None = None
        self.is_asked = message.verb == b"ask"

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


def _parts(words: tuple[bytes, ...]) -> tuple[dict[str, bytes], int, tuple[bytes, ...]]:
    """What a call says from its sixth word on: the ``pg_background.`` settings that are set, the
    number of its arguments, and the words from these on. Raises ValueError, LookupError.

    In front are the number of settings, in the order of GUCS, and that of arguments. Objects of
    before say the first settings alone, and behind them the number of arguments; what they say here
    has no colon.
    """
    known, colon, count = (decoded(words[5]) or b"").partition(b":")
    if colon:
        number, first = int(known), 6
        rest = first + number
    else:
        number, first = _FEWEST_SETTINGS, 5
        rest = first + number + 1
        count = decoded(words[rest - 1]) or b""
    names = itertools.islice(GUCS, number)
    texts = map(decoded, words[first : first + number])
    settings = {name: text for name, text in zip(names, texts, strict=True) if text is not None}
    return settings, int(count), words[rest:]


def settings_of(words: Sequence[bytes]) -> Settings:
    """Names and values that a message tells, without those that a job does not take over, and
    without custom ones that are not set. Raises NotOursError."""
    texts = [decoded(word) for word in words]
    try:
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
    except ValueError:
        raise NotOursError from None
    return tuple(
        (name, value)
        for name, value in pairs
        if name is not None and value is not None and name not in NOT_CARRIED_OVER
    )


def malformed() -> SQLError:
    """What a call that is not in the table comes to."""
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        "pg-background-proxy does not know this function",
        hint="The extension's objects may be of another version: ALTER EXTENSION pg_background"
        " UPDATE.",
    )


def no_login(role: bytes, server_encoding: bytes, error: SQLError) -> SQLError:
    """Why there is no channel of the role that the calling code runs as. `server_encoding`: that of
    its name."""
    if not error.sqlstate.startswith("28"):
        return error
    name = readable(role, server_encoding)
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
