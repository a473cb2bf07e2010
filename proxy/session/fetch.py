"""Sends a job's result to the client, after a check of its columns.

Invariant: rows go from the job to the client as the bytes that came. They are taken apart only if
the client wants some of the columns, binary format, a limited number of rows, or another encoding
than the job's; the server converts (`conversion`) what it alone can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

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
from protocol.values import NoBinaryForm, has_binary_form, oids, to_binary
from proxy.jobs.job import Job
from proxy.jobs.rows import Notice, Rows
from proxy.session.conversion import Conversion, no_binary_form, types_of
from proxy.session.results import Delivery, choose, with_formats
from proxy.sql.recoding import readable, recoded
from proxy.statements.plan import ResultPlan

_NO_BINARY_FORM: Final = frozenset({1033, 3642})
"""aclitem and gtsvector have no send function; a column declared text takes their values."""

_YIELD_AFTER: Final = 256 * 1024
"""Bytes of rows that are passed on before other sessions get a turn."""

_CONVERTED: Final = 8
"""Roughly how many times slower a row is taken apart than passed on."""

_ROWS: Final = 10_000
"""Rows in one conversion by the server."""

_TAGS: Final = 1000
"""Command tags that are sent before other sessions get a turn."""


class Fetch:
    """The result of a job (a `results.Result`)."""

    delivery: Delivery

    def __init__(
        self,
        job: Job,
        plan: ResultPlan,
        *,
        defined: Sequence[Field],
        described_columns: Sequence[Field],
        formats: Sequence[int],
    ) -> None:
        """
        Args:
            job: whose result it is. It counts as consumed from now on.
            plan: which of its columns the client wants.
            defined: the column definition list; empty if there is none.
            described_columns: the columns that the client was told, if it was.
            formats: the result formats of the client's Bind.
        """
        self.job = job
        self.fields: tuple[Field, ...] = ()
        self.finished = False
        self._plan = plan
        self._defined = defined
        self._described_columns = described_columns
        # By target encoding.
        self._conversions: dict[bytes, Conversion] = {}
        self._needs_types = False
        self._formats = formats
        self._described = False
        self._columns: tuple[int, ...] = ()
        self._as_it_is = False
        self._rows = MessageBuffer()
        # Its columns, if any, and its command tags, once known: the job itself forgets them when
        # its session is done with it.
        self._given: tuple[Field, ...] | None = None
        self._tags: Sequence[bytes] = ()
        self._tags_sent = 0
        self._since_pause = 0
        job.consumed = True

    async def describe(self) -> None:
        """Wait until the job's columns are known, and check them; notices are passed on meanwhile.

        Raises SQLError: the job's own, or 42804 if the column definition list does not fit.
        """
        if self._described:
            return
        await self._notices()
        while self.job.columns is None and not self.job.finished:
            await self.delivery.wait(self.job)
            await self._notices()
        if self.job.columns is None and self.job.fetched_error is not None:
            raise self._failed(self.job.fetched_error)
        self._given, self._tags = self._named(self.job.columns), self.job.tags
        self._check_shape()
        given = (text_field(),) if self._given is None else self._given
        self._columns, fields = choose(
            self._plan.outputs, self._defined or given, self.delivery.encoding
        )
        if not self._defined:
            self._check_described(fields)
        self.fields = with_formats(fields, self._formats)
        self._described = True
        if self._given is not None and self._needs_server(self._given):
            self._needs_types = True
            await self._conversion(self._given)
        self._as_it_is = (
            not self._needs_types
            and self._columns == tuple(range(len(given)))
            and not any(field.format for field in self.fields)
        )

    def _named(self, columns: tuple[Field, ...] | None) -> tuple[Field, ...] | None:
        """The job's columns, with names in the client's encoding."""
        if columns is None or not self._recodes:
            return columns
        encodings = self.job.encoding, self.delivery.encoding
        return tuple(replace(field, name=recoded(field.name, *encodings)) for field in columns)

    @property
    def _recodes(self) -> bool:
        """Whether the client gets another encoding than the job's: the job is another session's, or
        the session has changed its encoding."""
        return self.job.encoding != self.delivery.encoding

    async def _conversion(self, given: Sequence[Field]) -> Conversion:
        """The conversion by the server. Raises SQLError."""
        encoding = self.delivery.encoding
        if encoding not in self._conversions:
            # Without modifiers, the server need only read what becomes binary.
            types = self._plan.types if self._needs_types else ()
            self._conversions[encoding] = Conversion(
                types
                or await types_of(given, self._columns, self.fields, self.delivery.ask, encoding),
                given,
                self._columns,
                [field.format for field in self.fields],
                # A database in SQL_ASCII takes bytes and converts none.
                b"SQL_ASCII"
                if self.delivery.server_encoding == b"SQL_ASCII"
                else self.job.encoding,
                encoding,
            )
        return self._conversions[encoding]

    def _check_described(self, fields: Sequence[Field]) -> None:
        """Raises SQLError 0A000 if the client was told other columns."""
        if self._described_columns and [_shape(field) for field in fields] != [
            _shape(field) for field in self._described_columns
        ]:
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                "cached plan must not change result type",
                detail="The statement was described with the columns of another background"
                " worker's result.",
                hint="Give a column definition list, or prepare the statement again.",
            )

    def _needs_server(self, given: Sequence[Field]) -> bool:
        """Whether only the server can convert the job's values to what the client wants."""
        if any(field.format and not has_binary_form(field.type_oid) for field in self.fields):
            return True
        if not self._plan.has_modifiers:
            return False
        described = dict(zip(self._columns, self._described_columns, strict=True))
        return any(
            place not in described
            or described[place].type_modifier not in (-1, field.type_modifier)
            for place, field in enumerate(given)
        )

    async def _notices(self) -> None:
        """Pass on the notices that precede the first row."""
        while (notice := self.job.output.take_notice()) is not None:
            await self.delivery.write(self.job.notice(notice, self.delivery.encoding))

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
        """Send rows, all or at most `max_rows`, and the notices among them.

        Returns the number of rows sent. Raises SQLError: the job's own; 0A000: no binary form.
        """
        if self.finished:
            return 0
        if self._given is None:
            return await self._send_tags(max_rows)
        sent = 0
        as_it_is = self._as_it_is and not (max_rows or self._recodes)
        while True:
            if not as_it_is or len(self._rows):
                sent += await self._send_rows(max_rows - sent if max_rows else 0)
                if max_rows and sent == max_rows:
                    return sent
            output = self.job.output.take()
            if isinstance(output, Notice):
                await self.delivery.write(self.job.notice(output, self.delivery.encoding))
            elif isinstance(output, Rows):
                if as_it_is and not len(self._rows):
                    sent += output.count
                    await self.delivery.write(output.data, cut=output.cut)
                else:
                    self._rows.feed(output.data)
                await self._pause(len(output.data))
            elif not self.job.finished:
                await self.delivery.wait(self.job)
            elif self.job.fetched_error is not None:
                raise self._failed(self.job.fetched_error)
            elif self.job.canceled:
                # The cancel came too late or was caught, but later rows were dropped.
                self.finished = True
                raise SQLError(
                    QUERY_CANCELED,
                    f"results for PID {self.job.pid} were dropped when it was canceled",
                )
            else:
                self.finished = True
                return sent

    async def _pause(self, size: int) -> None:
        """Give others a turn every `_YIELD_AFTER` bytes: a fast client never makes us wait."""
        self._since_pause += size
        if self._since_pause >= _YIELD_AFTER:
            self._since_pause = 0
            await asyncio.sleep(0)

    async def _send_rows(self, limit: int) -> int:
        """Send the whole rows that are here, taken apart."""
        sent = size = 0
        out = bytearray()
        rows: list[Sequence[bytes | None]] = []
        while not (limit and sent == limit):
            message = self._rows.next_message()
            if message is None:
                break
            values = DataRow.parse(message[1]).values
            sent += 1
            if not (self._needs_types or self._recodes):
                out += self._convert(values)
            else:
                rows.append(values)
                size += len(message[1])
                if size > _YIELD_AFTER or len(rows) == _ROWS:
                    await self._send_converted(rows)
                    rows, size = [], 0
            await self._pause(_CONVERTED * len(message[1]))
        if out:
            await self.delivery.write(bytes(out))
        if rows:
            await self._send_converted(rows)
        return sent

    async def _send_converted(self, rows: Sequence[Sequence[bytes | None]]) -> None:
        """Send rows that the server converts. Raises BatchFailedError if it rejects a value."""
        if not self._needs_types and all(
            value is None or value.isascii() for row in rows for value in row
        ):
            await self.delivery.write(b"".join([self._convert(row) for row in rows]))
            return
        assert self._given is not None
        conversion = await self._conversion(self._given)
        converted = await conversion.rows(rows, self.delivery.ask)
        await self.delivery.write(b"".join([DataRow(tuple(row)).serialize() for row in converted]))

    async def _send_tags(self, max_rows: int) -> int:
        """Send the command tags of a job without rows, one per statement."""
        begin, end = self._tags_sent, len(self._tags)
        if max_rows:
            end = min(end, begin + max_rows)
        while self._tags_sent < end:
            some = self._tags[self._tags_sent : min(end, self._tags_sent + _TAGS)]
            self._tags_sent += len(some)
            await self.delivery.write(b"".join([self._convert((tag,)) for tag in some]))
            await self._pause(_YIELD_AFTER)
        self.finished = not max_rows or end - begin < max_rows
        return end - begin

    def _convert(self, values: Sequence[bytes | None]) -> bytes:
        chosen = [values[column] for column in self._columns]
        return DataRow(
            tuple(
                value if value is None or not field.format else self._binary(field, value)
                for value, field in zip(chosen, self.fields, strict=True)
            )
        ).serialize()

    def discard_rest(self) -> None:
        """Drop the rest, so that the job does not wait for us."""
        if not self.finished:
            self.job.forget_output()

    def _failed(self, report: ErrorResponse) -> ServerError:
        self.finished = True
        return ServerError(self.job.report_in(report, self.delivery.encoding))

    def _binary(self, field: Field, text: bytes) -> bytes:
        try:
            return to_binary(field.type_oid, text)
        except NoBinaryForm:
            reason = f"Values of the type with OID {field.type_oid} can be had in text format only."
        except ProtocolViolation as error:
            reason = f"{str(error)[:1].upper()}{str(error)[1:]}."
        raise no_binary_form(readable(field.name, self.delivery.encoding), reason)


def _shape(field: Field) -> tuple[bytes, int, int]:
    """What must stay the same in a described column."""
    return field.name, field.type_oid, field.type_modifier


def text_field() -> Field:
    """The one column that the result of a job without rows has."""
    return Field(b"result", 0, 0, oids.TEXT, -1, -1, 0)
