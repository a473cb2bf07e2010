"""Which pg_background calls a statement makes, and the stand-in that the server gets for it.

The server never sees our functions. Where a call stands it gets a stand-in: an expression that
evaluates and type-checks the call's arguments and returns them as one text[] literal. So errors
in arguments, parameter types, Describe, portals and failed transactions are the server's own.

The rule: **a statement is served only if its stand-in does what the statement would have done**.
Whatever is not recognised for certain gives None, and passes through as it came. SQL is edited by
source span, between tokens of our exact lexer; nothing is ever printed from a syntax tree.

Three shapes are served:

- *scalar calls as items of the select list* of one plain SELECT. What else stands in the
  statement is free, so sqlglot reads it. It gets the outermost level only, whatever is in
  parentheses left out and constants all alike, and what it says about such a text is remembered;
- *a function alone in FROM*, with plain output columns;
- *pg_background_result alone in the select list*.

The last two leave no room for free text, and are read from the tokens directly.
"""

from __future__ import annotations

import bisect
import functools
import logging
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import sqlglot
from sqlglot import exp

from proxy.functions import BOOL, FUNCTIONS, INT4, TEXT, Function, Parameter, Type
from proxy.lexer import RESERVED, Kind, LexError, Token, identifier, keyword, mask, split

# It warns of statements that it does not know; we ask for exactly that reason.
logging.getLogger("sqlglot").setLevel(logging.CRITICAL)

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
class Argument:
    """What one parameter of a call gets.

    ``value`` is an index into the stand-in's text[], or the call whose result it is.
    ``name`` is the parameter's name as the call wrote it, if it did.
    """

    parameter: Parameter
    value: int | Call
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A call; arguments as written, parameters that take their defaults are not among them."""

    function: Function
    arguments: tuple[Argument, ...]

    def leaves(self) -> Iterator[tuple[Call, int]]:
        """The elements of the stand-in's text[]: the call (this or an inner one) that each is an
        argument of, and its place among the arguments."""
        for place, argument in enumerate(self.arguments):
            if isinstance(argument.value, Call):
                yield from argument.value.leaves()
            else:
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
class ScalarPlan:
    """Each row of the stand-in makes the calls in its columns; the other columns are as they are.

    The stand-in has the statement's own columns, with their names; a call's is of type text.
    """

    rewrite: Rewrite
    columns: tuple[CallColumn, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What an item of the select list takes from pg_background_result.

    ``column``: None for all columns in order (``*``); with a column definition list the position
    in that list, from 0; without one the column's name in the job's result.
    ``label``: the output's name, None for the column's own. With ``column`` None it can only come
    of ``SELECT pg_background_result(…) AS label``, and names the column if there is just one.
    """

    column: int | bytes | None
    label: bytes | None = None


@dataclass(frozen=True, slots=True)
class ResultPlan:
    """The rows of a job. The stand-in returns exactly one row.

    With a column definition list (``defined_columns`` > 0) the stand-in's columns are the
    client's outputs, then the ``defined_columns`` of the list, then the call's arguments: the last
    ``defined_columns + 1`` are for the proxy alone. All but the last are NULL; their types count.
    Without one its only column is the call's arguments.
    """

    rewrite: Rewrite
    call: Call
    outputs: tuple[Output, ...]
    defined_columns: int


Plan = ScalarPlan | ResultPlan


def analyze(
    sql: bytes, *, standard_conforming_strings: bool = True, encoding: str | None = None
) -> Plan | None:
    """How to serve a statement; None: it makes no call that we serve, and passes as it is.

    Args:
        sql: the text of one statement, in the client's encoding.
        standard_conforming_strings: the session's setting.
        encoding: client_encoding, as PostgreSQL names it.
    """
    # Before reading all of it: a dump may have megabytes.
    if not (_CALL.search(sql) and _QUERY.match(sql)):
        return None
    try:
        statements = split(
            sql, standard_conforming_strings=standard_conforming_strings, encoding=encoding
        )
        if len(statements) != 1:
            return None
        return _Reader(sql, statements[0].tokens, encoding).plan()
    except (LexError, _NotServedError):
        return None


# No more than hints: every call that we serve has both, much else has too.
_CALL: Final = re.compile(TRIGGER + rb'\w*"?\s*(?:\(|--|/\*)', re.IGNORECASE)
_QUERY: Final = re.compile(rb"[\s;]*+(?:select|with|--|/\*)", re.IGNORECASE)


# --- the stand-in of a call -----------------------------------------------------------------

