"""Where an error or a notice of a job points: into the job's own text.

Invariant: no position goes to the caller as one in his own statement. It is that of an internal
query, as the server gives it for the text of an EXECUTE in PL/pgSQL; and the text is the job's as
it was launched, also where the server got other words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from proxy.jobs.registry import FULL_SQL_SIZE, ReportT
from proxy.sql.encodings import position_codec
from proxy.sql.rewrite import Piece, Rewrite

LONGEST_QUERY: Final = FULL_SQL_SIZE
"""Bytes of a text that goes along with its errors. Those of a longer one have the position only."""


class JobText:
    """The text of one job, from its launch until its session is done with it.

    Attributes:
        progress_calls: places of the statements that stand for a call of pg_background_progress.
    """

    def __init__(self, sql: bytes, parameters: Mapping[bytes, bytes], marker: bytes) -> None:
        """
        Args:
            sql: the job's string.
            parameters: of the job's backend.
            marker: what a block in place of such a statement has in its text.
        """
        self.progress_calls: frozenset[int] = frozenset()
        self._sql: bytes | None = sql
        self._parameters = parameters
        self._marker = marker
        self._is_changed = False
        self._rewrite: Rewrite | None = None
        self._blocks: Mapping[int, Sequence[Piece]] = {}

    def sent(self, pieces: Sequence[Piece], blocks: Mapping[int, Sequence[Piece]]) -> bytes:
        """What the server gets. `blocks`: those among the pieces, by their statement's place."""
        assert self._sql is not None
        self.progress_calls = frozenset(blocks)
        if all(piece.inserted is None for piece in pieces):
            return self._sql
        self._is_changed = True
        self._blocks = blocks
        self._rewrite = Rewrite(self._sql, tuple(pieces))
        return self._rewrite.sql

    def taken_up(self) -> None:
        """The server has it. A long one is not kept."""
        if self._sql is not None and len(self._sql) > LONGEST_QUERY:
            self.forget()

    def forget(self) -> None:
        """Nobody will fetch its errors."""
        self._sql = self._rewrite = None
        self._blocks = {}

    def located(self, report: ReportT, place: int | None = None) -> ReportT:
        """A message of the job's backend, pointing into the job's text if it points at all.

        Args:
            report: as the server has sent it.
            place: how many statements had ended before.
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
        """In the job's text, of what is there in the text that was sent; None if it is not known.
        Both are in characters, from 1."""
        if not self._is_changed:
            return sent
        if self._rewrite is None or (codec := self._codec()) is None:
            return None
        return b"%d" % self._rewrite.original_position(int(sent), codec)

    def _position_in_block(
        self, fields: Mapping[str, bytes], pieces: Sequence[Piece]
    ) -> bytes | None:
        """Of what is in a query of a block."""
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
        """The lines of a CONTEXT less the last ones, which are about a block."""
        lines = context.split(b"\n")
        marked = (number for number, line in enumerate(lines) if self._marker in line)
        return b"\n".join(lines[: next(marked, len(lines) - 1)])
