"""Calls from inside the database: functions, triggers, views, DO blocks, whatever the server runs.

The rule: this is one half of a conversation whose other half are the SQL functions in `bodies`. A
function speaks by an INFO message, which the server sends at once, in the middle of a statement:

    token nonce verb word word ... role role

``token`` is the session's, ``nonce`` is made up for each question, and the words are base64 of text
in the client's encoding, ``-`` for NULL; the last two are the current role and the session's. The
proxy takes the message off the stream and answers through a channel (`channels`). In the channel's
application_name the answer is announced:

    tag state number data

``tag`` (12 characters) tells the function that this is for it. ``state`` is ``w``: wait for the
advisory lock that the channel holds; ``t``: it is being worked on; ``a``: an answer, here as data,
32 bytes enciphered with a pad, since every role can see this; ``b``: the same, but there is more;
``q`` and ``r`` are the same with the data in the channel's query, behind a mark, where only the
login role and those who may see all can see it. Tag, lock, mark and pads come from the nonce and a
secret that the session and the proxy share.

The pieces of an answer are numbered. The function asks for the ``next`` one, or for the answer once
more in the ``narrow`` form if it cannot see the query. With each piece that is not the last the
channel takes the lock for the next one, whose key is that of the first XOR the number, so the
function can wait for that at once.

An answer is a text[]: ``e`` and the fields of an error; ``v`` and the value, those of a composite
result, or the rows as a text[][]; ``n`` for no composite; ``c`` and names of custom settings, whose
values the function tells with a question of its own, ``custom``; or a block of a result (`blocks`),
after which the next piece is that of the next block.

Not all SQL that runs in a session is its user's own: a SECURITY DEFINER function is another's, and
so is what REINDEX or ANALYZE run for a table's owner. All of it could raise such a message. So the
proxy believes only what `_pg_background_say` says: the server names the function in the message's
CONTEXT, and the function names the current role. That role must be one that the login role may
become, and a superuser in a superuser's session, since what a job runs can RESET ROLE. The channel
is asked for all that, and for whose the function is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
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
    UNDEFINED_OBJECT,
    SQLError,
)
from protocol.messages import ErrorResponse, NoticeResponse
from protocol.values import parse_array
from proxy.calls import permission_denied
from proxy.extension.blocks import Answer, Blocks
from proxy.extension.bodies import identity
from proxy.extension.channels import Channel, Rows
from proxy.functions import DECLARED, Function, Needs
from proxy.jobs.backend import ServerError
from proxy.jobs.context import NOT_CARRIED_OVER, Context, role_query
from proxy.jobs.job import Job
from proxy.jobs.known import Handle, KnownJob
from proxy.log import logger
from proxy.settings import MAX_WORKERS, SETTINGS
from proxy.sql import encodings
from proxy.sql.encodings import array_2_text, array_text
from proxy.traffic.caller import decode_argument
from proxy.traffic.results import text_form
from proxy.traffic.waits import Waits

if TYPE_CHECKING:
    from proxy.jobs.job import Jobs
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

_ASK: Final = b"_pg_background_ask("
# The first line of CONTEXT, which nobody but the server writes, in whatever language: who has
# raised the message. The function's search_path never has its own schema.
_SPEAKER: Final = re.compile(
    rb'[^"\n]*? ((?:"(?:[^"]|"")*"|[^\s".(),]+))\.("?)_pg_background_say\2\(\)[ ,]'
)
_OWN_LINE: Final = re.compile(
    rb"pg_background_(?:ask|call|elements)\(|\bpg_background_\w+\((?:integer|text|bigint|\)|\S*pg_background_handle)"
)


class _MalformedError(Exception):
    """A message that no body of ours has sent."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a function asks, taken apart.

    Attributes:
        schema: of the function that asks, as the server has told it.
        nonce: made up for it.
        verb: what kind it is.
        words: as text in the client's encoding; None for NULL.
    """

    schema: bytes
    nonce: bytes
    verb: bytes
    words: tuple[bytes | None, ...]

    @classmethod
    def parse(cls, message: bytes, context: bytes) -> Question:
        """Raises _MalformedError."""
        speaker = _SPEAKER.match(context)
        if speaker is None:
            raise _MalformedError
        schema = speaker[1]
        if schema.startswith(b'"'):
            schema = schema[1:-1].replace(b'""', b'"')
        try:
            _, nonce, verb, *words, role, session_role = message.split(b" ")
            if len(nonce) != 32 or not nonce.isalnum():
                raise _MalformedError
            if verb in (b"next", b"narrow"):
                [number] = words
                if not number.isdigit() or len(number) > _LONGEST_NUMBER:
                    raise _MalformedError
                return cls(schema, nonce, verb, (number,))
            if verb not in (b"call", b"custom"):
                raise _MalformedError
            if verb == b"call":
                words = [role, session_role, *words]
            return cls(schema, nonce, verb, tuple(map(_word, words)))
        except ValueError:
            raise _MalformedError from None


def _word(word: bytes) -> bytes | None:
    if word == b"-":
        return None
    text = base64.b64decode(word, validate=True)
    if b"\0" in text:
        raise _MalformedError
    return text


class Secrets:
    """What the session and the proxy share, and what is made from it.

    Attributes:
        token: 32 hexadecimal digits; a message of ours begins with it.
        setting: what goes into the session's startup packet.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(16).encode()
        self._secret = secrets.token_hex(16).encode()
        self.setting = self.token + self._secret

    def hash(self, nonce: bytes, number: bytes = b"", *, server_version: int) -> bytes:
        """64 hexadecimal digits that nobody else can guess."""
        text = self._secret + nonce + number
        if server_version >= 110000:
            return hashlib.sha256(text).hexdigest().encode()
        halves = [hashlib.md5(text + end, usedforsecurity=False) for end in (b"a", b"b")]
        return b"".join(half.hexdigest().encode() for half in halves)


