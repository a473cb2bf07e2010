"""Statements: what is served and what is not, and that a stand-in does what the call would do.

For the latter the test database has real functions of our names. Each statement runs there as it
is; then its stand-in runs, the calls are made here from what it returned, and both must give the
same columns, rows and errors.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import pq
from psycopg.errors import Diagnostic

from proxy.api.functions import (
    BOOL,
    FLOAT8,
    FUNCTIONS,
    HANDLE,
    INT4,
    INT8,
    JSONB,
    OID,
    RECORD,
    REQUIRED,
    TEXT,
    TIMESTAMPTZ,
    VIEWS,
    VOID,
    Function,
    Parameter,
    Type,
    catalog,
)
from proxy.jobs.progress import parse_progress, progress_statement
from proxy.sql.lexer import LexError, split
from proxy.sql.rewrite import Rewrite
from proxy.statements.plan import (
    Call,
    FieldOf,
    ItemOutput,
    Output,
    Plan,
    ResultPlan,
    ScalarPlan,
)
from proxy.statements.standin import complaint
from tests.support.examples import examples
from tests.support.servers import Connection, Server, database
from tests.support.sql import analyze

pytestmark = pytest.mark.every_server


def plan(sql: str) -> Plan | None:
    return analyze(sql.encode())


def scalar(sql: str) -> ScalarPlan:
    found = plan(sql)
    assert isinstance(found, ScalarPlan)
    return found


def result(sql: str) -> ResultPlan:
    found = plan(sql)
    assert isinstance(found, ResultPlan)
    return found


# --- what is served -------------------------------------------------------------------------

SERVED = [
    "SELECT pg_background_launch('SELECT 1')",
    "SELECT pg_background_launch('a'), pg_background_launch('b', 100) AS b;",
    "select all PG_Background_Launch('a') pid",
    "SELECT(pg_background_launch('a'))FROM t",
    'SELECT "pg_background_launch"(\'a\')AS"p"FROM t',
    "SELECT((pg_background_launch('a')))x, i, t.* FROM t",
    "SELECT *, pg_background_launch(q) FROM t",
    "SELECT (t.*), pg_background_launch(q) FROM t",
    "SELECT t.* AS x, pg_background_launch(q), 1 FROM t",
    "SELECT (t).*, pg_background_launch(q) FROM t WHERE i > 1",
    "SELECT count(*), pg_background_launch('a') FROM t",
    "SELECT pg_background_launch(string_agg(q, '; ')) FROM t",
    "SELECT pg_background_launch(unnest(ARRAY['a', NULL, 'ccc'])), generate_series(1, 2)",
    "SELECT pg_background_launch(NULL), pg_background_launch('a', NULL)",
    "SELECT public.pg_background_launch('a')",
    "SELECT pg_background_launch(sql => 'a', queue_size => 7)",
    "SELECT pg_background_launch(queue_size := 7, sql := 'a')",
    "SELECT pg_background_launch('a', queue_size => 7)",
    "SELECT pg_background_launch($$a'b$$, (SELECT max(i) FROM t)) -- ends so",
    "SELECT pg_background_launch(E'a\\'b' -- (\n, /* ) */ 7 -- here\n) -- there\n AS x",
    "SELECT pg_background_launch('a'\n'b')",
    "SELECT pg_background_launch(q::varchar(3), i::smallint) FROM t LIMIT 2",
    "SELECT pg_background_launch(CASE WHEN i > 1 THEN 'a' ELSE 'bb' END) FROM t ORDER BY i DESC",
    "SELECT i, pg_background_launch(q) AS p FROM t ORDER BY 1 DESC, q",
    "SELECT i, pg_background_launch(q) AS p FROM t ORDER BY i + 1, lower(q) NULLS FIRST LIMIT 1",
    "SELECT i, pg_background_launch(q) AS a FROM t ORDER BY lower(q), (SELECT i) LIMIT (2)",
    "SELECT i, pg_background_launch(q) FROM t FETCH FIRST ROW ONLY",
    'SELECT i AS order, "lower"(\'2\'), pg_background_launch(q), "abs"(0) FROM t',
    'SELECT pg_background_launch(q) FROM t ORDER BY "abs"(0), i',
    "SELECT pg_background_launch(format('VACUUM %I', relname)) FROM pg_class"
    " WHERE relname ~~ 'pg_a%' AND relkind = 'r' ORDER BY relname",
    "SELECT pg_background_launch(a.q) FROM t a JOIN t b USING (i), LATERAL (SELECT 1) c(x)"
    " WHERE b.i IN (1, 2) AND EXISTS (SELECT 1)",
    "WITH x(a) AS (SELECT 'a'::text) SELECT pg_background_launch(a) FROM x",
    "WITH x AS (INSERT INTO t VALUES (9, 'nine') RETURNING q)"
    " SELECT pg_background_launch(q) FROM x",
    "SELECT pg_background_launch('a') WHERE false",
    "SELECT pg_background_detach(1)",
    "SELECT pg_background_detach(pg_background_launch('a'))",
    "SELECT pg_background_detach((pg_background_launch(sql => q))) d FROM t",
    "SELECT pg_background_launch('a', queue_size => pg_background_launch('b', 5))",
    "SELECT grant_pg_background_privileges('r')",
    "SELECT grant_pg_background_privileges('r', true) AS g",
    "SELECT revoke_pg_background_privileges('r', print_commands => i > 1) FROM t",
    "SELECT * FROM pg_background_launch('a')",
    "SELECT * FROM pg_background_launch('a') AS pid",
    "SELECT pid AS p FROM pg_background_launch('a') pid;",
    "SELECT t.pid FROM pg_background_launch('a') AS t(pid)",
    "SELECT pg_background_launch FROM public.pg_background_launch('a', 7)",
    "SELECT * FROM pg_background_detach(pg_background_launch('a'))",
    "SELECT * FROM grant_pg_background_privileges('r', true) AS ok",
    "SELECT * FROM pg_background_result(1) AS (a int, b text, c numeric(5,1))",
    "SELECT*FROM pg_background_result(1)AS(a int,b text,c numeric(5,1))",
    "SELECT * FROM pg_background_result(1) AS t(a int, b text, c numeric(5,1));",
    "SELECT t.* FROM pg_background_result(1) t(a int, b text, c numeric(5,1))",
    "SELECT b AS x, t.a, c y FROM pg_background_result(1) t(a int, b text, c numeric(5,1)) -- x",
    'SELECT "B b", *, t."a" FROM pg_background_result(1) "t"(a int, "B b" text, c numeric(5,1))',
    "SELECT pg_background_result.b FROM pg_background_result(1) AS (a int, b text, c numeric(5,1))",
    "SELECT a FROM pg_background_result(pg_background_launch('a'))"
    " AS t(a int, b text, c numeric(5,1))",
    "SELECT b FROM pg_background_result(pid => (SELECT 1)) AS t(a int, b text, c numeric(5,1))",
    # Without arguments.
    "SELECT pg_background_purge()",
    "SELECT pg_background_purge(/* ) */) AS n, i, pg_background_cancel_all_v2 ( ) FROM t",
    "SELECT*FROM pg_background_purge()",
    "SELECT n FROM public.pg_background_detach_all() AS n",
    "SELECT pg_background_detach(pg_background_purge())",
    # Overloads.
    "SELECT pg_background_launch('a', 1, 'label'), pg_background_launch('a', 1)",
    "SELECT pg_background_launch('a', label => 'l', queue_size => NULL)",
    "SELECT pg_background_detach(1, 2), pg_background_detach(2)",
    "SELECT pg_background_detach(1, cookie => i) FROM t",
    "SELECT pg_background_wait(1, 2), pg_background_wait(1, 5000000000, 3)",
    "SELECT pg_background_wait(timeout_ms => 5, pid := 1, cookie => -5000000000)",
    "SELECT pg_background_wait_v2(1, '7'), pg_background_wait_v2(1, NULL)",
    "SELECT pg_background_full_sql(1, 2::smallint), pg_background_status_v2(1, 2)",
    "SELECT pg_background_cancel_by_label('a%')",
    "SELECT * FROM pg_background_result(1, 2) AS t(a int, b text, c numeric(5,1))",
    "SELECT c FROM pg_background_run_query('a', timeout_ms => 5) AS t(a int, b text, c numeric)",
    # Records.
    "SELECT pg_background_launch_v2('a b')",
    "SELECT i, pg_background_launch_v2(q) AS h FROM t ORDER BY i",
    "SELECT *, pg_background_launch_v2(q), 1 FROM t",
    "SELECT pg_background_run('x'), ((pg_background_stats())) s",
    "SELECT (pg_background_launch_v2('VACUUM t', 0, 'nightly')).*",
    "select((pg_background_launch_v2(q))).*, i from t",
    "SELECT i, (pg_background_launch_v2(q)).*, q FROM t u ORDER BY u.i DESC LIMIT 2",
    "SELECT (pg_background_launch_v2(NULL)).*, (pg_background_launch_v2('a', NULL)).pid",
    "SELECT 1, (public.pg_background_outcome(1, 2)).*, 2, (pg_background_stats_v2()).* FROM t",
    "SELECT (pg_background_run(sql => q, label => 'x')).* FROM t WHERE i < 3",
    "SELECT (pg_background_launch_v2('a')).pid",
    "SELECT ((pg_background_launch_v2('a')) . /* the */ pid),"
    " (((pg_background_stats()).max_workers)) m",
    'SELECT (pg_background_launch_v2(q)).cookie AS "C c", i c, (pg_background_purge()) FROM t',
    'SELECT (pg_background_launch_v2(q))./**/"pid" isnull_, i FROM t ORDER BY 2',
    "SELECT (pg_background_launch_v2('a')).pid -- here\n AS p -- there",
    "SELECT (pg_background_error_info(1, 2)).detail, (pg_background_error_info(1, 2)).context",
    "SELECT (pg_background_wait_any('{}')).*, count(*) FROM t",
    # A subquery.
    "SELECT (h).pid AS p, (h).cookie AS c"
    " FROM (SELECT pg_background_launch_v2('SELECT 1', 65536) AS h) s",
    "SELECT(h).pid,(s.h).cookie,h,s.h FROM(SELECT pg_background_launch_v2('a')h)s",
    "SELECT ALL *, s.*, (h).*, (s.h).*, h x, s.h AS y, (h).pid z -- here\n"
    " FROM (SELECT ALL (pg_background_launch_v2('a')) AS h) AS s -- there",
    "SELECT (pg_background_stats).max_workers FROM (SELECT pg_background_stats()) s;",
    "SELECT (X).pid FROM (SELECT pg_background_launch_v2(unnest(ARRAY['a', 'bc', NULL]))) s(x)",
    'SELECT "s S"."h h", ("s S"."h h")."pid" FROM (SELECT pg_background_run(\'a\') "h h") "s S"',
    "SELECT h, (h).cookie, h.h, (h.h).* FROM (SELECT pg_background_launch_v2('a') AS h) h",
    "SELECT n, s.n AS m, * FROM (SELECT pg_background_purge() n) s",
    "SELECT d FROM (SELECT pg_background_detach(pg_background_launch(max('a'))) d) s",
    # Records in FROM.
    "SELECT * FROM pg_background_launch_v2('a') AS h",
    "SELECT*FROM pg_background_launch_v2('a')",
    "SELECT pid, cookie FROM pg_background_launch_v2('a', 5)",
    "SELECT h.pid AS p, cookie c, h.*, * FROM pg_background_launch_v2('a') h -- x",
    "SELECT * FROM pg_background_launch_v2('a') AS h(p, c)",
    "SELECT p, h.p, cookie, h.cookie AS p FROM public.pg_background_launch_v2('a') AS h(p)",
    "SELECT h.*, c, p AS q FROM pg_background_launch_v2('a') h (\"p\", C)",
    "SELECT cookie, pid FROM pg_background_launch_v2('a') AS h(cookie, pid)",
    "SELECT (h).pid, (h).*, (h).cookie AS c FROM pg_background_launch_v2('a') h",
    "SELECT * FROM pg_background_launch_v2(NULL)",
    "SELECT pg_background_outcome.state, completed FROM pg_background_outcome(1, 2);",
    "SELECT workers_active FROM pg_background_stats()",
    "SELECT * FROM pg_background_run('a', label => 'l') r",
    "SELECT * FROM pg_background_list_all()",
    "SELECT l.pid, state, label AS l FROM pg_background_list_all() AS l",
    "SELECT * FROM pg_background_list_v2() AS (pid int4, cookie int8, launched_at timestamptz,"
    " user_id oid, queue_size int4, state text, sql_preview text, last_error text, consumed bool)",
    "SELECT label, l.pid, * FROM pg_background_list() AS l(pid int4, cookie int8, launched_at"
    " timestamptz, user_id oid, queue_size int4, state text, sql_preview text, last_error text,"
    " consumed bool, label text)",
    # Handles.
    "SELECT * FROM pg_background_drain(ARRAY[ROW(1, 2)::pg_background_handle])",
    "SELECT pid, state FROM pg_background_drain_v2(ARRAY[(1, 2), (3, 4)]"
    "::pg_background_handle[], 5)",
    'SELECT * FROM pg_background_drain(\'{"(1,2)","(3,-4)"}\')',
    "SELECT * FROM pg_background_drain('{\"(1,2)\"}'::public . pg_background_handle[]) d",
    'SELECT * FROM pg_background_drain(CAST(\'{}\' AS "public"."pg_background_handle" []))',
    "SELECT * FROM pg_background_drain(NULL)",
    "SELECT pg_background_wait_any(NULL, 5), pg_background_wait_any('{NULL}')",
    "SELECT pg_background_wait_any(ARRAY['(1,2)'::pg_background_handle, NULL,"
    " CAST((5, i) AS PG_Background_Handle)]) FROM t",
    "SELECT pg_background_wait_any(NULL::pg_background_handle[] || ROW(i, 2)::pg_background_handle)"
    " FROM t",
    "SELECT (pg_background_wait_any(timeout_ms => i, handles =>"
    " (SELECT array_agg((i, i * 2)::pg_background_handle ORDER BY i) FROM t))).* FROM t ORDER BY i",
    "SELECT pg_background_wait_any(ARRAY[]::pg_background_handle ARRAY)",
    "SELECT pg_background_wait_any(ARRAY(SELECT x::pg_background_handle FROM (SELECT '(1,2)'::text)"
    " AS pg_background_handle(x)))",
    # Views.
    "SELECT * FROM pg_background_list",
    "select*from public.pg_background_list;",
    'SELECT pid, "cookie" AS c, l.state s, l.* FROM "pg_background_list" AS l -- x',
    "SELECT a, cookie, l.a AS b, * FROM pg_background_list l(a)",
    "SELECT pg_background_activity.pgbg_state, query FROM pg_background_activity",
    "SELECT (l).pid, (l).* FROM PG_Background_List l",
    "TABLE pg_background_list",
    "table public.pg_background_activity;",
    # The last item of FROM.
    "SELECT l.pid, pg_background_wait_v2_timeout(l.pid, l.cookie, 60000) FROM pg_tables t,"
    " LATERAL pg_background_launch_v2(format('ANALYZE %I', tablename), 0, 'a-' || tablename) l"
    " WHERE schemaname = 'public' LIMIT 1;",
    "SELECT l.* FROM t, pg_background_launch_v2(q) AS l",
    "select all l.cookie c,l.*,T.i AS pid,L.pid FROM t,pg_background_launch_v2(t.q)l WHERE i>1",
    "SELECT(pg_background_detach(l.pid))FROM(VALUES('a'),('bc'))v(q),pg_background_launch_v2(q)l",
    'SELECT "L l".p AS "P p", \'x\', "L l"."Q q" -- here\n FROM t CROSS JOIN LATERAL'
    ' public.pg_background_launch_v2(q -- there\n , i) "L l"(p, "Q q") -- ends',
    "SELECT l.pid, i FROM t JOIN pg_background_launch_v2(q) l ON true WHERE q IS NOT NULL",
    "SELECT l.pid FROM t u INNER JOIN LATERAL pg_background_launch_v2(u.q) l ON TRUE",
    "SELECT l.pid, a.i, b.q x FROM t a JOIN t b USING (i), pg_background_launch_v2(a.q || b.i) l",
    "SELECT l.pid, r FROM (SELECT 'a' q, i AS r FROM t ORDER BY i) s, pg_background_launch_v2(q) l",
    "SELECT l.pid FROM t a, t b CROSS JOIN pg_background_launch_v2(concat(a.q, b.q)) l",
    "SELECT l.pid, i FROM generate_series(1, 4) i, pg_background_launch_v2('a' || i) l",
    "SELECT l.pid FROM (SELECT q FROM t WHERE i IS NOT NULL) s, pg_background_launch_v2(q) l",
    "SELECT l.pid FROM (SELECT unnest(ARRAY['a', 'a', 'a'])) s(q), pg_background_launch_v2(q) l",
    "WITH x(a) AS (SELECT q FROM t) SELECT l.pid FROM x, pg_background_launch_v2(a) l",
    "WITH x AS (INSERT INTO t VALUES (9, 'nine') RETURNING q)"
    " SELECT l.pid FROM x, pg_background_launch_v2(q) l",
    "SELECT i, (pg_background_outcome(l.pid, l.cookie)).*, (pg_background_stats()).max_workers m,"
    " pg_background_purge(), pg_background_launch_v2(format('%s', i)), 'x' || q AS y"
    " FROM t, LATERAL pg_background_submit(q, i, NULL) l",
    "SELECT pg_background_wait(cookie => l.c, timeout_ms => i, pid := l.p) w,"
    " pg_background_detach(pg_background_launch('b')) FROM t, pg_background_launch_v2(q) l(p, c)",
    "SELECT (((pg_background_error_info(l.pid, l.cookie)).detail)) FROM t,"
    " pg_background_launch_v2(queue_size => i, sql => coalesce(q, 'x')) l"
    " WHERE q LIKE 't%' OR i = 2",
    "SELECT l.pid, (SELECT max(i) FROM t u WHERE u.i < t.i) m, CASE WHEN i = 1 THEN q END"
    " FROM t, pg_background_launch_v2(q) l FETCH FIRST 2 ROWS ONLY",
    "SELECT o.state FROM t, pg_background_outcome(i, i) o",
    "SELECT l.pid FROM t, pg_background_launch_v2(q) l"
    " WHERE i > (SELECT min(i) FROM t) AND now() < now() + i * '1s'::interval LIMIT ALL",
    # There, alone.
    "SELECT pid, cookie, pg_background_wait(pid, l.cookie) FROM pg_background_launch_v2('a') l",
    "SELECT 1, pg_background_purge(), l.* FROM LATERAL pg_background_launch_v2(NULL) l LIMIT 1",
    "SELECT l.pid p, now() = now() FROM LATERAL pg_background_launch_v2('a') AS l WHERE false",
]


@pytest.mark.parametrize("sql", SERVED)
def test_served(sql: str) -> None:
    assert plan(sql) is not None


@pytest.mark.parametrize(
    "sql",
    [
        # Mentions that are not calls.
        "SELECT 'pg_background_launch(1)'",
        "SELECT 1 -- pg_background_launch('a')",
        "SELECT pg_background_launch FROM t",
        "SELECT \"pg_background_launch('a')\"",
        "SELECT * FROM pg_background_launch",
        "SELECT $$pg_background_launch('a')$$",
        "SELECT pg_background_other('a')",
        "SELECT \"PG_BACKGROUND_LAUNCH\"('a')",
        "SELECT 1 FROM t pg_background_launch(a, b)",
        "WITH pg_background_launch(a) AS (SELECT 1) SELECT a FROM pg_background_launch",
        "CREATE FUNCTION pg_background_launch(a text) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP FUNCTION pg_background_launch(text, int)",
        "GRANT EXECUTE ON FUNCTION pg_background_launch(text, int) TO alice",
        # Calls where they are not served.
        "SELECT pg_background_launch('a') + 1",
        "SELECT 1 + pg_background_launch('a')",
        "SELECT - pg_background_launch('a')",
        "SELECT @@@ pg_background_launch('a')",
        "SELECT pg_background_launch('a')::text",
        "SELECT CAST(pg_background_launch('a') AS text)",
        "SELECT pg_background_launch('a') IS NULL",
        "SELECT pg_background_launch('a') ISNULL",
        "SELECT pg_background_launch('a') NOTNULL",
        "SELECT pg_background_launch('a') IN (1, 2)",
        "SELECT pg_background_launch('a') BETWEEN 1 AND 2",
        "SELECT pg_background_launch('a') COLLATE \"C\"",
        "SELECT pg_background_launch('a') AT TIME ZONE 'UTC'",
        "SELECT pg_background_launch('a') OPERATOR(pg_catalog.+) 1",
        "SELECT pg_background_launch('a') OVER ()",
        "SELECT pg_background_launch('a') FILTER (WHERE true)",
        "SELECT pg_background_launch('a') !",
        "SELECT (pg_background_launch('a')).*",
        "SELECT ARRAY[pg_background_launch('a')]",
        "SELECT (pg_background_launch('a'), 1)",
        "SELECT max(pg_background_launch(q)) FROM t",
        "SELECT coalesce(1, pg_background_launch('a'), 2)",
        "SELECT CASE WHEN true THEN pg_background_launch('a') END",
        "SELECT CASE pg_background_launch('a') WHEN 1 THEN 2 END",
        "SELECT (SELECT pg_background_launch('a'))",
        "SELECT 1 WHERE pg_background_launch('a') > 0",
        "SELECT 1 FROM t ORDER BY pg_background_launch(q)",
        "SELECT 1 LIMIT pg_background_launch('a')",
        "SELECT 1 FROM (SELECT pg_background_launch('a')) x",
        "SELECT pg_background_launch('a') FROM (SELECT pg_background_launch('a')) x",
        "WITH x AS (SELECT pg_background_launch('a')) SELECT * FROM x",
        "WITH x AS (SELECT 1) INSERT INTO t SELECT pg_background_launch('a')",
        "SELECT DISTINCT pg_background_launch('a')",
        "SELECT DISTINCT ON (i) pg_background_launch('a'), i FROM t",
        "SELECT pg_background_launch('a') FROM t GROUP BY i",
        "SELECT pg_background_launch('a') HAVING true",
        "SELECT pg_background_launch('a'), sum(i) OVER w FROM t WINDOW w AS ()",
        "SELECT pg_background_launch('a') UNION ALL SELECT 1",
        "SELECT 1 UNION SELECT pg_background_launch('a')",
        "(SELECT pg_background_launch('a'))",
        "SELECT pg_background_launch('a') INTO x",
        "SELECT pg_background_launch('a') FROM t FOR UPDATE",
        "SELECT pg_background_launch('a') FROM t OFFSET 1",
        "SELECT pg_background_launch('a') FROM t LIMIT 1 OFFSET 1",
        "SELECT pg_background_launch('a') LIMIT 1, 2",
        "SELECT *, pg_background_launch('a'), * FROM t",
        "SELECT (t.*), pg_background_launch('a'), t.* FROM t",
        "VALUES (pg_background_launch('a'))",
        "EXPLAIN SELECT pg_background_launch('a')",
        "PREPARE x AS SELECT pg_background_launch('a')",
        "DECLARE c CURSOR FOR SELECT pg_background_launch('a')",
        "CREATE TABLE x AS SELECT pg_background_launch('a')",
        "CREATE VIEW x AS SELECT pg_background_launch('a')",
        "INSERT INTO t SELECT pg_background_launch('a')",
        "COPY (SELECT pg_background_launch('a')) TO STDOUT",
        "DO 'BEGIN PERFORM pg_background_launch(''a''); END'",
        "CALL pg_background_launch('a')",
        "DELETE FROM t USING pg_background_launch('a')",
        "SELECT extract(year FROM pg_background_launch('a'))",
        "SELECT 1 IS DISTINCT FROM pg_background_launch('a')",
        "SELECT pg_background_launch('a'); SELECT 1",
        # A sort by the call.
        "SELECT pg_background_launch(q) FROM t ORDER BY 1",
        "SELECT pg_background_launch(q) FROM t ORDER BY (1)",
        "SELECT pg_background_launch(q) FROM t ORDER BY 01",
        "SELECT *, pg_background_launch(q) FROM t ORDER BY 3",
        "SELECT pg_background_launch(q) AS p FROM t ORDER BY p",
        'SELECT pg_background_launch(q) AS p FROM t ORDER BY i, ("p") DESC',
        "SELECT pg_background_launch(q) FROM t ORDER BY pg_background_launch",
        "SELECT pg_background_launch(q) AS é FROM t ORDER BY É",
        f"SELECT pg_background_launch(q) AS {'p' * 63} FROM t ORDER BY {'p' * 70}",
        'SELECT pg_background_launch(q) AS p FROM t ORDER BY U&"p"',
        # Arguments.
        "SELECT pg_background_launch()",
        "SELECT pg_background_launch('a', 1, 'b', 2)",
        "SELECT pg_background_launch('a', nosuch => 1)",
        "SELECT pg_background_launch('a', sql => 'b')",
        "SELECT pg_background_launch(sql => 'b', sql => 'b')",
        "SELECT pg_background_launch(queue_size => 1)",
        "SELECT pg_background_launch(sql => 'a', 1)",
        "SELECT pg_background_launch(sql => )",
        "SELECT pg_background_launch('a', )",
        "SELECT pg_background_launch(*)",
        "SELECT pg_background_launch(DISTINCT 'a')",
        "SELECT pg_background_launch(ALL 'a')",
        "SELECT pg_background_launch(VARIADIC ARRAY['a'])",
        "SELECT pg_background_launch('a' ORDER BY 1)",
        "SELECT pg_background_launch('a'",
        "SELECT pg_background_launch('a'])",
        "SELECT pg_background_launch('a' || pg_background_launch('b'))",
        "SELECT pg_background_launch(pg_background_launch('b'))",
        "SELECT pg_background_detach(pg_background_launch('a', pg_background_launch('b')))",
        "SELECT pg_background_detach(pg_background_result(1))",
        "SELECT pg_background_launch('a)",
        # FROM.
        "SELECT * FROM pg_background_launch('a'), t",
        "SELECT * FROM t, pg_background_launch(q)",
        "SELECT * FROM t JOIN LATERAL pg_background_launch(q) ON true",
        "SELECT * FROM ROWS FROM (pg_background_launch('a'))",
        "SELECT * FROM pg_background_launch('a') WITH ORDINALITY",
        "SELECT * FROM pg_background_launch('a') AS t(a, b)",
        "SELECT * FROM pg_background_launch('a') AS t(a int)",
        "SELECT * FROM pg_background_launch('a') AS (pid)",
        "SELECT * FROM pg_background_launch('a') (pid)",
        "SELECT t FROM pg_background_launch('a') AS t(pid)",
        "SELECT pid, pid FROM pg_background_launch('a') AS pid",
        "SELECT 1 FROM pg_background_launch('a')",
        "SELECT FROM pg_background_launch('a')",
        "SELECT * FROM (pg_background_launch('a'))",
        "SELECT * FROM ONLY pg_background_launch('a')",
        "SELECT * FROM pg_background_result(1) AS t(a int) WHERE a > 1",
        "SELECT * FROM pg_background_result(1) AS t(a int) ORDER BY a",
        "SELECT * FROM pg_background_result(1) AS t(a int) LIMIT 1",
        "SELECT * FROM pg_background_result(1) AS t(a int), t",
        "SELECT * FROM pg_background_result(1) AS t(a int) JOIN t u ON true",
        "SELECT * FROM pg_background_result(1) WHERE (a isnull)",
        "SELECT * FROM pg_background_result(1) LIMIT 1",
        "SELECT * FROM pg_background_result(1) UNION SELECT * FROM pg_background_result(2)",
        "SELECT * FROM pg_background_result(1) AS t(a, b)",
        "SELECT * FROM pg_background_result(1) AS t(a int, b)",
        "SELECT * FROM pg_background_result(1) AS t()",
        "SELECT * FROM pg_background_result(1) AS",
        "SELECT * FROM pg_background_result(1) (a int)",
        "SELECT a + 1 FROM pg_background_result(1) AS t(a int)",
        "SELECT count(*) FROM pg_background_result(1) AS t(a int)",
        "SELECT DISTINCT a FROM pg_background_result(1) AS t(a int)",
        "SELECT t FROM pg_background_result(1) AS t(a int)",
        "SELECT t.row_to_json FROM pg_background_result(1) AS t(a int)",
        "SELECT u.a FROM pg_background_result(1) AS t(a int)",
        "SELECT u.a FROM pg_background_result(1) t",
        "SELECT current_user FROM pg_background_result(1) AS t(a int)",
        "SELECT a 'x' FROM pg_background_result(1) AS t(a int)",
        "SELECT t.* AS x FROM pg_background_result(1) AS t(a int)",
        "SELECT a isnull FROM pg_background_result(1) AS t(a int)",
        'SELECT U&"a" FROM pg_background_result(1) AS t(a int)',
        "SELECT a FROM pg_background_result(1) AS t(a int, pg_background_arguments int)",
        "SELECT INTO x * FROM pg_background_result(1) AS t(a int)",
        # pg_background_result as an item.
        "SELECT pg_background_result(1), 2",
        "SELECT pg_background_result(1) FROM t",
        "SELECT pg_background_result(1) WHERE true",
        "SELECT pg_background_result(1) LIMIT 1",
        "SELECT pg_background_result(1) isnull",
        "SELECT pg_background_result(1) AS 'x'",
        "SELECT pg_background_result(1) AS",
        "SELECT DISTINCT pg_background_result(1)",
        "SELECT (pg_background_result(1)).*",
        "SELECT pg_background_result(1), pg_background_result(2)",
        # Records.
        "SELECT pg_background_launch_v2('a').pid",
        "SELECT pg_background_launch_v2('a').*",
        "SELECT (pg_background_launch_v2('a')).nosuch",
        "SELECT (pg_background_launch_v2('a')).PID[1]",
        "SELECT (pg_background_launch_v2('a')).pid.x",
        "SELECT ((pg_background_launch_v2('a')).pid).x",
        "SELECT (pg_background_launch_v2('a')).pid + 1",
        "SELECT (pg_background_launch_v2('a')).pid::text",
        "SELECT - (pg_background_launch_v2('a')).pid",
        "SELECT (pg_background_launch_v2('a')).* AS x",
        "SELECT (pg_background_launch_v2('a')).* x",
        "SELECT ((pg_background_launch_v2('a')).*)",
        "SELECT ((pg_background_launch_v2('a')).*).pid",
        "SELECT (pg_background_launch_v2('a')).* IS NULL",
        "SELECT (pg_background_launch_v2('a'), 1).*",
        "SELECT (SELECT pg_background_launch_v2('a')).pid",
        "SELECT *, (pg_background_launch_v2('a')).* FROM t",
        "SELECT *, (pg_background_launch_v2('a')).pid FROM t",
        "SELECT (pg_background_launch_v2('a')).*, t.* FROM t",
        "SELECT (pg_background_launch_v2('a')).*, i FROM t ORDER BY 3",
        "SELECT i, (pg_background_launch_v2('a')).* FROM t ORDER BY pid",
        "SELECT i, (pg_background_launch_v2('a')).* FROM t ORDER BY pg_background_launch_v2",
        "SELECT i, (pg_background_launch_v2('a')).pid FROM t ORDER BY pid",
        "SELECT i, (pg_background_launch_v2('a')).pid FROM t ORDER BY 2",
        "SELECT i, (pg_background_launch_v2('a')).pid AS x FROM t ORDER BY x",
        "SELECT coalesce((pg_background_launch_v2('a')).pid, 1)",
        "SELECT pg_background_detach((pg_background_launch_v2('a')).pid)",
        "SELECT pg_background_list_v2()",
        "SELECT (pg_background_list_all()).*",
        "SELECT pg_background_drain('{}')",
        "SELECT pg_background_detach(pg_background_launch_v2('a'))",
        "SELECT pg_background_wait_any(ARRAY[pg_background_launch_v2('a')])",
        "SELECT pg_background_purge(1)",
        "SELECT pg_background_purge(*)",
        # A subquery.
        "SELECT 1 FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (h) FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT ((h).pid) FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT s FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (s).h FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT h.pid FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT h.pid FROM (SELECT pg_background_launch_v2('a') AS h) h",
        "SELECT (h).nosuch FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (u.h).pid FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (h).* AS x FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (h).pid + 1 FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT DISTINCT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h) s WHERE true",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h) s, t",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h) s(a, b)",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h) s(h int)",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h, 1) s",
        "SELECT (h).pid FROM (SELECT 1, pg_background_launch_v2('a') AS h) s",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h FROM t) s",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h LIMIT 1) s",
        "SELECT (h).pid FROM ((SELECT pg_background_launch_v2('a') AS h)) s",
        "SELECT (h).pid FROM LATERAL (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT (h).pid FROM t, (SELECT pg_background_launch_v2('a') AS h) s",
        "SELECT p FROM (SELECT (pg_background_launch_v2('a')).pid AS p) s",
        "SELECT pid FROM (SELECT (pg_background_launch_v2('a')).*) s",
        "SELECT (n).pid FROM (SELECT pg_background_purge() n) s",
        "SELECT (n).* FROM (SELECT pg_background_purge() n) s",
        "SELECT (h).pid FROM (SELECT pg_background_list_all() AS h) s",
        "WITH x AS (SELECT 1) SELECT h FROM (SELECT pg_background_launch_v2('a') AS h) s",
        f"SELECT h AS {'x' * 64} FROM (SELECT pg_background_launch_v2('a') AS h) s",
        # Records in FROM.
        "SELECT nosuch FROM pg_background_launch_v2('a')",
        "SELECT u.pid FROM pg_background_launch_v2('a') h",
        "SELECT h FROM pg_background_launch_v2('a') h",
        "SELECT pid FROM pg_background_launch_v2('a') h(p)",
        "SELECT p FROM pg_background_launch_v2('a') h(p, p)",
        "SELECT * FROM pg_background_launch_v2('a') h(p, c, x)",
        "SELECT (h).pid FROM pg_background_launch_v2('a') h(h)",
        "SELECT (h.pid).x FROM pg_background_launch_v2('a') h",
        "SELECT * FROM pg_background_launch_v2('a') AS h(pid int, cookie int8)",
        "SELECT * FROM pg_background_launch_v2('a') WITH ORDINALITY",
        "SELECT * FROM pg_background_stats() WHERE true",
        "SELECT pid + 1 FROM pg_background_list_all()",
        "SELECT * FROM pg_background_list_all() l, t",
        "SELECT (t).a FROM pg_background_result(1) AS t(a int)",
        # Views.
        "SELECT 1 FROM pg_background_list",
        "SELECT nosuch FROM pg_background_list",
        "SELECT l FROM pg_background_list l",
        "SELECT * FROM pg_background_list WHERE true",
        "SELECT * FROM pg_background_list, t",
        "SELECT * FROM t, pg_background_list",
        "SELECT * FROM ONLY pg_background_list",
        "SELECT * FROM pg_background_list *",
        "SELECT * FROM pg_background_lists",
        "SELECT * FROM x.pg_background_list.y",
        'SELECT * FROM "PG_BACKGROUND_LIST"',
        "SELECT * FROM pg_background_list AS l(pid int)",
        "SELECT * FROM pg_background_list AS l(a, b, c, d, e, f, g, h, i, j, k)",
        "SELECT pg_background_list FROM t",
        "SELECT 'pg_background_list'",
        "TABLE pg_background_list ORDER BY 1",
        "TABLE pg_background_list l",
        "TABLE t",
        "TABLE",
        "WITH pg_background_list AS (SELECT 1) SELECT * FROM pg_background_list",
        "WITH pg_background_list AS (SELECT 1) TABLE pg_background_list",
        "INSERT INTO pg_background_list SELECT 1",
        # The last item of FROM: not once for each row.
        "SELECT l.pid FROM t, pg_background_launch_v2('a') l",
        "SELECT l.pid FROM t, pg_background_launch_v2('a' || 1::geometry(point, 2)) l",
        "SELECT l.pid FROM t, pg_background_launch_v2((SELECT q FROM t LIMIT 1)) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(coalesce('a', q)) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(coalesce('a', coalesce(q, 'b'))) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(CASE WHEN true THEN 'a' ELSE q END) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(current_schema) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(current_user || now()) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(normalize('a', nfc)) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(CAST(1 AS decimal(a, b))) l",
        "SELECT l.pid FROM (SELECT 'a' q FROM t) s, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM (SELECT i, now() AS q FROM t) s, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, (SELECT 'a') s(q), pg_background_launch_v2(s.q) l",
        "SELECT l.pid FROM t a, t b, pg_background_launch_v2(a.q) l",
        "SELECT l.pid FROM t a JOIN t b USING (i), pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t a JOIN t b USING (i) AS x, pg_background_launch_v2(a.q || x.i) l",
        "SELECT l.pid FROM (t a CROSS JOIN t b), pg_background_launch_v2(a.q) l",
        "SELECT l.pid FROM (SELECT a.q FROM t a, t b) s, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM (SELECT q FROM (t a CROSS JOIN t b)) s, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM (SELECT q FROM t WHERE EXISTS (SELECT 1)) s,"
        " pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE i IN (SELECT i FROM t)",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE EXISTS (SELECT 1 FROM t)",
        "WITH x AS (SELECT 'a' q FROM t) SELECT l.pid FROM x, pg_background_launch_v2(q) l",
        "SELECT l.pid, generate_series(1, 2) FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, unnest(ARRAY[1, 2]) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait(l.pid, l.cookie, x(1)) FROM t, pg_background_launch_v2(q) l",
        'SELECT l.pid, public.lower(q), "f"(1) FROM t, pg_background_launch_v2(q) l',
        'SELECT l.pid, "f"(1) FROM t, pg_background_launch_v2(q) l',
        "SELECT count(*), pg_background_purge() FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, row_number() OVER () FROM t, pg_background_launch_v2(q) l",
        "SELECT 1 FROM t, pg_background_launch_v2(q) l",
        "SELECT DISTINCT l.pid FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l ORDER BY i",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE i > 1 ORDER BY i LIMIT 1",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l OFFSET 1",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l LIMIT 1 OFFSET 1",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l GROUP BY 1",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l HAVING true",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l FOR UPDATE OF t",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l UNION ALL SELECT 1",
        "SELECT 1 UNION ALL SELECT l.pid FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE random() < 0.5",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE i > 1 AND f(1)",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE i BETWEEN 1 AND f(1)",
        "SELECT l.pid FROM t LEFT JOIN pg_background_launch_v2(q) l ON true",
        "SELECT l.pid FROM t JOIN pg_background_launch_v2(q) l ON i > 1",
        "SELECT l.pid FROM t JOIN pg_background_launch_v2(q) l ON true AND i > 1",
        "SELECT l.pid FROM t LEFT JOIN t u JOIN pg_background_launch_v2(t.q) l ON true ON false",
        "SELECT l.pid FROM t JOIN pg_background_launch_v2(q) l USING (pid)",
        "SELECT l.pid FROM t NATURAL JOIN pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t RIGHT JOIN t u CROSS JOIN pg_background_launch_v2(t.q) l ON true",
        "SELECT l.pid FROM t, pg_background_launch_v2(NULL || q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l, t u",
        "SELECT l.pid FROM (t CROSS JOIN pg_background_launch_v2(q) l)",
        "SELECT l.pid FROM t, ROWS FROM (pg_background_launch_v2(q)) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) WITH ORDINALITY l",
        "SELECT a.pid FROM pg_background_launch_v2('a') a, pg_background_launch_v2(a.pid || '') l",
        "SELECT l.pid INTO x FROM t, pg_background_launch_v2(q) l",
        "WITH x AS (SELECT 1) INSERT INTO t SELECT l.pid FROM t, pg_background_launch_v2(q) l",
        "INSERT INTO t SELECT l.pid FROM t, pg_background_launch_v2(q) l",
        "SELECT (SELECT l.pid FROM t, pg_background_launch_v2(q) l)",
        # What it returns, in an expression or in doubt.
        "SELECT l.pid + 1 FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, l.cookie + 1 FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, pid FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, l FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, (l).cookie FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, (SELECT l.pid) FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, (SELECT cookie) FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, * FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, t.* FROM t, pg_background_launch_v2(q) l",
        "SELECT l.* AS x FROM t, pg_background_launch_v2(q) l",
        "SELECT l.nosuch FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l(p)",
        "SELECT l.p FROM t, pg_background_launch_v2(q) l(p, p)",
        "SELECT l.p FROM t, pg_background_launch_v2(q) l(p, c, x)",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) AS l(pid int, cookie int8)",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE l.pid > 1",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE cookie > i",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE (l) IS NOT NULL",
        "SELECT l.pid FROM t, pg_background_launch_v2(q || l.pid) l",
        "SELECT l.pid FROM t l, pg_background_launch_v2(l.q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l LIMIT l.pid",
        'SELECT l.pid, U&"x" FROM t, pg_background_launch_v2(q) l',
        "SELECT l.pid, pg_background_arguments FROM t, pg_background_launch_v2(q) l",
        f"SELECT {'l' * 63}.pid FROM t, pg_background_launch_v2(q) {'l' * 63}",
        f"SELECT l.pid AS {'l' * 64} FROM t, pg_background_launch_v2(q) l",
        # Calls of it.
        "SELECT pg_background_wait(l.cookie, l.pid) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait(l.pid, l.pid) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait(l.pid + 0, l.cookie) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait((l).pid, l.cookie) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait(pid, cookie) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait(l.*) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_launch(l.pid) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_wait(l.pid, l.cookie) + 1 FROM t, pg_background_launch_v2(q) l",
        "SELECT NOT pg_background_wait(l.pid, l.cookie) FROM t, pg_background_launch_v2(q) l",
        "SELECT pg_background_result(l.pid) FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid, pg_background_list_all() FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE pg_background_purge() > i",
        "SELECT pg_background_stats().pid, l.pid FROM t, pg_background_launch_v2(q) l",
        "SELECT l FROM t, pg_background_launch(q) l",
        "SELECT l.pid FROM t, pg_background_list_all() l",
        "SELECT l.a, i FROM t, pg_background_result(i) AS l(a int)",
        "SELECT l.pid, pg_background_purge() FROM pg_background_launch_v2(random()) l"
        " WHERE random() < 1",
    ],
)
def test_not_served(sql: str) -> None:
    assert plan(sql) is None


def test_calls_and_their_arguments() -> None:
    found = scalar(
        "SELECT i, pg_background_detach(pid => pg_background_launch(queue_size := 5, sql := 'a')),"
        " grant_pg_background_privileges(user_name => 'r') FROM t"
    )
    detach, grant = found.columns
    assert (detach.index, grant.index) == (1, 2)
    [argument] = detach.call.arguments
    assert (argument.parameter.name, argument.name) == ("pid", "pid")
    assert isinstance(argument.value, Call)
    inner = [(a.parameter.name, a.value) for a in argument.value.arguments]
    assert inner == [("queue_size", 0), ("sql", 1)]
    assert [(a.parameter.name, a.name) for a in grant.call.arguments] == [
        ("role_name", "user_name")
    ]
    assert [leaf[0].function.name for leaf in detach.call.leaves()] == ["pg_background_launch"] * 2


def test_columns_behind_a_star_count_from_the_end() -> None:
    def indices(sql: str) -> list[int]:
        return [column.index for column in scalar(sql).columns]

    assert indices("SELECT pg_background_launch('a'), * FROM t") == [0]
    assert indices("SELECT *, pg_background_launch('a'), 1 FROM t") == [-2]
    assert indices("SELECT 1, (t.*), pg_background_launch('a') FROM t") == [-1]


def test_outputs() -> None:
    defined = result("SELECT b, *, t.a AS x FROM pg_background_result(1) AS t(a int, b text)")
    assert defined.outputs == (Output(1), Output(None), Output(0, b"x"))
    assert defined.defined_columns == 2
    named = result('SELECT a, t."B c" AS x, t.* FROM pg_background_result(1) t')
    assert named.outputs == (Output(b"a"), Output(b"B c", b"x"), Output(None))
    assert named.defined_columns == 0
    assert result("SELECT * FROM pg_background_result($1)").outputs == (Output(None),)
    assert result("SELECT pg_background_result(1)").outputs == (Output(None),)
    assert result("SELECT pg_background_result(1) AS Xy").outputs == (Output(None, b"xy"),)


def test_the_version_of_the_api_chooses_the_function() -> None:
    sql = b"SELECT pg_background_launch('a'), pg_background_launch('a', 1, 'b')"
    for version, returned in ((1, INT4), (2, HANDLE)):
        found = analyze(sql, functions=catalog(version))
        assert isinstance(found, ScalarPlan)
        first, second = (column.call.function for column in found.columns)
        assert (first.result_type, second.result_type) == (returned, HANDLE)
    sql = b"SELECT (pg_background_launch('a')).*"
    assert analyze(sql, functions=catalog(1)) is None
    assert analyze(sql, functions=catalog(2)) is not None
    assert analyze(sql, functions={}) is None


def test_fields_of_a_call_are_outputs_of_one_column() -> None:
    found = scalar(
        "SELECT 1, (pg_background_launch_v2('a')).*, (pg_background_stats()).max_workers"
    )
    assert [column.index for column in found.columns] == [1, 2]
    assert found.outputs == (
        *(ItemOutput(0), ItemOutput(1, 0, b"pid"), ItemOutput(1, 1, b"cookie")),
        ItemOutput(2, len(found.columns[1].call.function.columns) - 1),
    )
    assert b"AS max_workers" in found.rewrite.sql
    # The others are the stand-in's own.
    assert scalar("SELECT 1, pg_background_launch_v2('a')").outputs is None
    assert scalar("SELECT *, pg_background_launch_v2('a') FROM t").columns[0].index == -1
    subquery = scalar("SELECT s.*, (h).cookie c FROM (SELECT pg_background_launch_v2('a') h) s")
    assert subquery.outputs == (ItemOutput(0, None, b"h"), ItemOutput(0, 1, b"c"))


def test_what_a_call_in_from_returns_is_an_argument_of_others() -> None:
    found = scalar(
        "SELECT i, pg_background_wait(l.p, timeout_ms => 7, cookie => l.cookie) AS w, l.*"
        " FROM t, LATERAL pg_background_launch_v2(q) AS l(p)"
    )
    assert [column.index for column in found.columns] == [0, 2]
    launch, wait = (column.call for column in found.columns)
    assert [argument.value for argument in launch.arguments] == [0]
    assert [argument.value for argument in wait.arguments] == [FieldOf(0, 0), 0, FieldOf(0, 1)]
    assert [leaf[1] for leaf in wait.leaves()] == [1]
    assert found.outputs == (
        *(ItemOutput(1), ItemOutput(2)),
        *(ItemOutput(0, 0, b"p"), ItemOutput(0, 1, b"cookie")),
    )
    assert found.in_from
    # In the stand-in they are the other way round.
    complain = b"function pg_catalog.int4up(date) does not exist"
    found = scalar(
        "SELECT pg_background_wait(l.pid, l.cookie, a) FROM t, pg_background_launch_v2(q, b) l"
    )
    for number, name in enumerate((b"wait(integer, bigint, date)", b"launch_v2(text, date)")):
        position = found.rewrite.sql.split(b"pg_catalog.int4up", number + 1)[: number + 1]
        at = len(b"pg_catalog.int4up".join(position)) + 1
        said = complaint(found, complain, at)
        assert said == b"function pg_background_" + name + b" does not exist"


def test_outputs_of_a_function_that_has_columns() -> None:
    def outputs(sql: str) -> tuple[Output, ...]:
        found = result(sql)
        assert found.defined_columns == 0
        return found.outputs

    assert outputs("SELECT * FROM pg_background_launch_v2('a')") == (Output(None),)
    assert outputs("SELECT cookie, h.pid p FROM pg_background_launch_v2('a') h") == (
        *(Output(1), Output(0, b"p")),
    )
    assert outputs("SELECT p, *, pid2 q FROM pg_background_launch_v2('a') h(p, pid2)") == (
        *(Output(0, b"p"), Output(0, b"p"), Output(1, b"pid2"), Output(1, b"q")),
    )
    assert outputs("SELECT label FROM pg_background_list") == (Output(9),)
    view = result("TABLE pg_background_activity")
    assert (view.call.function.name, view.call.arguments) == ("pg_background_activity", ())
    assert b"pg_background_activity" not in view.rewrite.sql
    run = result("SELECT a FROM pg_background_run_query('a')")
    assert (run.outputs, run.defined_columns) == ((Output(b"a"),), 0)
    assert result("SELECT pg_background_run_query('a')").outputs == (Output(None),)
    defined = result("SELECT state, pid FROM pg_background_list_v2() AS (pid int, state text)")
    assert (defined.outputs, defined.defined_columns) == ((Output(1), Output(0)), 2)


def test_shape_is_read_once_and_only_so_far() -> None:
    """Statements of one shape differ in constants; neither their size nor nesting matters."""
    for number in range(3):
        found = scalar(f"SELECT {number}, pg_background_launch('{number}', {number}) FROM t")
        assert f"'{number}'".encode() in found.rewrite.sql
    started = time.monotonic()
    for deep in (
        "ARRAY[",
        "decimal(",
        "((",
        "enum(struct(",
        "CASE WHEN ",
        "(SELECT ",
        "- ",
        "NOT ",
    ):
        plan(f"SELECT pg_background_launch('a'), {deep * 300}")
        plan(f"SELECT pg_background_launch('a') FROM t WHERE {deep * 300}")
    plan(f"SELECT {'(' * 5000}pg_background_launch('a'){')' * 5000}")
    plan(f"SELECT {'pg_background_launch(' * 5000}'a'{')' * 5000}")
    plan(f"SELECT {'pg_background_launch(7), ' * 5000}")
    plan(f"SELECT pg_background_wait_any(1::{'pg_background_handle.' * 20000}x)")
    plan(f"SELECT pg_background_wait_any(1{'::pg_background_handle' * 20000})")
    plan(f"SELECT {'(' * 20000}pg_background_launch_v2('a'){').pid' * 20000}")
    plan(f"SELECT {'(pg_background_stats()).*, ' * 5000} 1")
    plan(f"SELECT 1 FROM {'pg_background_list.' * 20000} x")
    lateral = "pg_background_launch_v2(q) l"
    plan(f"SELECT {'pg_background_wait(l.pid, l.cookie), ' * 2000} 1 FROM t, {lateral}")
    plan(f"SELECT l.pid, {'x(' * 5000}1{')' * 5000} FROM t, {lateral}")
    plan(f"SELECT l.pid FROM {'(SELECT q FROM ' * 2000}t{')' * 2000} s, {lateral}")
    plan(f"SELECT l.pid FROM t, {lateral} WHERE {'i.' * 5000}i = {'x::' * 5000}y")
    assert time.monotonic() - started < 10


def test_encodings_with_ascii_second_bytes() -> None:
    so = "ソ".encode("shift_jis")
    sql = b"SELECT pg_background_launch('" + so + b"') AS " + so + b" FROM t ORDER BY i"
    found = analyze(sql, encoding="SJIS", standard_conforming_strings=False)
    assert found is not None
    assert b"textcat('" + so + b"', '')" in found.rewrite.sql
    assert analyze(sql, standard_conforming_strings=False) is None


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT pg_background_launch('SELECT now() FROM t')", True),
        ('SELECT pg_background_launch($1, 65536) AS "the (pid)" -- from here', True),
        ("SELECT pg_background_launch(E'\\'' || $1), 1 - 2", True),
        ("SELECT * FROM pg_background_result(pg_background_launch('x')) AS (n varchar(9))", True),
        ("SELECT * FROM pg_background_result(1) AS (n int)", True),
        ("SELECT pg_background_launch('x'), set_config('a.b', 'c', false)", False),
        ("SELECT pg_background_launch((SELECT f()))", False),
        ("SELECT pg_background_launch('x') FROM t", False),
        ("SELECT pg_background_launch('x'), 1 === 2", False),
        ("SELECT * FROM pg_background_result(f()) AS (n int)", False),
        (
            "SELECT * FROM pg_background_result_v2(pg_background_launch('x'), f()) AS (n int)",
            False,
        ),
    ],
)
def test_side_effects(sql: str, expected: bool) -> None:
    plan = analyze(sql.encode())
    assert plan is not None
    assert plan.has_no_side_effects == expected


def test_positions_map_back() -> None:
    sql = "SELECT 'é', pg_background_launch(nosuch) FROM t WHERE nothing"
    rewrite = scalar(sql).rewrite
    text = rewrite.sql.decode()
    for word, original in (
        ("'é'", "'é'"),
        ("pg_catalog.textcat", "pg_background_launch"),
        ("nosuch", "nosuch"),
        ("FROM", "FROM"),
        ("nothing", "nothing"),
    ):
        position = rewrite.original_position(text.index(word) + 1, "utf-8")
        assert position == sql.index(original) + 1
    assert rewrite.original_position(len(text) + 1, "utf-8") == len(sql) + 1


def test_complaints_name_the_users_call() -> None:
    found = scalar(
        "SELECT pg_background_launch(1), pg_background_launch(sql => 'a', queue_size => 'b')"
    )
    complain = b"function pg_catalog.%s does not exist"
    assert (
        complaint(found, complain % b"textcat(integer, unknown)")
        == b"function pg_background_launch(integer) does not exist"
    )
    assert (
        complaint(found, b'Funktion pg_catalog.int4up("a)b") existiert nicht')
        == b'Funktion pg_background_launch(sql => text, queue_size => "a)b") existiert nicht'
    )
    second = found.rewrite.sql.rindex(b"pg_catalog.textcat") + 1
    assert (
        complaint(found, complain % b"textcat(date, unknown)", second)
        == b"function pg_background_launch(sql => date, queue_size => integer) does not exist"
    )
    assert complaint(found, b"function f(integer) does not exist") is None


# --- nothing raises -------------------------------------------------------------------------

SOUP = st.lists(
    st.sampled_from(
        [
            *("pg_background_launch", "pg_background_launch(", "pg_background_result(1)", "("),
            *("(pg_background_launch_v2('a')).", "pg_background_list", "pg_background_purge()"),
            *("pid", "h", "FROM (SELECT", "TABLE", "ARRAY[(1, 2)", "pg_background_handle[]"),
            *("pg_background_wait_any(", "CAST(", "pg_background_progress(1,", "public ."),
            *("pg_background_detach(", '"pg_background_launch"(', ")", "[", "]", ",", ".", "*"),
            *("SELECT", "FROM", "WHERE", "ORDER BY", "LIMIT", "AS", "t", "a int", "WITH", "'s'"),
            *('"q"', "1", "$1", "=>", "::", ":=", ";", 'U&"x"', "é", "- ", "--\n", "/*", "'"),
            *("UNION", "VALUES", "CASE WHEN", "END", "INTO", "ALL", "ARRAY", "{", "$$", "OVER"),
            *("l.pid", "l", "CROSS JOIN", "pg_background_launch_v2(q) l", ", LATERAL"),
            *("pivot", "unpivot", "lateral", "match_recognize", "qualify", "interval", "for"),
        ]
    ),
    max_size=16,
).map(" ".join)


@settings(max_examples=examples(3000), deadline=None)
@given(SOUP, st.booleans())
@example("SELECT pg_background_launch(", True)
def test_never_raises(soup: str, conforming: bool) -> None:
    for prefix in (
        "",
        "SELECT pg_background_launch('x') , ",
        "SELECT * FROM pg_background_result",
        "SELECT (pg_background_launch_v2(",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a'",
        "SELECT pg_background_wait_any(",
        "SELECT pg_background_progress(",
        "TABLE pg_background_list",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l ",
        "SELECT l.pid FROM t, LATERAL pg_background_launch_v2(",
    ):
        sql = (prefix + soup).encode()
        found = analyze(sql, standard_conforming_strings=conforming)
        if found is not None:
            assert b" CAST(" in found.rewrite.sql
        try:
            statements = split(sql, standard_conforming_strings=conforming)
        except LexError:
            continue
        for statement in statements:
            progress_statement(sql, statement, b"marker")


@settings(max_examples=examples(500), deadline=None)
@given(st.binary(max_size=40))
def test_never_raises_on_bytes(data: bytes) -> None:
    for encoding in (None, "SJIS", "GB18030", "BIG5", "JOHAB"):
        analyze(b"SELECT pg_background_launch('x') " + data, encoding=encoding)
        analyze(data + b" pg_background_launch('x')", encoding=encoding)


# --- against the server ---------------------------------------------------------------------

# What the stubs return for each type, in SQL and here, of a text that tells their arguments.
RETURNS: dict[Type, tuple[str, Callable[[str], str]]] = {
    BOOL: ("length(d) % 2 = 0", lambda d: "t" if len(d) % 2 == 0 else "f"),
    INT4: ("1000 - length(d)", lambda d: str(1000 - len(d))),
    INT8: ("-5000000000 - length(d)", lambda d: str(-5000000000 - len(d))),
    TEXT: ("d", str),
    OID: ("length(d)::oid", lambda d: str(len(d))),
    FLOAT8: ("length(d) + 0.5::float8", lambda d: str(len(d) + 0.5)),
    TIMESTAMPTZ: (
        "'2026-01-01 00:00:00+00'::timestamptz",
        lambda d: "2026-01-01 00:00:00+00",
    ),
    JSONB: ("to_jsonb(d)", lambda d: json.dumps(d, ensure_ascii=False)),
    VOID: ("NULL", lambda d: ""),
}


def stub(function: Function) -> str:
    """A function of our name that says what it was called with."""
    parameters = ", ".join(
        f"{p.name} {p.type.name}" + ("" if p.required else f" DEFAULT {sql_default(p)}")
        for p in function.parameters
    )
    given = ", ".join(f"{p.name}::text" for p in function.parameters)
    digest = f"array_to_string(ARRAY[{given}]::text[], '|', '~')"
    # That of a list is SETOF record, as the extension has it.
    is_list = function.name in ("pg_background_list", "pg_background_list_v2")
    returns = "record" if is_list else function.result_type.name
    if function.result_type == RECORD:
        values = "1000 - length(d), d, 2.5::numeric(5,1)"
    else:
        values = ", ".join(
            RETURNS[type_][0]
            for type_ in ([c.type for c in function.columns] or [function.result_type])
        )
    if is_list:
        # Nine columns or ten, as the caller says.
        body = (
            f"BEGIN RETURN QUERY SELECT {values}; EXCEPTION WHEN datatype_mismatch THEN"
            f" RETURN QUERY SELECT {values.rpartition(', ')[0]}; END"
        )
    elif function.returns_set:
        body = f"BEGIN RETURN QUERY SELECT {values}; END"
    elif function.result_type == VOID:
        body = "BEGIN END"
    elif function.columns:
        body = f"DECLARE r {returns}; BEGIN r := ROW({values}); RETURN r; END"
    else:
        body = f"BEGIN RETURN {values}; END"
    # How often they are called counts too.
    digest += "; n int := nextval('public.calls')"
    if "DECLARE" not in body:
        body = "DECLARE " + body
    body = body.replace("DECLARE ", f"DECLARE d text := {digest}; ", 1)
    setof = "SETOF " if function.returns_set else ""
    strict = "STRICT" if function.strict else ""
    return (
        f"CREATE FUNCTION {function.name}({parameters}) RETURNS {setof}{returns} VOLATILE {strict}"
        f" LANGUAGE plpgsql AS $stub${body}$stub$;"
    )


def sql_default(parameter: Parameter) -> str:
    match parameter.default:
        case None:
            return "NULL"
        case bool() | int():
            return str(parameter.default).lower()
        case other:
            raise AssertionError(other)


def stubs() -> str:
    functions = [function for overloads in FUNCTIONS.values() for function in overloads]
    types = {f.result_type for f in functions if f.columns} - {
        f.result_type for f in VIEWS.values()
    }
    statements = [
        "CREATE SEQUENCE calls",
        "CREATE TABLE t (i int, q text)",
        "INSERT INTO t VALUES (1, 'one'), (3, 'three'), (2, NULL)",
    ]
    for type_ in types:
        columns = ", ".join(f"{column.name} {column.type.name}" for column in type_.columns)
        statements.append(f"CREATE TYPE {type_.name} AS ({columns})")
    for view in VIEWS.values():
        columns = ", ".join(f"{RETURNS[c.type][0]} AS {c.name}" for c in view.columns)
        statements.append(
            f"CREATE VIEW {view.name} AS SELECT {columns} FROM (SELECT ''::text) AS d(d)"
        )
    return "; ".join([*statements, *map(stub, functions)])


Value = bytes | None
Values = list[Value]


Results = dict[int, Value | Values]


def call(made: Call, leaves: Values, results: Results, log: list[Call]) -> Value | Values:
    """What the stubs do; a list for what has columns. ``results`` are those of other calls, by
    their columns; the calls made are added to ``log``."""
    values: dict[str, Value] = {}
    for argument in made.arguments:
        if isinstance(argument.value, Call):
            value = call(argument.value, leaves, results, log)
            assert not isinstance(value, list)
            values[argument.parameter.name] = value
        elif isinstance(argument.value, FieldOf):
            fields = results[argument.value.column]
            assert fields is None or isinstance(fields, list)
            values[argument.parameter.name] = fields[argument.value.field] if fields else None
        else:
            values[argument.parameter.name] = leaves[argument.value]
    function = made.function
    if function.strict and None in values.values():
        return None
    log.append(made)
    texts: list[str] = []
    for parameter in function.parameters:
        if not parameter.required:
            default = sql_default(parameter)
            values.setdefault(parameter.name, None if default == "NULL" else default.encode())
        value = values[parameter.name]
        texts.append("~" if value is None else value.decode())
    digest = "|".join(texts)
    if function.result_type == RECORD:
        return [str(1000 - len(digest)).encode(), digest.encode(), b"2.5"]
    if function.columns:
        return [RETURNS[column.type][1](digest).encode() for column in function.columns]
    return RETURNS[function.result_type][1](digest).encode()


def record(values: Value | Values) -> Value:
    """A record's text."""
    if not isinstance(values, list):
        return values
    fields: list[bytes] = []
    for value in values:
        text = b"" if value is None else value
        if value is not None and (not text or re.search(rb'[\s"\\(),]', text)):
            text = b'"' + re.sub(rb'(["\\])', rb"\1\1", text) + b'"'
        fields.append(text)
    return b"(" + b",".join(fields) + b")"


