"""Which pg_background calls a statement makes, and the stand-in that the server gets for it.

The server never sees our functions. Where a call stands it gets a stand-in: an expression that
evaluates and type-checks the call's arguments and returns them as one text[] literal. So errors
in arguments, parameter types, Describe, portals and failed transactions are the server's own.

The rule: **a statement is served only if its stand-in does what the statement would have done**.
Whatever is not recognised for certain gives None, and passes through as it came. SQL is edited by
source span, between tokens of our exact lexer; nothing is ever printed from a syntax tree.

These shapes are served:

- *calls as items of the select list* of one plain SELECT, or a field of what they return, or all
  of them (``(call).*``). What else stands in the statement is free: only the words that begin its
  clauses count, and the commas between them, at its outermost level;
- *a function alone in FROM*, with plain output columns; one of the views too;
- *a call alone in a subquery that is alone in FROM*, with plain output columns or fields;
- *a call as the last item of FROM*, made for each row of the others, and what it returns as plain
  columns or as arguments of calls in the select list;
- *pg_background_result alone in the select list*.

All are read from the tokens, in time that is linear in their number: no grammar is needed to see
where an item ends. What the grammar forbids, the server says of the stand-in too.
"""

from __future__ import annotations

import bisect
import functools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from proxy.api.functions import (
    BOOL,
    FUNCTIONS,
    HANDLE,
    HANDLES,
    INT4,
    INT8,
    LIST,
    RECORD,
    TEXT,
    VIEWS,
    Function,
    Parameter,
    Type,
)
from proxy.sql.lexer import (
    MAX_TOKENS,
    RESERVED,
    Kind,
    LexError,
    Statement,
    Token,
    identifier,
    keyword,
    split,
)
from proxy.sql.text import do_block, literal

TRIGGER: Final = b"pg_background"


def mentions(data: bytes) -> bool:
    """Whether ``data`` could hold a call: the test that every chunk goes through, 0.5 µs a kB."""
    return TRIGGER in data.lower()


# --- the plan -------------------------------------------------------------------------------


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
        """What of the original is not in the stand-in, in its order."""
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
        """What was inserted up to the character at ``position``, that included."""
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
    """A field of what the call in another column of the stand-in has returned for the same row;
    ``field`` is its index in that call's ``function.columns``. NULL if the call returned NULL."""

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
    """A call; arguments as written, parameters that take their defaults are not among them.
    ``schema`` is what qualifies the function's name, if anything does."""

    function: Function
    arguments: tuple[Argument, ...]
    schema: bytes | None = None

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


@dataclass(frozen=True, slots=True)
class ScalarPlan:
    """Each row of the stand-in makes the calls in its columns, each once and in the order of
    ``columns``; the other columns are as they are. A call's column is of type text.

    Without ``outputs`` the client's columns are the stand-in's, with their names.
    ``in_from``: the first of the calls stands in FROM, behind the others.
    ``width``: how many columns the stand-in has, None if a ``*`` hides that.
    """

    rewrite: Rewrite
    columns: tuple[CallColumn, ...]
    outputs: tuple[ItemOutput, ...] | None = None
    in_from: bool = False
    width: int | None = None


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
class ResultPlan:
    """The rows of a function that has columns: its own, the job's, or those of a definition list.
    The stand-in returns exactly one row.

    With a column definition list (``defined_columns`` > 0) the stand-in's columns are the
    client's outputs, then the ``defined_columns`` of the list, then the call's arguments: the last
    ``defined_columns + 1`` are for the proxy alone. All but the last are NULL; their types count,
    and nothing has yet compared them with the function's. Without one its only column is the call's
    arguments.
    """

    rewrite: Rewrite
    call: Call
    outputs: tuple[Output, ...]
    defined_columns: int


Plan = ScalarPlan | ResultPlan


@dataclass(frozen=True, slots=True)
class Substitute:
    """A statement that goes to the server in other words, and makes no call.

    ``tag``: what CommandComplete is to say instead. Then it is a command that a block of ours
    carries out, and nobody wants to know where in the block something was said. Without a tag it
    is the client's own statement, changed in places.
    """

    rewrite: Rewrite
    tag: bytes | None = None


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


def analyze(
    sql: bytes,
    *,
    standard_conforming_strings: bool = True,
    encoding: str | None = None,
    functions: Mapping[str, tuple[Function, ...]] = FUNCTIONS,
) -> Plan | None:
    """How to serve a statement; None: it makes no call that we serve, and passes as it is.

    Args:
        sql: the text of one statement, in the client's encoding.
        standard_conforming_strings: the session's setting.
        encoding: client_encoding, as PostgreSQL names it.
        functions: what there is to call in the session's version of the API.
    """
    # Before reading all of it: a dump may have megabytes.
    if not (_CALL.search(sql) and _QUERY.match(sql)):
        return None
    try:
        statements = split(
            sql,
            standard_conforming_strings=standard_conforming_strings,
            encoding=encoding,
            bounded=True,
        )
        if len(statements) != 1:
            return None
        return _Reader(sql, statements[0].tokens, encoding, functions).plan()
    except (LexError, _NotServedError):
        return None


# No more than hints: every call that we serve has both, much else has too. A name is short.
_CALL: Final = re.compile(
    TRIGGER + rb'\w{0,50}+"?\s*+(?:\(|--|/\*)|' + "|".join(VIEWS).encode(), re.IGNORECASE
)
_QUERY: Final = re.compile(rb"[\s;]*+(?:select|with|table|--|/\*)", re.IGNORECASE)


# --- the stand-in of a call -----------------------------------------------------------------

# For each type a function of pg_catalog that takes just this type, so that the server resolves,
# converts and infers as it would for ours, and the way from there to text. The client chooses
# search_path, therefore every name is qualified and no operator is used. For handles there is no
# such function: anything is taken, and whether it is an array of handles is seen later.
_TO_TEXT: Final[dict[Type, tuple[bytes, bytes]]] = {
    TEXT: (b"pg_catalog.textcat(", b", '')"),
    INT4: (b"CAST(pg_catalog.int4up(", b") AS pg_catalog.text)"),
    INT8: (b"CAST(pg_catalog.int8up(", b") AS pg_catalog.text)"),
    BOOL: (b"CAST(pg_catalog.booleq(", b", true) AS pg_catalog.text)"),
    HANDLES: (b"CAST(", b" AS pg_catalog.text)"),
}
_OPENINGS: Final = frozenset(opening for opening, _ in _TO_TEXT.values())

_MESSAGE_SIZE: Final = 1024
"""Of a message, which anybody can raise, so much is looked at; the server's is shorter."""

# How the server writes these functions where it complains of an argument's type.
_SIGNATURE: Final = re.compile(
    rb"pg_catalog\.(?:textcat\((?P<text>.*), unknown\)|int4up\((?P<integer>.*)\)"
    rb"|int8up\((?P<bigint>.*)\)|booleq\((?P<boolean>.*), boolean\))",
    re.DOTALL,
)


def complaint(
    plan: Plan | Substitute, message: bytes, position: int | None = None, codec: str = "utf-8"
) -> bytes | None:
    """The server's message about a function of the stand-in, as one about the user's call.

    ``function pg_catalog.textcat(integer, unknown) does not exist`` becomes
    ``function pg_background_launch(integer) does not exist``, in any language.

    Args:
        plan: the plan whose stand-in the server complains of.
        message: the error's field M.
        position: its field P, which tells one argument from another.
        codec: Python's name of the client encoding.

    Returns:
        None if the message is not about one of these functions.
    """
    found = _SIGNATURE.search(message, 0, _MESSAGE_SIZE)
    if found is None or isinstance(plan, Substitute):
        return None
    type_name = found.lastgroup or ""
    calls = [plan.call] if isinstance(plan, ResultPlan) else [c.call for c in plan.columns]
    if isinstance(plan, ScalarPlan) and plan.in_from:
        calls = [*calls[1:], calls[0]]
    leaves = [leaf for call in calls for leaf in call.leaves()]
    if position is not None:
        inserted = plan.rewrite.inserted_before(position, codec)
        leaves = leaves[max(sum(text in _OPENINGS for text in inserted) - 1, 0) :]
    for call, place in leaves:
        if call.arguments[place].parameter.type.name == type_name:
            signature = _signature(call, place, found[type_name])
            return message[: found.start()] + signature + message[found.end() :]
    return None


