"""SECURITY DEFINER functions that launch: their jobs are the owner's, not the caller's.

Invariant: as with the extension. The application's role is no member of the owner and may execute
nothing but the wrapper; the job runs on a login of the owner, if the proxy has his credentials.
The wrappers are those that ora2pg emits for autonomous transactions, and a warehouse's trigger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests.conftest import StartProxy
from tests.support.background import failure, wait_until
from tests.support.in_database import one
from tests.support.servers import DEFAULT_HBA, Connection, Proxy, Server, database

pytestmark = pytest.mark.every_server

APP: Final = "app"
OWNER: Final = "dwh_owner"
PASSWORDS: Final = {APP: "app's", OWNER: "owner's"}

# What ora2pg makes of a function with PRAGMA AUTONOMOUS_TRANSACTION: {0}_atx is the function, {0}
# the wrapper. With a result of the type {1}, whose expression is {2}.
WITH_RETURN: Final = """
CREATE FUNCTION own.{0}_atx(what text) RETURNS {1} LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO own.log VALUES (what, current_user, session_user); RETURN {2}; END $$;
CREATE FUNCTION own.{0}(what text) RETURNS {1} LANGUAGE plpgsql SECURITY DEFINER AS $body$
DECLARE
  v_query text;
  v_ret {1};
BEGIN
  v_query := 'SELECT * FROM own.{0}_atx ( ' || quote_nullable(what) || ' )';
  SELECT * INTO v_ret FROM pg_background_result(pg_background_launch(v_query)) AS p (ret {1});
  RETURN v_ret;
