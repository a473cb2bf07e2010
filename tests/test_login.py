"""Every way to log in, with TLS or without on each side, for the session and for its jobs.

Invariant: the server decides who gets in. So each way is tried with the right password and with a
wrong one, and it is the server's own error that comes.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from protocol import messages as m
from protocol.startup import StartupMessage
from tests.conftest import StartProxy
from tests.support.certificates import Certificates
from tests.support.executors import executors
from tests.support.servers import PASSWORDS, Connection, Proxy, Server, psql
from tests.test_tls import raw, rest, tls_options

PASSWORD = PASSWORDS["pw_scram"]
JOB = (
    "SELECT * FROM pg_background_result("
    "pg_background_launch('SELECT current_user::text')) AS (u text)"
)

HBA = [
    "local all postgres trust",
    "host all postgres 127.0.0.1/32 trust",
    *(
        f"host all {role} 127.0.0.1/32 {method}"
        for role, method in (
            ("pw_plain", "password"),
            ("pw_md5", "md5"),
            ("pw_scram", "scram-sha-256"),
        )
    ),
    "host all lookup 127.0.0.1/32 scram-sha-256",
]
TLS_HBA = [*HBA, "hostssl all alice 127.0.0.1/32 cert"]


@pytest.fixture(scope="module", autouse=True)
def roles(server: Server) -> Iterator[None]:
    """Those of the tests may call the functions; ``lookup`` may read the secrets."""
    yield from _with_roles(server, HBA)


@pytest.fixture(scope="module")
def tls_roles(tls_server: Server) -> Iterator[Server]:
    for _ in _with_roles(tls_server, TLS_HBA):
        yield tls_server


def _with_roles(server: Server, hba: list[str]) -> Iterator[None]:
    with server.connect() as conn:
        conn.execute("SET password_encryption = 'scram-sha-256'")
        conn.execute("CREATE ROLE lookup LOGIN SUPERUSER PASSWORD 'lookup pass'")
        with executors(conn, *PASSWORDS, "alice"):
            server.set_hba(hba)
            yield
            server.set_hba(None)
        conn.execute("DROP ROLE lookup")


def secret_of(server: Server, role: str) -> str:
    with server.connect() as conn:
        row = conn.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [role])
        secret: str = row.fetchall()[0][0]
        return secret


def auth_file(tmp_path: Path, **secrets: str) -> str:
    path = tmp_path / "userlist.txt"
    path.touch(mode=0o600)
    path.write_text("".join(f'"{role}" "{secret}"\n' for role, secret in secrets.items()))
    return str(path)


def upstream(server: Server, **params: str) -> str:
    given = {"host": server.host, "port": str(server.port), **params}
    return " ".join(f"{key}={value}" for key, value in given.items())


def job_role(conn: Connection) -> str:
    """The role that a job of this session runs as."""
    role: str = conn.execute(JOB).fetchall()[0][0]
    return role


# SCRAM: TLS or not, on both sides

ScramProxy = Callable[..., Proxy]


@pytest.fixture
def scram_proxy(start_proxy: StartProxy, certificates: Certificates) -> ScramProxy:
    """Starts a proxy; `client`, `upstream_mode`: the sslmode of its clients, and its own."""

    def start(
        server: Server, *options: str, client: str = "require", upstream_mode: str = "require"
    ) -> Proxy:
        tls = tls_options(certificates, "allow") if client == "require" else []
        return start_proxy(*tls, *options, upstream=upstream(server, sslmode=upstream_mode))

    return start


@pytest.mark.parametrize("client", ["disable", "require"])
def test_scram_passes_through_to_a_server_without_tls(
    server: Server, scram_proxy: ScramProxy, tmp_path: Path, client: str
) -> None:
    file = auth_file(tmp_path, pw_scram=secret_of(server, "pw_scram"))
    proxy = scram_proxy(server, "--auth-file", file, client=client, upstream_mode="disable")
    _check_scram(proxy, client)


@pytest.mark.parametrize("client", ["disable", "require"])
def test_scram_to_a_server_with_tls(
    tls_roles: Server, scram_proxy: ScramProxy, tmp_path: Path, client: str
) -> None:
    file = auth_file(tmp_path, pw_scram=secret_of(tls_roles, "pw_scram"))
    proxy = scram_proxy(tls_roles, "--auth-file", file, "--log-level", "debug", client=client)
    _check_scram(proxy, client)
    assert secret_of(tls_roles, "pw_scram") not in proxy.log
    assert PASSWORD not in proxy.log


def _check_scram(proxy: Proxy, sslmode: str) -> None:
    login: dict[str, Any] = {"user": "pw_scram", "password": PASSWORD, "sslmode": sslmode}
    with proxy.connect(**login) as conn:
        assert conn.pgconn.used_password
        assert job_role(conn) == "pw_scram"
    for wrong in ("wrong", PASSWORD + " "):
        with pytest.raises(psycopg.OperationalError) as caught:
            proxy.connect(**{**login, "password": wrong})
        assert 'FATAL:  password authentication failed for user "pw_scram"' in str(caught.value)
    # A binding is not offered; so a client that insists on it is told by its own library.
    if sslmode == "require":
        with pytest.raises(psycopg.OperationalError, match="channel binding"):
            proxy.connect(**login, channel_binding="require")
    assert psql(proxy.port, "-Atc", "SELECT current_user", **login).stdout == "pw_scram\n"


async def test_a_client_that_cannot_bind_passes_through(
    tls_roles: Server, scram_proxy: ScramProxy
) -> None:
    """TLS on both sides, nothing known of the role: asyncpg does not know of channel binding."""
    proxy = scram_proxy(tls_roles)
    conn = await asyncpg.connect(
        host=proxy.host,
        port=proxy.port,
        user="pw_scram",
        password=PASSWORD,
        database="postgres",
        ssl="require",
        timeout=10,
    )
    assert await conn.fetchval("SELECT current_user") == "pw_scram"
    await conn.close()
    login: dict[str, Any] = {"user": "pw_scram", "password": PASSWORD, "sslmode": "require"}
    with proxy.connect(**login, channel_binding="disable") as direct:
        assert direct.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match="channel binding negotiation") as caught:
        proxy.connect(**login)
    assert "channel_binding=disable in the client" in str(caught.value)


def test_scram_with_the_password_known(
    tls_roles: Server, scram_proxy: ScramProxy, tmp_path: Path
) -> None:
    """TLS on both sides; the auth_file has the password itself. It lets in who knows it too."""
    file = auth_file(tmp_path, pw_scram=PASSWORD)
    proxy = scram_proxy(tls_roles, "--auth-file", file)
    _check_scram(proxy, "require")


def test_an_old_secret_lets_nobody_in(
    tls_roles: Server, scram_proxy: ScramProxy, tmp_path: Path
) -> None:
    """The auth_file is right about the client, and the server no longer agrees."""
    with tls_roles.connect() as conn:
        conn.execute("SET password_encryption = 'scram-sha-256'")
        conn.execute("CREATE ROLE moved LOGIN PASSWORD 'old'")
        old = secret_of(tls_roles, "moved")
        conn.execute("ALTER ROLE moved PASSWORD 'new'")
    tls_roles.set_hba([*TLS_HBA, "host all moved 127.0.0.1/32 scram-sha-256"])
    try:
        proxy = scram_proxy(tls_roles, "--auth-file", auth_file(tmp_path, moved=old))
        for password in ("old", "new"):
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                proxy.connect(user="moved", password=password, sslmode="require")
    finally:
        tls_roles.set_hba(TLS_HBA)
        with tls_roles.connect() as conn:
            conn.execute("DROP ROLE moved")


# auth_query


@pytest.fixture
def lookup_file(tmp_path: Path) -> str:
    return auth_file(tmp_path, lookup="lookup pass")


@pytest.mark.parametrize("role", ["pw_md5", "pw_scram"])
def test_auth_query_finds_what_side_backends_log_in_with(
    start_proxy: StartProxy, lookup_file: str, role: str
) -> None:
    proxy = start_proxy(
        *("--auth-user", "lookup", "--auth-file", lookup_file, "--log-level", "debug")
    )
    with proxy.connect(user=role, password=PASSWORDS[role]) as conn:
        assert job_role(conn) == role
        # However the session's search_path is set: the query is run elsewhere, and is qualified.
        conn.execute("SET search_path = pg_temp")
        assert job_role(conn) == role
    for secret in ("lookup pass", PASSWORDS[role], "SCRAM-SHA-256$"):
        assert secret not in proxy.log


def test_auth_query_makes_scram_by_tls_on_both_sides_work(
    tls_roles: Server, scram_proxy: ScramProxy, lookup_file: str
) -> None:
    proxy = scram_proxy(
        tls_roles, "--auth-user", "lookup", "--auth-file", lookup_file, "--auth-dbname", "template1"
    )
    _check_scram(proxy, "require")


def test_auth_query_of_ones_own(server: Server, start_proxy: StartProxy, lookup_file: str) -> None:
    secret = secret_of(server, "pw_md5")
    query = f"SELECT $1::text, CASE $1 WHEN 'pw_md5' THEN '{secret}' END"
    proxy = start_proxy(
        *("--auth-user", "lookup", "--auth-file", lookup_file, "--auth-query", query),
        *("--auth-dbname", "postgres"),
    )
    with proxy.connect(user="pw_md5", password=PASSWORDS["pw_md5"]) as conn:
        assert job_role(conn) == "pw_md5"
    with (
        proxy.connect(user="pw_scram", password=PASSWORD) as conn,
        pytest.raises(psycopg.Error, match='no password for role "pw_scram"') as caught,
    ):
        job_role(conn)
    assert "auth_query: nothing for this role" in str(caught.value.diag.message_detail)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT nonsense", 'column "nonsense" does not exist'),
        ("SELECT $1::text", "it must return two columns"),
        ("SELECT $1::text, 'SCRAM-SHA-256$1'", "malformed SCRAM-SHA-256 secret"),
    ],
)
def test_an_auth_query_that_fails_is_logged(
    start_proxy: StartProxy, lookup_file: str, query: str, reason: str
) -> None:
    proxy = start_proxy(
        *("--auth-user", "lookup", "--auth-file", lookup_file, "--auth-query", query),
        *("--auth-dbname", "postgres"),
    )
    with (
        proxy.connect(user="pw_md5", password=PASSWORDS["pw_md5"]) as conn,
        pytest.raises(psycopg.Error, match="no password for role"),
    ):
        job_role(conn)
    proxy.wait_for_log(f'auth_query for role "pw_md5" failed: .*{re.escape(reason)}')


@pytest.fixture
def hostile(server: Server) -> Iterator[Connection]:
    """A database of mallory's, in which every name that he may make up is his; a superuser's
    session in it."""
    with server.connect() as conn:
        conn.execute("CREATE ROLE mallory LOGIN")
        conn.execute("CREATE DATABASE hostile OWNER mallory")
    with server.connect(dbname="hostile", options="-c search_path=pg_catalog") as conn:
        conn.execute("GRANT CREATE ON SCHEMA public TO mallory")
        conn.execute("SET ROLE mallory")
        conn.execute("CREATE SCHEMA mallory")
        for schema in ("public", "mallory"):
            conn.execute(
                f"CREATE FUNCTION {schema}.user_lookup(u text, OUT name text, OUT secret text)"
                " LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'ALTER ROLE mallory SUPERUSER'; END $$"
            )
        for name in ("pg_authid", "pg_roles"):
            conn.execute(f"CREATE TABLE mallory.{name} (rolname name, rolpassword text)")
        conn.execute("ALTER DATABASE hostile SET search_path = mallory, public, pg_catalog")
        conn.execute("RESET ROLE")
        yield conn
    with server.connect() as conn:
        conn.execute("DROP DATABASE hostile WITH (FORCE)")
        conn.execute("DROP ROLE mallory")


def _is_superuser(conn: Connection, role: str) -> bool:
    found = conn.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role])
    return bool(found.fetchall()[0][0])


def _look_up(proxy: Proxy, dbname: str) -> None:
    """Have the proxy look a role up, from a session in a database of one's own."""
    with (
        proxy.connect(user="pw_scram", password=PASSWORD, dbname=dbname) as conn,
        contextlib.suppress(psycopg.Error),
    ):
        job_role(conn)


