"""The helpers for administrators under their names of 2.0, and the caps on times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.api_clients import Client
from tests.support.background import notices
from tests.support.servers import Connection, Proxy, psql

EXECUTOR = "pgbackground_role"
MEMBER = f"SELECT pg_has_role('newcomer', '{EXECUTOR}', 'MEMBER')"
EXISTS = f"SELECT count(*) FROM pg_roles WHERE rolname = '{EXECUTOR}'"


@pytest.fixture
def newcomer(observer: Connection) -> Iterator[str]:
    observer.execute("CREATE ROLE newcomer LOGIN")
    yield "newcomer"
    observer.execute("DROP ROLE newcomer")


def last_line(text: str | None) -> str:
    """What is left without psql's notices, which it prints too."""
    return (text or "").splitlines()[-1]


def test_grant_and_revoke(client: Client, newcomer: str) -> None:
    assert client.call("grant_privileges", f"'{newcomer}'") == "t"
    assert client.one(MEMBER) == "t"
    assert client.call("revoke_privileges", f"user_name => '{newcomer}'") == "t"
    assert client.one(MEMBER) == "f"
    assert last_line(client.call("grant_privileges", "'nobody at all'", "true")) == "f"


def test_commands_are_printed_on_request(conn: Connection, newcomer: str) -> None:
    with notices(conn) as printed:
        conn.execute("SELECT pg_background_grant_privileges(%s, true)", [newcomer])
        conn.execute("SELECT pg_background_revoke_privileges(%s, true)", [newcomer])
    commands = [notice["message_primary"] for notice in printed if notice["severity"] == "INFO"]
    assert f"Executed command: GRANT {EXECUTOR} TO {newcomer}" in commands
    assert f"Executed command: REVOKE {EXECUTOR} FROM {newcomer}" in commands


def test_drop_executor_role(client: Client, observer: Connection, newcomer: str) -> None:
    client.call("grant_privileges", f"'{newcomer}'")
    assert client.call("drop_executor_role") == "t"
    assert observer.execute(EXISTS).fetchone() == (0,)
    assert last_line(client.call("drop_executor_role")) == "f"


def test_a_role_that_cannot_be_dropped_gives_a_notice_and_false(
    proxy: Proxy, scratch: str, conn: Connection, newcomer: str
) -> None:
    conn.execute("SELECT pg_background_grant_privileges(%s)", [newcomer])
    done = psql(
        proxy.port, "-tA", "-c", "SELECT pg_background_drop_executor_role()",
        dbname=scratch, user=newcomer,
    )  # fmt: skip
    assert done.stdout == "f\n"
    assert f"Error dropping role {EXECUTOR}: permission denied" in done.stderr
    assert conn.execute(EXISTS).fetchone() == (1,)


def test_times_above_their_caps_are_taken_as_the_caps(client: Client) -> None:
    handle = client.launch("SELECT 1")
    assert client.call("wait", handle.sql, 2**31 - 1) == "t"
    assert client.call("wait_v2_timeout", handle.sql, 2**31 - 1) == "t"
    assert client.call("cancel", handle.sql, 2**31 - 1) in ("", None)
