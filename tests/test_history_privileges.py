"""Who may read and write `pg_background_history`, and what those try who may not.

Mallory may launch jobs, and so write about her own. All else that she tries fails: to read what
others' jobs did, to write about them, to push out what is theirs, to have it written elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from tests.conftest import StartProxy
from tests.support.api_clients import Handle
from tests.support.background import failure, notices, wait_until
from tests.support.in_database import one
from tests.support.servers import Connection, Proxy, Server, database

pytestmark = pytest.mark.every_server

RECORD: Final = "SELECT public._pg_background_record(%s)"
DENIED: Final = ("42501", "permission denied for function _pg_background_record")
SECRET: Final = "SELECT 'the secret of victor'"


@pytest.fixture(autouse=True, scope="module")
def roles(
    server: Server, executor_as_before: None, recording: Proxy, scratch: str
) -> Iterator[None]:
    """The extension, whose owner is no superuser, and a job of victor's."""
    names = "victor, mallory, nobody_much, friend, keeper"
    with server.connect(dbname=scratch) as conn:
        for name in names.split(", "):
            conn.execute(f"CREATE ROLE {name} LOGIN".encode())
        conn.execute("ALTER ROLE keeper CREATEROLE; GRANT victor TO friend")
        conn.execute(f'ALTER DATABASE "{scratch}" OWNER TO keeper')
        conn.execute("ALTER SCHEMA public OWNER TO keeper")
    with recording.connect(dbname=scratch, user="keeper") as conn:
        conn.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC")
        conn.execute("CREATE EXTENSION pg_background")
        conn.execute("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM PUBLIC")
    with server.connect(dbname=scratch) as conn:
        for name in ("victor", "mallory", "friend"):
            conn.execute(f"GRANT pgbackground_role TO {name}".encode())
    yield
    with server.connect(dbname=scratch) as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY (%s)",
            [names.split(", ")],
        )
        conn.execute(f'ALTER DATABASE "{scratch}" OWNER TO postgres')
        conn.execute("ALTER SCHEMA public OWNER TO postgres")
        conn.execute(f"DROP OWNED BY {names} CASCADE".encode())
        conn.execute(f"DROP ROLE {names}".encode())


@pytest.fixture(scope="module")
def secret(recording: Proxy, server: Server, scratch: str) -> Handle:
    """A job of victor's that the history has."""
    with recording.connect(dbname=scratch, user="victor") as conn:
        [found] = conn.execute(
            "SELECT * FROM pg_background_submit(%s, 0, 'of victor')", [SECRET]
        ).fetchall()
    with server.connect(dbname=scratch) as conn:
        query = "SELECT state FROM pg_background_history WHERE cookie = %s"
        wait_until(lambda: conn.execute(query, [found[1]]).fetchall() == [("stopped",)])
    return Handle(*found)


def row(pid: int, cookie: int, state: str | None = "stopped", **others: Any) -> list[str | None]:
    """A row as the proxy writes it."""
    values: dict[str, Any] = {
        "pid": pid, "cookie": cookie, "backend": 1, "label": "forged", "sql": "forged",
        "queued": 1, "started": 1, "finished": 1, "keep": 1000, "state": state, "attempts": 1,
        "rows": 1, "tag": "SELECT", "code": None, "message": "forged", "detail": None,
        "pct": 1, "msg": None, "proxy": "forged",
    }  # fmt: skip
    values.update(others)
    return [None if value is None else str(value) for value in values.values()]


def as_(server: Server, scratch: str, user: str) -> Connection:
    return server.connect(dbname=scratch, user=user)


def seen(conn: Connection, handle: Handle) -> list[tuple[Any, ...]]:
    query = "SELECT sql, role FROM pg_background_history WHERE pid = %s AND cookie = %s"
    return conn.execute(query, [*handle]).fetchall()


@pytest.mark.parametrize(
    ("user", "sees"),
    [("victor", True), ("friend", True), ("keeper", True), ("postgres", True),
     ("mallory", False), ("nobody_much", False)],
)  # fmt: skip
def test_who_sees_a_row(
    server: Server, scratch: str, secret: Handle, user: str, sees: bool
) -> None:
    with as_(server, scratch, user) as conn:
        assert seen(conn, secret) == ([(SECRET, "victor")] if sees else [])


