"""Every place where code of others runs in a victim's session, with every means to get a job.

Invariant: hostile code notes as whom it could have run something itself, by RESET ROLE and RESET
SESSION AUTHORIZATION, and no job that it gets may have run as anybody else. And the code has run,
or the attempt says nothing.
"""

from __future__ import annotations

import itertools
from typing import Final

import pytest

from tests.attacks.scene import CASES, MALLORY, Scene, needs, settled

# The places themselves take turns: see conftest.py.
pytestmark = [pytest.mark.every_server, pytest.mark.turns(1)]

_number = itertools.count(1)

# In what follows {n} stands for a name that is new for each attempt (a schema has it too), {t} for
# that name in the attacker's schema, {f} for a function of his, of an int, that attacks.

# What the server runs as the owner of a table.
OWNERS_CODE: Final = {
    "reindex": ("CREATE INDEX ON {t} ({f}(a))", "REINDEX TABLE {t}"),
    "reindex_predicate": ("CREATE INDEX ON {t} (a) WHERE {f}(a) > 0", "REINDEX TABLE {t}"),
    "reindex_concurrently": ("CREATE INDEX ON {t} ({f}(a))", "REINDEX TABLE CONCURRENTLY {t}"),
    "reindex_schema": ("CREATE INDEX ON {t} ({f}(a))", "REINDEX SCHEMA mallory"),
    "create_index": ("", "CREATE INDEX ON {t} ({f}(a))"),
    "create_index_concurrently": ("", "CREATE INDEX CONCURRENTLY ON {t} ({f}(a))"),
    "analyze": ("CREATE INDEX ON {t} ({f}(a))", "ANALYZE {t}"),
    "statistics": ("CREATE STATISTICS {t}_s ON ({f}(a)), a FROM {t}", "ANALYZE {t}"),
    "vacuum_analyze": ("CREATE INDEX ON {t} ({f}(a))", "VACUUM ANALYZE {t}"),
    "vacuum_full": ("CREATE INDEX ON {t} ({f}(a))", "VACUUM FULL {t}"),
    "cluster": ("CREATE INDEX {n}_i ON {t} (a, {f}(a))", "CLUSTER {t} USING {n}_i"),
    "refresh": (
        "CREATE MATERIALIZED VIEW {t}_v AS SELECT {f}(a) AS a FROM {t}",
        "REFRESH MATERIALIZED VIEW {t}_v",
    ),
    "refresh_concurrently": (
        "CREATE MATERIALIZED VIEW {t}_v AS SELECT {f}(a) AS a FROM {t};"
        " CREATE UNIQUE INDEX ON {t}_v (a)",
        "REFRESH MATERIALIZED VIEW CONCURRENTLY {t}_v",
    ),
    "foreign_key_cascade": (
        "CREATE TABLE {t}_c (victim text REFERENCES public.parent ON UPDATE CASCADE);"
        " INSERT INTO {t}_c VALUES ('{victim}'); CREATE FUNCTION {t}_f() RETURNS trigger"
        " LANGUAGE plpgsql AS $$ BEGIN PERFORM {f}(1); RETURN NEW; END $$;"
        " CREATE TRIGGER x BEFORE UPDATE ON {t}_c FOR EACH ROW EXECUTE FUNCTION {t}_f()",
        "UPDATE public.parent SET victim = victim || '2' WHERE victim = '{victim}'",
        "UPDATE public.parent SET victim = '{victim}' WHERE victim = '{victim}2'",
    ),
    "subtype_of_a_range": (
        "CREATE FUNCTION {t}_d(int, int) RETURNS float8 IMMUTABLE LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM {f}(1); RETURN $1 - $2; END $$;"
        " CREATE TYPE {t}_r AS RANGE (SUBTYPE = int, SUBTYPE_DIFF = {t}_d);"
        " CREATE TABLE {t}_t AS SELECT {t}_r(i, i + 10) AS r FROM generate_series(1, 2000) i;"
        " CREATE INDEX ON {t}_t USING gist (r)",
        "REINDEX TABLE {t}_t",
    ),
}

TRIGGER: Final = (
    "CREATE FUNCTION {t}_f() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM {f}(1); RETURN NEW; END $$; "
)

