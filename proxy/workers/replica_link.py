"""A process's connection to the other replicas: LISTEN and NOTIFY, in auth_user's database.

Invariant: input is believed only if it is sealed (`sealed`), addressed to this connection by name,
and has a higher number than its sender's last; the sender is whoever sealed it, whatever the
message says. pg_stat_activity shows who is there: a member is a connection of the same role, with a
name. So there is nothing to agree on or to remember: a process that has lost its connection is
gone, and returns under another name. To its owner (`workers.replicas`) a link is what the
supervisor is to a worker: it forwards messages, and says who was asked and who is gone.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final

from protocol.errors import ProtocolViolation, ServerError, SQLError
from protocol.framing import MessageBuffer
from protocol.kinds import B
from protocol.messages import DataRow, ErrorResponse, NotificationResponse, Query
from proxy.backends.backend import READ_SIZE, Backend
from proxy.backends.session_setup import Row
from proxy.log import logger
from proxy.reasons import cause
from proxy.runtime import Runtime
from proxy.workers.messages import Answer, Asked, Gone, Message, News, Question, decode, encode
from proxy.workers.sealed import GROUP, MAX_RECIPIENTS, NAME, PIECE, Seal, new_name

_LOOK: Final = 3.0
"""Seconds between checks of the members, if nobody asks anything."""

_RECONNECT_INTERVAL: Final = 1.0
_RECONNECT_MAX_INTERVAL: Final = 5.0
"""Seconds before a lost connection is opened again: at first, and at most."""

_TIMEOUT: Final = 10.0
"""Seconds to wait for the server's answer to a query."""

_MAX_INVALID: Final = 1000
"""Invalid messages after which the connection is given up for a while: somebody without the secret
floods it, with inventions or with copies."""

_MAX_UNSENT: Final = 16 * 1024 * 1024
_FULL: Final = 1024 * 1024
"""Unsent bytes beyond which answers are dropped, and beyond which senders that can should wait."""

_MAX_GATHERED: Final = 1024 * 1024
"""Limit of a message in bytes."""

_MAX_BYTES_PER_QUERY: Final = 256 * 1024
"""Bytes sent by one query."""

_SILENT: Final = 10
"""Seconds without a check after which a member hangs, or cannot reach the server."""

_MEMBERS: Final = """
SELECT a.application_name,
       a.query_start OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp()
           OPERATOR(pg_catalog.-) CAST('{silent} s' AS pg_catalog.interval))
FROM pg_catalog.pg_stat_activity a
WHERE a.usename OPERATOR(pg_catalog.=) session_user
AND a.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
AND pg_catalog.strpos(a.application_name, '{prefix}') OPERATOR(pg_catalog.=) 1"""


