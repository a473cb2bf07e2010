"""A call as the last item of FROM, made for each row of the others:
``SELECT …, l.field, call(l.field), … FROM …, LATERAL call AS l``.

Invariant: the stand-in is evaluated as often as the call would be, and each row has its own.

A volatile element in the stand-in, such as ``random()``, would tell the rows of one evaluation from
those of another. Thousands of random statements on PostgreSQL 15 and 18 showed that `check_rows`
need not refuse one call for several rows then (`is_merged` and the like could go). The other
conditions would remain: next to a function that returns a set, the server evaluates a call once
more than there are rows, and a volatile WHERE drops rows with their calls. It would also need
results kept per statement, and, before PostgreSQL 13, numbers of the session's random sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final, NamedTuple

from proxy.api.functions import Type
from proxy.sql.lexer import RESERVED
from proxy.sql.rewrite import Piece
from proxy.sql.tokens import NotRecognizedError
from proxy.statements.outline import (
    ARGUMENTS,
    CLAUSES,
    MAX_NAME,
    QUERIES,
    WRITES,
    Outline,
    Site,
    column_names,
    position_of,
)
from proxy.statements.plan import Call, CallColumn, FieldOf, ItemOutput, ScalarPlan
from proxy.statements.select_list import item_span
from proxy.statements.standin import (
    Edit,
    copied,
    in_place_of,
    replacement,
    rewritten,
    stand_in,
    standing_at,
)

_MAX_SUBQUERIES: Final = 20
_OUTER: Final = frozenset(("left", "right", "full", "outer", "natural"))
# Functions that return one value for one row: no sets, aggregates or window functions.
_ONE_ROW: Final = frozenset(
    (
        *("abs", "btrim", "cast", "coalesce", "concat", "concat_ws", "current_setting", "extract"),
        *("format", "greatest", "initcap", "least", "left", "length", "lower", "ltrim", "md5"),
        *("now", "nullif", "operator", "quote_ident", "quote_literal", "quote_nullable"),
        *("replace", "right", "round", "row", "rtrim", "substr", "substring", "to_char", "trim"),
        *("upper",),
    )
)
# Words that do not make a call of a parenthesis behind them.
_NOT_CALLED: Final = RESERVED - {"left", "right"}
_NORMAL_FORMS: Final = frozenset(("nfc", "nfd", "nfkc", "nfkd"))
_BEFORE_OPERANDS: Final = frozenset(("select", "all", "distinct", "where", "and", "or", "not"))
_BEHIND_OPERANDS: Final = frozenset(
    (
        *("and", "as", "at", "between", "collate", "fetch", "from", "ilike", "in", "is", "isnull"),
        *("like", "limit", "not", "notnull", "or"),
    )
)
# Next to these a constant can make an operand superfluous, so that the planner removes it.
_DROPS: Final = frozenset(("case", "and", "or", "is", "isnull", "notnull", "null"))
# Clauses with which the planner does not pull up a subquery.
_KEEPS: Final = frozenset(("group", "having", "order", "limit", "offset", "fetch"))
# Words before subqueries in conditions that the planner turns into joins.
_JOINED: Final = frozenset(("exists", "in", "any", "some"))
# Words before subqueries that are no items of FROM.
_IN_CONDITIONS: Final = frozenset(("exists", "in", "any", "some", "all", "array", "not"))


class Lateral(NamedTuple):
    """A call that is the last item of FROM, and the statement around it, as token indices.

    ``select`` and ``from_`` are these words; ``before`` is the end of the other items of FROM;
    ``rest`` is what follows the alias, which ends at ``end``. ``names`` are the columns'.
    """

    site: Site
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
        """Whether there are no other items."""
        return self.before == self.from_


def from_of(outline: Outline, select: int) -> int | None:
    """The FROM of the SELECT at this index."""
    for at in outline.outermost(select + 1):
        word = outline.keyword(at)
        # Not a IS DISTINCT FROM b, a label, or a column of that name.
        if word == "from" and outline.keyword(at - 1) not in ("distinct", "as"):
            if outline.text(at - 1) != b".":
                return at
        elif word in CLAUSES:
            return None
    return None


def last_in_from(outline: Outline, site: Site) -> Lateral | None:
    """The surroundings of a call behind other items in FROM, with LATERAL, or alone but with other
    calls; None if it is none of these."""
    before = site.first - 1
    before -= outline.keyword(before) == "lateral"
    word = outline.keyword(before)
    if outline.text(before) != b"," and word not in ("from", "join"):
        return None
    outer = list(outline.outermost())
    select = next((at for at in outer if outline.keyword(at) == "select"), None)
    from_ = None if select is None else from_of(outline, select)
    if select is None or from_ is None or not (from_ <= before and before in outer):
        return None
    if word == "from" and before == site.first - 1 and outline.ours_between(0, before) is None:
        return None
    if any(outline.keyword(at) in WRITES for at in outer if at < select):
        raise NotRecognizedError("not a SELECT")
    alias, end, names = alias_of(outline, site)
    rest = end
    if word == "join":
        kind = outline.keyword(before - 1)
        before -= kind in ("cross", "inner")
        if kind != "cross":
            if kind in _OUTER or (outline.keyword(end), outline.keyword(end + 1)) != ("on", "true"):
                raise NotRecognizedError("not joined to every row")
            rest += 2
    clauses = [at for at in outer if at > select and outline.keyword(at) in CLAUSES]
    words = [outline.keyword(at) for at in clauses]
    if words[:1] == ["where"]:
        del words[0]
    # OFFSET and DISTINCT would make calls whose rows are dropped, a sort calls in unknown order.
    if words not in ([], ["limit"], ["fetch"]) or (clauses[:1] or [outline.count])[0] != rest:
        raise NotRecognizedError("not a call for each row")
    name = outline.name(alias) or b""
    return Lateral(site, select, from_, before, alias, end, rest, name, names)


def alias_of(outline: Outline, site: Site) -> tuple[int, int, list[bytes]]:
    """The token of a call's alias in FROM, the index behind it, and the columns' names."""
    function = site.call.function
    at = site.last + 1
    at += outline.keyword(at) == "as"
    if not outline.is_name(at) or not function.columns or function.returns_set:
        raise NotRecognizedError("not a record with an alias")
    alias, at = at, at + 1
    given: list[bytes] = []
    if outline.text(at) == b"(":
        close = outline.closing(at)
        for first, last in outline.list_items(at + 1, close):
            name = outline.name(first)
            if name is None or first != last:
                raise NotRecognizedError("not a list of names")
            given.append(name)
        at = close + 1
    own = column_names(function)
    names = [*given, *own[len(given) :]]
    # The server may have truncated a name of this length.
    if len(names) > len(own) or any(len(name) >= MAX_NAME for name in names):
        raise NotRecognizedError("not its columns")
    if len(outline.name(alias) or b"") >= MAX_NAME:
        raise NotRecognizedError("a name that may have been cut")
    return alias, at, names


def with_lateral(outline: Outline, lateral: Lateral) -> ScalarPlan:
    """The stand-in is also a function in FROM, so its arguments are evaluated as they would be. Its
    single column comes first in the select list; items that are not columns of the call follow."""
    site = lateral.site
    first, end = outline.after_select(lateral.select), lateral.from_
    if outline.keyword(first) == "distinct" or any(
        outline.name(at) == ARGUMENTS for at in range(outline.count)
    ):
        raise NotRecognizedError("not a plain select list")
    check_rows(outline, lateral)
    outline.column_of_call = functools.partial(field_of_lateral, outline, lateral)
    items = _items(outline, lateral, first, end)
    alias = copied(outline, lateral.alias, lateral.alias)
    column = standing_at(outline.start(first), b" ", alias, b"." + ARGUMENTS)
    pieces = [*column, *items.pieces, *standing_at(outline.start(end), b" ")]
    after = outline.end(lateral.alias)
    rewrite = rewritten(
        outline,
        in_place_of(outline, first, end - 1, *pieces),
        replacement(outline, site),
        Edit(after, outline.end(lateral.end - 1), standing_at(after, b"(" + ARGUMENTS + b") ")),
    )
    columns = (CallColumn(0, site.call), *items.calls)
    return ScalarPlan(rewrite, columns, tuple(items.outputs), in_from=True, width=1 + items.width)


class _Items(NamedTuple):
    """The select list: its part of the stand-in behind the first column, which has `width` columns;
    those that are calls; and the client's columns."""

    pieces: list[Piece]
    width: int
    calls: list[CallColumn]
    outputs: list[ItemOutput]