OWN_QUERY = "SELECT * FROM user_lookup($1)"
"""PgBouncer's usual one."""


def test_an_auth_query_never_runs_in_a_database_that_a_client_names(
    start_proxy: StartProxy, lookup_file: str, hostile: Connection
) -> None:
    """auth_user is a superuser: mallory's function must not run as it."""
    message = ""
    try:
        proxy = start_proxy(
            *("--auth-user", "lookup", "--auth-file", lookup_file, "--auth-query", OWN_QUERY)
        )
    except TimeoutError as error:
        message = str(error)
    else:
        _look_up(proxy, "hostile")
    assert not _is_superuser(hostile, "mallory")
    assert "auth_query: a query of your own needs auth_dbname" in message


@pytest.mark.parametrize("query", [None, OWN_QUERY])
def test_an_auth_query_is_not_turned_by_settings_of_its_database(
    start_proxy: StartProxy, lookup_file: str, hostile: Connection, query: str | None
) -> None:
    """ALTER DATABASE SET search_path is for the database's owner; a startup packet wins over it."""
    given = [] if query is None else ["--auth-query", query]
    proxy = start_proxy(
        *("--auth-user", "lookup", "--auth-file", lookup_file, "--auth-dbname", "hostile", *given)
    )
    _look_up(proxy, "postgres")
    assert not _is_superuser(hostile, "mallory")
    if query is None:
        with proxy.connect(user="pw_scram", password=PASSWORD) as conn:
            assert job_role(conn) == "pw_scram"
    else:
        proxy.wait_for_log("function user_lookup.* does not exist")


