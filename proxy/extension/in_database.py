"""Serves calls from inside the database: from functions, triggers, views, DO blocks.

Invariant: a call is served with the rights of a role only if the calling code has proven that the
server grants it these rights. Code of others runs in a session all the time (index functions under
REINDEX or ANALYZE, SECURITY DEFINER functions, triggers), and can send any message.

This is the proxy's half of the `conversation`: it hears the functions' messages, has a channel show
what they must read, makes the calls, and hands over the answers.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, ParamSpec

from protocol.errors import CONNECTION_FAILURE, ServerError, SQLError
from protocol.messages import ErrorResponse, NoticeResponse
from proxy.api.calls import permission_denied
from proxy.api.functions import Needs
from proxy.backends.channels import Channel, Rows
from proxy.extension.blocks import Blocks
from proxy.extension.context import role_query
from proxy.extension.conversation import (
    Answer,
    AnswerMarks,
    AnswerPieces,
    Challenge,
    Secrets,
    answer_of,
    lock_of,
    new_word,
    offered,
)
from proxy.extension.inside_caller import WHOLE_AT_ONCE, InsideCaller, arguments, context_of
from proxy.extension.questions import (
    LARGEST_QUESTION,
    LONGEST_LINE,
    Call,
    Message,
    NotOursError,
    Settings,
    decoded,
    malformed,
    no_login,
    parse_number,
    settings_of,
    unprovable,
)
from proxy.extension.refusal import Refusal
from proxy.jobs.context import Context
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.jobs.owner import Owner
from proxy.log import logger
from proxy.reasons import explain
from proxy.sql import encodings

P = ParamSpec("P")

_YIELD_AFTER: Final = 200
"""Messages that are read before others get a turn; each takes about 30 us."""

_ANNOUNCE_AFTER: Final = 0.1
"""Seconds after which a function is told that its question is being handled."""

_ASK: Final = re.compile(rb"_pg_background_(?:ask|answer)\(")
_OWN_LINE: Final = re.compile(
    rb"pg_background_(?:ask|answer|call|elements)\(|\bpg_background_\w{1,63}\((?:integer|text|bigint|\)|[^\s(]{0,256}pg_background_handle)"
)


class DatabaseCalls:
    """The calls that come from inside the database in one session, one at a time.

    Attributes:
        secrets: shared with the functions.
        has_called: whether there has been any call.
    """

    def __init__(self, session: Owner, secrets: Secrets) -> None:
        self._session = session
        self.secrets = secrets
        self.has_called = False
        self._interrupts = Interrupts()
        # Leased from the first call in a statement to its end; its login role, None for the
        # session's; whether code has proven it; whether it holds the function's next lock.
        self._channel: Channel | None = None
        self._login: bytes | None = None
        self._is_proven = False
        self._is_locked = False
        # Work for a function that waits, and what waits for that to end; a question not proven yet;
        # the answer that is shown piece by piece.
        self._heard = 0
        self._has_heard = False  # in this statement
        self._task: asyncio.Task[None] | None = None
        self._next_task: asyncio.Task[None] | None = None
        self._challenge: Challenge | None = None
        self._shown: AnswerPieces | None = None
        # The settings after the last question, and the question that still lacks custom ones.
        self._settings: asyncio.Future[Message] | None = None
        self._incomplete: Challenge | None = None
        # A call that continues with the next question: for custom settings, or for more rows.
        self._call: Call | None = None
        self._blocks: Blocks | None = None
        self._coming: asyncio.Task[Answer] | None = None
        # The last error handed over.
        self._error: ErrorResponse | None = None
        self._refusal = Refusal(session.cancel_statement)

    # Called by the session

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the primary. Returns whether it was a call, which is then served."""
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
        self._has_heard = self.has_called = True
        if message.verb == b"still":
            self._refusal.waits(message.nonce)
            return True
        if message.verb in (b"call", b"ask"):
            self._drop()
            self._refusal.forget()
            if message.verb == b"ask":
                self._settings = asyncio.get_running_loop().create_future()
        elif message.verb == b"settings" and self._incomplete is None:
            if self._settings is not None:
                if self._settings.done():
                    self._settings = asyncio.get_running_loop().create_future()
                self._settings.set_result(message)
            return True
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
        """Whether others should get a turn, after many messages. A function that waits for answers
        sends few; a loop can send a hundred thousand."""
        if self._heard < _YIELD_AFTER:
            return False
        self._heard = 0
        return True

    @property
    def is_asked(self) -> bool:
        """Whether a function may be waiting for an answer."""
        return self._task is not None or self._channel is not None

    def statement_ended(self) -> None:
        """The server says that a statement has ended, or is ready for the next query, so no
        function waits."""
        if self._has_heard:  # otherwise there is nothing; this runs for each statement
            self._has_heard = False
            self._drop()
            self._refusal.forget()
            self._give_back()

    def _give_back(self) -> None:
        if self._channel is None:
            return
        channel, self._channel = self._channel, None
        if self._login is None or self._is_proven:
            self._session.service.channels.give_back(channel)
        else:
            # Code that is not of this role must not make us keep its connections.
            channel.terminate()

    def end_client(self) -> None:
        """The client will send no more: no job is awaited. A function would not notice."""
        self._interrupts.end_client(reads=True)

    def complaint(self, error: bytes) -> bytes | None:
        """The replacement for an ErrorResponse with this body: an error raised by our function is
        shown as by a direct call, without the CONTEXT lines about our functions."""
        if not self._has_heard and _ASK.search(error) is None:
            return None
        response = ErrorResponse.parse(error)
        context = response.fields.get("W", b"")
        lines, is_ours = context.split(b"\n"), _ASK.search(context) is not None
        refusal = self._refusal.reason(response, self._session.server_version, is_ours=is_ours)
        if refusal is not None:
            reason = refusal.response(encodings.codec(self._session.client_encoding)).fields
            response = response.with_fields(**{code: reason.get(code, b"") for code in "CMDH"})
            while is_ours and _ASK.search(lines[0]) is None:
                del lines[0]  # the place in our function
        elif _ASK.search(lines[0][:LONGEST_LINE]) is None:
            return None
        own = itertools.takewhile(lambda line: _OWN_LINE.search(line[:LONGEST_LINE]), lines)
        del lines[: len(list(own))]
        told, self._error = self._error, None
        fields = {code: value for code, value in response.fields.items() if value or code == "M"}
        fields.pop("W", None)
        if told is not None and told.fields.get("M") == response.message and "W" in told.fields:
            lines.insert(0, told.fields["W"])
            # PL/pgSQL cannot raise errors with these.
            fields |= {code: told.fields[code] for code in "pq" if code in told.fields}
        if lines:
            fields["W"] = b"\n".join(lines)
        return ErrorResponse(fields).serialize()

    def _drop(self) -> None:
        """The function no longer waits: stop the work for it."""
        for task in (self._task, self._next_task, self._coming):
            if task is not None:
                task.cancel()
        self._task = self._next_task = self._coming = self._settings = None
        self._challenge = self._incomplete = self._shown = self._call = None
        if self._blocks is not None:
            self._end_blocks(self._blocks)

    # Serving

    async def _guard(self, message: Message, after: asyncio.Task[None] | None) -> None:
        """Handle a message. `after`: the task for the one before, which may seem answered."""
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
        """The answer cannot be shown. A function that has seen its channel finds it gone. Another
        would search on: its statement is cancelled, and the client gets `error` as the reason."""
        logger.info("no answer to a call from inside the database: %s", explain(error))
        self._hang_up()
        if message.verb in (b"call", b"ask", b"custom"):
            self._refusal.refuse(message, error)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.terminate()
            self._channel = None

    async def _serve(self, message: Message) -> None:
        match message.verb:
            case b"call":
                self._call = None  # in case there is something wrong with this one
                call = Call(message)
                call.check_size(len(message.text))
                await self._ask_for_proof(message, call)
            case b"ask":
                self._call = None
                call = Call(message)
                call.check_size(len(message.text))
                if (challenge := await self._proven_in_advance(message, call)) is None:
                    await self._ask_for_proof(message, call)
                else:
                    await self._serve_proven(challenge)
            case b"settings":
                challenge, self._incomplete = self._incomplete, None
                if challenge is not None:
                    await self._serve_completed(challenge, message)
            case b"custom":
                # They continue only the call that has asked for them; its function may ask twice,
                # the second time as the owner of the calling code.
                asked = self._call
                if asked is not None and asked.custom_settings:
                    if len(message.text) > LARGEST_QUESTION:
                        raise NotOursError
                    await self._ask_for_proof(message, asked)
            case b"proof":
                challenge, self._challenge = self._challenge, None
                if challenge is not None and challenge.is_met_by(message, await _proof(challenge)):
                    await self._serve_proven(challenge)
            case _:
                await self._show_next(message)

    async def _serve_proven(self, challenge: Challenge) -> None:
        self._is_proven = True
        question, call = challenge.question, challenge.call
        slow = asyncio.get_running_loop().call_later(_ANNOUNCE_AFTER, self._announce, challenge)
        try:
            answer = await self._or_error(call, self._answer, challenge)
        finally:
            slow.cancel()
        self._show_answer(question.nonce, call, answer, challenge.word, challenge.lock)
        await self._show(0)

    def _announce(self, challenge: Challenge) -> None:
        """Tell a function that has proven its question in advance that it is being handled."""
        if challenge.lock is not None and self._channel is not None:
            marks = self._marks(challenge.question.nonce, challenge.lock)
            self._channel.query_nowait(marks.announce(take_lock=False))

    async def _serve_completed(self, challenge: Challenge, message: Message) -> None:
        """The custom settings have arrived: continue the call."""
        shown, call = self._shown, challenge.call
        assert shown is not None
        answer = await self._or_error(call, self._completed, challenge, message)
        number = shown.after
        shown.go_on(answer, number)
        await self._show(number)

    async def _completed(self, challenge: Challenge, message: Message) -> Answer:
        challenge.call.settings += await self._told(challenge, message)
        return await self._run(
            challenge.call, context_of(challenge, self._session_role(challenge.call))
        )

    async def _proven_settings(self, challenge: Challenge) -> Message:
        """The settings that follow the question. If its word was no longer good, they have arrived
        first with a proof by that."""
        while True:
            arriving = self._settings
            assert arriving is not None
            message = await arriving
            if challenge.is_continued_by(message, challenge.proof_of(message)):
                return message
            if self._settings is arriving:
                self._settings = asyncio.get_running_loop().create_future()

    async def _told(self, challenge: Challenge, message: Message) -> Settings:
        """The settings in a message. Raises NotOursError if it is not from the asking function."""
        if not challenge.is_continued_by(message, challenge.proof_of(message)):
            raise NotOursError
        return settings_of(message.words)

    def _show_answer(
        self, nonce: bytes, call: Call, answer: Answer, word: bytes, lock: int | None = None
    ) -> None:
        self._call = call
        self._refusal.is_shown()
        self._shown = AnswerPieces(
            nonce,
            self._marks(nonce, lock),
            self.secrets.key(word, nonce),
            answer,
            may_offer=call.is_asked,
            encoding=call.encoding,
            server_version=self._session.server_version,
        )

    def _marks(self, nonce: bytes, lock: int | None = None) -> AnswerMarks:
        version = self._session.server_version
        return self.secrets.marks(nonce, server_version=version, first_lock=lock)

    async def _or_error(
        self, call: Call, find: Callable[P, Awaitable[Answer]], *args: P.args, **kwargs: P.kwargs
    ) -> Answer:
        """The answer of `find`, or its error as an answer."""
        try:
            return await find(*args, **kwargs)
        except SQLError as error:
            self._error = error.response(encodings.codec(call.encoding))
            return [b"e", *(self._error.fields.get(code) for code in "CMDHstcdn")]
        except ConnectionError as error:
            return [b"e", CONNECTION_FAILURE.encode(), explain(error).encode(), *[None] * 7]
        except asyncio.CancelledError:
            # The function will never learn of its jobs.
            for job in call.launched:
                self._session.drop(job)
            raise

    async def _answer(self, challenge: Challenge) -> Answer:
        question, call = challenge.question, challenge.call
        context = context_of(challenge, self._session_role(call))
        if question.verb == b"custom":
            words = map(decoded, question.words[3:])
            pairs = zip(call.custom_settings, words, strict=False)
            settings = tuple((name, value) for name, value in pairs if value is not None)
            context = replace(context, settings=context.settings + settings)
            call.custom_settings = ()
        elif question.verb == b"call" and Needs.SETTINGS in call.function.needs:
            call.custom_settings = self._custom_names(call)
            if call.custom_settings:
                return [b"c", *call.custom_settings]
        elif Needs.SETTINGS in call.function.needs and context.may_call:
            message = await self._proven_settings(challenge)
            call.settings = settings_of(message.words)
            context = replace(context, settings=call.settings)
            told = set(map(decoded, message.words[::2]))
            missing = [name for name in self._custom_names(call) if name not in told]
            if missing:
                self._incomplete = challenge
                return [b"c", *missing]
        return await self._run(call, context)

    def _custom_names(self, call: Call) -> tuple[bytes, ...]:
        """Custom settings that the session may have, among names that the function can send."""
        codec = encodings.codec(call.encoding)
        return tuple(
            name for name in self._session.custom_settings if encodings.is_valid(name, codec)
        )

    async def _run(self, call: Call, context: Context) -> Answer:
        if not context.may_call:
            raise permission_denied(call.function.name)
        launcher = self._session.launcher_for(self._login)
        caller = InsideCaller(self._session, launcher, self._interrupts, context, call)
        given = await arguments(call)
        value = None if given is None else await call.function.run(caller, **given)
        if isinstance(value, Job):
            self._blocks = Blocks(value, caller)
            return await self._block(self._blocks)
        answer = answer_of(value, call.function, call.encoding)
        return answer if call.notification is None else [b"l", *call.notification, *answer]

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
            blocks.discard_rest()
        else:
            self._session.drop(job)

    # The channel

    async def _proven_in_advance(self, question: Message, call: Call) -> Challenge | None:
        """Check a proof by a word shown in advance; None if it fails."""
        if not (question.channel.isdigit() and call.is_known):
            return None
        channel = self._offering(decoded(question.words[0]), int(question.channel[:10]))
        if channel is None or (word := channel.take_word()) is None:
            return None
        session = self._session
        challenge = Challenge(question, call, session.server_version, word)
        if not challenge.is_met_by(question, await _proof(challenge)):
            return None
        # The function cannot know yet who will answer, so it would search on.
        lost = ConnectionError("the channel is gone")
        channel.when_lost(lambda: self._give_up(question, lost))
        self._is_locked, channel.is_locked = channel.is_locked, False
        sql = self._role_query(question, call)
        if not self._is_locked:
            challenge.lock = None
        if not self._is_locked or Needs.TIME in call.function.needs:
            marks = self._marks(question.nonce, challenge.lock)
            sql += b"; " + marks.announce(take_lock=not self._is_locked)
        try:
            found, *announced = await self._channel_query(sql)
        except ServerError as error:
            # A new login will let the server decide.
            logger.debug("the channel's login does not hold any more: %s", error)
            self._retire_channel()
            return None
        if announced:
            self._is_locked = (announced[0][0] or b"").endswith(b"w")
        challenge.found = found[:-1]
        return challenge

    def _offering(self, login: bytes | None, pid: int) -> Channel | None:
        """Lease the channel with this pid if it belongs to the login and shows a word."""
        if self._channel is None or (self._login, self._channel.pid) != (login, pid):
            channel = self._session.idle_channel(login, pid)
            if channel is None:
                return None
            self._give_back()
            self._channel, self._login = channel, login
            self._is_locked = self._is_proven = False
        return self._channel if self._channel.is_alive else None

    async def _ask_for_proof(self, question: Message, call: Call) -> None:
        """Show a word that the function must read, and ask the server what its role may do.

        If there is no channel for this, the question is answered at once with the error.
        """
        login = decoded(question.words[0])
        try:
            await self._lease_channel(login)
            if self._channel and self._channel.room and call.is_known:
                try:
                    await self._show_word(question, call)
                except ServerError as error:
                    # A new login will let the server decide.
                    logger.debug("no word is shown: %s", error)
                    self._retire_channel()
                    await self._lease_channel(login)
                    await self._show_word(question, call)
                return
            reason = unprovable() if call.is_known else malformed()
        except SQLError as error:
            if login is None:
                raise
            await self._lease_channel(None)
            reason = no_login(login, self._session.server_encoding, error)
        await self._refuse(question, call, reason)

    async def _show_word(self, question: Message, call: Call) -> None:
        """Show the word. Raises ServerError if the channel's login no longer holds."""
        assert self._channel is not None
        marks = self._marks(question.nonce)
        # Set before the function can have read the word.
        challenge = self._challenge = Challenge(question, call, self._session.server_version)
        self._refusal.is_shown()
        checks = self._role_query(question, call)
        shows = marks.comment(challenge.word) + checks + b"; " + marks.ask_for_proof()
        self._channel.take_word()
        *found, (_, state) = await self._channel_query(shows)
        self._is_locked = (state or b"").endswith(b"w")
        if found:
            challenge.found = found[0][:-1]

    def _role_query(self, question: Message, call: Call) -> bytes:
        assert self._channel is not None
        session = self._session
        return role_query(
            call.role,
            self._session_role(call),
            call.function,
            question.schema,
            encoding=call.encoding,
            roles=session.service.roles.union(job.role_id for job in session.jobs),
            identity=self._channel.identity,
        )

    def _retire_channel(self) -> None:
        if self._channel is not None:
            self._session.service.spares.retire(self._channel.login)
        self._challenge = None
        self._hang_up()

    async def _lease_channel(self, login: bytes | None) -> None:
        if self._channel is not None and self._login != login:
            self._give_back()
        if self._channel is None:
            self._channel = await self._session.lease_channel(login)
            self._login = login
            self._is_locked = self._is_proven = False

    async def _refuse(self, question: Message, call: Call, error: SQLError) -> None:
        """Answer an unproven question with an error, which reveals nothing secret."""

        async def answer() -> Answer:
            raise error

        self._show_answer(question.nonce, call, await self._or_error(call, answer), b"")
        assert self._shown is not None
        self._shown.narrow = True
        self._shown.is_refusal = call.is_asked
        await self._show(0)

    def _session_role(self, call: Call) -> bytes:
        """The session_user of the job; for an owner's code it is the owner."""
        return call.session_role if self._login is None else call.role

    async def _show_next(self, message: Message) -> None:
        """Show the next piece of the present answer."""
        shown, call = self._shown, self._call
        if shown is None or call is None or shown.nonce != message.nonce:
            return
        number = parse_number(message.words[0])
        if shown.is_last(number - 1) and self._coming is not None:
            shown.go_on(await self._coming, number)
        await self._show(number)

    async def _show(self, number: int) -> None:
        """Show a piece, and wake the function."""
        shown, call = self._shown, self._call
        assert self._channel is not None
        assert shown is not None
        assert call is not None
        channel, version = self._channel, self._session.server_version
        shown.room = channel.room
        marks, is_last = shown.marks, shown.is_last(number)
        has_more = not is_last or self._blocks is not None or self._incomplete is not None
        word = new_word() if shown.may_offer and not has_more else None
        name, comment = shown.piece(number, word)
        columns = [b"pg_catalog.set_config('application_name', '%b', false)" % name]
        if self._is_locked:
            columns.append(b"pg_catalog.pg_advisory_unlock(%d)" % marks.lock(number))
        lock = marks.lock(number + 1) if has_more else None
        if word is not None:
            channel.offer(word, offered(word))
            lock = lock_of(word, version)
        if lock is not None:
            columns.insert(0, b"pg_catalog.pg_try_advisory_lock(%d)" % lock)
        if is_last and self._blocks is not None:
            # Made while the function handles this one.
            coming = self._or_error(call, self._block, self._blocks)
            self._coming = asyncio.get_running_loop().create_task(coming)
        # The function may continue before this is answered; nobody else knew the lock's key.
        channel.is_locked = word is not None
        showing = channel.query_nowait(b"%bSELECT %b" % (comment, b", ".join(columns)))
        if not is_last:
            await asyncio.sleep(0)  # it is sent first
            shown.prepare(number + 1)
        [row] = await asyncio.shield(showing)
        self._is_locked = has_more and row[0] == b"t"

    async def _channel_query(self, sql: bytes) -> Rows:
        if self._channel is None:
            raise ConnectionError("the channel is gone")
        return await self._channel.query(sql)


async def _proof(challenge: Challenge) -> bytes:
    if challenge.size <= WHOLE_AT_ONCE:
        return challenge.proof()
    return await asyncio.to_thread(challenge.proof)