@dataclass
class Outcome:
    """Columns (name and type) and rows, or an error: SQLSTATE, message, position; how many calls
    were made."""

    columns: list[tuple[bytes | None, int]]
    rows: list[list[Value]]
    error: tuple[bytes, bytes, int | None] | None
    calls: int = field(default=0, compare=False)

    @classmethod
    def of(cls, conn: Connection, sql: bytes) -> Outcome:
        """Runs ``sql`` in a transaction that is rolled back."""
        conn.pgconn.exec_(b"SELECT setval('public.calls', 1, false)")
        conn.pgconn.exec_(b"BEGIN")
        found = conn.pgconn.exec_(sql)
        conn.pgconn.exec_(b"ROLLBACK")
        calls = conn.pgconn.exec_(
            b"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM public.calls"
        )
        error = None
        if found.status == pq.ExecStatus.FATAL_ERROR:
            field = pq.DiagnosticField
            position = found.error_field(field.STATEMENT_POSITION)
            error = (
                found.error_field(field.SQLSTATE) or b"",
                found.error_field(field.MESSAGE_PRIMARY) or b"",
                int(position) if position else None,
            )
        records = _records(conn)
        types = [found.ftype(at) for at in range(found.nfields)]
        return cls(
            [
                (found.fname(at), RECORD.oid if type_oid in records else type_oid)
                for at, type_oid in enumerate(types)
            ],
            [
                [found.get_value(row, at) for at in range(found.nfields)]
                for row in range(found.ntuples)
            ],
            error,
            int(calls.get_value(0, 0) or b""),
        )


