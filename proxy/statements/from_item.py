"""A function, a view or a subquery with a call, alone in FROM, with plain output columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from proxy.api.functions import LIST, RECORD, VIEWS, Function
from proxy.sql.rewrite import Piece, Rewrite
from proxy.sql.tokens import NotRecognizedError
from proxy.statements.outline import ARGUMENTS, MAX_NAME, Outline, Site, column_names, position_of
from proxy.statements.plan import (
    Call,
    CallColumn,
    ItemOutput,
    Output,
    Plan,
    ResultPlan,
    ScalarPlan,
)
from proxy.statements.select_list import item_span
from proxy.statements.standin import (
    Edit,
    copied,
    in_place_of,
    insertion,
    replacement,
    rewritten,
    stand_in,
    standing_at,
)


class OutputItem(NamedTuple):
    """The tokens and names of a plain output column; ``column`` is None for ``*``."""

    first: int
    last: int
    table: bytes | None
    column: bytes | None
    field: bytes | None
    label: bytes | None


# Types that can have a modifier without parentheses.
_MODIFIED: Final = frozenset(("bit", "char", "character", "interval", "national", "nchar"))
# The field of ``(c).*``; no name is empty.
_ALL_FIELDS: Final = b""


class _Source(NamedTuple):
    """An item of FROM: its name, its alias's token; its columns' names, whether typed, tokens."""

    name: bytes
    alias: int | None
    columns: list[bytes]
    typed: bool
    definitions: list[tuple[int, int]]


def from_item(outline: Outline, site: Site) -> Plan:
    items, at = plain_outputs(outline)
    if at != site.first:
        raise NotRecognizedError("not plain outputs")
    function = site.call.function
    source = source_of(outline, site.last + 1, function.name.encode())
    if function.columns and not source.typed:
        return columns_result(outline, site, items, source)
    if any(item.table not in (None, source.name) for item in items):
        raise NotRecognizedError("another table's column")
    if any(item.field is not None for item in items):
        raise NotRecognizedError("a field of something else")
    if function.result_type not in (RECORD, LIST):
        return scalar_from(outline, site, items, source)
    if source.columns and not source.typed:
        raise NotRecognizedError("columns without types")
    if source.columns:
        return defined_result(outline, site, items, source)
    return result(outline, site, tuple(Output(item.column, item.label) for item in items))


def lone_item(outline: Outline, site: Site) -> ResultPlan:
    label, end = outline.label(site.last + 1)
    if (
        site.call.function.result_type != RECORD
        or outline.after_select() != site.first
        or end != outline.count
    ):
        raise NotRecognizedError("not alone")
    return result(outline, site, (Output(None, label),))


def plain_outputs(outline: Outline) -> tuple[list[OutputItem], int]:
    """The items between SELECT and FROM, and the index behind FROM."""
    at = outline.after_select()
    items: list[OutputItem] = []
    while True:
        items.append(plain_output(outline, at))
        at = items[-1].last + 1
        if outline.text(at) != b",":
            break
        at += 1
    if outline.keyword(at) != "from":
        raise NotRecognizedError("not plain outputs")
    return items, at + 1


def plain_output(outline: Outline, index: int) -> OutputItem:
    """``*``, ``t.*``, ``c``, ``t.c``, ``(c).f``, ``(t.c).f``, ``(c).*`` or ``(t.c).*``; a label."""
    table = field = None
    in_parentheses = outline.text(index) == b"("
    at = index + in_parentheses
    if outline.text(at + 1) == b".":
        if not outline.is_name(at):
            raise NotRecognizedError("not a table's name")
        table = outline.name(at)
        at += 2
    if outline.text(at) == b"*" and not in_parentheses:
        return OutputItem(index, at, table, None, None, None)
    # After a dot any word is a name.
    if not (outline.is_name(at) or (table is not None and outline.name(at))):
        raise NotRecognizedError("not a column's name")
    column = outline.name(at)
    if in_parentheses:
        if outline.text(at + 1) + outline.text(at + 2) != b").":
            raise NotRecognizedError("not a field")
        at += 3
        if outline.text(at) == b"*":
            return OutputItem(index, at, table, column, _ALL_FIELDS, None)
        field = outline.name(at)
        if not field:
            raise NotRecognizedError("not a field's name")
    label, end = outline.label(at + 1)
    return OutputItem(index, end - 1, table, column, field, label)


def source_of(outline: Outline, at: int, default: bytes) -> _Source:
    """What follows an item of FROM, up to the end of the statement: ``AS t (a int, …)``."""
    has_as = outline.keyword(at) == "as"
    at += has_as
    alias = None
    if outline.is_name(at):
        alias = at
        at += 1
    columns: list[bytes] = []
    definitions: list[tuple[int, int]] = []
    typed = False
    if outline.text(at) == b"(":
        close = outline.closing(at)
        definitions = list(outline.list_items(at + 1, close))
        typed = definitions[0][0] < definitions[0][1]
        for first, last in definitions:
            name = outline.name(first)
            if name is None or (first < last) != typed:
                raise NotRecognizedError("not a list of columns")
            columns.append(name)
        at = close + 1
    if at != outline.count or (alias is None and not has_as == typed == bool(columns)):
        raise NotRecognizedError("more than a function in FROM")
    name = default if alias is None else outline.name(alias)
    return _Source(name or b"", alias, columns, typed, definitions)


def scalar_from(
    outline: Outline, site: Site, items: list[OutputItem], source: _Source
) -> ScalarPlan:
    """The stand-in is also a function in FROM, so column names come out the same."""
    if source.typed or len(source.columns) > 1 or len(items) > 1:
        raise NotRecognizedError("not one column")
    [column] = source.columns or [source.name]
    if items[0].column not in (None, column):
        raise NotRecognizedError("not its column")
    alias = b"" if source.alias else b"AS " + source.name + b" "
    rewrite = rewritten(outline, replacement(outline, site, alias))
    return ScalarPlan(rewrite, (CallColumn(0, site.call),), width=1)


def columns_result(
    outline: Outline, site: Site, items: list[OutputItem], source: _Source
) -> ResultPlan:
    """The function's columns are known; the alias may rename the first of them."""
    own = column_names(site.call.function)
    if len(source.columns) > len(own) or source.typed:
        raise NotRecognizedError("not its columns")
    names = [*source.columns, *own[len(source.columns) :]]
    outputs: list[Output] = []
    for item in items:
        if item.field is not None and (item.table, item.column) == (None, source.name):
            # (t).c means t.c if t is not a column.
            if item.column in names:
                raise NotRecognizedError("a field of something else")
            column = item.field or None
        elif item.field is not None or item.table not in (None, source.name):
            raise NotRecognizedError("another table's column")
        else:
            column = item.column
        if column is not None:
            place = position_of(column, names)
            renamed = names[place] if names[place] != own[place] else None
            outputs.append(Output(place, item.label or renamed))
        elif names == own:
            outputs.append(Output(None))
        else:
            outputs += [Output(place, name) for place, name in enumerate(names)]
    return result(outline, site, tuple(outputs))


