"""How a statement is served: its stand-in, the calls for its rows, and the client's columns.

Invariant: a plan has all that the interception needs to know about a statement, in terms of the
stand-in's columns; only its `Rewrite` knows positions in the text.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from protocol.errors import SQLError
from proxy.api.functions import HANDLES, LIST, RECORD, Function, Needs, Parameter, is_view
from proxy.sql.rewrite import Piece, Rewrite
from proxy.sql.tokens import Tokens


@dataclass(frozen=True, slots=True)
class FieldOf:
    """A field of the result of the call in another column, for the same row; ``field`` is its index
    in that call's ``function.columns``. NULL if the result is NULL."""

    column: int
    field: int


@dataclass(frozen=True, slots=True)
class Argument:
    """What one parameter of a call gets.

    ``value`` is an index into the stand-in's text[], the call whose result it is, or a field of
    another column's. ``name`` is the parameter's name, if written in the call.
    """

    parameter: Parameter
    value: int | Call | FieldOf
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A call, with its arguments as written (not the defaults), and the function's ``schema``."""

    function: Function
    arguments: tuple[Argument, ...]
    schema: bytes | None = None

    def all(self) -> Iterator[Call]:
        """The call itself, and those in its arguments."""
        yield self
        for argument in self.arguments:
            if isinstance(argument.value, Call):
                yield from argument.value.all()

    def leaves(self) -> Iterator[tuple[Call, int]]:
        """The elements of the stand-in's text[]: for each, the call (this or an inner one) of which
        it is an argument, and its index there."""
        for place, argument in enumerate(self.arguments):
            if isinstance(argument.value, Call):
                yield from argument.value.leaves()
            elif isinstance(argument.value, int):
                yield self, place


@dataclass(frozen=True, slots=True)
class CallColumn:
    """An output column that is a call: in the stand-in it is the arguments, a text.

    ``index`` counts from the first column, or from the last (-1) behind a ``*``.
    """

    index: int
    call: Call


@dataclass(frozen=True, slots=True)
class ItemOutput:
    """A column of the client's.

    ``column``: the stand-in's column that it comes from, counted from 0.
    ``field``: if that is a call and the client wants one field of the result, its index in
    ``call.function.columns``; None: the value as it is.
    ``label``: its name; None for that of the stand-in's column.
    """

    column: int
    field: int | None = None
    label: bytes | None = None


class _Calling:
    """A plan with calls."""

    @property
    def calls(self) -> list[Call]:
        """The outermost calls."""
        raise NotImplementedError

    @functools.cached_property
    def all_calls(self) -> tuple[Call, ...]:
        """The outermost calls, and those in their arguments."""
        return tuple(inner for call in self.calls for inner in call.all())

    @property
    def has_definition_list(self) -> bool:
        """Whether the statement has a column definition list."""
        return False

    @property
    def streams(self) -> bool:
        """Whether the rows are a job's, sent as they come; a server would collect them first."""
        return any(call.function.result_type == RECORD for call in self.calls)

    @functools.cached_property
    def server_can_run(self) -> bool:
        """Whether a server with the functions accepts the unchanged statement. Only the proxy
        serves rows without a column definition list, and takes other values for handles."""
        parameters = (p.type for call in self.all_calls for p in call.function.parameters)
        return HANDLES not in parameters and (
            self.has_definition_list
            or all(
                call.function.result_type not in (RECORD, LIST) or is_view(call.function)
                for call in self.calls
            )
        )

    @functools.cached_property
    def needs(self) -> Needs:
        """What the calls need, together."""
        return functools.reduce(operator.or_, (call.function.needs for call in self.all_calls))


@dataclass(frozen=True)
class ScalarPlan(_Calling):
    """For each row of the stand-in, the calls in its columns are made once, in the order of
    ``columns``; other columns are passed on. A call's column has type text.

    Without ``outputs`` the client's columns are the stand-in's, with their names.
    ``in_from``: the first call is in FROM, behind the other items.
    ``width``: number of the stand-in's columns; None if a ``*`` hides it.
    ``has_no_side_effects``: whether nothing that the server executes can have any.
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

    ``column``: None means all columns (``*``). With a column definition list it is the index there,
    from 0; otherwise the index in ``call.function.columns`` or, if the function has none
    (pg_background_result), the column's name in the job's result.
    ``label``: the output's name; None for the column's own. If ``column`` is None, it comes from
    ``SELECT pg_background_result(…) AS label``, and applies to a single column.
    """

    column: int | bytes | None
    label: bytes | None = None


@dataclass(frozen=True)
class ResultPlan(_Calling):
    """The rows of a function with columns: its own, its job's, or those of a definition list. The
    stand-in returns exactly one row.

    With a column definition list (``defined_columns`` > 0), the stand-in's columns are the client's
    outputs, all NULL; then, for the proxy alone, the OIDs of the list's types (an oid[] as text; a
    domain has its own) and the call's arguments. The types are not yet compared with the
    function's. Without a list, its only column is the arguments.

    ``types``: those of the list, as written. ``has_modifiers``: whether one may have a modifier.

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
    """A DO statement of ours within one of the client's: its text, and the text that it replaces.
    ``is_executed``: whether it is a constant after EXECUTE."""

    text: bytes
    written: bytes
    is_executed: bool


@dataclass(frozen=True, slots=True)
class Substitute:
    """A statement without calls that the server gets in other words.

    ``tag``: the command tag for the client, if a block of ours carries out the command; CONTEXT
    then omits the block. Otherwise it is the client's own statement, changed in places.

    ``notice``: sent to the client after execution.

    ``is_undecided``: it may be changed, or have a notice; the server must be asked first.

    ``blocks``: blocks of ours that a DO block executes in place of commands, with the client's
    text, which CONTEXT must show. They change what is known about the extension.
    """

    rewrite: Rewrite
    tag: bytes | None = None
    notice: SQLError | None = None
    is_undecided: bool = False
    blocks: tuple[Block, ...] = ()

    @property
    def is_followed(self) -> bool:
        """Whether its execution, however much later, needs handling."""
        return self.tag is not None or self.notice is not None or bool(self.blocks)


@dataclass(slots=True, eq=False)
class Statement:
    """One statement of a Query, from its first token to its last; or the whole text of a Parse. The
    relay makes it, and hands it to the interception.

    Attributes:
        text: in the client's encoding.
        offset: where it begins in the message's text, in bytes.
        tokens: None if it does not mention us or cannot be read, so that it passes unchanged.
        sent: the whole text of the message.
        voids: the numbers of the parameters that its Parse declares as void.
        is_kept: whether it is a named Parse, which may be executed much later.
        calls: the plans for its calls, by version of the API, as far as they were needed.
        substitutes: its substitutes, once needed.
        is_others: whether a call in it means another object, so that the server must make it.
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
        plans: the replacements, and where each begins, in order.
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
    """The substitute for a whole statement."""
    return Substitute(Rewrite(sql, (Piece(0, 0, text),)), tag)