_known_records: dict[Connection, set[int]] = {}


def _records(conn: Connection) -> set[int]:
    """The composite types of the database: ours are records to the client."""
    if conn not in _known_records:
        rows = conn.execute("SELECT oid::int FROM pg_type WHERE typtype = 'c'").fetchall()
        _known_records[conn] = {oid for (oid,) in rows}
    return _known_records[conn]


def served(conn: Connection, plan: Plan) -> Outcome:
    """What a session makes of a plan."""
    outcome = Outcome.of(conn, plan.rewrite.sql)
    if outcome.error is not None:
        state, message, position = outcome.error
        message = complaint(plan, message, position) or message
        if position is not None:
            position = plan.rewrite.original_position(position, "utf-8")
        outcome.error = (state, message, position)
    elif isinstance(plan, ScalarPlan):
        called(conn, plan, outcome)
    else:
        fetched(conn, plan, outcome)
    return outcome


def called(conn: Connection, plan: ScalarPlan, outcome: Outcome) -> None:
    columns = outcome.columns
    calls: dict[int, Call] = {}
    for column in plan.columns:
        assert columns[column.index][1] == TEXT.oid
        calls[column.index % len(columns)] = column.call
    outputs = plan.outputs or [ItemOutput(at) for at in range(len(columns))]
    outcome.columns = []
    log: list[Call] = []
    for output in outputs:
        name, type_oid = columns[output.column]
        if output.column in calls:
            function = calls[output.column].function
            type_oid = function.result_type.oid
            if output.field is not None:
                type_oid = function.columns[output.field].type.oid
        outcome.columns.append((output.label or name, type_oid))
    for number, row in enumerate(outcome.rows):
        results: Results = {}
        for at, made in calls.items():
            results[at] = call(made, leaves(conn, row[at]), results, log)
        outcome.rows[number] = []
        for output in outputs:
            result_ = results.get(output.column, row[output.column])
            if output.field is not None and isinstance(result_, list):
                result_ = result_[output.field]
            outcome.rows[number].append(record(result_))
    outcome.calls = len(log)


