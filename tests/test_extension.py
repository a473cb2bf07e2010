"""CREATE EXTENSION pg_background and its kin through the proxy: one command of the client's own
transaction, said in the server's words."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from protocol import messages as m
from proxy.api.functions import catalog
from proxy.extension.installed import VERSIONS
from tests.conftest import StartProxy
from tests.support.background import failure, message, notices, wait_until
from tests.support.in_database import one
from tests.support.recorder import Frontend
from tests.support.servers import Connection, Proxy, Server, database, psql

pytestmark = pytest.mark.every_server

ROLE = "pgbackground_role"
MARKER = "_pg_background_version"
OURS = (
    "SELECT count(*)::int FROM pg_proc WHERE proname LIKE '%pg\\_background\\_%'"
    " OR proname LIKE '%\\_pg\\_background%'"
)
TYPES = "SELECT count(*)::int FROM pg_class WHERE relname LIKE 'pg\\_background%'"
EXISTS = ("42710", 'extension "pg_background" already exists')
MISSING = ("42704", 'extension "pg_background" does not exist')

_number = itertools.count(1)


@pytest.fixture(autouse=True)
def cleaned(proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has no extension before a test."""
    yield
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("DROP EXTENSION IF EXISTS pg_background CASCADE")


@pytest.fixture
def role(observer: Connection) -> Iterator[str]:
    """A role that may log in and nothing else."""
    name = f"plain_{next(_number)}"
    observer.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    query = "SELECT 1 FROM pg_stat_activity WHERE usename = %s"
    wait_until(lambda: not observer.execute(query, [name]).fetchone())
    observer.execute(f"DROP OWNED BY {name} CASCADE")
    observer.execute(f"DROP ROLE {name}")


def version(conn: Connection) -> str | None:
    """As the catalogs say it through the proxy."""
    row = conn.execute(
        "SELECT extversion FROM pg_extension WHERE extname = 'pg_background'"
    ).fetchone()
    return None if row is None else str(row[0])


def create(conn: Connection, rest: str = "") -> None:
    conn.execute(f"CREATE EXTENSION pg_background {rest}".encode())


# --- what is created -------------------------------------------------------------------------


def test_command_tags(conn: Connection) -> None:
    for command, tag in (
        ("CREATE EXTENSION pg_background", "CREATE EXTENSION"),
        ("COMMENT ON EXTENSION pg_background IS 'mine'", "COMMENT"),
        ("ALTER EXTENSION pg_background UPDATE TO '2.0'", "ALTER EXTENSION"),
        ("ALTER EXTENSION pg_background SET SCHEMA public", "ALTER EXTENSION"),
        ("DROP EXTENSION pg_background", "DROP EXTENSION"),
    ):
        for prepare in (False, True):
            with conn.transaction(force_rollback=not prepare):
                cursor = conn.execute(command.encode(), prepare=prepare)
            assert cursor.statusmessage == tag
            assert cursor.description is None


# As API.md has them: name, arguments, result, and whether it is strict. Those that take a handle
# are called with a NULL pid, too: a job may have no backend yet.
SIGNATURES = """
pg_background_launch(sql text, queue_size integer DEFAULT 0) integer strict
pg_background_launch_v2(sql text, queue_size integer DEFAULT 0) pg_background_handle strict
pg_background_launch_v2(sql text, queue_size integer, label text) pg_background_handle
pg_background_submit_v2(sql text, queue_size integer, label text) pg_background_handle
pg_background_submit(sql text, queue_size integer DEFAULT 0) pg_background_handle strict
pg_background_result(pid integer) SETOF record strict
pg_background_result(pid integer, cookie bigint) SETOF record
pg_background_result_v2(pid integer, cookie bigint) SETOF record
pg_background_detach(pid integer) void strict
pg_background_detach_v2(pid integer, cookie bigint) void
pg_background_cancel(pid integer, cookie bigint, grace_ms integer DEFAULT 0) void
pg_background_cancel_v2_grace(pid integer, cookie bigint, grace_ms integer) void
pg_background_wait_v2(pid integer, cookie bigint) void
pg_background_wait(pid integer, cookie bigint, timeout_ms integer DEFAULT 0) boolean
pg_background_wait_v2_timeout(pid integer, cookie bigint, timeout_ms integer) boolean
pg_background_list_v2() SETOF record strict
pg_background_stats_v2() pg_background_stats strict
pg_background_progress(pct integer, msg text DEFAULT NULL::text) void
pg_background_result_info_v2(pid integer, cookie bigint) pg_background_result_info
pg_background_outcome_v2(pid integer, cookie bigint) pg_background_outcome
pg_background_status_v2(pid integer, cookie bigint) jsonb
pg_background_run_query_v2(sql text, queue_size integer DEFAULT 0, timeout_ms integer DEFAULT 0,\
 label text DEFAULT NULL::text, col_def text DEFAULT NULL::text) SETOF record
pg_background_drain_v2(handles pg_background_handle[], timeout_ms integer DEFAULT 0)\
 SETOF pg_background_outcome strict
pg_background_wait_any_v2(handles pg_background_handle[], timeout_ms integer DEFAULT 0)\
 pg_background_handle strict
pg_background_cancel_by_label_v2(pattern text, grace_ms integer DEFAULT 0) integer strict
pg_background_purge() integer strict
grant_pg_background_privileges(role_name text, print_commands boolean DEFAULT false) boolean
grant_pg_background_privileges(user_name name, print_commands boolean DEFAULT false) boolean
pg_background_drop_executor_role() boolean strict
""".strip().splitlines()