# Code that runs as the role that does something; {f} is SECURITY DEFINER, or not.
USERS_CODE: Final = {
    "function": ("", "SELECT {f}(1)"),
    "prepared": ("", "PREPARE p AS SELECT {f}(a) FROM {t}", "EXECUTE p"),
    "cursor": ("", "BEGIN", "DECLARE c CURSOR FOR SELECT {f}(a) FROM {t}", "FETCH c", "COMMIT"),
    "do": ("", "DO $$ BEGIN PERFORM {f}(1); END $$"),
    "procedure": (
        "CREATE PROCEDURE {t}_p() LANGUAGE plpgsql AS $$ BEGIN PERFORM {f}(1); COMMIT;"
        " PERFORM {f}(1); END $$",
        "CALL {t}_p()",
    ),
    "sql_inlined": (
        "CREATE FUNCTION {t}_f(int) RETURNS int LANGUAGE sql AS $$ SELECT {f}($1) $$",
        "SELECT {t}_f(a) FROM {t}",
    ),
    "view": ("CREATE VIEW {t}_v AS SELECT {f}(a) AS a FROM {t}", "TABLE {t}_v"),
    "view_barrier": (
        "CREATE VIEW {t}_v WITH (security_barrier) AS SELECT a FROM {t} WHERE {f}(a) > 0",
        "TABLE {t}_v",
    ),
    "row_security": (
        "ALTER TABLE {t} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        " CREATE POLICY x ON {t} USING ({f}(a) > 0)",
        "SET row_security = on; SELECT * FROM {t}",
    ),
    "before_row": (
        TRIGGER + "CREATE TRIGGER x BEFORE INSERT ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_f()",
        "INSERT INTO {t} VALUES (2)",
    ),
    "after_statement": (
        TRIGGER + "CREATE TRIGGER x AFTER INSERT ON {t} EXECUTE FUNCTION {t}_f()",
        "INSERT INTO {t} VALUES (2)",
    ),
    "truncate": (
        TRIGGER + "CREATE TRIGGER x BEFORE TRUNCATE ON {t} EXECUTE FUNCTION {t}_f()",
        "TRUNCATE {t}",
    ),
    "deferred": (
        TRIGGER + "CREATE CONSTRAINT TRIGGER x AFTER INSERT ON {t} DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION {t}_f()",
        "BEGIN",
        "INSERT INTO {t} VALUES (2)",
        "SELECT ext.pg_background_launch('SELECT 1', 0)",
        "COMMIT",
    ),
    "deferred_to_prepare": (
        TRIGGER + "CREATE CONSTRAINT TRIGGER x AFTER INSERT ON {t} DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION {t}_f()",
        "BEGIN",
        "INSERT INTO {t} VALUES (2)",
        "PREPARE TRANSACTION '{n}'",
        "COMMIT PREPARED '{n}'",
    ),
    "rule": (
        "CREATE RULE x AS ON INSERT TO {t} DO ALSO SELECT {f}(1)",
        "INSERT INTO {t} VALUES (2)",
    ),
    "default": (
        "ALTER TABLE {t} ADD b int; ALTER TABLE {t} ALTER b SET DEFAULT {f}(1)",
        "INSERT INTO {t} VALUES (2)",
    ),
    "copy": (
        "CREATE VIEW {t}_v AS SELECT {f}(a) AS a FROM {t}",
        "COPY (TABLE {t}_v) TO STDOUT",
    ),
    "generated": (
        "ALTER TABLE {t} ADD b int GENERATED ALWAYS AS ({f}(a)) STORED",
        "INSERT INTO {t} VALUES (2)",
    ),
    "check": (
        "ALTER TABLE {t} ADD CHECK ({f}(a) > 0) NOT VALID",
        "INSERT INTO {t} VALUES (2)",
    ),
    "validate": (
        "ALTER TABLE {t} ADD CONSTRAINT x CHECK ({f}(a) > 0) NOT VALID",
        "ALTER TABLE {t} VALIDATE CONSTRAINT x",
    ),
    "alter_type_using": ("", "ALTER TABLE {t} ALTER a TYPE int8 USING {f}(a)"),
    "domain": (
        "CREATE DOMAIN {t}_d AS int CHECK ({f}(VALUE) > 0)",
        "SELECT CAST(1 AS {t}_d)",
    ),
    "domain_variable": (
        "CREATE DOMAIN {t}_d AS int CHECK ({f}(VALUE) > 0)",
        "DO $$ DECLARE x {t}_d := 1; BEGIN NULL; END $$",
    ),
    "domain_in_a_result": (
        "CREATE DOMAIN {t}_d AS int CHECK ({f}(VALUE) > 0)",
        "SELECT * FROM ext.pg_background_result(ext.pg_background_launch('SELECT 1::{t}_d', 0))"
        " AS (x {t}_d)",
        "WITH l AS (SELECT ext.pg_background_launch('SELECT 1::{t}_d', 0) AS pid) SELECT r.x"
        " FROM l, ext.pg_background_result(l.pid) AS r(x {t}_d)",
    ),
    "operator": (
        "CREATE FUNCTION {t}_o(int, text) RETURNS bool LANGUAGE sql AS $$ SELECT {f}($1) > 0 $$;"
        " CREATE OPERATOR {n}.@@ (FUNCTION = {t}_o, LEFTARG = int, RIGHTARG = text)",
        "SELECT 1 OPERATOR({n}.@@) 'x'::text",
        "SET search_path = {n}, pg_catalog",
        "SELECT 1 @@ 'x'::text",
    ),
    "cast": (
        "CREATE TYPE {t}_y AS (a int); CREATE FUNCTION {t}_c({t}_y) RETURNS int LANGUAGE sql AS"
        " $$ SELECT {f}($1.a) $$; CREATE CAST ({t}_y AS int) WITH FUNCTION {t}_c({t}_y)"
        " AS ASSIGNMENT",
        "SELECT CAST(ROW(1)::{t}_y AS int)",
    ),
    "aggregate": (
        "CREATE FUNCTION {t}_g(int, int) RETURNS int LANGUAGE sql AS $$ SELECT {f}($2) $$;"
        " CREATE AGGREGATE {t}_a(int) (SFUNC = {t}_g, STYPE = int, INITCOND = '0')",
        "SELECT {t}_a(a) FROM {t}",
    ),
    "partition_key": (
        "CREATE TABLE {t}_p (a int) PARTITION BY LIST ({f}(a));"
        " CREATE TABLE {t}_p1 PARTITION OF {t}_p DEFAULT; GRANT ALL ON {t}_p TO PUBLIC",
        "INSERT INTO {t}_p VALUES (1)",
    ),
    "search_path": (
        "CREATE FUNCTION {n}.lower(int) RETURNS int LANGUAGE sql AS $$ SELECT {f}($1) $$",
        "SET search_path = {n}, pg_catalog",
        "SELECT lower(1)",
    ),
    "argument_of_a_call": (
        "CREATE FUNCTION {t}_q() RETURNS text LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM {f}(1); RETURN 'SELECT 1'; END $$",
        "SELECT ext.pg_background_launch({t}_q(), 0)",
        "WITH q AS (SELECT ext.pg_background_launch({t}_q(), 0)) TABLE q",
    ),
    "after_a_call": (
        "",
        "BEGIN",
        "DO $$ BEGIN PERFORM ext.pg_background_launch('SELECT 1', 0); PERFORM {f}(1); END $$",
        "COMMIT",
    ),
    "while_a_result_is_read": (
        "",
        "DO $$ DECLARE r record; BEGIN FOR r IN SELECT n FROM ext.pg_background_result("
        "ext.pg_background_launch('SELECT generate_series(1, 3)', 0)) AS (n int) LOOP"
        " PERFORM {f}(r.n); END LOOP; END $$",
        "SELECT {f}(n) FROM ext.pg_background_result("
        "ext.pg_background_launch('SELECT generate_series(1, 3)', 0)) AS (n int)",
    ),
    "in_a_job": (
        "",
        "SELECT * FROM ext.pg_background_result(ext.pg_background_launch('SELECT {f}(1)', 0))"
        " AS (n int)",
    ),
    "in_a_job_in_a_job": (
        "",
        "SELECT * FROM ext.pg_background_result(ext.pg_background_launch($q$SELECT r.n FROM"
        " (SELECT ext.pg_background_launch('SELECT {f}(1)', 0) AS pid OFFSET 0) l,"
        " ext.pg_background_result(l.pid) AS r(n int)$q$, 0)) AS (n int)",
    ),
    "maintenance_in_a_job": (
        "CREATE INDEX ON {t} (mallory.idx(a))",
        "SELECT * FROM ext.pg_background_result(ext.pg_background_launch('REINDEX TABLE {t}', 0))"
        " AS (tag text)",
    ),
}

