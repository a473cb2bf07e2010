"""``/metrics``, ``/healthz`` and ``/readyz``: what they say, beside what really happened.

Prometheus's own client library reads the metrics, for one process and for several.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
import pytest

from proxy.admin.metrics import MAX_LOGINS, Exposition
from proxy.admin.source import Processes
from proxy.config import Config
from proxy.runtime import Runtime
from proxy.stats import OTHER, Counters, error_class, total
from proxy.workers.all_workers import AllWorkers
from proxy.workers.bus import WorkerPipe
from proxy.workers.messages import SUPERVISOR, Answer
from tests.conftest import StartProxy, shared_proxy, upstream_of
from tests.support.background import launch, run, wait_until
from tests.support.http import OPENMETRICS, PREFIX, Metrics, address, ask, families, read
from tests.support.servers import (
    REPOSITORY,
    Connection,
    Proxy,
    Server,
    run_program,
)

ADMIN: Final = ("--admin-listen", "127.0.0.1:0")

DEPLOY: Final = REPOSITORY / "deploy"


@pytest.fixture(scope="module", params=["1", "2"])
def watched(server: Server, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy with metrics, of one process and of two."""
    options = (*ADMIN, "--workers", request.param, "--spare-lifetime", "60s")
    with shared_proxy(upstream_of(server), *options) as proxy:
        yield proxy


def endless(conn: Connection) -> tuple[int, int]:
    """Launches a job that has to be cancelled; its handle."""
    row = conn.execute(
        "SELECT (pg_background_launch_v2('SELECT pg_sleep(60)')).*", binary=True
    ).fetchone()
    assert row is not None
    return row[0], row[1]


@contextlib.contextmanager
def job_in_each(proxy: Proxy, dbname: str) -> Iterator[None]:
    """A session in each of two workers, which has run a job."""
    with proxy.connect(dbname=dbname) as one, proxy.connect(dbname=dbname) as two:
        for conn in (one, two):
            run(conn, "SELECT 1")
        yield


def cancel(conn: Connection, handle: tuple[int, int]) -> None:
    conn.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)


def test_numbers_are_those_of_the_jobs_that_were_run(watched: Proxy, scratch: str) -> None:
    before = Metrics(watched)
    login = {"role": "postgres", "database": scratch}
    ended = "jobs_ended_total"

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    # With two processes: a session in each.
    with watched.connect(dbname=scratch) as one, watched.connect(dbname=scratch) as two:
        for conn in (one, two):
            run(conn, "SELECT 1")
            with pytest.raises(psycopg.errors.DivisionByZero):
                run(conn, "SELECT 1/0")
        jobs = [(conn, endless(conn)) for conn in (one, two, two)]
        after = Metrics(watched)
        assert after("jobs_running", **login) == 3
        assert after("sessions") == 2
        assert grown("jobs_launched_total") == 7
        assert grown("launch_latency_seconds_count") == 7
        assert 0 < grown("launch_latency_seconds_sum") < 7 * 20
        assert grown(ended, state="stopped", sqlstate_class="") == 2
        assert grown(ended, state="error", sqlstate_class="22") == 2
        assert grown("job_duration_seconds_count") == 4

        for conn, handle in jobs:
            cancel(conn, handle)
        wait_until(lambda: Metrics(watched)("jobs_running", **login) == 0)
        after = Metrics(watched)
        assert grown(ended, state="canceled", sqlstate_class="57") == 3
        assert grown("job_duration_seconds_count") == 7
    wait_until(lambda: Metrics(watched)("sessions") == 0)
    assert Metrics(watched)("client_connections_total") - before("client_connections_total") == 2


def test_launches_that_fail_are_counted(watched: Proxy, scratch: str) -> None:
    before = Metrics(watched)
    with watched.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.max_workers = 1")
        handle = endless(conn)
        with pytest.raises(psycopg.errors.ConfigurationLimitExceeded):
            launch(conn, "SELECT 1")
        cancel(conn, handle)
    after = Metrics(watched)
    name = "launches_failed_total"
    assert after(name, sqlstate_class="53") - before(name, sqlstate_class="53") == 1


def test_bytes_are_counted_each_way(watched: Proxy, scratch: str) -> None:
    size = 1_000_000
    text = "x" * size

    def grown(source: str) -> float:
        name = "received_bytes_total"
        return after(name, source=source) - before(name, source=source)

    with watched.connect(dbname=scratch) as conn:
        before = Metrics(watched)
        conn.execute("SELECT length(%s)", [text])
        after = Metrics(watched)
        assert size < grown("clients") < 1.01 * size
        assert 0 < grown("servers") < 0.01 * size

        before = after
        conn.execute("SELECT repeat('x', %s)", [size])
        after = Metrics(watched)
        assert size < grown("servers") < 1.01 * size
        assert 0 < grown("clients") < 0.01 * size

        # A call is taken out of the stream and back into it: nothing counts twice.
        before = after
        conn.execute("SELECT pg_background_launch(%s), length(%s)", ["SELECT 1", text])
        after = Metrics(watched)
        assert size < grown("clients") < 1.01 * size

        before = after
        run(conn, f"SELECT repeat('x', {size})")
        after = Metrics(watched)
        assert size < grown("jobs") < 1.01 * size
        assert grown("servers") < 0.01 * size


