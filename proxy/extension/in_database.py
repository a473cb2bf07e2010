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
from proxy.backends.channels import Channel
from proxy.extension.blocks import Blocks
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
from proxy.extension.lease import Lease, Leases
from proxy.extension.questions import (
    LARGEST_QUESTION,
    LONGEST_LINE,
    Call,
    Message,
    NotOursError,
    decoded,
    malformed,
    no_login,
    parse_number,
    settings_of,
    unprovable,
)
from proxy.extension.refusal import Refusal
from proxy.extension.served_call import Posed, ServedCall, Shown
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
        self._leases = Leases(session)
        self._served: ServedCall | None = None
        self._refusal = Refusal(session.cancel_statement)
        self._heard = 0
        self._has_heard = False  # in this statement
        # The last error handed over.
        self._error: ErrorResponse | None = None

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
        elif message.verb in (b"call", b"ask"):
            self._drop()
            self._refusal.forget()
            self._served = ServedCall(message)
            self._begin(self._served, message)
        elif self._served is not None:
            if message.verb == b"settings" and not self._served.lacks_settings:
                self._served.settings_arrive(message)
            elif self._served.next_task is None:  # a function waits before it asks again
                self._begin(self._served, message)
        return True

    def _begin(self, served: ServedCall, message: Message) -> None:
        served.begin(self._guard(served, message, after=served.task))

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
        return bool(self._leases) or (self._served is not None and self._served.task is not None)

    def statement_ended(self) -> None:
        """The server says that a statement has ended, or is ready for the next query, so no
        function waits."""
        if self._has_heard:  # otherwise there is nothing; this runs for each statement
            self._has_heard = False
            self._drop()
            self._refusal.forget()
            self._leases.give_back()

    def _drop(self) -> None:
        if self._served is not None:
            self._served.drop()
            self._served = None

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

    # Serving

    async def _guard(
        self, served: ServedCall, message: Message, after: asyncio.Task[None] | None
    ) -> None:
        """Handle a message. `after`: the task for the one before, which may seem answered."""
        try:
            if after is not None:
                await asyncio.wait([after])
            await self._serve(served, message)
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
        self._leases.hang_up()
        if message.verb in (b"call", b"ask", b"custom"):
            self._refusal.refuse(message, error)

    async def _serve(self, served: ServedCall, message: Message) -> None:
        """Handle a message, if it is one that counts (`served_call`)."""
        match message.verb, served.state:
            case b"call", _:
                await self._ask_for_proof(served, message)
            case b"ask", _:
                if (posed := await self._proven_in_advance(served, message)) is None:
                    await self._ask_for_proof(served, message)
                else:
                    await self._serve_proven(served, posed)
            case b"proof", Posed() as posed:
                served.state, challenge = None, posed.challenge
                if challenge.is_met_by(message, await _proof(challenge)):
                    await self._serve_proven(served, posed)
            case b"settings", Shown() as shown:
                if isinstance(asked := served.rest, Posed):
                    served.rest = None
                    await self._serve_completed(served, asked, shown, message)
            case b"custom", Posed() | Shown() if served.call.custom_settings:
                # They continue only the call that has asked for them; its function may ask twice,
                # the second time as the owner of the calling code.
                if len(message.text) > LARGEST_QUESTION:
                    raise NotOursError
                await self._ask_for_proof(served, message)
            case b"next", Shown() as shown:
                await self._show_next(served, shown, message)

    async def _serve_proven(self, served: ServedCall, posed: Posed) -> None:
        challenge, lease = posed.challenge, posed.lease
        lease.is_proven = True
        slow = asyncio.get_running_loop().call_later(_ANNOUNCE_AFTER, self._announce, posed)
        try:
            answer = await self._or_error(served.call, self._answer, served, posed)
        finally:
            slow.cancel()
        nonce, word = challenge.question.nonce, challenge.word
        await self._show_answer(served, lease, answer, nonce, word, challenge.lock)

    def _announce(self, posed: Posed) -> None:
        """Tell a function that has proven its question in advance that it is being handled."""
        challenge = posed.challenge
        if challenge.lock is not None and not posed.lease.is_over:
            marks = self._marks(challenge.question.nonce, challenge.lock)
            posed.lease.channel.query_nowait(marks.announce(take_lock=False))

    async def _serve_completed(
        self, served: ServedCall, posed: Posed, shown: Shown, message: Message
    ) -> None:
        """The custom settings have arrived: continue the call."""
        answer = await self._or_error(served.call, self._completed, served, posed, message)
        number = shown.pieces.after
        shown.pieces.go_on(answer, number)
        await self._show(served, shown, number)

    async def _completed(self, served: ServedCall, posed: Posed, message: Message) -> Answer:
        """Raises NotOursError if the message is not from the function that asks."""
        challenge, call = posed.challenge, served.call
        if not challenge.is_continued_by(message, challenge.proof_of(message)):
            raise NotOursError
        call.settings += settings_of(message.words)
        context = context_of(challenge, posed.lease.session_role(call))
        return await self._run(served, posed.lease, context)

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
            return self._error_answer(call, error)
        except ConnectionError as error:
            return [b"e", CONNECTION_FAILURE.encode(), explain(error).encode(), *[None] * 7]
        except asyncio.CancelledError:
            # The function will never learn of its jobs.
            for job in call.launched:
                self._session.drop(job)
            raise

    def _error_answer(self, call: Call, error: SQLError) -> Answer:
        self._error = error.response(encodings.codec(call.encoding))
        return [b"e", *(self._error.fields.get(code) for code in "CMDHstcdn")]

    async def _answer(self, served: ServedCall, posed: Posed) -> Answer:
        challenge, call = posed.challenge, served.call
        question = challenge.question
        context = context_of(challenge, posed.lease.session_role(call))
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
            message = await served.settings_by(challenge)
            call.settings = settings_of(message.words)
            context = replace(context, settings=call.settings)
            told = set(map(decoded, message.words[::2]))
            missing = [name for name in self._custom_names(call) if name not in told]
            if missing:
                served.rest = posed
                return [b"c", *missing]
        return await self._run(served, posed.lease, context)

    def _custom_names(self, call: Call) -> tuple[bytes, ...]:
        """Custom settings that the session may have, among names that the function can send."""
        codec = encodings.codec(call.encoding)
        return tuple(
            name for name in self._session.custom_settings if encodings.is_valid(name, codec)
        )

    async def _run(self, served: ServedCall, lease: Lease, context: Context) -> Answer:
        call, session = served.call, self._session
        if not context.may_call:
            raise permission_denied(call.function.name)
        launcher = session.launcher_for(lease.login)
        caller = InsideCaller(session, launcher, self._interrupts, context, call)
        given = await arguments(call)
        value = None if given is None else await call.function.run(caller, **given)
        if isinstance(value, Job):
            served.rest = blocks = Blocks(session, value, caller)
            return await self._block(served, blocks)
        answer = answer_of(value, call.function, call.encoding)
        return answer if call.notification is None else [b"l", *call.notification, *answer]

    async def _block(self, served: ServedCall, blocks: Blocks) -> Answer:
        """The next block of a result."""
        try:
            return await blocks.next()
        finally:
            if blocks.finished:
                served.end_blocks()

    # The proof

    async def _proven_in_advance(self, served: ServedCall, question: Message) -> Posed | None:
        """Check a proof by a word shown in advance; None if it fails."""
        call, session = served.call, self._session
        if not (question.channel.isdigit() and call.is_known):
            return None
        lease = self._leases.offering(decoded(question.words[0]), int(question.channel[:10]))
        if lease is None or (word := lease.channel.take_word()) is None:
            return None
        challenge = Challenge(question, call, session.server_version, word)
        if not challenge.is_met_by(question, await _proof(challenge)):
            return None
        channel = lease.channel
        self._give_up_when_lost(channel, question)
        lease.is_locked, channel.is_locked = channel.is_locked, False
        sql = lease.role_query(question, call)
        if not lease.is_locked:
            challenge.lock = None
        if not lease.is_locked or Needs.TIME in call.function.needs:
            marks = self._marks(question.nonce, challenge.lock)
            sql += b"; " + marks.announce(take_lock=not lease.is_locked)
        try:
            found, *announced = await channel.query(sql)
        except ServerError as error:
            # A new login will let the server decide.
            logger.debug("the channel's login does not hold any more: %s", error)
            self._leases.retire()
            return None
        if announced:
            lease.is_locked = (announced[0][0] or b"").endswith(b"w")
        challenge.found = found[:-1]
        return Posed(challenge, lease)

    async def _ask_for_proof(self, served: ServedCall, question: Message) -> None:
        """Show a word that the function must read, and ask the server what its role may do.

        If there is no channel for this, the question is answered at once with the error.
        """
        call, login = served.call, decoded(question.words[0])
        try:
            lease = await self._leases.take(login)
            if lease.channel.room and call.is_known:
                try:
                    await self._show_word(served, question, lease)
                except ServerError as error:
                    # A new login will let the server decide.
                    logger.debug("no word is shown: %s", error)
                    served.state = None
                    self._leases.retire()
                    await self._show_word(served, question, await self._leases.take(login))
                return
            reason = unprovable() if call.is_known else malformed()
        except SQLError as error:
            if login is None:
                raise
            lease = await self._leases.take(None)
            reason = no_login(login, self._session.server_encoding, error)
        # It is not proven, but an error reveals nothing secret.
        await self._show_answer(served, lease, self._error_answer(call, reason), question.nonce)

    async def _show_word(self, served: ServedCall, question: Message, lease: Lease) -> None:
        """Show the word. Raises ServerError if the channel's login no longer holds."""
        marks, channel = self._marks(question.nonce), lease.channel
        challenge = Challenge(question, served.call, self._session.server_version)
        # Set before the function can have read the word.
        served.state = Posed(challenge, lease)
        self._refusal.is_shown()
        checks = lease.role_query(question, served.call)
        shows = marks.comment(challenge.word) + checks + b"; " + marks.ask_for_proof()
        channel.take_word()
        *found, (_, state) = await channel.query(shows)
        lease.is_locked = (state or b"").endswith(b"w")
        if found:
            challenge.found = found[0][:-1]
        if served.call.is_asked:  # older functions do not say whether they wait
            self._give_up_when_lost(channel, question)

    def _give_up_when_lost(self, channel: Channel, question: Message) -> None:
        """The function may not know yet who answers: if the channel goes, it would search on."""
        lost = ConnectionError("the channel is gone")
        channel.when_lost(lambda: self._give_up(question, lost))

    # The answer

    async def _show_answer(
        self,
        served: ServedCall,
        lease: Lease,
        answer: Answer,
        nonce: bytes,
        word: bytes = b"",
        lock: int | None = None,
    ) -> None:
        """Show its first piece. `word`: by which the question is proven, and `lock`: of that word;
        none for an error that is the answer to an unproven question."""
        call = served.call
        self._refusal.is_shown()
        pieces = AnswerPieces(
            nonce,
            self._marks(nonce, lock),
            self.secrets.key(word, nonce),
            answer,
            may_offer=call.is_asked,
            encoding=call.encoding,
            server_version=self._session.server_version,
        )
        pieces.narrow = not word
        pieces.is_refusal = not word and call.is_asked
        served.state = shown = Shown(pieces, lease)
        await self._show(served, shown, 0)

    async def _show_next(self, served: ServedCall, shown: Shown, message: Message) -> None:
        """Show the next piece of the answer."""
        if shown.pieces.nonce != message.nonce:
            return
        number = parse_number(message.words[0])
        if shown.pieces.is_last(number - 1) and shown.coming is not None:
            shown.pieces.go_on(await shown.coming, number)
        await self._show(served, shown, number)

    async def _show(self, served: ServedCall, shown: Shown, number: int) -> None:
        """Show a piece, and wake the function."""
        pieces, lease, version = shown.pieces, shown.lease, self._session.server_version
        channel = lease.channel
        pieces.room = channel.room
        marks, is_last = pieces.marks, pieces.is_last(number)
        has_more = not is_last or served.rest is not None
        word = new_word() if pieces.may_offer and not has_more else None
        name, comment = pieces.piece(number, word)
        columns = [b"pg_catalog.set_config('application_name', '%b', false)" % name]
        if lease.is_locked:
            columns.append(b"pg_catalog.pg_advisory_unlock(%d)" % marks.lock(number))
        lock = marks.lock(number + 1) if has_more else None
        if word is not None:
            channel.offer(word, offered(word))
            lock = lock_of(word, version)
        if lock is not None:
            columns.insert(0, b"pg_catalog.pg_try_advisory_lock(%d)" % lock)
        if is_last and isinstance(blocks := served.rest, Blocks):
            # Made while the function handles this one.
            coming = self._or_error(served.call, self._block, served, blocks)
            shown.coming = asyncio.get_running_loop().create_task(coming)
        # The function may continue before this is answered; nobody else knew the lock's key.
        channel.is_locked = word is not None
        showing = channel.query_nowait(b"%bSELECT %b" % (comment, b", ".join(columns)))
        if not is_last:
            await asyncio.sleep(0)  # it is sent first
            pieces.prepare(number + 1)
        [row] = await asyncio.shield(showing)
        lease.is_locked = has_more and row[0] == b"t"


async def _proof(challenge: Challenge) -> bytes:
    if challenge.size <= WHOLE_AT_ONCE:
        return challenge.proof()
    return await asyncio.to_thread(challenge.proof)