def result(outline: Outline, site: Site, outputs: tuple[Output, ...]) -> ResultPlan:
    """A stand-in with the arguments only, in FROM, where no argument can produce two rows."""
    if any(len(output.label or b"") > MAX_NAME for output in outputs):
        raise NotRecognizedError("a name that the server would cut")
    pieces = [
        *standing_at(0, b"SELECT * FROM"),
        *stand_in(outline, site),
        *standing_at(outline.end(site.last), b"AS pg_background_result"),
    ]
    return ResultPlan(Rewrite(outline.sql, tuple(pieces)), site.call, outputs, 0)


def defined_result(
    outline: Outline, site: Site, items: list[OutputItem], source: _Source
) -> ResultPlan:
    """An empty table of the defined columns, outer-joined to the arguments.

    The arguments come first in FROM, so that they cannot see the columns; ``*`` is the table alone.
    """
    if any(outline.name(at) == ARGUMENTS for at in range(outline.count)):
        raise NotRecognizedError("our own alias")
    outputs: list[Output] = []
    edits: list[Edit] = []
    places: dict[bytes, int] = {}
    for place, column in enumerate(source.columns):
        places.setdefault(column, place)
    if source.alias is None:
        table: Piece | bytes = source.name
    else:
        table = copied(outline, source.alias, source.alias)
    for item in items:
        if item.column is None:
            outputs.append(Output(None))
        elif item.column in places:
            outputs.append(Output(places[item.column], item.label))
        else:
            # If it is no column, it may still be the row, or a function of it.
            raise NotRecognizedError("not a column")
        if item.column is None and item.table is None:
            edits.append(in_place_of(outline, item.first, item.first, b" ", table, b".*"))
    extra: list[Piece | bytes] = [b", CAST(CAST(ARRAY["]
    for number, (first, _) in enumerate(source.definitions):
        extra += [b", pg_catalog.pg_typeof(" if number else b"pg_catalog.pg_typeof(", table, b"."]
        extra += [copied(outline, first, first), b")"]
    extra.append(b"] AS pg_catalog.oid[]) AS pg_catalog.text), " + ARGUMENTS + b"." + ARGUMENTS)
    edits.append(insertion(outline, items[-1].last, *extra, b" "))
    join = b"AS " + ARGUMENTS + b" LEFT JOIN pg_catalog.json_to_recordset('[]') "
    edits.append(replacement(outline, site, join))
    if source.alias is None:
        edits.append(insertion(outline, site.last + 1, b" " + source.name + b" "))
    edits.append(insertion(outline, outline.count - 1, b" ON true"))
    return ResultPlan(
        rewritten(outline, *edits),
        site.call,
        tuple(outputs),
        len(source.columns),
        types=tuple(
            outline.sql[outline.start(first + 1) : outline.end(last)]
            for first, last in source.definitions
        ),
        has_modifiers=any(
            outline.text(at) == b"(" or outline.keyword(at) in _MODIFIED
            for first, last in source.definitions
            for at in range(first + 1, last + 1)
        ),
    )