def _knock_at(proxy: Proxy, user: str) -> None:
    """As somebody who knows no password; the proxy looks the role up."""
    with pytest.raises(psycopg.OperationalError):
        proxy.connect(user=user, password="x", sslmode="require")


def test_a_roles_name_does_nothing_to_who_reads_the_log(
    server: Server, start_proxy: StartProxy, lookup_file: str
) -> None:
    name = "e\x1b]0;owned\x07\x1b[2J\x7f\u009b31m\r\nx"
    quoted = '"' + name + '"'
    with server.connect() as conn:
        conn.execute("SET password_encryption = md5")
        conn.execute(f"CREATE ROLE {quoted} LOGIN PASSWORD 'x' IN ROLE pgbackground_role")
    server.set_hba([*HBA, "host all all 127.0.0.1/32 md5"])
    try:
        proxy = start_proxy(
            *("--auth-user", "lookup", "--auth-file", lookup_file, "--auth-dbname", "postgres"),
            *("--auth-query", "SELECT nonsense", "--log-level", "debug"),
        )
        with (
            proxy.connect(user=name, password="x") as conn,
            pytest.raises(psycopg.Error, match="no password for role"),
        ):
            job_role(conn)
        proxy.wait_for_log(r'auth_query for role "e\\x1b\]0;owned\\x07\\x1b\[2J\\x7f\\x9b31m\\r')
        assert all(
            ord(character) > 31 for character in proxy.log.replace("\n\t", "").replace("\n", "")
        )
    finally:
        server.set_hba(HBA)
        with server.connect() as conn:
            conn.execute(f"DROP ROLE {quoted}")


