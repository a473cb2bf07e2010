"""Calls as items of the select list: ``SELECT …, call, (call).field, … FROM …``.

Invariant: only the words that begin clauses, and the commas between items, at the outermost level
matter; the rest of the statement is free.
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

# Reserved words that may follow the select list of a plain SELECT
_AFTER_SELECT_LIST: Final = frozenset(("from", "where", "order", "limit", "fetch"))

# Words before SELECT that begin other commands, or could join another query to the WITH
_NOT_BEFORE: Final = CLAUSES | WRITES | {"values", "table"}
# Words that cannot end a statement
_NOT_AT_THE_END: Final = frozenset(
    (
        *("and", "as", "between", "by", "case", "collate", "cross", "distinct", "else", "from"),
        *("full", "ilike", "in", "inner", "is", "join", "left", "like", "limit", "natural", "not"),
        *("on", "or", "order", "right", "select", "similar", "then", "using", "when", "where"),
    )
)
# Words that may follow a constant that is a whole sort key
_BEHIND_SORT_KEY: Final = frozenset(("asc", "desc", "using", "nulls"))


class _SelectList(NamedTuple):
    """The first and last tokens of the items of a select list, and of those of ORDER BY."""

    items: list[tuple[int, int]]
    order: list[tuple[int, int]]


class Span(NamedTuple):
    """An item of the select list that is a call or fields of it, from its first token to its last.

    ``fields``: None for the call itself. ``names``: the names without label, the stand-in's first.
    """

    first: int
    last: int
    fields: tuple[int, ...] | None
    names: tuple[str, ...]

    def outputs(self, column: int) -> list[ItemOutput]:
        """The client's columns from this column of the stand-in."""
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
            # Not (call).*, whose columns are known
            stars.remove(place)
        columns.append(CallColumn(place, site.call))
    if stars:
        if any(stars[0] < column.index < stars[-1] for column in columns):
            raise NotRecognizedError("a column whose number is not known")
        columns = [
            CallColumn(index - len(found.items) if index > stars[0] else index, call)
            for index, call in ((column.index, column.call) for column in columns)
        ]
    # The numbers in ORDER BY of the columns that are calls, if known
    is_countable = not stars and all(len(span.names) == 1 for span in spans)
    numbers = {column.index + 1 for column in columns} if is_countable else None
    check_order(outline, found, labels, numbers)
    width = None if stars else len(found.items)
    outputs = _item_outputs(columns, width, spans)
    return ScalarPlan(rewritten(outline, *edits), tuple(columns), outputs, width=width)


def item_span(outline: Outline, site: Site) -> Span:
    """The item of a select list that a call is part of: with parentheses, and ``(call).field`` or
    ``(call).*``."""
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
    """The select list of a plain SELECT, each of whose rows comes from its items."""
    outer = list(outline.outermost())
    select = next((at for at in outer if outline.keyword(at) == "select"), None)
    # The queries of a WITH may precede it, in parentheses; their names may be such words.
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
    # It would fail anyway; but in a Query of several statements, before any of them has run.
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
    """Whether an outermost word begins a clause, and is no label, column or part of a value."""
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
    """Whether this FROM belongs to IS [NOT] DISTINCT FROM."""
    if outline.keyword(at - 1) != "distinct":
        return False
    is_ = at - 3 if outline.keyword(at - 2) == "not" else at - 2
    return outline.keyword(is_) == "is" and outline.text(is_ - 1) != b"."


def has_star(outline: Outline, first: int, last: int) -> bool:
    """Whether an item stands for an unknown number of columns: ``*``, ``t.*``, ``(t.*)``."""
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
    """Raises NotRecognizedError if a call's column is a sort key, by number or name. ``numbers``:
    of these columns; None if unknown."""
    for first, last in found.order:
        number, names = sort_key(outline, first, last)
        if number == 0 or (number and (numbers is None or number in numbers)):
            raise NotRecognizedError("sorted by the number of a call's column")
        if any(_could_be_same(name, label) for name in names for label in labels):
            raise NotRecognizedError("sorted by a call's column")


def sort_key(outline: Outline, first: int, last: int) -> tuple[int | None, list[bytes]]:
    """What an item of ORDER BY may be besides an expression: the number of a column, 0 for any
    other constant; and the names in it that could be labels."""
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
    """The client's columns; None if they are the stand-in's. ``count``: number of items; None if a
    ``*`` hides the number of columns."""
    if all(span.fields is None for span in spans):
        return None
    if count is None:
        raise NotRecognizedError("fields in places that are not known")
    outputs = {column: [ItemOutput(column)] for column in range(count)}
    for column, span in zip(columns, spans, strict=True):
        outputs[column.index] = span.outputs(column.index)
    return tuple(itertools.chain.from_iterable(outputs.values()))


def _could_be_same(name: bytes, label: bytes) -> bool:
    """Names are truncated to 63 bytes; non-ASCII names may be equal."""
    if not (name.isascii() or label.isascii()):
        return True
    return name[:MAX_NAME].lower() == label[:MAX_NAME].lower()


def _integer(text: bytes) -> int:
    """The value of an integer constant; 0 for any other."""
    for base in (10, 0):
        try:
            return int(text, base)
        except ValueError:
            continue
    return 0
