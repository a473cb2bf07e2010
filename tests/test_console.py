"""The console: the database pg_background_proxy, where a client talks to the proxy itself."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import asyncpg
import psutil
import psycopg
import pytest
from psycopg import errors
from psycopg.rows import dict_row

from protocol.messages import (
    Bind,
    Close,
    DataRow,
    Describe,
    ErrorResponse,
    Execute,
    FunctionCall,
    Parse,
    Query,
    RowDescription,
    Sync,
)
from protocol.scram import ScramSecret
from protocol.startup import StartupMessage
from proxy import __version__
from proxy.config import SETTINGS
from proxy.console.commands import SHOWN, USAGE
from proxy.console.login import MAX_CLIENTS
from proxy.console.tables import TABLES
from tests.conftest import StartProxy, shared_proxy, upstream_of
from tests.support.background import launch, wait_until
from tests.support.certificates import Certificates
from tests.support.servers import (
    Connection,
    Proxy,
    Server,
    psql,
    start_psql,
)
from tests.support.wire import Wire, error_of

BOSS: Final = "böss pass"
WATCHER: Final = "watcher pass"
SLEEPS: Final = "SELECT pg_sleep(60)"
DATABASE: Final = "pg_background_proxy"

pytestmark = pytest.mark.every_server


def options(folder: Path, *more: str) -> list[str]:
    """Of a proxy with an administrator, one who may look, and one who is nobody."""
    watcher = ScramSecret.from_password(WATCHER.encode()).serialize().decode()
    file = folder / "users.txt"
    file.write_text(
        f'"boss" "{BOSS}"\n"watcher" "{watcher}"\n"nobody" "nobody pass"\n'
        f'"ancient" "md5{"0" * 32}"\n'
    )
    file.chmod(0o600)
    return [
        *("--auth-file", str(file), "--admin-users", "boss", "--admin-users", "ancient"),
        *("--admin-users", "forgotten", "--stats-users", "watcher"),
        *("--listen", f"{folder}:7777", "--log-level", "debug"),
        *("--spare-lifetime", "20s", *more),
    ]


@pytest.fixture(scope="module", params=["1", "2"], ids=["one", "two"])
def house(
    server: Server, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Proxy, Path]]:
    """A proxy of one or two workers, and the folder of its Unix socket."""
    folder = tmp_path_factory.mktemp("console")
    with shared_proxy(upstream_of(server), *options(folder), "--workers", request.param) as proxy:
        proxy.wait_for_log("Unix socket")
        yield proxy, folder


@pytest.fixture
def boss(house: tuple[Proxy, Path]) -> Iterator[Connection]:
    """An administrator's connection, without a password, since logins are paced."""
    with local(house) as conn:
        yield conn


def local(house: tuple[Proxy, Path], user: str = "boss", **params: Any) -> Connection:
    """A connection over the Unix socket, as the proxy's own user."""
    proxy, folder = house
    return proxy.connect(host=folder, port=7777, user=user, dbname=DATABASE, **params)


def notices(conn: Connection) -> list[tuple[str | None, str | None]]:
    """Message and detail of those that come from now on."""
    found: list[tuple[str | None, str | None]] = []
    conn.add_notice_handler(lambda said: found.append((said.message_primary, said.message_detail)))
    return found


def console(proxy: Proxy, user: str = "boss", password: str = BOSS, **params: Any) -> Connection:
    return proxy.connect(user=user, password=password, dbname=DATABASE, **params)


def show(conn: Connection, name: str) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"SHOW {name}").fetchall()


@contextlib.contextmanager
def launched(proxy: Proxy, sql: str = SLEEPS, **params: Any) -> Iterator[tuple[Connection, int]]:
    """A session with a job, which ends with it."""
    with proxy.connect(**params) as conn:
        pid = launch(conn, sql)
        try:
            yield conn, pid
        finally:
            conn.execute("SELECT pg_terminate_backend(%s)", [pid])


def refusal(connect: Callable[[], Any]) -> str:
    with pytest.raises(psycopg.OperationalError) as caught:
        connect()
    return str(caught.value)


# Who gets in


