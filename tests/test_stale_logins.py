"""A spare is used only while a new login would come to the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import StartProxy, shared_proxy
from tests.support.background import (
    failure,
    launch,
    message,
    result,
    run,
    spares_of,
    value,
    wait_until,
    wait_until_ended,
)
from tests.support.executors import create_executor
from tests.support.in_database import one
from tests.support.servers import DEFAULT_HBA, PASSWORDS, Connection, Proxy, Server
from tests.support.upstream_relay import Connection as Login
from tests.support.upstream_relay import UpstreamRelay

pytestmark = pytest.mark.every_server

# Without reuse, which takes turns with spares as time will have it; test_reuse has its own.
OPTIONS = ("--spare-lifetime", "60s", "--spares", "2", "--reuse-lifetime", "0")


@pytest.fixture
def admin(server: Server) -> Iterator[Connection]:
    """A superuser's session past the proxy."""
    with server.connect() as conn:
        yield conn


@pytest.fixture
def stale(server: Server, start_proxy: StartProxy) -> Iterator[Proxy]:
    """A proxy whose spares wait for a minute; the roles that a test makes are dropped."""
    before = _roles(server)
    with server.connect() as conn:
        create_executor(conn)
    proxy = start_proxy(*OPTIONS)
    yield proxy
    proxy.stop()
    assert server.wait_for_no_clients() == []
    with server.connect() as conn:
        for role in _roles(server) - before:
            conn.execute(f'DROP OWNED BY "{role}"')
            conn.execute(f'DROP ROLE "{role}"')


def _roles(server: Server) -> set[str]:
    with server.connect() as conn:
        return {role for (role,) in conn.execute("SELECT rolname FROM pg_roles")}


def _warm(admin: Connection, conn: Connection) -> set[int]:
    """Have two spares for a session, of which one has replaced another; their pids."""
    run(conn, "SELECT 1")
    wait_until(lambda: len(spares_of(admin, conn)) == 2)
    before = spares_of(admin, conn)

    def is_one_replaced() -> bool:
        run(conn, "SELECT 1")  # which opens a backend of its own if no spare is ready yet
        return bool(spares_of(admin, conn) - before)

    wait_until(is_one_replaced)

    wait_until(lambda: len(spares_of(admin, conn)) == 2)
    return spares_of(admin, conn)


def test_a_demoted_superuser_gets_no_superusers_backend(stale: Proxy, admin: Connection) -> None:
    admin.execute("CREATE ROLE eve LOGIN SUPERUSER IN ROLE pgbackground_role")
    with stale.connect(user="eve") as conn:
        _warm(admin, conn)
    admin.execute("ALTER ROLE eve NOSUPERUSER")
    with stale.connect(user="eve") as conn:
        error = failure(
            conn,
            "SELECT * FROM pg_background_result(%s)",
            [launch(conn, "SET SESSION AUTHORIZATION postgres")],
        )
        assert error.sqlstate == "42501"
        assert value(conn, "SELECT rolsuper FROM pg_roles WHERE rolname = 'eve'") is False


def test_a_session_that_was_a_superusers_logs_in_as_what_it_is_now(
    stale: Proxy, admin: Connection
) -> None:
    admin.execute("CREATE ROLE eve LOGIN SUPERUSER IN ROLE pgbackground_role")
    with stale.connect(user="eve") as conn:
        _warm(admin, conn)
        admin.execute("ALTER ROLE eve NOSUPERUSER; GRANT pg_monitor TO eve")
        assert value(conn, "SHOW is_superuser") == "off"


