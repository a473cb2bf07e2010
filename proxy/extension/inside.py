"""Calls from inside the database: functions, triggers, views, DO blocks, whatever the server runs.

Invariant: a call is served with the rights of a role only if the calling code has proven that the
server grants it the rights of that role. Text proves nothing: code of others runs in a session all
the time (index functions under REINDEX or ANALYZE, SECURITY DEFINER functions, triggers), and can
say whatever the functions of the extension say. `docs/security.md` has the model.

This is one half of a conversation; the other half are the SQL functions in `bodies`. A function
speaks by an INFO message, which the server sends at once, in the middle of a statement:

    token nonce verb word word ...

``token`` is the session's, ``nonce`` is made up for each question, and the words are base64 of text
in the client's encoding, ``-`` for NULL. The proxy takes the message off the stream and answers
through a channel (`channels`): an idle backend of a login role, whose application_name every role
can see, and whose query only code with the rights of that role. In application_name the answer is
announced:

    tag state number data

``tag`` (12 characters) tells the function that this is for it. The states:

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

import asyncio
import base64
import hashlib
import hmac
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from protocol.errors import (
    CONNECTION_FAILURE,
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    QUERY_CANCELED,
    UNDEFINED_OBJECT,
    ServerError,
    SQLError,
)
from protocol.messages import ErrorResponse, NoticeResponse
from protocol.values import parse_array
from proxy.api.calls import permission_denied
from proxy.api.functions import DECLARED, Function, Needs
from proxy.api.values import decode_argument, text_form
from proxy.backends.channels import Channel, Rows
from proxy.config.gucs import GUCS, MAX_WORKERS
from proxy.extension.blocks import Answer, Blocks
from proxy.extension.bodies import identity
from proxy.extension.context import role_query
from proxy.jobs.context import NOT_CARRIED_OVER, Context
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.jobs.registry import Handle, JobRecord
from proxy.log import logger
from proxy.sql import encodings
from proxy.sql.encodings import array_2_text, array_text

if TYPE_CHECKING:
    from proxy.jobs.job import Jobs
    from proxy.jobs.launcher import Launcher
    from proxy.jobs.owner import Owner


P = ParamSpec("P")

_FUNCTIONS: Final = {identity(function).encode(): function for function in DECLARED}

_NARROW: Final = 32
"""Bytes of an answer that application_name has room for."""

_BEFORE_DATA: Final = 38
"""Characters of a query before the data: the comment's begin, the mark and the number."""

_LEAST_ROOM: Final = 256
"""Characters of a query with less of which it is not used."""

_LONGEST_NUMBER: Final = 9

_LARGEST_QUESTION: Final = 1024 * 1024
"""Bytes of a question other than a call that carries SQL."""

_LARGEST_STEP: Final = 1024
"""Bytes of a message that goes on with a question."""

_MOST_WORDS: Final = 8192

_TURN: Final = 200
"""Messages that are read before others have their turn; each takes some 30 us."""

_WHOLE_AT_ONCE: Final = 512 * 1024
"""Bytes of a word that are decoded without a pause for others."""

_ASK: Final = b"_pg_background_ask("
# The function in the first line of CONTEXT. Around it are words in whatever language; quotation
# marks of theirs stand around the whole (Korean) or nowhere.
_SIGNATURE: Final = (
    rb'("(?:[^"]|"")*"|[a-z_][a-z0-9_]*)\.(?:_pg_background_say|"_pg_background_say")\(\)'
)
_SPEAKER: Final = re.compile(rb'[^"]*?(?:%b(?!")|(?<= )"%b" )' % (_SIGNATURE, _SIGNATURE))
_LONGEST_LINE: Final = 1024
"""Bytes of a line of CONTEXT that are looked at."""
_OWN_LINE: Final = re.compile(
    rb"pg_background_(?:ask|call|elements)\(|\bpg_background_\w{1,63}\((?:integer|text|bigint|\)|[^\s(]{0,256}pg_background_handle)"
)


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
        line = notice.fields.get("W", b"")[:_LONGEST_LINE].partition(b"\n")[0]
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


