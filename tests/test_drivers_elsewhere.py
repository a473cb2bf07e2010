"""Drivers of other languages, direct and by the proxy: node-postgres and pgJDBC see the same.

Invariant: each is one program that prints what it sees, a line each; it runs twice, and the outputs
are equal. Then it runs a second part, with jobs, through the proxy.

node-postgres is fetched by npm and pgJDBC by apt-get (or is taken from /usr/share/java, where the
package libpostgresql-jdbc-java puts it), into a temporary folder: hence the marker ``slow``.
Where a program or a package cannot be had, the tests are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.clients import DATABASE, Done, Endpoint, run, same
from tests.support.servers import Proxy, Server, clean_environment, database

FETCH_TIMEOUT = 100.0

PROGRAMS = Path(__file__).parent / "programs"

# Fetching and compiling take longer than tests are given otherwise.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def fetched(*command: str, cwd: Path) -> None:
    """Runs a program that fetches something; skips the test if it cannot."""
    try:
        subprocess.run(
            command,
            cwd=cwd,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{' '.join(command[:2])} failed: {error.stderr.strip()[-300:]}")
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command[:2])} took too long")


# --- node-postgres -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the program for node-postgres."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} on this machine")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text("{}")
    fetched(
        *("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "pg@8", "pg-cursor@2"),
        cwd=folder,
    )
    program = folder / "clients.js"
    shutil.copy(PROGRAMS / program.name, program)
    # Queries that are queued in the driver are deprecated, and that is what is wanted here.
    return ["node", "--no-deprecation", str(program)]


def test_node_postgres(server: Server, proxy: Proxy, node: list[str]) -> None:
    def act(endpoint: Endpoint) -> Done:
        return run(endpoint, *node, "traffic")

    done = same(server, proxy, act)
    assert (done.code, done.err) == (0, "")


def test_node_postgres_launches_jobs(server: Server, proxy: Proxy, node: list[str]) -> None:
    with database(server, DATABASE):
        done = run(proxy, *node, "jobs")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        *(f'[[{{"n":{turn},"t":"x"}}]]' for turn in range(8)),
        *(f'[[{{"n":{number}}}]]' for number in (1, 2, 3)),
        "[10,990]",
        '["division by zero"]',
        "[1]",
    ]


# --- pgJDBC --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the program for pgJDBC."""
    for name in ("java", "javac"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} on this machine")
    folder = tmp_path_factory.mktemp("java")
    jar = Path("/usr/share/java/postgresql.jar")
    if not jar.exists():
        if shutil.which("apt-get") is None:
            pytest.skip("no pgJDBC on this machine, and no apt-get to fetch it")
        fetched("apt-get", "download", "libpostgresql-jdbc-java", cwd=folder)
        [package] = folder.glob("*.deb")
        fetched("dpkg-deb", "-x", str(package), ".", cwd=folder)
        jar = folder / "usr/share/java/postgresql.jar"
    subprocess.run(
        ["javac", "-encoding", "UTF-8", "-d", folder, "-cp", jar, PROGRAMS / "Clients.java"],
        cwd=folder,
        timeout=FETCH_TIMEOUT,
        check=True,
    )
    return ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{folder}:{jar}", "Clients"]


JDBC_OPTIONS = {
    "as it comes": "",
    "simple": "&preferQueryMode=simple",
    "binary at once": "&prepareThreshold=-1",
    "rewritten batches": "&reWriteBatchedInserts=true&prepareThreshold=1&defaultRowFetchSize=50",
    "autosave": "&autosave=always",
}


@pytest.mark.parametrize("options", JDBC_OPTIONS.values(), ids=JDBC_OPTIONS)
def test_jdbc(server: Server, proxy: Proxy, java: list[str], options: str) -> None:
    def act(endpoint: Endpoint) -> Done:
        return run(endpoint, *java, "traffic", options)

    done = same(server, proxy, act)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("canceling statement due to user request") == 2


@pytest.mark.parametrize("options", JDBC_OPTIONS.values(), ids=JDBC_OPTIONS)
def test_jdbc_launches_jobs(server: Server, proxy: Proxy, java: list[str], options: str) -> None:
    with database(server, DATABASE):
        done = run(proxy, *java, "jobs", options)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[:19] == [
        *(f"[{turn}, x]" for turn in range(12)),
        *["[1000]"] * 7,
    ]
    assert "57014, ERROR: canceling statement due to user request" in done.out
    assert "22012, ERROR: division by zero" in done.out


@pytest.mark.parametrize(
    "kind", sorted(JDBC_OPTIONS.keys() - {"simple"})
)  # It has no CallableStatement.
def test_jdbc_calls(server: Server, proxy: Proxy, java: list[str], kind: str) -> None:
    """A statement without column definition list gives each result right, or none."""
    with database(server, DATABASE):
        done = run(proxy, *java, "calls", JDBC_OPTIONS[kind])
    assert (done.code, done.err) == (0, "")
    # Told what to make of the rows before there are any, it cannot know.
    right = 0 if kind == "binary at once" else 16
    words = "the columns of pg_background_result are not known" if not right else "cached plan must"
    answers = [line for line in done.out.splitlines() if line.startswith("[")]
    assert answers[:7] == ["[true]"] * 7
    assert answers.count("[right]") == right
    failed = [answer for answer in answers[7:] if answer != "[right]"]
    assert len(failed) == 24 - right
    assert all(answer.startswith(f"[0A000, ERROR: {words}") for answer in failed)
