"""Regression files: what psql prints for them is the same direct and through the proxy.

A file of `tests/regress` runs twice, each time in a fresh database of the same name, as
PostgreSQL's own regression suite would run it (`psql -a -e < file > output 2>&1`). Invariant: the
two outputs are the same byte for byte, but for what differs between two runs on one server too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from psycopg.conninfo import make_conninfo

from tests.support.servers import Proxy, Server, clean_environment, database, psql_path

pytestmark = pytest.mark.every_server

FOLDER: Final = Path(__file__).parent / "regress"
FILES: Final = sorted(FOLDER.glob("*.sql"))
DATABASE: Final = "regress"
TIMEOUT: Final = 60.0
QUERY: Final = re.compile(rb"\*{8,} QUERY \*{8,}")
"""What psql logs before each query that it sends."""

MASKS: Final = (
    (rb"(server process with PID )\d+", rb"\1###"),
    (rb'(at port )"\d+"', rb'\1"###"'),
    (rb"(Server Port +\| )\d+ *", rb"\1### "),
    (rb"(Backend PID +\| )\d+ *", rb"\1### "),
    (rb"(connection to server at .* port )\d+", rb"\1###"),
    (rb"(Time: )[\d.]+ ms", rb"\1### ms"),
    (rb"\bpg_(toast_)?temp_\d+", rb"pg_\1temp_###"),
    (rb"(Time|Planning Time|Execution Time): [\d.]+ ms", rb"\1: ### ms"),
)


@dataclass(frozen=True)
class Output:
    """What psql has printed, and how many statements it has sent."""

    text: bytes
    statements: int


def run(file: Path, endpoint: Server | Proxy, folder: Path, program: str) -> Output:
    """Runs a file in the folder, where it may leave files of its own."""
    folder.mkdir()
    dsn = make_conninfo(
        "", host=endpoint.host, port=endpoint.port, user="postgres", dbname=DATABASE
    )
    with file.open("rb") as script, (folder / "output").open("wb") as output:
        subprocess.run(
            [program, "-X", "-a", "-e", "-L", "log", "-v", "VERBOSITY=verbose", "-d", dsn],
            stdin=script,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**clean_environment(), "PAGER": "cat", "PGTZ": "UTC", "PGCLIENTENCODING": "UTF8"},
            timeout=TIMEOUT,
            check=False,
        )
    text = (folder / "output").read_bytes()
    for pattern, replacement in MASKS:
        text = re.sub(pattern, replacement, text)
    return Output(text, len(QUERY.findall((folder / "log").read_bytes())))


@pytest.fixture
def nothing_shared(server: Server) -> Iterator[None]:
    """What files create outside of their database is gone afterwards, even if they fail."""
    yield
    with server.connect() as conn:
        for role in ("regress_one", "regress_two", "regress_three"):
            conn.execute(f"DROP ROLE IF EXISTS {role}")


def programs() -> dict[str, str]:
    """The psql programs at hand, by their major versions."""
    found: dict[str, str] = {}
    for folder in psql_path().split(":"):
        program = shutil.which("psql", path=folder)
        if program is not None:
            answer = subprocess.run([program, "--version"], capture_output=True, check=True)
            version = re.search(rb"\) (\d+)", answer.stdout)
            assert version is not None
            found.setdefault(version[1].decode(), program)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "program" in metafunc.fixturenames:
        # By default each file with one psql, in turn.
        found = programs()
        metafunc.parametrize(
            ("file", "program"),
            [
                pytest.param(
                    file,
                    program,
                    marks=() if number % len(found) == at else pytest.mark.slow,
                    id=f"psql{name}-{file.stem}",
                )
                for number, file in enumerate(FILES)
                for at, (name, program) in enumerate(found.items())
            ],
        )


@pytest.mark.usefixtures("nothing_shared")
def test_the_output_is_the_same(
    server: Server, proxy: Proxy, file: Path, program: str, tmp_path: Path
) -> None:
    outputs = []
    for name, endpoint in (("direct", server), ("proxied", proxy)):
        with database(server, DATABASE):
            outputs.append(run(file, endpoint, tmp_path / name, program))
    direct, proxied = outputs
    assert direct.text.splitlines() == proxied.text.splitlines()
    assert direct == proxied
    assert direct.statements > 10


@pytest.mark.slow
def test_there_are_several_hundred_statements(server: Server, tmp_path: Path) -> None:
    """Counted where psql sends them."""
    total = 0
    program = next(iter(programs().values()))
    for file in FILES:
        with database(server, DATABASE):
            total += run(file, server, tmp_path / file.stem, program).statements
    assert len(FILES) >= 15
    assert total >= 500


def test_a_difference_would_show(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    """The masks hide no more than they should, and psql reads the file to its end."""
    file = tmp_path / "differs.sql"
    file.write_text("SHOW pg_background.max_workers;\nSELECT 'the end';\n")
    program = next(iter(programs().values()))
    with database(server, DATABASE):
        direct = run(file, server, tmp_path / "direct", program)
        proxied = run(file, proxy, tmp_path / "proxied", program)
    assert b"unrecognized configuration parameter" in direct.text
    assert direct.text != proxied.text
    assert direct.text.splitlines()[-3].strip() == b"the end"
    assert direct.statements == proxied.statements == 2