def _number(word: bytes) -> int:
    if not word.isdigit() or len(word) > _LONGEST_NUMBER:
        raise NotOursError
    return int(word)


def _word(word: bytes) -> bytes | None:
    if word == b"-":
        return None
    try:
        text = base64.b64decode(word, validate=True)
    except ValueError:
        raise NotOursError from None
    if b"\0" in text:
        raise NotOursError
    return text


async def _long_word(word: bytes) -> bytes | None:
    """The same for one that may be of many megabytes: others get their turn in between."""
    parts = []
    for start in range(0, len(word), _WHOLE_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        parts.append(_word(word[start : start + _WHOLE_AT_ONCE]))
    if len(parts) == 1:
        return parts[0]
    return b"".join(part or b"" for part in parts)


class Secrets:
    """What the session and the proxy share, and what is made from it.

    Attributes:
        token: 32 hexadecimal digits; a message of ours begins with it.
        setting: what goes into the session's startup packet.
    """

    def __init__(self, setting: bytes | None = None) -> None:
        """`setting`: what the session has been given already, if anything."""
        self.setting = setting or secrets.token_hex(32).encode()
        self.token, self._secret = self.setting[:32], self.setting[32:]

    def hash(self, nonce: bytes, *, server_version: int) -> bytes:
        """64 hexadecimal digits that cannot be guessed, for one question."""
        return _hash(self._secret + nonce, server_version)

    def key(self, word: bytes, nonce: bytes) -> bytes:
        """What the answers to one question are enciphered with."""
        return b"%b%b%b " % (self._secret, word, nonce)


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


class Inside:
    """The calls of one session that come from inside the database. There is one at a time."""

    def __init__(self, session: Owner, secrets: Secrets) -> None:
        self._session = session
        self.secrets = secrets
        self._interrupts = Interrupts()
        # From the first call in a statement to its end; as which role it has logged in, None for
        # the session's; whether code has proven that role; whether it holds the lock that the
        # function waits for next.
        self._channel: Channel | None = None
        self._login: bytes | None = None
        self._is_proven = False
        self._is_locked = False
        # What is done for a function that waits, and what waits for that to end; a question that
        # is not proven; what the function is told piece by piece.
        self._heard = 0
        self._task: asyncio.Task[None] | None = None
        self._next_task: asyncio.Task[None] | None = None
        self._challenge: _Challenge | None = None
        self._shown: _Shown | None = None
        # A call that goes on with the next question: one that needs custom settings, or whose rows
        # are not all handed over.
        self._call: _Call | None = None
        self._blocks: Blocks | None = None
        self._coming: asyncio.Task[Answer] | None = None
        # The last error that was handed over; why the statement is being canceled.
        self._error: ErrorResponse | None = None
        self._refusal: SQLError | None = None

    # What the session tells

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the primary backend; whether it was a call, and is dealt with."""
        if self.secrets.token not in body:
            return False
        notice = NoticeResponse.parse(body)
        if not notice.message.startswith(self.secrets.token):
            return False
        try:
            message = Message.parse(notice)
        except NotOursError:
            return False
        self._heard += 1
        if message.verb == b"call":
            self._drop()
            self._refusal = None
        elif self._next_task is not None:
            return True  # A function waits for the answer before it asks again.
        work = self._guard(message, self._task)
        task = asyncio.get_running_loop().create_task(work)
        if self._task is None:
            self._task = task
        else:
            self._next_task = task
        task.add_done_callback(self._task_done)
        return True

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if task is self._task:
            self._task, self._next_task = self._next_task, None
        elif task is self._next_task:
            self._next_task = None

    @property
    def is_talkative(self) -> bool:
        """Whether so much was heard that others should have their turn. A function that waits for
        each answer says little; a loop can say a hundred thousand things."""
        if self._heard < _TURN:
            return False
        self._heard = 0
        return True

    @property
    def is_asked(self) -> bool:
        """Whether a function may be waiting for an answer."""
        return self._task is not None or self._channel is not None

    def statement_ended(self) -> None:
        """The server has sent an error, or is ready for the next query: no function waits."""
        self._drop()
        self._give_back()

    def _give_back(self) -> None:
        if self._channel is None:
            return
        channel, self._channel = self._channel, None
        if self._login is None or self._is_proven:
            self._session.give_back(channel)
        else:
            # Code that is not this role must not make us keep connections of it.
            channel.terminate()

    def end_client(self) -> None:
        """The client is gone, or will send no more: no job is waited for. A function would not
        notice that by itself."""
        self._interrupts.end_client(reads=True)

    def complaint(self, error: bytes) -> bytes | None:
        """What replaces an ErrorResponse with this body: one that a function of ours has raised is
        shown as a direct call would show it, without the lines of CONTEXT about our functions."""
        if _ASK not in error:
            return None
        response = ErrorResponse.parse(error)
        lines = response.fields.get("W", b"").split(b"\n")
        refusal, self._refusal = self._refusal, None
        if refusal is not None and response.sqlstate == QUERY_CANCELED:
            reason = refusal.response(encodings.codec(self._session.client_encoding)).fields
            response = response.with_fields(**{code: reason.get(code, b"") for code in "CMDH"})
            while _ASK not in lines[0]:
                del lines[0]  # where in our function it was canceled
        elif _ASK not in lines[0][:_LONGEST_LINE]:
            return None
        own = itertools.takewhile(lambda line: _OWN_LINE.search(line[:_LONGEST_LINE]), lines)
        del lines[: len(list(own))]
        told, self._error = self._error, None
        if told is not None and told.fields.get("M") == response.message and "W" in told.fields:
            lines.insert(0, told.fields["W"])
        fields = {code: value for code, value in response.fields.items() if value or code == "M"}
        fields.pop("W", None)
        if lines:
            fields["W"] = b"\n".join(lines)
        return ErrorResponse(fields).serialize()

    def _drop(self) -> None:
        """The function no longer waits: stop what is being done."""
        for task in (self._task, self._next_task, self._coming):
            if task is not None:
                task.cancel()
        self._task = self._next_task = self._coming = None
        self._challenge = self._shown = self._call = None
        if self._blocks is not None:
            self._end_blocks(self._blocks)

    # Serving

    async def _guard(self, message: Message, after: asyncio.Task[None] | None) -> None:
        """Deal with a message. `after`: what is still being done for the one before it, which may
        be answered already, so far as the function can see."""
        try:
            if after is not None:
                await asyncio.wait([after])
            await self._serve(message)
        except NotOursError:
            logger.debug("a malformed message from inside the database")
        except (OSError, SQLError) as error:
            self._give_up(message, error)
        except Exception as error:
            logger.exception("internal error; a call from inside the database fails")
            self._give_up(message, error)

    def _give_up(self, message: Message, error: Exception) -> None:
        """Nothing can be shown. A function that has seen its channel finds that it is gone. One
        that has not would go on looking for it, so its statement is canceled; the client gets
        `error` as the reason."""
        logger.info("no answer to a call from inside the database: %s", error)
        self._hang_up()
        if message.verb in (b"call", b"custom"):
            if not isinstance(error, SQLError):
                error = SQLError(CONNECTION_FAILURE, str(error) or "no answer")
            self._refusal = error
            self._session.cancel_statement()

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.terminate()
            self._channel = None

    async def _serve(self, message: Message) -> None:
        match message.verb:
            case b"call":
                self._call = None  # in case there is something wrong with this one
                call = _Call(message)
                call.check_size(len(message.text))
                await self._ask_for_proof(message, call)
            case b"custom":
                # Only a call that has asked for them goes on with them; its function may ask
                # twice, the second time as the owner of the calling code.
                asked = self._call
                if asked is not None and asked.custom_settings:
                    if len(message.text) > _LARGEST_QUESTION:
                        raise NotOursError
                    await self._ask_for_proof(message, asked)
            case b"proof":
                challenge, self._challenge = self._challenge, None
                if challenge is not None and await challenge.is_met_by(message):
                    await self._serve_proven(challenge)
            case _:
                await self._show_next(message)

    async def _serve_proven(self, challenge: _Challenge) -> None:
        self._is_proven = True
        question, call = challenge.question, challenge.call
        answer = await self._or_error(call, self._answer, challenge)
        self._show_answer(question.nonce, call, answer, challenge.word)
        await self._show(0)

    def _show_answer(self, nonce: bytes, call: _Call, answer: Answer, word: bytes) -> None:
        self._call = call
        key = self.secrets.key(word, nonce)
        self._shown = _Shown(nonce, key, call.encoding, answer)

    async def _or_error(
        self, call: _Call, find: Callable[P, Awaitable[Answer]], *args: P.args, **kwargs: P.kwargs
    ) -> Answer:
        """An answer, or the error that it has come to."""
        try:
            return await find(*args, **kwargs)
        except SQLError as error:
            self._error = error.response(encodings.codec(call.encoding))
            return [b"e", *(self._error.fields.get(code) for code in "CMDHstcdn")]
        except ConnectionError as error:
            return [b"e", CONNECTION_FAILURE.encode(), str(error).encode(), *[None] * 7]
        except asyncio.CancelledError:
            # The function never learns of the job.
            for job in call.launched:
                self._session.drop(job)
            raise

    async def _answer(self, challenge: _Challenge) -> Answer:
        question, call = challenge.question, challenge.call
        context = self._context(challenge)
        if question.verb == b"custom":
            words = map(_word, question.words[3:])
            pairs = zip(call.custom_settings, words, strict=False)
            settings = tuple((name, value) for name, value in pairs if value is not None)
            context = replace(context, settings=context.settings + settings)
            call.custom_settings = ()
        elif Needs.SETTINGS in call.function.needs and self._has_missing_ok:
            codec = encodings.codec(call.encoding)
            call.custom_settings = tuple(
                name for name in self._session.custom_settings if encodings.is_valid(name, codec)
            )
            if call.custom_settings:
                return [b"c", *call.custom_settings]
        if not context.may_call:
            raise permission_denied(call.function.name)
        launcher = self._session.launcher_for(self._login)
        caller = InsideCaller(self._session, launcher, self._interrupts, context, call)
        value = await call.function.run(caller, **await call.arguments())
        if isinstance(value, Job):
            self._blocks = Blocks(
                value, call.encoding, notice=self._session.inject, wait=caller.wait_for
            )
            return await self._block(self._blocks)
        return _value(value, call.function, call.encoding)

    @property
    def _has_missing_ok(self) -> bool:
        return self._session.server_version >= 90600

    async def _block(self, blocks: Blocks) -> Answer:
        """The next block of a result."""
        try:
            return await blocks.next()
        finally:
            if blocks.finished:
                self._end_blocks(blocks)

    def _end_blocks(self, blocks: Blocks) -> None:
        self._blocks = None
        job = blocks.job
        if blocks.finished:
            self._session.jobs.remove(job)
        elif job.has_handle:
            blocks.abandon()
        else:
            self._session.drop(job)

    # Through the channel

    async def _ask_for_proof(self, question: Message, call: _Call) -> None:
        """Show the word that the function must read, and have the server say what its role may do.

        If there is no channel to show it, the question is answered at once: with that error.
        """
        login = _word(question.words[0])
        try:
            await self._lease_channel(login)
            if self._channel and self._channel.room and call.is_known:
                try:
                    await self._show_word(question, call)
                except ServerError as error:
                    # The server shall say what a new login comes to.
                    logger.debug("no word is shown: %s", error)
                    self._retire_channel()
                    await self._lease_channel(login)
                    await self._show_word(question, call)
                return
            reason = _unprovable() if call.is_known else _malformed()
        except SQLError as error:
            if login is None:
                raise
            await self._lease_channel(None)
            reason = _no_login(login, error)
        await self._refuse(question, call, reason)

    async def _show_word(self, question: Message, call: _Call) -> None:
        """Show it. Raises ServerError if the channel's login does not hold any more."""
        assert self._channel is not None
        session = self._session
        roles = session.known_jobs.roles.union(
            session.peers.roles, (job.role_id for job in session.jobs)
        )
        checks = role_query(
            call.role,
            self._session_role(call),
            call.function,
            question.schema,
            encoding=call.encoding,
            roles=roles,
            identity=self._channel.identity,
        )
        word = secrets.token_hex(16).encode()
        hash = self._hash(question.nonce)
        shows = b"/*%b%b*/%b; %b" % (hash[28:60], word, checks, self._lock(hash))
        # Before the function can have read it.
        challenge = self._challenge = _Challenge(question, call, word, session.server_version)
        *found, (_, state) = await self._channel_query(shows)
        self._is_locked = (state or b"").endswith(b"w")
        if found:
            challenge.found = found[0][:-1]

    def _retire_channel(self) -> None:
        if self._channel is not None:
            self._session.retire(self._channel.login)
        self._challenge = None
        self._hang_up()

    async def _lease_channel(self, login: bytes | None) -> None:
        if self._channel is not None and self._login != login:
            self._give_back()
        if self._channel is None:
            self._channel = await self._session.lease_channel(login)
            self._login = login
            self._is_locked = self._is_proven = False

    async def _refuse(self, question: Message, call: _Call, error: SQLError) -> None:
        """Answer an unproven question with an error, which contains nothing secret."""

        async def answer() -> Answer:
            raise error

        self._show_answer(question.nonce, call, await self._or_error(call, answer), b"")
        assert self._shown is not None
        self._shown.narrow = True
        await self._show(0)

    def _context(self, challenge: _Challenge) -> Context:
        """What the server has said about the role. Raises SQLError."""
        call = challenge.call
        if not challenge.found:
            raise SQLError(UNDEFINED_OBJECT, "the current role does not exist")
        role_id, may_become, may_call, usable_roles, trusted, login_id = challenge.found
        if trusted != b"t":
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                "calls from inside the database are not served here",
                detail="The extension's functions must be committed. They and their schema must"
                " belong to a superuser, to the owner of the database, or to the role that calls.",
                hint="Commit CREATE EXTENSION first, and let a superuser or the owner of the"
                " database say it.",
            )
        if login_id not in challenge.roles:
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                "a background worker may not run as a role that the calling code may not become",
            )
        if may_become != b"t":
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                f'the session\'s role may not become "{call.role.decode("utf-8", "replace")}"',
            )
        session_role = self._session_role(call)
        return Context(
            may_call=may_call == b"t",
            role_id=int(role_id or 0),
            role=call.role,
            session_role=session_role,
            set_role=b"none" if call.role == session_role else call.role,
            statement_timeout=b"0",
            own_settings=call.own_settings,
            usable_roles=frozenset(int(oid or 0) for oid in parse_array(usable_roles or b"{}")),
            settings=call.settings,
        )

    def _session_role(self, call: _Call) -> bytes:
        """The session_user of the job; a job of an owner has a session of that owner."""
        return call.session_role if self._login is None else call.role

    def _lock(self, hash: bytes) -> bytes:
        """The SELECT with which a channel takes the lock that the function waits for."""
        return (
            b"SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.set_config('application_name',"
            b" CASE WHEN pg_catalog.pg_try_advisory_lock(%d) THEN '%bpw' ELSE '%bpt' END, false)"
            % (_key(hash), hash[:12], hash[:12])
        )

    async def _show_next(self, message: Message) -> None:
        """The next piece of what is being handed over."""
        shown, call = self._shown, self._call
        if shown is None or call is None or shown.nonce != message.nonce:
            return
        number = _number(message.words[0])
        if shown.is_last(number - 1) and self._coming is not None:
            shown.answer = array_text(await self._coming, call.encoding)
            shown.first = number
        await self._show(number)

    async def _show(self, number: int) -> None:
        """Show a piece, and wake the function up."""
        shown, call = self._shown, self._call
        assert self._channel is not None
        assert shown is not None
        assert call is not None
        shown.room = self._channel.room
        hash = self._hash(shown.nonce)
        tag, mark, count = hash[:12], hash[28:60], b"%04d" % (number % 10000)
        is_last = shown.is_last(number)
        key = b"%b%d " % (shown.key, number)
        data = _enciphered(shown.piece(number), key, self._session.server_version)
        data = base64.b64encode(data)
        if shown.is_narrow:
            name = tag + (b"a" if is_last else b"b") + count + data
            comment = b""
        else:
            name = tag + (b"q" if is_last else b"r") + count
            # Not "/*", where the data ends in "/": comments nest.
            comment = b"/*%b%b%b */" % (mark, count, data)
        columns = [b"pg_catalog.set_config('application_name', '%b', false)" % name]
        if self._is_locked:
            columns.append(b"pg_catalog.pg_advisory_unlock(%d)" % (_key(hash) ^ number))
        if has_more := not is_last or self._blocks is not None:
            columns.insert(0, b"pg_catalog.pg_try_advisory_lock(%d)" % (_key(hash) ^ (number + 1)))
            if is_last and self._blocks is not None:
                # It is made while the function deals with this one.
                coming = self._or_error(call, self._block, self._blocks)
                self._coming = asyncio.get_running_loop().create_task(coming)
        [row] = await self._channel_query(b"%bSELECT %b" % (comment, b", ".join(columns)))
        self._is_locked = has_more and row[0] == b"t"

    async def _channel_query(self, sql: bytes) -> Rows:
        if self._channel is None:
            raise ConnectionError("the channel is gone")
        return await self._channel.query(sql)

    def _hash(self, nonce: bytes) -> bytes:
        return self.secrets.hash(nonce, server_version=self._session.server_version)


