"""Handing over a job's result: its shape is checked, its rows are passed on.

Invariant: rows go from the job to the client as the bytes that came. They are taken apart only when
the client wants some of the columns, binary format, or a limited number of rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from protocol.errors import (
    DATATYPE_MISMATCH,
    FEATURE_NOT_SUPPORTED,
    QUERY_CANCELED,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.framing import MessageBuffer
from protocol.messages import DataRow, ErrorResponse, Field
from protocol.values import NoBinaryForm, oids, to_binary
from proxy.jobs.job import Job
from proxy.jobs.rows import Notice, Rows
from proxy.session.results import choose, with_formats
from proxy.statements.plan import Output

_NO_BINARY_FORM: Final = frozenset({1033, 3642})
"""aclitem and gtsvector have no send function; a column declared text takes them."""

_TURN: Final = 256 * 1024
"""Bytes of rows that are passed on before other sessions have their turn."""

_CONVERTED: Final = 8
"""About how many times longer a row takes to be taken apart than to be passed on."""

_TAGS: Final = 1000
"""Command tags that are sent before other sessions have their turn."""


class Write(Protocol):
    """Sends to the client, and waits while the client is slow.

    `cut`: the last message goes on in what is written next.
    """

    async def __call__(self, data: bytes, *, cut: bool = False) -> None: ...


class Fetch:
    """The result of a job (a `results.Result`)."""

    def __init__(
        self,
        job: Job,
        outputs: Sequence[Output],
        *,
        defined: Sequence[Field],
        formats: Sequence[int],
        write: Write,
        wait: Callable[[Job], Awaitable[None]],
    ) -> None:
        """
        Args:
            job: whose result it is. It counts as consumed from now on.
            outputs: what the client wants of its columns.
            defined: the column definition list; empty if there is none.
            formats: the result formats of the client's Bind.
            write: sends to the client.
            wait: waits until something happens to the job.
        """
        self.job = job
        self.fields: tuple[Field, ...] = ()
        self.finished = False
        self._outputs = outputs
        self._defined = defined
        self._formats = formats
        self._write = write
        self._wait = wait
        self._described = False
        self._columns: tuple[int, ...] = ()
        self._as_it_is = False
        self._rows = MessageBuffer()
        # Its columns, if it has any, and its command tags, once they are known: the job itself
        # forgets them when its session is done with it.
        self._given: tuple[Field, ...] | None = None
        self._tags: Sequence[bytes] = ()
        self._tags_sent = 0
        self._since_pause = 0
        job.consumed = True

    async def describe(self) -> None:
        """Wait until the job's columns are known, passing its notices on, and check them.

        Raises SQLError: the job's own, or 42804 if they do not fit the column definition list.
        """
        if self._described:
            return
        await self._notices()
        while self.job.columns is None and not self.job.finished:
            await self._wait(self.job)
            await self._notices()
        if self.job.columns is None and self.job.fetched_error is not None:
            raise self._failed(self.job.fetched_error)
        self._given, self._tags = self.job.columns, self.job.tags
        self._check_shape()
        given = (text_field(),) if self._given is None else self._given
        self._columns, fields = choose(self._outputs, self._defined or given)
        self.fields = with_formats(fields, self._formats)
        self._described = True
        self._as_it_is = self._columns == tuple(range(len(given))) and not any(
            field.format for field in self.fields
        )

    async def _notices(self) -> None:
        """Pass on the notices that came before the first row."""
        while (notice := self.job.output.take_notice()) is not None:
            await self._write(self.job.notice(notice))

    def _check_shape(self) -> None:
        if not self._defined:
            return
        if self._given is None:
            if [field.type_oid for field in self._defined] != [oids.TEXT]:
                raise SQLError(
                    DATATYPE_MISMATCH,
                    "remote query did not return a result set, but result rowtype is not a single"
                    " text column",
                )
            return
        matches = len(self._defined) == len(self._given) and all(
            wanted.type_oid == given.type_oid
            or (wanted.type_oid == oids.TEXT and given.type_oid in _NO_BINARY_FORM)
            for wanted, given in zip(self._defined, self._given, strict=True)
        )
        if not matches:
            raise SQLError(
                DATATYPE_MISMATCH,
                "remote query result rowtype does not match the specified FROM clause rowtype",
            )

    async def send(self, max_rows: int = 0) -> int:
        """Hand over rows, all or at most `max_rows`, and the job's notices among them.

        Returns the number of rows sent. Raises SQLError: the job's own; 0A000 for a value that we
        cannot give in binary format.
        """
        if self.finished:
            return 0
        if self._given is None:
            return await self._send_tags(max_rows)
        sent = 0
        while True:
            if not self._as_it_is or max_rows or len(self._rows):
                sent += await self._send_rows(max_rows - sent if max_rows else 0)
                if max_rows and sent == max_rows:
                    return sent
            output = self.job.output.take()
            if isinstance(output, Notice):
                await self._write(self.job.notice(output))
            elif isinstance(output, Rows):
                if self._as_it_is and not max_rows and not len(self._rows):
                    sent += output.count
                    await self._write(output.data, cut=output.cut)
                else:
                    self._rows.feed(output.data)
                await self._pause(len(output.data))
            elif not self.job.finished:
                await self._wait(self.job)
            elif self.job.fetched_error is not None:
                raise self._failed(self.job.fetched_error)
            elif self.job.canceled:
                # The cancel came too late or had no effect, but later rows were dropped.
                self.finished = True
                raise SQLError(
                    QUERY_CANCELED,
                    f"results for PID {self.job.pid} were dropped when it was canceled",
                )
            else:
                self.finished = True
                return sent

    async def _pause(self, size: int) -> None:
        """Every `_TURN` bytes, let others have their turn: a client that reads as fast as we write
        gives no other occasion."""
        self._since_pause += size
        if self._since_pause >= _TURN:
            self._since_pause = 0
            await asyncio.sleep(0)

    async def _send_rows(self, limit: int) -> int:
        """Whole rows that are here, taken apart."""
        sent = 0
        out = bytearray()
        while not (limit and sent == limit):
            message = self._rows.next_message()
            if message is None:
                break
            out += self._convert(DataRow.parse(message[1]).values)
            sent += 1
            await self._pause(_CONVERTED * len(message[1]))
        if out:
            await self._write(bytes(out))
        return sent

    async def _send_tags(self, max_rows: int) -> int:
        """A job without rows gives the command tags of its statements."""
        begin, end = self._tags_sent, len(self._tags)
        if max_rows:
            end = min(end, begin + max_rows)
        while self._tags_sent < end:
            some = self._tags[self._tags_sent : min(end, self._tags_sent + _TAGS)]
            self._tags_sent += len(some)
            await self._write(b"".join([self._convert((tag,)) for tag in some]))
            await self._pause(_TURN)
        self.finished = not max_rows or end - begin < max_rows
        return end - begin

    def _convert(self, values: Sequence[bytes | None]) -> bytes:
        chosen = [values[column] for column in self._columns]
        return DataRow(
            tuple(
                value if value is None or not field.format else _binary(field, value)
                for value, field in zip(chosen, self.fields, strict=True)
            )
        ).serialize()

    def abandon(self) -> None:
        """The rest is not wanted: the job must not wait for us."""
        if not self.finished:
            self.job.forget_output()

    def _failed(self, report: ErrorResponse) -> ServerError:
        self.finished = True
        return ServerError(report)


def text_field() -> Field:
    """The one column of the result of a job that returns no rows."""
    return Field(b"result", 0, 0, oids.TEXT, -1, -1, 0)


def _binary(field: Field, text: bytes) -> bytes:
    try:
        return to_binary(field.type_oid, text)
    except NoBinaryForm:
        reason = f"Values of the type with OID {field.type_oid} can be had in text format only."
    except ProtocolViolation as error:
        reason = f"{str(error)[:1].upper()}{str(error)[1:]}."
    raise SQLError(
        FEATURE_NOT_SUPPORTED,
        "binary format is not available for this column of pg_background_result",
        detail=f'Column "{field.name.decode("utf-8", "replace")}": {reason}',
        hint="Ask for results in text format, or cast the column to text in the job's SQL.",
    )