def test_the_functions_go_by_it(start_proxy: StartProxy, scratch: str, secret: Handle) -> None:
    proxy = start_proxy("--history", "all")
    for user, state in (("victor", "stopped"), ("friend", "stopped"), ("mallory", None)):
        with proxy.connect(dbname=scratch, user=user) as conn:
            query = "SELECT state FROM pg_background_outcome(%s, %s)"
            assert conn.execute(query, secret).fetchall() == [(state,)]
            listed = conn.execute("SELECT * FROM pg_background_list_all()").fetchall()
            assert (secret.cookie in {row[1] for row in listed}) == (state is not None)


def test_the_table_is_its_owners_alone(server: Server, scratch: str, secret: Handle) -> None:
    """Nor do grants on all tables open it, nor default privileges."""
    with as_(server, scratch, "keeper") as owner, as_(server, scratch, "mallory") as mallory:
        for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            has = "SELECT has_table_privilege('mallory', 'public._pg_background_history', %s)"
            assert one(owner, has, [privilege]) is False
            has = "SELECT has_table_privilege('mallory', 'public.pg_background_history', %s)"
            assert one(owner, has, [privilege]) is (privilege == "SELECT")
        for statement in (
            "TABLE _pg_background_history",
            "DELETE FROM _pg_background_history",
            "INSERT INTO pg_background_history (pid) VALUES (1)",
            "DELETE FROM pg_background_history",
            "UPDATE pg_background_history SET sql = ''",
        ):
            assert failure(mallory, statement).sqlstate in ("42501", "55000")
        owner.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO mallory")
        try:
            assert mallory.execute("TABLE _pg_background_history").fetchall() == []
            mallory.execute("DELETE FROM _pg_background_history")
            mallory.execute("UPDATE _pg_background_history SET sql = 'forged'")
            added = (
                "INSERT INTO _pg_background_history (role_id, role, login_id, database, pid,"
                " cookie, backend_pid, state, noted_at, expires_at)"
                " VALUES (10, 'postgres', 10, 'x', 1, 1, 1, 'error', now(), now())"
            )
            assert failure(mallory, added).sqlstate == "42501"
            for statement in (
                "INSERT INTO pg_background_history (pid) VALUES (1)",
                "DELETE FROM pg_background_history",
                "UPDATE pg_background_history SET sql = ''",
            ):
                assert failure(mallory, statement).sqlstate == "55000"
            assert seen(mallory, secret) == []
        finally:
            owner.execute("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM mallory")
            owner.execute("GRANT SELECT ON pg_background_history TO PUBLIC")
        assert seen(owner, secret) == [(SECRET, "victor")]


def test_leaky_functions_see_nothing(server: Server, scratch: str, secret: Handle) -> None:
    with as_(server, scratch, "keeper") as owner:
        owner.execute("ANALYZE _pg_background_history")
    with as_(server, scratch, "mallory") as mallory:
        mallory.execute(
            "CREATE FUNCTION pg_temp.leak(text) RETURNS bool LANGUAGE plpgsql COST 0.0000001 AS"
            " $$BEGIN RAISE NOTICE 'leaked %', $1; RETURN true; END$$"
        )
        mallory.execute("CREATE OPERATOR pg_temp.<<< (PROCEDURE = pg_temp.leak, RIGHTARG = text)")
        with notices(mallory) as told:
            for query in (
                "SELECT * FROM pg_background_history WHERE pg_temp.leak(sql)",
                "SELECT * FROM pg_background_history WHERE OPERATOR(pg_temp.<<<) sql",
                "SELECT count(*) FROM pg_background_history h JOIN (VALUES (1)) v(n)"
                " ON pg_temp.leak(h.sql)",
                "SELECT * FROM pg_background_history WHERE sql::int = 0 OR pg_temp.leak(sql)",
            ):
                assert all(SECRET not in str(found) for found in mallory.execute(query.encode()))
        assert not [notice for notice in told if "secret" in str(notice)]
        stats = "SELECT count(*) FROM pg_stats WHERE tablename = '_pg_background_history'"
        assert one(mallory, stats) == 0


