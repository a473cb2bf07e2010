"""The page of jobs: who gets it, what it shows, and what no other site can do with it."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
import pytest

from protocol.auth import md5_secret
from protocol.scram import ScramSecret
from tests.conftest import StartProxy, shared_proxy, upstream_of
from tests.support.background import run, wait_until
from tests.support.certificates import Certificates
from tests.support.http import Answer, address, ask
from tests.support.servers import Connection, Proxy, Server

ADMIN: Final = ("ada", "a secret: of ada")
WATCHER: Final = ("stan", "statistics")
OLD: Final = ("olga", "olgas")
NOBODY: Final = ("mallory", "mallorys")

HOSTILE: Final = "<script>document.title='owned'</script><img src=x onerror=alert(1)>&\"'"


@pytest.fixture(scope="module")
def auth_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Passwords: as a SCRAM secret, in clear text, as an MD5 hash; and of one who is no admin."""
    secret = ScramSecret.from_password(ADMIN[1].encode()).serialize().decode()
    hashed = md5_secret(OLD[0].encode(), OLD[1].encode()).decode()
    secrets = {ADMIN[0]: secret, WATCHER[0]: WATCHER[1], OLD[0]: hashed, NOBODY[0]: NOBODY[1]}
    file = tmp_path_factory.mktemp("admin") / "userlist.txt"
    file.write_text("".join(f'"{user}" "{secret}"\n' for user, secret in secrets.items()))
    file.chmod(0o600)
    return file


def options(auth_file: Path, *more: str) -> tuple[str, ...]:
    return (
        *("--admin-listen", "127.0.0.1:0", "--auth-file", str(auth_file)),
        *("--admin-users", ADMIN[0], "--admin-users", OLD[0], "--stats-users", WATCHER[0], *more),
    )