def _signature(call: Call, place: int, given: bytes) -> bytes:
    """The call with the types of its arguments, one of them not the declared one."""
    arguments = [
        (argument.name.encode() + b" => " if argument.name else b"")
        + (given if other == place else argument.parameter.type.name.encode())
        for other, argument in enumerate(call.arguments)
    ]
    return call.function.name.encode() + b"(" + b", ".join(arguments) + b")"


# --- progress -------------------------------------------------------------------------------

_PROGRESS: Final = ("pg_background_progress", "pg_background_report_progress")

# A query in a loop, because then the arguments stand where they stood: they may use aggregates, and
# make several rows. In them a column comes before a variable of the block.
_PROGRESS_BLOCK: Final = (
    b"#variable_conflict use_column\n"
    b"DECLARE pg_background_report pg_catalog.record;"
    b" BEGIN FOR pg_background_report IN SELECT pg_catalog.concat(%b) AS message LOOP"
    b" RAISE INFO USING MESSAGE = pg_background_report.message; END LOOP; END"
)


def progress_statement(
    sql: bytes, statement: Statement, marker: bytes, *, encoding: str | None = None
) -> bytes | None:
    """What a job's ``SELECT pg_background_progress(…)`` is to the server: a DO block that
    evaluates and type-checks the arguments and says them in an INFO message, which the server sends
    at once. parse_progress() reads it.

    Args:
        sql: the job's string.
        statement: one of those that it was split into.
        marker: a word that nobody can guess, ASCII letters and digits.
        encoding: client_encoding, as PostgreSQL names it.

    Returns:
        None if the statement is anything but one such call.
    """
    if len(statement.tokens) > MAX_TOKENS or not mentions(sql[statement.start : statement.end]):
        return None
    try:
        return _Reader(sql, statement.tokens, encoding, FUNCTIONS).progress(marker)
    except _NotServedError:
        return None


def parse_progress(message: bytes, marker: bytes) -> tuple[int | None, bytes | None]:
    """The report in a message that begins with the marker: what was given for pct, not clamped,
    and for msg; None for NULL.

    The message is the marker, a blank, pct in digits or nothing, a blank, and ``=`` with msg behind
    it or nothing.
    """
    pct, _, text = message[len(marker) + 1 :].partition(b" ")
    return int(pct) if pct else None, text[1:] if text else None


# --- reading --------------------------------------------------------------------------------


class _NotServedError(Exception):
    """The statement is none that we serve."""


class _Leaf(NamedTuple):
    """An argument's tokens, first to last, and the name of the call that it is for."""

    type: Type
    first: int
    last: int
    name: int


class _Site(NamedTuple):
    """An outermost call, and its tokens from first (the schema's name) to last (the ``)``)."""

    call: Call
    leaves: list[_Leaf]
    first: int
    last: int


class _Lateral(NamedTuple):
    """A call that is the last item of FROM, and the statement around it, in tokens.

    ``select`` and ``from_`` are these words, ``before`` is where the other items of FROM end, and
    ``rest`` begins what is behind the alias, which ends at ``end``. ``names`` are the columns'.
    """

    site: _Site
    select: int
    from_: int
    before: int
    alias: int
    end: int
    rest: int
    name: bytes
    names: list[bytes]

    @property
    def alone(self) -> bool:
        """There are no other items."""
        return self.before == self.from_


class _Edit(NamedTuple):
    """``pieces`` in place of ``original[start:end]``."""

    start: int
    end: int
    pieces: list[Piece]


