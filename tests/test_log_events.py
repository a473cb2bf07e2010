"""What the log says of jobs and clients, as text and as JSON; and what it never says."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy import log
from proxy.log import Event, Milliseconds
from tests.conftest import StartProxy, upstream_of
from tests.support.background import launch, message, run, wait_until
from tests.support.certificates import Certificates
from tests.support.executors import executors
from tests.support.servers import (
    PASSWORDS,
    Connection,
    Proxy,
    Server,
    run_program,
)

LABELLED = "SELECT pid FROM pg_background_launch(%s, 0, %s)"
HOSTILE = 'a" state=stopped\n2026-11-30 12:00:00.000 UTC [1] LOG:  job ended: \\\t\x1b[2J\u202e'
PORT = re.compile(r"port=\d+")


def objects(proxy: Proxy) -> list[dict[str, Any]]:
    """The events of a log in JSON."""
    return [json.loads(line) for line in proxy.log.splitlines()]


def ends(proxy: Proxy) -> list[dict[str, Any]]:
    """The ends of jobs in a log in JSON."""
    return [said for said in objects(proxy) if said.get("event") == "job ended"]


def end_of(proxy: Proxy, pid: int) -> dict[str, Any]:
    """The end of a job, which may have been longer ago for others than for the log."""
    return wait_until(lambda: next((s for s in ends(proxy) if s["backend_pid"] == pid), {}))


@pytest.fixture
def granted(server: Server) -> Iterator[None]:
    """The roles with passwords may launch jobs."""
    with server.connect() as conn, executors(conn, *PASSWORDS):
        yield


# Jobs


@pytest.mark.every_server
@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("SELECT generate_series(1, 3)", {"state": "stopped", "rows": 3}),
        ("CREATE TEMP TABLE t (n int)", {"state": "stopped"}),
        (
            "CREATE TEMP TABLE t (n int); INSERT INTO t VALUES (1), (2)",
            {"state": "stopped", "rows": 2},
        ),
        ("SELECT 1; SELECT 1/0", {"state": "error", "state_code": "22012"}),
        ("COMMIT", {"state": "error", "state_code": "0A000"}),
        (
            "SELECT pg_terminate_backend(pg_backend_pid())",
            {"state": "error", "state_code": "08006"},
        ),
    ],
)
def test_the_end_of_a_job_is_logged(
    server: Server, start_proxy: StartProxy, job: str, expected: dict[str, Any]
) -> None:
    proxy = start_proxy("--log-format", "json")
    with proxy.connect() as conn:
        pid = launch(conn, job)
        said = end_of(proxy, pid)
    assert said.pop("duration_ms") >= 0
    assert set(said) >= {"timestamp", "pid", "message"}
    for key in ("timestamp", "pid", "message", "event"):
        del said[key]
    assert said == {
        "error_severity": "LOG",
        "backend_pid": pid,
        "user": "postgres",
        "dbname": "postgres",
        **expected,
    }


def test_the_same_as_text(start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    with proxy.connect() as conn:
        pid = launch(conn, "SELECT generate_series(1, 3)")
        failed = launch(conn, "SELECT 1/0")
    form = r" LOG:  job ended: pid=%d user=postgres database=postgres state=%s duration=%s %s$"
    duration = r"\d+\.\d{3}ms"
    proxy.wait_for_log(form % (pid, "stopped", duration, "rows=3"))
    proxy.wait_for_log(form % (failed, "error", duration, "sqlstate=22012"))
    assert "job launched" not in proxy.log  # that is for the level debug


def test_a_cancelled_job_and_one_that_the_proxy_leaves_behind(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--log-format", "json", "--shutdown-timeout", "0")
    with proxy.connect() as conn:
        pid, cookie = conn.execute(
            "SELECT * FROM pg_background_launch_v2('SELECT pg_sleep(60)')"
        ).fetchone() or (0, 0)
        conn.execute("SELECT pg_background_cancel_v2(%s, %s)", [pid, cookie])
        said = end_of(proxy, pid)
        assert (said["state"], said["state_code"]) == ("canceled", "57014")
        left = launch(conn, "SELECT pg_sleep(60)")
        assert proxy.stop() == 0
    assert end_of(proxy, left)["state"] in ("abandoned", "canceled")


def test_which_jobs_are_logged(start_proxy: StartProxy) -> None:
    quick, failing, long = "SELECT 1", "SELECT 1/0", "SELECT 1 FROM pg_sleep(0.3)"
    for threshold, expected in (
        ("-1", []),
        ("300", [failing, long]),
        ("1h", [failing]),
        ("0", [quick, failing, long]),
    ):
        proxy = start_proxy(
            *("--log-min-job-duration", threshold, "--log-job-sql", "on", "--log-format", "json")
        )
        with proxy.connect() as conn:
            for job in (quick, failing, long):
                pid = launch(conn, job)
                try:
                    conn.execute("SELECT pg_background_result(%s)", [pid])
                except psycopg.errors.DivisionByZero:
                    assert job == failing
        assert proxy.stop() == 0
        assert [said["statement"] for said in ends(proxy)] == expected, threshold


def test_the_start_of_a_job_is_logged_at_debug(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--log-format", "json", "--log-level", "debug")
    with proxy.connect() as conn:
        pid = launch(conn, "SELECT 1")
        end_of(proxy, pid)
    events = [said for said in objects(proxy) if said.get("backend_pid") == pid]
    assert [said["event"] for said in events] == ["job launched", "job ended"]
    assert events[0]["error_severity"] == "DEBUG"


def test_sql_is_logged_only_if_that_was_asked_for(start_proxy: StartProxy) -> None:
    job = f"SELECT 'first', '{'x' * 200} last'"
    for switch in ("off", "on"):
        proxy = start_proxy("--log-job-sql", switch, "--log-level", "debug")
        with proxy.connect() as conn:
            run(conn, job, "a text, b text")
        assert proxy.stop() == 0
        assert ("first" in proxy.log) == (switch == "on")
        assert "last" not in proxy.log


@pytest.mark.parametrize("label", [HOSTILE, "nightly", "two words", "päß 漢字", "=", "it's"])
def test_a_label_is_one_value_whatever_it_is(start_proxy: StartProxy, label: str) -> None:
    for form in ("text", "json"):
        proxy = start_proxy("--log-format", form)
        with proxy.connect() as conn:
            [pid] = conn.execute(LABELLED, ["SELECT 1", label]).fetchone() or [0]
        proxy.wait_for_log("job ended")
        assert proxy.stop() == 0
        if form == "json":
            assert end_of(proxy, pid)["label"] == label
            assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", proxy.log)
            continue
        [line] = [line for line in proxy.log.splitlines() if "job ended" in line]
        said = re.search(r' label=("(?:[^"\\]|\\.)*"|\S+) user=postgres ', line)
        assert said is not None
        assert unquoted(said[1]) == label
        assert not re.search("[\x00-\x1f\u202e]", line)


def unquoted(word: str) -> str:
    if not word.startswith('"'):
        return word
    escapes = {"n": "\n", "t": "\t"}
    return re.sub(
        r"\\(?:x(..)|u(....)|(.))",
        lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else escapes.get(m[3], m[3]),
        word[1:-1],
    )


# Clients


@pytest.fixture
def chatty(server: Server) -> Iterator[Server]:
    """The server, which logs connections itself."""
    settings = ("log_connections", "log_disconnections")
    with server.connect() as conn:
        for name in settings:
            conn.execute(f"ALTER SYSTEM SET {name} = on")
    server.cluster.reload()
    yield server
    with server.connect() as conn:
        for name in settings:
            conn.execute(f"ALTER SYSTEM RESET {name}")
    server.cluster.reload()


def words(lines: str) -> list[str]:
    """What a log says of connections, less what differs each time and what only we say."""
    found = re.findall(r"LOG:  ((?:replication )?(?:dis)?connection.*)", lines)
    found = [line for line in found if "authenticated" not in line]
    masked = [re.sub(r"\d+:\d\d:\d\d\.\d{3}", "TIME", PORT.sub("port=N", line)) for line in found]
    return [re.sub(r"(authorized.*?) host=\S+( port=N)? pid=\d+$", r"\1", line) for line in masked]


@pytest.mark.every_server
@pytest.mark.parametrize(
    "parameters",
    [
        {"application_name": "psql"},
        {"application_name": ""},
        {"user": "alice", "dbname": "template1"},
        {"replication": "true"},
        {"replication": "database", "application_name": "standby"},
        {"host": "socket"},
    ],
    ids=lambda given: "-".join(given.values()) or "none",
)
def test_connections_are_logged_in_postgresqls_words(
    chatty: Server, start_proxy: StartProxy, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    proxy = start_proxy(
        *("--log-connections", "on", "--log-disconnections", "on", "--spares", "0"),
        *("--listen", f"{tmp_path}:{chatty.port}"),
    )
    proxy.wait_for_log("Unix socket")
    directly, through = dict(parameters), dict(parameters)
    if "host" in parameters:
        directly["host"], through["host"] = chatty.socket_dir, str(tmp_path)
        through["port"] = str(chatty.port)
    start = chatty.cluster.log_size()
    chatty.connect(**directly).close()
    wait_until(lambda: "disconnection:" in chatty.log(start))
    expected = words(chatty.log(start))
    proxy.connect(**through).close()
    proxy.wait_for_log("disconnection:")
    assert words(proxy.log) == expected
    assert len(expected) == 3


def test_tls_is_logged_in_postgresqls_words(
    tls_server: Server, start_proxy: StartProxy, certificates: Certificates
) -> None:
    with tls_server.connect() as conn:
        conn.execute("ALTER SYSTEM SET log_connections = on")
    tls_server.cluster.reload()
    tls_server.connect(sslmode="require").close()
    said = re.compile(r"authorized: \S+ \S+ (SSL enabled \(.*?\))")
    theirs = wait_until(lambda: said.search(tls_server.log()))
    assert theirs is not None
    proxy = start_proxy(
        *("--log-connections", "on", "--client-tls-sslmode", "require"),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
    )
    proxy.connect(sslmode="require").close()
    assert proxy.wait_for_log(said.pattern)[1] == theirs[1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_session_has_the_servers_pid_and_the_clients_address(
    start_proxy: StartProxy, workers: str
) -> None:
    proxy = start_proxy(
        *("--log-connections", "on", "--log-disconnections", "on"),
        *("--log-format", "json", "--workers", workers),
    )
    with proxy.connect(user="alice") as conn:
        pid = conn.execute("SELECT pg_backend_pid()").fetchone()
        port = conn.pgconn.socket
    proxy.wait_for_log("disconnection")
    assert port
    assert proxy.stop() == 0
    events = [said for said in objects(proxy) if "event" in said and said["event"] != "job ended"]
    received, authorized, ended = (
        next(said for said in events if said["event"] == event and said["remote_port"] == peer)
        for peer in [next(said["remote_port"] for said in events if said.get("user") == "alice")]
        for event in ("connection received", "connection authorized", "disconnection")
    )
    assert (authorized["backend_pid"],) == pid
    assert received["remote_host"] == authorized["remote_host"] == "127.0.0.1"
    assert (ended["user"], ended["dbname"]) == ("alice", "postgres")
    assert ended["duration_ms"] > 0
    assert ("process" in received) == (workers == "2")
    if workers == "2":
        names = {said["process"] for said in objects(proxy)}
        assert names == {"supervisor", "worker 1", "worker 2"}


@pytest.mark.every_server
@pytest.mark.parametrize(
    ("parameters", "sqlstate"),
    [
        ({"user": "pw_scram", "password": "not it"}, "28P01"),
        ({"user": "pw_md5", "password": "not it"}, "28P01"),
        ({"user": "nobody here"}, "28000"),
        ({"dbname": "no_such"}, "3D000"),
        ({"dbname": "template0"}, "55000"),
    ],
)
def test_who_is_refused_is_logged(
    start_proxy: StartProxy, parameters: dict[str, Any], sqlstate: str
) -> None:
    proxy = start_proxy("--log-connections", "on", "--log-disconnections", "on")
    with pytest.raises(psycopg.OperationalError):
        proxy.connect(**parameters)
    user = parameters.get("user", "postgres")
    said = proxy.wait_for_log("connection refused: (.*)")[1]
    quoted = f'"{user}"' if " " in user else user
    assert said.startswith(
        f"user={quoted} database={parameters.get('dbname', 'postgres')} host=127"
    )
    assert said.endswith(f" sqlstate={sqlstate}")
    assert proxy.stop() == 0
    assert "disconnection" not in proxy.log
    assert "authorized" not in proxy.log


def test_who_says_nothing_or_leaves_by_itself_is_not_refused(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--log-connections", "on", "--log-disconnections", "on")
    with socket.create_connection(("127.0.0.1", proxy.port)):
        pass
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        proxy.connect(user="pw_scram")
    wait_until(lambda: proxy.log.count("connection received") == 2)
    assert proxy.stop() == 0
    assert "connection refused" not in proxy.log
    assert "disconnection" not in proxy.log


def test_nothing_of_clients_is_logged_by_default(start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    proxy.connect().close()
    with pytest.raises(psycopg.OperationalError):
        proxy.connect(user="pw_scram", password="not it")
    assert proxy.stop() == 0
    assert "connection" not in proxy.log


# The form


def test_every_line_is_an_object_also_of_the_last_words(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy("--log-format", "json", "--log-level", "debug", "--log-connections", "on")
    with proxy.connect() as conn:
        run(conn, "SELECT 1", "n int")
    assert proxy.stop() == 0
    assert len(objects(proxy)) > 5
    done = run_program(
        *("serve", "--listen", f"127.0.0.1:{server.port}"),
        *("--upstream", upstream_of(server), "--log-format", "json"),
    )
    assert done.returncode == 1
    *_, last = map(json.loads, done.stderr.splitlines())
    assert last["error_severity"] == "FATAL"
    assert "cannot listen" in last["message"]


def test_keys_are_those_of_the_servers_own_json(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Where both say the same thing, under the same key and with a value of the same form."""
    if server.version < 150000:
        pytest.skip("this PostgreSQL has no jsonlog")
    with server.connect() as conn:
        for name, value in (
            ("log_connections", "on"),
            ("log_destination", "jsonlog"),
            ("log_filename", "json_test"),
        ):
            conn.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        conn.execute("ALTER SYSTEM SET logging_collector = on")
    try:
        server.restart()
        server.connect(application_name="it").close()
        file = server.cluster.directory / "data" / "log" / "json_test.json"
        theirs = wait_until(lambda: connection_events(file.read_text()))
    finally:
        with server.connect() as conn:
            conn.execute("ALTER SYSTEM RESET ALL")
        server.restart()
    proxy = start_proxy("--log-connections", "on", "--log-format", "json")
    proxy.connect(application_name="it").close()
    ours = wait_until(lambda: connection_events(proxy.log))
    assert set(ours) == set(theirs)
    for what, said in ours.items():
        for key, value in said.items():
            if key in ("process", "event", "backend_pid"):
                continue
            if key == "application_name":  # PostgreSQL knows it a moment later
                assert value == "it"
            else:
                assert form(value) == form(theirs[what][key]), key


