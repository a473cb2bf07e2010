"""A second opinion on select lists: what we serve, sqlglot reads in the same way.

Our reader looks at commas and clause words alone, in linear time; sqlglot knows the grammar, and
takes time exponential in some texts. So it judges here, on short statements, and reads nothing that
clients send.
"""

from __future__ import annotations

import logging

import pytest
import sqlglot
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sqlglot import exp

from proxy.statements.plan import ScalarPlan
from tests.support.examples import examples
from tests.support.sql import analyze

# It warns of statements that it does not know.
logging.getLogger("sqlglot").setLevel(logging.CRITICAL)

CALL = "pg_background_launch('SELECT 1')"
CALLS = (
    CALL,
    "PG_Background_Launch(format('VACUUM %I', relname), 65536)",
    "pg_background_detach(pid)",
    "pg_background_launch($1)",
    "pg_background_launch(CASE WHEN a IN (1, 2) THEN 'x' ELSE 'y' END)",
)
OTHERS = (
    *("1", "'a, b'", "NULL", "a", "t.a", "$1", "count(*)", "a + 1", "- a", "a || 'x'", "a::text"),
    *("(a, b)", "ARRAY[1, 2]", "f(a, b)", "a IS DISTINCT FROM b", "a IS NOT DISTINCT FROM b"),
    *("CASE WHEN a = 1 THEN b ELSE c END", "a BETWEEN 1 AND 2", "a IN (1, 2)", "NOT a", '"from"'),
    *("(SELECT a FROM t ORDER BY 1)", "extract(year FROM a)", "EXISTS (SELECT 1)", "a AND b OR c"),
    *("substring(a FROM 1 FOR 2)", "trim(both ' ' FROM a)", "sum(a) FILTER (WHERE b)", "a[1]"),
    *("sum(a) OVER (PARTITION BY b ORDER BY c)", "CAST(a AS numeric(10, 2))", "a COLLATE x", "*"),
    *("percentile_cont(0.5) WITHIN GROUP (ORDER BY a)", "a AT TIME ZONE 'UTC'", "t.*", "(a).b"),
    *(f"{CALL} + 1", f"1 + {CALL}", f"f({CALL})", f"(SELECT {CALL})", f"{CALL}::text", f"- {CALL}"),
    *(f"CASE WHEN true THEN {CALL} END", f"{CALL} IS NULL", f"{CALL} IN (1)", f"ARRAY[{CALL}]"),
)
LABELS = ("", " AS x", " y", ' AS "a, b"', ' "from"', " AS from_", " AS where_")
TAILS = (
    *("", " FROM t", " FROM t, u", " FROM t JOIN u ON t.a = u.a", " FROM t LEFT JOIN u USING (a)"),
    *(" FROM (SELECT 1 AS a) t", " FROM f(1, 2) AS t (a, b)", " FROM t WHERE a IN (SELECT 1)"),
    *(" FROM t ORDER BY a, b DESC", " FROM t ORDER BY 1", " FROM t ORDER BY x", " LIMIT 1"),
    *(" FROM t LIMIT 1 OFFSET 2", " FROM t GROUP BY a", " FROM t GROUP BY a HAVING true"),
    *(" UNION SELECT 1", " FROM t FOR UPDATE", " FETCH FIRST 1 ROW ONLY", " WHERE a IS NOT NULL"),
    *(" FROM t WINDOW w AS (ORDER BY a)", " INTO z", " FROM t WHERE a BETWEEN 1 AND 2", ";"),
)
HEADS = (
    *("SELECT ", "select ", "SELECT ALL ", "SELECT DISTINCT ", "SELECT DISTINCT ON (a) "),
    *("WITH w AS (SELECT 1) SELECT ", "WITH w AS (SELECT 1), v (x) AS (SELECT 2) SELECT "),
    *("EXPLAIN SELECT ", "/* SELECT */ SELECT "),
)
FUNCTIONS = {"pg_background_launch", "pg_background_detach"}


def _is_call(node: exp.Expr) -> bool:
    return isinstance(node, exp.Anonymous) and node.name.lower() in FUNCTIONS


def second_opinion(sql: str) -> tuple[list[int], int, bool] | None:
    """Which items of the select list are calls, how many items there are, and whether one is a
    star; None if it is not one plain SELECT, or if a call stands elsewhere too."""
    tree = sqlglot.parse_one(sql, dialect="postgres")
    plain = {"expressions", "with_", "from_", "joins", "laterals", "where", "order", "limit"}
    if type(tree) is not exp.Select:
        return None
    if any(value and clause not in {*plain, "offset"} for clause, value in tree.args.items()):
        return None
    items = [item.this if isinstance(item, exp.Alias) else item for item in tree.expressions]
    calls = [place for place, item in enumerate(items) if _is_call(item)]
    if len(calls) != sum(_is_call(node) for node in tree.walk()):
        return None
    has_star = any(
        isinstance(item, exp.Star) or (isinstance(item, exp.Column) and item.is_star)
        for item in items
    )
    return calls, len(items), has_star


def check(sql: str) -> bool:
    """Compare the two; whether the statement is served."""
    plan = analyze(sql.encode())
    if not isinstance(plan, ScalarPlan) or plan.in_from:
        return False
    opinion = second_opinion(sql)
    assert opinion is not None, f"sqlglot does not see a plain select list: {sql}"
    calls, count, has_star = opinion
    found = [column.index % count if has_star else column.index for column in plan.columns]
    assert sorted(found) == calls, sql
    assert plan.width == (None if has_star else count), sql
    return True


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tail", TAILS)
def test_heads_and_tails(head: str, tail: str) -> None:
    served = [check(f"{head}{item}{tail}") for item in (CALL, f"1, {CALL} AS x, a")]
    if head != "EXPLAIN SELECT " and "DISTINCT" not in head and tail in ("", " FROM t", ";"):
        assert all(served)


@pytest.mark.parametrize("other", OTHERS)
def test_items(other: str) -> None:
    for label in LABELS:
        for sql in (f"SELECT {other}{label}, {CALL}", f"SELECT {CALL}, {other}{label} FROM t"):
            try:
                sqlglot.parse_one(sql, dialect="postgres")
            except sqlglot.ParseError:
                continue
            check(sql)


@settings(max_examples=examples(1000))
@given(
    st.sampled_from(HEADS),
    st.lists(st.tuples(st.sampled_from(CALLS + OTHERS), st.sampled_from(LABELS)), min_size=1),
    st.sampled_from(TAILS),
)
def test_random_statements(head: str, items: list[tuple[str, str]], tail: str) -> None:
    assume(len(items) <= 8)
    sql = head + ", ".join(item + label for item, label in items) + tail
    try:
        sqlglot.parse_one(sql, dialect="postgres")
    except sqlglot.ParseError:
        return
    check(sql)
