"""The attacks that got somebody the rights of another, each as it was found.

Invariant: what is asserted is what the attacker has afterwards.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Final

import psycopg
import pytest

from tests.attacks.scene import (
    CASES,
    MALLORY,
    Scene,
    copy,
    is_well,
    lie,
    needs,
    over_dblink,
    pause,
    settled,
)
from tests.support.background import notices
from tests.support.in_database import one
from tests.support.servers import Connection, Proxy, Server, database, psql

pytestmark = pytest.mark.every_server

MAINTENANCE: Final = {
    "reindex": "REINDEX TABLE {schema}.t",
    "analyze": "ANALYZE {schema}.t",
}


@pytest.fixture(autouse=True)
def nobody_has_more(scene: Scene) -> Iterator[None]:
    """The attacker is what he was, whatever the test before has given him."""
    yield
    scene.root.execute(f"ALTER ROLE {MALLORY} NOSUPERUSER".encode())
    scene.root.execute(
        f"REVOKE CREATE ON DATABASE {scene.name} FROM {MALLORY};"
        f" DROP SCHEMA IF EXISTS attack CASCADE;"
        f" REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {MALLORY}".encode()
    )


def trap(scene: Scene, body: str) -> None:
    """A table of the attacker's, in a schema of his, with a function in an index that does
    something when somebody else makes the server run it."""
    scene.root.execute(f"CREATE SCHEMA attack AUTHORIZATION {MALLORY}".encode())
    scene.as_mallory(
        "CREATE TABLE attack.t AS SELECT 1 AS a;"
        " CREATE FUNCTION attack.go() RETURNS void LANGUAGE plpgsql AS $go$ BEGIN"
        f" IF session_user <> '{MALLORY}' THEN {body} END IF;"
        " EXCEPTION WHEN OTHERS THEN NULL; END $go$;"
        " CREATE FUNCTION attack.idx(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM attack.go(); RETURN 1; END $$;"
        " CREATE INDEX ON attack.t (attack.idx(a))"
    )


def spring(scene: Scene, victim: str, how: str, afterwards: Callable[[], object] = bool) -> None:
    """The victim runs a command of maintenance, then works on."""
    with scene.connect(victim) as conn:
        conn.execute(MAINTENANCE[how].format(schema="attack").encode())
        pause()
        afterwards()
        is_well(conn)
    settled(scene)


def rights_of(scene: Scene, victim: str) -> str:
    """What the attacker would have done as the victim."""
    if victim == "postgres":
        return f"ALTER ROLE {MALLORY} SUPERUSER"
    return f"RESET ROLE; GRANT SELECT ON public.secret_{victim} TO {MALLORY}"


def has_rights_of(scene: Scene, victim: str) -> bool:
    """Whether it was done."""
    reads = "SELECT has_table_privilege(%s, %s, 'SELECT')"
    return scene.is_superuser() or bool(one(scene.root, reads, [MALLORY, f"secret_{victim}"]))


# --- C1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["postgres", "dba"])
@pytest.mark.parametrize("how", MAINTENANCE)
def test_c1_a_message_whose_context_comes_from_elsewhere(
    scene: Scene, victim: str, how: str
) -> None:
    """By dblink, which repeats the CONTEXT of another database, whose function is another."""
    needs(scene, "dblink")
    over_dblink(scene)
    job = rights_of(scene, victim)
    trap(scene, f"PERFORM over.pg_background_launch('{job}', 0);")
    spring(scene, victim, how)
    assert not has_rights_of(scene, victim)


# --- C2 ------------------------------------------------------------------------------------------

# How the attacker has a function of his own under the name of the extension's, for a moment.
REPLACED: Final = {
    "set_schema": "DROP FUNCTION ext._pg_background_say();"
    " ALTER FUNCTION attack._pg_background_say() SET SCHEMA ext;",
    "created": "DROP FUNCTION ext._pg_background_say();"
    " EXECUTE replace(pg_get_functiondef('attack._pg_background_say()'::regprocedure),"
    " 'FUNCTION attack.', 'FUNCTION ext.');",
    "renamed": "DROP FUNCTION ext._pg_background_say();"
    " ALTER FUNCTION attack._pg_background_say() RENAME TO other;"
    " ALTER FUNCTION attack.other() SET SCHEMA ext;"
    " ALTER FUNCTION ext.other() RENAME TO _pg_background_say;",
    "schema_renamed": "ALTER SCHEMA ext RENAME TO gone; ALTER SCHEMA attack RENAME TO ext;",
}


@pytest.mark.parametrize("victim", ["postgres", "dba"])
@pytest.mark.parametrize("how", ["reindex", "analyze"])
@pytest.mark.parametrize("replaced", REPLACED)
def test_c2_a_function_replaced_for_a_moment(
    scene: Scene, replaced: str, how: str, victim: str
) -> None:
    """The attacker owns the extension's schema, and replaces its functions in a transaction that is
    never committed."""
    root = scene.root
    all_of_it = replaced == "schema_renamed"
    trap(
        scene,
        f"""
        BEGIN
          {REPLACED[replaced]}
          PERFORM {"ext" if all_of_it else "attack"}.pg_background_launch(
            '{rights_of(scene, victim)}', 0);
          PERFORM pg_sleep(0.2);
          RAISE EXCEPTION 'undo';
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
        """,
    )
    names = "" if all_of_it else "_pg_background_say"
    copy(
        scene,
        "attack",
        lambda text: re.sub(rf"(?<!FUNCTION )attack\.(?={names})", "ext.", lie(text)),
    )
    give = "ALTER SCHEMA ext OWNER TO {0}; ALTER DATABASE {1} OWNER TO {0}"
    root.execute(give.format(MALLORY, scene.name).encode())
    root.execute(f"GRANT USAGE ON SCHEMA ext TO {MALLORY}, PUBLIC".encode())
    back = give.format(scene.owner, scene.name).encode()
    try:
        spring(scene, victim, how, lambda: root.execute(back))
        assert not has_rights_of(scene, victim)
    finally:
        root.execute(back)


# --- C3 ------------------------------------------------------------------------------------------

TYPES: Final = (
    *("text", "varchar", "name", "bpchar", "int2", "int4", "int8", "numeric", "float8", "bool"),
    *("json", "jsonb", "oid", "timestamptz", "anyelement", "anyarray", "text[]", "varchar[]"),
    *("name[]", "int4[]", "int8[]", "bytea", "regproc", "record"),
)

# Overloads of each function of the extension: each argument by each other type, and further ones.
HIJACK: Final = """
DO $do$ DECLARE f record; other text; place int; types text[]; made int := 0;
BEGIN
  FOR f IN SELECT p.proname, p.pronargs, p.proretset, format_type(p.prorettype, NULL) AS result,
      ARRAY(SELECT format_type(u.o, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY u(o, n)
        ORDER BY n) AS types
    FROM pg_proc p WHERE p.pronamespace = 'ext'::regnamespace AND p.prokind = 'f'
      AND p.proowner <> 'mallory'::regrole
  LOOP
    FOR place IN 0..f.pronargs LOOP
      FOREACH other IN ARRAY string_to_array('{types}', ';') LOOP
        types := f.types;
        IF place = 0 THEN types := types || other; ELSE types[place] := other; END IF;
        BEGIN
          EXECUTE format('CREATE FUNCTION ext.%I(%s) RETURNS %s %s LANGUAGE plpgsql AS $h$ BEGIN'
            ' RAISE WARNING ''hijacked: %s as %%'', current_user; RAISE EXCEPTION ''x''; END $h$',
            f.proname, array_to_string(types, ', '), CASE WHEN f.proretset THEN 'SETOF' END,
            f.result, f.proname);
          made := made + 1;
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
      END LOOP;
    END LOOP;
  END LOOP;
  RAISE WARNING 'made %', made;
END $do$
"""

# One value of each type that a parameter of the API has.
VALUES: Final = {
    "text": "'SELECT 1'",
    "name": "'SELECT 1'",
    "integer": "1",
    "bigint": "1",
    "double precision": "1",
    "boolean": "true",
    "integer[]": "'{1}'",
    "bigint[]": "'{1}'",
    "ext.pg_background_handle": "'(1,1)'",
    "ext.pg_background_handle[]": "'{}'",
}


def test_c3_overloads_of_what_our_functions_call(scene: Scene) -> None:
    """A call between our functions finds ours, whatever else is in the schema."""
    root = scene.root
    api = root.execute(
        "SELECT p.proname, ARRAY(SELECT format_type(u.o, NULL) FROM unnest(p.proargtypes)"
        " WITH ORDINALITY u(o, n) ORDER BY n), format_type(p.prorettype, NULL)"
        " FROM pg_proc p WHERE p.pronamespace = 'ext'::regnamespace AND p.prokind = 'f'"
        " AND p.proname ~ '^pg_background' AND p.proname !~ 'privileges|executor|detach_all'"
    ).fetchall()
    assert len(api) > 40
    root.execute(f"GRANT CREATE ON SCHEMA ext TO {MALLORY}".encode())
    try:
        with scene.mallory() as conn, notices(conn) as made:
            conn.execute(HIJACK.replace("{types}", ";".join(TYPES)).encode())
        assert int(str(made[-1]["message_primary"]).split()[1]) > 1000
        with scene.connect("postgres") as conn, notices(conn) as heard:
            for name, types, result in api:
                arguments = ", ".join(f"CAST({VALUES[type]} AS {type})" for type in types)
                call = f"ext.{name}({arguments})"
                columns = " AS r(x text)" if result == "record" else ""
                attempt(conn, f"DO $d$ BEGIN PERFORM * FROM {call}{columns}; END $d$")
            for view in ("list", "activity"):
                attempt(conn, f"WITH q AS (TABLE ext.pg_background_{view}) TABLE q")
        assert [n["message_primary"] for n in heard if "hijacked" in str(n)] == []
    finally:
        root.execute(f"REVOKE CREATE ON SCHEMA ext FROM {MALLORY}".encode())
        root.execute(
            "DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE"
            f" pronamespace = 'ext'::regnamespace AND proowner = '{MALLORY}'::regrole LOOP"
            " EXECUTE format('DROP FUNCTION %s', f); END LOOP; END $$".encode()
        )


def attempt(conn: Connection, statement: str) -> None:
    """Something that may fail."""
    with contextlib.suppress(psycopg.Error):
        conn.execute(statement.encode())


@pytest.mark.parametrize("owner", [MALLORY, "bob"])
def test_c3_as_it_was_found(scene: Scene, owner: str) -> None:
    """The superuser looks at the list of jobs, in a join."""
    root = scene.root
    root.execute(f"GRANT CREATE ON SCHEMA ext TO {owner}".encode())
    try:
        with scene.server.connect(dbname=scene.name, user=owner) as conn:
            conn.execute(
                "CREATE FUNCTION ext._pg_background_answer(asked text[], settings text)"
                " RETURNS text[] LANGUAGE plpgsql AS $$ BEGIN"
                f" ALTER ROLE {MALLORY} SUPERUSER; RETURN ARRAY['v', '{{}}']; END $$".encode()
            )
        with scene.connect("postgres") as conn:
            attempt(
                conn,
                "SELECT l.pid, a.state FROM ext.pg_background_list l"
                " JOIN pg_stat_activity a USING (pid)",
            )
            assert not scene.is_superuser()
            is_well(conn)
    finally:
        root.execute(f"REVOKE CREATE ON SCHEMA ext FROM {owner}".encode())
        root.execute("DROP FUNCTION ext._pg_background_answer(text[], text)")


# --- H1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scene", "victim"), CASES, indirect=["scene"])
@pytest.mark.parametrize("how", MAINTENANCE)
def test_h1_a_look_alike_in_ones_own_schema(scene: Scene, victim: str, how: str) -> None:
    """The attacker may create things in the database: an extension of his own too."""
    scene.root.execute(f"GRANT ALL ON DATABASE {scene.name} TO {MALLORY}".encode())
    trap(scene, f"PERFORM attack.pg_background_launch('{rights_of(scene, victim)}', 0);")
    copy(scene, "attack", lie)
    spring(scene, victim, how)
    assert not has_rights_of(scene, victim)


# --- H2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["dba", "bob"])
@pytest.mark.parametrize("how", MAINTENANCE)
@pytest.mark.parametrize("call", ["pg_background_launch('{}', 0)", "pg_background_submit_v2('{}')"])
def test_h2_the_genuine_function_in_an_owners_index(
    scene: Scene, victim: str, how: str, call: str
) -> None:
    """The victim is a member of the attacker's role, so a job could RESET ROLE to the victim."""
    trap(scene, f"PERFORM ext.{call.format(rights_of(scene, victim))};")
    spring(scene, victim, how)
    assert not has_rights_of(scene, victim)


@pytest.mark.parametrize("victim", ["postgres", "dba", "bob"])
def test_h2_in_a_security_definer_function(scene: Scene, victim: str) -> None:
    """The same where the victim only calls a function."""
    job = rights_of(scene, victim)
    scene.root.execute(f"CREATE SCHEMA attack AUTHORIZATION {MALLORY}".encode())
    scene.as_mallory(
        "CREATE FUNCTION attack.f() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
        f" PERFORM ext.pg_background_launch('{job}', 0); EXCEPTION WHEN OTHERS THEN NULL; END $$;"
        " GRANT USAGE ON SCHEMA attack TO PUBLIC"
    )
    with scene.connect(victim) as conn:
        conn.execute("SELECT attack.f()")
        is_well(conn)
    settled(scene)
    assert not has_rights_of(scene, victim)


# --- L1 and M5, from inside ----------------------------------------------------------------------


def test_l1_nobody_reads_the_queries_of_another_role(scene: Scene) -> None:
    """The extension shows nothing of pg_stat_activity that the server does not: of what has its
    owner's rights, nothing comes back."""
    definers = scene.root.execute(
        "SELECT p.proname, CAST(CAST(p.prorettype AS regtype) AS text) FROM pg_proc p"
        " WHERE p.pronamespace = 'ext'::regnamespace AND p.prosecdef"
    ).fetchall()
    assert definers == [("_pg_background_record", "void")]


@pytest.mark.parametrize("victim", ["postgres", "dba", "bob"])
@pytest.mark.parametrize("function", ["text AS $$ SELECT 'x' $$", "int AS $$ SELECT 1 $$"])
def test_m5_nobody_else_makes_calls_fail(
    server: Server, proxy: Proxy, scenes: dict[str, Scene], victim: str, function: str
) -> None:
    """A function with the marker's name in the schema of somebody who may create schemas."""
    with database(server, "attacked_before") as name:
        with server.connect(dbname=name) as root:
            root.execute(f"ALTER DATABASE {name} OWNER TO dba".encode())
            root.execute(f"GRANT CREATE ON DATABASE {name} TO {MALLORY}".encode())
            root.execute("GRANT pgbackground_role TO dba, bob")
        with server.connect(dbname=name, user=MALLORY) as conn:
            conn.execute("CREATE SCHEMA attack; GRANT USAGE ON SCHEMA attack TO PUBLIC")
            conn.execute(
                "CREATE FUNCTION attack._pg_background_version() RETURNS"
                f" {function} LANGUAGE sql".encode()
            )
        try:
            with proxy.connect(dbname=name, user=victim) as conn:
                pid = one(conn, "SELECT pg_background_launch('SELECT 42')")
                query = "SELECT * FROM pg_background_result(%s) AS (n int)"
                assert one(conn, query, [pid]) == 42
                shown = psql(proxy.port, "-c", "\\dx", dbname=name, user=victim).stdout
                assert "plpgsql" in shown
                assert "pg_background" not in shown
            owner = "dba" if victim == "bob" else victim
            with proxy.connect(dbname=name, user=owner) as conn:
                conn.execute("CREATE SCHEMA ext; CREATE EXTENSION pg_background SCHEMA ext")
                conn.execute("GRANT USAGE ON SCHEMA ext TO PUBLIC")
            with proxy.connect(dbname=name, user=owner) as conn:
                is_well(conn)
        finally:
            with server.connect() as root:
                root.execute("REVOKE pgbackground_role FROM dba, bob")
