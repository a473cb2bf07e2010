"""Parses the messages of the functions in the database, and the calls in them.

`conversation` specifies the whole exchange.
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
"""The function without arguments that raises the messages of all others."""

_LONGEST_NUMBER: Final = 9

_FEWEST_SETTINGS: Final = 3
"""``pg_background.`` settings that objects of older proxies know."""

LARGEST_QUESTION: Final = 1024 * 1024
"""Bytes of a question, except a call that carries SQL."""

_LARGEST_STEP: Final = 1024
"""Bytes of a message that continues a question."""

_MAX_WORDS: Final = 8192

LONGEST_LINE: Final = 1024
"""Bytes of a line of CONTEXT that are read."""

# The function in the first line of CONTEXT. The words around it are translated; their quotation
# marks enclose the whole (Korean) or are absent.
_SIGNATURE: Final = rb'("(?:[^"]|"")*"|[a-z_][a-z0-9_]*)\.(?:%b|"%b")\(\)' % (
    (SPEAKER.encode(),) * 2
)
_SPEAKER: Final = re.compile(rb'[^"]*?(?:%b(?!")|(?<= )"%b" )' % (_SIGNATURE, _SIGNATURE))


def identity(function: Function) -> str:
    """How a call identifies its function: name, parameters and result. So overloads, and dumps that
    were restored with another version of the proxy, are recognised."""
    parameters = ", ".join(parameter.name for parameter in function.parameters)
    return f"{function.name}({parameters}) {function.result_type.name}"


_FUNCTIONS: Final = {identity(function).encode(): function for function in DECLARED}


class NotOursError(Exception):
    """A message that none of our functions has sent."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a function, split but not decoded.

    Attributes:
        text: the whole, or what its proof covers.
        schema: of the function that speaks, according to the server.
        nonce: of its question.
        verb: the kind of message.
        words: the words, except the next three.
        channel: of ``ask``: the pid of the channel whose word the proof uses, or ``-``.
        proof: of ``ask``, ``settings`` and ``proof``; ``-`` for none.
        roles: of ``ask`` and ``proof``: OIDs of the roles as which the calling code can run.
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
        """Raises NotOursError for what no function of ours has sent."""
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
        _, nonce, verb, *words = [*text.split(b" ", _MAX_WORDS), b"", b""]
        del words[-2:]
        if len(nonce) != 32 or not nonce.isalnum() or verb not in _VERBS:
            raise NotOursError
        if verb in (b"proof", b"next", b"still") and len(text) > _LARGEST_STEP:
            raise NotOursError
        if len(words) < _VERBS[verb]:
            raise NotOursError
        if verb == b"proof" and len(words) != _VERBS[verb]:
            # The speaker adds the last word; behind forged ones it is one too many.
            raise NotOursError
        if verb == b"ask":
            # From the end, where the speaker adds its word: there may be too many before.
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
"""The least number of words of each."""


def parse_number(word: bytes) -> int:
    """The number of a piece. Raises NotOursError."""
    if not word.isdigit() or len(word) > _LONGEST_NUMBER:
        raise NotOursError
    return int(word)


def decoded(word: bytes) -> bytes | None:
    """The text that a word encodes. Raises NotOursError."""
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
    """A call, as described by its question.

    Attributes:
        encoding: the client_encoding of its words.
        role, session_role: names of the current role and the session's.
        argument_words: its arguments, not decoded.
        own_settings: the ``pg_background.`` settings.
        settings: the session's, if included; after ``ask`` they follow separately.
        custom_settings: names whose values the function is asked for.
        launched: the jobs that it has started.
        notification: what its transaction must send.
        is_asked: whether its function knows words that are shown in advance.
    """

    def __init__(self, message: Message) -> None:
        """Raises SQLError for a call that no function of ours makes, NotOursError."""
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
        """The function called. Raises SQLError if it is unknown."""
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
    """The part of a call from its sixth word on: the ``pg_background.`` settings that are set, the
    number of arguments, and the words from these on. Raises ValueError, LookupError.

    It begins with the numbers of settings, in the order of GUCS, and of arguments. Older objects
    send the first settings only, then the number of arguments, without a colon.
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
    """Names and values of settings in a message, without those that jobs do not take over, and
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
    """The error for a call that is not in the table."""
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        "pg-background-proxy does not know this function",
        hint="The extension's objects may be of another version: ALTER EXTENSION pg_background"
        " UPDATE.",
    )


def no_login(role: bytes, server_encoding: bytes, error: SQLError) -> SQLError:
    """The error for calling code whose role has no channel. `server_encoding`: of its name."""
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
    """The error if the channel's query has no room for a word."""
    return SQLError(
        OBJECT_NOT_IN_PREREQUISITE_STATE,
        "calls from inside the database are not served here",
        detail="The server shows no queries, by which the calling code could prove its role.",
        hint="Set track_activities to on.",
    )