def _items(outline: Outline, lateral: Lateral, first: int, end: int) -> _Items:
    sites = {other.first: other for other in outline.sites()[:-1]}
    pieces: list[Piece] = []
    calls: list[CallColumn] = []
    outputs: list[ItemOutput] = []
    count = 0
    used = False
    for item in outline.list_items(first, end):
        if fields := lateral_outputs(outline, lateral, *item):
            outputs += fields
            used = True
            continue
        count += 1
        pieces += standing_at(outline.start(item[0]), b", ")
        at = next((at for at in range(item[0], item[1] + 1) if at in sites), None)
        if at is None:
            check_free(outline, lateral, *item)
            pieces.append(copied(outline, *item))
            outputs.append(ItemOutput(count))
        else:
            site = sites.pop(at)
            for leaf in site.leaves:
                check_free(outline, lateral, leaf.first, leaf.last)
            made, results = call_item(outline, site, *item, count)
            pieces += made
            outputs += results
            calls.append(CallColumn(count, site.call))
            used = used or _uses_field(site.call)
    # Without columns of the call, the items could be aggregates.
    if sites or not used:
        raise NotRecognizedError("calls elsewhere, or no column of this one")
    return _Items(pieces, count, calls, outputs)


def call_item(
    outline: Outline, site: Site, first: int, last: int, column: int
) -> tuple[list[Piece], list[ItemOutput]]:
    """A call in the select list: its stand-in, with the call's name, and the client's columns."""
    span = item_span(outline, site)
    label, end = outline.label(span.last + 1)
    if span.first != first or end != last + 1:
        raise NotRecognizedError("a call within an expression")
    pieces = stand_in(outline, site)
    if label is None:
        pieces += standing_at(outline.end(span.last), b" AS " + span.names[0].encode() + b" ")
    else:
        pieces.append(copied(outline, span.last + 1, last))
    if label is not None and len(span.names) > 1:
        raise NotRecognizedError("one label for all fields")
    return pieces, span.outputs(column)


