"""The page of jobs in a real browser: Debian's chromium, headless."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.conftest import shared_proxy, upstream_of
from tests.support.background import wait_until
from tests.support.http import address, ask
from tests.support.servers import Connection, Proxy, Server

ADMIN: Final = ("ada", "a password/with @ and :")
WATCHER: Final = ("stan", "statistics")

HOSTILE: Final = (
    "</pre></li><script>document.title='owned'</script><img src=x onerror=\"x()\">&amp;'"
)

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="no browser: apt-get install chromium chromium-driver"
)


OpenPage = Callable[..., Chrome]


@pytest.fixture(scope="module", params=["1", "2"])
def shown(
    server: Server, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Proxy]:
    file = tmp_path_factory.mktemp("admin") / "userlist.txt"
    file.write_text("".join(f'"{user}" "{password}"\n' for user, password in (ADMIN, WATCHER)))
    file.chmod(0o600)
    options = ("--admin-users", ADMIN[0], "--stats-users", WATCHER[0], "--workers", request.param)
    admin = ("--admin-listen", "127.0.0.1:0", "--auth-file", str(file))
    with shared_proxy(upstream_of(server), *admin, *options) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Chrome]]:
    """A browser for each user, as one remembers whose password it was told. To start one takes two
    seconds of a core."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Chrome] = {}
        for user in (ADMIN[0], WATCHER[0]):
            found[user] = start_browser(tmp_path_factory.mktemp(f"profile_{user}"))
            stack.callback(found[user].quit)
        yield found


@pytest.fixture
def open_page(browsers: dict[str, Chrome]) -> Iterator[OpenPage]:
    """Opens the page as a user; the browser has no network but loopback."""

    def open_it(proxy: Proxy, user: tuple[str, str] = ADMIN) -> Chrome:
        show_page(browsers[user[0]], proxy, user)
        return browsers[user[0]]

    yield open_it
    for browser in browsers.values():
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.get("about:blank")
        browser.get_log("browser")  # type: ignore[no-untyped-call] # is forgotten


def start_browser(profile: Path) -> Chrome:
    options = ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", "--no-proxy-server", f"--user-data-dir={profile}"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
        "--window-size=1100,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service(executable_path=str(_DRIVER)))


def show_page(browser: Chrome, proxy: Proxy, user: tuple[str, str]) -> None:
    """Logs in by the address, as Selenium has no way to answer the browser's own question."""
    name, password = (quote(part, safe="") for part in user)
    scheme, _, host = address(proxy).partition("://")
    browser.get(f"{scheme}://{name}:{password}@{host}/")
    wait_until(lambda: browser.find_element(By.ID, "state").text.startswith("as of"))


def launch(conn: Connection, sql: str, label: str | None = None) -> int:
    row = conn.execute(
        "SELECT (pg_background_launch_v2(%s, 0, %s)).*", [sql, label], binary=True
    ).fetchone()
    assert row is not None
    pid: int = row[0]
    return pid


def item(browser: Chrome, pid: int, where: str = "running") -> WebElement | None:
    """The job's item in a list."""
    found = browser.find_elements(
        By.XPATH, f"//ul[@id='{where}']/li[.//dt[.='pid']/following-sibling::dd[.='{pid}']]"
    )
    return found[0] if found else None


def wait_for(browser: Chrome, pid: int, where: str = "running") -> WebElement:
    """The same, once it is there."""
    found = wait_until(lambda: item(browser, pid, where))
    assert found is not None
    return found


def fact(job: WebElement, name: str) -> str:
    found = job.find_element(By.XPATH, f".//dt[.='{name}']/following-sibling::dd")
    return found.text


def part(job: WebElement, name: str) -> WebElement:
    return job.find_element(By.CSS_SELECTOR, name)


# What the page makes of the answers is the same, whoever has them from whom.
ONE_PROCESS: Final = pytest.mark.parametrize("shown", ["1"], indirect=True)