def test_a_role_writes_about_itself_only(server: Server, scratch: str, secret: Handle) -> None:
    """What it says of its own jobs is its word; whose they are, the server's."""
    with as_(server, scratch, "mallory") as mallory, as_(server, scratch, "keeper") as owner:
        mallory.execute(RECORD, [[row(1, 1), row(*secret), row(*secret, None)]])
        query = "SELECT role, pid, state FROM pg_background_history WHERE label = 'forged'"
        assert sorted(owner.execute(query)) == sorted(
            [("mallory", 1, "stopped"), ("mallory", secret.pid, "stopped")]
        )
        # What has ended stays as it is.
        mallory.execute(RECORD, [[row(1, 1, "error"), row(1, 1, None)]])
        assert ("mallory", 1, "stopped") in owner.execute(query).fetchall()
        assert seen(owner, secret) == sorted(
            [(SECRET, "victor"), ("forged", "mallory")], reverse=True
        ) or sorted(seen(owner, secret)) == sorted([(SECRET, "victor"), ("forged", "mallory")])
        with as_(server, scratch, "victor") as victor:
            assert seen(victor, secret) == [(SECRET, "victor")]


def test_code_that_runs_in_the_session_of_another_cannot_write(
    server: Server, scratch: str
) -> None:
    """Neither as its owner nor as the session's role, however it is called."""
    values = ", ".join("NULL" if value is None else f"'{value}'" for value in row(66, 66))
    array = f"CAST(ARRAY[ARRAY[{values}]] AS text[])"
    call = f"public._pg_background_record({array})"
    with as_(server, scratch, "mallory") as mallory:
        for name, rights in (("as_owner", "SECURITY DEFINER"), ("as_caller", "")):
            mallory.execute(
                f"CREATE FUNCTION {name}() RETURNS void LANGUAGE plpgsql {rights}"
                f" AS $$BEGIN PERFORM {call}; END$$".encode()
            )
            mallory.execute(
                f"CREATE FUNCTION {name}_sql() RETURNS void LANGUAGE sql {rights}"
                f" AS $$SELECT {call}$$".encode()
            )
        mallory.execute(
            "CREATE FUNCTION by_prepared() RETURNS void LANGUAGE plpgsql AS $$BEGIN"
            f" EXECUTE 'SELECT public._pg_background_record($1)' USING {array}; END$$".encode()
        )
        mallory.execute("CREATE TABLE trap (n int); GRANT ALL ON trap TO PUBLIC")
        mallory.execute(
            "CREATE FUNCTION sprung() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM as_caller(); RETURN NEW; END$$"
        )
        mallory.execute(
            "CREATE CONSTRAINT TRIGGER sprung AFTER INSERT ON trap DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE PROCEDURE sprung()"
        )
    with as_(server, scratch, "victor") as victor:
        for statement in (
            *("SELECT as_owner()", "SELECT as_caller()", "SELECT as_owner_sql()"),
            *("SELECT as_caller_sql()", "SELECT by_prepared()", "INSERT INTO trap VALUES (1)"),
            *(f"SELECT {call}", f"SELECT 1, {call}", f"PREPARE p AS SELECT {call}; EXECUTE p"),
        ):
            error = failure(victor, statement.encode())
            assert (error.sqlstate, error.diag.message_primary) == DENIED, statement
        # The deferred trigger fires when the call is the last statement of the transaction.
        with pytest.raises(psycopg.Error) as caught, victor.pipeline():  # noqa: PT012
            victor.execute("BEGIN")
            victor.execute("INSERT INTO trap VALUES (1)")
            victor.execute(RECORD, [[row(67, 67)]])
            victor.execute("COMMIT")
        assert (caught.value.sqlstate, caught.value.diag.message_primary) == DENIED
    with as_(server, scratch, "keeper") as owner:
        query = "SELECT count(*) FROM pg_background_history WHERE pid IN (66, 67)"
        assert one(owner, query) == 0
    with as_(server, scratch, "mallory") as mallory:
        mallory.execute("DROP TABLE trap; DROP FUNCTION sprung()")


def test_a_role_that_may_not_launch_writes_nothing(server: Server, scratch: str) -> None:
    with as_(server, scratch, "nobody_much") as conn:
        error = failure(conn, RECORD, [[row(2, 2)]])
        assert (error.sqlstate, error.diag.message_primary) == DENIED


@pytest.mark.parametrize("name", ["launch_v2", "submit_at_commit", "run_query"])
def test_a_role_that_may_launch_in_one_way_only_has_its_rows(
    server: Server, scratch: str, secret: Handle, name: str
) -> None:
    with as_(server, scratch, "keeper") as owner, as_(server, scratch, "nobody_much") as conn:
        query = "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = %s"
        [(function,), *_] = owner.execute(query, [f"pg_background_{name}"]).fetchall()
        owner.execute(f"GRANT EXECUTE ON FUNCTION {function} TO nobody_much".encode())
        try:
            conn.execute(RECORD, [[row(7, 7)]])
            assert len(seen(conn, Handle(7, 7))) == 1
        finally:
            owner.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM nobody_much".encode())