def view(outline: Outline) -> ResultPlan:
    if outline.keyword(0) == "table":
        items, first = [OutputItem(0, 0, None, None, None, None)], 1
    else:
        items, first = plain_outputs(outline)
    last = first
    while outline.text(last + 1) == b".":
        last += 2
    function = VIEWS.get((outline.name(last) or b"").decode("latin-1"))
    if function is None or outline.qualified(last) != first:
        raise NotRecognizedError("not a view of ours")
    if outline.keyword(0) == "table" and last + 1 != outline.count:
        raise NotRecognizedError("more than a view")
    source = source_of(outline, last + 1, function.name.encode())
    call = Call(function, (), outline.schema(first, last))
    return columns_result(outline, Site(call, [], first, last), items, source)


def subquery(outline: Outline, site: Site) -> int | None:
    """The ``(`` of a subquery in FROM whose select list begins with this call."""
    at = site.first - 1
    while outline.text(at) == b"(":
        at -= 1
    at -= outline.keyword(at) == "all"
    is_subquery = (
        outline.keyword(at) == "select"
        and outline.text(at - 1) == b"("
        and outline.keyword(at - 2) == "from"
    )
    return at - 1 if is_subquery else None


def from_subquery(outline: Outline, site: Site, opening: int) -> ScalarPlan:
    """The stand-in has the call's column only, whatever is made of it."""
    items, at = plain_outputs(outline)
    span = item_span(outline, site)
    if at != opening or span.fields is not None or span.first != outline.after_select(at + 1):
        raise NotRecognizedError("not a call alone in a subquery")
    close = outline.closing(opening)
    label, end = outline.label(span.last + 1)
    if end != close:
        raise NotRecognizedError("not a call alone in a subquery")
    # Without alias (allowed since 16) the table has no name.
    source = source_of(outline, close + 1, b"")
    if source.typed or len(source.columns) > 1:
        raise NotRecognizedError("not its column")
    [name] = source.columns or [site.call.function.name.encode() if label is None else label]
    outputs: list[ItemOutput] = []
    for item in items:
        if item.table not in (None, source.name or None) or item.column not in (None, name):
            raise NotRecognizedError("not its column")
        outputs += of_record(outline, site.call.function, item, name)
    if any(len(output.label or b"") > MAX_NAME for output in outputs):
        raise NotRecognizedError("a name that the server would cut")
    edits = [
        in_place_of(outline, items[0].first, items[-1].last, b" * "),
        in_place_of(outline, span.first, span.last, *stand_in(outline, site)),
    ]
    if label is None:
        edits.append(insertion(outline, span.last, b" AS " + span.names[0].encode() + b" "))
    columns = (CallColumn(0, site.call),)
    return ScalarPlan(rewritten(outline, *edits), columns, tuple(outputs), width=1)


def of_record(
    outline: Outline, function: Function, item: OutputItem, name: bytes
) -> Iterator[ItemOutput]:
    """What an item makes of the single column, named ``name``: a function's result."""
    fields = column_names(function)
    if item.field is None:
        yield ItemOutput(0, None, item.label or name)
    elif item.field == _ALL_FIELDS:
        if not fields:
            raise NotRecognizedError("fields of no record")
        for place, field in enumerate(fields):
            yield ItemOutput(0, place, field)
    else:
        yield ItemOutput(0, position_of(item.field, fields), item.label or item.field)
