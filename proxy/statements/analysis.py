"""Finds the pg_background calls in a statement, and makes the stand-in that the server gets.

The server never sees our functions. In place of a call it gets an expression that evaluates and
type-checks the call's arguments and returns them as one text[] literal. So errors in arguments,
parameter types, Describe, portals and failed transactions are the server's own.

Invariant: **a statement is served only if its stand-in does what the statement would have done**.
What is not recognised for certain gives None, and passes unchanged. SQL is edited by source span,
between tokens of our exact lexer; nothing is ever printed from a syntax tree.

These shapes are served:

- *calls as items of the select list* of one plain SELECT, or one or all fields of their results
  (``(call).*``). Only the words that begin the clauses, and the commas between items, at the
  outermost level matter; everything else is free;
- *a function or view alone in FROM*, with plain output columns;
- *a call alone in a subquery that is alone in FROM*, with plain output columns or fields;
- *a call as the last item of FROM*, made for each row of the others, with its results as plain
  columns or as arguments of calls in the select list;
- *pg_background_result alone in the select list*.

All are read from the tokens, in linear time: finding the end of an item takes no grammar. What the
grammar forbids, the server reports for the stand-in too.
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
    """How to serve a statement; None if it has no call that we serve and passes unchanged.

    Args:
        statement: one statement, as the session's server reads it.
        functions: those in the database's version of the API.
        voids: the numbers of the parameters of type void.
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


# Operators in pg_catalog without side effects; ``*`` can only be a star here.
_OPERATORS: Final = frozenset((b"*", b"||", b"+", b"-"))


def _has_no_side_effects(outline: Outline, plan: Plan) -> bool:
    """Whether the server evaluates constants and parameters only: in the whole statement, or, for a
    function in FROM, in its arguments, since nothing else is evaluated there.

    When in doubt the answer is no, which costs a round trip.
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