def test_spares_and_channels_are_counted(watched: Proxy, scratch: str) -> None:
    with watched.connect(dbname=scratch) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: Metrics(watched)("spares", state="ready") >= 2)
        conn.execute("CREATE EXTENSION pg_background")
        conn.execute("DO $$ BEGIN PERFORM pg_background_stats(); END $$")
        wait_until(lambda: Metrics(watched)("channels", state="idle") >= 1)
        conn.execute("DROP EXTENSION pg_background")


def test_logins_that_are_refused_are_counted(watched: Proxy) -> None:
    before = Metrics(watched)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        watched.connect(dbname="no such database")
    name = "logins_refused_total"
    refused = before(name, sqlstate_class="3D") + 1
    wait_until(lambda: Metrics(watched)(name, sqlstate_class="3D") == refused)
    name = "upstream_connects_total"
    assert Metrics(watched)(name) > before(name)


def test_the_processes_and_the_build_are_named(watched: Proxy) -> None:
    metrics = Metrics(watched)
    [(labels, value)] = metrics.all("build_info").items()
    assert dict(labels).keys() == {"version", "python", "event_loop"}
    assert value == 1
    assert metrics("ready") == 1
    configured = metrics("worker_processes_configured")
    assert metrics("worker_processes") == configured
    assert configured == max(1, len(psutil.Process(watched.pid).children()))
    wait_until(lambda: Metrics(watched)("event_loop_lag_seconds_count") >= 4)


def test_every_series_has_a_help_text_and_a_type_that_fits(watched: Proxy) -> None:
    for name, family in families(watched).items():
        assert family.documentation.endswith("."), name
        assert family.type in ("counter", "gauge", "histogram", "info"), name