class Inside:
    """The calls of one session that come from inside the database. There is one at a time."""

    def __init__(self, session: Owner) -> None:
        self._session = session
        self.secrets = Secrets()
        self._waits = Waits()
        # From the first call in a statement to its end; whether it holds the lock that the function
        # waits for next.
        self._channel: Channel | None = None
        self._is_locked = False
        # What is done for a function that waits, what it is told piece by piece.
        self._task: asyncio.Task[None] | None = None
        self._shown: _Shown | None = None
        # A call that goes on with the next question: one that needs custom settings, or whose rows
        # are not all handed over.
        self._call: _Call | None = None
        self._blocks: Blocks | None = None
        self._coming: asyncio.Task[Answer] | None = None
        # The last error that was handed over.
        self._error: ErrorResponse | None = None

    # What the session tells

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the primary backend; whether it was a call, and is dealt with."""
        if self.secrets.token not in body:
            return False
        notice = NoticeResponse.parse(body)
        message = notice.message
        if not message.startswith(self.secrets.token):
            return False
        try:
            question = Question.parse(message, notice.fields.get("W", b""))
        except _MalformedError:
            return False
        if question.verb == b"call":
            self._drop()
        work = self._guard(question, self._task)
        self._task = asyncio.get_running_loop().create_task(work)
        return True

    def statement_ended(self) -> None:
        """The server has sent an error, or is ready for the next query: nobody waits any more."""
        if self._task is None and self._channel is None:
            return
        self._drop()
        if self._channel is not None:
            channel, self._channel = self._channel, None
            self._session.give_back(channel)

    def end_client(self) -> None:
        """The client is gone, or will send no more: no job is waited for. A function would not
        notice that by itself."""
        self._waits.end_client(reads=True)

    def complaint(self, error: bytes) -> bytes | None:
        """What replaces an ErrorResponse with this body: one that a function of ours has raised is
        shown as a direct call would show it, without the lines of CONTEXT about our functions."""
        if _ASK not in error:
            return None
        response = ErrorResponse.parse(error)
        lines = response.fields.get("W", b"").split(b"\n")
        if _ASK not in lines[0]:
            return None
        while lines and _OWN_LINE.search(lines[0]):
            del lines[0]
        told, self._error = self._error, None
        if told is not None and told.fields.get("M") == response.message and "W" in told.fields:
            lines.insert(0, told.fields["W"])
        fields = {code: value for code, value in response.fields.items() if value or code == "M"}
        fields.pop("W", None)
        if lines:
            fields["W"] = b"\n".join(lines)
        return ErrorResponse(fields).serialize()

    def _drop(self) -> None:
        """Nobody waits for what is being done."""
        if self._task is not None:
            self._task.cancel()
        if self._coming is not None:
            self._coming.cancel()
        self._task = self._coming = self._shown = self._call = None
        if self._blocks is not None:
            self._end_blocks(self._blocks)

    # Serving

    async def _guard(self, question: Question, after: asyncio.Task[None] | None) -> None:
        """Answer a question. `after`: what is still being done for the one before it, which may be
        answered already, so far as the function can see."""
        try:
            if after is not None:
                await asyncio.wait([after])
            await self._serve(question)
        except (ServerError, OSError, SQLError) as error:
            # The function will find that there is no answer.
            logger.debug("no answer to a call from inside the database: %s", error)
            self._hang_up()
        except Exception:
            logger.exception("internal error; a call from inside the database fails")
            self._hang_up()

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.terminate()
            self._channel = None

    async def _serve(self, question: Question) -> None:
        if question.verb in (b"next", b"narrow"):
            await self._show_next(question)
            return
        if self._channel is None:
            self._channel = await self._session.lease_channel()
        if question.verb == b"call":
            self._call = None  # in case there is something wrong with this one
            self._call = _Call(question)
        call = self._call
        if call is None:
            return
        answer = await self._or_error(call, self._answer, question, call)
        self._shown = _Shown(question.nonce, call.encoding, answer)
        await self._show(self._shown, 0, call)

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
            # Nobody gets to know of the job.
            for job in call.launched:
                self._session.drop(job)
            raise

    async def _answer(self, question: Question, call: _Call) -> Answer:
        context = await self._take_up(question, call)
        if question.verb == b"custom":
            pairs = zip(call.custom_settings, question.words, strict=False)
            settings = tuple((name, value) for name, value in pairs if value is not None)
            context = replace(context, settings=context.settings + settings)
        elif Needs.SETTINGS in call.function.needs and self._has_missing_ok:
            codec = encodings.codec(call.encoding)
            call.custom_settings = tuple(
                name for name in self._session.custom_settings if encodings.is_valid(name, codec)
            )
            if call.custom_settings:
                return [b"c", *call.custom_settings]
        if not context.may_call:
            raise permission_denied(call.function.name)
        caller = InsideCaller(self._session, self._waits, context, call)
        value = await call.function.run(caller, **call.arguments())
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

    async def _take_up(self, question: Question, call: _Call) -> Context:
        """Let the function wait, and have the server say what its role may do."""
        session = self._session
        roles = session.known_jobs.roles.union(
            session.peers.roles, (job.role_id for job in session.jobs)
        )
        checks = role_query(
            call.role,
            call.session_role,
            call.function,
            question.schema,
            encoding=call.encoding,
            roles=roles,
        )
        (_, state), *found = await self._channel_query(b"%b; %b" % (self._lock(question), checks))
        self._is_locked = (state or b"").endswith(b"w")
        if not found:
            raise SQLError(UNDEFINED_OBJECT, "the current role does not exist")
        role_id, may_become, may_call, usable_roles, trusted = found[0]
        if trusted != b"t":
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                "calls from inside the database are not served here",
                detail="The extension's functions must be committed, and a superuser's; or, in the"
                " session of a role that is none, of a role with CREATE on the database. In a"
                " superuser's session the current role must be a superuser, because what a job"
                " runs could undo SET ROLE.",
                hint="Commit CREATE EXTENSION first, let a superuser say it, or connect as the"
                " current role.",
            )
        if may_become != b"t":
            raise SQLError(
                INSUFFICIENT_PRIVILEGE,
                f'the session\'s role may not become "{call.role.decode("utf-8", "replace")}"',
                detail="A background worker logs in as the role that the session has logged in as,"
                " and runs as the current role.",
                hint="In a SECURITY DEFINER function that is its owner: grant the owner's role to"
                " the role that logs in, or call from a function that is SECURITY INVOKER.",
            )
        return Context(
            may_call=may_call == b"t",
            role_id=int(role_id or 0),
            role=call.role,
            session_role=call.session_role,
            set_role=b"none" if call.role == call.session_role else call.role,
            statement_timeout=b"0",
            own_settings=call.own_settings,
            usable_roles=frozenset(int(oid or 0) for oid in parse_array(usable_roles or b"{}")),
            settings=call.settings,
        )

    def _lock(self, question: Question) -> bytes:
        """The SELECT with which a channel takes the lock that the function waits for."""
        hash = self._hash(question.nonce)
        return (
            b"SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.set_config('application_name',"
            b" CASE WHEN pg_catalog.pg_try_advisory_lock(%d) THEN '%bw' ELSE '%bt' END, false)"
            % (_key(hash), hash[:12], hash[:12])
        )

    async def _show_next(self, question: Question) -> None:
        """The next piece of what is being handed over."""
        shown, call = self._shown, self._call
        if shown is None or call is None or shown.nonce != question.nonce:
            return
        number = int(question.words[0] or 0)
        if question.verb == b"narrow":
            shown.narrow = True
            shown.first = number
        elif shown.is_last(number - 1) and self._coming is not None:
            shown.answer = array_text(await self._coming, call.encoding)
            shown.first = number
        await self._show(shown, number, call)

    async def _show(self, shown: _Shown, number: int, call: _Call) -> None:
        """Show a piece, and wake the function up."""
        assert self._channel is not None
        shown.room = self._channel.room
        hash = self._hash(shown.nonce)
        tag, mark, count = hash[:12], hash[28:60], b"%04d" % (number % 10000)
        piece, is_last = shown.piece(number), shown.is_last(number)
        if shown.is_narrow:
            pad = bytes.fromhex(self._hash(shown.nonce, b"%d" % number).decode())
            enciphered = bytes(a ^ b for a, b in zip(piece, pad, strict=False))
            name = tag + (b"a" if is_last else b"b") + count + base64.b64encode(enciphered)
            comment = b""
        else:
            name = tag + (b"q" if is_last else b"r") + count
            comment = b"/*%b%b%b*/" % (mark, count, base64.b64encode(piece))
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

    def _hash(self, nonce: bytes, number: bytes = b"") -> bytes:
        return self.secrets.hash(nonce, number, server_version=self._session.server_version)


def _key(hash: bytes) -> int:
    """Of the advisory lock for the first piece of an answer."""
    return int.from_bytes(bytes.fromhex(hash[12:28].decode()), "big", signed=True)


class _Shown:
    """An answer, or a block of one, that is being handed over.

    Attributes:
        nonce: of the question.
        answer: as a text[].
        first: the number of its first piece.
        narrow: whether the function cannot see the channel's query.
        room: how many characters of a query the channel shows.
    """

    def __init__(self, nonce: bytes, encoding: bytes, answer: Answer) -> None:
        self.nonce = nonce
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

    def __init__(self, question: Question) -> None:
        """Raises SQLError for what no body of ours has said."""
        try:
            role, session_role, name, encoding, *rest = (word or b"" for word in question.words)
            self._function = _FUNCTIONS.get(name)
            count = int(rest[len(SETTINGS)])
            values = question.words[5 + len(SETTINGS) :]
            self._arguments, settings = values[:count], values[count:]
            pairs = list(zip(settings[::2], settings[1::2], strict=True))
        except (ValueError, LookupError):
            raise _malformed() from None
        self.encoding, self.role, self.session_role = encoding, role, session_role
        self.own_settings = {
            name: word.decode("utf-8", "replace")
            for name, word in zip(SETTINGS, question.words[4:], strict=False)
            if word is not None
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

    def arguments(self) -> dict[str, Any]:
        """By name. Raises SQLError."""
        try:
            return {
                parameter.name: decode_argument(parameter.type, text)
                for parameter, text in zip(self.function.parameters, self._arguments, strict=True)
            }
        except ValueError:
            raise _malformed() from None


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

    def __init__(self, session: Owner, waits: Waits, context: Context, call: _Call) -> None:
        self._session = session
        self._waits = waits
        self._context = context
        self._call = call

    @property
    def jobs(self) -> Jobs:
        return self._session.jobs

    @property
    def context(self) -> Context:
        return self._context

    @property
    def max_workers(self) -> int:
        return self._session.setting(MAX_WORKERS, self.context)

    async def known_jobs(self) -> Sequence[KnownJob]:
        return await self._session.jobs_of(self.context.roles)

    async def find(self, handles: Sequence[Handle]) -> list[KnownJob | None]:
        return await self._session.find(handles)

    async def launch(
        self, sql: bytes, queue_size: int, *, label: bytes | None = None, keep_rows: bool = True
    ) -> Job:
        job = await self._session.launch(
            sql,
            queue_size,
            self.context,
            client_encoding=self._call.encoding,
            label=label,
            keeps_rows=keep_rows,
        )
        self._call.launched.append(job)
        return job

    async def cancel_job(self, job: KnownJob) -> None:
        if not job.finished:
            await self._session.cancel_job(job)

    def limit(self, job: Job, timeout_ms: int) -> None:
        self._session.limit(job, timeout_ms)

    async def wait(self, jobs: Sequence[KnownJob], until: float | None = None) -> None:
        await self._waits.for_jobs(jobs, until)

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
