"""Calls as items of the select list: ``SELECT …, call, (call).field, … FROM …``.

Invariant: the rest of the statement is free. Only the words that begin its clauses count, and the
commas between them, at its outermost level.
"""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple

from proxy.sql.lexer import Kind
from proxy.sql.tokens import NESTING, NotRecognizedError
from proxy.statements.outline import (
    CLAUSES,
    MAX_NAME,
    QUERIES,
    WRITES,
    Outline,
    Site,
    column_names,
    position_of,
)
from proxy.statements.plan import CallColumn, ItemOutput, ScalarPlan
from proxy.statements.standin import Edit, in_place_of, insertion, rewritten, stand_in

# What may follow the select list of a plain SELECT; reserved words, so they can be nothing else.
_AFTER_SELECT_LIST: Final = frozenset(("from", "where", "order", "limit", "fetch"))

# What else a WITH could be of, and what could join another query to that.
_NOT_BEFORE: Final = CLAUSES | WRITES | {"values", "table"}
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


class Span(NamedTuple):
    """An item of the select list that is a call or fields of it, its tokens from first to last.

    ``fields``: which, None for the call itself. ``names`` is what the item's columns are called
    without a label, in the stand-in by the first of them.
    """

    first: int
    last: int
    fields: tuple[int, ...] | None
    names: tuple[str, ...]

    def outputs(self, column: int) -> list[ItemOutput]:
        """The client's columns, made of this column of the stand-in."""
        if self.fields is None or len(self.names) == 1:
            return [ItemOutput(column, self.fields[0] if self.fields else None)]
        return [
            ItemOutput(column, field, name.encode())
            for field, name in zip(self.fields, self.names[1:], strict=True)
        ]


def select_items(outline: Outline, sites: list[Site]) -> ScalarPlan:
    spans = [item_span(outline, site) for site in sites]
    found = select_list(outline)
    places = {first: place for place, (first, _) in enumerate(found.items)}
    stars = [at for at, item in enumerate(found.items) if has_star(outline, *item)]
    edits: list[Edit] = []
    columns: list[CallColumn] = []
    labels: list[bytes] = []
    for site, span in zip(sites, spans, strict=True):
        label, end = outline.label(span.last + 1)
        place = places.get(span.first)
        if place is None or end != found.items[place][1] + 1:
            raise NotRecognizedError("not an item by itself")
        if label is not None and span.fields is not None and len(span.fields) != 1:
            raise NotRecognizedError("one label for all fields")
        edits.append(in_place_of(outline, span.first, span.last, *stand_in(outline, site)))
        if label is None:
            edits.append(insertion(outline, span.last, b" AS " + span.names[0].encode() + b" "))
            labels += [name.encode() for name in span.names]
        else:
            labels.append(label)
        if span.fields is not None and span.names[1:]:
            # Not (call).*: we know its columns.
            stars.remove(place)
        columns.append(CallColumn(place, site.call))
    if stars:
        if any(stars[0] < column.index < stars[-1] for column in columns):
            raise NotRecognizedError("a column whose number is not known")
        columns = [
            CallColumn(index - len(found.items) if index > stars[0] else index, call)
            for index, call in ((column.index, column.call) for column in columns)
        ]
    # The columns that are calls by their numbers in ORDER BY, if these are known.
    is_countable = not stars and all(len(span.names) == 1 for span in spans)
    numbers = {column.index + 1 for column in columns} if is_countable else None
    check_order(outline, found, labels, numbers)
    width = None if stars else len(found.items)
    outputs = _item_outputs(columns, width, spans)
    return ScalarPlan(rewritten(outline, *edits), tuple(columns), outputs, width=width)


def item_span(outline: Outline, site: Site) -> Span:
    """A call that is an item of a select list, with the parentheses around it and what is
    behind them: ``(call).field`` or ``(call).*``."""
    first, last = site.first, site.last
    function = site.call.function
    fields: tuple[int, ...] | None = None
    names = [function.name]
    while outline.text(first - 1) == b"(" and outline.text(last + 1) == b")":
        first, last = first - 1, last + 1
        if outline.text(last + 1) != b".":
            continue
        last += 2
        if fields is not None or not function.columns:
            raise NotRecognizedError("a field of something else")
        if outline.text(last) == b"*":
            fields = tuple(range(len(function.columns)))
            names += [column.name for column in function.columns]
            break
        fields = (position_of(outline.name(last), column_names(function)),)
        names = [function.columns[fields[0]].name]
    if function.returns_set or not (
        outline.text(first - 1) == b"," or outline.keyword(first - 1) in ("select", "all")
    ):
        raise NotRecognizedError("not an item of a select list")
    return Span(first, last, fields, tuple(names))