def lateral_outputs(outline: Outline, lateral: Lateral, first: int, last: int) -> list[ItemOutput]:
    """The columns that an item takes from the call in FROM; none for other items."""
    names = lateral.names
    if outline.name(first) == lateral.name and outline.text(first + 1) == b".":
        if outline.text(first + 2) == b"*" and first + 2 == last:
            return [ItemOutput(0, place, name) for place, name in enumerate(names)]
        at = first + 2
    elif lateral.alone and outline.is_name(first) and outline.name(first) in names:
        at = first
    else:
        return []
    name = outline.name(at)
    label, end = outline.label(at + 1)
    if end != last + 1 or len(label or b"") > MAX_NAME:
        raise NotRecognizedError("not a plain column")
    return [ItemOutput(0, position_of(name, names), label or name)]


def field_of_lateral(
    outline: Outline, lateral: Lateral, first: int, last: int
) -> tuple[FieldOf, Type] | None:
    """The column of the call in FROM that an argument is, and its type."""
    names = lateral.names
    if last == first + 2 and outline.name(first) == lateral.name:
        if outline.text(first + 1) != b".":
            return None
    elif not (lateral.alone and first == last and outline.is_name(first)):
        return None
    field = position_of(outline.name(last), names)
    return FieldOf(0, field), lateral.site.call.function.columns[field].type