# For each type a function of pg_catalog that takes just this type, so that the server resolves,
# converts and infers as it would for ours, and the way from there to text. The client chooses
# search_path, therefore every name is qualified and no operator is used.
_TO_TEXT: Final[dict[Type, tuple[bytes, bytes]]] = {
    TEXT: (b"pg_catalog.textcat(", b", '')"),
    INT4: (b"CAST(pg_catalog.int4up(", b") AS pg_catalog.text)"),
    BOOL: (b"CAST(pg_catalog.booleq(", b", true) AS pg_catalog.text)"),
}
_OPENINGS: Final = frozenset(opening for opening, _ in _TO_TEXT.values())

# How the server writes these functions where it complains of an argument's type.
_SIGNATURE: Final = re.compile(
    rb"pg_catalog\.(?:textcat\((?P<text>.*), unknown\)|int4up\((?P<integer>.*)\)"
    rb"|booleq\((?P<boolean>.*), boolean\))",
    re.DOTALL,
)


def complaint(
    plan: Plan, message: bytes, position: int | None = None, codec: str = "utf-8"
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
    found = _SIGNATURE.search(message)
    if found is None:
        return None
    type_name = found.lastgroup or ""
    calls = [plan.call] if isinstance(plan, ResultPlan) else [c.call for c in plan.columns]
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


class _Edit(NamedTuple):
    """``pieces`` in place of ``original[start:end]``."""

    start: int
    end: int
    pieces: list[Piece]


class _Reader:
    """One statement. Indices count tokens unless they are called offsets."""

    def __init__(self, sql: bytes, tokens: list[Token], encoding: str | None) -> None:
        self.sql = sql
        self.masked = mask(sql, encoding)
        self.tokens = tokens
        self.count = len(tokens)
        self.encoding = encoding

    def plan(self) -> Plan | None:
        sites = self.calls()
        if not sites or self.keyword(0) not in ("select", "with"):
            return None
        if len(sites) == 1:
            [site] = sites
            if self.keyword(site.first - 1) == "from":
                return self.from_item(site)
            if site.call.function.returns_set:
                return self.lone_item(site)
        return self.select_items(sites)

    # Tokens.

    def text(self, index: int) -> bytes:
        """A token as it stands; empty behind the last one."""
        if not 0 <= index < self.count:
            return b""
        token = self.tokens[index]
        return self.sql[token.start : token.end]

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

    def closing(self, index: int) -> int:
        """The bracket that closes the one at ``index``."""
        depth = 0
        for at in range(index, self.count):
            depth += _NESTING.get(self.text(at), 0)
            if depth == 0:
                return at
        raise _NotServedError("unbalanced")

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
        for found in _TRIGGER.finditer(self.sql):
            at = bisect.bisect(self.tokens, found.start(), key=_token_start) - 1
            if self.name_of_ours(at):
                indices.append(at)
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
        return decoded if decoded in FUNCTIONS else None

    def site(self, index: int, outer: list[_Leaf] | None = None) -> _Site:
        """The call whose name stands at ``index``; ``outer``: it is an argument itself, and its
        leaves come after these."""
        name, close = self.name_of_ours(index), self.closing(index + 1)
        if name is None or close == index + 2:
            raise _NotServedError("a call without arguments")
        given = [self.argument(*item) for item in self.list_items(index + 2, close)]
        function, parameters = _resolve(name, [argument_name for argument_name, _, _ in given])
        leaves = [] if outer is None else outer
        arguments: list[Argument] = []
        for parameter, (argument_name, first, last) in zip(parameters, given, strict=True):
            ours = self.ours_between(first, last)
            value: int | Call
            if ours is None:
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
        first = index
        while self.text(first - 1) == b".":
            first -= 2
            if self.name(first) is None:
                raise _NotServedError("not a qualified name")
        return _Site(Call(function, tuple(arguments)), leaves, first, close)

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
        pieces = self.standing_at(at, b" CAST(ARRAY[")
        for number, leaf in enumerate(site.leaves):
            if number:
                pieces += self.standing_at(at, b", ")
            opening, closing = _TO_TEXT[leaf.type]
            # It stands for the call's name: there the server points if the type is wrong.
            pieces += self.standing_at(
                self.start(leaf.name), opening, self.copied(leaf.first, leaf.last), closing
            )
        return pieces + self.standing_at(at, b"] AS pg_catalog.text) ")

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
        items = _select_items(self.shape(sites, spans), len(sites))
        if items is None:
            raise _NotServedError("not plain items of a plain select list")
        edits: list[_Edit] = []
        columns: list[CallColumn] = []
        for site, (_, last), item in zip(sites, spans, items, strict=True):
            self.check_end(last + 1, item)
            edits.append(self.replacement(site))
            if not item.labelled:
                label = b" AS " + site.call.function.name.encode() + b" "
                edits.append(self.insertion(last, label))
            columns.append(CallColumn(item.column, site.call))
        return ScalarPlan(self.rewrite(*edits), tuple(columns))

    def item_span(self, site: _Site) -> tuple[int, int]:
        """A call that is an item of a select list, with the parentheses around it."""
        first, last = site.first, site.last
        while self.text(first - 1) == b"(" and self.text(last + 1) == b")":
            first, last = first - 1, last + 1
        if site.call.function.returns_set or not (
            self.text(first - 1) == b"," or self.keyword(first - 1) in ("select", "all")
        ):
            raise _NotServedError("not an item of a select list")
        return first, last

    def check_end(self, end: int, item: _Item) -> None:
        """Behind a call there is its label at most: sqlglot's reading must be ours too."""
        if item.labelled:
            end += 2 if self.keyword(end) == "as" else 1
        if not (self.text(end) in (b"", b",") or self.keyword(end) in _AFTER_SELECT_LIST):
            raise _NotServedError("not an item by itself")

    def shape(self, sites: list[_Site], spans: list[tuple[int, int]]) -> str:
        """The statement for sqlglot: its outermost level, tokens with blanks between.

        Nothing is nested in it, because sqlglot takes time exponential in the nesting (40 s for
        twenty ARRAY[), and sessions share a thread.
        """
        words: list[str] = []
        calls = {
            first: (f"{site.call.function.name} ( {number} )", last)
            for number, (site, (first, last)) in enumerate(zip(sites, spans, strict=True))
        }
        ordering = False
        at = 0
        while at < self.count:
            if at in calls:
                word, last = calls[at]
            elif self.text(at) in (b"(", b"["):
                last = self.closing(at)
                if self.ours_between(at, last) is not None:
                    raise _NotServedError("a call within something")
                word = self.group_word(at, last, ordering)
            else:
                last = at
                # ORDER BY 2 is the second column.
                ordering = ordering or self.keyword(at) == "order"
                word = self.word(at, ordering)
            words.append(word)
            at = last + 1
        shape = " ".join(words)
        if len(shape) > _MAX_SHAPE:
            raise _NotServedError("too long for sqlglot")
        return shape

    def group_word(self, first: int, last: int, ordering: bool) -> str:
        """What stands in brackets, in the shape: the least that makes sense in its place."""
        before = self.keyword(first - 1)
        if self.text(first) == b"[":
            return "[ 0 ]"
        if self.keyword(first + 1) in _QUERIES:
            return f"( SELECT {_NAME} )"
        if before == "operator" or self.text(first - 2) == b"::":
            # OPERATOR(pg_catalog.+) and numeric(10,2): the word says enough.
            return ""
        if before == "filter":
            return f"( WHERE {_NAME} )"
        if before == "group":
            return f"( ORDER BY {_NAME} )"
        while ordering and self.text(first + 1) == b"(" and self.text(last - 1) == b")":
            first, last = first + 1, last - 1
        if ordering and first + 2 == last:
            return f"( {self.word(first + 1, ordering)} )"
        texts = [self.text(at) for at in range(first, last)]
        # (t.*) stands for all its columns.
        return f"( {_NAME} . * )" if (b".", b"*") in pairwise(texts) else f"( {_NAME} )"

    def word(self, index: int, ordering: bool) -> str:
        """A token in the shape; ``ordering``: numbers matter."""
        kind, start, end = self.tokens[index]
        text = self.masked[start:end]
        if kind is Kind.STRING:
            return "'s'"
        if kind is Kind.PARAMETER:
            return "$1"
        if kind is Kind.NUMBER:
            return _integer(text) if ordering else "0"
        if kind is Kind.OPERATOR:
            # Any other is an operator like this one: between operands or before one.
            return text.decode() if text in _PLAIN_OPERATORS else "-"
        if kind is Kind.QUOTED_IDENTIFIER:
            if self.name(index) is None:
                raise _NotServedError("U&: could be any name")
            return '"' + text[1:-1].translate(_WORD).decode("latin-1") + '"'
        word = text.translate(_WORD_OR_MARK).decode("latin-1").lower()
        if kind is not Kind.IDENTIFIER or self.text(index + 1) != b"(":
            return word
        if self.text(index - 1) == b"::":
            return word
        if word == "operator":
            return "-"
        return word if word in _KEPT_BEFORE_PARENTHESIS else _NAME

    # SELECT columns FROM call

    def from_item(self, site: _Site) -> Plan:
        at = self.after_select()
        outputs: list[_OutputItem] = []
        while True:
            outputs.append(self.output(at))
            at = outputs[-1].last + 1
            if self.text(at) != b",":
                break
            at += 1
        if self.keyword(at) != "from" or at + 1 != site.first:
            raise _NotServedError("not plain outputs")
        source = self.source(site)
        if any(output.table not in (None, source.name) for output in outputs):
            raise _NotServedError("another table's column")
        if not site.call.function.returns_set:
            return self.scalar_from(site, outputs, source)
        if source.columns and not source.typed:
            raise _NotServedError("columns without types")
        if source.columns:
            return self.defined_result(site, outputs, source)
        return self.result(site, tuple(Output(item.column, item.label) for item in outputs))

    def after_select(self) -> int:
        if self.keyword(0) != "select":
            raise _NotServedError("not a SELECT")
        return 2 if self.keyword(1) == "all" else 1

    def output(self, index: int) -> _OutputItem:
        """``*``, ``t.*``, ``c`` or ``t.c``, and a label."""
        table = None
        at = index
        if self.text(at + 1) == b".":
            if not self.is_name(at):
                raise _NotServedError("not a table's name")
            table = self.name(at)
            at += 2
        if self.text(at) == b"*":
            return _OutputItem(index, at, table, None, None)
        # Behind a dot any word is a name.
        if not (self.is_name(at) or (table is not None and self.name(at))):
            raise _NotServedError("not a column's name")
        column = self.name(at)
        if self.keyword(at + 1) == "as":
            label = self.name(at + 2)
            if label is None:
                raise _NotServedError("not a label")
            return _OutputItem(index, at + 2, table, column, label)
        if self.is_name(at + 1):
            return _OutputItem(index, at + 1, table, column, self.name(at + 1))
        return _OutputItem(index, at, table, column, None)

    def source(self, site: _Site) -> _Source:
        """What follows a call in FROM, up to the statement's end: ``AS t (a int, …)``."""
        at = site.last + 1
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
        name = site.call.function.name.encode() if alias is None else self.name(alias)
        return _Source(name or b"", alias, columns, typed)

    def scalar_from(self, site: _Site, outputs: list[_OutputItem], source: _Source) -> ScalarPlan:
        """The stand-in is a function in FROM too, so names come out as they would."""
        if source.typed or len(source.columns) > 1 or len(outputs) > 1:
            raise _NotServedError("not one column")
        [column] = source.columns or [source.name]
        if outputs[0].column not in (None, column):
            raise _NotServedError("not its column")
        alias = b"" if source.alias else b"AS " + source.name + b" "
        rewrite = self.rewrite(self.replacement(site, alias))
        return ScalarPlan(rewrite, (CallColumn(0, site.call),))

    def result(self, site: _Site, outputs: tuple[Output, ...]) -> ResultPlan:
        """Columns unknown: the arguments only, in FROM, where no argument can make two rows."""
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
        if source.alias is None:
            table: Piece | bytes = source.name
        else:
            table = self.copied(source.alias, source.alias)
        for item in items:
            if item.column is None:
                outputs.append(Output(None))
            elif item.column in source.columns:
                outputs.append(Output(source.columns.index(item.column), item.label))
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

    # SELECT pg_background_result(…)

    def lone_item(self, site: _Site) -> ResultPlan:
        at = site.last + 1
        label = None
        if self.keyword(at) == "as":
            label = self.name(at + 1)
            at += 2 if label is not None else 0
        elif self.is_name(at):
            label = self.name(at)
            at += 1
        if self.after_select() != site.first or at != self.count:
            raise _NotServedError("not alone")
        return self.result(site, (Output(None, label),))


class _OutputItem(NamedTuple):
    """A plain output column, its tokens and names; ``column`` None is ``*``."""

    first: int
    last: int
    table: bytes | None
    column: bytes | None
    label: bytes | None


class _Source(NamedTuple):
    """A function in FROM: the table's name, its alias's token, its columns' names and whether
    they have types."""

    name: bytes
    alias: int | None
    columns: list[bytes]
    typed: bool


# The alias of the arguments, and their column's name.
_ARGUMENTS: Final = b"pg_background_arguments"

_TRIGGER: Final = re.compile(re.escape(TRIGGER), re.IGNORECASE)
_token_start: Final = operator.attrgetter("start")

_NESTING: Final = {b"(": 1, b"[": 1, b")": -1, b"]": -1}


def _resolve(name: str, given: list[str | None]) -> tuple[Function, list[Parameter]]:
    """The overload of a name that takes these arguments (their names, None if given by
    position), and the parameter of each."""
    for function in FUNCTIONS[name]:
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


# What may follow the select list of a plain SELECT; reserved words, so they can be nothing else.
_AFTER_SELECT_LIST: Final = frozenset(("from", "where", "order", "limit", "fetch"))


# --- sqlglot --------------------------------------------------------------------------------

# It takes 0.5 ms for a short text, 2 ms a kB; no more than this is remembered either.
_MAX_SHAPE: Final = 8192

_PLAIN_OPERATORS: Final = frozenset((b"*", b"=", b"<", b">", b"<=", b">=", b"<>", b"!="))
_QUERIES: Final = frozenset(
    ("select", "with", "values", "table", "insert", "update", "delete", "merge")
)
# What any name in parentheses, and any function, is called in a shape.
_NAME: Final = "some_name"
# Words that keep their meaning before a parenthesis. Any other is a function, or a type, or an
# alias, which all look alike; sqlglot has its own ideas about some of them.
_KEPT_BEFORE_PARENTHESIS: Final = (RESERVED - {"cast", "left", "right"}) | {
    *("by", "exists", "filter", "first", "materialized", "next", "repeatable", "values"),
}

_MASKED: Final = "\xff"
_WORD_OR_MARK: Final = bytes(byte if byte < 0x80 else ord(_MASKED) for byte in range(256))
# For quoted names: nothing that sqlglot could read in a way of its own.
_WORD: Final = bytes(
    byte if byte >= 0x80 or chr(byte).isalnum() else ord("_") for byte in _WORD_OR_MARK
)

# A SELECT of these is plain: it makes a row of items for each row that it keeps.
_PLAIN_CLAUSES: Final = frozenset(
    ("expressions", "with_", "from_", "joins", "laterals", "where", "order", "limit")
)


class _Item(NamedTuple):
    """A call in the select list: its column, and if it has a label."""

    column: int
    labelled: bool


@functools.lru_cache(maxsize=1024)
def _select_items(shape: str, count: int) -> tuple[_Item, ...] | None:
    """The select-list items of the ``count`` calls in a shape; None if it is not plain."""
    try:
        select = sqlglot.parse_one(shape, dialect="postgres")
    except Exception:
        # Beside its own errors a parser of that size has bugs, and recursion an end. Whatever
        # it is, the statement is one that we do not know.
        return None
    if type(select) is not exp.Select:
        return None
    if any(value and clause not in _PLAIN_CLAUSES for clause, value in select.args.items()):
        return None
    items: dict[int, _Item] = {}
    labels: list[str] = []
    stars = [place for place, item in enumerate(select.expressions) if item.find(exp.Star)]
    for place, item in enumerate(select.expressions):
        labelled = isinstance(item, exp.Alias)
        call = item.this if labelled else item
        if not _is_call(call):
            continue
        if stars and stars[0] < place < stars[-1]:
            return None
        column = place - len(select.expressions) if stars and stars[0] < place else place
        items[int(call.expressions[0].name)] = _Item(column, labelled)
        labels.append(item.alias if labelled else call.name)
    if len(items) != count or count != sum(map(_is_call, select.walk())):
        return None
    order = select.args.get("order")
    if order and _orders_by_call(order, labels, {item.column for item in items.values()}, stars):
        return None
    return tuple(items[number] for number in range(count))


def _is_call(node: exp.Expr) -> bool:
    return isinstance(node, exp.Anonymous) and node.name in FUNCTIONS


def _orders_by_call(
    order: exp.Expr, labels: list[str], columns: set[int], stars: list[int]
) -> bool:
    """Whether the sort could be by a call's column, by its number or by its name."""
    for item in order.expressions:
        key = item.this.unnest() if isinstance(item, exp.Ordered) else item
        if isinstance(key, exp.Literal) and (
            stars or not key.name.isdecimal() or int(key.name) - 1 in columns
        ):
            return True
    names = {node.name for node in order.walk()}
    return any(_could_be_same(name, label) for name in names for label in labels)


def _could_be_same(name: str, label: str) -> bool:
    """Names are cut at 63 bytes; of those with other than ASCII letters we cannot know."""
    if _MASKED in name and _MASKED in label:
        return True
    return name[:63].lower() == label[:63].lower()


def _integer(text: bytes) -> str:
    """An integer constant in decimal digits, any other number as 0.5."""
    for base in (10, 0):
        try:
            return str(int(text, base))
        except ValueError:
            continue
    return "0.5"