END $body$;
"""
WITHOUT_RETURN: Final = """
CREATE FUNCTION own.{0}_atx(what text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO own.log VALUES (what, current_user, session_user); END $$;
CREATE {1} own.{0}(what text) {2} LANGUAGE plpgsql SECURITY DEFINER AS $body$
DECLARE
  v_query text;
BEGIN
  v_query := 'SELECT true FROM own.{0}_atx ( ' || quote_nullable(what) || ' )';
  PERFORM * FROM pg_background_result(pg_background_launch(v_query)) AS p (ret boolean);
END $body$;
"""
COMPOSITE: Final = """
CREATE TYPE own.pair AS (n int, t text);
CREATE FUNCTION own.composite_atx(what text) RETURNS own.pair LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO own.log VALUES (what, current_user, session_user); RETURN (7, what); END $$;
CREATE FUNCTION own.composite(what text) RETURNS own.pair LANGUAGE plpgsql SECURITY DEFINER
AS $body$
DECLARE
  v_query text;
  v_ret own.pair;
BEGIN
  v_query := 'SELECT * FROM own.composite_atx ( ' || quote_nullable(what) || ' )';
  SELECT * INTO v_ret FROM pg_background_result(pg_background_launch(v_query))
    AS p (n int, t text);
  RETURN v_ret;
END $body$;
"""
TRIGGER: Final = """
CREATE TABLE own.facts (org text);
CREATE PROCEDURE own.repartitionize(org_tabel text) LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO own.log VALUES (org_tabel, current_user, session_user); COMMIT;
  INSERT INTO own.log VALUES (org_tabel, current_user, session_user); END $$;
CREATE FUNCTION own.on_insert() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp SECURITY DEFINER AS $body$
DECLARE _pid int;
BEGIN
  SELECT public.pg_background_launch('CALL own.repartitionize(org_tabel => '
    || quote_literal(NEW.org) || ')') INTO _pid;
  RETURN NEW;
END $body$;
CREATE TRIGGER x BEFORE INSERT ON own.facts FOR EACH ROW EXECUTE FUNCTION own.on_insert();
GRANT INSERT ON own.facts TO app;
"""

TYPED: Final = {
    "bigint": ("bigint", "9223372036854775807"),
    "text": ("text", "'ü''x\\y'"),
    "numeric": ("numeric(10,2)", "12345678.90"),
    "timestamp": ("timestamp", "timestamp '2026-02-01 12:34:56.789'"),
}


@dataclass
class Case:
    """A database whose wrappers are the owner's.

    Attributes:
        proxy: has the owner's credentials.
        root: a superuser's session past the proxy.
    """

    server: Server
    name: str
    proxy: Proxy
    root: Connection

    def connect(self, proxy: Proxy | None = None, **params: Any) -> Connection:
        """The application's session through a proxy."""
        return (proxy or self.proxy).connect(
            dbname=self.name, user=APP, password=PASSWORDS[APP], **params
        )

    def logged(self, what: str) -> list[tuple[str, str]]:
        """As whom the row was written: current and session role."""
        return self.root.execute(
            "SELECT role, login FROM own.log WHERE what = %s", [what]
        ).fetchall()


def passfile(folder: Path, *roles: str) -> str:
    """A file with these roles' passwords."""
    path = folder / "passfile"
    path.write_text("".join(f"*:*:*:{role}:{PASSWORDS[role]}\n" for role in roles))
    path.chmod(0o600)
    return str(path)


@pytest.fixture(scope="module")
def case(
    server: Server, executor_as_before: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """The owner has created his extension and his wrappers; both roles need passwords."""
    with server.connect() as root:
        for role, password in PASSWORDS.items():
            literal = password.replace("'", "''")
            root.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{literal}'".encode())
    server.set_hba([f"host all {','.join(PASSWORDS)} 127.0.0.1/32 scram-sha-256", *DEFAULT_HBA])
    folder = tmp_path_factory.mktemp("security_definer")
    upstream = f"host={server.host} port={server.port}"
    try:
        with (
            database(server, "definers") as name,
            Proxy(upstream, "--passfile", passfile(folder, APP, OWNER)) as proxy,
            server.connect(dbname=name) as root,
        ):
            root.execute(f"CREATE SCHEMA own AUTHORIZATION {OWNER}".encode())
            with proxy.connect(dbname=name) as conn:
                conn.execute("CREATE EXTENSION pg_background")
                granted = "SELECT grant_pg_background_privileges(%s)"
                assert one(conn, granted, [OWNER]) is True
            create(server, name)
            yield Case(server, name, proxy, root)
    finally:
        server.set_hba()
        with server.connect() as root:
            root.execute(f"DROP ROLE {', '.join(PASSWORDS)}".encode())


def create(server: Server, name: str) -> None:
    """The owner's objects."""
    with server.connect(dbname=name, user=OWNER, password=PASSWORDS[OWNER]) as conn:
        conn.execute("CREATE TABLE own.log (what text, role text, login text)")
        for function, (type, value) in TYPED.items():
            conn.execute(WITH_RETURN.format(function, type, value).encode())
        conn.execute(WITHOUT_RETURN.format("nothing", "FUNCTION", "RETURNS void").encode())
        conn.execute(WITHOUT_RETURN.format("procedure", "PROCEDURE", "").encode())
        conn.execute(COMPOSITE.encode())
        conn.execute(TRIGGER.encode())
        for kind in ("FUNCTIONS", "PROCEDURES"):
            conn.execute(f"REVOKE ALL ON ALL {kind} IN SCHEMA own FROM PUBLIC".encode())
        conn.execute(f"GRANT USAGE ON SCHEMA own TO {APP}".encode())
        for function in (*TYPED, "nothing", "composite"):
            conn.execute(f"GRANT EXECUTE ON FUNCTION own.{function}(text) TO {APP}".encode())
        conn.execute(f"GRANT EXECUTE ON PROCEDURE own.procedure(text) TO {APP}".encode())


AS_OWNER: Final = [(OWNER, OWNER)]


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("function", TYPED)
def test_a_function_with_a_result(case: Case, function: str, prepare: bool) -> None:
    what = f"{function} {prepare}"
    with case.connect() as conn, conn.transaction(force_rollback=True):
        type, value = TYPED[function]
        query = f"SELECT own.{function}(%s)::text, CAST({value} AS {type})::text".encode()
        row = conn.execute(query, [what], prepare=prepare).fetchone()
        assert row is not None
        assert row[0] == row[1]
    assert case.logged(what) == AS_OWNER


def test_a_function_with_a_composite_result(case: Case) -> None:
    with case.connect() as conn, conn.transaction(force_rollback=True):
        assert conn.execute("SELECT * FROM own.composite('it''s')").fetchall() == [(7, "it's")]
    assert case.logged("it's") == AS_OWNER


def test_a_function_without_a_result(case: Case) -> None:
    with case.connect() as conn, conn.transaction(force_rollback=True):
        conn.execute("SELECT own.nothing('nothing')")
    assert case.logged("nothing") == AS_OWNER


def test_a_procedure(case: Case) -> None:
    with case.connect() as conn, conn.transaction(force_rollback=True):
        conn.execute("CALL own.procedure('procedure')")
    assert case.logged("procedure") == AS_OWNER


def test_a_trigger_whose_job_commits(case: Case) -> None:
    with case.connect() as conn, conn.transaction(force_rollback=True):
        conn.execute("INSERT INTO own.facts VALUES ('it''s a fact')")
    wait_until(lambda: case.logged("it's a fact") == AS_OWNER * 2)


def test_many_calls_in_one_session(case: Case) -> None:
    """Whose channel it is changes with each call."""
    with case.connect() as conn:
        for number in range(10):
            conn.execute("SELECT own.nothing(%s)", [f"many {number}"])
            assert conn.execute("SELECT 1").fetchone() == (1,)
            assert one(conn, "SELECT own.bigint(%s)", [f"many {number}"]) == 2**63 - 1
        error = failure(conn, "WITH q AS (SELECT pg_background_launch('SELECT 1')) TABLE q")
        assert error.sqlstate == "42501"
    for number in range(10):
        assert case.logged(f"many {number}") == AS_OWNER * 2


def test_calls_of_two_owners_in_one_statement(case: Case) -> None:
    """A superuser's session runs his own call and the owner's, one within the other."""
    with case.proxy.connect(dbname=case.name) as conn:
        conn.execute(
            "CREATE FUNCTION public.both(what text) RETURNS int LANGUAGE plpgsql AS $$"
            " DECLARE n int; BEGIN PERFORM own.nothing(what || ' 1');"
            " SELECT x.n INTO n FROM pg_background_result(pg_background_launch("
            "'SELECT 5')) AS x(n int); PERFORM own.nothing(what || ' 2'); RETURN n; END $$"
        )
        assert one(conn, "SELECT public.both('both')") == 5
    assert case.logged("both 1") == case.logged("both 2") == AS_OWNER


def test_an_error_in_the_job_is_the_callers(case: Case) -> None:
    with case.server.connect(dbname=case.name, user=OWNER, password=PASSWORDS[OWNER]) as conn:
        conn.execute(
            "CREATE OR REPLACE FUNCTION own.fails() RETURNS void LANGUAGE plpgsql SECURITY DEFINER"
            " AS $$ BEGIN PERFORM * FROM pg_background_result(pg_background_launch("
            "'SELECT 1/0')) AS p (ret int); END $$;"
            f" GRANT EXECUTE ON FUNCTION own.fails() TO {APP}".encode()
        )
    with case.connect() as conn:
        assert failure(conn, "SELECT own.fails()").sqlstate == "22012"
        conn.execute("SELECT own.nothing('after an error')")
    assert case.logged("after an error") == AS_OWNER


def test_the_application_gets_nothing_else(case: Case) -> None:
    """Neither the functions themselves, nor the owner's jobs."""
    with case.connect() as conn:
        conn.execute("SELECT own.nothing('nothing else')")
        for call in (
            "SELECT pg_background_launch('SELECT 1')",
            "DO $$ BEGIN PERFORM pg_background_launch('SELECT 1'); END $$",
            "SELECT * FROM pg_background_list",
            "WITH q AS (TABLE pg_background_list) TABLE q",
            "SELECT * FROM own.log",
        ):
            assert failure(conn, call.encode()).sqlstate == "42501", call


def test_the_owner_has_lost_his_right(case: Case) -> None:
    """EXECUTE counts when it is called, and for the role that calls."""
    with case.proxy.connect(dbname=case.name) as admin:
        assert one(admin, "SELECT revoke_pg_background_privileges(%s)", [OWNER]) is True
        try:
            with case.connect() as conn:
                assert failure(conn, "SELECT own.nothing('no right')").sqlstate == "42501"
        finally:
            assert one(admin, "SELECT grant_pg_background_privileges(%s)", [OWNER]) is True
    assert case.logged("no right") == []


@pytest.mark.parametrize("function", ["own.nothing('no credentials')", "own.bigint('no')"])
def test_without_credentials_of_the_owner(
    case: Case, start_proxy: StartProxy, tmp_path: Path, function: str
) -> None:
    """The error says whose credentials are missing, and where they could be."""
    proxy = start_proxy("--passfile", passfile(tmp_path, APP))
    with case.connect(proxy) as conn:
        error = failure(conn, f"SELECT {function}".encode())
        assert error.sqlstate == "42501"
        hint = str(error.diag.message_hint)
        for word in (OWNER, "passfile", "auth_file", "auth_query"):
            assert word in hint, hint
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert case.logged("no credentials") == []


def test_with_wrong_credentials_of_the_owner(
    case: Case, start_proxy: StartProxy, tmp_path: Path
) -> None:
    path = tmp_path / "passfile"
    path.write_text(f"*:*:*:{APP}:{PASSWORDS[APP]}\n*:*:*:{OWNER}:wrong\n")
    path.chmod(0o600)
    proxy = start_proxy("--passfile", str(path))
    with case.connect(proxy) as conn:
        assert failure(conn, "SELECT own.nothing('wrong')").sqlstate in ("28P01", "42501")
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert case.logged("wrong") == []


def test_an_owner_that_may_not_log_in(case: Case) -> None:
    with case.server.connect(dbname=case.name) as root:
        root.execute(f"ALTER ROLE {OWNER} NOLOGIN".encode())
        try:
            with case.connect() as conn:
                with pytest.raises(psycopg.Error):
                    conn.execute("SELECT own.nothing('may not log in')")
                assert conn.execute("SELECT 1").fetchone() == (1,)
        finally:
            root.execute(f"ALTER ROLE {OWNER} LOGIN".encode())
    assert case.logged("may not log in") == []


def test_by_auth_file(case: Case, start_proxy: StartProxy, tmp_path: Path) -> None:
    """The secret alone, as the server has it, will do where the login is by SCRAM."""
    path = tmp_path / "auth_file"
    path.write_text("".join(f'"{role}" "{word}"\n' for role, word in PASSWORDS.items()))
    path.chmod(0o600)
    proxy = start_proxy("--auth-file", str(path))
    with case.connect(proxy) as conn:
        conn.execute("SELECT own.nothing('by auth_file')")
    assert case.logged("by auth_file") == AS_OWNER
