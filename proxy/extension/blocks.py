"""A job's result on its way into the database, in blocks of rows.

Invariant: a block is whole rows, about `SIZE` bytes of them, or one longer row. The next is made
on demand, so the job waits for its reader.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import QUERY_CANCELED, ServerError, SQLError
from protocol.framing import MessageBuffer
from protocol.messages import DataRow, Field
from proxy.extension.conversation import Answer
from proxy.extension.inside_caller import InsideCaller
from proxy.jobs.job import Job
from proxy.jobs.owner import Owner
from proxy.jobs.rows import Notice, Rows
from proxy.sql.encodings import array_text

SIZE: Final = 64 * 1024
"""Bytes of DataRow messages in a block."""


class Blocks:
    """The result of one job.

    Attributes:
        job: whose result it is. It counts as consumed from now on.
        finished: whether all of it was handed over.
    """

    def __init__(self, session: Owner, job: Job, caller: InsideCaller) -> None:
        """
        Args:
            session: has the job.
            job: whose result it is.
            caller: gets it.
        """
        self._session = session
        self.job = job
        self.finished = False
        self._caller = caller
        self._rows = MessageBuffer()
        # Kept here, since the job forgets its columns when its session is done with it.
        self._columns: tuple[Field, ...] | None = None
        job.consumed = True

    async def next(self) -> Answer:
        """The next block; the last one may have no rows.

        ``r`` for rows: whether there is more (``t`` or ``f``), the DateStyle and IntervalStyle to
        read them by, the columns' type OIDs and type modifiers (both int4[]), and the values as
        text[][], one row for each column. Or ``t`` for no rows, and the command tags (text[]).

        Raises SQLError: the job's own; 22P05 for a character that the encoding lacks; 57014 if it
        was cancelled meanwhile. Raises OSError.
        """
        rows: list[tuple[bytes | None, ...]] = []
        size = 0
        while True:
            if self.job.columns is not None:
                self._columns = self.job.columns
            while size < SIZE and (message := self._rows.next_message()) is not None:
                rows.append(DataRow.parse(message[1]).values)
                size += len(message[1])
            if size >= SIZE:
                return await self._block(rows)
            output = self.job.output.take()
            if isinstance(output, Notice):
                await self._caller.pass_on(self.job, output)
            elif isinstance(output, Rows):
                self._rows.feed(output.data)
            elif not self.job.finished:
                await self._caller.wait_for(self.job)
            else:
                return await self._last(rows)

    async def _last(self, rows: list[tuple[bytes | None, ...]]) -> Answer:
        job = self.job
        self.finished = True
        if job.fetched_error is not None:
            raise ServerError(job.report_in(job.fetched_error, *self._caller.encodings))
        if job.canceled:
            # The cancel came too late or was caught, but later rows were dropped.
            raise SQLError(
                QUERY_CANCELED, f"results for PID {job.pid} were dropped when it was canceled"
            )
        if self._columns is None:
            return [b"t", array_text(job.tags, job.encoding)]
        return await self._block(rows)

    async def _block(self, rows: list[tuple[bytes | None, ...]]) -> Answer:
        fields = self._columns or ()
        encoding = self._caller.encoding_of_values(self.job)
        columns = [array_text(column, encoding) for column in zip(*rows, strict=True)]
        values = await self._caller.values_of(self.job, b"{%b}" % b",".join(columns))
        return [
            b"r",
            b"f" if self.finished else b"t",
            *self._styles(),
            b"{%b}" % b",".join(b"%d" % field.type_oid for field in fields),
            b"{%b}" % b",".join(b"%d" % field.type_modifier for field in fields),
            values,
        ]

    def _styles(self) -> Answer:
        # Any setting reads ISO dates, and intervals in all styles but one.
        date_style = self.job.parameters.get(b"DateStyle", b"ISO")
        interval_style = self.job.parameters.get(b"IntervalStyle", b"postgres")
        if date_style.startswith(b"ISO") and interval_style != b"sql_standard":
            return [None, None]
        return [date_style, interval_style]

    def end(self) -> None:
        """There are no more, or nobody wants them: the job must not wait for us."""
        if self.finished:
            self._session.jobs.remove(self.job)
        elif self.job.has_handle:
            self.job.forget_output()
        else:
            self._session.drop(self.job)