ROLES: Final = {
    "set_role": ("SET ROLE mallory", "SELECT {f}(1)", "RESET ROLE"),
    "set_role_local": ("BEGIN", "SET LOCAL ROLE mallory", "SELECT {f}(1)", "COMMIT"),
    "session_authorization": (
        "SET SESSION AUTHORIZATION mallory",
        "SELECT {f}(1)",
        "RESET SESSION AUTHORIZATION",
    ),
    "session_authorization_of_another": (
        "SET SESSION AUTHORIZATION bob",
        "SELECT {f}(1)",
        "RESET SESSION AUTHORIZATION",
    ),
    "role_in_session_authorization": (
        "SET SESSION AUTHORIZATION bob",
        "SET ROLE mallory",
        "SELECT {f}(1)",
        "RESET SESSION AUTHORIZATION",
    ),
    "function_with_set_role": ("SELECT {t}_r()",),
}


USUAL: Final = ("postgres", "bob")
BOTH: Final = [pytest.param(*case.values, "definer", marks=case.marks) for case in CASES] + [
    # Code that runs with its user's rights has nothing to gain: once is enough.
    pytest.param(*case.values, "idx", marks=[] if case.values == USUAL else pytest.mark.slow)
    for case in CASES
]


def attempt(
    scene: Scene, victim: str, prepare: str, *statements: str, function: str, must_run: bool = True
) -> None:
    """The attacker prepares, the victim falls for it; no role gains anything."""
    n = f"a{next(_number)}"
    words = {"t": f"mallory.{n}", "n": n, "f": f"mallory.{function}", "victim": victim}
    scene.root.execute(f"CREATE SCHEMA {n} AUTHORIZATION {MALLORY}".encode())
    scene.root.execute(f"GRANT USAGE ON SCHEMA {n} TO PUBLIC".encode())
    scene.as_mallory(
        "SET search_path = mallory; CREATE TABLE {t} AS SELECT 1 AS a;"
        " GRANT ALL ON {t} TO PUBLIC; ".format(**words)
        + prepare.format(**words).replace("{}", "")
    )
    scene.run(victim, n, *(statement.format(**words) for statement in statements))
    settled(scene)
    if victim == "postgres" != scene.owner:
        must_run = False  # what comes before it is not served
    assert scene.ran(n) or not must_run, "the hostile code has not run"
    assert scene.breaches(n) == []
    assert not scene.is_superuser()


