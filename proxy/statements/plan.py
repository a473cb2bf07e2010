"""How a statement is served: its stand-in, the calls that are made of the stand-in's rows, and the
client's columns.

Invariant: a plan says all that the interception needs to know of a statement, in terms of the
stand-in's columns; only its `Rewrite` knows positions in the text.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from protocol.errors import SQLError
from proxy.api.functions import HANDLES, LIST, RECORD, VIEWS, Function, Needs, Parameter
from proxy.sql.rewrite import Piece, Rewrite
from proxy.sql.tokens import Tokens


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

    def all(self) -> Iterator[Call]:
        """It, and the calls in its arguments."""
        yield self
        for argument in self.arguments:
            if isinstance(argument.value, Call):
                yield from argument.value.all()

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

    @property
    def calls(self) -> list[Call]:
        """The outermost ones."""
        raise NotImplementedError

    @functools.cached_property
    def all_calls(self) -> tuple[Call, ...]:
        """With those in their arguments."""
        return tuple(inner for call in self.calls for inner in call.all())

    @property
    def has_definition_list(self) -> bool:
        """Whether the statement defines the columns of what it calls."""
        return False

    @property
    def streams(self) -> bool:
        """Whether the rows are a job's, which the proxy hands over as they come; the server would
        first gather them all."""
        return any(call.function.result_type == RECORD for call in self.calls)

    @functools.cached_property
    def is_servers_too(self) -> bool:
        """Whether a server that has the functions takes the statement as it stands, with the same
        parameters. The proxy alone serves rows without a column definition list, and takes more
        than handles for handles."""
        parameters = (p.type for call in self.all_calls for p in call.function.parameters)
        return HANDLES not in parameters and (
            self.has_definition_list
            or all(
                call.function.result_type not in (RECORD, LIST)
                or VIEWS.get(call.function.name) is call.function
                for call in self.calls
            )
        )

    @functools.cached_property
    def needs(self) -> Needs:
        """What its calls need together."""
        return functools.reduce(operator.or_, (call.function.needs for call in self.all_calls))


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ResultPlan(_Calling):
    """The rows of a function that has columns: its own, the job's, or those of a definition list.
    The stand-in returns exactly one row.

    With a column definition list (``defined_columns`` > 0) the stand-in's columns are the
    client's outputs, all NULL, then the OIDs of the list's types (an oid[] as text; a domain has
    its own), then the call's arguments: the last two are for the proxy alone. Nothing has yet
    compared the types with the function's. Without a list its only column is the arguments.

    ``types``: those of the list, as written. ``has_modifiers``: one of them may have a modifier.

    ``has_no_side_effects``: as in `ScalarPlan`.
    """

    rewrite: Rewrite
    call: Call
    outputs: tuple[Output, ...]
    defined_columns: int
    types: tuple[bytes, ...] = ()
    has_modifiers: bool = False
    has_no_side_effects: bool = False

    @property
    def calls(self) -> list[Call]:
        return [self.call]

    @property
    def has_definition_list(self) -> bool:
        return self.defined_columns > 0


Plan = ScalarPlan | ResultPlan


@dataclass(frozen=True, slots=True)
class Block:
    """A DO statement of ours within one of the client's: its text, and what stood in its place;
    ``is_executed``: as a constant behind EXECUTE."""

    text: bytes
    written: bytes
    is_executed: bool


@dataclass(frozen=True, slots=True)
class Substitute:
    """A statement that goes to the server in other words, and makes no call.

    ``tag``: what CommandComplete is to say instead. Then it is a command that a block of ours
    carries out, and errors and notices lose their CONTEXT within the block. Without a tag it
    is the client's own statement, changed in places.

    ``notice``: what the client is told when it has been executed.

    ``is_undecided``: it may be changed, or have a notice; the server is to be asked first.

    ``blocks``: blocks of ours that a DO block executes in place of commands, each with what the
    client wrote there; CONTEXT is to say that. They change what is known of the extension.
    """

    rewrite: Rewrite
    tag: bytes | None = None
    notice: SQLError | None = None
    is_undecided: bool = False
    blocks: tuple[Block, ...] = ()

    @property
    def is_followed(self) -> bool:
        """Whether something is to be done when it is executed, however much later."""
        return self.tag is not None or self.notice is not None or bool(self.blocks)


@dataclass(slots=True, eq=False)
class Statement:
    """One statement of a Query, from its first token to its last; or the whole text of a Parse. The
    relay sees it first, and hands it to the interception.

    Attributes:
        text: in the client's encoding.
        offset: where it begins in the message's text, in bytes.
        tokens: None if it mentions nothing of ours, or cannot be read: then it passes as it is.
        sent: the whole text of the message.
        voids: the numbers of the parameters that its Parse declares to be of type void.
        is_kept: whether it is a Parse that names it, so that it may be executed much later.
        calls: how to serve the calls in it, by version of the API, as far as that was asked.
        substitutes: what else takes its place, once that was asked.
        is_others: whether a call in it means an object of the database's own, so that the server
            is to make it.
    """

    text: bytes
    offset: int = 0
    tokens: Tokens | None = None
    sent: bytes = b""
    voids: frozenset[int] = frozenset()
    is_kept: bool = False
    calls: dict[int, Plan | None] = field(default_factory=dict)
    substitutes: list[Substitute | None] = field(default_factory=list)
    is_others: bool = False


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
    blocks = (plan.blocks for _, plan in plans if isinstance(plan, Substitute))
    return Substitute(
        Rewrite(sql, tuple(pieces)), blocks=tuple(itertools.chain.from_iterable(blocks))
    )


def substitute(sql: bytes, text: bytes, tag: bytes) -> Substitute:
    """What replaces all of a statement."""
    return Substitute(Rewrite(sql, (Piece(0, 0, text),)), tag)