def test_jobs_come_progress_and_go_without_reloading(
    shown: Proxy, scratch: str, server: Server, open_page: OpenPage
) -> None:
    browser = open_page(shown)
    browser.execute_script("window.sameDocument = true")
    wait_until(lambda: browser.find_element(By.ID, "none-running").is_displayed())
    with (
        shown.connect(dbname=scratch) as conn,
        server.connect(dbname=scratch) as first,
        server.connect(dbname=scratch) as second,
    ):
        first.execute("SELECT pg_advisory_lock(1)")
        second.execute("SELECT pg_advisory_lock(2)")
        pid = launch(
            conn,
            "SELECT pg_background_progress(10, 'begun'); SELECT pg_advisory_lock_shared(1);"
            " SELECT pg_background_progress(70, 'most of it'); SELECT pg_advisory_lock_shared(2);"
            " SELECT * FROM generate_series(1, 7)",
            "nightly report",
        )
        job = wait_for(browser, pid)
        assert part(job, ".label").text == "nightly report"
        assert (fact(job, "role"), fact(job, "database")) == ("postgres", scratch)
        wait_until(lambda: part(job, "progress").get_property("value") == 10)
        assert part(job, ".message").text == "begun"
        wait_until(lambda: fact(job, "waits for") == "Lock: advisory")
        age = fact(job, "age")
        wait_until(lambda: fact(job, "age") != age)
        first.execute("SELECT pg_advisory_unlock_all()")
        wait_until(lambda: part(job, "progress").get_property("value") == 70)
        assert part(job, ".percent").text == "70 %"
        second.execute("SELECT pg_advisory_unlock_all()")
        ended = wait_for(browser, pid, "ended")
        assert part(ended, ".outcome").text == "stopped"
        assert fact(ended, "rows") == "7"
        assert item(browser, pid) is None

        failed = launch(conn, "SELECT 1/0")
        ended = wait_for(browser, failed, "ended")
        assert part(ended, ".outcome").text == "error"
        assert part(ended, ".fault").text == "division by zero"
        assert fact(ended, "SQLSTATE") == "22012"
        assert not part(ended, ".cancel").is_displayed()
    assert browser.execute_script("return window.sameDocument") is True
    assert_nothing_odd(browser, shown)


@ONE_PROCESS
def test_hostile_text_stays_text(shown: Proxy, scratch: str, open_page: OpenPage) -> None:
    browser = open_page(shown)
    title = browser.title
    with shown.connect(dbname=scratch) as conn:
        sql = f"SELECT pg_sleep(60) /* {HOSTILE} */"
        report = HOSTILE.replace("'", "''")
        pid = launch(conn, f"SELECT pg_background_progress(1, '{report}'); {sql}", HOSTILE)
        job = wait_for(browser, pid)
        assert part(job, ".label").get_property("textContent") == HOSTILE
        assert str(part(job, ".sql").get_property("textContent")).endswith(sql)
        wait_until(lambda: part(job, ".message").get_property("textContent") == HOSTILE)
        part(job, ".cancel").click()
        assert HOSTILE in str(browser.find_element(By.ID, "ask-what").get_property("textContent"))
        assert browser.find_elements(By.CSS_SELECTOR, "main script, main img, dialog img") == []
        browser.find_element(By.ID, "ask-yes").click()
        wait_for(browser, pid, "ended")

        # What the server says of it, too.
        failed = launch(conn, 'SELECT "<script>x()</script>"')
        ended = wait_for(browser, failed, "ended")
        assert "<script>" in part(ended, ".fault").text
    assert browser.find_elements(By.CSS_SELECTOR, "main script, main img, dialog img") == []
    assert browser.title == title
    assert_nothing_odd(browser, shown)


def test_cancel_asks_first_and_needs_no_mouse(
    shown: Proxy, scratch: str, open_page: OpenPage
) -> None:
    browser = open_page(shown)
    dialog = browser.find_element(By.ID, "ask")
    with shown.connect(dbname=scratch) as conn:
        pid = launch(conn, "SELECT pg_sleep(60)", "long one")
        job = wait_for(browser, pid)
        press(browser, Keys.TAB)
        assert browser.switch_to.active_element == part(job, ".cancel")
        # It stays there while the page renews itself.
        age = fact(job, "age")
        wait_until(lambda: fact(job, "age") != age)
        press(browser, Keys.ENTER)
        assert dialog.is_displayed()
        assert "long one" in browser.find_element(By.ID, "ask-what").text
        press(browser, Keys.ENTER)  # what has the focus is the harmless answer
        assert not dialog.is_displayed()
        press(browser, Keys.ENTER)
        press(browser, Keys.ESCAPE)
        assert not dialog.is_displayed()
        age = fact(job, "age")
        wait_until(lambda: fact(job, "age") != age)
        assert item(browser, pid) is not None

        press(browser, Keys.ENTER)
        press(browser, Keys.TAB)
        press(browser, Keys.ENTER)
        ended = wait_for(browser, pid, "ended")
        assert part(ended, ".outcome").text == "canceled"
        assert not dialog.is_displayed()
    shown.wait_for_log(f"job canceled by administrator: pid={pid} user=ada")
    assert_nothing_odd(browser, shown)


@ONE_PROCESS
def test_who_only_watches_has_no_button(shown: Proxy, scratch: str, open_page: OpenPage) -> None:
    browser = open_page(shown, WATCHER)
    with shown.connect(dbname=scratch) as conn:
        pid = launch(conn, "SELECT pg_sleep(60)")
        job = wait_for(browser, pid)
        assert not part(job, ".cancel").is_displayed()
        assert "who may look" in browser.find_element(By.ID, "about").text
        conn.execute("SELECT pg_cancel_backend(%s)", [pid])
        wait_for(browser, pid, "ended")