def test_functions_have_the_signatures(conn: Connection, observer: Connection) -> None:
    create(conn)
    rows = observer.execute(
        "SELECT format('%s(%s) %s%s', proname, pg_get_function_arguments(oid),"
        " pg_get_function_result(oid), CASE WHEN proisstrict THEN ' strict' ELSE '' END)"
        " FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    ).fetchall()
    there = {row[0] for row in rows}
    missing = set(SIGNATURES) - there
    assert not missing


@pytest.mark.parametrize("api", [1, 2])
def test_every_function_of_the_table_is_there(
    conn: Connection, observer: Connection, api: int
) -> None:
    create(conn, f"VERSION '{'2.0' if api == 2 else '1.10'}'")
    rows = observer.execute(
        "SELECT proname, pronargs::int FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        " AND proname NOT LIKE '\\_%' AND NOT proargnames[1] IS NOT DISTINCT FROM 'user_name'"
    ).fetchall()
    wanted = [
        (function.name, len(function.parameters))
        for overloads in catalog(api).values()
        for function in overloads
    ]
    assert sorted(rows) == sorted(wanted)
    assert len(set(wanted)) == len(wanted)  # which is how privileges are looked up


def test_types_and_views(conn: Connection, observer: Connection) -> None:
    create(conn)
    columns = "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
    for relation, expected in (
        ("pg_background_handle", "pid cookie"),
        (
            "pg_background_stats",
            "workers_launched workers_completed workers_failed workers_canceled workers_active"
            " avg_execution_ms max_workers",
        ),
        (
            "pg_background_activity",
            "pid cookie launched_at user_id queue_size pgbg_state sql_preview last_error consumed"
            " label backend_state wait_event_type wait_event xact_start query_start backend_start"
            " query",
        ),
    ):
        rows = observer.execute(columns + " ORDER BY attnum", [relation]).fetchall()
        assert [row[0] for row in rows] == expected.split()


def test_second_version_has_its_results(conn: Connection, observer: Connection) -> None:
    create(conn, "VERSION '2.0'")
    for call, result in (
        ("pg_background_launch(text,int)", "pg_background_handle"),
        ("pg_background_wait_v2(int,bigint)", "boolean"),
        ("pg_background_stats()", "pg_background_stats"),
    ):
        got = one(observer, "SELECT pg_get_function_result(%s::regprocedure)", [call])
        assert got == result
    query = (
        "SELECT count(*)::int FROM pg_attribute WHERE attrelid = 'pg_background_stats'::regclass"
    )
    assert one(observer, query + " AND attnum > 0") == 8


@pytest.mark.parametrize("version_", VERSIONS)
def test_every_version(conn: Connection, version_: str) -> None:
    create(conn, f"VERSION '{version_}'")
    assert version(conn) == version_


def test_functions_have_comments(conn: Connection, observer: Connection) -> None:
    create(conn)
    comment = one(observer, "SELECT obj_description('pg_background_detach(int)'::regprocedure)")
    assert comment == "Forgets the job, which runs on to its end."


# --- the command -----------------------------------------------------------------------------

SPELLINGS = (
    "CREATE EXTENSION pg_background",
    "create extension if not exists pg_background",
    'CREATE EXTENSION "pg_background"',
    "CREATE EXTENSION PG_BACKGROUND WITH SCHEMA public",
    "CREATE /* a /* nested */ comment */ EXTENSION\n--line\npg_background;",
    "CREATE EXTENSION pg_background VERSION '1.8' SCHEMA public CASCADE",
    'CREATE EXTENSION pg_background WITH CASCADE VERSION "1.8"',
    "CREATE EXTENSION pg_background VERSION $$1.8$$",
)


@pytest.mark.parametrize("command", SPELLINGS)
def test_spellings(conn: Connection, command: str) -> None:
    assert conn.execute(command.encode()).statusmessage == "CREATE EXTENSION"
    assert version(conn) == ("1.8" if "1.8" in command else "1.10")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("CREATE EXTENSION pg_background BOGUS", "42601"),
        ("CREATE EXTENSION pg_background SCHEMA", "42601"),
        ("CREATE EXTENSION pg_background VERSION '1.8' VERSION '1.8'", "42601"),
        ("DROP EXTENSION pg_background CASCADE RESTRICT", "42601"),
        ("CREATE EXTENSION pg_background_other", None),
        ('CREATE EXTENSION "PG_BACKGROUND"', None),
        ("CREATE EXTENSION no_such SCHEMA pg_background", None),
    ],
)
def test_what_is_no_command_of_ours_is_for_the_server(
    conn: Connection, observer: Connection, command: str, error: str | None
) -> None:
    found, direct = failure(conn, command.encode()), failure(observer, command.encode())
    assert message(found) == message(direct)
    assert found.diag.statement_position == direct.diag.statement_position
    if error:
        assert found.sqlstate == error


def test_errors_are_the_servers(conn: Connection) -> None:
    def fails(command: str, sqlstate: str, text: str) -> psycopg.Error:
        error = failure(conn, command.encode())
        assert message(error) == (sqlstate, text)
        assert error.diag.context is None
        return error

    def no_path(version: str) -> str:
        return (
            'extension "pg_background" has no installation script nor update path for version'
            f' "{version}"'
        )

    fails("CREATE EXTENSION pg_background SCHEMA nope", "3F000", 'schema "nope" does not exist')
    fails("CREATE EXTENSION pg_background VERSION '9.9'", "22023", no_path("9.9"))
    fails("CREATE EXTENSION pg_background VERSION 'it\"s'", "22023", no_path('it"s'))
    for command in (
        "DROP EXTENSION {}",
        "ALTER EXTENSION {} UPDATE",
        "COMMENT ON EXTENSION {} IS ''",
    ):
        fails(command.format("pg_background"), *MISSING)
    with conn.transaction(force_rollback=True):
        conn.execute("SET LOCAL search_path = nowhere")
        with pytest.raises(psycopg.Error) as raised, conn.transaction():
            create(conn)
        assert message(raised.value) == ("3F000", "no schema has been selected to create in")
    create(conn)
    fails("CREATE EXTENSION pg_background", *EXISTS)
    fails("CREATE EXTENSION pg_background VERSION '9.9'", *EXISTS)
    path = 'extension "pg_background" has no update path from version "1.10" to version '
    fails("ALTER EXTENSION pg_background UPDATE TO '1.9'", "22023", path + '"1.9"')
    fails("ALTER EXTENSION pg_background UPDATE TO 'x'", "22023", path + '"x"')
    nope = ("3F000", 'schema "nope" does not exist')
    fails("ALTER EXTENSION pg_background SET SCHEMA nope", *nope)


