"""password_command: jobs log in with what a command prints, such as a token."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg import errors

from tests.conftest import StartProxy
from tests.support.background import failure, run, wait_until
from tests.support.executors import executors
from tests.support.servers import PASSWORDS, Connection, Proxy, Server

SCRIPT = """
import json, os, sys, time
folder, *arguments = sys.argv[1:]
with open(os.path.join(folder, "calls"), "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
exec(open(os.path.join(folder, "does")).read())
"""
LAUNCH = "SELECT pg_background_launch('SELECT 1')"
ODD = "od d '{host}'\\"


class Command:
    """A command whose calls are noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "command.py"
        self.script.write_text(SCRIPT)
        (folder / "calls").touch()

    def prints(self, password: str) -> None:
        self.does(f"sys.stdout.buffer.write({password.encode()!r} + b'\\n')")

    def does(self, code: str) -> None:
        (self.folder / "does").write_text(code)

    def options(self, *arguments: str) -> list[str]:
        program = [sys.executable, str(self.script), str(self.folder)]
        return ["--password-command", shlex.join([*program, *arguments]), "--spares", "0"]

    @property
    def calls(self) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def roles(server: Server) -> Iterator[Connection]:
    """The roles with passwords may launch jobs, and what a test does to one is undone."""
    with server.connect() as conn, executors(conn, *PASSWORDS):
        yield conn
        conn.execute(f"ALTER ROLE pw_plain PASSWORD '{PASSWORDS['pw_plain']}'")


def connect(proxy: Proxy, role: str, **params: Any) -> Connection:
    return proxy.connect(user=role, password=PASSWORDS[role], **params)


@pytest.mark.every_server
@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("role", PASSWORDS)
def test_jobs_log_in_with_what_it_prints_and_it_is_remembered(
    server: Server, start_proxy: StartProxy, command: Command, role: str
) -> None:
    command.prints(PASSWORDS[role])
    arguments = ["{user}", "--at={host}:{port}/{database}", "{other}", "a b"]
    proxy = start_proxy(*command.options(*arguments), "--log-level", "debug")
    with connect(proxy, role) as conn, connect(proxy, role) as other:
        for _ in range(3):
            assert run(conn, "SELECT 1", "n int") == [(1,)]
        assert run(other, "SELECT 2", "n int") == [(2,)]
    assert command.calls == [[role, f"--at=127.0.0.1:{server.port}/postgres", "{other}", "a b"]]
    assert proxy.stop() == 0
    assert PASSWORDS[role] not in proxy.log


@pytest.mark.usefixtures("roles")
def test_it_is_asked_again_when_its_time_is_over(start_proxy: StartProxy, command: Command) -> None:
    command.prints(PASSWORDS["pw_scram"])
    proxy = start_proxy(*command.options(), "--password-ttl", "0")
    with connect(proxy, "pw_scram") as conn:
        for count in (1, 2, 3):
            assert run(conn, "SELECT 1", "n int") == [(1,)]
            assert len(command.calls) == count
    proxy = start_proxy(*command.options(), "--password-ttl", "100ms")
    with connect(proxy, "pw_scram") as conn:
        assert wait_until(lambda: run(conn, "SELECT 1", "n int") and len(command.calls) >= 5)


def test_jobs_log_in_when_the_clients_token_has_run_out(
    roles: Connection, start_proxy: StartProxy, command: Command
) -> None:
    command.prints("second token")
    proxy = start_proxy(*command.options())
    without = start_proxy("--spares", "0")
    with connect(proxy, "pw_plain") as conn, connect(without, "pw_plain") as lost:
        roles.execute("ALTER ROLE pw_plain PASSWORD 'second token'")
        assert run(conn, "SELECT 1", "n int") == [(1,)]
        assert failure(lost, LAUNCH).sqlstate == "28P01"


@pytest.mark.usefixtures("roles")
def test_a_password_that_is_refused_is_not_remembered(
    start_proxy: StartProxy, command: Command
) -> None:
    proxy = start_proxy(*command.options())
    with connect(proxy, "pw_scram") as conn:
        command.prints("old one")
        assert failure(conn, LAUNCH).sqlstate == "28P01"
        command.prints(PASSWORDS["pw_scram"])
        assert run(conn, "SELECT 1", "n int") == [(1,)]
    assert len(command.calls) == 2


@pytest.mark.usefixtures("roles")
def test_launches_at_the_same_time_share_one(start_proxy: StartProxy, command: Command) -> None:
    command.does(f"time.sleep(1); print({PASSWORDS['pw_md5']!r})")
    proxy = start_proxy(*command.options())
    conns = [connect(proxy, "pw_md5") for _ in range(5)]
    for conn in conns:
        conn.pgconn.send_query(LAUNCH.encode())
    for conn in conns:
        result = conn.pgconn.get_result()
        assert result is not None
        assert result.status == psycopg.pq.ExecStatus.TUPLES_OK
        conn.close()
    assert len(command.calls) == 1


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize(
    ("does", "detail"),
    [
        ("sys.exit('no credentials found')", "it ended with exit code 1"),
        ("pass", "what it printed is not one line with a password"),
        ("print('two'); print('lines')", "what it printed is not one line with a password"),
        ("time.sleep(600)", "it took longer than 3 seconds"),
    ],
)
def test_a_command_that_fails(
    start_proxy: StartProxy, command: Command, does: str, detail: str
) -> None:
    command.does(does)
    proxy = start_proxy(*command.options(), "--connect-timeout", "3")
    with connect(proxy, "pw_scram") as conn:
        error = failure(conn, LAUNCH)
        assert (error.sqlstate, error.diag.message_primary) == (
            "28000",
            'no password for role "pw_scram" to start a background worker with',
        )
        assert error.diag.message_detail == f"password_command: {detail}."
        wait_until(lambda: not psutil.Process(proxy.pid).children())
        command.prints(PASSWORDS["pw_scram"])
        assert run(conn, "SELECT 1", "n int") == [(1,)]
    if "credentials" in does:
        assert "WARNING:  password_command: no credentials found" in proxy.log
    assert "two" not in proxy.log


@pytest.mark.usefixtures("roles")
def test_a_command_that_is_not_there(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--password-command", "/no/such/program {user}")
    with connect(proxy, "pw_scram") as conn, pytest.raises(errors.DatabaseError) as caught:
        conn.execute(LAUNCH)
    assert "No such file or directory" in (caught.value.diag.message_detail or "")


@pytest.mark.usefixtures("roles")
def test_a_name_is_one_argument_whatever_it_is(
    server: Server, start_proxy: StartProxy, command: Command
) -> None:
    command.prints("secret")
    quoted = '"' + ODD.replace('"', '""') + '"'
    proxy = start_proxy(*command.options("{user}", "x{database}y"))
    with server.connect() as conn:
        conn.execute(
            f"CREATE ROLE {quoted} LOGIN PASSWORD 'secret' IN ROLE pgbackground_role".encode()
        )
    server.set_hba([f"host all {quoted} 127.0.0.1/32 password", "host all all 127.0.0.1/32 trust"])
    try:
        with proxy.connect(user=ODD, password="secret") as conn:
            assert run(conn, "SELECT 1", "n int") == [(1,)]
    finally:
        server.set_hba()
        with server.connect() as conn:
            conn.execute(f"DROP ROLE {quoted}".encode())
    assert command.calls == [[ODD, "xpostgresy"]]


def test_it_is_not_asked_where_the_server_asks_for_nothing(
    start_proxy: StartProxy, command: Command
) -> None:
    command.prints("secret")
    proxy = start_proxy(*command.options())
    with proxy.connect() as conn:
        assert run(conn, "SELECT 1", "n int") == [(1,)]
    assert command.calls == []