class _Reader:
    """One statement. Indices count tokens unless they are called offsets."""

    def __init__(
        self,
        sql: bytes,
        tokens: list[Token],
        encoding: str | None,
        functions: Mapping[str, tuple[Function, ...]],
    ) -> None:
        self.sql = sql
        self.tokens = tokens
        self.texts = [sql[start:end] for _, start, end in tokens]
        self.count = len(tokens)
        self.encoding = encoding
        self.functions = functions
        self.lateral: _Lateral | None = None

    def plan(self) -> Plan | None:
        sites = self.calls()
        if not sites:
            return self.view()
        if self.keyword(0) not in ("select", "with"):
            return None
        if (lateral := self.last_in_from(sites[-1])) is not None:
            return self.with_lateral(lateral)
        if len(sites) == 1:
            [site] = sites
            if self.keyword(site.first - 1) == "from":
                return self.from_item(site)
            if site.call.function.returns_set:
                return self.lone_item(site)
            if (opening := self.subquery(site)) is not None:
                return self.from_subquery(site, opening)
        return self.select_items(sites)

    # Tokens.

    def text(self, index: int) -> bytes:
        """A token as it stands; empty behind the last one."""
        return self.texts[index] if 0 <= index < self.count else b""

    def keyword(self, index: int) -> str:
        return keyword(self.sql, self.tokens[index]) if 0 <= index < self.count else ""

    def name(self, index: int) -> bytes | None:
        """The name that a token is, None for what is no identifier."""
        if not 0 <= index < self.count:
            return None
        token = self.tokens[index]
        name = identifier(self.sql, token, self.encoding)
        if name is None and token.kind is Kind.QUOTED_IDENTIFIER:
            raise _NotServedError("U&: could be any name")
        return name

    def is_name(self, index: int) -> bool:
        """An identifier that the server takes for a table's, column's or parameter's name."""
        return self.name(index) is not None and self.keyword(index) not in RESERVED

    def label(self, at: int) -> tuple[bytes | None, int]:
        """The label that stands there, if any, and what is behind it."""
        if self.keyword(at) == "as" and self.name(at + 1) is not None:
            return self.name(at + 1), at + 2
        if self.is_name(at):
            return self.name(at), at + 1
        return None, at

    def closing(self, index: int) -> int:
        """The bracket that closes the one at ``index``."""
        if index not in self.closings:
            raise _NotServedError("unbalanced")
        return self.closings[index]

    @functools.cached_property
    def closings(self) -> dict[int, int]:
        """The brackets, and what closes each."""
        closings: dict[int, int] = {}
        opened: list[int] = []
        for at, text in enumerate(self.texts):
            nesting = _NESTING.get(text, 0)
            if nesting > 0:
                opened.append(at)
            elif nesting < 0 and opened:
                closings[opened.pop()] = at
        return closings

    def list_items(self, first: int, end: int) -> list[tuple[int, int]]:
        """The first and last tokens of what stands between commas in ``[first, end)``."""
        commas = [first - 1]
        depth = 0
        for at in range(first, end):
            text = self.text(at)
            depth += _NESTING.get(text, 0)
            if depth == 0 and text == b",":
                commas.append(at)
        commas.append(end)
        items = [(before + 1, after - 1) for before, after in pairwise(commas)]
        if any(first > last for first, last in items):
            raise _NotServedError("an empty item")
        return items

    # Calls.

    @functools.cached_property
    def ours(self) -> list[int]:
        """The names of our functions that a ``(`` follows."""
        indices: list[int] = []
        seen = -1  # a long constant may mention it thousands of times
        # The statement may be one of thousands of a text.
        for found in _TRIGGER.finditer(self.sql, self.tokens[0].start, self.tokens[-1].end):
            at = bisect.bisect(self.tokens, found.start(), key=_token_start) - 1
            if at != seen and self.name_of_ours(at):
                indices.append(at)
            seen = at
        return indices

    def ours_between(self, first: int, last: int) -> int | None:
        """The first of ``ours`` that lies there."""
        at = bisect.bisect_left(self.ours, first)
        return self.ours[at] if at < len(self.ours) and self.ours[at] <= last else None

    def calls(self) -> list[_Site]:
        """All outermost calls, in order."""
        sites: list[_Site] = []
        for at in self.ours:
            if not sites or at > sites[-1].last:
                sites.append(self.site(at))
        return sites

    def name_of_ours(self, index: int) -> str | None:
        name = self.name(index)
        if name is None or self.text(index + 1) != b"(":
            return None
        decoded = name.decode("latin-1")
        return decoded if decoded in self.functions else None

    def site(self, index: int, outer: list[_Leaf] | None = None) -> _Site:
        """The call whose name stands at ``index``; ``outer``: it is an argument itself, and its
        leaves come after these."""
        name, close = self.name_of_ours(index), self.closing(index + 1)
        items = self.list_items(index + 2, close) if close > index + 2 else []
        given = [self.argument(*item) for item in items]
        function, parameters = _resolve(
            self.functions.get(name or "", ()), [argument_name for argument_name, _, _ in given]
        )
        leaves = [] if outer is None else outer
        arguments: list[Argument] = []
        for parameter, (argument_name, first, last) in zip(parameters, given, strict=True):
            ours = self.ours_between(first, last)
            value: int | Call | FieldOf
            if ours is None and (field := self.field_of_lateral(first, last)) is not None:
                value, type = field
                if type != parameter.type:
                    raise _NotServedError("no such function")
            elif ours is None:
                value = len(leaves)
                leaves.append(_Leaf(parameter.type, first, last, index))
            elif outer is not None:
                raise _NotServedError("nested twice")
            else:
                inner = self.site(ours, leaves)
                if not self.parenthesised(inner, first, last):
                    raise _NotServedError("a call within an expression")
                value = inner.call
                if value.function.returns_set or value.function.result_type != parameter.type:
                    raise _NotServedError("no such function")
            arguments.append(Argument(parameter, value, argument_name))
        first = self.qualified(index)
        call = Call(function, tuple(arguments), self.schema(first, index))
        return _Site(call, leaves, first, close)

    def schema(self, first: int, last: int) -> bytes | None:
        """What qualifies the name that these tokens are."""
        return self.name(last - 2) if first < last else None

    def qualified(self, index: int) -> int:
        """Where the name that ends with this token begins: with a schema's, if it has one."""
        while self.text(index - 1) == b".":
            index -= 2
            if self.name(index) is None:
                raise _NotServedError("not a qualified name")
        return index

    def parenthesised(self, site: _Site, first: int, last: int) -> bool:
        """Between ``first`` and ``last`` there is but the call, in any number of parentheses."""
        return (
            first <= site.first
            and site.first - first == last - site.last
            and all(self.text(at) == b"(" for at in range(first, site.first))
            and all(self.text(at) == b")" for at in range(site.last + 1, last + 1))
        )

    def argument(self, first: int, last: int) -> tuple[str | None, int, int]:
        """An argument's name, if it has one, and the tokens of its expression."""
        if self.keyword(first) in ("all", "distinct", "variadic") or self.text(first) == b"*":
            raise _NotServedError("not a plain argument")
        depth = 0
        for at in range(first, last + 1):
            depth += _NESTING.get(self.text(at), 0)
            if depth == 0 and self.keyword(at) == "order":
                raise _NotServedError("an aggregate's argument")
        name = self.name(first)
        if name is None or self.text(first + 1) not in (b"=>", b":="):
            return None, first, last
        if first + 2 > last:
            raise _NotServedError("an empty argument")
        return name.decode("latin-1"), first + 2, last

    # Editing.

    def start(self, index: int) -> int:
        return self.tokens[index].start

    def end(self, index: int) -> int:
        return self.tokens[index].end

    def copied(self, first: int, last: int) -> Piece:
        return Piece(self.start(first), self.end(last))

    def insertion(self, after: int, *pieces: Piece | bytes) -> _Edit:
        """Adds ``pieces`` right behind a token, where no comment can swallow them."""
        offset = self.end(after)
        return _Edit(offset, offset, self.standing_at(offset, *pieces))

    def standing_at(self, offset: int, *pieces: Piece | bytes) -> list[Piece]:
        return [
            Piece(offset, offset, piece) if isinstance(piece, bytes) else piece for piece in pieces
        ]

    def stand_in(self, site: _Site) -> list[Piece]:
        """The call's arguments as the text of a text[]. Blanks keep its words apart from others."""
        at = self.start(site.first)
        if not site.leaves:
            return self.standing_at(at, b" CAST('{}' AS pg_catalog.text) ")
        pieces = self.standing_at(at, b" CAST(ARRAY[")
        for number, leaf in enumerate(site.leaves):
            if number:
                pieces += self.standing_at(at, b", ")
            opening, closing = _TO_TEXT[leaf.type]
            # It stands for the call's name: there the server points if the type is wrong.
            pieces += self.standing_at(
                self.start(leaf.name), opening, *self.expression(leaf), closing
            )
        return pieces + self.standing_at(at, b"] AS pg_catalog.text) ")

    def expression(self, leaf: _Leaf) -> list[Piece]:
        """An argument as written. But in one of handles their type, which the server does not know,
        becomes text: rows and arrays of rows, string literals and parameters all can be that."""
        pieces: list[Piece] = []
        done = self.start(leaf.first)
        if leaf.type == HANDLES:
            for first, last in self.handle_types(leaf.first, leaf.last):
                start = self.start(first)
                pieces += [Piece(done, start), Piece(start, start, b"pg_catalog.text")]
                done = self.end(last)
        return [*pieces, Piece(done, self.end(leaf.last))]

    def handle_types(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The tokens of the type pg_background_handle where something is cast to it."""
        is_cast = [False]
        for at in range(first, last + 1):
            nesting = _NESTING.get(self.text(at), 0)
            if nesting > 0:
                is_cast.append(self.keyword(at - 1) == "cast")
            elif nesting < 0:
                is_cast.pop()
            elif self.name(at) == _HANDLE_TYPE and self.text(at + 1) != b".":
                begin = self.qualified(at)
                if self.text(begin - 1) == b"::" or (
                    self.keyword(begin - 1) == "as" and is_cast[-1]
                ):
                    yield begin, at

    def rewrite(self, *edits: _Edit) -> Rewrite:
        """The statement with ``edits``, which are in order and do not overlap."""
        pieces: list[Piece] = []
        done = 0
        for edit in edits:
            pieces += [Piece(done, edit.start), *edit.pieces]
            done = edit.end
        pieces.append(Piece(done, len(self.sql)))
        return Rewrite(
            self.sql, tuple(piece for piece in pieces if piece.start < piece.end or piece.inserted)
        )

    def replacement(self, site: _Site, *pieces: Piece | bytes) -> _Edit:
        """The stand-in, and ``pieces`` behind it, in place of a call."""
        after = self.standing_at(self.end(site.last), *pieces)
        return _Edit(self.start(site.first), self.end(site.last), self.stand_in(site) + after)

    # SELECT …, call, … FROM …

    def select_items(self, sites: list[_Site]) -> ScalarPlan:
        spans = [self.item_span(site) for site in sites]
        found = self.select_list()
        places = {first: place for place, (first, _) in enumerate(found.items)}
        stars = [at for at, item in enumerate(found.items) if self.has_star(*item)]
        edits: list[_Edit] = []
        columns: list[CallColumn] = []
        labels: list[bytes] = []
        for site, span in zip(sites, spans, strict=True):
            label, end = self.label(span.last + 1)
            place = places.get(span.first)
            if place is None or end != found.items[place][1] + 1:
                raise _NotServedError("not an item by itself")
            if label is not None and span.fields is not None and len(span.fields) != 1:
                raise _NotServedError("one label for all fields")
            edits.append(_Edit(self.start(span.first), self.end(span.last), self.stand_in(site)))
            if label is None:
                edits.append(self.insertion(span.last, b" AS " + span.names[0].encode() + b" "))
                labels += [name.encode() for name in span.names]
            else:
                labels.append(label)
            if span.fields is not None and span.names[1:]:
                # (call).* is none of those: we know what it stands for.
                stars.remove(place)
            columns.append(CallColumn(place, site.call))
        if stars:
            if any(stars[0] < column.index < stars[-1] for column in columns):
                raise _NotServedError("a column whose number is not known")
            columns = [
                CallColumn(index - len(found.items) if index > stars[0] else index, call)
                for index, call in ((column.index, column.call) for column in columns)
            ]
        self.check_order(
            found,
            labels,
            _Columns(
                {column.index for column in columns},
                bool(stars) or any(len(span.names) > 1 for span in spans),
            ),
        )
        outputs = _item_outputs(columns, None if stars else len(found.items), spans)
        width = None if stars else len(found.items)
        return ScalarPlan(self.rewrite(*edits), tuple(columns), outputs, width=width)

    def item_span(self, site: _Site) -> _Span:
        """A call that is an item of a select list, with the parentheses around it and what is
        behind them: ``(call).field`` or ``(call).*``."""
        first, last = site.first, site.last
        function = site.call.function
        fields: tuple[int, ...] | None = None
        names = [function.name]
        while self.text(first - 1) == b"(" and self.text(last + 1) == b")":
            first, last = first - 1, last + 1
            if self.text(last + 1) != b".":
                continue
            last += 2
            if fields is not None or not function.columns:
                raise _NotServedError("a field of something else")
            if self.text(last) == b"*":
                fields = tuple(range(len(function.columns)))
                names += [column.name for column in function.columns]
                break
            fields = (_position(self.name(last), _column_names(function)),)
            names = [function.columns[fields[0]].name]
        if function.returns_set or not (
            self.text(first - 1) == b"," or self.keyword(first - 1) in ("select", "all")
        ):
            raise _NotServedError("not an item of a select list")
        return _Span(first, last, fields, tuple(names))

    def select_list(self) -> _SelectList:
        """The select list of a plain SELECT, whose rows are made of its items one by one."""
        outer = list(self.outermost())
        select = next((at for at in outer if self.keyword(at) == "select"), None)
        # Before it there are the queries of WITH, in parentheses, whose names may be such words.
        if select is None or any(
            self.keyword(at) in _NOT_BEFORE and self.text(at - 1) == b")"
            for at in outer
            if at < select
        ):
            raise _NotServedError("not a SELECT")
        first = self.after_select(select)
        if self.keyword(first) == "distinct":
            raise _NotServedError("not a row for each")
        clauses = [at for at in outer if at >= first and self.begins_clause(at)]
        if any(self.keyword(at) not in _AFTER_SELECT_LIST for at in clauses):
            raise _NotServedError("not a plain SELECT")
        end = clauses[0] if clauses else self.count
        # It would fail anyway, but in a Query of several before any of them has run.
        if self.keyword(self.count - 1) in _NOT_AT_THE_END or any(
            after - at < 2 for at, after in pairwise([*clauses, self.count])
        ):
            raise _NotServedError("a clause without its expression")
        if any(self.keyword(at) == "limit" for at in clauses) and any(
            at > clauses[-1] and self.text(at) == b"," for at in outer
        ):
            raise _NotServedError("LIMIT m, n")
        items = self.list_items(first, end)
        order = next((at for at in clauses if self.keyword(at) == "order"), None)
        if order is None:
            return _SelectList(items, [])
        behind = next((at for at in clauses if at > order), self.count)
        return _SelectList(items, self.list_items(order + 2, behind))

    def begins_clause(self, at: int) -> bool:
        """Whether a word at the outermost level begins a clause of a SELECT, and is neither a label
        nor a column, nor a part of an expression."""
        word = self.keyword(at)
        if (
            not (word == "from" or word in _CLAUSES)
            or self.text(at - 1) == b"."
            or self.keyword(at - 1) == "as"
        ):
            return False
        if word == "from":
            return not self.is_distinct_from(at)
        # WITHIN GROUP (…)
        return word != "group" or self.keyword(at + 1) == "by"

    def is_distinct_from(self, at: int) -> bool:
        """Whether this FROM is of IS [NOT] DISTINCT FROM."""
        if self.keyword(at - 1) != "distinct":
            return False
        is_ = at - 3 if self.keyword(at - 2) == "not" else at - 2
        return self.keyword(is_) == "is" and self.text(is_ - 1) != b"."

    def has_star(self, first: int, last: int) -> bool:
        """Whether an item stands for columns that we cannot count: ``*``, ``t.*``, ``(t.*)``."""
        if b"*" in (self.text(first), self.text(last)):
            return True
        at = first
        while at < last:
            if self.text(at) == b"(" and self.keyword(at + 1) in _QUERIES:
                at = self.closing(at)
            elif self.text(at) == b"." and self.text(at + 1) == b"*":
                return True
            at += 1
        return False

    def check_order(self, found: _SelectList, labels: list[bytes], columns: _Columns) -> None:
        """The sort is neither by a call's column, by its number or by its name."""
        for first, last in found.order:
            number, names = self.sort_key(first, last)
            if number == 0 or (number and (columns.hidden or number - 1 in columns.of_calls)):
                raise _NotServedError("sorted by the number of a call's column")
            if any(_could_be_same(name, label) for name in names for label in labels):
                raise _NotServedError("sorted by a call's column")

    def sort_key(self, first: int, last: int) -> tuple[int | None, list[bytes]]:
        """What an item of ORDER BY may be beside an expression: the number of a column, 0 for a
        constant that is none; and the names in it that could be a label."""
        while (
            self.text(first) == b"("
            and self.closing(first) == last
            and self.keyword(first + 1) not in _QUERIES
        ):
            first, last = first + 1, last - 1
        if self.tokens[first].kind in (Kind.NUMBER, Kind.STRING) and (
            first == last or self.keyword(first + 1) in _BEHIND_SORT_KEY
        ):
            return _integer(self.text(first)), []
        names: list[bytes] = []
        depth = 0
        for at in range(first, last + 1):
            depth += _NESTING.get(self.text(at), 0)
            alone = self.text(at - 1) == b"(" and self.text(at + 1) == b")"
            if (depth == 0 or alone) and (name := self.name(at)) is not None:
                names.append(name)
        return None, names

    # SELECT columns FROM call

    def from_item(self, site: _Site) -> Plan:
        items, at = self.outputs()
        if at != site.first:
            raise _NotServedError("not plain outputs")
        function = site.call.function
        source = self.source(site.last + 1, function.name.encode())
        if function.columns and not source.typed:
            return self.columns_result(site, items, source)
        if any(item.table not in (None, source.name) for item in items):
            raise _NotServedError("another table's column")
        if any(item.field is not None for item in items):
            raise _NotServedError("a field of something else")
        if function.result_type not in (RECORD, LIST):
            return self.scalar_from(site, items, source)
        if source.columns and not source.typed:
            raise _NotServedError("columns without types")
        if source.columns:
            return self.defined_result(site, items, source)
        return self.result(site, tuple(Output(item.column, item.label) for item in items))

    def outputs(self) -> tuple[list[_OutputItem], int]:
        """What stands between SELECT and FROM, and where it goes on behind FROM."""
        at = self.after_select()
        items: list[_OutputItem] = []
        while True:
            items.append(self.output(at))
            at = items[-1].last + 1
            if self.text(at) != b",":
                break
            at += 1
        if self.keyword(at) != "from":
            raise _NotServedError("not plain outputs")
        return items, at + 1

    def after_select(self, index: int = 0) -> int:
        if self.keyword(index) != "select":
            raise _NotServedError("not a SELECT")
        return index + 2 if self.keyword(index + 1) == "all" else index + 1

    def output(self, index: int) -> _OutputItem:
        """``*``, ``t.*``, ``c``, ``t.c``, ``(c).f``, ``(t.c).f``, ``(c).*`` or ``(t.c).*``, and a
        label."""
        table = field = None
        in_parentheses = self.text(index) == b"("
        at = index + in_parentheses
        if self.text(at + 1) == b".":
            if not self.is_name(at):
                raise _NotServedError("not a table's name")
            table = self.name(at)
            at += 2
        if self.text(at) == b"*" and not in_parentheses:
            return _OutputItem(index, at, table, None, None, None)
        # Behind a dot any word is a name.
        if not (self.is_name(at) or (table is not None and self.name(at))):
            raise _NotServedError("not a column's name")
        column = self.name(at)
        if in_parentheses:
            if self.text(at + 1) + self.text(at + 2) != b").":
                raise _NotServedError("not a field")
            at += 3
            if self.text(at) == b"*":
                return _OutputItem(index, at, table, column, _ALL_FIELDS, None)
            field = self.name(at)
            if not field:
                raise _NotServedError("not a field's name")
        label, end = self.label(at + 1)
        return _OutputItem(index, end - 1, table, column, field, label)

    def source(self, at: int, default: bytes) -> _Source:
        """What follows something in FROM, up to the statement's end: ``AS t (a int, …)``."""
        has_as = self.keyword(at) == "as"
        at += has_as
        alias = None
        if self.is_name(at):
            alias = at
            at += 1
        columns: list[bytes] = []
        typed = False
        if self.text(at) == b"(":
            close = self.closing(at)
            definitions = self.list_items(at + 1, close)
            typed = definitions[0][0] < definitions[0][1]
            for first, last in definitions:
                name = self.name(first)
                if name is None or (first < last) != typed:
                    raise _NotServedError("not a list of columns")
                columns.append(name)
            at = close + 1
        if at != self.count or (alias is None and not has_as == typed == bool(columns)):
            raise _NotServedError("more than a function in FROM")
        name = default if alias is None else self.name(alias)
        return _Source(name or b"", alias, columns, typed)

    def scalar_from(self, site: _Site, items: list[_OutputItem], source: _Source) -> ScalarPlan:
        """The stand-in is a function in FROM too, so names come out as they would."""
        if source.typed or len(source.columns) > 1 or len(items) > 1:
            raise _NotServedError("not one column")
        [column] = source.columns or [source.name]
        if items[0].column not in (None, column):
            raise _NotServedError("not its column")
        alias = b"" if source.alias else b"AS " + source.name + b" "
        rewrite = self.rewrite(self.replacement(site, alias))
        return ScalarPlan(rewrite, (CallColumn(0, site.call),), width=1)

    def columns_result(self, site: _Site, items: list[_OutputItem], source: _Source) -> ResultPlan:
        """The function knows its columns; the alias may have other names for the first of them."""
        own = _column_names(site.call.function)
        if len(source.columns) > len(own) or source.typed:
            raise _NotServedError("not its columns")
        names = [*source.columns, *own[len(source.columns) :]]
        outputs: list[Output] = []
        for item in items:
            if item.field is not None and (item.table, item.column) == (None, source.name):
                # (t).c is t.c, if t is no column.
                if item.column in names:
                    raise _NotServedError("a field of something else")
                column = item.field or None
            elif item.field is not None or item.table not in (None, source.name):
                raise _NotServedError("another table's column")
            else:
                column = item.column
            if column is not None:
                place = _position(column, names)
                renamed = names[place] if names[place] != own[place] else None
                outputs.append(Output(place, item.label or renamed))
            elif names == own:
                outputs.append(Output(None))
            else:
                outputs += [Output(place, name) for place, name in enumerate(names)]
        return self.result(site, tuple(outputs))

    def result(self, site: _Site, outputs: tuple[Output, ...]) -> ResultPlan:
        """The arguments only, in FROM, where no argument can make two rows."""
        if any(len(output.label or b"") > _MAX_NAME for output in outputs):
            raise _NotServedError("a name that the server would cut")
        pieces = [
            *self.standing_at(0, b"SELECT * FROM"),
            *self.stand_in(site),
            *self.standing_at(self.end(site.last), b"AS pg_background_result"),
        ]
        return ResultPlan(Rewrite(self.sql, tuple(pieces)), site.call, outputs, 0)

    def defined_result(self, site: _Site, items: list[_OutputItem], source: _Source) -> ResultPlan:
        """An empty table of the columns defined, outer-joined to the arguments.

        These come first in FROM, so that they cannot see the columns; ``*`` is only the table.
        """
        if any(self.name(at) == _ARGUMENTS for at in range(self.count)):
            raise _NotServedError("our own alias")
        outputs: list[Output] = []
        edits: list[_Edit] = []
        places: dict[bytes, int] = {}
        for place, column in enumerate(source.columns):
            places.setdefault(column, place)
        if source.alias is None:
            table: Piece | bytes = source.name
        else:
            table = self.copied(source.alias, source.alias)
        for item in items:
            if item.column is None:
                outputs.append(Output(None))
            elif item.column in places:
                outputs.append(Output(places[item.column], item.label))
            else:
                # It could still be something, if not a column: the row, or a function of it.
                raise _NotServedError("not a column")
            if item.column is None and item.table is None:
                start, end = self.start(item.first), self.end(item.first)
                edits.append(_Edit(start, end, self.standing_at(start, b" ", table, b".*")))
        extra = (b", ", table, b".*, " + _ARGUMENTS + b"." + _ARGUMENTS + b" ")
        edits.append(self.insertion(items[-1].last, *extra))
        join = b"AS " + _ARGUMENTS + b" LEFT JOIN pg_catalog.json_to_recordset('[]') "
        edits.append(self.replacement(site, join))
        if source.alias is None:
            edits.append(self.insertion(site.last + 1, b" " + source.name + b" "))
        edits.append(self.insertion(self.count - 1, b" ON true"))
        return ResultPlan(self.rewrite(*edits), site.call, tuple(outputs), len(source.columns))

    # SELECT …, l.field, call(l.field), … FROM …, LATERAL call AS l

    def outermost(self, first: int = 0) -> Iterator[int]:
        """The tokens from ``first`` on that are in no brackets, up to one that closes some."""
        depth = 0
        for at in range(first, self.count):
            nesting = _NESTING.get(self.text(at), 0)
            depth += nesting
            if depth < 0:
                return
            if depth == 0 and nesting == 0:
                yield at

    def from_of(self, select: int) -> int | None:
        """The FROM of the SELECT whose word stands there."""
        for at in self.outermost(select + 1):
            word = self.keyword(at)
            # Not a IS DISTINCT FROM b, nor a label, nor a column of that name.
            if word == "from" and self.keyword(at - 1) not in ("distinct", "as"):
                if self.text(at - 1) != b".":
                    return at
            elif word in _CLAUSES:
                return None
        return None

    def last_in_from(self, site: _Site) -> _Lateral | None:
        """Reads what is around a call that stands behind other items in FROM, or there as LATERAL,
        or alone if other calls are made; None if it does not stand so."""
        before = site.first - 1
        before -= self.keyword(before) == "lateral"
        word = self.keyword(before)
        if self.text(before) != b"," and word not in ("from", "join"):
            return None
        outer = list(self.outermost())
        select = next((at for at in outer if self.keyword(at) == "select"), None)
        from_ = None if select is None else self.from_of(select)
        if select is None or from_ is None or not (from_ <= before and before in outer):
            return None
        if word == "from" and before == site.first - 1 and self.ours_between(0, before) is None:
            return None
        if any(self.keyword(at) in _WRITES for at in outer if at < select):
            raise _NotServedError("not a SELECT")
        alias, end, names = self.alias_of(site)
        rest = end
        if word == "join":
            kind = self.keyword(before - 1)
            before -= kind in ("cross", "inner")
            if kind != "cross":
                if kind in _OUTER or (self.keyword(end), self.keyword(end + 1)) != ("on", "true"):
                    raise _NotServedError("not joined to every row")
                rest += 2
        clauses = [at for at in outer if at > select and self.keyword(at) in _CLAUSES]
        words = [self.keyword(at) for at in clauses]
        if words[:1] == ["where"]:
            del words[0]
        # What is behind: OFFSET and DISTINCT need calls whose rows nobody sees, and a sort makes
        # them in an order that is not known.
        if words not in ([], ["limit"], ["fetch"]) or (clauses[:1] or [self.count])[0] != rest:
            raise _NotServedError("not a call for each row")
        name = self.name(alias) or b""
        return _Lateral(site, select, from_, before, alias, end, rest, name, names)

    def alias_of(self, site: _Site) -> tuple[int, int, list[bytes]]:
        """The token of a call's alias in FROM, what is behind it, and the names of the columns."""
        function = site.call.function
        at = site.last + 1
        at += self.keyword(at) == "as"
        if not self.is_name(at) or not function.columns or function.returns_set:
            raise _NotServedError("not a record with an alias")
        alias, at = at, at + 1
        given: list[bytes] = []
        if self.text(at) == b"(":
            close = self.closing(at)
            for first, last in self.list_items(at + 1, close):
                name = self.name(first)
                if name is None or first != last:
                    raise _NotServedError("not a list of names")
                given.append(name)
            at = close + 1
        own = _column_names(function)
        names = [*given, *own[len(given) :]]
        # A name of this length could be another one that the server cuts.
        if len(names) > len(own) or any(len(name) >= _MAX_NAME for name in names):
            raise _NotServedError("not its columns")
        if len(self.name(alias) or b"") >= _MAX_NAME:
            raise _NotServedError("a name that may have been cut")
        return alias, at, names

    def with_lateral(self, lateral: _Lateral) -> ScalarPlan:
        """The stand-in has a function in FROM too, so that its arguments are evaluated as they
        would be. Its only column comes first in the select list, then come the items that are not
        columns of it."""
        site = lateral.site
        first, end = self.after_select(lateral.select), lateral.from_
        if self.keyword(first) == "distinct" or any(
            self.name(at) == _ARGUMENTS for at in range(self.count)
        ):
            raise _NotServedError("not a plain select list")
        self.check_rows(lateral)
        self.lateral = lateral
        sites = {other.first: other for other in self.calls()[:-1]}
        edit = self.standing_at(
            self.start(first),
            *(b" ", self.copied(lateral.alias, lateral.alias), b"." + _ARGUMENTS),
        )
        columns = [CallColumn(0, site.call)]
        outputs: list[ItemOutput] = []
        count = 1
        used = False
        for item in self.list_items(first, end):
            if fields := self.lateral_outputs(lateral, *item):
                outputs += fields
                used = True
                continue
            edit += self.standing_at(self.start(item[0]), b", ")
            at = next((at for at in range(item[0], item[1] + 1) if at in sites), None)
            if at is None:
                self.check_free(lateral, *item)
                edit.append(self.copied(*item))
                outputs.append(ItemOutput(count))
            else:
                made = sites.pop(at)
                for leaf in made.leaves:
                    self.check_free(lateral, leaf.first, leaf.last)
                pieces, results = self.call_item(made, *item, count)
                edit += pieces
                outputs += results
                columns.append(CallColumn(count, made.call))
                used = used or _uses_field(made.call)
            count += 1
        # Without a column of the call's beside them aggregates would be possible.
        if sites or not used:
            raise _NotServedError("calls elsewhere, or none of its columns")
        edit += self.standing_at(self.start(end), b" ")
        after = self.end(lateral.alias)
        rewrite = self.rewrite(
            _Edit(self.start(first), self.end(end - 1), edit),
            self.replacement(site),
            _Edit(
                after, self.end(lateral.end - 1), self.standing_at(after, b"(" + _ARGUMENTS + b") ")
            ),
        )
        return ScalarPlan(rewrite, tuple(columns), tuple(outputs), in_from=True, width=count)

    def call_item(
        self, site: _Site, first: int, last: int, column: int
    ) -> tuple[list[Piece], list[ItemOutput]]:
        """A call that is an item of the select list: its stand-in with its name, and what the
        client gets of it."""
        span = self.item_span(site)
        label, end = self.label(span.last + 1)
        if span.first != first or end != last + 1:
            raise _NotServedError("a call within an expression")
        pieces = self.stand_in(site)
        if label is None:
            pieces += self.standing_at(self.end(span.last), b" AS " + span.names[0].encode() + b" ")
        else:
            pieces.append(self.copied(span.last + 1, last))
        if len(span.names) == 1:
            return pieces, [ItemOutput(column, span.fields[0] if span.fields else None)]
        if label is not None:
            raise _NotServedError("one label for all fields")
        return pieces, [
            ItemOutput(column, field, name.encode())
            for field, name in zip(span.fields or (), span.names[1:], strict=True)
        ]

    def lateral_outputs(self, lateral: _Lateral, first: int, last: int) -> list[ItemOutput]:
        """The columns that an item takes from the call in FROM; none if it is something else."""
        names = lateral.names
        if self.name(first) == lateral.name and self.text(first + 1) == b".":
            if self.text(first + 2) == b"*" and first + 2 == last:
                return [ItemOutput(0, place, name) for place, name in enumerate(names)]
            at = first + 2
        elif lateral.alone and self.is_name(first) and self.name(first) in names:
            at = first
        else:
            return []
        name = self.name(at)
        label, end = self.label(at + 1)
        if end != last + 1 or len(label or b"") > _MAX_NAME:
            raise _NotServedError("not a plain column")
        return [ItemOutput(0, _position(name, names), label or name)]

    def field_of_lateral(self, first: int, last: int) -> tuple[FieldOf, Type] | None:
        """The column of the call in FROM that an argument is, and its type."""
        if self.lateral is None:
            return None
        names = self.lateral.names
        if last == first + 2 and self.name(first) == self.lateral.name:
            if self.text(first + 1) != b".":
                return None
        elif not (self.lateral.alone and first == last and self.is_name(first)):
            return None
        field = _position(self.name(last), names)
        return FieldOf(0, field), self.lateral.site.call.function.columns[field].type

    def check_rows(self, lateral: _Lateral) -> None:
        """Each row that is returned has its own call, as if the server joined it last."""
        site = lateral.site
        for first, end in ((0, lateral.select), (lateral.from_ + 1, lateral.rest)):
            for at in range(first, end):
                if at != lateral.alias:
                    self.check_names(lateral, at, columns=False)
        for at in range(lateral.rest, self.count):
            self.check_names(lateral, at, columns=True)
        if not lateral.alone:
            # One that depends on no row is made once for all, and one that depends on some of the
            # items could be made before the others are joined.
            columns = [at for leaf in site.leaves for at in self.columns_in(leaf.first, leaf.last)]
            tables = {self.name(at) for at in columns if self.text(at + 1) == b"."}
            items = self.items_in_from(lateral.from_ + 1, lateral.before)
            if not columns or (items > 1 and len(tables) < items):
                raise _NotServedError("a call for several rows together")
            others = (*range(lateral.select), *range(lateral.from_ + 1, lateral.before))
            selects = [at for at in others if self.keyword(at) == "select"]
            # Each takes time for all that is nested in it.
            if len(selects) > _MAX_SUBQUERIES or any(
                self.is_merged(at, several=items > 1) for at in selects
            ):
                raise _NotServedError("a call for several rows together")
        for at in range(lateral.rest, self.count):
            if self.keyword(at) in _JOINED and self.keyword(at + 2) in _QUERIES:
                raise _NotServedError("a join after the calls")
        condition: list[int] = []
        for at in [*self.own(lateral.rest, self.count - 1), self.count]:
            # One with a volatile function and no column sees the rows with the calls already made.
            if at == self.count or self.keyword(at) in ("and", "or", "limit", "fetch"):
                if any(map(self.is_call, condition)) and not any(map(self.is_column, condition)):
                    raise _NotServedError("calls for rows that are not returned")
                condition = []
            else:
                condition.append(at)

    def check_names(self, lateral: _Lateral, at: int, *, columns: bool) -> None:
        """There stands neither the alias of the call in FROM nor, where that could be one of its
        ``columns``, the name of one."""
        name = self.name(at)
        if name is None or self.text(at - 1) == b".":
            return
        is_column = (
            columns
            and name in lateral.names
            and self.keyword(at - 1) != "as"
            and self.text(at + 1) not in (b"=>", b":=", b".")
        )
        if name == lateral.name or is_column:
            raise _NotServedError("what the call returns, in an expression")

    def check_free(self, lateral: _Lateral, first: int, last: int) -> None:
        """An expression of the select list makes one column of one row, and does not see what the
        call in FROM returns."""
        for at in range(first, last + 1):
            self.check_names(lateral, at, columns=True)
            star = self.text(at) == b"*"
            if star and (at == first or self.text(at - 1) == b"."):
                raise _NotServedError("columns that we cannot count")
        for at in self.own(first, last):
            known = self.keyword(at) in _ONE_ROW and self.text(at - 1) != b"."
            if self.is_call(at) and not known:
                raise _NotServedError("could return a set")

    def own(self, first: int, last: int) -> Iterator[int]:
        """The tokens there that are in no subquery, nor in a type's brackets."""
        at = first
        while at <= last:
            if self.text(at) == b"(" and (self.keyword(at + 1) in _QUERIES or self.is_type(at - 1)):
                at = self.closing(at)
            else:
                yield at
            at += 1

    def is_type(self, index: int) -> bool:
        """The name that ends there is what something is cast to."""
        if self.name(index) is None:
            return False
        begin = self.qualified(index)
        return self.text(begin - 1) == b"::" or self.keyword(begin - 1) == "as"

    def is_call(self, at: int) -> bool:
        """It could be the name of a function that is called."""
        return (
            self.text(at + 1) == b"("
            and self.name(at) is not None
            and self.keyword(at) not in _NOT_CALLED
            and not self.is_type(at)
        )

    def is_column(self, at: int) -> bool:
        """It is a column for certain: a name, qualified or not, between what can only be the
        borders of an operand."""
        if not self.is_name(at) or self.keyword(at) in _NORMAL_FORMS:
            return False
        before = self.text(at - 1)
        if not (
            before in (b"(", b",", b"[", b"=>", b":=")
            or self.is_operator(at - 1)
            or self.keyword(at - 1) in _BEFORE_OPERANDS
        ):
            return False
        end = at + 1
        while self.text(end) == b"." and self.name(end + 1) is not None:
            end += 2
        if self.is_name(end) and (
            self.text(end + 1) in (b",", b")") or self.keyword(end + 1) == "from"
        ):
            # Behind a column its label.
            return True
        return (
            self.text(end) in (b"", b")", b",", b"[", b"]", b"::")
            or self.is_operator(end)
            or self.keyword(end) in _BEHIND_OPERANDS
        )

    def is_operator(self, index: int) -> bool:
        return 0 <= index < self.count and self.tokens[index].kind is Kind.OPERATOR

    def columns_in(self, first: int, last: int) -> list[int]:
        """The columns in an expression, but none that a constant beside them could drop."""
        tokens = list(self.own(first, last))
        found: list[int] = []
        if any(self.keyword(at) in _DROPS for at in tokens):
            return found
        dropped = -1
        for at in tokens:
            if at <= dropped:
                continue
            if self.keyword(at) == "coalesce" and self.text(at + 1) == b"(":
                # Only its first argument counts.
                dropped = self.closing(at + 1)
                at += 2
            if self.is_column(at):
                found.append(at)
        return found

    def items_in_from(self, first: int, end: int) -> int:
        """How many tables and the like there are, at least one."""
        commas = sum(self.text(at) == b"," for at in self.outermost(first) if at < end)
        joins = [at for at in self.own(first, end - 1) if self.keyword(at) == "join"]
        if any(self.text(at) == b")" and self.keyword(at + 1) == "as" for at in range(first, end)):
            # USING (…) AS x: a name that is no table's.
            joins += joins
        return 1 + commas + len(joins)

    def is_merged(self, select: int, *, several: bool) -> bool:
        """A subquery in FROM could become part of the statement, and thereby the call depend on
        less than a row of it: because a column is constant, or a row comes of several tables.
        ``several``: there are other items beside it."""
        if self.keyword(select - 2) in _IN_CONDITIONS:
            return False
        first = self.after_select(select)
        level = list(self.outermost(first))
        end = self.closing(select - 1) if self.text(select - 1) == b"(" else max(level)
        if any(self.keyword(at) in _KEEPS for at in level):
            return False
        from_ = self.from_of(select)
        if from_ is None:
            return several
        if any(at > from_ and self.text(at) == b"," for at in level) or any(
            self.keyword(at) == "join"
            or (self.keyword(at) in _JOINED and self.text(at + 1) == b"(")
            for at in self.own(from_, end)
        ):
            return True
        return not all(
            self.text(last) == b"*" or self.columns_in(start, last)
            for start, last in self.list_items(first, from_)
        )

    # SELECT columns FROM view

    def view(self) -> ResultPlan:
        if self.keyword(0) == "table":
            items, first = [_OutputItem(0, 0, None, None, None, None)], 1
        else:
            items, first = self.outputs()
        last = first
        while self.text(last + 1) == b".":
            last += 2
        function = VIEWS.get((self.name(last) or b"").decode("latin-1"))
        if function is None or self.qualified(last) != first:
            raise _NotServedError("not a view of ours")
        if self.keyword(0) == "table" and last + 1 != self.count:
            raise _NotServedError("more than a view")
        source = self.source(last + 1, function.name.encode())
        call = Call(function, (), self.schema(first, last))
        return self.columns_result(_Site(call, [], first, last), items, source)

    # SELECT columns FROM (SELECT call)

    def subquery(self, site: _Site) -> int | None:
        """The ``(`` of the subquery in FROM whose select list begins with this call."""
        at = site.first - 1
        while self.text(at) == b"(":
            at -= 1
        at -= self.keyword(at) == "all"
        is_subquery = (
            self.keyword(at) == "select"
            and self.text(at - 1) == b"("
            and self.keyword(at - 2) == "from"
        )
        return at - 1 if is_subquery else None

    def from_subquery(self, site: _Site, opening: int) -> ScalarPlan:
        """The stand-in has one column, the call's, whatever is made of it."""
        items, at = self.outputs()
        span = self.item_span(site)
        if at != opening or span.fields is not None or span.first != self.after_select(at + 1):
            raise _NotServedError("not a call alone in a subquery")
        close = self.closing(opening)
        label, end = self.label(span.last + 1)
        if end != close:
            raise _NotServedError("not a call alone in a subquery")
        # Without an alias, which PostgreSQL accepts since 16, the table has no name.
        source = self.source(close + 1, b"")
        if source.typed or len(source.columns) > 1:
            raise _NotServedError("not its column")
        [name] = source.columns or [site.call.function.name.encode() if label is None else label]
        outputs: list[ItemOutput] = []
        for item in items:
            if item.table not in (None, source.name or None) or item.column not in (None, name):
                raise _NotServedError("not its column")
            outputs += self.of_record(site.call.function, item, name)
        if any(len(output.label or b"") > _MAX_NAME for output in outputs):
            raise _NotServedError("a name that the server would cut")
        start, end = self.start(items[0].first), self.end(items[-1].last)
        edits = [
            _Edit(start, end, self.standing_at(start, b" * ")),
            _Edit(self.start(span.first), self.end(span.last), self.stand_in(site)),
        ]
        if label is None:
            edits.append(
                self.insertion(span.last, b" AS " + site.call.function.name.encode() + b" ")
            )
        column = CallColumn(0, site.call)
        return ScalarPlan(self.rewrite(*edits), (column,), tuple(outputs), width=1)

    def of_record(self, function: Function, item: _OutputItem, name: bytes) -> Iterator[ItemOutput]:
        """What an item makes of the only column, named ``name``, which is a function's result."""
        fields = _column_names(function)
        if item.field is None:
            yield ItemOutput(0, None, item.label or name)
        elif item.field == _ALL_FIELDS:
            if not fields:
                raise _NotServedError("fields of no record")
            for place, field in enumerate(fields):
                yield ItemOutput(0, place, field)
        else:
            yield ItemOutput(0, _position(item.field, fields), item.label or item.field)

    # SELECT pg_background_result(…)

    def lone_item(self, site: _Site) -> ResultPlan:
        label, end = self.label(site.last + 1)
        if (
            site.call.function.result_type != RECORD
            or self.after_select() != site.first
            or end != self.count
        ):
            raise _NotServedError("not alone")
        return self.result(site, (Output(None, label),))

    # A job's SELECT pg_background_progress(…)

    def progress(self, marker: bytes) -> bytes:
        sites = self.calls()
        if len(sites) != 1:
            raise _NotServedError("not one call")
        [site] = sites
        arguments = {argument.parameter.name: argument.value for argument in site.call.arguments}
        _, end = self.label(site.last + 1)
        if (
            site.call.function.name not in _PROGRESS
            or self.after_select() != site.first
            or end != self.count
            or not all(isinstance(value, int) for value in arguments.values())
        ):
            raise _NotServedError("not a report alone")
        texts: dict[str, bytes] = {}
        for argument, leaf in zip(site.call.arguments, site.leaves, strict=True):
            opening, closing = _TO_TEXT[leaf.type]
            expression = self.sql[self.start(leaf.first) : self.end(leaf.last)]
            texts[argument.parameter.name] = opening + expression + closing
        words = [literal(marker + b" "), texts["pct"], b"' '"]
        if "msg" in texts:
            words.append(b"pg_catalog.textcat('=', " + texts["msg"] + b")")
        body = _PROGRESS_BLOCK % b", ".join(words)
        return do_block(body)


class _Span(NamedTuple):
    """An item of the select list that is a call or fields of it, its tokens from first to last.

    ``fields``: which, None for the call itself. ``names`` is what the item's columns are called
    without a label, in the stand-in by the first of them.
    """

    first: int
    last: int
    fields: tuple[int, ...] | None
    names: tuple[str, ...]


class _OutputItem(NamedTuple):
    """A plain output column, its tokens and names; ``column`` None is ``*``."""

    first: int
    last: int
    table: bytes | None
    column: bytes | None
    field: bytes | None
    label: bytes | None


# The field of ``(c).*``; no name is empty.
_ALL_FIELDS: Final = b""


class _Source(NamedTuple):
    """Something in FROM: the table's name, its alias's token, its columns' names and whether
    they have types."""

    name: bytes
    alias: int | None
    columns: list[bytes]
    typed: bool


# The server cuts names at 63 bytes.
_MAX_NAME: Final = 63


# The alias of the arguments, and their column's name.
_ARGUMENTS: Final = b"pg_background_arguments"

_HANDLE_TYPE: Final = HANDLE.name.encode()

_TRIGGER: Final = re.compile(re.escape(TRIGGER), re.IGNORECASE)
_token_start: Final = operator.attrgetter("start")

_NESTING: Final = {b"(": 1, b"[": 1, b")": -1, b"]": -1}


def _resolve(
    overloads: tuple[Function, ...], given: list[str | None]
) -> tuple[Function, list[Parameter]]:
    """The overload that takes these arguments (their names, None if given by position), and the
    parameter of each."""
    for function in overloads:
        parameters = _match(function, given)
        if parameters is not None:
            return function, parameters
    raise _NotServedError("no such function")


def _match(function: Function, given: list[str | None]) -> list[Parameter] | None:
    """The parameter of each argument, by PostgreSQL's rules: first by position, then by name."""
    positional = next((at for at, name in enumerate(given) if name is not None), len(given))
    if positional > len(function.parameters):
        return None
    matched = list(function.parameters[:positional])
    for name in given[positional:]:
        parameter = next((p for p in function.parameters if name and p.is_called(name)), None)
        if parameter is None or parameter in matched:
            return None
        matched.append(parameter)
    if any(p.required and p not in matched for p in function.parameters):
        return None
    return matched


def _uses_field(call: Call) -> bool:
    """An argument of the call, or of one within it, is a field of what another has returned."""
    return any(
        isinstance(argument.value, FieldOf)
        or (isinstance(argument.value, Call) and _uses_field(argument.value))
        for argument in call.arguments
    )


def _column_names(function: Function) -> list[bytes]:
    return [column.name.encode() for column in function.columns]


def _position(name: bytes | None, names: list[bytes]) -> int:
    """Where the name is; it must be there once."""
    if name is None or names.count(name) != 1:
        raise _NotServedError("not a column")
    return names.index(name)


# What may follow the select list of a plain SELECT; reserved words, so they can be nothing else.
_AFTER_SELECT_LIST: Final = frozenset(("from", "where", "order", "limit", "fetch"))


# Where there is a call as the last item of FROM.

_MAX_SUBQUERIES: Final = 20
# Words that begin a clause, or say that rows are not what the items of FROM make them.
_CLAUSES: Final = frozenset(
    (
        *("where", "group", "having", "window", "union", "intersect", "except", "order", "limit"),
        *("offset", "fetch", "for", "into"),
    )
)
_WRITES: Final = frozenset(("insert", "update", "delete", "merge"))
_OUTER: Final = frozenset(("left", "right", "full", "outer", "natural"))
# Functions that return one value for one row: neither sets nor aggregates, nor windows.
_ONE_ROW: Final = frozenset(
    (
        *("abs", "btrim", "cast", "coalesce", "concat", "concat_ws", "current_setting", "extract"),
        *("format", "greatest", "initcap", "least", "left", "length", "lower", "ltrim", "md5"),
        *("now", "nullif", "operator", "quote_ident", "quote_literal", "quote_nullable"),
        *("replace", "right", "round", "row", "rtrim", "substr", "substring", "to_char", "trim"),
        *("upper",),
    )
)
# Words before a parenthesis that call nothing.
_NOT_CALLED: Final = RESERVED - {"left", "right"}
_NORMAL_FORMS: Final = frozenset(("nfc", "nfd", "nfkc", "nfkd"))
_BEFORE_OPERANDS: Final = frozenset(("select", "all", "distinct", "where", "and", "or", "not"))
_BEHIND_OPERANDS: Final = frozenset(
    (
        *("and", "as", "at", "between", "collate", "fetch", "from", "ilike", "in", "is", "isnull"),
        *("like", "limit", "not", "notnull", "or"),
    )
)
# Beside these a constant can make an operand superfluous, and the planner leaves it out.
_DROPS: Final = frozenset(("case", "and", "or", "is", "isnull", "notnull", "null"))
# Before a subquery that is no item of FROM.
# Clauses that keep a subquery as it is.
_KEEPS: Final = frozenset(("group", "having", "order", "limit", "offset", "fetch"))
# Before a subquery of a condition, that is joined as a table is.
_JOINED: Final = frozenset(("exists", "in", "any", "some"))
_IN_CONDITIONS: Final = frozenset(("exists", "in", "any", "some", "all", "array", "not"))


# --- the select list ------------------------------------------------------------------------

_QUERIES: Final = frozenset(
    ("select", "with", "values", "table", "insert", "update", "delete", "merge")
)
# What else a WITH could be of, and what could join another query to that.
_NOT_BEFORE: Final = _CLAUSES | _WRITES | {"values", "table"}
# Words that something follows.
_NOT_AT_THE_END: Final = frozenset(
    (
        *("and", "as", "between", "by", "case", "collate", "cross", "distinct", "else", "from"),
        *("full", "ilike", "in", "inner", "is", "join", "left", "like", "limit", "natural", "not"),
        *("on", "or", "order", "right", "select", "similar", "then", "using", "when", "where"),
    )
)
# Behind a constant that is a whole sort key.
_BEHIND_SORT_KEY: Final = frozenset(("asc", "desc", "using", "nulls"))


class _SelectList(NamedTuple):
    """The items of a select list and those of ORDER BY: of each the first and the last token."""

    items: list[tuple[int, int]]
    order: list[tuple[int, int]]


class _Columns(NamedTuple):
    """The columns that are calls; ``hidden``: the numbers are not known."""

    of_calls: set[int]
    hidden: bool


def _item_outputs(
    columns: list[CallColumn], count: int | None, spans: list[_Span]
) -> tuple[ItemOutput, ...] | None:
    """The client's columns, None if they are the stand-in's. ``count``: how many items there are,
    None if a ``*`` hides how many columns they make."""
    if all(span.fields is None for span in spans):
        return None
    if count is None:
        raise _NotServedError("fields in places that are not known")
    fields = {
        column.index: (span.fields, span.names[1:])
        for column, span in zip(columns, spans, strict=True)
    }
    outputs: list[ItemOutput] = []
    for column in range(count):
        wanted, names = fields.get(column, (None, ()))
        if names and wanted:
            outputs += [
                ItemOutput(column, field, name.encode())
                for field, name in zip(wanted, names, strict=True)
            ]
        else:
            outputs.append(ItemOutput(column, wanted[0] if wanted else None))
    return tuple(outputs)


def _could_be_same(name: bytes, label: bytes) -> bool:
    """Names are cut at 63 bytes; of those with other than ASCII letters we cannot know."""
    if not (name.isascii() or label.isascii()):
        return True
    return name[:_MAX_NAME].lower() == label[:_MAX_NAME].lower()


def _integer(text: bytes) -> int:
    """A constant that is an integer, any other as 0."""
    for base in (10, 0):
        try:
            return int(text, base)
        except ValueError:
            continue
    return 0