class Link:
    """The link of one process, opened again when lost.

    Attributes:
        receive: called with each message; set by the owner.
        joined: called when the connection is opened, or opened again.
        left: called when it is lost.
        lost: never done, since a link returns.
    """

    receive: Callable[[Message], None]
    joined: Callable[[], None]
    left: Callable[[], None]

    def __init__(self, runtime: Callable[[], Runtime], secret: bytes, group: bytes) -> None:
        """
        Args:
            runtime: how to log in.
            secret: shared by all replicas.
            group: shared by the processes that have other channels to each other.
        """
        self._runtime = runtime
        self._seal = Seal(secret)
        self._group = group
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unsent: deque[tuple[Message, bytes]] = deque()
        self._size = 0
        self._wanted = asyncio.Event()
        self._room: asyncio.Future[None] | None = None
        self._is_joined = False

    # Called by the owner

    def send(self, message: Message) -> None:
        """Send a question, an answer or news."""
        if not self._is_joined:
            if isinstance(message, Question):
                asyncio.get_running_loop().call_soon(self._nobody, message)
            return
        if isinstance(message, Answer) and self._size > _MAX_UNSENT:
            logger.warning("a replica does not get what it has asked for")
            message = replace(message, body=None)
        text = encode(message)
        self._unsent.append((message, text))
        self._size += len(text)
        self._wanted.set()

    def _nobody(self, question: Question) -> None:
        """There is no link, so it is unknown who could answer."""
        self.receive(Asked(question.number, (), (0,)))

    async def drain(self) -> None:
        """Wait until most was sent, or the connection is lost."""
        if self._size > _FULL:
            self._room = self._room or asyncio.get_running_loop().create_future()
            await self._room

    # Life cycle

    async def run(self) -> None:
        """Keep the link up, until cancelled."""
        delay, said = _RECONNECT_INTERVAL, ""
        while True:
            try:
                backend = await self._log_in()
                try:
                    conversation = _Conversation(backend, self._seal, new_name(self._group))
                    await conversation.join()
                    logger.info("other replicas can be asked now")
                    delay, said = _RECONNECT_INTERVAL, ""
                    await self._serve(conversation)
                finally:
                    self._leave()
                    backend.terminate()
            except (SQLError, OSError, ProtocolViolation) as error:
                reason = cause(error)
                if reason != said:
                    said = reason
                    logger.warning("other replicas cannot be asked: %s", reason)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RECONNECT_MAX_INTERVAL)

    async def _log_in(self) -> Backend:
        """Log in to the first primary. Raises SQLError, OSError, ProtocolViolation."""
        runtime = self._runtime()
        failure: Exception = ConnectionError("there is no host")
        for host in runtime.config.upstream.hosts:
            try:
                backend = await runtime.dialer.login_as_auth_user(host)
            except (SQLError, OSError) as error:
                failure = error
                continue
            try:
                async with asyncio.timeout(_TIMEOUT):
                    await backend.rows(b"LISTEN " + self._seal.channel.encode())
                return backend
            except (SQLError, OSError, ProtocolViolation) as error:
                failure = error
                backend.terminate()
        raise failure

    def _way(self) -> tuple[object, ...]:
        """What a reload may have changed."""
        config = self._runtime().config
        return config.upstream, config.auth_user, config.lookup_database

    def _leave(self) -> None:
        self._unsent.clear()
        self._sent(self._size)
        if self._is_joined:
            self._is_joined = False
            self.left()

    def _sent(self, size: int) -> None:
        self._size -= size
        if self._room is not None and self._size <= _FULL:
            self._room.set_result(None)
            self._room = None

    async def _serve(self, conversation: _Conversation) -> None:
        """Forward messages. If the link is lost, raises ServerError, OSError, ProtocolViolation."""
        members: dict[bytes, bool] = {}
        conversation.heard, conversation.look = self._heard, self._wanted.set
        way = self._way()
        self._is_joined = True
        self.joined()
        while True:
            try:
                async with asyncio.timeout(_LOOK):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            if self._way() != way:
                return
            now = await conversation.members()
            for name in members.keys() - now.keys():
                self.receive(Gone(_number(name)))
            members = {name: hangs for name, hangs in now.items() if name[:GROUP] != self._group}
            # Messages that arrive now may be for a member that has only just joined.
            if self._unsent:
                await self._send_some(conversation, members)
            if self._unsent:
                self._wanted.set()

    async def _send_some(self, conversation: _Conversation, members: dict[bytes, bool]) -> None:
        payloads: list[str] = []
        asked: list[Asked] = []
        size = 0
        while self._unsent and size < _MAX_BYTES_PER_QUERY:
            message, text = self._unsent.popleft()
            size += len(text)
            assert isinstance(message, Question | Answer | News)
            recipients = sorted(
                members
                if message.to is None
                else members.keys() & {message.to.to_bytes(NAME, "big")}  # it may have left
            )
            if isinstance(message, Question):
                hanging = [_number(name) for name in recipients if members[name]]
                if message.to is not None and not recipients:
                    hanging = [message.to]
                awaited = [_number(name) for name in recipients if not members[name]]
                asked.append(Asked(message.number, awaited, hanging))
            payloads += conversation.closed(recipients, text)
        for told in asked:
            self.receive(told)  # now, since answers may precede the end of sending
        if payloads:
            await conversation.notify(payloads)
        self._sent(size)

    def _heard(self, sender: bytes, line: bytes) -> None:
        if sender[:GROUP] == self._group:
            return
        try:
            message = decode(line)
        except (ValueError, KeyError, TypeError):
            logger.debug("a replica of another version says what is not understood")
            return
        if isinstance(message, Question | Answer | News):
            self.receive(replace(message, sender=_number(sender)))


def _number(name: bytes) -> int:
    """A member's number for the owner."""
    return int.from_bytes(name, "big")


