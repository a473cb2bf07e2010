"""Turns Python values into bytes on the wire.

Invariant: each value has a declared type (`functions.Type`). Its text form is the one that
PostgreSQL prints; the binary form is made from that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import tzinfo
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from protocol.errors import PROTOCOL_VIOLATION, UNDEFINED_COLUMN, SQLError
from protocol.messages import DataRow, Field
from protocol.values import to_binary
from protocol.values.records import record_binary
from proxy.api.functions import Column, Type
from proxy.api.values import text_form
from proxy.session.conversion import Ask
from proxy.sql.recoding import readable
from proxy.statements.plan import Output

if TYPE_CHECKING:
    from proxy.jobs.job import Job

_YIELD_AFTER: Final = 500
"""Rows that are converted before others get a turn."""


def encode(value: Any, type: Type, zone: tzinfo, *, binary: bool) -> bytes | None:
    """A value in text or binary format.

    Raises NoBinaryForm for a type that has none here.
    """
    if value is None:
        return None
    if not binary:
        return text_form(value, type, zone)
    if type.columns:
        pairs = zip(value, type.columns, strict=False)
        return record_binary(
            [(c.type.oid, encode(part, c.type, zone, binary=True)) for part, c in pairs]
        )
    return to_binary(type.oid, text_form(value, type, zone) or b"")


def fields_of(columns: Sequence[Column]) -> tuple[Field, ...]:
    """Columns as in RowDescription, in text format."""
    return tuple(
        Field(
            column.name.encode("utf-8", "surrogateescape"),
            0,
            0,
            column.type.oid,
            column.type.size,
            -1,
            0,
        )
        for column in columns
    )


class Write(Protocol):
    """Sends to the client, and waits while it is slow.

    `cut`: the last message is incomplete; the next write continues it.
    """

    async def __call__(self, data: bytes, *, cut: bool = False) -> None: ...


class Delivery(NamedTuple):
    """What is needed to send a result, in one batch; a portal may live longer.

    Attributes:
        write: sends to the client.
        wait: waits until something happens to the job.
        ask: asks the server, in the client's transaction: SQL, parameters as text, result formats.
            Returns the rows. Raises BatchFailedError if the server fails.
        encoding: the client's, by PostgreSQL's name (`recoding.encoding_of`).
        server_encoding: the database's.
    """

    write: Write
    wait: Callable[[Job], Awaitable[None]]
    ask: Ask
    encoding: bytes
    server_encoding: bytes


class Result(Protocol):
    """A result to be sent to the client: a job's (`fetch.Fetch`) or a function's (`Table`).

    `delivery`: to be set in each batch before anything else is used.
    """

    delivery: Delivery

    @property
    def job(self) -> Job | None:
        """The job, if it is a job's result."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """The client's columns, once known."""

    @property
    def finished(self) -> bool:
        """Whether all of it was sent."""

    async def describe(self) -> None:
        """Wait until the columns are known. Raises SQLError."""

    async def send(self, max_rows: int = 0) -> int:
        """Send rows, all or at most `max_rows`. Returns their number. Raises SQLError."""

    def discard_rest(self) -> None:
        """Drop the rest."""


class Table:
    """The rows that a function has returned, as a `Result`."""

    job: Final = None
    delivery: Delivery

    def __init__(
        self,
        rows: Sequence[Sequence[Any]],
        columns: Sequence[Column],
        outputs: Sequence[Output],
        formats: Sequence[int],
        *,
        zone: tzinfo,
    ) -> None:
        """
        Args:
            rows: the values; those beyond `columns` are ignored.
            columns: their names and types.
            outputs: which of them the client wants.
            formats: the result formats of the client's Bind.
            zone: the session's time zone.
        """
        self._chosen, fields = choose(outputs, fields_of(columns))
        self.fields = with_formats(fields, formats)
        self.finished = False
        self._rows = rows
        self._columns = columns
        self._zone = zone
        self._sent = 0

    async def describe(self) -> None:
        """Nothing to do: the columns are known."""

    async def send(self, max_rows: int = 0) -> int:
        """Send rows, all or at most `max_rows`. Returns their number."""
        end = self._sent + max_rows if max_rows else len(self._rows)
        rows = self._rows[self._sent : end]
        self._sent += len(rows)
        self.finished = not max_rows or len(rows) < max_rows
        for start in range(0, len(rows), _YIELD_AFTER):
            some = rows[start : start + _YIELD_AFTER]
            await self.delivery.write(b"".join([self._row(row) for row in some]))
            await asyncio.sleep(0)
        return len(rows)

    def _row(self, row: Sequence[Any]) -> bytes:
        return DataRow(
            tuple(
                encode(row[place], self._columns[place].type, self._zone, binary=field.format == 1)
                for place, field in zip(self._chosen, self.fields, strict=True)
            )
        ).serialize()

    def discard_rest(self) -> None:
        """Drop the rest."""
        self.finished = True


def choose(
    outputs: Sequence[Output], source: Sequence[Field], encoding: bytes = b"UTF8"
) -> tuple[tuple[int, ...], tuple[Field, ...]]:
    """What the client wants of a table in FROM: positions and fields. `encoding`: of the names.

    Raises SQLError 42703 for a name that does not exist.
    """
    chosen: list[int] = []
    fields: list[Field] = []
    for output in outputs:
        for place in _places(output, source, encoding):
            # A label on `*` is possible only on the single column of a lone call.
            renames = output.label and (output.column is not None or len(source) == 1)
            name = output.label if renames and output.label else source[place].name
            chosen.append(place)
            fields.append(replace(source[place], name=name, table_oid=0, column_number=0))
    return tuple(chosen), tuple(fields)


def _places(output: Output, source: Sequence[Field], encoding: bytes) -> Sequence[int]:
    if output.column is None:
        return range(len(source))
    if isinstance(output.column, int):
        return [output.column]
    for place, field in enumerate(source):
        if field.name == output.column:
            return [place]
    name = readable(output.column, encoding)
    raise SQLError(UNDEFINED_COLUMN, f'column "{name}" does not exist')


def with_formats(fields: Sequence[Field], formats: Sequence[int]) -> tuple[Field, ...]:
    """Fields with the result formats of a Bind: none means text for all, one applies to all.

    Raises SQLError 08P01 if their number does not match.
    """
    if len(formats) <= 1:
        formats = [formats[0] if formats else 0] * len(fields)
    if len(formats) != len(fields):
        raise SQLError(
            PROTOCOL_VIOLATION,
            f"bind message has {len(formats)} result formats but query has {len(fields)} columns",
        )
    return tuple(
        replace(field, format=format) for field, format in zip(fields, formats, strict=True)
    )
