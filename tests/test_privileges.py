"""Who may call the functions, who may have a job's result, and the helpers that grant it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.support.background import failure, launch, message, notices, result, value, wait_until
from tests.support.servers import Connection, Proxy, psql

pytestmark = pytest.mark.every_server

EXECUTOR = "pgbackground_role"

_number = itertools.count(1)


@pytest.fixture
def role(observer: Connection) -> Iterator[str]:
    """A role that may log in and nothing else; its name needs quotes."""
    name = f'Röle "{next(_number)}'
    yield from _role(observer, name)


@pytest.fixture
def other(observer: Connection) -> Iterator[str]:
    """One more, with a plain name."""
    yield from _role(observer, f"other_{next(_number)}")


def _role(observer: Connection, name: str) -> Iterator[str]:
    quoted = quote(name)
    observer.execute(f"CREATE ROLE {quoted} LOGIN")
    yield name
    query = "SELECT 1 FROM pg_stat_activity WHERE usename = %s"
    wait_until(lambda: not observer.execute(query, [name]).fetchone())
    observer.execute(f"DROP OWNED BY {quoted}")
    observer.execute(f"DROP ROLE {quoted}")


def quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def grant(conn: Connection, role: str) -> bool:
    row = conn.execute("SELECT grant_pg_background_privileges(%s)", [role]).fetchone()
    assert row is not None
    return bool(row[0])


def revoke(conn: Connection, role: str) -> bool:
    row = conn.execute("SELECT revoke_pg_background_privileges(%s)", [role]).fetchone()
    assert row is not None
    return bool(row[0])


CALLS = {
    "SELECT pg_background_launch('SELECT 1')": "pg_background_launch",
    "SELECT * FROM pg_background_launch('SELECT 1')": "pg_background_launch",
    "SELECT pg_background_result(1)": "pg_background_result",
    "SELECT * FROM pg_background_result(1) AS (n int)": "pg_background_result",
    "SELECT pg_background_detach(1)": "pg_background_detach",
    "SELECT pg_background_detach(NULL)": "pg_background_detach",
}


def test_role_without_a_grant_may_call_nothing(
    proxy: Proxy, scratch: str, conn: Connection, role: str
) -> None:
    with proxy.connect(dbname=scratch, user=role) as plain:
        for call, name in CALLS.items():
            assert message(failure(plain, call)) == (
                "42501",
                f"permission denied for function {name}",
            )


def test_role_may_call_once_granted_and_no_longer_when_revoked(
    proxy: Proxy, scratch: str, conn: Connection, role: str
) -> None:
    with proxy.connect(dbname=scratch, user=role) as plain:
        assert grant(conn, role) is True
        assert value(plain, "SELECT current_user || session_user") == role * 2
        pid = launch(plain, "SELECT 1")
        assert grant(conn, role) is True  # again
        assert revoke(conn, role) is True
        error = failure(plain, "SELECT pg_background_launch('SELECT 1')")
        assert message(error) == (
            "42501",
            "permission denied for function pg_background_launch",
        )
        assert failure(plain, "SELECT pg_background_result(%s)", [pid]).sqlstate == "42501"
        assert grant(conn, role) is True
        assert result(plain, pid) == [(1,)]
        assert revoke(conn, role) is True


def test_grant_takes_effect_when_its_transaction_commits(
    proxy: Proxy, scratch: str, observer: Connection, role: str
) -> None:
    with (
        proxy.connect(dbname=scratch, user=role) as plain,
        proxy.connect(autocommit=False, dbname=scratch) as admin,
    ):
        assert grant(admin, role) is True
        assert failure(plain, "SELECT pg_background_launch('')").sqlstate == "42501"
        admin.rollback()
        assert failure(plain, "SELECT pg_background_launch('')").sqlstate == "42501"
        assert grant(admin, role) is True
        admin.commit()
        assert value(plain, "SELECT 1") == 1


def test_member_of_a_granted_role_may_call(
    proxy: Proxy, scratch: str, conn: Connection, role: str, other: str
) -> None:
    assert grant(conn, other) is True
    conn.execute(f"GRANT {other} TO {quote(role)}")
    with proxy.connect(dbname=scratch, user=role) as plain:
        assert value(plain, "SELECT 1") == 1


def test_it_is_the_current_role_that_counts(conn: Connection, role: str, other: str) -> None:
    grant(conn, other)
    conn.execute(f"SET ROLE {quote(role)}")
    assert failure(conn, "SELECT pg_background_launch('SELECT 1')").sqlstate == "42501"
    conn.execute(f"SET ROLE {other}")
    assert value(conn, "SELECT current_user::text") == other
    conn.execute("RESET ROLE")
    assert value(conn, "SELECT current_user::text") == "postgres"


def test_job_of_a_role_whose_rights_the_current_role_lacks(
    conn: Connection, role: str, other: str
) -> None:
    for name in (role, other):
        grant(conn, name)
    pid = launch(conn, "SELECT 1")
    conn.execute(f"SET ROLE {other}")
    expected = ("42501", f'permission denied for background worker with PID "{pid}"')
    for call in (
        f"SELECT pg_background_result({pid})",
        f"SELECT * FROM pg_background_result({pid}) AS (n int)",
        f"SELECT pg_background_detach({pid})",
    ):
        assert message(failure(conn, call)) == expected
    mine = launch(conn, "SELECT 2")
    conn.execute(f"SET ROLE {quote(role)}")
    assert failure(conn, f"SELECT pg_background_result({mine})").sqlstate == "42501"
    conn.execute("RESET ROLE")  # a superuser has the rights of all
    assert result(conn, mine) == [(2,)]
    assert result(conn, pid) == [(1,)]


def test_rights_of_the_launching_role_by_membership(
    conn: Connection, role: str, other: str
) -> None:
    for name in (role, other):
        grant(conn, name)
    conn.execute(f"SET ROLE {other}")
    pid = launch(conn, "SELECT 1")
    conn.execute("RESET ROLE")
    conn.execute(f"GRANT {other} TO {quote(role)}")
    conn.execute(f"SET ROLE {quote(role)}")
    assert result(conn, pid) == [(1,)]


def test_job_has_the_rights_of_its_role_and_no_more(
    proxy: Proxy, scratch: str, conn: Connection, role: str
) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS secret (n int)")
    grant(conn, role)
    with proxy.connect(dbname=scratch, user=role) as plain:
        for job in (
            "SELECT * FROM secret",
            "SET ROLE postgres; SELECT * FROM secret",
            "RESET ROLE; SELECT * FROM secret",
            "SET SESSION AUTHORIZATION postgres; SELECT * FROM secret",
            "RESET SESSION AUTHORIZATION; SELECT * FROM secret",
        ):
            error = failure(plain, "SELECT pg_background_result(%s)", [launch(plain, job)])
            assert error.sqlstate == "42501", job


# --- the helpers ---


@pytest.mark.parametrize(
    "arguments",
    ["'{}'", "role_name => '{}'", "user_name => '{}'", "'{}', false", "'{}'::name, 'no'"],
)
def test_helpers_are_called_in_several_ways(conn: Connection, other: str, arguments: str) -> None:
    for prepare in (None, True):
        for verb in ("grant", "revoke"):
            call = f"{verb}_pg_background_privileges({arguments.format(other)})"
            cursor = conn.execute(f"SELECT {call}", prepare=prepare)
            assert cursor.description is not None
            [column] = cursor.description
            assert (column.name, column.type_code) == (f"{verb}_pg_background_privileges", 16)
            assert cursor.fetchall() == [(True,)]
            query = "SELECT pg_has_role(%s, %s, 'MEMBER')"
            row = conn.execute(query, [other, EXECUTOR]).fetchone()
            assert row == (verb == "grant",)


def test_helpers_for_each_role_of_a_table(conn: Connection, role: str, other: str) -> None:
    rows = conn.execute(
        "SELECT rolname, grant_pg_background_privileges(rolname::text) AS done FROM pg_roles"
        " WHERE rolname IN (%s, %s) ORDER BY rolname",
        [role, other],
        binary=True,
    ).fetchall()
    assert sorted(rows) == sorted([(role, True), (other, True)])


def test_commands_are_printed_on_request(conn: Connection, role: str) -> None:
    grant(conn, role)  # so that the executor role exists
    for verb, command in (
        ("revoke", f"REVOKE {EXECUTOR} FROM {quote(role)}"),
        ("grant", f"GRANT {EXECUTOR} TO {quote(role)}"),
    ):
        for arguments in ("%s, true", "print_commands => true, user_name => %s"):
            with notices(conn) as printed:
                query = f"SELECT {verb}_pg_background_privileges({arguments})"
                assert conn.execute(query, [role]).fetchone() == (True,)
            texts = [
                notice["message_primary"]
                for notice in printed
                if notice["severity_nonlocalized"] == "INFO"
            ]
            assert texts == [f"Executed command: {command}"]
        with notices(conn) as printed:
            conn.execute(f"SELECT {verb}_pg_background_privileges(%s, false)", [role])
        assert not [n for n in printed if n["severity_nonlocalized"] == "INFO"]


@pytest.mark.parametrize(("verb", "doing"), [("grant", "granting"), ("revoke", "revoking")])
def test_unknown_role_gives_a_notice_and_false(conn: Connection, verb: str, doing: str) -> None:
    for name in ("no_such_role", "it's no \\ \"role", ""):
        with conn.transaction(), notices(conn) as collected:
            query = f"SELECT {verb}_pg_background_privileges(%s)"
            assert conn.execute(query, [name]).fetchone() == (False,)
            assert conn.execute("SELECT 1").fetchone() == (1,)  # the transaction lives on
        [notice] = collected
        assert notice["severity_nonlocalized"] == "NOTICE"
        assert notice["message_primary"] is not None
        preposition = "to" if verb == "grant" else "from"
        start = f"Error {doing} pg_background privileges {preposition} {name}: "
        assert notice["message_primary"].startswith(start)


def test_null_role_is_no_role(conn: Connection) -> None:
    for verb in ("grant", "revoke"):
        row = conn.execute(f"SELECT {verb}_pg_background_privileges(NULL)").fetchone()
        assert row == (False,)


def test_helpers_called_by_an_ordinary_role_fail_with_a_notice(
    proxy: Proxy, scratch: str, conn: Connection, role: str, other: str
) -> None:
    grant(conn, role)
    with proxy.connect(dbname=scratch, user=role) as plain:
        for verb in ("grant", "revoke"):
            with notices(plain) as collected:
                query = f"SELECT {verb}_pg_background_privileges(%s)"
                got = plain.execute(query, [other]).fetchone()
            if verb == "grant":
                assert got == (False,)
                assert collected
    row = conn.execute("SELECT pg_has_role(%s, %s, 'MEMBER')", [other, EXECUTOR]).fetchone()
    assert row == (False,)


def test_failed_grant_leaves_an_aborted_transaction_aborted(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        failure(conn, "SELECT 1/0")
        error = failure(conn, "SELECT grant_pg_background_privileges('alice')")
        assert error.sqlstate == "25P02"
        conn.rollback()


def test_role_name_in_another_encoding(conn: Connection, role: str) -> None:
    conn.execute("SET client_encoding = 'LATIN1'")
    assert grant(conn, role) is True
    conn.execute("SET client_encoding = 'UTF8'")
    row = conn.execute("SELECT pg_has_role(%s, %s, 'MEMBER')", [role, EXECUTOR]).fetchone()
    assert row == (True,)


@pytest.mark.parametrize("encoding", ["SJIS", "BIG5", "GBK", "UHC", "GB18030"])
def test_role_name_cannot_break_out_of_its_quotes(
    proxy: Proxy, scratch: str, observer: Connection, encoding: str
) -> None:
    """In these encodings the second byte of a character may be a backslash."""
    observer.execute("CREATE TABLE IF NOT EXISTS broken_out (n int)")
    character = {"SJIS": "ソ", "BIG5": "功", "GBK": "誠", "UHC": "똠", "GB18030": "誠"}[encoding]
    name = character + "', true); INSERT INTO broken_out VALUES (1); --"
    with proxy.connect(dbname=scratch) as conn:
        conn.execute(f"SET client_encoding = '{encoding}'")
        for sql in (
            "SELECT grant_pg_background_privileges(%s)",
            "SELECT revoke_pg_background_privileges(%s)",
        ):
            with notices(conn) as collected:
                assert conn.execute(sql, [name]).fetchone() == (False,)
            assert name in (collected[0]["message_primary"] or "")
    assert observer.execute("SELECT count(*) FROM broken_out").fetchone() == (0,)


def test_psql_shows_the_commands(proxy: Proxy, scratch: str, conn: Connection, other: str) -> None:
    grant(conn, other)
    sql = f"SELECT grant_pg_background_privileges('{other}', true)"
    done = psql(proxy.port, "-c", sql, dbname=scratch)
    assert f"INFO:  Executed command: GRANT {EXECUTOR} TO {other}\n" in done.stderr
    assert done.stdout.split()[:3] == ["grant_pg_background_privileges", "-" * 32, "t"]