@pytest.fixture(scope="module", params=["1", "2"])
def shown(server: Server, auth_file: Path, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy with the page, of one process and of two."""
    with shared_proxy(
        upstream_of(server), *options(auth_file, "--workers", request.param)
    ) as proxy:
        yield proxy


def jobs(proxy: Proxy, user: tuple[str, str] = ADMIN) -> Any:
    answer = ask(f"{address(proxy)}/jobs", user=user)
    assert answer.status == 200, answer.text
    return answer.json


def launch(conn: Connection, sql: str, label: str = "") -> int:
    row = conn.execute(
        "SELECT (pg_background_launch_v2(%s, 0, %s)).*", [sql, label or None], binary=True
    ).fetchone()
    assert row is not None
    pid: int = row[0]
    return pid


def of(found: list[dict[str, Any]], pid: int) -> dict[str, Any] | None:
    return next((job for job in found if job["pid"] == pid), None)


def cancel(
    proxy: Proxy,
    wanted: str,
    user: tuple[str, str] = ADMIN,
    changed: Mapping[str, str] = MappingProxyType({}),
) -> Answer:
    """What the page does; with some headers changed, or left out if they are empty."""
    url = address(proxy)
    headers = {
        "Content-Type": "application/json",
        "Origin": url,
        "Sec-Fetch-Site": "same-origin",
        "X-CSRF-Token": jobs(proxy, user)["token"] or "",
    } | dict(changed)
    headers = {name: value for name, value in headers.items() if value}
    body = json.dumps({"id": wanted}).encode()
    return ask(f"{url}/cancel", user=user, headers=headers, body=body)


def ended_job(proxy: Proxy, pid: int) -> dict[str, Any]:
    return of(jobs(proxy)["ended"], pid) or {}


def test_jobs_are_shown_as_they_run_and_as_they_ended(shown: Proxy, scratch: str) -> None:
    with shown.connect(dbname=scratch) as one, shown.connect(dbname=scratch) as two:
        sql = "SELECT pg_background_progress(42, 'half & <b>half</b>'); SELECT pg_sleep(60)"
        pids = [launch(conn, sql, HOSTILE) for conn in (one, two)]
        with pytest.raises(psycopg.errors.DivisionByZero):
            run(one, "SELECT 1/0")
        run(two, "SELECT * FROM generate_series(1, 5)", "n int")

        def running() -> list[dict[str, Any]]:
            found = [of(jobs(shown)["running"], pid) for pid in pids]
            told = [job for job in found if job and job["percentage"] is not None and job["wait"]]
            return told if len(told) == 2 else []

        for job in wait_until(running):
            assert (job["label"], job["sql"]) == (HOSTILE, sql)
            assert (job["role"], job["database"]) == ("postgres", scratch)
            assert (job["percentage"], job["message"]) == (42, "half & <b>half</b>")
            assert job["wait"] == "Timeout: PgSleep"
            assert job["state"] == "running"
            assert job["seconds"] >= 0
            assert "cookie" not in job
        found = jobs(shown)
        assert found["count"] == 2
        failed = next(job for job in found["ended"] if job["sqlstate"] == "22012")
        assert (failed["state"], failed["error"]) == ("error", "division by zero")
        done = next(job for job in found["ended"] if job["rows"] == 5)
        assert (done["state"], done["error"]) == ("stopped", None)

        for pid in pids:
            shown_job = of(jobs(shown)["running"], pid)
            assert shown_job is not None
            assert cancel(shown, shown_job["id"]).json == {"told": True}
            ended = wait_until(partial(ended_job, shown, pid))
            assert ended["state"] == "canceled"
            shown.wait_for_log(f"job canceled by administrator: pid={pid} user=ada")


def test_queued_jobs_are_shown_and_can_be_canceled(shown: Proxy, scratch: str) -> None:
    with shown.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.queue = on; SET pg_background.max_workers = 1")
        running = launch(conn, "SELECT pg_sleep(60)")
        row = conn.execute("SELECT (pg_background_submit('SELECT 1', 0, 'later')).cookie")
        [cookie] = row.fetchone() or [None]
        [job] = jobs(shown)["waiting"]
        assert (job["pid"], job["state"], job["label"]) == (None, "queued", "later")
        assert (job["role"], job["database"], job["sql"]) == ("postgres", scratch, "SELECT 1")
        assert jobs(shown)["count"] == 1
        assert cancel(shown, job["id"]).json == {"told": True}
        assert jobs(shown)["waiting"] == []
        assert jobs(shown)["ended"][0]["state"] == "canceled"
        outcome = conn.execute("SELECT (pg_background_outcome(NULL, %s::int8)).state", [cookie])
        assert outcome.fetchone() == ("canceled",)
        conn.execute("SELECT pg_terminate_backend(%s)", [running])


def test_who_only_watches_cancels_nothing(shown: Proxy, scratch: str) -> None:
    with shown.connect(dbname=scratch) as conn:
        pid = launch(conn, "SELECT pg_sleep(60)")
        found = jobs(shown, WATCHER)
        assert found["token"] is None
        job = of(found["running"], pid)
        assert job is not None
        # Not by the token of somebody else, either.
        for token in ("", "0" * 64, jobs(shown)["token"]):
            assert cancel(shown, job["id"], WATCHER, {"X-CSRF-Token": token}).status == 403
        assert of(jobs(shown)["running"], pid)
        assert cancel(shown, job["id"], OLD).json == {"told": True}


def test_another_site_cancels_nothing(shown: Proxy, scratch: str) -> None:
    """Of what its page could have a browser send, with the password that the browser adds."""
    with shown.connect(dbname=scratch) as conn:
        pid = launch(conn, "SELECT pg_sleep(60)")
        job = of(jobs(shown)["running"], pid)
        assert job is not None
        wanted = job["id"]
        foreign = (
            {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
            {"Origin": "http://evil.example", "Sec-Fetch-Site": ""},
            {"Origin": "null"},
            {"Origin": "", "Sec-Fetch-Site": ""},
            {"Origin": address(shown).replace("127.0.0.1", "localhost")},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"X-CSRF-Token": ""},
            {"X-CSRF-Token": "0" * 64},
        )
        for headers in foreign:
            assert cancel(shown, wanted, changed=headers).status == 403, headers
        assert cancel(shown, wanted, changed={"Content-Type": "text/plain"}).status == 415
        url = address(shown)
        assert ask(f"{url}/cancel?id={wanted}", user=ADMIN).status == 405
        cross = {"Sec-Fetch-Site": "cross-site"}
        assert ask(f"{url}/jobs", user=ADMIN, headers=cross).status == 403
        answer = ask(f"{url}/jobs", user=ADMIN)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
        assert "Set-Cookie" not in answer.headers
        assert of(jobs(shown)["running"], pid)
        assert cancel(shown, wanted).status == 200


def test_a_request_that_makes_no_sense_is_refused(shown: Proxy) -> None:
    assert cancel(shown, "1-0.0").json == {"told": False}
    url = address(shown)
    headers = {
        "Content-Type": "application/json",
        "Origin": url,
        "X-CSRF-Token": jobs(shown)["token"],
    }
    for body, status in ((b"{", 400), (b"[]", 400), (b"{}", 400), (b"x" * 10_000, 413)):
        assert ask(f"{url}/cancel", user=ADMIN, headers=headers, body=body).status == status
    assert ask(f"{url}/../../etc/passwd", user=ADMIN).status == 404
    assert ask(f"{url}/static/page.html", user=ADMIN).status == 404


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/icon.svg", "/jobs"])
def test_all_of_it_asks_for_a_password(shown: Proxy, path: str) -> None:
    url = f"{address(shown)}{path}"
    nobody = ask(url)
    assert nobody.status == 401
    assert nobody.headers["WWW-Authenticate"].startswith("Basic realm=")
    for user in (ADMIN, WATCHER, OLD):
        answer = ask(url, user=user)
        assert answer.status == 200
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "aiohttp" not in answer.headers["Server"]


def test_the_page_asks_no_other_host(shown: Proxy) -> None:
    for path in ("/", "/page.js", "/page.css"):
        text = ask(f"{address(shown)}{path}", user=ADMIN).text
        assert not re.search(r"https?://|url\(|@import|innerHTML|style=|onclick=\"", text)


def test_wrong_passwords_are_refused_and_become_fewer(
    start_proxy: StartProxy, auth_file: Path
) -> None:
    proxy = start_proxy(*options(auth_file))
    url = f"{address(proxy)}/jobs"
    assert ask(url, user=ADMIN).status == 200
    wrong = (
        *((ADMIN[0], "wrong"), (ADMIN[0], ADMIN[1][:-1]), (OLD[0], "wrong"), NOBODY),
        *((OLD[0], md5_secret(OLD[0].encode(), OLD[1].encode()).decode()), ("nobody", "x")),
    )
    for user in wrong:
        assert ask(url, user=user).status == 401, user
    many = [ask(url, user=("nobody", f"guess {n}")).status for n in range(20)]
    assert many[-1] == 429
    # Who has logged in already is not shut out.
    assert ask(url, user=ADMIN).status == 200
    assert ask(url, user=WATCHER).status == 429
    proxy.wait_for_log("admin login refused: user=mallory host=127.0.0.1")
    assert "guess" not in proxy.log


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !", "Basic YWRh", "Bearer x", f"Basic {'A' * 5000}", "Basic YWRhOg=="],
)
def test_a_header_that_is_malformed_is_no_login(shown: Proxy, header: str) -> None:
    answer = ask(f"{address(shown)}/jobs", headers={"Authorization": header})
    assert answer.status == 401


def test_a_password_that_was_changed_holds_at_once(
    start_proxy: StartProxy, auth_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "userlist.txt"
    file.write_text('"ada" "first"\n')
    file.chmod(0o600)
    proxy = start_proxy(*options(file))
    url = f"{address(proxy)}/jobs"
    assert ask(url, user=("ada", "first")).status == 200
    file.write_text('"ada" "the second"\n')
    assert ask(url, user=("ada", "first")).status == 401
    assert ask(url, user=("ada", "the second")).status == 200


def test_without_users_there_is_no_page(start_proxy: StartProxy, auth_file: Path) -> None:
    proxy = start_proxy("--admin-listen", "127.0.0.1:0", "--auth-file", str(auth_file))
    answer = ask(f"{address(proxy)}/", user=ADMIN)
    assert answer[::2] == (403, b"nobody is in admin_users or stats_users\n")
    assert ask(f"{address(proxy)}/metrics").status == 200


def test_a_name_that_leads_here_is_not_ours(shown: Proxy) -> None:
    """A page of theirs whose name has been made to lead to this machine (DNS rebinding)."""
    url = address(shown)
    for host in ("evil.example", f"evil.example:{urlsplit(url).port}", "127.0.0.1.evil.example"):
        for path in ("/metrics", "/jobs", "/"):
            assert ask(f"{url}{path}", user=ADMIN, headers={"Host": host}).status == 421
    for host in ("localhost:1", "LOCALHOST", "127.0.0.1:1", "[::1]:1"):
        assert ask(f"{url}/metrics", headers={"Host": host}).status == 200


def own_address() -> str | None:
    """An address of this machine that is not loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        found: str = sock.getsockname()[0]
        return found


def test_over_the_network_passwords_need_tls(
    start_proxy: StartProxy, auth_file: Path, certificates: Certificates
) -> None:
    host = own_address()
    if host is None or host.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    plain = start_proxy(*options(auth_file), "--admin-listen", f"{host}:0")
    answer = ask(f"{address(plain)}/", user=ADMIN)
    assert answer.status == 403
    assert "TLS" in answer.text
    assert ask(f"{address(plain)}/metrics", headers={"Host": "db-proxy"}).status == 200


def test_with_tls_it_is_https(
    start_proxy: StartProxy, auth_file: Path, certificates: Certificates
) -> None:
    proxy = start_proxy(
        *options(auth_file),
        *("--client-tls-sslmode", "verify-full"),
        *("--client-tls-cert-file", str(certificates.server.cert)),
        *("--client-tls-key-file", str(certificates.server.key)),
        *("--client-tls-ca-file", str(certificates.ca)),
    )
    url = address(proxy)
    assert url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.check_hostname = False
    assert ask(f"{url}/jobs", user=ADMIN, context=context).status == 200
    with pytest.raises(OSError, match="closed connection|reset|EOF|disconnected"):
        ask(url.replace("https:", "http:") + "/healthz")


def test_connections_that_ask_nothing_do_not_keep_others_out(
    start_proxy: StartProxy, auth_file: Path
) -> None:
    proxy = start_proxy(*options(auth_file))
    url = urlsplit(address(proxy))
    assert url.port is not None
    idle = [socket.create_connection(("127.0.0.1", url.port)) for _ in range(150)]
    try:
        begun = time.monotonic()

        def answers() -> bool:
            try:
                return ask(f"{url.geturl()}/healthz").status == 200
            except OSError:
                return False

        wait_until(answers, timeout=40)
        assert time.monotonic() - begun < 40
        with proxy.connect() as conn:
            conn.execute("SELECT 1")
    finally:
        for sock in idle:
            sock.close()
