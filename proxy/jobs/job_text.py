"""Makes the errors and notices of a job point into the job's own text.

Invariant: the caller never gets such a position as one in its own statement. It is that of an
internal query, as the server gives it for EXECUTE in PL/pgSQL, and refers to the job's text as
launched, even where the server got another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from proxy.jobs.registry import FULL_SQL_SIZE, ReportT
from proxy.sql.encodings import position_codec
from proxy.sql.rewrite import Piece, Rewrite

LONGEST_QUERY: Final = FULL_SQL_SIZE
"""Bytes of a text that accompanies its errors. Those of a longer one have the position only."""


class JobText:
    """The text of one job, from launch until its session is done with it.

    Attributes:
        progress_calls: indexes of the statements that stand for calls of pg_background_progress.
    """

    def __init__(self, sql: bytes, parameters: Mapping[bytes, bytes], marker: bytes) -> None:
        """
        Args:
            sql: the job's string.
            parameters: of the job's backend.
            marker: identifies the blocks that replace such statements.
        """
        self.progress_calls: frozenset[int] = frozenset()
        self._sql: bytes | None = sql
        self._parameters = parameters
        self._marker = marker
        self._is_changed = False
        self._rewrite: Rewrite | None = None
        self._blocks: Mapping[int, Sequence[Piece]] = {}

    def sent(self, pieces: Sequence[Piece], blocks: Mapping[int, Sequence[Piece]]) -> bytes:
        """The text for the server. `blocks`: those among the pieces, by statement index."""
        assert self._sql is not None
        self.progress_calls = frozenset(blocks)
        if all(piece.inserted is None for piece in pieces):
            return self._sql
        self._is_changed = True
        self._blocks = blocks
        self._rewrite = Rewrite(self._sql, tuple(pieces))
        return self._rewrite.sql

    def taken_up(self) -> None:
        """The server has the text: drop it if it is long."""
        if self._sql is not None and len(self._sql) > LONGEST_QUERY:
            self.forget()

    def forget(self) -> None:
        """Drop the text: nobody will fetch its errors."""
        self._sql = self._rewrite = None
        self._blocks = {}

    def located(self, report: ReportT, place: int | None = None) -> ReportT:
        """A message of the job's backend, made to point into the job's text if it has a position.

        Args:
            report: as the server has sent it.
            place: number of statements that had ended before.
        """
        fields = dict(report.fields)
        is_blocks = place in self.progress_calls
        if is_blocks and "W" in fields:
            fields["W"] = self._around_block(fields["W"])
        if "P" in fields:
            position = self._position(fields["P"])
        elif is_blocks and self._marker in fields.get("q", b""):
            position = self._position_in_block(fields, self._blocks.get(place or 0, ()))
        else:
            return type(report)(fields)
        for code in "Ppq":
            fields.pop(code, None)
        if position is not None:
            fields["p"] = position
            if self._sql is not None:
                fields["q"] = self._sql
        return type(report)(fields)

    def _position(self, sent: bytes) -> bytes | None:
        """From a position in the text that was sent to that in the job's text; None if unknown.
        Both count characters from 1."""
        if not self._is_changed:
            return sent
        if self._rewrite is None or (codec := self._codec()) is None:
            return None
        return b"%d" % self._rewrite.original_position(int(sent), codec)

    def _position_in_block(
        self, fields: Mapping[str, bytes], pieces: Sequence[Piece]
    ) -> bytes | None:
        """The position for one in a query of a block."""
        if self._rewrite is None or (codec := self._codec()) is None:
            return None
        block = Rewrite(self._rewrite.original, tuple(pieces))
        before, query, _ = block.sql.partition(fields["q"])
        if not query:
            return None
        position = len(before.decode(codec, "surrogateescape")) + int(fields["p"])
        return b"%d" % block.original_position(position, codec)

    def _codec(self) -> str | None:
        assert self._rewrite is not None
        client, server = (
            self._parameters.get(name, b"") for name in (b"client_encoding", b"server_encoding")
        )
        return position_codec(self._rewrite.original, client, server)

    def _around_block(self, context: bytes) -> bytes:
        """The lines of a CONTEXT without the last ones, which are about a block."""
        lines = context.split(b"\n")
        marked = (number for number, line in enumerate(lines) if self._marker in line)
        return b"\n".join(lines[: next(marked, len(lines) - 1)])