def test_notices_are_the_servers(conn: Connection) -> None:
    create(conn)
    for command, sqlstate, text in (
        (
            "CREATE EXTENSION IF NOT EXISTS pg_background",
            "42710",
            'extension "pg_background" already exists, skipping',
        ),
        (
            "ALTER EXTENSION pg_background UPDATE TO '1.10'",
            "00000",
            'version "1.10" of extension "pg_background" is already installed',
        ),
        ("DROP EXTENSION pg_background", None, None),
        (
            "DROP EXTENSION IF EXISTS pg_background",
            "00000",
            'extension "pg_background" does not exist, skipping',
        ),
    ):
        for prepare in (False, True):
            with notices(conn) as collected, conn.transaction(force_rollback=not prepare):
                conn.execute(command.encode(), prepare=prepare)
            said = [(n["sqlstate"], n["message_primary"], n["context"]) for n in collected]
            assert said == ([] if text is None else [(sqlstate, text, None)])


def test_read_only_transaction(conn: Connection, observer: Connection) -> None:
    for command in ("CREATE EXTENSION pg_background", "DROP EXTENSION IF EXISTS pg_background"):
        tag = " ".join(command.split()[:2])
        with conn.transaction(force_rollback=True):
            conn.execute("SET TRANSACTION READ ONLY")
            with pytest.raises(psycopg.Error) as raised, conn.transaction():
                conn.execute(command.encode())
        assert message(raised.value) == (
            "25006",
            f"cannot execute {tag} in a read-only transaction",
        )