def test_without_openmetrics_the_older_format_is_served(watched: Proxy) -> None:
    answer = ask(f"{address(watched)}/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert f"{PREFIX}jobs_launched_total " in answer.text


def test_a_name_of_any_characters_is_one_label(watched: Proxy, server: Server) -> None:
    name = 'a"b\\c\nd {e="f"} 1'
    with server.connect() as conn:
        conn.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    try:
        with watched.connect(dbname=name) as conn:
            handle = endless(conn)
            running = Metrics(watched)("jobs_running", role="postgres", database=name)
            cancel(conn, handle)
        assert running == 1
    finally:
        with server.connect() as conn:
            dropped = psycopg.sql.SQL("DROP DATABASE {} WITH (FORCE)")
            conn.execute(dropped.format(psycopg.sql.Identifier(name)))


def test_what_a_killed_worker_has_counted_stays_counted(
    start_proxy: StartProxy, scratch: str
) -> None:
    proxy = start_proxy(*ADMIN, "--workers", "2")
    with job_in_each(proxy, scratch):
        pass
    assert Metrics(proxy)("jobs_launched_total") == 2
    for worker in psutil.Process(proxy.pid).children():
        worker.send_signal(signal.SIGKILL)
    wait_until(lambda: Metrics(proxy)("worker_restarts_total") == 2)
    wait_until(lambda: Metrics(proxy)("worker_processes") == 2)
    assert Metrics(proxy)("jobs_launched_total") == 2
    with proxy.connect(dbname=scratch) as conn:
        run(conn, "SELECT 1")
    assert Metrics(proxy)("jobs_launched_total") == 3


def test_what_a_drained_worker_has_counted_stays_counted(
    start_proxy: StartProxy, scratch: str
) -> None:
    """Also what it has counted since it was last asked."""
    proxy = start_proxy(*ADMIN, "--workers", "2")
    with job_in_each(proxy, scratch):
        for worker in psutil.Process(proxy.pid).children():
            worker.send_signal(signal.SIGTERM)
    wait_until(lambda: Metrics(proxy)("worker_restarts_total") == 2)
    assert Metrics(proxy)("jobs_launched_total") == 2


@dataclass
class SomeWorker:
    """What `AllWorkers` sees of one."""

    serial: int
    pipe: WorkerPipe
    hangs: bool = False
    answers: bool = True
    serves: bool = True


async def test_a_worker_that_ends_while_others_are_asked_is_counted_once() -> None:
    ends = socket.socketpair()
    pipe = await WorkerPipe.over(ends[0], lambda _: None)
    workers = {number: SomeWorker(number, pipe) for number in (1, 2)}
    everything = AllWorkers(workers.values, 2, lambda: False, Runtime(Config()))

    def answer(worker: int, number: int, launched: int) -> None:
        counted = Counters()
        counted.launched = launched
        figures = {"counters": counted.figures(), "gauges": {}}
        everything.answered(worker, Answer(number, SUPERVISOR, figures))

    asking = asyncio.create_task(everything.figures())
    await asyncio.sleep(0)
    answer(1, number=1, launched=1)
    answer(1, number=0, launched=2)
    del workers[1]
    everything.gone(1)
    answer(2, number=1, launched=1)
    assert (await asking)["counters"]["launched"] == 3
    del workers[2]
    everything.gone(2)
    assert (await everything.figures())["counters"]["launched"] == 3
    ends[1].close()
    await pipe.lost


def test_a_worker_that_hangs_is_not_waited_for_and_not_forgotten(
    start_proxy: StartProxy, scratch: str
) -> None:
    proxy = start_proxy(*ADMIN, "--workers", "2")
    with job_in_each(proxy, scratch):
        assert Metrics(proxy)("sessions") == 2
        hanging = psutil.Process(proxy.pid).children()[0]
        hanging.suspend()
        try:
            wait_until(lambda: Metrics(proxy)("worker_processes_silent") == 1)
            metrics = Metrics(proxy)
            assert metrics("jobs_launched_total") == 2
            assert metrics("sessions") == 2
            assert ask(f"{address(proxy)}/readyz").status == 200
        finally:
            hanging.resume()
    wait_until(lambda: Metrics(proxy)("worker_processes_silent") == 0)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ready_is_who_can_be_logged_in_to(
    start_proxy: StartProxy, server: Server, workers: str
) -> None:
    own = Server(server.bin)
    try:
        proxy = start_proxy(*ADMIN, "--workers", workers, upstream=upstream_of(own))
        url = address(proxy)
        wait_until(lambda: ask(f"{url}/readyz")[::2] == (200, b"ready\n"))
        own.cluster.stop()
        wait_until(lambda: ask(f"{url}/readyz").status == 503)
        assert ask(f"{url}/readyz").text == "the server cannot be reached\n"
        assert ask(f"{url}/healthz")[::2] == (200, b"ok\n")
        metrics = Metrics(proxy)
        assert metrics("ready") == 0
        assert metrics("upstream_connect_failures_total") > 0 or workers == "2"
        own.cluster.start()
        wait_until(lambda: ask(f"{url}/readyz").status == 200)
    finally:
        own.close()


def test_a_server_that_has_no_room_is_not_ready(start_proxy: StartProxy, server: Server) -> None:
    own = Server(server.bin)
    try:
        with own.connect() as conn:
            conn.execute("CREATE ROLE watcher LOGIN CONNECTION LIMIT 0")
        proxy = start_proxy(*ADMIN, "--auth-user", "watcher", upstream=upstream_of(own))
        answer = ask(f"{address(proxy)}/readyz")
        assert answer[::2] == (503, b"the server takes no logins (53300)\n")
        with own.connect() as conn:
            conn.execute("ALTER ROLE watcher CONNECTION LIMIT 10")
        wait_until(lambda: ask(f"{address(proxy)}/readyz").status == 200)
    finally:
        own.close()


def test_who_shuts_down_is_healthy_and_not_ready(start_proxy: StartProxy, scratch: str) -> None:
    proxy = start_proxy(*ADMIN, "--shutdown-timeout", "60s")
    url = address(proxy)
    with proxy.connect(dbname=scratch) as conn:
        os.kill(proxy.pid, signal.SIGTERM)
        wait_until(lambda: ask(f"{url}/readyz").status == 503)
        assert ask(f"{url}/readyz").text == "the proxy is shutting down\n"
        assert ask(f"{url}/healthz").status == 200
        assert Metrics(proxy)("sessions") == 1
        conn.execute("SELECT 1")
    assert proxy.wait() == 0


def test_nothing_is_served_unless_it_is_asked_for(proxy: Proxy) -> None:
    with proxy.connect() as conn:
        conn.execute("SELECT 1")
    assert "serving metrics" not in proxy.log
    listening = [
        found.laddr.port
        for process in (psutil.Process(proxy.pid), *psutil.Process(proxy.pid).children())
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    ]
    assert listening == [proxy.port]


def refusal(*options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code and the words of a proxy that does not start."""
    found = run_program(
        *("serve", "--listen", "127.0.0.1:0"),
        *("--upstream", "host=127.0.0.1 port=1", *options),
        env=env,
    )
    return found.returncode, found.stderr.splitlines()[-1]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("missing", ["aiohttp", "prometheus_client"])
def test_without_the_extra_the_start_says_what_to_install(
    tmp_path: Path, missing: str, workers: str
) -> None:
    said = f'raise ModuleNotFoundError("No module named {missing!r}")\n'
    (tmp_path / f"{missing}.py").write_text(said)
    code, words = refusal(*ADMIN, "--workers", workers, env={"PYTHONPATH": str(tmp_path)})
    assert code == 2
    assert words == (
        f"pg-background-proxy: error: admin_listen: needs the extra admin (No module named"
        f" '{missing}'): pip install 'pg-background-proxy[admin]'"
    )


def test_an_address_that_is_taken_is_an_error_of_one_line(watched: Proxy) -> None:
    taken = address(watched).removeprefix("http://")
    code, words = refusal("--admin-listen", taken)
    assert code == 1
    assert words == f"pg-background-proxy: error: cannot listen on {taken}: Address already in use"


@pytest.mark.parametrize("setting", ["--admin-users", "--stats-users"])
def test_users_without_their_passwords_are_an_error(setting: str) -> None:
    code, words = refusal(*ADMIN, setting, "alice")
    assert code == 2
    assert words == (
        f"pg-background-proxy: error: {setting[2:].replace('-', '_')}: needs auth_file, which has"
        " their passwords or secrets"
    )


# How many there can be


def exposed(running: dict[str, dict[str, int]], exposition: Exposition) -> Any:
    counted = Counters().figures()
    states = {"ready": 0, "opening": 0}, {"idle": 0, "lent": 0}
    gauges = {"running": running, "waiting": {}, "sessions": 0}
    gauges |= {"spares": states[0], "channels": states[1]}
    body, _ = exposition.write(
        {"counters": counted, "gauges": gauges},
        Processes(alive=1, configured=1, silent=0, restarts=0),
        is_ready=True,
        accept=OPENMETRICS,
    )
    return {
        (sample.labels["role"], sample.labels["database"]): sample.value
        for sample in read(body)[f"{PREFIX}jobs_running"].samples
    }


def test_roles_and_databases_make_a_bounded_number_of_series() -> None:
    exposition = Exposition()
    first = {f"role{n}": {"db": 1} for n in range(MAX_LOGINS)}
    assert len(exposed(first, exposition)) == MAX_LOGINS
    many = {f"other{n}": {"db1": 2, "db2": 1} for n in range(1000)}
    found = exposed(many | {"role7": {"db": 5}}, exposition)
    assert len(found) == MAX_LOGINS + 1
    assert found[OTHER, OTHER] == 3000
    assert found["role7", "db"] == 5
    assert found["role8", "db"] == 0


def test_sqlstates_that_code_makes_up_are_other() -> None:
    assert error_class("22012") == "22"
    assert error_class(None) == ""
    assert error_class("ZZZZZ") == OTHER
    assert error_class("") == OTHER


def test_figures_of_processes_are_added_up() -> None:
    first, second = Counters(), Counters()
    first.job_ended("error", "22012", 0.2)
    second.job_ended("error", "22012", 0.3)
    second.job_ended("stopped", None, 1e9)
    second.connections = 7
    found = total(json.loads(json.dumps(c.figures())) for c in (first, second))
    assert found["ended"] == {"error": {"22": 2}, "stopped": {"": 1}}
    assert sum(found["duration"]["counts"]) == 3
    assert found["duration"]["counts"][2] == 2
    assert found["duration"]["counts"][-1] == 1
    assert found["duration"]["sum"] == pytest.approx(1e9 + 0.5)
    assert found["connections"] == 7


# What is made for them


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-alerts.yaml"])
def test_dashboard_and_alerts_name_metrics_that_there_are(watched: Proxy, name: str) -> None:
    named = set(re.findall(rf"{PREFIX}(\w+)", (DEPLOY / name).read_text()))
    there = {
        sample.removeprefix(PREFIX)
        for family, found in families(watched).items()
        for sample in (
            *(known.name for known in found.samples),
            *([f"{family}_total"] if found.type == "counter" else []),
        )
    }
    assert named
    assert named <= there


def test_the_dashboard_has_all_metrics(watched: Proxy) -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    panels = json.dumps(dashboard["panels"])
    for name in families(watched):
        assert f"{PREFIX}{name}" in panels, name
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")
def test_prometheus_takes_the_alert_rules_and_the_metrics(watched: Proxy) -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", str(DEPLOY / "prometheus-alerts.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout
    text = ask(f"{address(watched)}/metrics").text
    linted = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stderr + linted.stdout