def fetched(conn: Connection, plan: ResultPlan, outcome: Outcome) -> None:
    [row] = outcome.rows
    hidden = 2 if plan.defined_columns else 1
    assert [type_oid for _, type_oid in outcome.columns[-hidden:]] == [TEXT.oid] * hidden
    assert row[:-hidden] == [None] * (len(row) - hidden)
    function = plan.call.function
    job = call(plan.call, leaves(conn, row[-1]), {}, [])
    if job is None and not function.returns_set:
        job = [None] * len(function.columns)
    if plan.defined_columns:
        assert outcome.columns[-1][0] == b"pg_background_arguments"
        assert (row[-2] or b"").count(b",") == plan.defined_columns - 1
        del outcome.columns[-2:]
    else:
        outcome.columns = []
    outcome.rows = []
    taken: Values = []
    for output in plan.outputs:
        assert not isinstance(output.column, bytes)
        size = plan.defined_columns or len(function.columns)
        for place in range(size) if output.column is None else [output.column]:
            if isinstance(job, list):
                taken.append(job[place])
            if not plan.defined_columns:
                column = function.columns[place]
                name = output.label or column.name.encode()
                outcome.columns.append((name, column.type.oid))
    if job is not None:
        outcome.rows = [taken]


def leaves(conn: Connection, text: Value) -> list[Value]:
    assert text is not None
    rows = conn.execute("SELECT unnest(%s::text[])", [text.decode()]).fetchall()
    return [None if value is None else value.encode() for (value,) in rows]


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    with database(server, "statements") as name, server.connect(dbname=name) as conn:
        conn.execute(stubs())
        conn.execute("SET TimeZone = 'UTC'")
        yield conn


