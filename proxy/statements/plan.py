"""How a statement is served: its stand-in, the calls that are made of the stand-in's rows, and the
client's columns.

Invariant: a plan says all that the interception needs to know of a statement, in terms of the
stand-in's columns; only `Rewrite` knows positions in the text.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from proxy.api.functions import Function, Needs, Parameter
from proxy.sql.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a stand-in: ``original[start:end]``, or ``inserted`` if that is given; then it
    stands for the text at ``start``."""

    start: int
    end: int
    inserted: bytes | None = None


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The stand-in of a statement, and where each of its characters comes from."""

    original: bytes
    pieces: tuple[Piece, ...]

    @property
    def sql(self) -> bytes:
        """The text for the server."""
        return b"".join(text for _, text in self._texts())

    @property
    def unsent(self) -> bytes:
        """The parts of the original that are not in the stand-in, in order."""
        kept = sorted((p.start, p.end) for p in self.pieces if p.inserted is None)
        done = 0
        unsent: list[bytes] = []
        for start, end in kept:
            unsent.append(self.original[done:start])
            done = max(done, end)
        return b" ".join([*unsent, self.original[done:]])

    def original_position(self, position: int, codec: str) -> int:
        """Where in the original a character of the stand-in belongs.

        Args:
            position: as in an error's field P: in characters, from 1.
            codec: Python's name of the client encoding.
        """
        offset = self._original_offset(self._offset(position, codec))
        return len(self.original[:offset].decode(codec, "surrogateescape")) + 1

    def inserted_before(self, position: int, codec: str) -> list[bytes]:
        """What was inserted up to and including the character at ``position``."""
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


@dataclass(frozen=True, slots=True)
class FieldOf:
    """A field of the result of the call in another column of the stand-in, for the same row;
    ``field`` is its index in that call's ``function.columns``. NULL if the result is NULL."""

    column: int
    field: int


@dataclass(frozen=True, slots=True)
class Argument:
    """What one parameter of a call gets.

    ``value`` is an index into the stand-in's text[], or the call whose result it is, or a field of
    another column's. ``name`` is the parameter's name as the call wrote it, if it did.
    """

    parameter: Parameter
    value: int | Call | FieldOf
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A call, with its arguments in the order written, without those that take their defaults.
    ``schema`` qualifies the function's name, if it is given."""

    function: Function
    arguments: tuple[Argument, ...]
    schema: bytes | None = None

    def functions(self) -> Iterator[Function]:
        """What is called, by it and by the calls in its arguments."""
        yield self.function
        for argument in self.arguments:
            if isinstance(argument.value, Call):
                yield from argument.value.functions()

    def leaves(self) -> Iterator[tuple[Call, int]]:
        """The elements of the stand-in's text[]: the call (this or an inner one) that each is an
        argument of, and its place among the arguments."""
        for place, argument in enumerate(self.arguments):
            if isinstance(argument.value, Call):
                yield from argument.value.leaves()
            elif isinstance(argument.value, int):
                yield self, place


@dataclass(frozen=True, slots=True)
class CallColumn:
    """An output column that is a call: the stand-in has its arguments there, a text.

    ``index`` counts from the first column, or backwards from the last (-1) where a ``*`` before
    it makes that unknown.
    """

    index: int
    call: Call


@dataclass(frozen=True, slots=True)
class ItemOutput:
    """A column of the client's.

    ``column``: the stand-in's column that it is made of, from 0.
    ``field``: if that is a call and the client wants one field of the result, its index in
    ``call.function.columns``. None: the value as it is.
    ``label``: its name, None for that of the stand-in's column.
    """

    column: int
    field: int | None = None
    label: bytes | None = None


class _Calling:
    """A plan that makes calls."""

    __slots__ = ()

    @property
    def calls(self) -> list[Call]:
        """The outermost ones."""
        raise NotImplementedError

    @property
    def functions(self) -> list[Function]:
        """All that it calls."""
        return [function for call in self.calls for function in call.functions()]

    @property
    def needs(self) -> Needs:
        """What its calls need together."""
        return functools.reduce(operator.or_, (function.needs for function in self.functions))


