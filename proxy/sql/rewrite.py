"""A text that the server gets in other words: a stand-in, a substitute, a job's string.

Invariant: it is the original with pieces removed and inserted between tokens, so each of its
characters has a place in the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of what is sent: ``original[start:end]``, or ``inserted`` for what is at ``start``."""

    start: int
    end: int
    inserted: bytes | None = None


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The text sent, and where each of its characters comes from."""

    original: bytes
    pieces: tuple[Piece, ...]

    @property
    def sql(self) -> bytes:
        """The text for the server."""
        return b"".join(text for _, text in self._texts())

    @property
    def unsent(self) -> bytes:
        """The parts of the original that are not sent, in order."""
        kept = sorted((p.start, p.end) for p in self.pieces if p.inserted is None)
        done = 0
        unsent: list[bytes] = []
        for start, end in kept:
            unsent.append(self.original[done:start])
            done = max(done, end)
        return b" ".join([*unsent, self.original[done:]])

    def original_position(self, position: int, codec: str) -> int:
        """The position in the original of a character of the text sent.

        Args:
            position: as in an error's field P: in characters, from 1.
            codec: Python's name of the client encoding.
        """
        offset = self._original_offset(self._offset(position, codec))
        return len(self.original[:offset].decode(codec, "surrogateescape")) + 1

    def inserted_before(self, position: int, codec: str) -> list[bytes]:
        """The insertions up to and including the character at ``position``."""
        offset = self._offset(position, codec)
        inserted: list[bytes] = []
        for piece, text in self._texts():
            if offset < 0:
                break
            offset -= len(text)
            if piece.inserted is not None:
                inserted.append(text)
        return inserted

    def _texts(self) -> Iterator[tuple[Piece, bytes]]:
        for piece in self.pieces:
            text = piece.inserted
            yield piece, self.original[piece.start : piece.end] if text is None else text

    def _offset(self, position: int, codec: str) -> int:
        text = self.sql.decode(codec, "surrogateescape")
        return len(text[: position - 1].encode(codec, "surrogateescape"))

    def _original_offset(self, offset: int) -> int:
        for piece, text in self._texts():
            if offset < len(text):
                return piece.start + (offset if piece.inserted is None else 0)
            offset -= len(text)
        return len(self.original)


Change = tuple[int, int, bytes]
"""Bytes of a text, from and to, and their replacement."""


def with_changes(sql: bytes, changes: Sequence[Change]) -> Rewrite:
    """A text with parts replaced, given in order."""
    pieces: list[Piece] = []
    done = 0
    for start, end, text in changes:
        pieces += [Piece(done, start), Piece(start, start, text)]
        done = end
    return Rewrite(sql, (*pieces, Piece(done, len(sql))))