def test_strangers_cannot_make_the_proxy_log_in_without_end(
    tls_roles: Server, scram_proxy: ScramProxy, lookup_file: str
) -> None:
    """Lookups log in as auth_user. Those for one address are limited, and the log says so."""
    with tls_roles.connect() as conn:
        conn.execute("ALTER SYSTEM SET log_connections = on")
    tls_roles.set_hba([*TLS_HBA, "host all all 127.0.0.1/32 scram-sha-256"])
    try:
        proxy = scram_proxy(
            tls_roles, "--auth-user", "lookup", "--auth-file", lookup_file, "--workers", "1"
        )
        before = tls_roles.cluster.log_size()
        with ThreadPoolExecutor(25) as pool:
            list(pool.map(lambda n: _knock_at(proxy, f"nobody_{n}"), range(75)))
        lookups = tls_roles.log(before).count("connection authorized: user=lookup")
        assert 20 <= lookups < 75
        assert proxy.log.count("too many logins from 127.0.0.1 want auth_query") == 1
    finally:
        with tls_roles.connect() as conn:
            conn.execute("ALTER SYSTEM RESET log_connections")
        tls_roles.set_hba(TLS_HBA)


def test_an_auth_user_that_is_not_let_in_is_logged(start_proxy: StartProxy, tmp_path: Path) -> None:
    file = auth_file(tmp_path, lookup="wrong")
    proxy = start_proxy("--auth-user", "lookup", "--auth-file", file)
    with (
        proxy.connect(user="pw_md5", password=PASSWORDS["pw_md5"]) as conn,
        pytest.raises(psycopg.Error, match="no password for role"),
    ):
        job_role(conn)
    proxy.wait_for_log('failed: password authentication failed for user "lookup"')


# auth_type = plain