def connection_events(lines: str) -> dict[str, dict[str, Any]]:
    """The two events of the client ``it``, by their first two words."""
    said = [json.loads(line) for line in lines.splitlines()]
    authorized = [one for one in said if "application_name=it" in one["message"]]
    if not authorized:
        return {}
    port = authorized[0]["remote_port"]
    events = [one for one in said if one.get("remote_port") == port]
    found = {" ".join(one["message"].split()[:2]): one for one in events}
    return {what: found[what] for what in ("connection received:", "connection authorized:")}


def form(value: object) -> str:
    """A value with its digits made the same."""
    if isinstance(value, int):
        return "a number"
    text = re.sub(r" host=\S+ port=\S+ pid=\S+$", "", str(value))
    return re.sub(r"\d+", "0", text)


def test_no_control_character_stands_in_the_json_log() -> None:
    text = " ".join(map(chr, range(0x110000)))  # two surrogates side by side would be another one
    event = Event("job ended", {"label": text, "duration": Milliseconds(1.5), "rows": None})
    record = logging.LogRecord("proxy", logging.INFO, "", 0, event, (), None)
    said = log.JsonFormatter("worker 1").format(record)
    assert not log._HARMFUL.search(said)
    assert "\n" not in said
    assert "\t" not in said
    kept = json.loads(said)
    assert kept["label"] == text
    assert kept["duration_ms"] == 1.5
    assert "rows" not in kept
    assert kept["process"] == "worker 1"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_reload_changes_what_is_logged(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("log_min_job_duration = -1")
    proxy = start_proxy("--config", str(file), "--workers", workers)
    with proxy.connect() as conn:
        run(conn, "SELECT 1", "n int")
        file.write_text('log_format = "json"\nlog_job_sql = "on"\nlog_level = "debug"')
        os.kill(proxy.pid, signal.SIGHUP)
        proxy.wait_for_log("was read again")
        wait_until(lambda: seen(conn, proxy))
    assert proxy.stop() == 0
    lines = proxy.log.splitlines()
    assert not any("job ended" in line for line in lines if not line.startswith("{"))


def seen(conn: Connection, proxy: Proxy) -> bool:
    """Whether the end of a job is logged with its SQL; a worker is told of a reload later."""
    run(conn, "SELECT 2", "n int")
    return '"statement":"SELECT 2"' in proxy.log


# Secrets


@pytest.mark.usefixtures("granted")
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("source", ["passwords", "secrets", "auth_query", "plain"])
def test_no_secret_is_logged_at_any_level(
    server: Server, start_proxy: StartProxy, tmp_path: Path, form: str, source: str
) -> None:
    with server.connect() as direct:
        found: dict[str, str] = dict(
            direct.execute(
                "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = ANY(%s)",
                [list(PASSWORDS)],
            ).fetchall()
        )
    file = tmp_path / "users"
    file.touch(mode=0o600)
    known = found if source == "secrets" else PASSWORDS
    options = ["--auth-file", str(file)]
    if source == "auth_query":
        options = ["--auth-user", "postgres"]
    elif source == "plain":
        options = ["--auth-type", "plain"]
    file.write_text("".join(f'"{role}" "{secret}"\n' for role, secret in known.items()))
    proxy = start_proxy(
        *options,
        *("--log-level", "debug", "--log-format", form),
        *("--log-connections", "on", "--log-disconnections", "on"),
    )
    hidden = "bind-parameter-4711"
    table = "SELECT 'a table' WHERE 'bind-parameter-4711' = 'x' OR 1/0 > 0"
    for role, password in PASSWORDS.items():
        with pytest.raises(psycopg.OperationalError):
            proxy.connect(user=role, password="mistyped-4711")
        with proxy.connect(user=role, password=password) as conn:
            assert conn.execute("SELECT %s::text", [hidden]).fetchone() == (hidden,)
            launch(conn, f"SELECT '{hidden}'")
            launch(conn, table)
            failed = launch(conn, f"SELECT '{hidden}'::int")
            with pytest.raises(psycopg.Error) as caught:
                conn.execute("SELECT * FROM pg_background_result(%s) AS (n int)", [failed])
            assert hidden in str(message(caught.value))
            conn.execute(
                "SELECT pg_background_launch_v2(%s)", [f"ALTER ROLE x PASSWORD '{hidden}'"]
            )
            words = conn.execute("SELECT current_setting('pg_background_proxy.session')").fetchone()
            assert words is not None
        for secret in (words[0][:32], words[0][32:]):
            assert secret not in proxy.log
    assert proxy.stop() == 0
    secrets = {hidden, "mistyped-4711", *PASSWORDS.values(), *found.values()}
    for secret in found.values():
        secrets |= set(re.split(r"[$:]", secret)[-2:]) if secret.startswith("SCRAM") else {secret}
    assert len(secrets) > 9
    assert [secret for secret in secrets if secret in proxy.log] == []
    for event, count in (
        ("job ended", 12),
        ("connection authorized", 3),
        ("connection refused", 3),
    ):
        assert proxy.log.count(f"{event}: ") == count


def test_many_at_once_do_not_mix_their_lines(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--log-format", "json", "--log-connections", "on", "--workers", "2")

    def work() -> None:
        with proxy.connect() as conn:
            for _ in range(20):
                run(conn, "SELECT 1", "n int")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert proxy.stop() == 0
    assert len(ends(proxy)) == 80
