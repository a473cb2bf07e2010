"""Passes bytes between a client and its primary backend, and notices calls as they go by.

Invariant: traffic without a call goes out at once, as the bytes that came in. Of each message the
relay reads type and length. It looks closer at SQL, in which it searches for some words, at a
message about a statement or portal that concerns us, and at what the server says besides rows: an
error may say that such a function does not exist. A message that may have to be changed is
held until it is complete; all others are passed on in the pieces in which they come.

It also tracks what the server has not answered yet (`OutstandingRequests`), so that a call in the
middle of a pipeline can wait for everything before it (`settle`).

Most traffic is one batch, then its whole answer, with nothing of interest in either. Such chunks
take a fast path (`fast_path`), which reads the same headers without the bookkeeping; all others
take the slow path, `_follow_client` and `_follow_server`.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final, Protocol

from protocol.framing import HEADER_SIZE, skip_run, unpack_length
from protocol.kinds import ENDS_COPY_IN, ENDS_EXTENDED, EXTENDED, B, F, TransactionStatus
from protocol.messages import Flush
from proxy.net.connection import Connection
from proxy.session.custom_settings import CustomSettings
from proxy.session.fast_path import WITH_TEXT, is_plain_answer, is_plain_batch
from proxy.session.named import NamedStatements
from proxy.session.outstanding import OutstandingRequests
from proxy.session.reported import ReportedSettings
from proxy.sql.lexer import MAX_TEXT
from proxy.stats import counters

if TYPE_CHECKING:
    from proxy.statements.plan import Statement


_LONGEST: Final = 1 << 30
"""The server closes the connection at a longer message of the frontend."""

NAMES_SIZE: Final = 4096
"""Bytes held of a message to see the statement or portal in it; all, if the names are longer."""

YIELD_AFTER: Final = 64 * 1024
TEXT_COST: Final = 2048
"""Bytes of SQL read for calls before others get a turn; each text adds TEXT_COST."""

_NOTICE_SIZE: Final = 512
"""The watchword of a notice for us is within this many first bytes."""

_LONGEST_NOTICE: Final = 1024 * 1024 + _NOTICE_SIZE
"""Limit of a notice for us in bytes, unless it makes a call: that carries SQL."""

_CALL: Final = re.compile(rb" [0-9a-z]{32} (?:ask|call|settings) ")

# What the relay does with a message of the backend.
_NOTHING, _COUNT, _HANDLE, _SKIP = range(4)
_HANDLED: Final = bytes(
    [
        B.ERROR_RESPONSE,
        B.READY_FOR_QUERY,
        B.COPY_IN_RESPONSE,
        B.PARAMETER_STATUS,
        B.BACKEND_KEY_DATA,
        B.NOTICE_RESPONSE,
    ]
)
_SKIPPED: Final = bytes([B.DATA_ROW, B.COPY_DATA])
"""These come by the thousand."""
_ACTION: Final = {
    **dict.fromkeys(_SKIPPED, _SKIP),
    **dict.fromkeys(ENDS_EXTENDED, _COUNT),
    **dict.fromkeys(_HANDLED, _HANDLE),
}
_ACTIONS: Final = bytes(_ACTION.get(kind, _NOTHING) for kind in range(256))


class Hooks(Protocol):
    """What the relay tells its session.

    Attributes:
        watchword: near the beginning of a NoticeResponse that is for us.
        custom_settings: collects the names of settings that go by.
        reported: collects the values of settings that the server reports.
        named: the statements and portals with calls.
    """

    watchword: bytes
    custom_settings: CustomSettings
    reported: ReportedSettings
    named: NamedStatements

    def backend_key(self, body: bytes) -> None:
        """The server's BackendKeyData."""

    def calls(self, kind: int, body: bytes) -> list[Statement] | None:
        """The statements of a Query or Parse that mentions what may be ours, if one is, or may be,
        served or changed; none if they cannot be read yet."""

    def unread(self) -> None:
        """A Query or Parse too long to be read goes to the server."""

    def database_mentioned(self, sql: bytes) -> None:
        """A Query or Parse contains "database"; given in lower case."""

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse mentions the watchword. Returns whether to keep it from the client."""

    def statement_ended(self) -> None:
        """The server has sent CommandComplete, or an error, which comes to `complaint` first."""

    def ready(self) -> None:
        """The server has sent ReadyForQuery, whose status is `status`."""

    def complaint(self, error: bytes) -> bytes | None:
        """The replacement for an ErrorResponse with this body, if that is about us."""

    def take_over(self, data: bytes, statements: list[Statement]) -> None:
        """There is a call: the session takes over both connections, and the bytes from that message
        on. `statements`: of the message, if they were read."""


class _Stream:
    """How far the relay has come in what one side sends.

    Attributes:
        skip: bytes to pass on before the next message begins.
        held: the bytes not passed on; they begin with a message.
        needed: the number of bytes with which that message can be looked at.
    """

    __slots__ = ("held", "needed", "skip")

    def __init__(self) -> None:
        self.skip = 0
        self.held = bytearray()
        self.needed = 0

    def hold(self, data: bytes, position: int, needed: int) -> None:
        """Hold the data from `position` on, until `needed` bytes of it have arrived."""
        self.held = bytearray(memoryview(data)[position:])
        self.needed = needed

    def extended(self, data: bytes) -> bytes:
        """What was held and now these data, if that is enough; else nothing, and all is held."""
        self.held += data
        if len(self.held) < self.needed:
            return b""
        data, self.held = bytes(self.held), bytearray()
        return data

    @property
    def is_within_message(self) -> bool:
        """Whether part of a message has come, and not the rest."""
        return bool(self.skip or self.held)


class Relay:
    """Both directions of one session.

    Attributes:
        status: of the last ReadyForQuery.
        batch: types of the extended-query messages since the client's last Sync.
        outstanding: requests that the server has not answered yet.
        is_behind: the client's input is held while others have their turn.
        known_settings: the session's settings as a call has read them; None once anything that may
            change them was sent to the server.
    """

    def __init__(self, client: Connection, server: Connection, hooks: Hooks) -> None:
        self._client = client
        self._server = server
        self._hooks = hooks
        self._reported = hooks.reported
        self._named = hooks.named
        self.status = TransactionStatus.IDLE
        self.batch = bytearray()
        self.outstanding = OutstandingRequests()
        self.is_behind = False
        self.known_settings: tuple[tuple[bytes, bytes], ...] | None = None
        self._settling: asyncio.Future[None] | None = None
        # Whether the next batch may take the fast path (`_may_take_fast_path`).
        self._idle = False
        # The batch that took it, until it is answered; else empty.
        self._fast_batch = b""
        # Bytes of SQL read in this turn.
        self._read = 0
        self._client_stream = _Stream()
        self._server_stream = _Stream()

    # From the client

    def from_client(self, data: bytes) -> None:
        """Pass on what came in, up to a call."""
        counters.client_bytes += len(data)
        if self._idle and is_plain_batch(data):
            self._idle = False
            self._fast_batch = data
            self._server.write(data)
            return
        self._follow_client(data)

    def _follow_client(self, data: bytes) -> None:
        self._idle = False
        self._count_fast_batch()
        named, stream = self._named, self._client_stream
        if stream.held:
            data = stream.extended(data)
            if not data:
                return
        size = len(data)
        position = stream.skip
        stream.skip = 0
        self._read = 0
        while size - position >= HEADER_SIZE:
            kind = data[position]
            end = position + 1 + unpack_length(data, position + 1)[0]
            if not HEADER_SIZE <= end - position <= _LONGEST:
                stream.skip = size  # it never gets to another message
                self._give_up(self._client, self._server, data)
                return
            if kind in WITH_TEXT:
                if self._stops_at_text(kind, data, position, end):
                    return
            elif kind in EXTENDED:
                if not named.is_empty() and self._stops_at_name(kind, data, position, end):
                    return
                self.batch.append(kind)
                self.outstanding.add(kind)
            elif kind in (F.SYNC, F.FUNCTION_CALL):
                self.outstanding.add(kind)
                self.batch.clear()
            elif kind == F.FLUSH and end - position > HEADER_SIZE and not self.outstanding.copying:
                # A Flush must be empty. The server fails as at a Describe, and skips up to a Sync.
                self.outstanding.add(F.DESCRIBE)
            elif kind in ENDS_COPY_IN:
                self.outstanding.add(kind)
            elif kind == F.COPY_DATA and end < size:
                end, _ = skip_run(data, position)
            position = end
        if position < size:
            self._hold(data, position, HEADER_SIZE)
        else:
            stream.skip = position - size
            self._pass_on(data)

    def _stops_at_text(self, kind: int, data: bytes, position: int, end: int) -> bool:
        """Look at a Query or Parse. True if the relay stops there: it has passed on what precedes,
        and has held the rest or handed it over."""
        if end - position > MAX_TEXT:
            return self._stops_at_long_text(kind, data, position)
        if end > len(data):
            return self._hold(data, position, end - position)
        text = data[position:end].lower()
        named = self._named
        named.note_sent(text)
        if named.must_read(text) and not self.outstanding.copying:
            if self._read > YIELD_AFTER:
                return self._yield(data, position)
            self._read += end - position + TEXT_COST
            calls = self._hooks.calls(kind, data[position + HEADER_SIZE : end])
            if calls is not None:
                return self._hand_over(data, position, calls)
        if b"database" in text:
            self._hooks.database_mentioned(text)
        if b"set" in text:
            self._hooks.custom_settings.mentioned(text)
            if kind == F.PARSE and b"set_config" in text:
                named.note_setter(data[position + HEADER_SIZE : end].split(b"\0", 1)[0])
        if (
            kind == F.PARSE
            and named.statements
            and named.note_message(kind, data[position + HEADER_SIZE :])
        ):
            return self._hand_over(data, position)
        self._note_text(kind)
        return False

    def _stops_at_long_text(self, kind: int, data: bytes, position: int) -> bool:
        """`_stops_at_text` for one that is too long to be read."""
        if len(data) - position < NAMES_SIZE:
            return self._hold(data, position, NAMES_SIZE)
        head = data[position + HEADER_SIZE : position + NAMES_SIZE]
        if kind == F.PARSE and self._named.note_message(kind, head):
            return self._hand_over(data, position)
        self._hooks.unread()
        self._named.note_unread()
        self._note_text(kind)
        return False

    def _stops_at_name(self, kind: int, data: bytes, position: int, end: int) -> bool:
        """`_stops_at_text` for a Bind, Describe, Execute or Close, by its names."""
        known = min(end - position, NAMES_SIZE)
        if known < end - position and not _has_names(data, position, known):
            known = end - position
        if len(data) - position < known:
            return self._hold(data, position, known)
        if self._named.note_message(kind, data[position + HEADER_SIZE : position + known]):
            return self._hand_over(data, position)
        return False

    def _pass_on(self, data: bytes) -> None:
        self.known_settings = None
        self._server.write(data)

    def _note_text(self, kind: int) -> None:
        """A Query or Parse was passed on."""
        if kind == F.QUERY:
            self.batch.clear()
        else:
            self.batch.append(F.PARSE)
        self.outstanding.add(kind)

    # What stops the relay (each returns True)

    def _hold(self, data: bytes, position: int, size: int) -> bool:
        """Hold the data from `position` on, until `size` bytes of it have arrived."""
        if position:
            self._pass_on(data[:position])
        self._client_stream.hold(data, position, size)
        return True

    def _yield(self, data: bytes, position: int) -> bool:
        """Pass on what was read, and continue after other sessions have had a turn."""
        self._hold(data, position, 0)
        self.is_behind = True
        self._client.take_a_break()
        asyncio.get_running_loop().call_soon(self._go_on)
        return True

    def _go_on(self) -> None:
        self.is_behind = False
        self._client.end_break()
        if self._client_stream.held:
            self._follow_client(b"")

    def _hand_over(
        self, data: bytes, position: int, statements: list[Statement] | None = None
    ) -> bool:
        """Hand the data from `position` on to an interception."""
        if position:
            self._pass_on(data[:position])
        self._hooks.take_over(data[position:], statements or [])
        return True

    @property
    def settings_may_differ(self) -> bool:
        """Whether the server may have settings that it has not reported yet."""
        return bool(self.outstanding) or F.BIND in self.batch or F.EXECUTE in self.batch

    # From the server

    def from_server(self, data: bytes) -> None:
        """Pass on what came in, and count its answers."""
        counters.server_bytes += len(data)
        if self._fast_batch and is_plain_answer(data):
            self.status = data[-1]
            self._fast_batch = b""
            self._idle = True
            self._hooks.ready()
            self._client.write(data)
        else:
            self._follow_server(data)

    def _count_fast_batch(self) -> None:
        """Have the slow path track the batch that took the fast path."""
        if self._fast_batch:
            position = 0
            while position < len(self._fast_batch):
                self.outstanding.add(self._fast_batch[position])
                position += unpack_length(self._fast_batch, position + 1)[0] + 1
            self._fast_batch = b""

    def _follow_server(self, data: bytes) -> None:
        self._count_fast_batch()
        stream = self._server_stream
        if stream.held:
            data = stream.extended(data)
            if not data:
                return
        size = len(data)
        position = stream.skip
        stream.skip = 0
        passed_on = 0
        needed = HEADER_SIZE
        # A long loop, since all rows of all results go through it.
        while size - position >= HEADER_SIZE:
            kind = data[position]
            end = position + 1 + unpack_length(data, position + 1)[0]
            if end < position + HEADER_SIZE:
                self._give_up(self._server, self._client, data[passed_on:])
                return
            action = _ACTIONS[kind]
            if action == _SKIP and end < size:
                end, _ = skip_run(data, position)
            elif action == _COUNT:
                self.outstanding.answered()
                if kind == B.COMMAND_COMPLETE:
                    self._hooks.statement_ended()
            elif action == _HANDLE and not (
                kind == B.NOTICE_RESPONSE and self._passes(data, position, end)
            ):
                if end > size:
                    needed = _needed(kind, size - position, end - position)
                    break
                replacement = self._handle(kind, data[position + HEADER_SIZE : end])
                if replacement is not None:
                    self._client.write(data[passed_on:position] + replacement)
                    passed_on = end
            position = end
        if position < size:
            stream.hold(data, position, needed)
        else:
            stream.skip = position - size
        if passed_on or position < size:
            data = data[passed_on:position]
        if data:
            self._client.write(data)
        if self._settling is None:
            self._idle = self._may_take_fast_path()
        elif self._is_settled() and not self._settling.done():
            self._settling.set_result(None)

    def _may_take_fast_path(self) -> bool:
        """Whether everything is answered, no message is incomplete, and no later message can be
        about a call or outdate known settings, unless its text says so."""
        requests, answers = self._client_stream, self._server_stream
        return not (
            self.outstanding
            or self.outstanding.skipping
            or answers.skip  # not `is_within_message`, which is slower
            or answers.held
            or requests.skip
            or requests.held
            or self.batch
            or not self._named.is_empty()
            or self.known_settings is not None
        )

    def _passes(self, data: bytes, position: int, end: int) -> bool:
        """Whether the beginning of this notice shows that it is not for us; if not, hold it."""
        known = min(end, position + _NOTICE_SIZE)
        if len(data) < known:
            return False
        head = data[position:known]
        if end - position > _LONGEST_NOTICE and not _CALL.search(head):
            return True
        return self._hooks.watchword not in head

    def _handle(self, kind: int, body: bytes) -> bytes | None:
        if kind == B.READY_FOR_QUERY:
            self.ready(body[0] if body else TransactionStatus.IDLE)
        elif kind == B.NOTICE_RESPONSE:
            return b"" if self._hooks.notice(body) else None
        elif kind == B.ERROR_RESPONSE:
            self.outstanding.failed()
            replacement = self._hooks.complaint(body)
            self._hooks.statement_ended()
            return replacement
        elif kind == B.COPY_IN_RESPONSE:
            self.outstanding.copy_in()
        elif kind == B.PARAMETER_STATUS:
            self._reported.parameter_status(body)
        elif kind == B.BACKEND_KEY_DATA:
            self._hooks.backend_key(body)
        return None

    def ready(self, status: int) -> None:
        """The server has sent ReadyForQuery."""
        self.status = status
        self._reported.ready()
        self._hooks.ready()
        if self.outstanding.ready() == F.QUERY:
            self._named.forget_unnamed()
        if status == TransactionStatus.IDLE:
            self._named.transaction_ended()

    @property
    def at_boundary(self) -> bool:
        """Whether the client has received whole messages only."""
        return not self._server_stream.skip

    @property
    def between_messages(self) -> bool:
        """Whether the client has sent whole messages only."""
        return not self._client_stream.is_within_message

    @property
    def is_busy(self) -> bool:
        """Whether the server is working on a request, not waiting for the client."""
        if self._fast_batch:
            return True
        return self.outstanding.owes_ready and not self.outstanding.copying

    # Taking turns with an interception

    async def settle(self) -> None:
        """Wait until every request has been answered, and every answer passed on."""
        if self.batch and not self._is_settled():
            self._server.write(Flush().serialize())
        while not self._is_settled():
            self._settling = asyncio.get_running_loop().create_future()
            try:
                await self._settling
            finally:
                self._settling = None

    def _is_settled(self) -> bool:
        # During COPY FROM STDIN nothing is answered until the client goes on.
        return self.outstanding.copying or not (
            self.outstanding or self._server_stream.is_within_message
        )

    def _give_up(self, source: Connection, sink: Connection, data: bytes) -> None:
        """Let the other side judge the rest of the stream, which is not our protocol."""
        sink.write(data)
        source.receive = lambda rest: sink.write(rest)  # `write` changes when the sink is gone


def _needed(kind: int, here: int, size: int) -> int:
    """How many bytes of a message must have arrived to see what it is, or to handle it."""
    if kind == B.NOTICE_RESPONSE and here < _NOTICE_SIZE:
        return min(size, _NOTICE_SIZE)
    return size


def _has_names(data: bytes, position: int, known: int) -> bool:
    """Whether the first `known` bytes of a Bind, Describe, Execute or Close include its names."""
    return len(data) - position < known or data.count(b"\0", position + 5, position + known) > 1