def test_failed_transaction(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(dbname=scratch, autocommit=False) as conn:
        failure(conn, "SELECT 1/0")
        assert failure(conn, "CREATE EXTENSION pg_background").sqlstate == "25P02"
        conn.rollback()


@pytest.mark.parametrize(
    "command",
    [
        "DO $$ BEGIN EXECUTE format('CREATE EXTENSION %I', 'pg_background'); END $$",
        "CREATE FUNCTION pg_temp.make() RETURNS void LANGUAGE sql AS"
        " 'CREATE EXTENSION pg_background'; SELECT pg_temp.make()",
    ],
)
def test_command_that_the_proxy_cannot_see(
    conn: Connection, observer: Connection, command: str
) -> None:
    """And the server has no such extension."""
    with suppress(psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile):
        with observer.transaction(force_rollback=True):
            observer.execute("CREATE EXTENSION pg_background")
        pytest.skip("this server has an extension of that name")
    error = failure(conn, command.encode())
    assert error.sqlstate in ("0A000", "58P01")
    assert "where it is a statement of its own" in (error.diag.message_hint or "")


# --- its transaction -------------------------------------------------------------------------


def test_rollback_undoes_it(conn: Connection, observer: Connection) -> None:
    before = one(observer, OURS), one(observer, TYPES)
    with conn.transaction(force_rollback=True):
        create(conn)
        assert version(conn) == "1.10"
        assert one(observer, OURS) == before[0]  # no other session sees it
    assert (one(observer, OURS), one(observer, TYPES)) == before
    create(conn)
    there = one(observer, OURS), one(observer, TYPES)
    with conn.transaction(force_rollback=True):
        conn.execute("DROP EXTENSION pg_background")
        assert (one(conn, OURS), one(conn, TYPES)) == before
    assert (one(observer, OURS), one(observer, TYPES)) == there
    with conn.transaction():
        conn.execute("SAVEPOINT s")
        conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
        assert version(conn) == "2.0"
        conn.execute("ROLLBACK TO s")
        assert version(conn) == "1.10"
    conn.execute("DROP EXTENSION pg_background")
    assert (one(observer, OURS), one(observer, TYPES)) == before


def test_failure_leaves_nothing(conn: Connection, observer: Connection) -> None:
    before = one(observer, OURS)
    conn.execute("CREATE TYPE pg_background_run AS (n int)")
    assert failure(conn, "CREATE EXTENSION pg_background").sqlstate == "42710"
    assert one(observer, OURS) == before
    conn.execute("DROP TYPE pg_background_run")


def test_settings_are_as_they_were(conn: Connection) -> None:
    names = ("search_path", "check_function_bodies", "client_min_messages")
    with conn.transaction():
        conn.execute("SET LOCAL client_min_messages = 'log'")
        before = [one(conn, f"SHOW {name}") for name in names]
        create(conn)
        conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
        conn.execute("DROP EXTENSION pg_background")
        assert [one(conn, f"SHOW {name}") for name in names] == before


@pytest.mark.parametrize(
    "setting",
    [
        "standard_conforming_strings = off",
        "client_encoding = 'SJIS'",
        "plpgsql.extra_errors = 'all'",
        "plpgsql.variable_conflict = 'use_column'",
        "search_path = ''",
        "DateStyle = 'German'",
        "array_nulls = off",
        "check_function_bodies = on",
        "default_transaction_isolation = 'serializable'",
        "jit_above_cost = 0",
    ],
)
def test_in_a_session_with_settings_of_its_own(
    proxy: Proxy, scratch: str, observer: Connection, setting: str
) -> None:
    if setting.startswith("jit") and observer.info.server_version < 110000:
        pytest.skip("there is no such setting yet")
    if setting.startswith("standard_conf") and observer.info.server_version >= 190000:
        pytest.skip("it cannot be set to off any more")
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("LOAD 'plpgsql'")
        conn.execute(f"SET {setting}".encode())
        create(conn, "SCHEMA public VERSION '1.8'")
        conn.execute("COMMENT ON EXTENSION pg_background IS 'a'")
        assert version(conn) == "1.8"
        inside = """
            DO $$ BEGIN
              PERFORM n FROM public.pg_background_result(
                public.pg_background_launch('SELECT 7')) AS r(n int);
            END $$
            """
        conn.execute(inside.encode())
        conn.execute("SELECT grant_pg_background_privileges('alice')" if "path" not in setting else
                     "SELECT public.grant_pg_background_privileges('alice')")  # fmt: skip
        conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
        conn.execute("CREATE SCHEMA own")
        conn.execute("ALTER EXTENSION pg_background SET SCHEMA own")
        conn.execute("DROP EXTENSION pg_background")
        conn.execute("DROP SCHEMA own")


def test_in_a_query_of_several_statements(proxy: Proxy, scratch: str) -> None:
    done = psql(
        proxy.port,
        *("-c", "CREATE TABLE several (n int); CREATE EXTENSION pg_background; SELECT 1 AS one"),
        *("-c", "SELECT 1; DROP EXTENSION pg_background; DROP EXTENSION pg_background"),
        *("-c", "DROP TABLE several; DROP EXTENSION pg_background; SELECT 2 AS two"),
        dbname=scratch,
    )
    words = done.stdout.split()
    assert words[:4] == ["CREATE", "TABLE", "CREATE", "EXTENSION"]
    assert words[-7:] == ["DROP", "EXTENSION", "two", "-----", "2", "(1", "row)"]
    assert 'ERROR:  extension "pg_background" does not exist' in done.stderr
    assert "CONTEXT" not in done.stderr


def test_position_of_an_error_behind_it(conn: Connection, observer: Connection) -> None:
    query = b"CREATE EXTENSION pg_background; SELECT '\xc3\xa4', nope; SELECT 1"
    error = failure(conn, query)
    assert error.sqlstate == "42703"
    assert error.diag.statement_position == str(query.decode().index("nope") + 1)
    assert version(conn) is None


def test_call_behind_it_in_the_same_query(conn: Connection) -> None:
    """The proxy cannot see what is not committed yet."""
    create = "CREATE EXTENSION pg_background VERSION '2.0'"
    error = failure(conn, f"{create}; SELECT (pg_background_launch('SELECT 1')).*")
    assert message(error) == ("42501", "calls from inside the database are not served here")
    conn.execute(create.encode())
    cursor = conn.execute("SELECT (pg_background_launch('SELECT 1')).*")
    assert cursor.description is not None
    assert [column.name for column in cursor.description] == ["pid", "cookie"]


def test_message_by_message(proxy: Proxy, scratch: str) -> None:
    """As a driver does that describes what it prepares."""
    with Frontend(proxy, user="postgres", database=scratch) as frontend:
        frontend.send(
            m.Parse(b"s", b"CREATE EXTENSION pg_background", ()),
            m.Describe(b"S", b"s"),
            m.Bind(b"p", b"s", (), (), ()),
            m.Describe(b"P", b"p"),
            m.Execute(b"p", 0),
            m.Parse(b"", b"DROP EXTENSION pg_background", ()),
            m.Bind(b"", b"", (), (), ()),
            m.Execute(b"", 0),
            m.Sync(),
        )
        kinds = [type(message).__name__ for message in frontend.until_ready()]
    assert kinds == [
        *("ParseComplete", "ParameterDescription", "NoData", "BindComplete", "NoData"),
        *("CommandComplete", "ParseComplete", "BindComplete", "CommandComplete"),
        "ReadyForQuery",
    ]


# --- schemas ---------------------------------------------------------------------------------


@contextmanager
def schema(conn: Connection, name: str) -> Iterator[str]:
    quoted = '"' + name.replace('"', '""') + '"'
    conn.execute(f"CREATE SCHEMA {quoted}".encode())
    yield quoted
    conn.execute("DROP EXTENSION IF EXISTS pg_background")
    conn.execute(f"DROP SCHEMA {quoted} CASCADE".encode())


@pytest.mark.parametrize("name", ["contrib", "Con Trib", 'a"b', "it's", "ünï $1 \\ @x@ %s", "$$"])
def test_any_schema(conn: Connection, name: str) -> None:
    with schema(conn, name) as quoted:
        create(conn, f"WITH SCHEMA {quoted}")
        query = (
            "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace"
            " WHERE e.extname = 'pg_background'"
        )
        assert one(conn, query) == name
        assert isinstance(one(conn, f"SELECT {quoted}.pg_background_launch('SELECT 1')"), int)
        query = f"SELECT count(*) FROM {quoted}.pg_background_list"
        assert one(conn, query) == 1
        inside = f"""
            WITH launched AS (SELECT {quoted}.pg_background_launch('SELECT 7') AS pid)
            SELECT n FROM launched, {quoted}.pg_background_result(pid) AS (n int)
            """
        assert one(conn, inside) == 7
        assert one(conn, query + " WHERE state IS NOT NULL") == 1
        conn.execute("ALTER EXTENSION pg_background SET SCHEMA public")
        assert isinstance(one(conn, "SELECT pg_background_launch('SELECT 1')"), int)
        conn.execute(f"ALTER EXTENSION pg_background SET SCHEMA {quoted}".encode())
        left = "SELECT count(*)::int FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        assert one(conn, left) == 0


def test_update_after_the_schema_was_renamed(conn: Connection) -> None:
    """The functions call each other by the schema's name, as it was."""
    inside = "SELECT n FROM (SELECT renamed.pg_background_launch('SELECT 7') AS n OFFSET 0) s"
    with schema(conn, "renamed"):
        create(conn, "SCHEMA renamed VERSION '1.8'")
        conn.execute("DROP SCHEMA IF EXISTS again")
        conn.execute("ALTER SCHEMA renamed RENAME TO again")
        inside = inside.replace("renamed", "again")
        assert failure(conn, inside.encode()).sqlstate == "3F000"
        conn.execute("ALTER EXTENSION pg_background UPDATE TO '1.8'")
        assert isinstance(one(conn, inside), int)
        conn.execute("ALTER SCHEMA again RENAME TO renamed")


def test_first_schema_of_the_search_path(conn: Connection) -> None:
    with schema(conn, "first"), conn.transaction():
        conn.execute("SET LOCAL search_path = nowhere, first, public")
        create(conn)
        assert one(conn, f"SELECT 'first.{MARKER}()'::regprocedure IS NOT NULL") is True


def test_calls_find_the_functions_as_the_server_does(conn: Connection) -> None:
    with schema(conn, "contrib"):
        create(conn, "SCHEMA contrib")
        for call in ("pg_background_launch('')", "public.pg_background_launch('')"):
            for query in (f"SELECT {call}", f"SELECT * FROM {call}", f"SELECT {call} WHERE 1 = 1"):
                assert failure(conn, query.encode()).sqlstate == "42883", query
        for query in ("SELECT * FROM pg_background_list", "TABLE public.pg_background_activity"):
            assert failure(conn, query.encode()).sqlstate == "42P01"
        conn.execute("SET search_path = public, contrib")
        assert isinstance(one(conn, "SELECT pg_background_launch('')"), int)
        assert failure(conn, "SELECT public.pg_background_launch('')").sqlstate == "42883"
        conn.execute("RESET search_path")


# --- versions --------------------------------------------------------------------------------


def kind(conn: Connection) -> str:
    """What pg_background_launch gives: a pid or a handle."""
    return "pid" if isinstance(one(conn, "SELECT pg_background_launch('')"), int) else "handle"


def test_launch_returns_what_the_version_says(proxy: Proxy, scratch: str, conn: Connection) -> None:
    with proxy.connect(dbname=scratch) as other:
        assert kind(conn) == kind(other) == "pid"
        create(conn, "VERSION '1.4'")
        assert kind(conn) == kind(other) == "pid"
        with conn.transaction(force_rollback=True):
            conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
            assert kind(conn) == "handle"
        assert kind(conn) == "pid"
        conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
        assert kind(conn) == kind(other) == "handle"
        conn.execute("DROP EXTENSION pg_background")
        assert kind(conn) == kind(other) == "pid"
    with proxy.connect(dbname=scratch) as fresh:
        create(conn, "VERSION '2.0'")
        assert kind(fresh) == "handle"


def test_version_changes_behind_the_proxy(
    start_proxy: StartProxy, scratch: str, conn: Connection
) -> None:
    """As with a cached plan, an error, once."""
    create(conn)
    assert kind(conn) == "pid"
    with start_proxy().connect(dbname=scratch) as other:
        other.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
    error = failure(conn, "SELECT pg_background_launch('')")
    assert message(error) == ("0A000", "cached plan must not change result type")
    assert kind(conn) == "handle"


def test_default_version_follows_api_version(start_proxy: StartProxy, scratch: str) -> None:
    with start_proxy("--api-version", "2").connect(dbname=scratch) as conn:
        assert kind(conn) == "handle"
        create(conn)
        assert version(conn) == "2.0"
        conn.execute("DROP EXTENSION pg_background")
        create(conn, "VERSION '1.8'")
        assert kind(conn) == "pid"
        conn.execute("ALTER EXTENSION pg_background UPDATE")
        assert version(conn) == "2.0"


def test_update_keeps_grants_and_dependents(conn: Connection, role: str) -> None:
    create(conn, "VERSION '1.6'")
    conn.execute(f"SELECT grant_pg_background_privileges('{role}')")
    conn.execute(
        "CREATE VIEW stats AS SELECT workers_launched FROM pg_background_stats_v2();"
        "CREATE TABLE handles (h pg_background_handle)"
    )
    conn.execute("ALTER EXTENSION pg_background UPDATE TO '2.0'")
    may = "SELECT has_function_privilege(%s, %s, 'EXECUTE')"
    for call in ("pg_background_launch(text,int)", "pg_background_wait_v2(int,bigint)"):
        assert one(conn, may, [role, call]) is True
        assert one(conn, may, ["public", call]) is False
    assert one(conn, "SELECT count(*)::int FROM stats") == 1
    conn.execute("DROP VIEW stats; DROP TABLE handles")


def test_update_over_a_dependent_view(conn: Connection) -> None:
    create(conn)
    conn.execute("CREATE VIEW launched AS SELECT pg_background_launch('SELECT 1') WHERE false")
    error = failure(conn, "ALTER EXTENSION pg_background UPDATE TO '2.0'")
    assert error.sqlstate == "2BP01"
    assert version(conn) == "1.10"
    conn.execute("DROP VIEW launched")


# --- DROP ------------------------------------------------------------------------------------


def test_drop_with_dependent_objects(conn: Connection) -> None:
    create(conn)
    conn.execute("CREATE VIEW mine AS SELECT pg_background_launch('SELECT 1')")
    conn.execute("CREATE TABLE mine_too (h pg_background_handle, n int)")
    for command in ("DROP EXTENSION pg_background", "DROP EXTENSION pg_background RESTRICT"):
        error = failure(conn, command.encode())
        assert message(error) == (
            "2BP01",
            "cannot drop extension pg_background because other objects depend on it",
        )
        assert "view mine depends on function pg_background_launch" in (
            error.diag.message_detail or ""
        )
        hint = "Use DROP ... CASCADE to drop the dependent objects too."
        assert error.diag.message_hint == hint
    with notices(conn) as collected:
        conn.execute("DROP EXTENSION pg_background CASCADE")
    assert "drop cascades to view mine" in [n["message_primary"] for n in collected]
    assert one(conn, "SELECT count(*)::int FROM mine_too") == 0
    assert failure(conn, "SELECT h FROM mine_too").sqlstate == "42703"
    conn.execute("DROP TABLE mine_too")


def test_drop_leaves_what_is_not_its_own(conn: Connection) -> None:
    create(conn)
    conn.execute("CREATE FUNCTION pg_background_mine() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    conn.execute("CREATE FUNCTION pg_background_launch(int) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    conn.execute("DROP EXTENSION pg_background")
    assert one(conn, "SELECT pg_background_mine()") == 1
    conn.execute("DROP FUNCTION pg_background_mine(), pg_background_launch(int)")


def test_drop_of_several_extensions(conn: Connection) -> None:
    create(conn)
    error = failure(conn, "DROP EXTENSION pg_background, no_such")
    assert message(error) == ("42704", 'extension "no_such" does not exist')
    assert version(conn) == "1.10"
    conn.execute("DROP EXTENSION IF EXISTS no_such, pg_background, nor_this CASCADE")
    assert version(conn) is None


def test_role_stays_until_it_is_dropped(conn: Connection) -> None:
    """It may be in use in another database."""
    create(conn)
    conn.execute("DROP EXTENSION pg_background")
    assert one(conn, f"SELECT '{ROLE}'::regrole IS NOT NULL") is True
    create(conn)
    assert one(conn, "SELECT pg_background_drop_executor_role()") is True
    assert one(conn, "SELECT to_regrole(%s) IS NULL", [ROLE]) is True
    conn.execute("ALTER EXTENSION pg_background UPDATE")
    may = f"SELECT has_function_privilege('{ROLE}', 'pg_background_detach(int)', 'EXECUTE')"
    assert one(conn, may) is True


# --- who may ---------------------------------------------------------------------------------


def test_public_may_call_nothing_of_the_api(conn: Connection) -> None:
    create(conn)
    rows = conn.execute(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        " AND has_function_privilege('public', oid, 'EXECUTE')"
    ).fetchall()
    # Functions that do nothing that one could not do oneself.
    assert all(name.startswith("_pg_background_") for [name] in rows)
    for relation in ("pg_background_list", "pg_background_activity"):
        assert one(conn, "SELECT has_table_privilege('public', %s, 'SELECT')", [relation]) is False
    may = "SELECT has_type_privilege('public', 'pg_background_handle', 'USAGE')"
    assert one(conn, may) is False


def test_the_role_may_call_all_but_the_helpers(conn: Connection) -> None:
    create(conn)
    rows = conn.execute(
        "SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        f" AND NOT has_function_privilege('{ROLE}', oid, 'EXECUTE') ORDER BY 1"
    ).fetchall()
    assert [name for [name] in rows if not name.startswith("_")] == [
        "grant_pg_background_privileges",
        "pg_background_drop_executor_role",
        "pg_background_grant_privileges",
        "pg_background_revoke_privileges",
        "revoke_pg_background_privileges",
    ]


@pytest.mark.parametrize("inside", [False, True])
def test_grant_and_revoke(
    proxy: Proxy, scratch: str, conn: Connection, role: str, inside: bool
) -> None:
    """Called directly, and from inside the database."""

    def change(verb: str, arguments: str = "") -> Any:
        call = f"{verb}_pg_background_privileges('{role}'{arguments})"
        return one(conn, f"SELECT done FROM (SELECT 1) o CROSS JOIN {call} done" if inside
                   else f"SELECT {call}")  # fmt: skip

    create(conn)
    with proxy.connect(dbname=scratch, user=role) as plain:
        calls = ("SELECT pg_background_launch('SELECT 1')", "SELECT pg_background_launch('') + 0")
        for call in calls:
            assert message(failure(plain, call.encode())) == (
                "42501",
                "permission denied for function pg_background_launch",
            )
        with notices(conn) as printed:
            assert change("grant", ", true") is True
        command = f"GRANT EXECUTE ON FUNCTION pg_background_launch(text,integer) TO {role}"
        assert f"Executed command: {command}" in [n["message_primary"] for n in printed]
        assert isinstance(one(plain, calls[0]), int)
        assert one(plain, "SELECT count(*) FROM pg_background_list") == 1
        may = "SELECT pg_has_role(%s, %s, 'MEMBER')"
        assert one(conn, may, [role, ROLE]) is False
        assert change("revoke") is True
        for call in (*calls, "SELECT * FROM pg_background_list"):
            assert failure(plain, call.encode()).sqlstate == "42501"


def test_grant_by_the_other_name_of_the_argument(conn: Connection, role: str) -> None:
    create(conn)
    may = "SELECT has_function_privilege(%s, 'pg_background_detach(int)', 'EXECUTE')"
    for call in (
        "grant_pg_background_privileges(user_name => %L)",
        "revoke_pg_background_privileges(print_commands => false, user_name => %L)",
        "pg_background_grant_privileges(role_name => %L)",
        "pg_background_revoke_privileges(%L)",
    ):
        conn.execute(f"DO $$ BEGIN EXECUTE format('SELECT {call}', '{role}'); END $$".encode())
        assert one(conn, may, [role]) is ("grant_" in call)


def test_failure_of_a_helper_inside(conn: Connection) -> None:
    create(conn)
    with notices(conn) as said:
        query = "SELECT done FROM grant_pg_background_privileges('no_such') done, pg_class LIMIT 1"
        assert one(conn, query) is False
    [notice] = said
    assert notice["message_primary"] == (
        'Error granting pg_background privileges to no_such: role "no_such" does not exist'
    )


def test_grant_of_one_function(proxy: Proxy, scratch: str, conn: Connection, role: str) -> None:
    create(conn)
    conn.execute(f"GRANT EXECUTE ON FUNCTION pg_background_launch(text, int) TO {role}")
    with proxy.connect(dbname=scratch, user=role) as plain:
        pid = one(plain, "SELECT pg_background_launch('SELECT 1')")
        error = failure(plain, f"SELECT pg_background_detach({pid})")
        assert message(error) == ("42501", "permission denied for function pg_background_detach")
        error = failure(plain, "SELECT grant_pg_background_privileges('alice')")
        assert error.sqlstate == "42501"


def test_revoke_takes_what_was_granted_before(conn: Connection, role: str) -> None:
    """When there was no extension, and granting was membership."""
    assert one(conn, f"SELECT grant_pg_background_privileges('{role}')") is True
    create(conn)
    may = "SELECT has_function_privilege(%s, 'pg_background_detach(int)', 'EXECUTE')"
    assert one(conn, may, [role]) is True
    assert one(conn, f"SELECT revoke_pg_background_privileges('{role}')") is True
    assert one(conn, may, [role]) is False


def test_role_without_create_on_the_database(proxy: Proxy, scratch: str, role: str) -> None:
    with proxy.connect(dbname=scratch, user=role) as plain:
        error = failure(plain, "CREATE EXTENSION pg_background")
    assert message(error) == (
        "42501",
        'permission denied to create extension "pg_background"',
    )
    hint = "Must have CREATE privilege on current database to create this extension."
    assert error.diag.message_hint == hint


def test_role_that_is_no_superuser(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection, role: str
) -> None:
    """What needs CREATEROLE says so, and the rest is done."""
    owner = one(observer, "SELECT current_user")
    observer.execute(f"ALTER DATABASE {scratch} OWNER TO {role}")
    observer.execute(f"DROP ROLE IF EXISTS {ROLE}")
    with proxy.connect(dbname=scratch, user=role) as plain:
        with notices(plain) as said:
            create(plain)
        [warning] = said
        assert warning["severity_nonlocalized"] == "WARNING"
        assert warning["message_primary"] == f'role "{ROLE}" could not be created'
        assert "CREATEROLE" in (warning["message_hint"] or "")
        assert isinstance(one(plain, "SELECT pg_background_launch('SELECT 1')"), int)
        assert one(plain, "SELECT grant_pg_background_privileges('alice')") is True
        assert one(conn, "SELECT grant_pg_background_privileges('alice')") is True
        error = failure(conn, "SET ROLE alice; DROP EXTENSION pg_background")
        assert message(error) == ("42501", "must be owner of extension pg_background")
        observer.execute(f"CREATE ROLE {ROLE}")
        plain.execute("ALTER EXTENSION pg_background UPDATE")
        may = f"SELECT has_function_privilege('{ROLE}', 'pg_background_detach(int)', 'EXECUTE')"
        assert one(conn, may) is True
        plain.execute("DROP EXTENSION pg_background")
    observer.execute(f"ALTER DATABASE {scratch} OWNER TO {owner}")


def test_role_that_may_only_create(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection, role: str
) -> None:
    """It has an extension of its own, which affects no other role."""
    observer.execute(f"GRANT CREATE ON DATABASE {scratch} TO {role}")
    observer.execute(f"CREATE SCHEMA of_{role} AUTHORIZATION {role}")
    with proxy.connect(dbname=scratch, user=role) as plain:
        plain.execute(f"SET search_path = of_{role}")
        with notices(plain) as said:
            create(plain)
        assert [n["severity_nonlocalized"] for n in said] == ["WARNING"]
        assert f'sessions of role "{role}"' in (said[0]["message_primary"] or "")
        direct = "SELECT pg_background_launch('SELECT 1')"
        assert isinstance(one(plain, direct), int)
        inside = f"WITH l AS ({direct} AS pid) TABLE l"
        assert isinstance(one(plain, inside), int)
        assert version(conn) is None
        assert isinstance(one(conn, direct), int)
        create(conn, "SCHEMA public")
        assert version(conn) == "1.10"
        # The common one is everybody's from now on.
        assert failure(plain, direct).sqlstate == "42883"
    conn.execute("DROP EXTENSION pg_background")


@pytest.mark.parametrize("schema", ["public", "of_role"])
@pytest.mark.parametrize("says", ["x", "2.0", "1.10"])
def test_marker_of_another_role(
    proxy: Proxy,
    scratch: str,
    conn: Connection,
    observer: Connection,
    role: str,
    schema: str,
    says: str,
) -> None:
    """It makes no other role's call fail, and does not prevent creating the extension."""
    observer.execute(f"GRANT CREATE ON DATABASE {scratch} TO {role}")
    schema = schema.replace("of_role", f"of_{role}")
    observer.execute(f"CREATE SCHEMA of_{role} AUTHORIZATION {role}")
    observer.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    with server_as(conn, role):
        conn.execute(
            f"CREATE FUNCTION {schema}.{MARKER}() RETURNS text LANGUAGE sql AS"
            f" $$SELECT '{says}'$$".encode()
        )
    assert version(conn) is None
    assert kind(conn) == "pid"
    where = "CREATE SCHEMA mine; CREATE EXTENSION pg_background SCHEMA mine"
    conn.execute(where.encode())
    assert version(conn) == "1.10"
    assert isinstance(one(conn, "SELECT mine.pg_background_launch('SELECT 1')"), int)
    conn.execute("DROP EXTENSION pg_background; DROP SCHEMA mine")


def test_schema_of_another_role(conn: Connection, observer: Connection, role: str) -> None:
    """Its owner could replace what is in there."""
    observer.execute(f"CREATE SCHEMA of_{role} AUTHORIZATION {role}; CREATE SCHEMA mine")
    error = failure(conn, f"CREATE EXTENSION pg_background SCHEMA of_{role}")
    assert error.sqlstate == "42501"
    assert error.diag.message_hint
    create(conn, "SCHEMA mine")
    error = failure(conn, f"ALTER EXTENSION pg_background SET SCHEMA of_{role}")
    assert error.sqlstate == "42501"
    conn.execute("DROP EXTENSION pg_background; DROP SCHEMA mine")


@contextlib.contextmanager
def server_as(conn: Connection, role: str) -> Iterator[None]:
    """A session as another role, for a while."""
    conn.execute(f"SET ROLE {role}".encode())
    yield
    conn.execute("RESET ROLE")


def test_nobody_else_makes_others_believe_in_an_extension(
    proxy: Proxy, scratch: str, conn: Connection, role: str
) -> None:
    with proxy.connect(dbname=scratch, user=role) as plain:
        plain.execute(
            f"CREATE FUNCTION public.{MARKER}() RETURNS text LANGUAGE sql AS $$SELECT '2.0'$$"
        )
    assert version(conn) is None
    assert kind(conn) == "pid"
    conn.execute(f"DROP FUNCTION {MARKER}()")


def test_operators_of_the_search_path_are_not_used(conn: Connection, role: str) -> None:
    """The creating role may have another's operators before the server's."""
    conn.execute("CREATE SCHEMA trap")
    conn.execute(
        "CREATE FUNCTION trap.sprung(name, name) RETURNS bool LANGUAGE plpgsql AS"
        " $$BEGIN RAISE EXCEPTION 'sprung'; END$$;"
        "CREATE OPERATOR trap.= (LEFTARG = name, RIGHTARG = name, PROCEDURE = trap.sprung)"
    )
    with conn.transaction():
        conn.execute("SET LOCAL search_path = trap, pg_catalog")
        assert "sprung" in str(_error(conn, "SELECT 'a'::name = 'b'::name"))
        for command in (
            "CREATE EXTENSION pg_background SCHEMA public",
            "ALTER EXTENSION pg_background UPDATE TO '2.0'",
            "ALTER EXTENSION pg_background SET SCHEMA trap",
            "COMMENT ON EXTENSION pg_background IS NULL",
            "SELECT count(*) FROM pg_extension",
            "SELECT grant_pg_background_privileges('alice')",
            "SELECT revoke_pg_background_privileges('alice')",
            "DROP EXTENSION pg_background",
        ):
            conn.execute(command.encode())
    conn.execute("DROP SCHEMA trap CASCADE")


def _error(conn: Connection, query: str) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as raised, conn.transaction():
        conn.execute(query.encode())
    return raised.value


# --- databases, and the server's own ---------------------------------------------------------


def test_each_database_has_its_own(proxy: Proxy, server: Server, conn: Connection) -> None:
    create(conn)
    with (
        database(server, f"second_{next(_number)}") as second,
        database(server, f"third_{next(_number)}") as third,
        proxy.connect(dbname=second) as in_second,
        proxy.connect(dbname=third) as in_third,
    ):
        create(in_second, "VERSION '2.0'")
        assert [version(c) for c in (conn, in_second, in_third)] == ["1.10", "2.0", None]
        assert [kind(c) for c in (conn, in_second, in_third)] == ["pid", "handle", "pid"]
        in_second.execute("DROP EXTENSION pg_background")
        assert version(conn) == "1.10"


def test_left_to_the_server(start_proxy: StartProxy, scratch: str, observer: Connection) -> None:
    """With extension = server; whether it has such files or not, it has none of that version."""
    with start_proxy("--extension", "server").connect(dbname=scratch) as conn:
        creation = "CREATE EXTENSION pg_background VERSION 'none'"
        for command in (creation, "DROP EXTENSION pg_background"):
            found, direct = failure(conn, command.encode()), failure(observer, command.encode())
            assert message(found) == message(direct)
        assert kind(conn) == "pid"  # there is nothing else to call


@pytest.fixture
def readable_folder() -> Iterator[Path]:
    """Which the server's user may read: pytest closes its own folders to others."""
    with tempfile.TemporaryDirectory(prefix="pgbg-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_extension_of_the_server(
    proxy: Proxy, start_proxy: StartProxy, scratch: str, server: Server, readable_folder: Path
) -> None:
    """Something by that name that the server has installed itself."""
    if server.version < 180000:
        pytest.skip("no extension_control_path")
    folder = readable_folder / "extension"
    folder.mkdir()
    (folder / "pg_background.control").write_text("default_version = '1.8'\nrelocatable = true\n")
    (folder / "pg_background--1.8.sql").write_text(
        "CREATE FUNCTION pg_background_launch(sql text, queue_size int DEFAULT 0) RETURNS int"
        " LANGUAGE sql AS 'SELECT -1';"
    )
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    setting = f"SET extension_control_path = '{readable_folder}'"
    with start_proxy("--extension", "server").connect(dbname=scratch) as conn:
        conn.execute(setting.encode())
        create(conn)
        assert one(conn, "SELECT pg_background_launch('SELECT 1')") == -1
        assert version(conn) == "1.8"
        error = failure(conn, "SELECT pg_background_detach(1)")
        assert error.sqlstate in ("42883", "0A000")
    with proxy.connect(dbname=scratch) as conn:
        conn.execute(setting.encode())
        assert message(failure(conn, "CREATE EXTENSION pg_background")) == EXISTS
        # Two that do not know each other's jobs: said once, to who wants to hear it.
        with notices(conn) as said:
            assert [one(conn, "SELECT pg_background_launch('SELECT 1')") > 0 for _ in range(2)]
        [warning] = said
        assert (warning["severity"], warning["sqlstate"]) == ("WARNING", "01000")
        assert 'extension = "server"' in (warning["message_hint"] or "")
        with proxy.connect(dbname=scratch) as deaf, notices(deaf) as said:
            deaf.execute("SET client_min_messages = error")
            assert one(deaf, "SELECT pg_background_launch('SELECT 1')") > 0
        assert said == []
        conn.execute("COMMENT ON EXTENSION pg_background IS 'theirs'")
        query = (
            "SELECT obj_description(oid, 'pg_extension') FROM pg_extension WHERE extversion = '1.8'"
        )
        assert one(conn, query) == "theirs"
        with notices(conn) as said:
            conn.execute("ALTER EXTENSION pg_background UPDATE")
        assert [n["message_primary"] for n in said] == [
            'version "1.8" of extension "pg_background" is already installed'
        ]
        conn.execute("DROP EXTENSION pg_background")
        assert version(conn) is None
        create(conn)  # the files are there, but this proxy makes its own
        assert one(conn, "SELECT pg_background_launch('SELECT 1')") > 0


def test_what_another_role_has_created_before_is_not_taken_over(
    server: Server, proxy: Proxy, db: str
) -> None:
    """It would remain its owner's, who could change what all others call."""
    with server.connect(dbname=db) as admin, proxy.connect(dbname=db) as conn:
        admin.execute("CREATE ROLE squatter; GRANT CREATE ON SCHEMA public TO squatter")
        try:
            for create in (
                "CREATE FUNCTION pg_background_launch(sql text, queue_size int DEFAULT 0)"
                " RETURNS int LANGUAGE sql STRICT AS 'SELECT 1'",
                "CREATE FUNCTION _pg_background_say() RETURNS void LANGUAGE plpgsql AS 'BEGIN END'",
                "CREATE FUNCTION _pg_background_version() RETURNS text LANGUAGE sql AS"
                " $$SELECT '1.10'$$",
            ):
                admin.execute(f"SET ROLE squatter; {create}; RESET ROLE".encode())
                with pytest.raises(psycopg.errors.DatabaseError):
                    conn.execute("CREATE EXTENSION pg_background")
                admin.execute("DROP OWNED BY squatter")
                admin.execute("GRANT CREATE ON SCHEMA public TO squatter")
            conn.execute("CREATE EXTENSION pg_background")
        finally:
            admin.execute("DROP OWNED BY squatter; DROP ROLE squatter")