def test_without_users_the_name_is_the_servers(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    assert f'database "{DATABASE}" does not exist' in refusal(lambda: console(proxy, "postgres"))
    with server.connect() as direct:
        direct.execute(f"CREATE DATABASE {DATABASE}")
        try:
            with proxy.connect(dbname=DATABASE) as conn:
                assert conn.execute("SELECT current_database()").fetchone() == (DATABASE,)
        finally:
            direct.execute(f"DROP DATABASE {DATABASE}")


def test_logins(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house
    console(proxy).close()
    console(proxy, "watcher", WATCHER).close()
    for user, password, why in (
        ("boss", "wrong", None),
        ("watcher", BOSS, None),
        ("nobody", "nobody pass", None),  # in the file, and in no list
        ("postgres", "", None),  # trusted by the server
        ("ancient", "ancient", "what the auth_file has for it is no password and no SCRAM secret"),
        ("forgotten", "forgotten", "the auth_file has nothing for it"),
    ):
        said = refusal(functools.partial(console, proxy, user, password or "x"))
        assert f'password authentication failed for user "{user}"' in said
        reason = f' reason="{why}"' if why else "$"
        proxy.wait_for_log(f"WARNING:  console login failed: user={user} host=127.0.0.1{reason}")
    assert "pass" not in proxy.log.replace("passing", "").replace("password and no", "")


def test_a_stranger_cannot_tell_who_is_known(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house

    def answers(user: str) -> list[tuple[str, int]]:
        with Wire((proxy.host, proxy.port), login=False) as wire:
            names = {b"user": user.encode(), b"database": DATABASE.encode()}
            wire.send(StartupMessage(names).serialize())
            found = [wire.message()]
            data = b"n,,n=,r=abcdefgh"
            wire.send(b"p" + (4 + 14 + 4 + len(data)).to_bytes(4, "big"))
            wire.send(b"SCRAM-SHA-256\0" + len(data).to_bytes(4, "big") + data)
            found.append(wire.message())
            nonce = found[-1][1].split(b",")[0].split(b"r=")[1]
            proof = b"c=biws,r=" + nonce + b",p=" + b"A" * 43 + b"="
            wire.send(b"p" + (4 + len(proof)).to_bytes(4, "big") + proof)
            found.append(wire.message())
        assert error_of(found[-1:]).sqlstate == "28P01"
        return [(kind, len(body) - (len(user) if kind == "E" else 0)) for kind, body in found]

    first = answers("boss")
    for user in ("watcher", "nobody", "unknown", "ancient"):
        assert answers(user) == first, user


def test_the_proxys_own_user_needs_no_password(house: tuple[Proxy, Path]) -> None:
    for user, is_admin in (("anybody", True), ("boss", True), ("watcher", False)):
        with local(house, user) as conn:
            assert show(conn, "VERSION")
            outcome: type[Exception] = errors.UndefinedObject
            with pytest.raises(outcome if is_admin else errors.InsufficientPrivilege):
                conn.execute("KILL 0.0")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_of_the_machine_needs_one(start_proxy: StartProxy, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        proxy = start_proxy(*options(tmp_path), "--listen", f"{folder}:7777")
        proxy.wait_for_log(f"Unix socket {folder}")
        (folder / ".s.PGSQL.7777").chmod(0o777)
        said = login_of_another(folder)
    assert 'password authentication failed for user "anybody"' in said


def login_of_another(folder: Path) -> str:
    """What somebody is told who is not the proxy's user."""
    code = (
        "import os, sys, psycopg; os.setuid(65534)\n"
        f"psycopg.connect(host={str(folder)!r}, port=7777, user='anybody', password='x',"
        f" dbname='{DATABASE}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.stderr


def test_logins_are_paced(server: Server, start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path))
    with ThreadPoolExecutor(40) as threads:
        guesses = [
            threads.submit(refusal, functools.partial(console, proxy, password=f"guess {n}"))
            for n in range(40)
        ]
        said = [guess.result() for guess in guesses]
    paced = sum("too many logins to the console" in text for text in said)
    failed = sum("password authentication failed" in text for text in said)
    # A connection that is refused at once may be reset before its client has read why.
    assert paced + failed >= 35, said
    assert paced >= 15
    assert failed <= 25
    with proxy.connect() as conn:  # others are not concerned
        assert conn.execute("SELECT 1").fetchone() == (1,)
    # Nor is who needs no password.
    proxy.connect(host=tmp_path, port=7777, user="x", dbname=DATABASE).close()


def test_what_a_role_may_is_looked_up_for_each_command(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    given = options(tmp_path)
    file = tmp_path / "proxy.toml"
    file.write_text('admin_users = "boss"\nstats_users = ["watcher"]\n')
    kept = [*given[:2], *given[-4:], "--config", str(file)]
    proxy = start_proxy(*kept, "--workers", "2")
    with (
        console(proxy) as admin,
        console(proxy, "watcher", WATCHER) as watcher,
    ):
        with pytest.raises(errors.InsufficientPrivilege, match="admin access needed"):
            watcher.execute("RELOAD")
        file.write_text('admin_users = "watcher"\n')
        admin.execute("RELOAD")
        wait_until(lambda: allowed(watcher))
        with pytest.raises(errors.InsufficientPrivilege, match="may not use the console any more"):
            admin.execute("SHOW JOBS")
        assert admin.closed
    assert proxy.stop() == 0


def allowed(conn: Connection) -> bool:
    try:
        conn.execute("RELOAD")
    except errors.InsufficientPrivilege:
        return False
    return True


def test_tls_that_is_demanded(
    start_proxy: StartProxy, certificates: Certificates, tmp_path: Path
) -> None:
    proxy = start_proxy(
        *options(tmp_path, "--client-tls-sslmode", "require"),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
    )
    assert "SSL required" in refusal(lambda: console(proxy, sslmode="disable"))
    with console(proxy, sslmode="require") as conn:
        [own] = show(conn, "SESSIONS")
        assert own["tls"].startswith("TLSv1.")


def test_rules_of_admission(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path, "--allow-roles", "alice", "--allow-databases", "app"))
    console(proxy).close()  # who may reach the server is another question
    proxy = start_proxy(*options(tmp_path / "..", "--allow-from", "192.0.2.0/24"))
    assert "no connections are taken from host" in refusal(lambda: console(proxy))


# What is shown


def test_jobs(house: tuple[Proxy, Path], boss: Connection, scratch: str) -> None:
    proxy, _ = house
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(launched(proxy, dbname=scratch))
        conn = stack.enter_context(proxy.connect(dbname=scratch))
        failed = launch(conn, "SELECT 1/0")
        [labelled] = conn.execute(
            "SELECT pid FROM pg_background_launch_v2('SELECT 7', 0, '<b> ä')"
        ).fetchone() or [0]
        wait_until(lambda: state(boss, failed) == "error" and state(boss, labelled) == "stopped")
        jobs = show(boss, "JOBS")
        running = [job for job in jobs if job["state"] == "running"]
        assert jobs[: len(running)] == running
        ours = [job for job in running if job["database"] == scratch]
        assert len(ours) == 3
        assert {job["sql_preview"] for job in ours} == {SLEEPS}
        assert len({job["worker"] for job in ours}) == len(show(boss, "WORKERS"))
        [error] = [job for job in jobs if job["pid"] == failed]
        assert (error["sqlstate"], error["error_message"]) == ("22012", "division by zero")
        assert error["elapsed_ms"] >= 0
        assert error["finished_at"] >= error["launched_at"]
        [good] = [job for job in jobs if job["pid"] == labelled]
        assert (good["label"], good["row_count"], good["command_tag"]) == ("<b> ä", 1, "SELECT")
        assert good["host"] == f"127.0.0.1:{upstream_port(proxy)}"
        assert good["user"] == "postgres"


def upstream_port(proxy: Proxy) -> str:
    return proxy.wait_for_log(r"passing on to 127\.0\.0\.1:(\d+)")[1]


def state(conn: Connection, pid: int) -> str | None:
    found = [job["state"] for job in show(conn, "JOBS") if job["pid"] == pid]
    return found[0] if found else None


def test_progress(house: tuple[Proxy, Path], boss: Connection, scratch: str) -> None:
    proxy, _ = house
    with proxy.connect(dbname=scratch) as conn:
        pid = launch(conn, "SELECT pg_background_progress(40, 'half way'); " + SLEEPS)

        def progress() -> tuple[Any, Any]:
            [job] = [job for job in show(boss, "JOBS") if job["pid"] == pid]
            return job["progress"], job["progress_message"]

        wait_until(lambda: progress() == (40, "half way"))
        boss.execute(f"CANCEL {pid}")


def test_sessions(house: tuple[Proxy, Path], boss: Connection, scratch: str) -> None:
    proxy, folder = house
    with (
        proxy.connect(dbname=scratch, application_name="ä tool") as conn,
        proxy.connect(host=folder, port=7777) as near,
    ):
        conn.execute("BEGIN")
        job = launch(conn, SLEEPS)
        by_pid = {row["backend_pid"]: row for row in show(boss, "SESSIONS")}
        ours = by_pid[conn.info.backend_pid]
        named = ("user", "database", "state", "addr", "local_addr", "local_port", "jobs", "tls")
        assert [ours[name] for name in named] == [
            *("postgres", scratch, "idle in transaction", "127.0.0.1", "127.0.0.1"),
            *(proxy.port, 1, ""),
        ]
        assert ours["application_name"] == "ä tool"
        with socket.socket(fileno=os.dup(conn.fileno())) as same:
            assert ours["port"] == same.getsockname()[1]
        assert by_pid[near.info.backend_pid]["addr"] == "unix"
        [own] = [row for row in show(boss, "SESSIONS") if row["state"] == "console"]
        assert (own["user"], own["backend_pid"], own["host"]) == ("boss", None, None)
        with ThreadPoolExecutor() as threads:
            sleeping = threads.submit(near.execute, "SELECT pg_sleep(60)")
            wait_until(lambda: session(boss, near)["state"] == "active")
            boss.execute(f"KILL {session(boss, near)['id']}")
            with pytest.raises(errors.AdminShutdown, match="administrator command"):
                sleeping.result()
        conn.execute("ROLLBACK")
        assert session(boss, conn)["state"] == "idle"
        boss.execute(f"CANCEL {job}")


def session(conn: Connection, other: Connection) -> dict[str, Any]:
    pid = other.info.backend_pid
    [found] = [row for row in show(conn, "SESSIONS") if row["backend_pid"] == pid]
    return found


def test_spares_and_channels(house: tuple[Proxy, Path], boss: Connection, scratch: str) -> None:
    proxy, _ = house
    with proxy.connect(dbname=scratch) as conn:
        launch(conn, "SELECT 1")
        wait_until(lambda: spares(boss, scratch) == {("postgres", 2)})
        conn.execute("CREATE EXTENSION IF NOT EXISTS pg_background")
        conn.execute("DO $$ BEGIN PERFORM pg_background_launch('SELECT 1'); END $$")
        wait_until(lambda: channels(boss, scratch) > 0)
        conn.execute("DROP EXTENSION pg_background")


def spares(conn: Connection, database: str) -> set[tuple[str, int]]:
    rows = show(conn, "SPARES")
    return {(row["user"], row["ready"]) for row in rows if row["database"] == database}


def channels(conn: Connection, database: str) -> int:
    rows = show(conn, "CHANNELS")
    return sum(row["idle"] + row["used"] for row in rows if row["database"] == database)


def test_stats(house: tuple[Proxy, Path], boss: Connection, db: str) -> None:
    proxy, _ = house
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            conn = stack.enter_context(proxy.connect(dbname=db))
            launch(conn, "SELECT 1")
            launch(conn, "SELECT 1/0")
        pid = launch(conn, SLEEPS)
        wait_until(lambda: stats(boss, db)["jobs_active"] == 1)
        counts = stats(boss, db)
        assert [counts[f"jobs_{name}"] for name in ("launched", "completed", "failed")] == [7, 3, 3]
        boss.execute(f"CANCEL {pid}")
        wait_until(lambda: stats(boss, db)["jobs_canceled"] == 1)
        assert stats(boss, db)["jobs_active"] == 0
        assert stats(boss, db)["avg_execution_ms"] > 0


def stats(conn: Connection, database: str) -> dict[str, Any]:
    [found] = [row for row in show(conn, "STATS") if row["database"] == database]
    return found


def test_workers(house: tuple[Proxy, Path], boss: Connection) -> None:
    proxy, _ = house
    rows = show(boss, "WORKERS")
    processes = psutil.Process(proxy.pid).children() or [psutil.Process(proxy.pid)]
    assert [row["worker"] for row in rows] == list(range(1, len(processes) + 1))
    assert {row["pid"] for row in rows} == {process.pid for process in processes}
    assert {row["state"] for row in rows} == {"active"}
    assert sum(row["sessions"] for row in rows) == len(show(boss, "SESSIONS"))


def test_config_and_version(house: tuple[Proxy, Path], boss: Connection) -> None:
    rows = {row["key"]: row for row in show(boss, "CONFIG")}
    assert list(rows) == [field.name for field in SETTINGS]
    assert rows["admin_users"]["value"] == "boss, ancient, forgotten"
    assert rows["spare_lifetime"] == {
        "key": "spare_lifetime",
        "value": "20s",
        "default": "60s",
        "changeable": "yes",
    }
    assert rows["workers"]["changeable"] == "no"
    assert rows["log_job_sql"]["value"] == "off"
    assert show(boss, "VERSION") == [{"version": f"pg-background-proxy {__version__}"}]
    assert BOSS not in str(rows)


def test_help_is_a_notice(boss: Connection) -> None:
    said = notices(boss)
    for prepared in (False, True):
        said.clear()
        boss.execute("SHOW HELP", prepare=prepared)
        [(message, detail)] = said
        assert message == "Console usage"
        assert all(line in (detail or "") for line in USAGE)


# What is done


def test_cancel(house: tuple[Proxy, Path], boss: Connection, scratch: str) -> None:
    proxy, _ = house
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(launched(proxy, dbname=scratch)) for _ in range(4)]
        for _, pid in jobs:  # in every worker
            assert boss.execute(f"CANCEL {pid}").statusmessage == "CANCEL"
        wait_until(lambda: {state(boss, pid) for _, pid in jobs} == {"canceled"})
    proxy.wait_for_log(rf'LOG:  console command: user=boss command="CANCEL {jobs[0][1]}"')
    with pytest.raises(errors.UndefinedObject, match=f"there is no job with PID {jobs[0][1]}"):
        boss.execute(f"CANCEL {jobs[0][1]}")


def test_kill(house: tuple[Proxy, Path], boss: Connection) -> None:
    proxy, _ = house
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(proxy.connect()) for _ in range(4)]
        for conn in sessions:
            assert boss.execute(f"KILL {session(boss, conn)['id']}").statusmessage == "KILL"
            with pytest.raises(errors.AdminShutdown):
                conn.execute("SELECT 1")
    with pytest.raises(errors.UndefinedObject, match='there is no session "1.2"'):
        boss.execute("KILL '1.2'")


def test_one_of_several_hosts(
    server: Server, tls_server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Pids are those of one server; a job is canceled on its own."""
    proxy = start_proxy(
        *options(tmp_path),
        upstream=f"host={server.host},{tls_server.host} port={server.port},{tls_server.port}",
    )
    with console(proxy) as boss, launched(proxy) as (_, pid):
        boss.execute(f"CANCEL {pid}")
        wait_until(lambda: state(boss, pid) == "canceled")


def test_reload(start_proxy: StartProxy, tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("spares = 1\n")
    for workers in ("1", "2"):
        given = [*options(tmp_path), "--config", str(file), "--workers", workers]
        proxy = start_proxy(*given)
        with console(proxy) as boss:
            said = notices(boss)
            file.write_text("spares = 3\nhung_worker_timeout = '7s'\ntcp_keepidle = 9\n")
            assert boss.execute("RELOAD").statusmessage == "RELOAD"
            assert said == [("tcp_keepidle cannot be changed without restarting the proxy", None)]
            wait_until(lambda: setting(boss, "spares") == "3")
            file.write_text("spares = many\n")
            with pytest.raises(errors.ConfigFileError, match="stays as it was") as caught:
                boss.execute("RELOAD")
            assert str(file) in (caught.value.diag.message_detail or "")
            assert setting(boss, "spares") == "3"
        file.write_text("spares = 1\n")
        assert proxy.stop() == 0


def setting(conn: Connection, name: str) -> str:
    [found] = [row["value"] for row in show(conn, "CONFIG") if row["key"] == name]
    return str(found)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_shutdown(start_proxy: StartProxy, tmp_path: Path, workers: str) -> None:
    proxy = start_proxy(*options(tmp_path), "--workers", workers, "--shutdown-timeout", "1h")
    with console(proxy) as boss, proxy.connect() as conn:
        job = launch(conn, "SELECT pg_sleep(0.5)")
        assert boss.execute("SHUTDOWN").statusmessage == "SHUTDOWN"
        proxy.wait_for_log("shutting down")
        # The job and the session go on; the console watches.
        wait_until(lambda: state(boss, job) == "stopped")
        assert conn.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError):
            proxy.connect()
        conn.close()
        assert proxy.wait() == 0  # the console does not hold it up
        with pytest.raises(errors.AdminShutdown):
            boss.execute("SHOW JOBS")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_shutdown_waits_for_nobody(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    proxy = start_proxy(*options(tmp_path), "--workers", workers, "--shutdown-timeout", "1h")
    with console(proxy) as boss, proxy.connect() as conn:
        boss.execute("SHUTDOWN WAIT_FOR_CLIENTS")
        proxy.wait_for_log("shutting down")
        boss.execute("SHUTDOWN")
        assert proxy.wait() == 0
        with pytest.raises(errors.AdminShutdown):
            conn.execute("SELECT 1")


def test_drain(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path), "--workers", "2", "--shutdown-timeout", "1h")
    with contextlib.ExitStack() as stack:
        boss = stack.enter_context(console(proxy))
        mine = worker_of_console(boss)
        [other] = [row for row in show(boss, "WORKERS") if row["pid"] != mine]
        conns = [stack.enter_context(proxy.connect()) for _ in range(4)]
        [kept, *_] = [conn for conn in conns if session(boss, conn)["worker"] == other["pid"]]
        assert boss.execute(f"DRAIN {other['worker']}").statusmessage == "DRAIN"
        wait_until(lambda: worker(boss, other["pid"])["state"] == "draining")
        with pytest.raises(errors.UndefinedObject, match="that is active"):
            boss.execute(f"DRAIN {other['worker']}")
        [last] = [row for row in show(boss, "WORKERS") if row["pid"] == mine]
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="only one that is active"):
            boss.execute(f"DRAIN {last['worker']}")
        assert kept.execute("SELECT 1").fetchone() == (1,)
        new = stack.enter_context(proxy.connect())
        assert session(boss, new)["worker"] == mine
        for conn in conns:
            conn.close()
        # It is replaced.
        wait_until(lambda: other["pid"] not in [row["pid"] for row in show(boss, "WORKERS")])
        wait_until(lambda: [row["state"] for row in show(boss, "WORKERS")] == ["active"] * 2)
    assert proxy.stop() == 0


def test_queued_jobs_are_listed_behind_those_that_run(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house
    with launched(proxy) as (conn, pid), local(house) as boss:
        conn.execute("SET pg_background.queue = on; SET pg_background.max_workers = 1")
        conn.execute("SELECT pg_background_submit('SELECT 1', 0, 'later')")
        mine = [job for job in show(boss, "JOBS") if job["label"] == "later" or job["pid"] == pid]
        assert [(job["pid"], job["state"], job["user"]) for job in mine] == [
            (pid, "running", "postgres"),
            (None, "queued", "postgres"),
        ]
        conn.execute("SELECT pg_background_cancel_all()")


def test_the_worker_of_the_console_can_be_drained(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path), "--workers", "2", "--shutdown-timeout", "1h")
    proxy.wait_for_log("Unix socket")
    with Wire(f"{tmp_path}/.s.PGSQL.7777", user="boss", database=DATABASE) as wire:
        messages = [body for kind, body in wire.query("SHOW SESSIONS") if kind == "D"]
        [own] = [DataRow.parse(body).values[1] for body in messages]
        shown = [body for kind, body in wire.query("SHOW WORKERS") if kind == "D"]
        numbers = {row[1]: row[0] for row in (DataRow.parse(body).values for body in shown)}
        wire.send_query(f"DRAIN {(numbers[own] or b'').decode()}")
        said = b""
        with contextlib.suppress(EOFError):
            while True:
                kind, body = wire.message()
                said = body if kind == "E" else said
    assert b"57P01" in said
    assert proxy.stop() == 0


def worker_of_console(conn: Connection) -> int:
    [own] = consoles(conn)
    return int(own["worker"])


def worker(conn: Connection, pid: int) -> dict[str, Any]:
    [found] = [row for row in show(conn, "WORKERS") if row["pid"] == pid]
    return found


def test_drain_needs_another_process(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path))
    with (
        console(proxy) as boss,
        pytest.raises(errors.ObjectNotInPrerequisiteState, match="cannot drain the only process"),
    ):
        boss.execute("DRAIN 1")


def test_a_worker_that_hangs_is_missed(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path), "--workers", "2")
    with contextlib.ExitStack() as stack:
        boss = stack.enter_context(console(proxy))
        said = notices(boss)
        mine = worker_of_console(boss)
        [other] = [row for row in show(boss, "WORKERS") if row["pid"] != mine]
        hanging = psutil.Process(other["pid"])
        hanging.suspend()
        try:
            proxy.wait_for_log("does not answer; it has")
            shown = worker(boss, hanging.pid)
            assert (shown["state"], shown["jobs"]) == ("hung", None)
            assert said[-1] == (
                "SHOW WORKERS is incomplete",
                "1 of the proxy's processes did not answer in time.",
            )
            assert show(boss, "SESSIONS")
        finally:
            hanging.resume()
        wait_until(lambda: worker(boss, hanging.pid)["state"] == "active")


def test_who_may_look_changes_nothing(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house
    with launched(proxy) as (_, pid), local(house, "watcher") as watcher:
        for name in SHOWN:
            watcher.execute(f"SHOW {name}")
        for command in (f"CANCEL {pid}", "KILL 1.1", "DRAIN 1", "RELOAD", "SHUTDOWN"):
            with pytest.raises(errors.InsufficientPrivilege, match="admin access needed"):
                watcher.execute(command)
        assert state(watcher, pid) == "running"


# What is said


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("SELECT 1", "SHOW HELP|JOBS|"),
        ("LAUNCH 'SELECT 1'", "CANCEL pid; KILL session; DRAIN worker; RELOAD; SHUTDOWN."),
        ("SHOW", "SHOW takes one of: help, jobs,"),
        ("SHOW POOLS", "SHOW takes one of: help, jobs,"),
        ("SHOW JOBS WHERE state = 'running'", "SHOW takes one of:"),
        ("CANCEL", "CANCEL needs the PID of a job, which SHOW JOBS lists."),
        ("CANCEL 1 2", "CANCEL needs the PID of a job"),
        ("KILL postgres", "KILL needs the id of a session, which SHOW SESSIONS lists."),
        ("RELOAD now", "The commands are:"),
        ("SHUTDOWN WAIT_FOR_SERVERS", "SHUTDOWN waits for clients"),
        ("SHOW 'JOBS", "The commands are:"),
        ("'" * 9_000, "The commands are:"),
        ('SHOW "JOBS" ' + "x " * 5_000, "SHOW takes one of:"),
    ],
)
def test_wrong_commands(house: tuple[Proxy, Path], command: str, hint: str) -> None:
    with local(house) as conn:
        for prepared in (False, True):
            with pytest.raises(errors.SyntaxError, match="^invalid command") as caught:
                conn.execute(command, prepare=prepared)
            assert hint in (caught.value.diag.message_hint or "")
            assert len(caught.value.diag.message_primary or "") < 200
        assert conn.execute("SHOW VERSION").rowcount == 1


def test_arguments_of_the_wrong_kind(boss: Connection) -> None:
    for command in ("CANCEL 'x'", "CANCEL 1.5", "DRAIN 'one'", "CANCEL '²'"):
        with pytest.raises(errors.InvalidParameterValue, match="takes a number"):
            boss.execute(command)
    with pytest.raises(errors.UndefinedObject):
        boss.execute("CANCEL 99999999999999999999999999")


# With whom it speaks


def test_psql(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house
    params: dict[str, Any] = {"user": "boss", "password": BOSS, "dbname": DATABASE}
    done = psql(proxy.port, "-Atc", "SHOW VERSION;", **params)
    assert (done.returncode, done.stdout) == (0, f"pg-background-proxy {__version__}\n")
    done = psql(proxy.port, "-c", "SHOW HELP", **params)
    assert "NOTICE:  Console usage" in done.stderr
    assert "SHOW HELP|JOBS|SESSIONS|SPARES|CHANNELS|STATS|WORKERS|CONFIG|VERSION" in done.stderr
    done = psql(proxy.port, input="\\x on\nSHOW SESSIONS;\n", **params)
    assert "-[ RECORD 1 ]" in done.stdout
    assert "| boss" in done.stdout
    done = psql(proxy.port, input="BEGIN; SHOW VERSION; COMMIT; SET x = 1; ; SHOW WRONG;", **params)
    assert f"pg-background-proxy {__version__}" in done.stdout
    assert 'ERROR:  invalid command "SHOW WRONG"' in done.stderr
    assert "HINT:  SHOW takes one of: help" in done.stderr


def test_psql_watches(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house
    watching = start_psql(proxy, user="boss", password=BOSS, dbname=DATABASE)
    assert watching.stdin is not None
    assert watching.stdout is not None
    with watching:
        watching.stdin.write("SHOW WORKERS \\watch 0.1\n")
        watching.stdin.flush()
        seen = 0
        while seen < 3:
            line = watching.stdout.readline()
            assert line, "psql has ended"
            assert "ERROR" not in line
            seen += " active " in line
        watching.terminate()


def test_psycopg_without_autocommit(house: tuple[Proxy, Path]) -> None:
    with local(house, autocommit=False) as conn:
        assert show(conn, "VERSION")
        assert status(conn) == "INTRANS"
        conn.commit()
        with pytest.raises(errors.SyntaxError):
            conn.execute("SELECT 1")
        with pytest.raises(errors.InFailedSqlTransaction):
            show(conn, "VERSION")
        conn.rollback()
        assert status(conn) == "IDLE"
        with conn.cursor(binary=True, row_factory=dict_row) as cursor:
            [own] = [
                row
                for row in cursor.execute("SHOW SESSIONS").fetchall()
                if row["user"] == "boss" and row["state"] == "console"
            ]
        assert (own["addr"], own["port"]) == ("unix", None)
        assert own["connect_time"].tzinfo is not None
        conn.commit()
        with pytest.raises((errors.ProtocolViolation, errors.FeatureNotSupported)):
            conn.execute("SHOW %s", ["JOBS"])


def status(conn: Connection) -> str:
    return conn.info.transaction_status.name


def test_psycopg_both_forms_agree(house: tuple[Proxy, Path], boss: Connection) -> None:
    proxy, _ = house
    with launched(proxy) as (_, pid):
        for name in TABLES:
            wait_until(functools.partial(forms_agree, boss, name))  # spares come and go meanwhile
        boss.execute(f"CANCEL {pid}")


def forms_agree(conn: Connection, name: str) -> bool:
    """Whether both have the same rows, without what each look changes."""
    text, binary = (
        conn.cursor(binary=form).execute(f"SHOW {name}").fetchall() for form in (False, True)
    )
    fixed = [i for i, column in enumerate(TABLES[name]) if column != "elapsed_ms"]
    return [[row[i] for i in fixed] for row in text] == [[row[i] for i in fixed] for row in binary]


async def test_asyncpg(house: tuple[Proxy, Path]) -> None:
    proxy, _ = house
    conn = await asyncpg.connect(
        host=proxy.host, port=proxy.port, user="boss", password=BOSS, database=DATABASE
    )
    try:
        [version] = await conn.fetch("SHOW VERSION")
        assert dict(version) == {"version": f"pg-background-proxy {__version__}"}
        statement = await conn.prepare("SHOW JOBS")
        assert statement.get_parameters() == ()
        types = {a.name: a.type.name for a in statement.get_attributes()}
        assert types["launched_at"] == "timestamptz"
        assert types["elapsed_ms"] == "int8"
        assert list(types) == list(TABLES["jobs"])
        assert await conn.fetchval("SHOW WORKERS") == 1
        async with conn.transaction():
            rows = [row async for row in conn.cursor("SHOW CONFIG", prefetch=10)]
        assert [row["key"] for row in rows] == [field.name for field in SETTINGS]
        assert await conn.execute("SET application_name = 'x'; RESET ALL") == "RESET"
        with pytest.raises(asyncpg.FeatureNotSupportedError, match="takes no parameters"):
            await conn.fetch("SHOW $1", "JOBS")
        with pytest.raises(asyncpg.UndefinedObjectError):
            await conn.execute("KILL 1.1")
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await conn.fetch("SELECT 1")
        assert await conn.fetchval("SHOW WORKERS") == 1
    finally:
        await conn.close()


def test_what_pgjdbc_sends(house: tuple[Proxy, Path]) -> None:
    """Its startup by the protocol: settings in batches, the empty query of isValid(), a limit of
    rows with a named portal."""
    _, folder = house
    with Wire(
        f"{folder}/.s.PGSQL.7777",
        user="boss",
        database=DATABASE,
        client_encoding="UTF8",
        DateStyle="ISO",
    ) as wire:
        for sql in ("SET extra_float_digits = 3", "SET application_name = 'PostgreSQL JDBC'", ""):
            batch = Parse(b"", sql.encode()), Bind(b"", b""), Execute(b"", 1), Sync()
            wire.send(b"".join(message.serialize() for message in batch))
            kinds = "".join(kind for kind, _ in wire.until_ready())
            assert kinds == ("12CZ" if sql else "12IZ")
        wire.send(
            Query(b"BEGIN").serialize()
            + Parse(b"S_1", b"SHOW CONFIG").serialize()
            + Describe(b"S", b"S_1").serialize()
            + Bind(b"C_1", b"S_1", result_formats=(0,)).serialize()
            + Execute(b"C_1", 5).serialize()
            + Sync().serialize()
        )
        wire.until_ready()
        messages = wire.until_ready()
        assert "".join(kind for kind, _ in messages) == "1tT2DDDDDsZ"
        [columns] = [RowDescription.parse(body) for kind, body in messages if kind == "T"]
        names = [field.name.decode() for field in columns.fields]
        assert names == ["key", "value", "default", "changeable"]
        wire.send(
            Execute(b"C_1", 0).serialize() + Close(b"P", b"C_1").serialize() + Sync().serialize()
        )
        kinds = "".join(kind for kind, _ in wire.until_ready())
        assert kinds == "D" * (len(SETTINGS) - 5) + "C3Z"
        assert wire.query("COMMIT")[-1] == ("Z", b"I")


def test_what_the_protocol_does_not_allow(house: tuple[Proxy, Path]) -> None:
    _, folder = house

    def open_wire() -> Wire:
        return Wire(f"{folder}/.s.PGSQL.7777", user="boss", database=DATABASE)

    with open_wire() as wire:
        for messages, sqlstate in (
            ([Execute(b"none")], "34000"),
            ([Bind(b"", b"none")], "26000"),
            ([Parse(b"a", b"SHOW JOBS"), Parse(b"a", b"SHOW JOBS")], "42P05"),
            ([Parse(b"", b"SHOW JOBS; SHOW JOBS")], "42601"),
            ([Parse(b"", b"SHOW JOBS"), Bind(b"", b"", (), (b"1",))], "08P01"),
            ([Parse(b"", b"SHOW JOBS"), Bind(b"", b"", result_formats=(0, 1))], "08P01"),
            ([Parse(b"", b"SHOW JOBS"), Bind(b"", b"", result_formats=(7,))], "22023"),
            ([FunctionCall(1, (), (), 0)], "0A000"),
        ):
            sent = b"".join(message.serialize() for message in (*messages, Execute(b""), Sync()))
            wire.send(sent)
            answer = wire.until_ready()
            assert error_of(answer).sqlstate == sqlstate, messages
            assert sum(kind == "E" for kind, _ in answer) == 1
        for number in range(300):
            wire.send(Parse(b"s%d" % number, b"SHOW JOBS").serialize())
        wire.send(Sync().serialize())
        assert error_of(wire.until_ready()).sqlstate == "54000"
    for data in (
        Query(b"SHOW JOBS" + b" " * 20_000).serialize(),
        b"Q\x7f\xff\xff\xff",
        b"Q\0\0\0\0",
        b"?\0\0\0\4",
        b"p\0\0\0\4",
    ):
        with open_wire() as wire:
            wire.send(data)
            error = error_of([wire.message()])
            assert (error.severity, error.sqlstate) == ("FATAL", "08P01")
            with pytest.raises(EOFError):
                wire.message()


def test_a_newer_protocol_is_negotiated(house: tuple[Proxy, Path]) -> None:
    _, folder = house
    with Wire(f"{folder}/.s.PGSQL.7777", login=False) as wire:
        names = {b"user": b"x", b"database": DATABASE.encode(), b"_pq_.unknown": b"1"}
        wire.send(StartupMessage(names, (3, 2)).serialize())
        assert wire.message()[0] == "v"
        kinds = "".join(kind for kind, _ in wire.until_ready())
        assert kinds == f"R{'S' * kinds.count('S')}KZ"


# Nobody stops the others


def test_places_are_limited_and_some_are_kept(start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(*options(tmp_path))

    proxy.wait_for_log("Unix socket")

    def enter(user: str) -> None:
        stack.enter_context(local((proxy, tmp_path), user))

    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CLIENTS - 4):
            enter("watcher")
        assert "too many clients of the console already" in refusal(lambda: enter("watcher"))
        for _ in range(4):
            enter("boss")
        assert "too many clients of the console already" in refusal(lambda: enter("boss"))
    with console(proxy) as conn:
        wait_until(lambda: len(show(conn, "SESSIONS")) == 1)


@pytest.mark.one_server
def test_a_client_that_floods_or_does_not_read(
    house: tuple[Proxy, Path], boss: Connection, scratch: str
) -> None:
    proxy, folder = house
    process = psutil.Process(proxy.pid)
    everyone = [process, *process.children()]
    with proxy.connect(dbname=scratch) as conn:
        for _ in range(200):
            launch(conn, "SELECT 1")
        before = sum(one.memory_info().rss for one in everyone)
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                wire = stack.enter_context(
                    Wire(
                        f"{folder}/.s.PGSQL.7777",
                        user="watcher",
                        database=DATABASE,
                    )
                )
                wire.socket.setblocking(False)
                flood = Query(b"SHOW JOBS;" * 1000).serialize() * 200
                with contextlib.suppress(BlockingIOError):
                    while True:
                        wire.socket.send(flood)
            for _ in range(50):
                assert conn.execute("SELECT 1").fetchone() == (1,)
                show(boss, "VERSION")
            after = sum(one.memory_info().rss for one in everyone)
            assert after - before < 64 * 1024 * 1024


def test_no_more_is_read_of_a_client_that_does_not_read(
    house: tuple[Proxy, Path], boss: Connection
) -> None:
    _, folder = house
    message = Query(b"'" + b"x" * 9_000 + b"'").serialize()  # refused, with a long HINT
    with Wire(f"{folder}/.s.PGSQL.7777", user="watcher", database=DATABASE) as wire:
        wire.socket.setblocking(False)
        sent, most = 0, 100 * 1024 * 1024
        while sent < most and select.select([], [wire.socket], [], 3.0)[1]:
            with contextlib.suppress(BlockingIOError):
                rest = sent % len(message)
                sent += wire.socket.send(message[rest:])
        assert sent < most
        assert show(boss, "VERSION")


def test_a_client_that_leaves_in_the_middle(house: tuple[Proxy, Path], boss: Connection) -> None:
    _, folder = house
    for _ in range(20):
        with Wire(f"{folder}/.s.PGSQL.7777", user="x", database=DATABASE) as wire:
            wire.send(Query(b"SHOW JOBS;" * 100).serialize())
            wire.message()
            wire.reset()
    wait_until(lambda: [row["user"] for row in consoles(boss)] == ["boss"])


def consoles(conn: Connection) -> list[dict[str, Any]]:
    return [row for row in show(conn, "SESSIONS") if row["state"] == "console"]


async def test_many_at_once_see_the_same(house: tuple[Proxy, Path]) -> None:
    _, folder = house

    async def look() -> list[str]:
        conn = await asyncpg.connect(host=str(folder), port=7777, user="x", database=DATABASE)
        try:
            return [row["key"] for _ in range(5) for row in await conn.fetch("SHOW CONFIG")]
        finally:
            await conn.close()

    found = await asyncio.gather(*(look() for _ in range(10)))
    assert all(keys == [field.name for field in SETTINGS] * 5 for keys in found)


def test_an_error_has_all_its_fields(house: tuple[Proxy, Path]) -> None:
    _, folder = house
    with Wire(f"{folder}/.s.PGSQL.7777", user="x", database=DATABASE) as wire:
        error: ErrorResponse = error_of(wire.query("SELECT 1"))
    assert error.fields["S"] == error.fields["V"] == b"ERROR"
    assert error.fields["M"] == b'invalid command "SELECT 1"'
    assert error.fields["H"].startswith(b"The commands are: SHOW HELP|JOBS|")