@dataclass(frozen=True, slots=True)
class ScalarPlan(_Calling):
    """Each row of the stand-in makes the calls in its columns, each once and in the order of
    ``columns``; the other columns are as they are. A call's column is of type text.

    Without ``outputs`` the client's columns are the stand-in's, with their names.
    ``in_from``: the first of the calls stands in FROM, behind the others.
    ``width``: how many columns the stand-in has, None if a ``*`` hides that.
    ``has_no_side_effects``: true only if nothing that the server executes can have any.
    """

    rewrite: Rewrite
    columns: tuple[CallColumn, ...]
    outputs: tuple[ItemOutput, ...] | None = None
    in_from: bool = False
    width: int | None = None
    has_no_side_effects: bool = False

    @property
    def calls(self) -> list[Call]:
        return [column.call for column in self.columns]


@dataclass(frozen=True, slots=True)
class Output:
    """What an item of the select list takes from a function's result.

    ``column``: None for all columns in order (``*``); with a column definition list the position
    in that list, from 0; without one the position in ``call.function.columns``, and if the function
    has none (pg_background_result) the column's name in the job's result.
    ``label``: the output's name, None for the column's own. With ``column`` None it can only come
    of ``SELECT pg_background_result(…) AS label``, and names the column if there is just one.
    """

    column: int | bytes | None
    label: bytes | None = None


@dataclass(frozen=True, slots=True)
class ResultPlan(_Calling):
    """The rows of a function that has columns: its own, the job's, or those of a definition list.
    The stand-in returns exactly one row.

    With a column definition list (``defined_columns`` > 0) the stand-in's columns are the
    client's outputs, then the ``defined_columns`` of the list, then the call's arguments: the last
    ``defined_columns + 1`` are for the proxy alone. All but the last are NULL; their types count,
    and nothing has yet compared them with the function's. Without one its only column is the call's
    arguments.

    ``has_no_side_effects``: as in `ScalarPlan`.
    """

    rewrite: Rewrite
    call: Call
    outputs: tuple[Output, ...]
    defined_columns: int
    has_no_side_effects: bool = False

    @property
    def calls(self) -> list[Call]:
        return [self.call]


Plan = ScalarPlan | ResultPlan


@dataclass(frozen=True, slots=True)
class Substitute:
    """A statement that goes to the server in other words, and makes no call.

    ``tag``: what CommandComplete is to say instead. Then it is a command that a block of ours
    carries out, and errors and notices lose their CONTEXT within the block. Without a tag it
    is the client's own statement, changed in places.
    """

    rewrite: Rewrite
    tag: bytes | None = None


@dataclass(slots=True, eq=False)
class Statement:
    """One statement of a Query, from its first token to its last; or the whole text of a Parse. The
    relay sees it first, and hands it to the interception.

    Attributes:
        text: in the client's encoding.
        offset: where it begins in the message's text, in bytes.
        tokens: None if it mentions nothing of ours, or cannot be read: then it passes as it is.
        calls: how to serve the calls in it, by version of the API, as far as that was asked.
        substitutes: what else takes its place, once that was asked.
    """

    text: bytes
    offset: int = 0
    tokens: Tokens | None = None
    calls: dict[int, Plan | None] = field(default_factory=dict)
    substitutes: list[Substitute | None] = field(default_factory=list)


def joined(sql: bytes, plans: Sequence[tuple[int, Plan | Substitute]]) -> Substitute:
    """A Query string with some of its statements replaced.

    Args:
        sql: the whole string.
        plans: what replaces them, and where each begins, in order.
    """
    pieces: list[Piece] = []
    done = 0
    for start, plan in plans:
        pieces.append(Piece(done, start))
        done = start + len(plan.rewrite.original)
        pieces += [
            Piece(start + piece.start, start + piece.end, piece.inserted)
            for piece in plan.rewrite.pieces
        ]
    pieces.append(Piece(done, len(sql)))
    return Substitute(Rewrite(sql, tuple(pieces)))


def substitute(sql: bytes, text: bytes, tag: bytes) -> Substitute:
    """What replaces all of a statement."""
    return Substitute(Rewrite(sql, (Piece(0, 0, text),)), tag)
