"""Which pg_background calls a statement makes, and the stand-in that the server gets for it.

The server never sees our functions. Where a call stands it gets a stand-in: an expression that
evaluates and type-checks the call's arguments and returns them as one text[] literal. So errors
in arguments, parameter types, Describe, portals and failed transactions are the server's own.

Invariant: **a statement is served only if its stand-in does what the statement would have done**.
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

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from proxy.api.functions import FUNCTIONS, Function
from proxy.sql.lexer import Kind
from proxy.sql.tokens import NotRecognizedError, Tokens
from proxy.statements.from_item import from_item, from_subquery, lone_item, subquery, view
from proxy.statements.lateral import last_in_from, with_lateral
from proxy.statements.outline import Outline
from proxy.statements.plan import Plan, ResultPlan
from proxy.statements.select_list import select_items


def analyze(
    statement: Tokens,
    functions: Mapping[str, tuple[Function, ...]] = FUNCTIONS,
    *,
    voids: Collection[int] = (),
) -> Plan | None:
    """How to serve a statement; None: it makes no call that we serve, and passes as it is.

    Args:
        statement: one, as the session's server reads it.
        functions: what there is to call in the database's version of the API.
        voids: the numbers of the parameters that are declared to be of type void.
    """
    outline = Outline(statement, functions, voids)
    if outline.keyword(0) not in ("select", "with", "table"):
        return None
    try:
        plan = _plan(outline)
    except NotRecognizedError:
        return None
    return replace(plan, has_no_side_effects=_has_no_side_effects(outline, plan))


def _plan(outline: Outline) -> Plan:
    sites = outline.sites()
    if not sites:
        return view(outline)
    if outline.keyword(0) not in ("select", "with"):
        raise NotRecognizedError("not a query")
    if (lateral := last_in_from(outline, sites[-1])) is not None:
        return with_lateral(outline, lateral)
    if len(sites) == 1:
        [site] = sites
        if outline.keyword(site.first - 1) == "from":
            return from_item(outline, site)
        if site.call.function.returns_set:
            return lone_item(outline, site)
        if (opening := subquery(outline, site)) is not None:
            return from_subquery(outline, site, opening)
    return select_items(outline, sites)


# Operators that are found in pg_catalog, and have no side effects there; ``*`` is no operator here.
_OPERATORS: Final = frozenset((b"*", b"||", b"+", b"-"))


def _has_no_side_effects(outline: Outline, plan: Plan) -> bool:
    """Whether the server evaluates constants and parameters only: in the whole statement, or in a
    function's arguments if that stands in FROM, where nothing else is evaluated.

    For what is not certain at a glance the answer is no, which costs a round trip.
    """
    tokens = range(len(outline.texts))
    if isinstance(plan, ResultPlan):
        if sites := outline.sites():
            tokens = range(sites[0].first, sites[0].last + 1)
    elif any(text.lower() == b"from" for text in outline.texts):
        return False
    opened = 0
    for index in tokens:
        text = outline.texts[index]
        opened += text == b"("
        if outline.tokens[index].kind is Kind.OPERATOR and text not in _OPERATORS:
            return False
    return opened == len(outline.ours)