def test_a_new_role_of_an_old_name_gets_nothing_of_it(stale: Proxy, admin: Connection) -> None:
    admin.execute("CREATE ROLE eve LOGIN SUPERUSER IN ROLE pgbackground_role")
    with stale.connect(user="eve") as conn:
        _warm(admin, conn)
    admin.execute("DROP ROLE eve; CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    oid = admin.execute("SELECT oid FROM pg_roles WHERE rolname = 'eve'").fetchone()
    with stale.connect(user="eve") as conn:
        assert run(conn, "SELECT oid FROM pg_roles WHERE rolname = session_user") == [oid]
        assert value(conn, "SHOW is_superuser") == "off"


LOCKED_OUT = {
    "nologin": ("ALTER ROLE eve NOLOGIN", "28000"),
    "connect": ('REVOKE CONNECT ON DATABASE "{db}" FROM PUBLIC', "42501"),
    "limit": ("ALTER ROLE eve CONNECTION LIMIT 0", "53300"),
    "renamed": ("ALTER ROLE eve RENAME TO adam", "28000"),
    "closed": ('ALTER DATABASE "{db}" ALLOW_CONNECTIONS false', "55000"),
    "full": ('ALTER DATABASE "{db}" CONNECTION LIMIT 0', "53300"),
}


@pytest.mark.parametrize("how", LOCKED_OUT)
def test_who_may_not_log_in_any_more_launches_no_more(
    stale: Proxy, admin: Connection, db: str, how: str
) -> None:
    command, _ = LOCKED_OUT[how]
    admin.execute("CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    with stale.connect(user="eve", dbname=db) as conn:
        before = _warm(admin, conn)
        admin.execute(command.format(db=db).encode())
        error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
        assert error.sqlstate in ("28000", "53300", "53000"), message(error)
        assert error.diag.message_detail
        for pid in before:
            wait_until_ended(admin, pid)
    admin.execute(f'ALTER DATABASE "{db}" ALLOW_CONNECTIONS true')


def test_one_whose_password_expires_while_spares_wait(stale: Proxy, admin: Connection) -> None:
    password = PASSWORDS["pw_plain"]
    admin.execute("GRANT pgbackground_role TO pw_plain")
    with ExitStack() as stack:
        stack.callback(admin.execute, "ALTER ROLE pw_plain VALID UNTIL 'infinity'")
        conn = stack.enter_context(stale.connect(user="pw_plain", password=password))
        admin.execute(
            "DO $$ BEGIN EXECUTE format('ALTER ROLE pw_plain VALID UNTIL %L',"
            " clock_timestamp() + interval '4 s'); END $$"
        )
        _warm(admin, conn)
        admin.execute(
            "SELECT pg_sleep_until(rolvaliduntil) FROM pg_roles WHERE rolname = 'pw_plain'"
        )
        error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
        assert error.sqlstate in ("28P01", "28000"), message(error)


@pytest.mark.parametrize(
    "command",
    [
        "ALTER ROLE eve SET work_mem = '5MB'",
        "ALTER DATABASE \"{db}\" SET work_mem = '5MB'",
        "ALTER ROLE eve IN DATABASE \"{db}\" SET work_mem = '5MB'",
        "ALTER ROLE ALL SET work_mem = '5MB'",
    ],
)
def test_settings_of_the_login_are_those_of_a_new_one(
    stale: Proxy, admin: Connection, db: str, command: str
) -> None:
    admin.execute("CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    with stale.connect(user="eve", dbname=db) as conn:
        _warm(admin, conn)
        try:
            admin.execute(command.format(db=db).encode())
            assert value(conn, "SHOW work_mem") == "5MB"
        finally:
            admin.execute("ALTER ROLE ALL RESET work_mem")


@pytest.fixture
def relayed(stale: Proxy, relay: UpstreamRelay, admin: Connection) -> Iterator[Proxy]:
    """A proxy whose logins can be held up."""
    with shared_proxy(relay.upstream, *OPTIONS) as proxy:
        yield proxy


def _during_login(
    server: Server, relay: UpstreamRelay, number: int, begins: str, ends: str
) -> threading.Event:
    """Has these commands be executed while a backend for jobs logs in, the one with this number.
    Returns what is set then."""
    done = threading.Event()
    logins: list[Login] = []

    def at_login(connection: Login, is_complete: bool) -> None:
        if b"pg_background starting" in connection.startup:
            if not is_complete:
                logins.append(connection)
            if logins[number : number + 1] == [connection]:
                with server.connect() as other:
                    other.execute((ends if is_complete else begins).encode())
                if is_complete:
                    done.set()

    relay.at_login = at_login
    return done


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        ("SELECT 1", "ALTER ROLE eve SET work_mem = '6MB'"),
        ("ALTER ROLE eve SET work_mem = '5MB'", "ALTER ROLE eve SET work_mem = '6MB'"),
    ],
    ids=["once", "and back"],
)
def test_settings_that_change_during_a_login(
    relayed: Proxy,
    relay: UpstreamRelay,
    server: Server,
    admin: Connection,
    number: int,
    begins: str,
    ends: str,
) -> None:
    """Number 0 is the job's own login. In the second case all looks as it did before."""
    admin.execute("CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    if begins != "SELECT 1":
        admin.execute("ALTER ROLE eve SET work_mem = '6MB'")
    done = _during_login(server, relay, number, begins, ends)
    with relayed.connect(user="eve") as conn:
        while not done.is_set():
            run(conn, "SELECT 1")
            wait_until(lambda: done.is_set() or len(spares_of(admin, conn)) == 2)
        for _ in range(4):
            wait_until(lambda: len(spares_of(admin, conn)) == 2)
            before = spares_of(admin, conn)
            pid = launch(conn, "SHOW work_mem")
            assert result(conn, pid) == [("6MB",)]
        # They are used after all.
        assert pid in before


def test_what_only_a_login_takes_from_the_configuration_file(
    stale: Proxy, server: Server, admin: Connection
) -> None:
    admin.execute("CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    with ExitStack() as stack:
        conn = stack.enter_context(stale.connect(user="eve"))
        _warm(admin, conn)
        stack.callback(server.set, "log_disconnections", "off")
        server.set("log_disconnections", "on")
        assert value(conn, "SHOW log_disconnections") == "on"


def test_a_new_line_in_pg_hba_conf(stale: Proxy, server: Server, admin: Connection) -> None:
    admin.execute("CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    with ExitStack() as stack:
        conn = stack.enter_context(stale.connect(user="eve"))
        _warm(admin, conn)
        stack.callback(server.set_hba)
        server.set_hba(["host all eve 127.0.0.1/32 reject", *DEFAULT_HBA])
        error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
        assert error.sqlstate == "28000", message(error)


def test_what_event_triggers_do_may_change(
    stale: Proxy, server: Server, admin: Connection, db: str
) -> None:
    """Nobody can tell on what it depends: each job has its own login."""
    if admin.info.server_version < 170000:
        pytest.skip("this server has no event triggers on login")
    with stale.connect(dbname=db) as conn:
        conn.execute("CREATE TABLE given (memory text); INSERT INTO given VALUES ('5MB')")
        conn.execute(
            "CREATE FUNCTION at_login() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN"
            " PERFORM set_config('work_mem', memory, false) FROM given; END$$;"
            "CREATE EVENT TRIGGER at_login ON login EXECUTE FUNCTION at_login()"
        )
        for n in range(10, 20):
            run(conn, "SELECT 1")
            # Time enough to open spares.
            with server.connect(dbname=db) as other, stale.connect(dbname=db):
                other.execute("UPDATE given SET memory = %s", [f"{n}MB"])
            assert value(conn, "SHOW work_mem") == f"{n}MB"


def test_event_triggers_on_login_are_those_of_a_new_one(
    stale: Proxy, admin: Connection, db: str
) -> None:
    if admin.info.server_version < 170000:
        pytest.skip("this server has no event triggers on login")
    with stale.connect(dbname=db) as conn:
        _warm(admin, conn)
        conn.execute(
            "CREATE FUNCTION at_login() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM set_config('work_mem', '5MB', false); END$$;"
            "CREATE EVENT TRIGGER at_login ON login EXECUTE FUNCTION at_login()"
        )
        assert value(conn, "SHOW work_mem") == "5MB"


def test_what_changes_nothing_for_a_login_keeps_the_spares(
    stale: Proxy, admin: Connection, db: str
) -> None:
    admin.execute(
        "CREATE ROLE eve LOGIN IN ROLE pgbackground_role; CREATE ROLE other LOGIN SUPERUSER"
    )
    with stale.connect(user="eve", dbname=db) as conn:
        before = _warm(admin, conn)
        admin.execute(
            "ALTER ROLE other NOLOGIN; ALTER ROLE other SET work_mem = '5MB';"
            " GRANT pg_monitor TO eve; ALTER ROLE eve CREATEROLE"
        )
        assert launch(conn, "SELECT pg_sleep(0)") in before


def test_a_role_whose_settings_set_its_role_has_spares(stale: Proxy, admin: Connection) -> None:
    admin.execute(
        "CREATE ROLE eve LOGIN SUPERUSER IN ROLE pgbackground_role;"
        " CREATE ROLE plain; ALTER ROLE eve SET role = plain"
    )
    with stale.connect(user="eve") as conn:
        conn.execute("SELECT 1")
        conn.execute("RESET ROLE; SET ROLE NONE")
        before = _warm(admin, conn)
        assert launch(conn, "SELECT 1") in before
        assert value(conn, "SELECT current_user") == "eve"


def test_no_job_gets_back_to_a_role_that_its_login_may_not_have_any_more(
    stale: Proxy, admin: Connection
) -> None:
    admin.execute(
        "CREATE ROLE eve LOGIN IN ROLE pgbackground_role; CREATE ROLE gone;"
        " GRANT gone TO eve; ALTER ROLE eve SET role = gone"
    )
    with stale.connect(user="eve") as conn:
        conn.execute("SET ROLE NONE")
        _warm(admin, conn)
        assert value(conn, "RESET ROLE; SELECT current_user") == "gone"
        _warm(admin, conn)
    admin.execute("REVOKE gone FROM eve")
    with stale.connect(user="eve") as conn:
        assert value(conn, "RESET ROLE; SELECT current_user") == "eve"


def test_a_real_failure_to_take_over_is_the_callers_on_a_spare_too(
    stale: Proxy, admin: Connection
) -> None:
    """It costs the spare that it was tried on, and no other."""
    admin.execute(
        "CREATE ROLE eve LOGIN IN ROLE pgbackground_role; CREATE ROLE gone; GRANT gone TO eve"
    )
    with stale.connect(user="eve") as conn:
        before = _warm(admin, conn)
        conn.execute("SET ROLE gone")
        admin.execute("REVOKE gone FROM eve")
        error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
        assert error.sqlstate == "42501"
        conn.execute("RESET ROLE")
        assert launch(conn, "SELECT 1") in before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_job_runs_in_one_whose_login_does_not_hold(
    stale: Proxy, start_proxy: StartProxy, admin: Connection, db: str, count: int
) -> None:
    """One that is alone checks its own login, in front of the job: with a Sync between the two, the
    job would run after the check has failed."""
    proxy = start_proxy("--spare-lifetime", "60s", "--spares", str(count))
    admin.execute("CREATE ROLE eve LOGIN IN ROLE pgbackground_role")
    with stale.connect(dbname=db) as owner, proxy.connect(user="eve", dbname=db) as conn:
        owner.execute("CREATE TABLE kept (n int); GRANT ALL ON kept TO eve")
        job = "INSERT INTO kept VALUES (1) RETURNING n"
        for _ in range(3):
            assert run(conn, job) == [(1,)]
            wait_until(lambda: len(spares_of(admin, conn)) == count)
        admin.execute("ALTER ROLE eve NOLOGIN")
        error = failure(conn, "SELECT pg_background_launch(%s)", [job])
        assert error.sqlstate == "28000", message(error)
        wait_until(lambda: not spares_of(admin, conn))
        others = "SELECT FROM pg_stat_activity WHERE usename = 'eve' AND pid <> %s"
        wait_until(lambda: not admin.execute(others, [conn.info.backend_pid]).fetchall())
        assert owner.execute("SELECT count(*) FROM kept").fetchone() == (3,)
    proxy.stop()


INSIDE = "WITH l AS (SELECT pg_background_launch(%s) AS pid) SELECT pid FROM l"


def test_channels_are_retired_with_their_role(
    stale: Proxy, server: Server, admin: Connection, db: str
) -> None:
    """Calls from inside the database: a new role of an old name, and a former superuser."""
    with stale.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
    channels = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background channel'"
    admin.execute("CREATE ROLE eve LOGIN SUPERUSER IN ROLE pgbackground_role")
    pids = []
    for change in (
        "ALTER ROLE eve NOSUPERUSER",
        "DROP ROLE eve; CREATE ROLE eve LOGIN IN ROLE pgbackground_role",
        "SELECT 1",
    ):
        with stale.connect(user="eve", dbname=db) as conn:
            pid = one(conn, INSIDE, ["SELECT oid FROM pg_roles WHERE rolname = session_user"])
            oid = admin.execute("SELECT oid FROM pg_roles WHERE rolname = 'eve'").fetchone()
            result = "SELECT * FROM pg_background_result(%s) AS (n oid)"
            assert conn.execute(result, [pid]).fetchone() == oid
        wait_until(lambda: admin.execute(channels).fetchall())
        pids.append(admin.execute(channels).fetchall())
        admin.execute(change.encode())
    with stale.connect(dbname=db) as conn:
        conn.execute("DROP EXTENSION pg_background")
    # Used again only where nothing had changed.
    assert len({str(pid) for pid in pids}) == 3
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'eve'")