def _key(hash: bytes) -> int:
    """Of the advisory lock for the first piece of an answer."""
    return int.from_bytes(bytes.fromhex(hash[12:28].decode()), "big", signed=True)


class _Challenge:
    """A question whose function has yet to prove the rights that it calls with.

    Attributes:
        question: the message.
        call: what it says.
        word: what a channel shows to those who have the rights of its login role.
        found: what the server says about the role that the question names; empty if there is none.
        roles: OIDs of those as which the calling code can run, once it is met.
    """

    def __init__(self, question: Message, call: _Call, word: bytes, server_version: int) -> None:
        self.question = question
        self.call = call
        self.word = word
        self.found: tuple[bytes | None, ...] = ()
        self.roles: frozenset[bytes] = frozenset()
        self._server_version = server_version

    async def is_met_by(self, message: Message) -> bool:
        """Whether the message proves it."""
        if (message.nonce, message.schema) != (self.question.nonce, self.question.schema):
            return False
        text = self.word + self.question.text
        if len(text) <= _WHOLE_AT_ONCE:
            wanted = _hash(text, self._server_version)
        else:
            wanted = await asyncio.to_thread(_hash, text, self._server_version)
        self.roles = frozenset(message.words[1].split(b","))
        return hmac.compare_digest(message.words[0], wanted)