@pytest.mark.parametrize("sql", SERVED)
def test_a_stand_in_does_what_the_call_would_do(connection: Connection, sql: str) -> None:
    found = plan(sql)
    assert found is not None
    outcome = served(connection, found)
    assert outcome.error is None
    native = Outcome.of(connection, sql.encode())
    assert outcome == native
    if isinstance(found, ScalarPlan) and found.in_from and ").*" not in sql:
        assert outcome.calls == native.calls


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_background_launch(1)",
        "SELECT 'é', pg_background_launch(now()), 1",
        "SELECT pg_background_launch('a', 'x')",
        "SELECT pg_background_launch('a'::text, 1.5)",
        "SELECT pg_background_launch('a'::text, 5000000000)",
        "SELECT pg_background_launch('a', sql) FROM t",
        "SELECT pg_background_launch('a'), pg_background_launch(sql => 1)",
        "SELECT pg_background_launch(t) FROM t",
        "SELECT pg_background_launch(t.*) FROM t",
        "SELECT pg_background_launch(ROW(1, 2))",
        "SELECT pg_background_launch('a', (SELECT i FROM t))",
        "SELECT pg_background_launch((SELECT 1, 2))",
        "SELECT pg_background_launch(nosuch) FROM t",
        "SELECT pg_background_launch(nosuch(1))",
        "SELECT pg_background_launch('a') FROM nosuch",
        "SELECT pg_background_launch(q), count(*) FROM t",
        "SELECT pg_background_launch('a', 1 / 0)",
        "SELECT pg_background_launch('a' AS b)",
        "SELECT pg_background_launch('a') year",
        "SELECT pg_background_launch('a') FROM t ORDER BY 5",
        "SELECT i, pg_background_launch('a') FROM t u, t",
        "SELECT pg_background_detach('x')",
        "SELECT pg_background_detach(pg_background_launch(1))",
        "SELECT pg_background_detach(1, 'x')",
        "SELECT pg_background_detach(1, 1.5)",
        "SELECT pg_background_detach('1'::text, 2::bigint)",
        "SELECT pg_background_wait(1, cookie => now(), timeout_ms => 3)",
        "SELECT pg_background_launch('a'::text, 1, 2)",
        "SELECT (pg_background_launch_v2(nosuch)).*",
        "SELECT (pg_background_launch_v2(1)).pid",
        "SELECT pg_background_wait_any(ARRAY[(1, 2)::pg_background_handle, nosuch])",
        "SELECT * FROM pg_background_drain('(1,2)'::pg_background_handle[])",
        "SELECT * FROM pg_background_drain(nosuch)",
        "SELECT * FROM pg_background_launch_v2(1)",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2(1) AS h) s",
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2(nosuch) AS h) s",
        "SELECT * FROM pg_background_list() AS t(a nosuch)",
        "SELECT l.pid FROM t, pg_background_launch_v2(nosuch) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(i) l",
        "SELECT l.pid, nosuch FROM t, pg_background_launch_v2(q) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) l WHERE nosuch > 1",
        "SELECT l.pid FROM t, pg_background_launch_v2(q) AS l LIMIT 'x'",
        "SELECT l.pid FROM t, pg_background_launch_v2(generate_series(1, i) || '') l",
        "SELECT l.pid FROM t, pg_background_launch_v2(max(q)) l",
        "SELECT l.pid FROM t, pg_background_launch_v2(q || rank() OVER ()) l",
        "SELECT pg_background_wait(l.pid, l.cookie, q) FROM t, pg_background_launch_v2(q) l",
        "SELECT grant_pg_background_privileges('a', 'x')",
        "SELECT grant_pg_background_privileges('a'::text, 1)",
        "SELECT * FROM pg_background_launch(string_agg('a', 'b'))",
        "SELECT * FROM pg_background_launch(nosuch)",
        "SELECT * FROM pg_background_launch('a'::text, 1.5) AS x",
        "SELECT * FROM pg_background_result('a') AS t(a int, b text, c numeric(5,1))",
        "SELECT * FROM pg_background_result(1.5) AS t(a int, b text, c numeric(5,1))",
        "SELECT * FROM pg_background_result(max(1)) AS t(a int, b text, c numeric(5,1))",
        "SELECT * FROM pg_background_result(1) AS t(a int, b nosuch, c numeric(5,1))",
        "SELECT * FROM pg_background_result(1) AS t(a int, a text, a numeric(5,1))",
        "SELECT a FROM pg_background_result(1) AS t(a int, b SETOF text)",
    ],
)
def test_errors_are_as_they_would_be(connection: Connection, sql: str) -> None:
    found = plan(sql)
    assert found is not None
    outcome = served(connection, found)
    assert outcome.error is not None
    assert outcome.error == Outcome.of(connection, sql.encode()).error


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT a FROM pg_background_result(a) AS t(a int)",
        "SELECT * FROM pg_background_result(t.a) AS t(a int)",
        "SELECT * FROM pg_background_result(generate_series(1, 3)) AS t(a int, b text, c numeric)",
        "SELECT * FROM pg_background_result(generate_series(1, 3))",
        "SELECT pg_background_result(generate_series(1, 3))",
        "SELECT pg_background_result(max(1))",
        "SELECT * FROM pg_background_launch(unnest(ARRAY['a', 'b'])) x",
    ],
)
def test_what_the_server_refuses_stays_refused(connection: Connection, sql: str) -> None:
    """By its own words, which may differ in what they say of functions in FROM."""
    found = plan(sql)
    assert found is not None
    assert Outcome.of(connection, sql.encode()).error is not None
    assert served(connection, found).error is not None