def select_list(outline: Outline) -> _SelectList:
    """The select list of a plain SELECT, whose rows are made of its items one by one."""
    outer = list(outline.outermost())
    select = next((at for at in outer if outline.keyword(at) == "select"), None)
    # Before it there are the queries of WITH, in parentheses, whose names may be such words.
    if select is None or any(
        outline.keyword(at) in _NOT_BEFORE and outline.text(at - 1) == b")"
        for at in outer
        if at < select
    ):
        raise NotRecognizedError("not a SELECT")
    first = outline.after_select(select)
    if outline.keyword(first) == "distinct":
        raise NotRecognizedError("not a row for each")
    clauses = [at for at in outer if at >= first and begins_clause(outline, at)]
    if any(outline.keyword(at) not in _AFTER_SELECT_LIST for at in clauses):
        raise NotRecognizedError("not a plain SELECT")
    end = clauses[0] if clauses else outline.count
    # It would fail anyway, but in a Query of several statements before any of them has run.
    if outline.keyword(outline.count - 1) in _NOT_AT_THE_END or any(
        after - at < 2 for at, after in itertools.pairwise([*clauses, outline.count])
    ):
        raise NotRecognizedError("a clause without its expression")
    if any(outline.keyword(at) == "limit" for at in clauses) and any(
        at > clauses[-1] and outline.text(at) == b"," for at in outer
    ):
        raise NotRecognizedError("LIMIT m, n")
    items = outline.list_items(first, end)
    order = next((at for at in clauses if outline.keyword(at) == "order"), None)
    if order is None:
        return _SelectList(items, [])
    behind = next((at for at in clauses if at > order), outline.count)
    return _SelectList(items, outline.list_items(order + 2, behind))


def begins_clause(outline: Outline, at: int) -> bool:
    """Whether a word at the outermost level begins a clause of a SELECT, and is neither a label
    nor a column, nor a part of an expression."""
    word = outline.keyword(at)
    if (
        not (word == "from" or word in CLAUSES)
        or outline.text(at - 1) == b"."
        or outline.keyword(at - 1) == "as"
    ):
        return False
    if word == "from":
        return not is_distinct_from(outline, at)
    # WITHIN GROUP (…)
    return word != "group" or outline.keyword(at + 1) == "by"


def is_distinct_from(outline: Outline, at: int) -> bool:
    """Whether this FROM is of IS [NOT] DISTINCT FROM."""
    if outline.keyword(at - 1) != "distinct":
        return False
    is_ = at - 3 if outline.keyword(at - 2) == "not" else at - 2
    return outline.keyword(is_) == "is" and outline.text(is_ - 1) != b"."


def has_star(outline: Outline, first: int, last: int) -> bool:
    """Whether an item stands for columns that we cannot count: ``*``, ``t.*``, ``(t.*)``."""
    if b"*" in (outline.text(first), outline.text(last)):
        return True
    at = first
    while at < last:
        if outline.text(at) == b"(" and outline.keyword(at + 1) in QUERIES:
            at = outline.closing(at)
        elif outline.text(at) == b"." and outline.text(at + 1) == b"*":
            return True
        at += 1
    return False


def check_order(
    outline: Outline, found: _SelectList, labels: list[bytes], numbers: set[int] | None
) -> None:
    """Raises NotRecognizedError if a call's column, by its number or by its name, is a sort key.
    ``numbers``: of these columns, None if they are not known."""
    for first, last in found.order:
        number, names = sort_key(outline, first, last)
        if number == 0 or (number and (numbers is None or number in numbers)):
            raise NotRecognizedError("sorted by the number of a call's column")
        if any(_could_be_same(name, label) for name in names for label in labels):
            raise NotRecognizedError("sorted by a call's column")


def sort_key(outline: Outline, first: int, last: int) -> tuple[int | None, list[bytes]]:
    """What an item of ORDER BY may be beside an expression: the number of a column, 0 for any
    other constant; and the names in it that could be a label."""
    while (
        outline.text(first) == b"("
        and outline.closing(first) == last
        and outline.keyword(first + 1) not in QUERIES
    ):
        first, last = first + 1, last - 1
    if outline.tokens[first].kind in (Kind.NUMBER, Kind.STRING) and (
        first == last or outline.keyword(first + 1) in _BEHIND_SORT_KEY
    ):
        return _integer(outline.text(first)), []
    names: list[bytes] = []
    depth = 0
    for at in range(first, last + 1):
        depth += NESTING.get(outline.text(at), 0)
        alone = outline.text(at - 1) == b"(" and outline.text(at + 1) == b")"
        if (depth == 0 or alone) and (name := outline.name(at)) is not None:
            names.append(name)
    return None, names


def _item_outputs(
    columns: list[CallColumn], count: int | None, spans: list[Span]
) -> tuple[ItemOutput, ...] | None:
    """The client's columns, None if they are the stand-in's. ``count``: how many items there are,
    None if a ``*`` hides how many columns they make."""
    if all(span.fields is None for span in spans):
        return None
    if count is None:
        raise NotRecognizedError("fields in places that are not known")
    outputs = {column: [ItemOutput(column)] for column in range(count)}
    for column, span in zip(columns, spans, strict=True):
        outputs[column.index] = span.outputs(column.index)
    return tuple(itertools.chain.from_iterable(outputs.values()))


def _could_be_same(name: bytes, label: bytes) -> bool:
    """Names are cut at 63 bytes; with other than ASCII letters they could be the same."""
    if not (name.isascii() or label.isascii()):
        return True
    return name[:MAX_NAME].lower() == label[:MAX_NAME].lower()


def _integer(text: bytes) -> int:
    """A constant that is an integer, any other as 0."""
    for base in (10, 0):
        try:
            return int(text, base)
        except ValueError:
            continue
    return 0