class _Shown:
    """An answer, or a block of one, that is being handed over.

    Attributes:
        nonce: of the question.
        key: what it is enciphered with.
        answer: as a text[].
        first: the number of its first piece.
        narrow: whether the function may be unable to see the channel's query.
        room: how many characters of a query the channel shows.
    """

    def __init__(self, nonce: bytes, key: bytes, encoding: bytes, answer: Answer) -> None:
        self.nonce = nonce
        self.key = key
        self.answer = array_text(answer, encoding)
        self.first = 0
        self.narrow = False
        self.room = 0

    @property
    def is_narrow(self) -> bool:
        """Whether it goes through application_name."""
        return self.narrow or self.room < _LEAST_ROOM or len(self.answer) <= _NARROW

    @property
    def _size(self) -> int:
        return _NARROW if self.is_narrow else (self.room - _BEFORE_DATA) // 4 * 3

    def piece(self, number: int) -> bytes:
        """The piece of this number."""
        start = (number - self.first) * self._size
        return self.answer[start : start + self._size]

    def is_last(self, number: int) -> bool:
        """Whether it is the last one."""
        return len(self.answer) <= (number - self.first + 1) * self._size


class _Call:
    """A call, as its question says it.

    Attributes:
        encoding: the client_encoding of its words.
        role, session_role: names of the current role, and of the session's.
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
            role, session_role, name, encoding, *texts = map(_word, words[1:own])
            count = int(_word(words[own]) or b"")
            self._arguments = words[own + 1 : own + 1 + count]
            settings = [_word(word) for word in words[own + 1 + count :]]
            pairs = list(zip(settings[::2], settings[1::2], strict=True))
        except (ValueError, LookupError):
            raise NotOursError from None
        if count < 0 or len(self._arguments) != count:
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
            raise _malformed()
        return self._function

    @property
    def is_known(self) -> bool:
        """Whether there is such a function."""
        return self._function is not None

    def check_size(self, size: int) -> None:
        """Raises NotOursError for a message larger than the call can be."""
        carries_sql = self._function is not None and Needs.SETTINGS in self._function.needs
        if size > _LARGEST_QUESTION and not carries_sql:
            raise NotOursError

    async def arguments(self) -> dict[str, Any]:
        """By name. Raises SQLError."""
        texts = [await _long_word(word) for word in self._arguments]
        try:
            return {
                parameter.name: decode_argument(parameter.type, text)
                for parameter, text in zip(self.function.parameters, texts, strict=True)
            }
        except ValueError:
            raise _malformed() from None


def _no_login(role: bytes, error: SQLError) -> SQLError:
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


def _unprovable() -> SQLError:
    return SQLError(
        OBJECT_NOT_IN_PREREQUISITE_STATE,
        "calls from inside the database are not served here",
        detail="The server shows no queries, by which the calling code could prove its role.",
        hint="Set track_activities to on.",
    )


def _malformed() -> SQLError:
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        "pg-background-proxy does not know this function",
        hint="The extension's objects may be of another version: ALTER EXTENSION pg_background"
        " UPDATE.",
    )


def _value(value: Any, function: Function, encoding: bytes) -> Answer:
    """The answer that has what a function returns."""
    columns = function.columns
    if not columns:
        return [b"v", text_form(value, function.result_type, UTC)]

    def texts(row: Sequence[Any]) -> Answer:
        return [text_form(v, c.type, UTC) for v, c in zip(row, columns, strict=False)]

    if function.returns_set:
        return [b"v", array_2_text([texts(row) for row in value], encoding)]
    return [b"n"] if value is None else [b"v", *texts(value)]


class InsideCaller:
    """Makes calls from inside the database (`calls.Caller`)."""

    def __init__(
        self,
        session: Owner,
        launcher: Launcher,
        interrupts: Interrupts,
        context: Context,
        call: _Call,
    ) -> None:
        self._session = session
        self._launcher = launcher
        self._interrupts = interrupts
        self._context = context
        self._call = call

    @property
    def jobs(self) -> Jobs:
        return self._session.jobs

    @property
    def context(self) -> Context:
        return self._context

    @property
    def cluster(self) -> bytes:
        return self._session.cluster

    @property
    def max_workers(self) -> int:
        return self._session.setting(MAX_WORKERS, self.context)

    @property
    def codec(self) -> str:
        return encodings.codec(self._call.encoding)

    async def known_jobs(self) -> Sequence[JobRecord]:
        return await self._session.jobs_of(self.context.roles)

    async def find(self, handles: Sequence[Handle]) -> list[JobRecord | None]:
        return await self._session.find(handles)

    async def launch(
        self, sql: bytes, queue_size: int, *, label: bytes | None = None, keep_rows: bool = True
    ) -> Job:
        job = await self._launcher.launch(
            self._session,
            sql,
            queue_size,
            self.context,
            client_encoding=self._call.encoding,
            label=label,
            keep_rows=keep_rows,
        )
        self._call.launched.append(job)
        return job

    async def cancel_job(self, job: JobRecord) -> None:
        if not job.finished:
            await self._session.cancel_job(job)

    def limit(self, job: Job, timeout_ms: int) -> None:
        self._session.limit(job, timeout_ms)

    async def wait(self, jobs: Sequence[JobRecord], until: float | None = None) -> None:
        await self._interrupts.for_jobs(jobs, until)

    async def wait_for(self, job: Job) -> None:
        """Wait until something happens to it."""
        await self.wait([job])

    # The functions that would ask for these need no proxy (`privileges`, the view's own SQL).

    async def activity(self, jobs: Sequence[Job]) -> dict[int, tuple[bytes | None, ...]]:
        raise _malformed()

    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        raise _malformed()

    async def drop_executor_role(self) -> bool:
        raise _malformed()