TEXTS = Type("text[]", 1009, -1)


@pytest.mark.parametrize(
    ("sql", "types"),
    [
        ("SELECT pg_background_launch($1)", [TEXT]),
        ("SELECT pg_background_launch($1, $2) FROM t", [TEXT, INT4]),
        ("SELECT pg_background_launch(queue_size => $1, sql => $2)", [INT4, TEXT]),
        ("SELECT * FROM pg_background_launch($1)", [TEXT]),
        ("SELECT pg_background_result($1)", [INT4]),
        ("SELECT * FROM pg_background_result($1)", [INT4]),
        ("SELECT a FROM pg_background_result($1) AS t(a int)", [INT4]),
        ("SELECT pg_background_detach($1)", [INT4]),
        ("SELECT pg_background_detach($2, $1)", [INT8, INT4]),
        ("SELECT (pg_background_launch_v2($1, $2, $3)).*", [TEXT, INT4, TEXT]),
        ("SELECT (h).* FROM (SELECT pg_background_launch_v2($1) AS h) s", [TEXT]),
        ("SELECT * FROM pg_background_drain($1, $2)", [TEXT, INT4]),
        ("SELECT pg_background_wait_any($1::pg_background_handle[])", [TEXTS]),
        (
            "SELECT pg_background_wait(l.pid, l.cookie, $1) FROM t,"
            " pg_background_launch_v2(q || $2, $3) l WHERE i > $4",
            [INT4, TEXT, INT4, INT4],
        ),
    ],
)
def test_parameters_get_the_types_of_the_call(
    connection: Connection, sql: str, types: list[object]
) -> None:
    found = plan(sql)
    assert found is not None
    prepared = connection.pgconn.prepare(b"", found.rewrite.sql)
    assert prepared.status == pq.ExecStatus.COMMAND_OK, prepared.error_message
    described = connection.pgconn.describe_prepared(b"")
    oids = {type_.oid: type_ for type_ in (TEXT, TEXTS, INT4, INT8)}
    assert [oids[described.param_type(at)] for at in range(described.nparams)] == types


