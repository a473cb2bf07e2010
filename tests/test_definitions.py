"""Definitions that look for jobs in pg_stat_activity: which they are, and what becomes of them,
read from bytes alone. test_definitions_stored.py has them executed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.extension import definitions
from proxy.extension.definitions import Definition
from proxy.sql.tokens import Tokens
from tests.support.growth import LINEAR, growth
from tests.support.sql import statement

COMPARED = "FROM pg_stat_activity WHERE backend_type = 'pg_background'"


def found(sql: str, *, conforming: bool = True) -> Definition | None:
    one = statement(sql.encode(), standard_conforming_strings=conforming)
    assert one is not None
    return definitions.analyze(one, standard_conforming_strings=conforming)


def rewritten(sql: str, *, conforming: bool = True) -> str | None:
    definition = found(sql, conforming=conforming)
    assert definition is not None
    plan = definition.with_view(b"ext")
    return None if plan is None else plan.rewrite.sql.decode()


def function(body: str, language: str = "plpgsql") -> str:
    return f"CREATE FUNCTION f() RETURNS int LANGUAGE {language} AS $body$ {body} $body$"


@pytest.mark.parametrize(
    "condition",
    [
        "backend_type = 'pg_background'",
        "a.backend_type='pg_background'",
        "'pg_background' = a.backend_type",
        "backend_type <> 'pg_background'",
        "backend_type != 'pg_background'",
        "backend_type IN ('client backend', 'pg_background')",
        "backend_type NOT IN ('pg_background')",
        "backend_type = ANY (ARRAY['pg_background', 'x'])",
        "backend_type = ANY ('{pg_background,client backend}')",
        "backend_type = ANY ('{\"pg_background\"}'::text[])",
        "NOT backend_type = ALL (ARRAY['pg_background'])",
        "backend_type LIKE 'pg_background%'",
        "backend_type NOT ILIKE 'pg_background'",
        "backend_type ~ '^pg_background$'",
        "backend_type SIMILAR TO 'pg_background%'",
        "backend_type IS DISTINCT FROM 'pg_background'",
        "backend_type IS NOT DISTINCT FROM 'pg_background'",
        "'pg_background' IS NOT DISTINCT FROM backend_type",
        "'pg_background' IN (a.backend_type, a.application_name)",
        "backend_type::text = 'pg_background'::text",
        "CAST(backend_type AS text) = CAST('pg_background' AS text)",
        "lower(backend_type) = lower('pg_background')",
        "COALESCE(a.backend_type, '') = 'pg_background'",
        "backend_type OPERATOR(pg_catalog.=) 'pg_background'",
        "'pg_background' OPERATOR(pg_catalog.=) backend_type",
        "(backend_type = ('pg_background'))",
        "(a.state, a.backend_type) = ('active', 'pg_background')",
        "CASE backend_type WHEN 'x' THEN false WHEN 'pg_background' THEN true END",
        "CASE WHEN backend_type = 'pg_background' THEN true END",
        "starts_with(backend_type, 'pg_background')",
        "position('pg_background' in backend_type) > 0",
        "backend_type = (SELECT 'pg_background')",
        "backend_type = E'pg_background'",
        "backend_type = $x$pg_background$x$",
        "backend_type = N'pg_background'",
        "a.\"backend_type\" = 'pg_background'",
        "application_name = 'x' AND backend_type = 'pg_background' AND state = 'active'",
    ],
)
def test_comparisons(condition: str) -> None:
    query = f"SELECT a.pid FROM pg_stat_activity a WHERE {condition}"
    new = query.replace("pg_stat_activity", "ext.pg_background_stat_activity")
    for create in ("CREATE VIEW v AS {}", function("RETURN QUERY {};"), function("{}", "sql")):
        assert rewritten(create.replace("{}", query)) == create.replace("{}", new)
    doubled, new = query.replace("'", "''"), new.replace("'", "''")
    for create in (
        "CREATE OR REPLACE FUNCTION f() RETURNS SETOF int AS '{}' LANGUAGE sql",
        "CREATE FUNCTION f() RETURNS SETOF int LANGUAGE 'sql' AS E'\\n\\t{} --\\\\'",
        "CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql AS '-- ä'\n\n'\n{}'",
    ):
        assert rewritten(create.replace("{}", doubled)) == create.replace("{}", new)


@pytest.mark.parametrize(
    "condition",
    [
        "application_name = 'pg_background' AND backend_type = 'client backend'",
        "backend_type = 'client backend' AND application_name IN ('x', 'pg_background')",
        "backend_type = 'client backend' -- not 'pg_background'",
        "backend_type = 'client backend' /* backend_type = 'pg_background' */",
        "query = 'backend_type = ''pg_background'''",
        "query LIKE '%backend_type = ''pg_background''%'",
        "CASE application_name WHEN 'pg_background' THEN backend_type END = 'client backend'",
        "backend_type = 'the pg_background'",
        "query LIKE '%pg_background%' AND backend_type IS NOT NULL",
        "backend_type = current_setting('pg_background.type')",
        "has_function_privilege('pg_background_launch(text,int)', 'x') AND backend_type = 'x'",
    ],
)
def test_what_is_no_comparison(condition: str) -> None:
    query = f"SELECT pid FROM pg_stat_activity WHERE {condition}\n"
    for create in ("CREATE VIEW v AS {}", function("RETURN QUERY {};"), function("{}", "sql")):
        assert found(create.replace("{}", query)) is None


@pytest.mark.parametrize(
    "sql",
    [
        f"SELECT * {COMPARED}",
        f"/* CREATE VIEW */ SELECT * {COMPARED}",
        f"COMMENT ON VIEW v IS $$SELECT 1 {COMPARED}$$",
        f"INSERT INTO docs VALUES ($$SELECT 1 {COMPARED}$$)",
        f"CREATE VIEW v AS SELECT $$SELECT 1 {COMPARED}$$ AS text",
        function(f"-- SELECT 1 {COMPARED}\nRETURN 1;"),
        function(f"/* SELECT 1 {COMPARED} */ RETURN 1;"),
        function(f"RAISE NOTICE $$SELECT 1 {COMPARED}$$;"),
        function(f"RAISE EXCEPTION USING MESSAGE = $$SELECT 1 {COMPARED}$$;"),
        function(f"x := $$no SELECT 1 {COMPARED}$$;"),
        "CREATE VIEW v AS SELECT 1 FROM pg_background_stat_activity"
        " WHERE backend_type = 'pg_background' -- pg_stat_activity",
        "CREATE VIEW v AS SELECT 1 FROM ext.pg_background_stat_activity AS pg_stat_activity"
        " WHERE pg_stat_activity.backend_type = 'pg_background'",
        "CREATE VIEW v AS SELECT 1 FROM pg_background_stat_activity b, pg_stat_activity a"
        " WHERE a.pid = b.pid AND b.backend_type = 'pg_background'",
        function(
            "PERFORM 1 FROM pg_background_stat_activity WHERE backend_type = 'pg_background';"
            " PERFORM 1 FROM pg_stat_activity WHERE state = 'active';"
        ),
        "CREATE VIEW v AS SELECT 1 FROM mine.pg_stat_activity WHERE backend_type = 'pg_background'",
        "CREATE VIEW v AS WITH pg_stat_activity AS (SELECT 'x' AS backend_type)"
        f" SELECT 1 {COMPARED}",
        "CREATE TABLE pg_background (backend_type text, pg_stat_activity text)",
        function("import pg_stat_activity, backend_type, pg_background", "plpython3u"),
    ],
)
def test_what_is_left_alone(sql: str) -> None:
    assert found(sql) is None


@pytest.mark.parametrize(
    "create",
    [
        "CREATE VIEW v AS {}",
        "CREATE OR REPLACE TEMP VIEW v (a) AS {}",
        "CREATE MATERIALIZED VIEW IF NOT EXISTS v AS {} WITH NO DATA",
        "CREATE RULE r AS ON INSERT TO t DO ALSO (NOTIFY x; INSERT INTO u {})",
        "CREATE POLICY p ON t USING (pid IN ({}))",
        "ALTER POLICY p ON t USING (pid IN ({}))",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; {}; END",
        "CREATE FUNCTION f() RETURNS int RETURN ({})",
        "CREATE PROCEDURE p() LANGUAGE plpgsql AS $$ BEGIN COMMIT; PERFORM ({}); END $$",
        "DO $$ BEGIN PERFORM ({}); END $$",
        "DO LANGUAGE plpgsql $$ BEGIN PERFORM ({}); END $$",
        "DO $$ BEGIN FOR r IN {} LOOP NULL; END LOOP; END $$",
        "DO $$ BEGIN EXECUTE $q${}$q$; END $$",
        "DO $$ BEGIN FOR r IN EXECUTE $q${}$q$ || ' LIMIT 1' LOOP NULL; END LOOP; END $$",
        "DO $$ DECLARE q text; BEGIN q := $q${}$q$; EXECUTE q; END $$",
        "DO $$ BEGIN EXECUTE $q$CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $x${}$x$ $q$;"
        " END $$",
    ],
)
@pytest.mark.parametrize("query", [f"SELECT pid {COMPARED}", f"SELECT max(pid) {COMPARED}"])
def test_definitions(create: str, query: str) -> None:
    new = query.replace(
        "FROM pg_stat_activity", "FROM ext.pg_background_stat_activity AS pg_stat_activity"
    )
    assert rewritten(create.replace("{}", query)) == create.replace("{}", new)


@pytest.mark.parametrize(
    "sql",
    [
        # What the view may lack, or have in another order.
        f"CREATE VIEW v AS SELECT * {COMPARED}",
        "CREATE VIEW v AS SELECT a.* FROM pg_stat_activity a WHERE backend_type = 'pg_background'",
        f"CREATE VIEW v AS SELECT leader_pid {COMPARED}",
        f"CREATE VIEW v AS SELECT query_id {COMPARED}",
        f"CREATE VIEW v AS SELECT pg_stat_activity {COMPARED}",
        "CREATE VIEW v AS SELECT to_json(a) FROM pg_stat_activity a"
        " WHERE backend_type = 'pg_background'",
        "CREATE VIEW v AS SELECT 1 FROM pg_stat_activity a(b) WHERE backend_type = 'pg_background'",
        f"CREATE VIEW v AS SELECT 1 FROM x NATURAL JOIN y, (SELECT 1 {COMPARED}) z",
        f"CREATE VIEW v AS SELECT pg_catalog.pg_stat_activity.pid {COMPARED}",
        # Of other relations, functions and languages.
        "CREATE VIEW v AS SELECT pid FROM pg_stat_get_activity(NULL) a"
        " WHERE a.backend_type = 'pg_background'",
        function(f"import plpy; plpy.execute(\"SELECT 1 {COMPARED}\")", "plpython3u"),
        function(f"spi_exec_query(q(SELECT 1 {COMPARED}))", "plperl"),
        # By way of variables.
        function(
            "SELECT a.backend_type INTO STRICT t FROM pg_stat_activity a,"
            " pg_stat_get_activity(1) b; IF t = 'pg_background' THEN RETURN 1; END IF;"
        ),
        "CREATE FUNCTION f(a pg_stat_activity) RETURNS bool LANGUAGE sql"
        " AS $$ SELECT (a).backend_type = 'pg_background' $$",
        function("FOR r IN SELECT * FROM pg_stat_activity LOOP"
                 " IF r.backend_type = 'pg_background' THEN RETURN r.pid; END IF; END LOOP;"),
        # Put together when it runs.
        function("EXECUTE format($$SELECT 1 FROM pg_stat_activity WHERE backend_type = %L$$,"
                 " 'pg_background');"),
        function("EXECUTE 'SELECT 1 FROM pg_stat_activity WHERE backend_type = ANY ($1)'"
                 " USING ARRAY['pg_background'];"),
        function("q := 'SELECT 1 FROM pg_stat_activity WHERE backend_type = '"
                 " || quote_literal('pg_background'); EXECUTE q;"),
        # Not certain to be executed.
        function(f"q := $$SELECT 1 {COMPARED}$$; PERFORM run(q);"),
        function(f"PERFORM run($$SELECT 1 {COMPARED}$$);"),
        # Too long to be read.
        function(f"SELECT 1 {COMPARED}; {'PERFORM 1; ' * 5000}"),
    ],
)  # fmt: skip
def test_what_cannot_be_changed_for_certain(sql: str) -> None:
    definition = found(sql)
    assert definition is not None
    assert definition.relations is None
    notice = definition.with_notice(b"ext", rewrites=True).notice
    assert notice is not None
    assert "ext.pg_background_stat_activity" in str(notice.hint)


@pytest.mark.parametrize(
    "body",
    [
        "SELECT a.backend_type INTO t FROM pg_stat_activity a;"
        " IF t = 'pg_background' THEN x(); END IF;",
        "t := (SELECT a.backend_type FROM pg_stat_activity a);"
        " IF t = 'pg_background' THEN x(); END IF;",
        "DECLARE c CONSTANT text := 'pg_background'; BEGIN"
        " PERFORM 1 FROM pg_stat_activity a WHERE a.backend_type = c; END",
        "DECLARE c text DEFAULT 'pg_background'; BEGIN"
        " PERFORM 1 FROM pg_stat_activity a WHERE c = a.backend_type; END",
        "SELECT k INTO x FROM (SELECT a.backend_type AS k FROM pg_stat_activity a) s"
        " WHERE k = 'pg_background';",
        "PERFORM * FROM pg_stat_activity a WHERE a.backend_type = 'pg_background' FOR UPDATE;",
        "IF EXISTS (SELECT * FROM pg_stat_activity a WHERE backend_type = 'pg_background') THEN"
        " RETURN pg_sleep(0.1 * 2); END IF;",
        "SELECT count(*) INTO n FROM pg_catalog.pg_stat_activity a"
        " WHERE a.pid = 1 AND a.backend_type = 'pg_background';",
        "WHILE child NOT IN (SELECT pid FROM pg_stat_activity a"
        " WHERE backend_type = 'pg_background') LOOP PERFORM x.* FROM x; END LOOP;",
    ],
)  # fmt: skip
def test_code_of_functions(body: str) -> None:
    new = body.replace("pg_catalog.", "").replace(
        "pg_stat_activity a", "ext.pg_background_stat_activity a"
    )
    assert rewritten(function(body)) == function(new)


def test_default_of_a_parameter() -> None:
    header = "CREATE FUNCTION f(t text DEFAULT 'pg_background') RETURNS bool LANGUAGE sql AS"
    body = "$$ SELECT EXISTS (SELECT FROM pg_stat_activity a WHERE a.backend_type = t) $$"
    new = body.replace("pg_stat_activity", "ext.pg_background_stat_activity")
    assert rewritten(f"{header} {body}") == f"{header} {new}"


def test_backslashes_without_standard_conforming_strings() -> None:
    create = (
        r"CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1 /* \' */"
        r" FROM pg_stat_activity a WHERE backend_type = \'pg_background\''"
    )
    new = create.replace("pg_stat", "ext.pg_background_stat")
    assert rewritten(create, conforming=False) == new


@pytest.mark.parametrize("escape", [r"\x70g_stat_activity", r"\160g_stat_activity"])
def test_escaped_letters(escape: str) -> None:
    create = (
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS"
        rf" E'SELECT 1 FROM {escape} a WHERE a.backend_type = ''pg_background'' --"
        " pg_stat_activity'"
    )
    assert rewritten(create) == create.replace(escape, "ext.pg_background_stat_activity")


# What grows, and in which code.
GROWING = (
    ("{}", "x := 'pg_background'; "),
    ("{}", ":= 'pg_background' "),
    ("SELECT 1 FROM pg_stat_activity WHERE {}", "backend_type = 'pg_background' = "),
    ("SELECT 1 FROM pg_stat_activity WHERE {}", "backend_type "),
    ("SELECT 1 FROM pg_stat_activity WHERE {}", "(a.backend_type, "),
    ("SELECT 1 FROM pg_stat_activity WHERE {}", "'pg_background' IN ("),
    ("SELECT backend_type {} FROM pg_stat_activity", "INTO a, 'pg_background' := "),
    ("SELECT 1 FROM pg_background_stat_activity b, pg_stat_activity WHERE {}", "((backend_type "),
    ("SELECT 1 {}", "FROM pg_stat_activity WHERE backend_type = 'pg_background' "),
    ("{}", "EXECUTE 'SELECT FROM pg_stat_activity WHERE backend_type = ''pg_background'''; "),
    ("EXECUTE {};", "'SELECT FROM pg_stat_activity WHERE backend_type = ' || "),
    ("SELECT 'pg_background' {}", "CASE WHEN "),
    ("{}", "''"),
)


@pytest.mark.parametrize(
    ("create", "code", "repeated"),
    [
        *((function("{}"), code, repeated) for code, repeated in GROWING),
        *(("CREATE VIEW v AS {}", code, more) for code, more in GROWING if ";" not in more),
    ],
)
def test_time_is_linear(create: str, code: str, repeated: str) -> None:
    words = "/* backend_type pg_background pg_stat_activity */ "
    create = words + create.replace("{}", code)

    def make(size: int) -> Tokens:
        one = statement(create.replace("{}", repeated * (size // len(repeated))).encode())
        assert one is not None
        return one

    def read(one: Tokens) -> object:
        return definitions.analyze(one, standard_conforming_strings=True)

    assert growth(read, make, 30_000) < LINEAR


# Texts in which one thing goes on from each of many others. Of each, n are about n times 10 bytes.
OURS = "'pg_background'"
MANY = ", ".join([OURS] * 60)
HOSTILE: dict[str, Callable[[int], str]] = {
    "an array that does not end": lambda n: f"backend_type = '{{{',pg_background' * n}'",
    "brackets behind brackets": lambda n: f"backend_type {'()(' * n}{MANY}{')' * n}",
    "WHENs without CASE": lambda n: f"backend_type {'when(' * n}{MANY}{')' * n}",
    "functions that compare": lambda n: f"backend_type = {'strpos(' * n}{MANY}{')' * n}",
    "a long operand": lambda n: f"backend_type {'x ' * n} = ANY (ARRAY[{MANY}])",
    "quotes": lambda n: f"backend_type = '{chr(39) * 100 * n}'",
    "letters": lambda n: f"backend_type = '{'é' * 100 * n}'",
    "types": lambda n: f"backend_type = '{{{',pg_background' * 60}' " * (n // 20),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear_in_hostile_conditions(name: str) -> None:
    def make(size: int) -> Tokens:
        where = HOSTILE[name](size)
        one = statement(f"CREATE VIEW v AS SELECT FROM pg_stat_activity WHERE {where}".encode())
        assert one is not None
        return one

    def read(one: Tokens) -> object:
        return definitions.analyze(one, standard_conforming_strings=True)

    assert growth(read, make, 2_000) < LINEAR


def test_more_than_one_body_is_not_read() -> None:
    """The server refuses them; each may be as long as what is read at all."""
    body = f"AS $$ SELECT 1 {COMPARED} $$ "
    assert found(f"CREATE FUNCTION f() RETURNS int LANGUAGE sql {body}") is not None
    assert found(f"CREATE FUNCTION f() RETURNS int LANGUAGE sql {body * 2}") is None


def test_a_constant_with_very_many_quotes_is_not_read() -> None:
    for count, is_read in ((1_000, True), (100_000, False)):
        body = f"SELECT 1 {COMPARED}".replace("'", "''") + " /* " + "''" * count + " */"
        definition = found(f"CREATE FUNCTION f() RETURNS int LANGUAGE sql AS '{body}'")
        assert (definition is not None) is is_read


@pytest.mark.parametrize("escape", [r"\447", r"\047"])
def test_octal_escapes_are_bytes(escape: str) -> None:
    """The server takes the last eight bits: both are a quote."""
    create = (
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS"
        rf" E'SELECT {escape}backend_type FROM pg_stat_activity WHERE backend_type ="
        r" \'pg_background\' {escape}'"
    ).replace("{escape}", escape)
    assert found(create) is None


@pytest.mark.parametrize("schema", ['"My Schema"', "a_1", '"a.b-c"'])
def test_names_of_schemas(schema: str) -> None:
    definition = found(f"CREATE VIEW v AS SELECT 1 {COMPARED}")
    assert definition is not None
    plan = definition.with_view(schema.encode())
    assert plan is not None
    assert f"FROM {schema}.pg_background_stat_activity AS".encode() in plan.rewrite.sql


@pytest.mark.parametrize("schema", ['"a\'b"', '"a\\b"', '"ä"', '"a""b"', '"a$$b"', '"a%b"'])
def test_schemas_that_a_constant_might_read_otherwise(schema: str) -> None:
    definition = found(f"CREATE VIEW v AS SELECT 1 {COMPARED}")
    assert definition is not None
    assert definition.with_view(schema.encode()) is None