def test_a_flood_drives_out_its_own_rows_only(server: Server, scratch: str, secret: Handle) -> None:
    with as_(server, scratch, "mallory") as mallory, as_(server, scratch, "keeper") as owner:
        error = failure(mallory, RECORD, [[row(n, n) for n in range(501)]])
        assert error.sqlstate == "22023"
        for malformed in ([["1", "2"]], [row(3, 3, "forged")], [[*row(3, 3), "more"]]):
            assert failure(mallory, RECORD, [malformed]).sqlstate == "22023"
        for base in range(0, 11_500, 500):
            mallory.execute(
                RECORD,
                [
                    [
                        row(n, n, sql="x" * 100_000 if n % 500 == 0 else "x")
                        for n in range(base, base + 500)
                    ]
                ],
            )
        count = (
            "SELECT count(*), max(length(sql)) FROM pg_background_history WHERE role = 'mallory'"
        )
        [(number, longest)] = owner.execute(count).fetchall()
        assert 9_000 <= number <= 10_500
        assert longest <= 8200
        assert (SECRET, "victor") in seen(owner, secret)


def test_names_of_others_are_not_used(server: Server, recording: Proxy, scratch: str) -> None:
    """Whatever stands first in the search_path of a session, and of a role."""
    with server.connect(dbname=scratch) as conn:
        conn.execute("CREATE SCHEMA bait AUTHORIZATION mallory; GRANT ALL ON SCHEMA bait TO PUBLIC")
        conn.execute("ALTER ROLE victor SET search_path = bait, pg_catalog, public")
    try:
        with as_(server, scratch, "mallory") as mallory:
            mallory.execute(
                "CREATE TABLE bait.caught (what text); GRANT ALL ON bait.caught TO PUBLIC"
            )
            mallory.execute("CREATE TABLE bait._pg_background_history (what text)")
            for name, arguments in (
                ("_pg_background_record", "text[]"),
                ("set_config", "text, text, boolean"),
                ("clock_timestamp", ""),
                ("to_timestamp", "double precision"),
                ("current_query", ""),
                ('"left"', "text, integer"),
            ):
                mallory.execute(
                    f"CREATE FUNCTION bait.{name}({arguments}) RETURNS text LANGUAGE plpgsql AS"
                    f" $$BEGIN INSERT INTO bait.caught VALUES ('{name}'); RETURN ''; END$$".encode()
                )
            mallory.execute(
                "CREATE FUNCTION bait.equal(text, text) RETURNS bool LANGUAGE plpgsql AS"
                " $$BEGIN INSERT INTO bait.caught VALUES ('='); RETURN true; END$$"
            )
            mallory.execute(
                "CREATE OPERATOR bait.= (PROCEDURE = bait.equal, LEFTARG = text, RIGHTARG = text)"
            )
        with (
            recording.connect(dbname=scratch, user="victor") as conn,
            server.connect(dbname=scratch) as observer,
        ):
            [found] = conn.execute(
                "SELECT * FROM public.pg_background_submit('SELECT 1', 0, 'baited')"
            ).fetchall()
            query = "SELECT state FROM pg_background_history WHERE cookie = %s"
            wait_until(lambda: observer.execute(query, [found[1]]).fetchall() == [("stopped",)])
            conn.execute("SELECT * FROM public.pg_background_outcome(1, 1)")
            conn.execute("SELECT * FROM public.pg_background_list_all()")
            assert observer.execute("SELECT * FROM bait.caught").fetchall() == []
    finally:
        with server.connect(dbname=scratch) as conn:
            conn.execute("ALTER ROLE victor RESET search_path; DROP SCHEMA bait CASCADE")


def test_an_extension_of_another_role_gets_no_rows(server: Server, recording: Proxy) -> None:
    """Mallory's own, in a database where she may create one: victor's jobs are not told to it."""
    with database(server, "history_of_mallory") as name:
        with server.connect(dbname=name) as conn:
            conn.execute(f"GRANT CREATE ON DATABASE {name} TO mallory".encode())
        with recording.connect(dbname=name, user="mallory") as conn:
            conn.execute("CREATE SCHEMA mine")
            conn.execute("CREATE EXTENSION pg_background SCHEMA mine")
            conn.execute("SET search_path = mine")
            conn.execute("SELECT * FROM pg_background_submit('SELECT 1', 0, 'own')")
            query = "SELECT role FROM mine.pg_background_history WHERE state = 'stopped'"
            wait_until(lambda: conn.execute(query).fetchall() == [("mallory",)])
            conn.execute("GRANT ALL ON SCHEMA mine TO PUBLIC")
        with recording.connect(dbname=name, user="victor") as conn:
            conn.execute("SELECT pg_background_submit($$SELECT 'secret'$$, 0, 'of victor')")
            recording.wait_for_log("history: there is no table for the jobs .role victor")
        with server.connect(dbname=name) as conn:
            assert one(conn, "SELECT count(*) FROM mine._pg_background_history") == 1