@pytest.mark.parametrize("role", sorted(PASSWORDS))
def test_the_proxy_asks_for_the_password(start_proxy: StartProxy, role: str) -> None:
    proxy = start_proxy("--auth-type", "plain", "--log-level", "debug")
    login: dict[str, Any] = {"user": role, "password": PASSWORDS[role]}
    with proxy.connect(**login) as conn:
        assert conn.execute("SELECT current_user").fetchone() == (role,)
        assert job_role(conn) == role
    with pytest.raises(psycopg.OperationalError) as caught:
        proxy.connect(user=role, password="wrong pass")
    assert f'FATAL:  password authentication failed for user "{role}"' in str(caught.value)
    assert PASSWORDS[role] not in proxy.log
    assert "wrong pass" not in proxy.log


def test_the_proxy_asks_only_if_the_server_does(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--auth-type", "plain")
    with proxy.connect() as conn:
        assert not conn.pgconn.used_password
    with pytest.raises(psycopg.OperationalError, match="no pg_hba.conf entry"):
        proxy.connect(user="nobody_at_all")


def test_the_proxy_asks_over_tls_and_logs_in_over_tls(
    tls_roles: Server, scram_proxy: ScramProxy
) -> None:
    proxy = scram_proxy(tls_roles, "--auth-type", "plain")
    _check_scram(proxy, "require")


def test_a_client_that_does_not_answer_is_ended_by_the_server(
    server: Server, start_proxy: StartProxy
) -> None:
    """The server's patience counts, also while the proxy asks."""
    with server.connect() as conn:
        conn.execute("ALTER SYSTEM SET authentication_timeout = '1s'")
    server.cluster.reload()
    try:
        proxy = start_proxy("--auth-type", "plain")
        done = psql(proxy.port, "-c", "SELECT 1", user="pw_scram", passfile="/dev/null")
        assert "no password supplied" in done.stderr

        startup = StartupMessage({b"user": b"pw_scram", b"database": b"postgres"})
        with raw(proxy, startup.serialize()) as connection:
            # PostgreSQL tells this its log alone.
            assert rest(connection) == m.AuthenticationCleartextPassword().serialize()
    finally:
        with server.connect() as conn:
            conn.execute("ALTER SYSTEM RESET authentication_timeout")
        server.cluster.reload()


# Certificates


def test_a_login_by_the_proxys_certificate(
    tls_roles: Server, start_proxy: StartProxy, certificates: Certificates
) -> None:
    """cert: the server sees the proxy's, which is one role's; its jobs have it too."""
    given = {"sslcert": str(certificates.alice.cert), "sslkey": str(certificates.alice.key)}
    proxy = start_proxy(upstream=upstream(tls_roles, sslmode="require", **given))
    with proxy.connect(user="alice") as conn:
        assert job_role(conn) == "alice"
    without = start_proxy(upstream=upstream(tls_roles, sslmode="require"))
    with pytest.raises(psycopg.OperationalError, match="requires a valid client certificate"):
        without.connect(user="alice")


# What comes before and beside the login


def test_what_is_sent_ahead_of_the_login_is_served_after_it(proxy: Proxy) -> None:

    startup = StartupMessage({b"user": b"postgres", b"database": b"postgres"})
    query = m.Query(b"SELECT 'ahead'").serialize()
    with raw(proxy, startup.serialize(), query, m.Terminate().serialize()) as connection:
        received = rest(connection)
    assert b"ahead" in received


@pytest.mark.parametrize("role", ["postgres", "pw_scram"])
def test_a_client_that_sends_no_more_gets_its_answers(proxy: Proxy, role: str) -> None:
    """As far as it can come without an answer of its own."""
    startup = StartupMessage({b"user": role.encode(), b"database": b"postgres"})
    query = m.Query(b"SELECT 'ahead'").serialize()
    with raw(proxy, startup.serialize(), query if role == "postgres" else b"") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert (b"ahead" in rest(connection)) == (role == "postgres")


def test_something_else_than_a_password_is_refused(proxy: Proxy) -> None:

    startup = StartupMessage({b"user": b"pw_scram", b"database": b"postgres"})
    with raw(proxy, startup.serialize(), m.Query(b"SELECT 1").serialize()) as connection:
        assert b"expected password response, got message type 81" in rest(connection)
    with raw(proxy, startup.serialize(), b"p\x7f\xff\xff\xff" + b"x" * 100_000) as connection:
        assert b"invalid message length" in rest(connection)
