"""Serves a batch with a call, message by message.

Invariant: the primary backend does everything it can. It parses, describes, binds and executes a
stand-in for each statement with a call (see `statements`), so the server infers parameters,
evaluates arguments and keeps the transaction. The interception takes the stand-in's rows off the
stream and puts the call's in.

It begins to serve when all earlier messages are answered. It ends with its batch's ReadyForQuery,
or earlier, before a message that it leaves to the relay. `simple_query` serves Query,
`extended_query` the extended protocol; `execution` executes the portals of both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

from protocol.errors import ProtocolViolation, SQLError
from protocol.framing import frame
from protocol.kinds import AFTER_LOGIN, EXTENDED, B, F
from protocol.messages import Terminate
from proxy.session.batch import Batch
from proxy.session.client_session import ClientSession
from proxy.session.exchange import BatchFailedError, drop
from proxy.session.execution import Execution
from proxy.session.extended_query import ExtendedQuery
from proxy.session.relay import TEXT_COST, YIELD_AFTER
from proxy.session.simple_query import SimpleQuery
from proxy.statements.plan import Statement
from proxy.stats import counters

TO_LEAVE: Final = 10.0
"""Seconds for a server to end the session whose client has left, once it has nothing more to do.
Then we close the connection, as if the client had vanished."""


class Interception:
    """Serves one batch, then returns both connections to the relay."""

    def __init__(
        self, session: ClientSession, data: bytes, statements: Sequence[Statement]
    ) -> None:
        """
        Args:
            session: has the client and the primary backend.
            data: the client's bytes, starting with the message that has the call.
            statements: of that message, if the relay has read them.
        """
        self._session = session
        self._relay = session.relay
        self._batch = Batch(session, data)
        self._client = self._batch.client
        self._server = self._batch.server
        self._messages = self._batch.messages
        self._primary = self._batch.primary
        self.interrupts = self._batch.interrupts
        execution = Execution(self._batch)
        self._simple_query = SimpleQuery(self._batch, execution)
        self._extended_query = ExtendedQuery(self._batch, execution)
        self._statements = statements
        # Bytes of SQL read since others had a turn.
        self._read = 0

    async def run(self) -> None:
        """Serve the client's messages up to the end of the batch."""
        await self._relay.settle()
        if self._relay.outstanding.copying:
            return  # the server will reject it as COPY data
        self._batch.settings_known = not self._relay.settings_may_differ
        self._server.receive = self._from_server
        self._client.gather()
        while not await self._message():
            pass

    def _from_server(self, data: bytes) -> None:
        counters.server_bytes += len(data)
        self._primary.inbox.feed(data)

    def hand_back(self) -> None:
        """Let the relay continue with what was not read."""
        self._client.send_at_once()
        self._relay.batch.clear()
        self._server.receive = self._relay.from_server
        self._client.receive = self._relay.from_client
        rest = self._primary.inbox.take_rest()
        if rest:
            counters.server_bytes -= len(rest)  # the relay will count them
            self._relay.from_server(rest)
        rest = self._messages.take_rest()
        if rest:
            counters.client_bytes -= len(rest)
            self._relay.from_client(rest)

    def end_client(self) -> None:
        """The client will send no more. What it has sent is answered, but no job is awaited."""
        self._messages.close(ConnectionError("the client has closed the connection"))
        self.interrupts.end_client(reads=self._client.full is None)

    def close(self) -> None:
        """The session is closed: whoever still waits for the server fails."""
        self._primary.inbox.close(ConnectionError("the connection to the server is closed"))

    def unread_server_messages(self) -> bytes:
        """Messages that the server sent before it went, not read yet."""
        unread: list[bytes] = []
        with contextlib.suppress(ProtocolViolation):
            for kind, body in self._primary.inbox:
                if kind in (B.ERROR_RESPONSE, B.NOTICE_RESPONSE):
                    unread.append(frame(kind, body))
        return b"".join(unread)

    async def _message(self) -> bool:
        """Serve one message of the client. Returns whether it ended the batch."""
        try:
            kind, body = await self._batch.next_message()
        except ConnectionError:
            if self.interrupts.client_ended:
                await self._end_server()
            raise
        except ProtocolViolation:
            # Not a message: the relay lets the server judge the rest of the stream.
            await self._settle_anyhow()
            return True
        statements, self._statements = self._statements, ()
        if kind not in AFTER_LOGIN:
            # The server ends the session at this type, whatever it is doing.
            await self._settle_anyhow()
            return self._leave(kind, body)
        if kind == F.QUERY and not self._relay.outstanding.skipping:
            await self._settle_anyhow()
        if self._relay.outstanding.skipping and kind not in (F.SYNC, F.TERMINATE):
            return False  # the server skips it
        try:
            if await self._serve(kind, body, statements):
                return self._leave(kind, body)
        except BatchFailedError:
            pass
        except SQLError as error:
            await self._primary.fail(error)
        if kind == F.SYNC and self._batch.copy_in_started:
            return False
        if kind in (F.SYNC, F.QUERY) or self._primary.synced:
            await self._primary.ready(body if kind == F.SYNC else b"")
            return True
        return False

    async def _serve(self, kind: int, body: bytes, read: Sequence[Statement]) -> bool:
        """Serve a message that the server does not skip. Returns whether to leave it to the relay.

        Raises BatchFailedError, SQLError.
        """
        if kind == F.QUERY:
            await self._batch.know_settings(body)
            await self._take_turns(body)
            read = read or self._session.reader.read(kind, body)
            if not self._session.reader.has_call(read):
                return True
            self._session.custom_settings.mentioned(body.lower())
            await self._simple_query.serve(body, read)
        elif kind == F.PARSE:
            await self._take_turns(body)
            await self._extended_query.parse(body, read)
        elif kind in EXTENDED:
            await self._extended_query.serve(kind, body)
        elif kind == F.TERMINATE:
            self._primary.push()
            self._server.write(frame(kind, body))
            await self._primary.inbox.next()  # raises: the server closes the connection
        elif kind in (F.FLUSH, F.SYNC, F.FUNCTION_CALL):
            if kind == F.SYNC:
                self._batch.copy_in_started = False
            elif kind == F.FLUSH and body:
                # A Flush must be empty: the server fails.
                self._primary.send(frame(kind, body), b"", drop)
            await self._primary.settle()
            return kind == F.FUNCTION_CALL
        elif self._primary.owes:
            # COPY data, perhaps for something not executed yet.
            self._messages.put_back(kind, body)
            await self._primary.settle()
        # Otherwise COPY data after its end, which the server ignores too.
        return False

    async def _settle_anyhow(self) -> None:
        """Have the queued requests answered; errors are passed on."""
        with contextlib.suppress(BatchFailedError):
            await self._primary.settle()

    def _leave(self, kind: int, body: bytes) -> bool:
        """Leave this message and all later ones to the relay."""
        self._messages.put_back(kind, body)
        return True

    async def _take_turns(self, body: bytes) -> None:
        """Before a text is read, give others a turn if many or long ones were read."""
        if self._read > YIELD_AFTER:
            self._read = 0
            await asyncio.sleep(0)
        self._read += len(body) + TEXT_COST

    async def _end_server(self) -> None:
        """Tell the server that the client has ended, and pass on its last errors. Raises
        ConnectionError when it has closed the connection, or will not."""
        self._primary.push()
        rest = self._messages.take_rest()  # part of a message
        if self._server.can_write_eof:
            self._server.write(rest)
            self._server.write_eof()
        elif rest:
            # It would take Terminate for more of the message, and wait for the rest.
            raise ConnectionError("the client has left in the middle of a message")
        else:
            self._server.write(Terminate().serialize())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TO_LEAVE):
                while True:
                    kind, body = await self._primary.next_message()
                    if kind == B.ERROR_RESPONSE:
                        self._client.write(frame(kind, body))
        raise ConnectionError("the server did not end with its client")