class _Conversation:
    """The exchange over one connection, until that is lost (a `session_setup.Receiver`).

    Attributes:
        heard: called with the sender and the text of messages for us.
        look: called when the connection is lost, or to check the members.
    """

    def __init__(self, backend: Backend, seal: Seal, name: bytes) -> None:
        self._backend = backend
        self._seal = seal
        self._name = name
        self._number = 0
        self._buffer = MessageBuffer()
        self._rows: list[Row] = []
        self._error: ServerError | None = None
        self._answer: asyncio.Future[list[Row]] | None = None
        self._lost: Exception | None = None
        # For each sender: the last number, and the beginning of an unfinished message.
        self._numbers: dict[bytes, int] = {}
        # The members at the last check, and the number of messages by others since.
        self._members: Collection[bytes] = ()
        self._strangers: Counter[bytes] = Counter()
        self._begun: defaultdict[bytes, bytearray] = defaultdict(bytearray)
        self._wrong = 0
        self.heard: Callable[[bytes, bytes], None] = lambda sender, line: None
        self.look: Callable[[], None] = lambda: None

    async def join(self) -> None:
        """Become visible as a member. Raises ServerError, OSError, ProtocolViolation."""
        self._backend.read_by(self)  # others may be speaking already
        await self._ask(f"SET application_name = '{self._seal.prefix}{self._name.hex()}'")

    async def members(self) -> dict[bytes, bool]:
        """The names of the others, and whether they hang. Raises as `join` does."""
        found: dict[bytes, bool] = {}
        query = _MEMBERS.format(prefix=self._seal.prefix, silent=_SILENT)
        for shown, is_silent in await self._ask(query):
            try:
                name = bytes.fromhex((shown or b"").decode()[len(self._seal.prefix) :])
            except ValueError:
                continue
            if len(name) == NAME and name != self._name:
                found[name] = is_silent == b"t"
        self._members = found.keys()
        # Members that have long gone, or never existed: their messages are being replayed.
        self._add_wrong(
            sum(self._strangers[name] for name in self._strangers.keys() - found.keys())
        )
        self._strangers.clear()
        return found

    def closed(self, recipients: Sequence[bytes], text: bytes) -> list[str]:
        """A text as sealed payloads for these members."""
        payloads: list[str] = []
        for first in range(0, len(recipients), MAX_RECIPIENTS):
            some = recipients[first : first + MAX_RECIPIENTS]
            for begin in range(0, len(text), PIECE):
                self._number += 1
                piece, more = text[begin : begin + PIECE], begin + PIECE < len(text)
                payloads.append(self._seal.close(self._name, self._number, some, piece, more=more))
        return payloads

    async def notify(self, payloads: Sequence[str]) -> None:
        """Send payloads. Raises ServerError, OSError, ProtocolViolation."""
        channel = self._seal.channel
        await self._ask(
            ";".join(f"SELECT pg_catalog.pg_notify('{channel}', '{text}')" for text in payloads)
        )

    async def _ask(self, sql: str) -> list[Row]:
        if self._lost is not None:
            raise self._lost
        self._answer = asyncio.get_running_loop().create_future()
        self._backend.transport.write(Query(sql.encode()).serialize())
        try:
            async with asyncio.timeout(_TIMEOUT):
                return await self._answer
        finally:
            self._answer = None

    # Input

    def room(self) -> int:
        """How many bytes may come next."""
        return READ_SIZE

    def feed(self, data: memoryview) -> None:
        """Bytes that came in."""
        self._buffer.feed(data)
        try:
            for kind, body in self._buffer:
                self._message(kind, body)
        except ProtocolViolation as error:
            self.close(error)

    def _message(self, kind: int, body: bytes) -> None:
        if kind == B.NOTIFICATION_RESPONSE:
            self._notified(NotificationResponse.parse(body).payload)
        elif kind == B.DATA_ROW:
            self._rows.append(DataRow.parse(body).values)
        elif kind == B.ERROR_RESPONSE:
            self._error = ServerError(ErrorResponse.parse(body))
            if self._error.is_fatal:
                self.close(self._error)
        elif kind == B.READY_FOR_QUERY:
            rows, error = self._rows, self._error
            self._rows, self._error = [], None
            if self._answer is not None and not self._answer.done():
                if error is not None:
                    self._answer.set_exception(error)
                else:
                    self._answer.set_result(rows)

    def _notified(self, payload: bytes) -> None:
        if self._lost is not None:
            return
        try:
            sealed = self._seal.open(payload)
        except ValueError:
            self._add_wrong(1)
            return
        if sealed.number <= self._numbers.get(sealed.sender, 0):
            self._add_wrong(1)  # replayed by somebody else
            return
        self._numbers[sealed.sender] = sealed.number
        if sealed.sender not in self._members and sealed.sender != self._name:
            self._strangers[sealed.sender] += 1
            if self._strangers.total() == _MAX_INVALID:
                self.look()
        if self._name not in sealed.recipients:
            return
        begun = self._begun[sealed.sender]
        begun += sealed.text
        if sealed.more and len(begun) < _MAX_GATHERED:
            return
        del self._begun[sealed.sender]
        self.heard(sealed.sender, bytes(begun))

    def _add_wrong(self, count: int) -> None:
        self._wrong += count
        if self._wrong >= _MAX_INVALID:
            self.close(ConnectionError("somebody who has not got the secret floods them"))

    def close(self, error: Exception) -> None:
        """The connection ended."""
        self._lost = self._lost or error
        self._backend.transport.abort()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._lost)
        self.look()