@pytest.mark.parametrize(("scene", "victim"), CASES, indirect=["scene"])
@pytest.mark.parametrize("place", OWNERS_CODE)
def test_code_that_the_server_runs_as_its_owner(scene: Scene, place: str, victim: str) -> None:
    # Not every version asks for the difference.
    must_run = place != "subtype_of_a_range"
    attempt(scene, victim, *OWNERS_CODE[place], function="idx", must_run=must_run)


@pytest.mark.parametrize(("scene", "victim", "function"), BOTH, indirect=["scene"])
@pytest.mark.parametrize("place", USERS_CODE)
def test_code_that_the_server_runs_for_its_user(
    scene: Scene, place: str, function: str, victim: str
) -> None:
    must_run = victim != "postgres" or place != "row_security"
    attempt(scene, victim, *USERS_CODE[place], function=function, must_run=must_run)


@pytest.mark.parametrize(("scene", "victim", "function"), BOTH, indirect=["scene"])
@pytest.mark.parametrize("place", ROLES)
def test_code_under_another_role(scene: Scene, place: str, function: str, victim: str) -> None:
    prepare = (
        "CREATE FUNCTION {t}_r() RETURNS int LANGUAGE sql SET role = mallory AS $$ SELECT {f}(1) $$"
    )
    superusers = place in ("session_authorization", "session_authorization_of_another")
    attempt(
        scene,
        victim,
        prepare,
        *ROLES[place],
        function=function,
        must_run=victim == "postgres" or not superusers,
    )