@pytest.mark.parametrize("name", ["pg_background_list_v2", "pg_background_list"])
@pytest.mark.parametrize("columns", ["*", "pid, l.label AS x", "l.*, state"])
def test_a_list_needs_no_definition(connection: Connection, name: str, columns: str) -> None:
    """There it is other than in the extension, whose list is SETOF record."""
    found = result(f"SELECT {columns} FROM {name}() l")
    native = f"SELECT {columns} FROM pg_background_list_all() l"
    assert served(connection, found) == Outcome.of(connection, native.encode())


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT (h).pid FROM (SELECT pg_background_launch_v2('a') AS h)",
        "SELECT * FROM (SELECT pg_background_launch_v2('a') AS h);",
    ],
)
def test_a_subquery_may_need_an_alias(connection: Connection, sql: str) -> None:
    found = scalar(sql)
    outcome, native = served(connection, found), Outcome.of(connection, sql.encode())
    assert outcome == native
    assert bool(native.error) == (connection.info.server_version < 160000)


@pytest.mark.parametrize(
    "handles",
    [
        "ARRAY[ROW(1, 2), (3, 4)]",
        "ARRAY[(1, 2), (3, 4)]::pg_background_handle[]",
        "ARRAY[(1, 2)::pg_background_handle, '(3,4)']",
        "CAST(ARRAY[(1, 2), (3, 4)] AS contrib.pg_background_handle [2])",
        """'{"(1,2)","(3,4)"}'""",
        """E'{"(1,2)","(3,4)"}'::"pg_background_handle" ARRAY""",
        "array_append(NULL::pg_background_handle[], '(1,2)') || (3, 4)::pg_background_handle",
        "(SELECT array_agg(ROW(a, a + 1)::pg_background_handle) FROM (VALUES (1), (3)) v(a))",
        "(SELECT array_agg(pg_background_handle) FROM (SELECT (a, a + 1)"
        " AS pg_background_handle FROM (VALUES (1), (3)) v(a)) pg_background_handle)",
    ],
)
def test_handles_come_out_as_text(connection: Connection, handles: str) -> None:
    """On a server that does not know the type."""
    found = scalar(f"SELECT pg_background_wait_any({handles})")
    connection.execute("SET search_path = pg_catalog")
    try:
        [[text]] = Outcome.of(connection, found.rewrite.sql).rows
    finally:
        connection.execute("RESET search_path")
    assert leaves(connection, text) == [b'{"(1,2)","(3,4)"}']


def test_search_path_does_not_matter(connection: Connection) -> None:
    found = scalar("SELECT pg_background_launch('a', 7)")
    connection.execute("CREATE SCHEMA evil")
    connection.execute(
        "CREATE FUNCTION evil.textcat(text, text) RETURNS text LANGUAGE sql AS 'SELECT ''evil'''"
    )
    connection.execute("CREATE TYPE evil.text AS ENUM ('evil')")
    connection.execute("SET search_path = evil, pg_catalog")
    try:
        assert Outcome.of(connection, found.rewrite.sql).rows == [[b"{a,7}"]]
    finally:
        connection.execute("RESET search_path")
        connection.execute("DROP SCHEMA evil CASCADE")


ARGUMENT = st.sampled_from(
    [
        *("'a'", "q", "NULL", "$$b$$", "u.q || 'x'", "(SELECT 'ccc')", "sql => 'a'", "i", "nosuch"),
        *("'a', i", "'a', 5", "'a', queue_size => i", "q -- ',\n", "string_agg(q, '')"),
        "unnest(ARRAY[q, 'z'])",
    ]
)
CALL = st.builds(
    str.format,
    st.sampled_from(
        [
            *("pg_background_launch({})", "(pg_background_detach(pg_background_launch({})))"),
            *("pg_background_launch_v2({})", "(pg_background_launch_v2({})).*"),
            *("(pg_background_launch_v2({})).pid", "((pg_background_submit({})).cookie)"),
        ]
    ),
    ARGUMENT,
)
LABEL = st.sampled_from(
    ["", "", " AS p", " p", ' AS "P q"', " isnull", " AS select", " day", "/**/x", " AS i", " + 1"]
)
FREE = st.sampled_from(
    [
        *("i", "*", "u.*", "(u.*)", "(u).*", "1 = i", "count(*)", "'s'", "- i", "q q", "E'\\''"),
        *("CASE WHEN i = 1 THEN q END", "i IS DISTINCT FROM 2", "ARRAY[i]", "i IN (1, 2)"),
        *("i::numeric(9, 2)", "(SELECT q LIMIT 1)", "extract(year FROM now()) > 1", "u.i AS order"),
        *("generate_series(1, 2)", "row_number() OVER (ORDER BY i)", 'q COLLATE "C"', "u"),
        *("CAST(i AS decimal(5))", "U&'x' UESCAPE '!'", "(i, q)", "(i)", "i p", "(u.*) IS NULL"),
    ]
)
ITEM = st.tuples(CALL, LABEL).map("".join) | FREE
REST = st.sampled_from(
    [
        *("", " FROM t u", " FROM t u WHERE i > 1", " WHERE false", " FROM t u LIMIT 0"),
        *(
            " FROM t u ORDER BY i",
            " FROM t u ORDER BY 1, i",
            " FROM t u ORDER BY p, 2",
            " FROM t u ORDER BY pid",
        ),
        *(" FROM t u ORDER BY (2)", " FROM t u ORDER BY ((p)), i", " FROM t u ORDER BY i LIMIT 1"),
        " FROM ONLY t u, t v ORDER BY u.i, v.i",
        " FROM (SELECT * FROM t) u ORDER BY i DESC FETCH FIRST 2 ROWS ONLY",
        " FROM t u LEFT JOIN t v USING (i, q) ORDER BY i",
        " FROM t AS u(i, q) ORDER BY q NULLS FIRST",
        *(
            " FROM t u OFFSET 1",
            " FROM t u FOR UPDATE",
            " FROM t u GROUP BY i, q",
            " UNION SELECT 1",
        ),
    ]
)


@pytest.mark.timeout(300)
@settings(
    max_examples=examples(1500),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(ITEM, min_size=1, max_size=4), REST)
@example(["u.*", "pg_background_launch(q)"], " FROM t u ORDER BY 1")
def test_any_select_gives_what_it_would_give(
    connection: Connection, items: list[str], rest: str
) -> None:
    sql = "SELECT " + ", ".join(items) + rest
    found = plan(sql)
    if found is None:
        return
    outcome = served(connection, found)
    native = Outcome.of(connection, sql.encode())
    assert outcome == native


OUTPUT = st.sampled_from(
    [
        *("*", "h.*", "s.*", "(h).*", "(s).*", "(h.h).*", "(s.h).*", "(p).*", "H", "s", "p", "pid"),
        *("h.h", "s.h", "h.p", "h.pid", "s.pid", "(h).pid", "(s).pid", "(h.h).pid", "(s.h).pid"),
        *(
            '"cookie"',
            '(p)."cookie"',
            "(h.p).cookie",
            "(h).h",
            "(s).h",
            "(h).state",
            "state",
            "(h)",
        ),
        *(
            "pg_background_launch_v2",
            "pg_background_launch_v2.pid",
            "(pg_background_launch_v2).pid",
        ),
        *("pg_background_list", "pg_background_list.pid", "(pg_background_list).pid", "h.ctid"),
    ]
)
AS = st.sampled_from(["", "", "", " AS x", " x", ' AS "H"', " AS select", " value", " isnull"])
SOURCE = st.sampled_from(
    [
        *("pg_background_launch_v2('a')", "pg_background_launch_v2(NULL) h"),
        *("pg_background_launch_v2('a') h", "pg_background_launch_v2('a') AS s(p)"),
        *("pg_background_launch_v2('a') h(p, h)", "pg_background_launch_v2('a') h(cookie, pid)"),
        *("pg_background_list_all() h", "pg_background_list_all() AS h(h, pid)"),
        *("pg_background_list", "pg_background_list h", "pg_background_list AS s(h, p)"),
        *("(SELECT pg_background_launch_v2('a') h) s", "(SELECT pg_background_launch_v2('a')) s"),
        *("(SELECT pg_background_run('a') AS h) h", "(SELECT pg_background_launch_v2('a')) h(h)"),
        *("(SELECT pg_background_launch_v2('a') AS p) h", "(SELECT pg_background_purge() p) h"),
        *("pg_background_purge() h", "pg_background_purge() AS s(h)"),
        "pg_background_result(1) AS h(pid int, h text, c numeric(5,1))",
    ]
)