@ONE_PROCESS
def test_light_and_dark_and_a_phone(shown: Proxy, scratch: str, open_page: OpenPage) -> None:
    browser = open_page(shown)
    with shown.connect(dbname=scratch) as conn:
        pid = launch(conn, f"SELECT pg_sleep(60) /* {'x' * 500} */", "y" * 200)
        job = wait_for(browser, pid)
        for width, height in ((1100, 900), (360, 740)):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width
            button = part(job, ".cancel").rect
            assert button["x"] + button["width"] <= width
            assert button["height"] >= 40
        ratios: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            text, back = (color(browser, name) for name in ("color", "backgroundColor"))
            ratios.append((text, back, contrast(text, back)))
        (light, paper, first), (pale, night, second) = ratios
        assert first > 7
        assert second > 7
        assert sum(light) < sum(pale)
        assert sum(paper) > sum(night)
        conn.execute("SELECT pg_cancel_backend(%s)", [pid])


@ONE_PROCESS
def test_pages_of_others_cannot_cancel_nor_read(
    shown: Proxy, scratch: str, open_page: OpenPage
) -> None:
    """They are opened in a browser that has the password."""
    browser = open_page(shown)
    asked: list[str] = []
    with shown.connect(dbname=scratch) as conn, evil_site(address(shown), asked) as port:
        pid = launch(conn, "SELECT pg_sleep(60)")
        wanted = next(
            job["id"]
            for job in ask(f"{address(shown)}/jobs", user=ADMIN).json["running"]
            if job["pid"] == pid
        )
        for host in ("127.0.0.1", "localhost"):  # of the same site, and of another one
            browser.get(f"http://{host}:{port}/?{wanted}")
            wait_until(lambda: browser.title == "done")
            assert browser.execute_script("return window.read") == []
        show_page(browser, shown, ADMIN)
        job = wait_for(browser, pid)
        assert part(job, ".cancel").is_enabled()
        assert len(asked) >= 2
        conn.execute("SELECT pg_cancel_backend(%s)", [pid])


# Its tools


def press(browser: Chrome, key: str) -> None:
    ActionChains(browser).send_keys(key).perform()


def assert_nothing_odd(browser: Chrome, proxy: Proxy) -> None:
    """No error, no violation of the policy, no request to elsewhere."""
    entries: list[dict[str, Any]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    assert [entry["message"] for entry in entries if entry["level"] == "SEVERE"] == []
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert asked
    own = urlsplit(address(proxy))
    for where in map(urlsplit, asked):
        assert (where.hostname, where.port) == (own.hostname, own.port)


def color(browser: Chrome, name: str) -> tuple[int, ...]:
    text = browser.execute_script(f"return getComputedStyle(document.body).{name}")
    return tuple(int(number) for number in text[text.index("(") + 1 : -1].split(",")[:3])


def contrast(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """The ratio of WCAG."""
    lighter, darker = sorted(map(luminance, (first, second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(rgb: tuple[int, ...]) -> float:
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class evil_site:  # noqa: N801 - used as a function
    """A page that tries what it can: each kind of fetch, and a form."""

    def __init__(self, target: str, asked: list[str]) -> None:
        page = """<!doctype html><title>busy</title><iframe name=hole></iframe><script>
        window.read = [];
        const id = location.search.slice(1), target = "TARGET";
        const json = JSON.stringify({id});
        const tries = [
          ["/jobs", {credentials: "include"}],
          ["/jobs", {credentials: "include", mode: "no-cors"}],
          ["/metrics", {}],
          ["/cancel", {method: "POST", credentials: "include", mode: "no-cors", body: json}],
          ["/cancel", {method: "POST", credentials: "include", body: json,
            headers: {"Content-Type": "application/json", "X-CSRF-Token": "0"}}],
        ];
        (async () => {
          for (const [path, options] of tries)
            try {
              const text = await (await fetch(target + path, options)).text();
              if (text) window.read.push(text);
            } catch (error) { /* what should happen */ }
          const form = document.createElement("form");
          Object.assign(form, {method: "post", action: target + "/cancel", target: "hole",
            enctype: "text/plain"});
          const field = document.createElement("input");
          Object.assign(field, {name: json.slice(0, -1) + ', "x": "', value: '"}'});
          form.append(field); document.body.append(form); form.submit();
          document.querySelector("iframe").onload = () => { document.title = "done"; };
          setTimeout(() => { document.title = "done"; }, 1000);
        })();
        </script>""".replace("TARGET", target)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(page.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> int:
        self._thread.start()
        return self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