def check_rows(outline: Outline, lateral: Lateral) -> None:
    """Raises NotRecognizedError unless each returned row has a call of its own, joined last."""
    site = lateral.site
    for first, end in ((0, lateral.select), (lateral.from_ + 1, lateral.rest)):
        for at in range(first, end):
            if at != lateral.alias:
                check_names(outline, lateral, at, columns=False)
    for at in range(lateral.rest, outline.count):
        check_names(outline, lateral, at, columns=True)
    if not lateral.alone:
        # A call that depends on no row is made once for all; one that depends on some of the items
        # could be made before the others are joined.
        columns = [at for leaf in site.leaves for at in columns_in(outline, leaf.first, leaf.last)]
        tables = {outline.name(at) for at in columns if outline.text(at + 1) == b"."}
        items = items_in_from(outline, lateral.from_ + 1, lateral.before)
        if not columns or (items > 1 and len(tables) < items):
            raise NotRecognizedError("a call for several rows together")
        others = (*range(lateral.select), *range(lateral.from_ + 1, lateral.before))
        selects = [at for at in others if outline.keyword(at) == "select"]
        # Each costs time for all that is nested in it.
        if len(selects) > _MAX_SUBQUERIES or any(
            is_merged(outline, at, several=items > 1) for at in selects
        ):
            raise NotRecognizedError("a call for several rows together")
    for at in range(lateral.rest, outline.count):
        if outline.keyword(at) in _JOINED and outline.keyword(at + 2) in QUERIES:
            raise NotRecognizedError("a join after the calls")
    condition: list[int] = []
    for at in [*own(outline, lateral.rest, outline.count - 1), outline.count]:
        # A condition with a volatile function and no column is checked after the calls.
        if at == outline.count or outline.keyword(at) in ("and", "or", "limit", "fetch"):
            if any(is_call(outline, item) for item in condition) and not any(
                is_column(outline, item) for item in condition
            ):
                raise NotRecognizedError("calls for rows that are not returned")
            condition = []
        else:
            condition.append(at)


def check_names(outline: Outline, lateral: Lateral, at: int, *, columns: bool) -> None:
    """Raises NotRecognizedError if the alias of the call in FROM or, with ``columns``, a possible
    name of one of its columns is at this index."""
    name = outline.name(at)
    if name is None or outline.text(at - 1) == b".":
        return
    is_column = (
        columns
        and name in lateral.names
        and outline.keyword(at - 1) != "as"
        and outline.text(at + 1) not in (b"=>", b":=", b".")
    )
    if name == lateral.name or is_column:
        raise NotRecognizedError("what the call returns, in an expression")


def check_free(outline: Outline, lateral: Lateral, first: int, last: int) -> None:
    """Raises NotRecognizedError unless an expression of the select list makes one column of one
    row, and does not use the call in FROM."""
    for at in range(first, last + 1):
        check_names(outline, lateral, at, columns=True)
        star = outline.text(at) == b"*"
        if star and (at == first or outline.text(at - 1) == b"."):
            raise NotRecognizedError("columns that we cannot count")
    for at in own(outline, first, last):
        known = outline.keyword(at) in _ONE_ROW and outline.text(at - 1) != b"."
        if is_call(outline, at) and not known:
            raise NotRecognizedError("could return a set")


def own(outline: Outline, first: int, last: int) -> Iterator[int]:
    """The tokens that are in no subquery and in no type's brackets."""
    at = first
    while at <= last:
        if outline.text(at) == b"(" and (
            outline.keyword(at + 1) in QUERIES or is_type(outline, at - 1)
        ):
            at = outline.closing(at)
        else:
            yield at
        at += 1


