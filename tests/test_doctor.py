"""``pg-background-proxy check``: one line for each thing, and for each that is wrong what to do."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import upstream_of
from tests.support.certificates import Certificates
from tests.support.executors import executors
from tests.support.servers import (
    METHODS,
    PASSWORDS,
    Connection,
    Proxy,
    Server,
    run_program,
)

pytestmark = pytest.mark.every_server

LINE = re.compile(r"(ok|note|no) +(\w+): (.+\.)")
ORDER = [
    *("configuration", "server", "replicas", "session", "extension"),
    *("connections", "jobs", "launch"),
]


@dataclass(frozen=True)
class Findings:
    """The exit code; and of each line its mark and its text, by what it is about."""

    code: int
    marks: dict[str, str]
    texts: dict[str, str]

    @property
    def wrong(self) -> list[str]:
        """What is not well."""
        return [what for what, mark in self.marks.items() if mark == "no"]


def check(server: Server, *options: str, **env: str) -> Findings:
    done = checked(server, *options, **env)
    lines = done.stdout.splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), done.stdout
    marks = {match[2]: match[1] for match in found if match}
    texts = {match[2]: match[3] for match in found if match}
    assert [what for what in ORDER if what in marks] == list(marks)
    assert done.stderr == ""
    assert done.returncode == ("no" in marks.values())
    return Findings(done.returncode, marks, texts)


def checked(server: Server, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_program("check", "--upstream", upstream_of(server), *options, env=env)


@pytest.fixture
def granted(server: Server) -> Iterator[None]:
    """All roles may launch jobs."""
    with server.connect() as conn, executors(conn, "alice", *PASSWORDS):
        yield


@pytest.fixture
def admin(server: Server, db: str) -> Iterator[Connection]:
    """A superuser's session, past the proxy, in a database of the test's own."""
    with server.connect(dbname=db) as conn:
        yield conn


def test_all_is_well(server: Server, proxy: Proxy, db: str) -> None:
    with proxy.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
    found = check(server, "--role", "postgres", "--database", db)
    assert found.marks == {what: "ok" for what in ORDER if what != "replicas"}
    assert found.code == 0
    assert f"127.0.0.1:{server.port} answers" in found.texts["server"]
    assert f'lets in role "postgres", database "{db}"' in found.texts["session"]
    assert "one has run" in found.texts["launch"]


def test_whether_replicas_can_be_asked(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "replicas"
    file.touch(mode=0o600)
    file.write_text("x" * 32)
    options = ["--replica-secret-file", str(file), "--auth-user", "alice", "--auth-query="]
    found = check(server, *options, "--role", "postgres")
    assert found.marks["replicas"] == "ok"
    assert 'by "alice" in database "postgres"' in found.texts["replicas"]
    found = check(server, *options, "--auth-dbname", "no_such_one", "--role", "postgres")
    assert (found.code, found.marks["replicas"]) == (1, "no")
    assert 'database "no_such_one" does not exist.' in found.texts["replicas"]
    assert "password of auth_user" in found.texts["replicas"]


def test_nothing_is_left_behind(server: Server, db: str) -> None:
    start = server.cluster.log_size()
    check(server, "--role", "postgres", "--database", db)
    assert server.wait_for_no_clients() == []
    assert "ERROR" not in server.log(start)


def test_role_and_database_are_libpqs_by_default(server: Server) -> None:
    found = check(server, PGUSER="alice", PGDATABASE="template1")
    assert 'role "alice", database "template1"' in found.texts["session"]
    assert "nothing" in found.texts["jobs"]


@pytest.mark.usefixtures("granted")
@pytest.mark.parametrize("role", PASSWORDS)
def test_what_the_server_asks_for_and_what_jobs_log_in_with(
    server: Server, tmp_path: Path, role: str
) -> None:
    asked = {"password": "a cleartext password", "md5": "an MD5 password"}
    words = asked.get(METHODS[role], "SCRAM-SHA-256")
    options = ["--role", role, "--database", "postgres"]
    found = check(server, *options, PGPASSWORD=PASSWORDS[role])
    assert f"the server asks for {words}" in found.texts["session"]
    if role == "pw_plain":
        assert found.wrong == []
        assert "log in with the client's own password" in found.texts["jobs"]
    else:
        assert found.wrong == ["jobs"]
        assert found.marks["launch"] == "ok"
        assert "auth_file: not set" in found.texts["jobs"]
        assert "Give the proxy the role's password" in found.texts["jobs"]

    passfile = tmp_path / "passfile"
    passfile.touch(mode=0o600)
    passfile.write_text(f"*:*:*:{role}:{PASSWORDS[role]}\n")
    found = check(server, *options, "--passfile", str(passfile))  # the client's password, too
    assert found.wrong == []
    source = "the client's own password" if role == "pw_plain" else "its line in the passfile"
    assert f"asks them for {words}, and they log in with {source}" in found.texts["jobs"]

    with server.connect() as conn:
        [secret] = conn.execute(
            "SELECT rolpassword FROM pg_authid WHERE rolname = %s", [role]
        ).fetchone() or [""]
    users = tmp_path / "users"
    users.touch(mode=0o600)
    users.write_text(f'"{role}" "{secret}"\n')
    found = check(server, *options, "--auth-file", str(users), PGPASSWORD=PASSWORDS[role])
    assert found.wrong == []
    assert "auth_file" in found.texts["jobs"] or role == "pw_plain"

    found = check(server, *options, "--auth-user", "postgres", PGPASSWORD=PASSWORDS[role])
    assert found.wrong == []
    assert "auth_query" in found.texts["jobs"] or role == "pw_plain"

    found = check(server, *options, "--auth-type", "plain", PGPASSWORD=PASSWORDS[role])
    assert found.wrong == []
    assert "the proxy asks (auth_type = plain)" in found.texts["session"]
    assert (
        f"the server asks them for {words}, and they log in with the client's own password"
        in (found.texts["jobs"])
    )


def test_tls_to_the_server(tls_server: Server, certificates: Certificates) -> None:
    upstream = (
        f"host=localhost hostaddr=127.0.0.1 port={tls_server.port} sslmode=verify-full"
        f" sslrootcert={certificates.ca}"
    )
    found = check(tls_server, "--upstream", upstream, "--role", "postgres")
    assert found.wrong == []
    assert "with TLS" in found.texts["server"]
    wrong = upstream.replace(str(certificates.ca), str(certificates.stranger.cert))
    found = check(tls_server, "--upstream", wrong, "--role", "postgres")
    assert found.wrong == ["server"]
    assert "certificate" in found.texts["server"]


@pytest.mark.parametrize("role", PASSWORDS)
def test_a_wrong_password_and_none(server: Server, role: str) -> None:
    options = ["--role", role, "--database", "postgres"]
    found = check(server, *options, PGPASSWORD="not it")
    assert found.wrong == ["session"]
    assert "password authentication failed" in found.texts["session"]
    assert "PGPASSWORD" in found.texts["session"]
    found = check(server, *options)
    assert found.wrong == ["session"]
    assert "there is no password" in found.texts["session"]
    assert "Set PGPASSWORD" in found.texts["session"]


@pytest.mark.parametrize(
    ("options", "words", "todo"),
    [
        (["--role", "nobody"], 'role "nobody" does not exist', "pg_hba.conf"),
        (["--database", "nope"], 'database "nope" does not exist', "--database"),
    ],
)
def test_a_session_that_is_refused(
    server: Server, options: list[str], words: str, todo: str
) -> None:
    found = check(server, "--role", "postgres", "--database", "postgres", *options)
    assert found.wrong == ["session"]
    assert words in found.texts["session"]
    assert todo in found.texts["session"]
    assert list(found.marks) == ["configuration", "server", "session"]


def test_no_line_in_pg_hba(server: Server) -> None:
    server.set_hba(["local all all trust", "host all postgres 127.0.0.1/32 trust"])
    try:
        found = check(server, "--role", "alice", "--database", "postgres")
    finally:
        server.set_hba()
    assert found.wrong == ["session"]
    assert "no pg_hba.conf entry" in found.texts["session"]
    assert "Let pg_hba.conf have a line" in found.texts["session"]


def test_no_server(server: Server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        found = check(server, "--upstream", f"host=127.0.0.1 port={port}")
    assert found.wrong == ["server"]
    assert f"127.0.0.1:{port}" in found.texts["server"]
    assert "Start it, or correct upstream" in found.texts["server"]
    assert list(found.marks) == ORDER[:2]


def test_a_server_that_says_nothing(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"host=127.0.0.1 port={silent.getsockname()[1]} connect_timeout=1"
        found = check(server, "--upstream", upstream)
    assert found.wrong == ["server"]
    assert "timed out" in found.texts["server"]


def test_a_role_that_may_not_launch_and_what_to_do(
    server: Server, proxy: Proxy, admin: Connection, db: str
) -> None:
    options = ["--role", "alice", "--database", db]
    found = check(server, *options)
    assert found.wrong == ["launch"]
    [todo] = re.findall(r"run (SELECT .*?\)) in", found.texts["launch"])
    with proxy.connect(dbname=db) as conn:
        conn.execute(todo)
        assert check(server, *options).wrong == []
        conn.execute("SELECT revoke_pg_background_privileges('alice')")
        conn.execute("DROP ROLE pgbackground_role")
        conn.execute("CREATE EXTENSION pg_background SCHEMA public")
        assert check(server, *options).wrong == ["launch"]
        conn.execute(todo)
        assert check(server, *options).wrong == []
        conn.execute("DROP EXTENSION pg_background")
        conn.execute("DROP ROLE IF EXISTS pgbackground_role")


@pytest.mark.parametrize("version", ["1.8", "2.0"])
@pytest.mark.parametrize("schema", ["public", 'Odd "schema"'])
def test_the_extension_is_there_and_current_or_not(
    server: Server, proxy: Proxy, admin: Connection, db: str, version: str, schema: str
) -> None:
    quoted = f'"{schema.replace(chr(34), chr(34) * 2)}"'
    options = ["--role", "postgres", "--database", db]
    found = check(server, *options)
    assert (found.marks["extension"], found.code) == ("note", 0)
    assert "CREATE EXTENSION pg_background through the proxy" in found.texts["extension"]
    admin.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted}".encode())
    with proxy.connect(dbname=db) as conn:
        conn.execute(f"CREATE EXTENSION pg_background SCHEMA {quoted} VERSION '{version}'".encode())
        found = check(server, *options)
        assert set(found.marks.values()) == {"ok"}, found
        assert f"version {version} in schema" in found.texts["extension"]
        admin.execute(
            "UPDATE pg_proc SET prosrc = prosrc || ' -- of old'"
            " WHERE proname IN ('_pg_background_ask', 'pg_background_wait_any')"
        )
        found = check(server, *options)
        assert found.wrong == ["extension"]
        assert re.search(r"has 2 functions that another version", found.texts["extension"])
        [todo] = re.findall(r"Run (ALTER .*?) through", found.texts["extension"])
        conn.execute(todo)
        assert check(server, *options).wrong == []


def test_the_c_extension_is_there(server: Server, admin: Connection, db: str) -> None:
    """What the server says where it has installed it: a row of pg_extension."""
    options = ["--role", "postgres", "--database", db]
    found = check(server, *options, "--extension", "server")
    assert found.wrong == ["extension"]
    assert "is not installed" in found.texts["extension"]
    columns = "extname, extowner, extnamespace, extrelocatable, extversion"
    row = "'pg_background', 10, 2200, true, '1.8'"
    if server.version >= 120000:
        columns, row = f"oid, {columns}", f"99999, {row}"
    admin.execute(f"INSERT INTO pg_extension ({columns}) VALUES ({row})".encode())
    found = check(server, *options)
    assert found.wrong == ["extension"]
    assert 'Set extension = "server"' in found.texts["extension"]
    found = check(server, *options, "--extension", "server")
    assert found.wrong == []
    assert "no part in that" in found.texts["jobs"]


@pytest.fixture
def small(server: Server) -> Iterator[Server]:
    """A server with six connections, of which one is reserved."""
    small = Server(server.bin)
    try:
        with small.connect() as conn:
            conn.execute("ALTER SYSTEM SET max_connections = 6")
            conn.execute("ALTER SYSTEM SET superuser_reserved_connections = 1")
            conn.execute("ALTER SYSTEM SET max_wal_senders = 0")
            conn.execute("CREATE ROLE pgbackground_role NOLOGIN; GRANT pgbackground_role TO alice")
        small.restart()
        yield small
    finally:
        small.close()


def test_how_many_connections_are_left(small: Server) -> None:
    options = ["--role", "alice", "--database", "postgres"]
    conns: list[Any] = []

    def more() -> Findings:
        conns.append(small.connect(user="alice"))
        return check(small, *options)

    found = check(small, *options)
    assert (found.marks["connections"], found.code) == ("note", 0)
    assert "4 are left" in found.texts["connections"]
    assert "16 jobs at a time" in found.texts["connections"]
    assert check(small, *options, "--max-workers", "4").marks["connections"] == "ok"
    try:
        assert "3 are left" in more().texts["connections"]
        assert "2 are left" in more().texts["connections"]
        assert "1 are left" in more().texts["connections"]
        found = more()
        assert found.wrong == ["connections"]
        assert "none is left for a job" in found.texts["connections"]
        assert "Raise max_connections" in found.texts["connections"]
        found = more()
        assert found.wrong == ["session"]
        assert "Raise max_connections" in found.texts["session"]
        with pytest.raises(psycopg.OperationalError):
            small.connect(user="alice")
    finally:
        for conn in conns:
            conn.close()


@pytest.mark.usefixtures("granted")
def test_limits_of_a_role_and_of_a_database(server: Server, admin: Connection, db: str) -> None:
    options = ["--role", "alice", "--database", db]
    for limited in ("ROLE alice", f"DATABASE {db}"):
        try:
            admin.execute(f"ALTER {limited} CONNECTION LIMIT 4".encode())
            found = check(server, *options)
            assert found.marks["connections"] == "note"
            kind = limited.partition(" ")[0].lower()
            # In the database there is the test's session, too.
            assert (
                f"{3 if kind == 'role' else 2} are left for this role (the {kind}'s"
                in (found.texts["connections"])
            )
            admin.execute(f"ALTER {limited} CONNECTION LIMIT {1 if kind == 'role' else 2}".encode())
            assert check(server, *options).wrong == ["connections"]
            admin.execute(f"ALTER {limited} CONNECTION LIMIT 0".encode())
            found = check(server, *options)
            assert found.wrong == ["session"]
            assert f"too many connections for {kind}" in found.texts["session"]
        finally:
            admin.execute(f"ALTER {limited} CONNECTION LIMIT -1".encode())


def test_all_that_is_wrong_with_a_configuration_is_said_at_once(
    server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('max_workers = 0\nlog_level = "loud"\npassfile = "none"\n')
    done = checked(server, "--config", str(file), "--spares", "many")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert all(line.startswith("no    configuration: ") for line in lines)
    for line, name in zip(lines, ("max_workers", "log_level", "passfile", "--spares"), strict=True):
        assert f"{name}: " in line
    for wrong, words in (
        ("max_worker = 1", 'unknown key "max_worker"'),
        ("max_workers = ", "Invalid value"),
        ('client_tls_sslmode = "require"', "needs client_tls_cert_file"),
    ):
        file.write_text(wrong)
        done = checked(server, "--config", str(file))
        [line] = done.stdout.splitlines()
        assert words in line
        assert done.returncode == 1


def test_a_file_that_is_not_used_is_wrong(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "passfile"
    file.write_text("*:*:*:alice:secret\n")
    file.chmod(0o644)
    done = checked(server, "--passfile", str(file), "--role", "postgres")
    assert done.returncode == 1
    assert done.stdout.startswith("no    configuration: ignoring ")
    assert "secret" not in done.stdout
    users = tmp_path / "users"
    users.touch(mode=0o600)
    users.write_text('"alice" "hushed')
    done = checked(server, "--auth-file", str(users), "--role", "postgres")
    assert done.returncode == 1
    assert re.match("no    configuration: auth_file: ", done.stdout)
    assert "hushed" not in done.stdout


def test_help_explains_each_line(server: Server) -> None:
    done = checked(server, "--help")
    assert done.returncode == 0
    for what in ORDER:
        assert re.search(rf"^  {what} +\w", done.stdout, re.MULTILINE)
    for word in ("--role", "--database", "PGPASSWORD", "Exit codes", "examples:", "--passfile"):
        assert word in done.stdout