@settings(
    max_examples=examples(1500),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(OUTPUT, AS).map("".join), min_size=1, max_size=3), SOURCE)
def test_any_outputs_are_what_they_would_be(
    connection: Connection, outputs: list[str], source: str
) -> None:
    sql = f"SELECT {', '.join(outputs)} FROM {source}"
    found = plan(sql)
    if found is not None:
        assert served(connection, found) == Outcome.of(connection, sql.encode())


LATERAL_ITEM = st.sampled_from(
    [
        *("l.pid", "l.cookie", "l.*", "L . pid", "pid", "cookie", "l", "(l).pid", "l.pid + 1"),
        *("i", "u.i", "*", "u.*", "'s'", "q || 'x'", "format('%s', i)", "generate_series(1, 2)"),
        *("count(*)", "(SELECT max(i) FROM t)", "(SELECT l.pid)", "row_number() OVER ()", "u"),
        *("CASE WHEN i = 1 THEN q END", "ARRAY[i, 2]", "u.i::numeric(9, 2)", "max(1)"),
        *("pg_background_wait(l.pid, l.cookie)", "pg_background_wait(l.pid, l.cookie, i)"),
        *("(pg_background_outcome(l.pid, l.cookie)).state", "pg_background_purge()"),
        *("pg_background_detach(l.pid, cookie => l.cookie)", "pg_background_detach(l.pid)"),
        *("pg_background_outcome(l.pid, l.cookie)", "pg_background_wait(pid, cookie)"),
        *("pg_background_wait(l.pid, l.cookie, generate_series(1, 2))", "unnest(ARRAY[1, 2])"),
        *("pg_background_launch(u.q)", "pg_background_wait(l.pid, l.pid)"),
        *("pg_background_detach(pg_background_wait_v2(l.pid, l.cookie))", "1 = i"),
    ]
)
LATERAL_FROM = st.sampled_from(
    [
        *("t u,", "t u, LATERAL", "t u CROSS JOIN", "t u CROSS JOIN LATERAL", "t u JOIN LATERAL"),
        *("t AS l,", "t u, t v,", "t v JOIN t u USING (i),", "generate_series(1, 3) u(i),", ""),
        *("(VALUES (1, 'a'), (1, 'a'), (2, 'bc')) u(i, q),", "(SELECT * FROM t) u,", "LATERAL"),
        *("(SELECT i, 'x' AS q FROM t) u,", "(SELECT 1, 'x') u(i, q),", "t u LEFT JOIN LATERAL"),
        *("t v, (SELECT 1, 'x'::text) u(i, q),", "t u LEFT JOIN t v ON v.i > u.i CROSS JOIN"),
        *("(SELECT i, now()::text q FROM t) u,", "(SELECT DISTINCT 1 i, 'x' q FROM t) u,"),
        *("(SELECT i, q FROM t UNION ALL SELECT 7, 'x' FROM t) u,", "t u NATURAL JOIN t v,"),
    ]
)
LATERAL_CALL = st.sampled_from(
    [
        *("launch_v2(q)", "launch_v2(u.q)", "launch_v2('a')", "launch_v2(u.q || i, i)"),
        *("launch_v2(coalesce('a', q))", "launch_v2(coalesce(q, 'a'))", "outcome(i, i)"),
        *("launch_v2(CASE WHEN true THEN 'a' ELSE q END)", "launch_v2(NULL || u.q, 1, 'x')"),
        *("submit(format('%s', u.i), label => q, queue_size => NULL)", "launch_v2(u)", "stats()"),
        *("launch_v2((SELECT 'x' FROM t LIMIT 1))", "launch_v2((q IS NULL)::text)", "launch(q)"),
        *(
            "launch_v2(current_date::text)",
            "launch_v2(u.q || v.i)",
            "launch_v2(lower(u.q)::varchar(2))",
            "launch_v2(max(q))",
        ),
    ]
)
LATERAL_REST = st.sampled_from(
    [
        *("", "", "", " WHERE u.i > 1", " WHERE random() < 0.5", " WHERE u.i > 1 AND random() < 2"),
        *(" LIMIT 1", " LIMIT 0", " OFFSET 1", " ORDER BY i DESC", " ON true", " ON TRUE LIMIT 2"),
        *(" WHERE cookie < i", " WHERE l.pid > i", " WHERE false", " WHERE 1 = 1 LIMIT 1"),
        *(" ON true WHERE q LIKE 't%'", " WHERE u.i IN (SELECT i FROM t)", " GROUP BY 1"),
        *(" WHERE current_user = 'postgres'", " WHERE (u.q IS NULL OR u.i = 3) LIMIT ALL"),
        *(" WHERE i BETWEEN 2 AND random() + 5", " FOR UPDATE", " FETCH FIRST ROW ONLY"),
    ]
)


@settings(
    max_examples=examples(1000),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.tuples(LATERAL_ITEM, AS).map("".join), min_size=1, max_size=3),
    *(LATERAL_FROM, LATERAL_CALL, st.sampled_from([" l", " l", " AS l", " l(pid)", " l(p)"])),
    LATERAL_REST,
)
def test_a_call_for_each_row_is_made_as_often_as_it_would_be(
    connection: Connection, items: list[str], from_: str, made: str, alias: str, rest: str
) -> None:
    sql = f"SELECT {', '.join(items)} FROM {from_} pg_background_{made}{alias}{rest}"
    found = plan(sql)
    if found is None:
        return
    outcome, native = served(connection, found), Outcome.of(connection, sql.encode())
    if native.error is not None:
        # A column that groups or that is ambiguous goes by other names there.
        assert outcome.error is not None
        assert outcome.error[0] == native.error[0]
        return
    assert outcome.error is None
    assert outcome.columns == native.columns
    # Joins may come in any order.
    assert sorted(map(repr, outcome.rows)) == sorted(map(repr, native.rows))
    if isinstance(found, ScalarPlan) and found.in_from:
        assert outcome.calls == native.calls


# --- progress -------------------------------------------------------------------------------


def progress(sql: str) -> bytes | None:
    [statement] = split(sql.encode())
    pieces = progress_statement(sql.encode(), statement, b"marker1")
    return None if pieces is None else Rewrite(sql.encode(), pieces).sql


@pytest.mark.parametrize(
    ("sql", "reports"),
    [
        ("SELECT pg_background_progress(50)", [(50, None)]),
        ("SELECT pg_background_progress(50, NULL) AS p;", [(50, None)]),
        ("SELECT pg_background_progress(-7, '') p -- done", [(-7, b"")]),
        ("SELECT pg_background_progress(NULL)", [(None, None)]),
        ("SELECT pg_background_progress(NULL, 'x')", [(None, b"x")]),
        ("SELECT pg_background_progress(NULL, '=')", [(None, b"=")]),
        ("select all Public.\"pg_background_report_progress\"('150', ' 1 = ')", [(150, b" 1 = ")]),
        ("SELECT pg_background_progress(msg => 'm', pct := 3::smallint)", [(3, b"m")]),
        ("SELECT pg_background_progress(1, E'%\\n''$$' -- ' here\n || $a$ $pg_background$ $a$)",
         [(1, b"%\n'$$ $pg_background$ ")]),
        ("SELECT pg_background_progress(1, $pg_background$loop;$pg_background$)", [(1, b"loop;")]),
        ("SELECT pg_background_progress((SELECT max(i) FROM t), 'é')", [(3, "é".encode())]),
        ("SELECT pg_background_progress(count(*)::int, string_agg('a', 'b'))", [(1, b"a")]),
        ("SELECT pg_background_progress(generate_series(1, 3), 'x')",
         [(1, b"x"), (2, b"x"), (3, b"x")]),
        ("SELECT pg_background_progress((SELECT found + message FROM (SELECT 1, 2) AS"
         " pg_background_report(found, message)))", [(3, None)]),
        ("SELECT pg_background_progress((SELECT loop FROM (VALUES (4)) v(loop)))", [(4, None)]),
        ("SELECT pg_background_progress(nextval('once')::int, nextval('once')::text)", [(1, b"2")]),
    ],
)  # fmt: skip
def test_progress(
    connection: Connection, sql: str, reports: list[tuple[int | None, bytes | None]]
) -> None:
    block = progress(sql)
    assert block is not None
    said: list[tuple[str, bytes]] = []

    def note(diagnostic: Diagnostic) -> None:
        message = (diagnostic.message_primary or "").encode()
        said.append((diagnostic.severity_nonlocalized or "", message))

    connection.execute("CREATE SEQUENCE once")
    connection.execute("SET client_min_messages = error")
    connection.add_notice_handler(note)
    try:
        outcome = Outcome.of(connection, block)
    finally:
        connection.remove_notice_handler(note)
        connection.execute("RESET client_min_messages")
        connection.execute("DROP SEQUENCE once")
    assert outcome.error is None
    assert {severity for severity, _ in said} == {"INFO"}
    assert [parse_progress(message, b"marker1") for _, message in said] == reports


def test_progress_in_any_encoding_and_place() -> None:
    text = "ソ)".encode("shift_jis")
    sql = b"SELECT '" + text + b"'; SELECT pg_background_progress(1, '" + text + b"'); SELECT 2"
    statement = split(sql, encoding="SJIS")[1]
    pieces = progress_statement(sql, statement, b"m", encoding="SJIS")
    assert pieces is not None
    block = Rewrite(sql, pieces).sql
    assert block.count(text) == 1
    assert b"SELECT 2" not in block


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_background_progress()",
        "SELECT pg_background_progress(1, 2, 3)",
        "SELECT pg_background_progress(1), 2",
        "SELECT pg_background_progress(1), pg_background_progress(2)",
        "SELECT pg_background_progress(1) FROM t",
        "SELECT pg_background_progress(1) WHERE false",
        "SELECT pg_background_progress(1) IS NULL",
        "SELECT 1 + pg_background_progress(1)",
        "SELECT * FROM pg_background_progress(1)",
        "SELECT pg_background_progress(pg_background_purge())",
        "SELECT pg_background_progress(1 + pg_background_purge())",
        "SELECT pg_background_progress(ALL 1)",
        "SELECT pg_background_launch('a')",
        "SELECT 'pg_background_progress(1)'",
        "DO $$BEGIN PERFORM pg_background_progress(1); END$$",
        "SELECT 1",
    ],
)
def test_no_progress(sql: str) -> None:
    assert progress(sql) is None


@pytest.mark.parametrize(
    ("sql", "state"),
    [
        ("SELECT pg_background_progress('x')", b"22P02"),
        ("SELECT pg_background_progress(now())", b"42883"),
        ("SELECT pg_background_progress(1, 2)", b"42883"),
        ("SELECT pg_background_progress(1, nosuch)", b"42703"),
        ("SELECT pg_background_progress(1 / 0)", b"22012"),
        ("SELECT pg_background_progress((SELECT i FROM t))", b"21000"),
        ("SELECT pg_background_progress(1 2)", b"42601"),
    ],
)
def test_errors_in_a_report(connection: Connection, sql: str, state: bytes) -> None:
    block = progress(sql)
    assert block is not None
    for text in (block, sql.encode()):
        error = Outcome.of(connection, text).error
        assert error is not None
        assert error[0] == state


# --- the table ------------------------------------------------------------------------------


def test_the_table_of_functions() -> None:
    launch, result_ = FUNCTIONS["pg_background_launch"][0], FUNCTIONS["pg_background_result"][0]
    assert [p.default for p in launch.parameters] == [REQUIRED, 0]
    assert launch.strict
    assert result_.returns_set
    for name, overloads in FUNCTIONS.items():
        assert all(function.name == name for function in overloads)
        signatures = {tuple(p.type for p in function.parameters) for function in overloads}
        assert len(signatures) == len(overloads)