def is_type(outline: Outline, index: int) -> bool:
    """Whether the name that ends here is the type of a cast."""
    if outline.name(index) is None:
        return False
    begin = outline.qualified(index)
    return outline.text(begin - 1) == b"::" or outline.keyword(begin - 1) == "as"


def is_call(outline: Outline, at: int) -> bool:
    """Whether this may be the name of a function call."""
    return (
        outline.text(at + 1) == b"("
        and outline.name(at) is not None
        and outline.keyword(at) not in _NOT_CALLED
        and not is_type(outline, at)
    )


def is_column(outline: Outline, at: int) -> bool:
    """Whether this is certainly a column: a name between tokens that can only delimit operands."""
    if not outline.is_name(at) or outline.keyword(at) in _NORMAL_FORMS:
        return False
    before = outline.text(at - 1)
    if not (
        before in (b"(", b",", b"[", b"=>", b":=")
        or outline.is_operator(at - 1)
        or outline.keyword(at - 1) in _BEFORE_OPERANDS
    ):
        return False
    end = at + 1
    while outline.text(end) == b"." and outline.name(end + 1) is not None:
        end += 2
    if outline.is_name(end) and (
        outline.text(end + 1) in (b",", b")") or outline.keyword(end + 1) == "from"
    ):
        # A label after a column:
        return True
    return (
        outline.text(end) in (b"", b")", b",", b"[", b"]", b"::")
        or outline.is_operator(end)
        or outline.keyword(end) in _BEHIND_OPERANDS
    )


def columns_in(outline: Outline, first: int, last: int) -> list[int]:
    """The columns in an expression, except those that a constant next to them could remove."""
    tokens = list(own(outline, first, last))
    found: list[int] = []
    if any(outline.keyword(at) in _DROPS for at in tokens):
        return found
    dropped = -1
    for at in tokens:
        if at <= dropped:
            continue
        if outline.keyword(at) == "coalesce" and outline.text(at + 1) == b"(":
            # Only its first argument counts.
            dropped = outline.closing(at + 1)
            at += 2
        if is_column(outline, at):
            found.append(at)
    return found


def items_in_from(outline: Outline, first: int, end: int) -> int:
    """The number of tables and the like, at least one."""
    commas = sum(outline.text(at) == b"," for at in outline.outermost(first) if at < end)
    joins = [at for at in own(outline, first, end - 1) if outline.keyword(at) == "join"]
    if any(
        outline.text(at) == b")" and outline.keyword(at + 1) == "as" for at in range(first, end)
    ):
        # USING (…) AS x names no table.
        joins += joins
    return 1 + commas + len(joins)


def is_merged(outline: Outline, select: int, *, several: bool) -> bool:
    """Whether the planner could pull up a subquery in FROM, so that the call depends on less than a
    row of it: a column is constant, or a row comes from several tables. ``several``: FROM has other
    items."""
    if outline.keyword(select - 2) in _IN_CONDITIONS:
        return False
    first = outline.after_select(select)
    level = list(outline.outermost(first))
    end = outline.closing(select - 1) if outline.text(select - 1) == b"(" else max(level)
    if any(outline.keyword(at) in _KEEPS for at in level):
        return False
    from_ = from_of(outline, select)
    if from_ is None:
        return several
    if any(at > from_ and outline.text(at) == b"," for at in level) or any(
        outline.keyword(at) == "join"
        or (outline.keyword(at) in _JOINED and outline.text(at + 1) == b"(")
        for at in own(outline, from_, end)
    ):
        return True
    return not all(
        outline.text(last) == b"*" or columns_in(outline, start, last)
        for start, last in outline.list_items(first, from_)
    )


def _uses_field(call: Call) -> bool:
    """Whether an argument of the call, or of one in it, is a field of another call's result."""
    return any(
        isinstance(argument.value, FieldOf)
        or (isinstance(argument.value, Call) and _uses_field(argument.value))
        for argument in call.arguments
    )