@pytest.mark.parametrize("planted", ["function", "view"])
def test_what_another_role_has_put_in_its_place_is_not_called(
    server: Server, recording: Proxy, planted: str
) -> None:
    """Where an older proxy has made the extension, and all may create in its schema."""
    with database(server, f"history_with_{planted}") as name:
        with recording.connect(dbname=name) as conn:
            conn.execute("CREATE EXTENSION pg_background")
            conn.execute("GRANT pgbackground_role TO victor")
            # So that the other one alone would do.
            conn.execute("DROP VIEW pg_background_history")
            if planted == "function":
                view = "CREATE VIEW pg_background_history AS SELECT NULL::int AS pid"
                conn.execute(view)
                conn.execute("DROP FUNCTION _pg_background_record(text[])")
        with server.connect(dbname=name, user="mallory") as mallory:
            mallory.execute("CREATE TABLE caught (who text); GRANT ALL ON caught TO PUBLIC")
            mallory.execute(
                "CREATE FUNCTION trap() RETURNS int LANGUAGE plpgsql AS"
                " $$BEGIN INSERT INTO caught VALUES (current_user); RETURN 1; END$$"
            )
            if planted == "function":
                mallory.execute(
                    "CREATE FUNCTION _pg_background_record(rows text[]) RETURNS int LANGUAGE sql"
                    " AS $$SELECT trap()$$"
                )
            else:
                columns = (
                    "1 AS cookie, 1 AS role_id, 'error'::text AS state, now() AS started_at,"
                    " now() AS finished_at, 1 AS row_count, ''::text AS command_tag,"
                    " ''::text AS sqlstate, ''::text AS message, ''::text AS label,"
                    " ''::text AS sql, 1 AS attempts"
                )
                mallory.execute(
                    f"CREATE VIEW pg_background_history AS SELECT trap() AS pid, {columns}".encode()
                )
                mallory.execute("GRANT SELECT ON pg_background_history TO PUBLIC")
        with recording.connect(dbname=name, user="victor") as conn:
            conn.execute("SELECT pg_background_submit($$SELECT 'secret'$$, 0, 'of victor')")
            recording.wait_for_log(f"history: there is no table .*victor, database {name}")
            query = "SELECT state FROM pg_background_outcome(1, 1)"
            assert conn.execute(query).fetchall() == [(None,)]
        with server.connect(dbname=name) as conn:
            assert conn.execute("SELECT * FROM caught").fetchall() == []


def test_a_role_of_the_same_name_or_oid_sees_nothing(
    server: Server, recording: Proxy, scratch: str
) -> None:
    """After DROP ROLE, and in a database that was restored into another cluster."""
    with server.connect(dbname=scratch) as conn:
        conn.execute("CREATE ROLE fleeting LOGIN IN ROLE pgbackground_role")
        with recording.connect(dbname=scratch, user="fleeting") as own:
            [found] = own.execute("SELECT * FROM pg_background_submit('SELECT 1')").fetchall()
            wait_until(lambda: seen(own, Handle(*found)) == [("SELECT 1", "fleeting")])
        gone = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'fleeting'"
        wait_until(lambda: one(conn, gone) == 0)
        conn.execute("DROP ROLE fleeting; CREATE ROLE fleeting LOGIN")
        with as_(server, scratch, "fleeting") as other:
            assert seen(other, Handle(*found)) == []
        conn.execute("DROP ROLE fleeting")
        update = "UPDATE _pg_background_history SET role = 'elsewhere' WHERE role = 'victor'"
        conn.execute(update)
        try:
            with as_(server, scratch, "victor") as victor:
                assert one(victor, "SELECT count(*) FROM pg_background_history") == 0
        finally:
            conn.execute(
                "UPDATE _pg_background_history SET role = 'victor' WHERE role = 'elsewhere'"
            )