@pytest.mark.parametrize(("scene", "victim", "function"), BOTH, indirect=["scene"])
@pytest.mark.parametrize("event", ["ddl_command_start", "ddl_command_end", "sql_drop"])
def test_an_event_trigger(scene: Scene, event: str, function: str, victim: str) -> None:
    """A superuser must have created it, but its function is the attacker's."""
    name = f"e{next(_number)}"
    scene.as_mallory(
        f"CREATE FUNCTION mallory.{name}() RETURNS event_trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM mallory.{function}(1); END $$"
    )
    scene.root.execute(
        f"CREATE EVENT TRIGGER {name} ON {event} EXECUTE FUNCTION mallory.{name}()".encode()
    )
    try:
        attempt(
            scene,
            victim,
            "",
            "CREATE TEMP TABLE x (); DROP TABLE x",
            function=function,
        )
    finally:
        scene.root.execute(f"DROP EVENT TRIGGER {name}".encode())


MESSAGE: Final = "SELECT current_setting($$pg_background_proxy.message$$, true) AS m"
LANGUAGES: Final = {
    "plperl": "CREATE FUNCTION {t}_l(int) RETURNS int IMMUTABLE LANGUAGE plperl AS $f$"
    " spi_exec_query('SELECT mallory.go()');"
    f" elog(INFO, spi_exec_query('{MESSAGE}')->{{rows}}[0]->{{m}} // 'x'); return 1; $f$",
    "plpython3u": "CREATE FUNCTION {t}_l(n int) RETURNS int IMMUTABLE LANGUAGE plpython3u AS $f$\n"
    f"plpy.execute('SELECT mallory.go()')\nplpy.info(plpy.execute('{MESSAGE}')[0]['m'] or 'x')\n"
    "return 1 $f$",
}


@pytest.mark.parametrize(("scene", "victim"), CASES, indirect=["scene"])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("definer", [False, True])
def test_other_languages(scene: Scene, language: str, definer: bool, victim: str) -> None:
    available = "SELECT count(*) FROM pg_available_extensions WHERE name = %s"
    if scene.root.execute(available, [language]).fetchone() == (0,):
        pytest.skip(f"this PostgreSQL has no {language}")
    scene.root.execute(f"CREATE EXTENSION IF NOT EXISTS {language}".encode())
    name = f"mallory.l{next(_number)}"
    # PL/Python is not for him, but a function in it may be his.
    create = LANGUAGES[language].replace("{t}", name)
    scene.root.execute(create.encode())
    kind = "SECURITY DEFINER" if definer else "SECURITY INVOKER"
    scene.root.execute(f"ALTER FUNCTION {name}_l(int) OWNER TO {MALLORY}".encode())
    scene.root.execute(f"ALTER FUNCTION {name}_l(int) {kind}".encode())
    place = f"CREATE INDEX ON {{t}} ({name}_l(a))"
    attempt(scene, victim, place, f"REINDEX TABLE {{t}}; SELECT {name}_l(1)", function="idx")


@pytest.mark.parametrize(("scene", "victim"), CASES, indirect=["scene"])
@pytest.mark.parametrize("function", ["definer", "idx"])
def test_a_foreign_table(scene: Scene, function: str, victim: str) -> None:
    """What postgres_fdw runs elsewhere is mallory's, and its errors come with that CONTEXT."""
    needs(scene, "postgres_fdw")
    n = f"f{next(_number)}"
    scene.root.execute(
        f"CREATE SERVER {n} FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{scene.server.host}',"
        f" port '{scene.server.port}', dbname '{scene.name}');"
        f" CREATE USER MAPPING FOR PUBLIC SERVER {n} OPTIONS (user '{MALLORY}',"
        f" password_required 'false');"
        f" GRANT USAGE ON FOREIGN SERVER {n} TO PUBLIC".encode()
    )
    attempt(
        scene,
        victim,
        "CREATE VIEW {t}_v AS SELECT {f}(a) AS a FROM {t};"
        f" CREATE FOREIGN TABLE {{t}}_x (a int) SERVER {n} OPTIONS (table_name '{{n}}_v');"
        " GRANT ALL ON {t}_x TO PUBLIC; CREATE VIEW {t}_y AS SELECT {f}(a) FROM {t}_x",
        "TABLE {t}_x",
        "TABLE {t}_y",
        "ANALYZE {t}_x",
        function=function,
    )
