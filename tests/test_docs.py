"""The examples in README.md and docs/ do what the pages say; their links lead somewhere.

A page's blocks run in order, through a proxy, in a database ``mydb`` with the role ``alice``:

- ``sql`` by psql, as a superuser; nothing may fail;
- ``console`` is a session in psql: what stands behind a prompt is typed, by ``alice`` behind ``=>``
  and by a superuser behind ``=#``; the rest is what must come back;
- ``python`` as it stands; the comment behind a ``print()`` is what it prints.

A comment ``<!-- run`` holds SQL that the reader does not see: what the examples need, or what tries
them.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from proxy import config
from proxy.api.functions import DECLARED, VIEWS
from proxy.extension.installed import COMPOSITE, HISTORY, STAT_ACTIVITY
from tests.conftest import StartProxy
from tests.support.pgbouncer import OURS
from tests.support.servers import REPOSITORY, Proxy, Server, clean_environment, database, psql

PAGES: Final = (
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "tests" / "README.md",
    *sorted((REPOSITORY / ".github").rglob("*.md")),
)
_BLOCK: Final = re.compile(
    r"^(?:<!-- (?P<hidden>run)\n(?P<setup>.*?)^-->|```(?P<kind>\w+)\n(?P<text>.*?)^```)$",
    re.MULTILINE | re.DOTALL,
)
_PROMPT: Final = re.compile(r"mydb[=\-(*'][*!?]?[>#] ")
_LINK: Final = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_FILE: Final = re.compile(
    r"(?<![\w./-])(?:(?:bench|deploy|docs|protocol|proxy|tests)/|\.(?:ci|github)/)[\w./*-]*(?<!\.)"
)
"""A file of this repository, by its path from the top."""
_DJANGO: Final = """\
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql",
    "HOST": "127.0.0.1", "PORT": 6543, "USER": "alice", "NAME": "mydb"}})
"""


@dataclass(frozen=True)
class Block:
    """An example: what language it is in, and its line, as pytest shows it."""

    kind: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Those of a page that can be run, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        kind = match["hidden"] or match["kind"]
        if kind in ("run", "sql", "console", "python"):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(kind, match["setup"] or match["text"], line))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.name)
)
def test_examples(page: Path, server: Server, proxy: Proxy, start_proxy: StartProxy) -> None:
    if 'history = "all"' in page.read_text(encoding="utf-8"):
        proxy = start_proxy("--history", "all")
    before, members_before = roles(server), members(server)
    with database(server, "mydb"):
        with server.connect(dbname="mydb") as conn:
            conn.execute("GRANT CREATE ON DATABASE mydb TO PUBLIC")
        for block in blocks(page):
            run(block, proxy.port, f"{page.name}:{block.line}")
        server.wait_for_no_clients()
        with server.connect(dbname="mydb") as conn:
            for role in roles(server) - before:
                conn.execute(f"DROP OWNED BY {role}")
                conn.execute(f"DROP ROLE {role}")
            for role, member in members(server) - members_before:
                conn.execute(f"REVOKE {role} FROM {member}")


def members(server: Server) -> set[tuple[str, str]]:
    query = "SELECT roleid::regrole::text, member::regrole::text FROM pg_auth_members"
    with server.connect() as conn:
        return set(conn.execute(query).fetchall())


def roles(server: Server) -> set[str]:
    with server.connect() as conn:
        return {name for (name,) in conn.execute("SELECT rolname FROM pg_roles")}


def run(block: Block, port: int, where: str) -> None:
    if block.kind == "console":
        for user, commands, expected in console(block.text):
            done = psql(port, "-a", input=commands, dbname="mydb", user=user)
            assert done.stderr == "", where
            assert shown(done.stdout) == expected, where
    elif block.kind == "python":
        run_python(block.text, port, where)
    else:
        done = psql(port, "-q", "-v", "ON_ERROR_STOP=1", input=block.text, dbname="mydb")
        assert done.returncode == 0, f"{where}: {done.stderr}"


def console(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """The sessions of a block: who types, what, and what psql with ``-a`` is to show."""
    lines = text.splitlines()
    prompts = [match[0] if (match := _PROMPT.match(line)) else "" for line in lines]
    for user, mark in (("postgres", "#"), ("alice", ">")):
        if any(prompt.endswith(f"{mark} ") for prompt in prompts):
            assert all(prompt.endswith(f"{mark} ") for prompt in prompts if prompt)
            typed = [
                line[len(prompt) :] for line, prompt in zip(lines, prompts, strict=True) if prompt
            ]
            expected = [line[len(prompt) :] for line, prompt in zip(lines, prompts, strict=True)]
            yield user, "\n".join(typed) + "\n", shown("\n".join(expected))


def shown(output: str) -> list[str]:
    """Its lines, without blanks at their ends and lines without anything."""
    return [line.rstrip() for line in output.splitlines() if line.strip()]


def run_python(code: str, port: int, where: str) -> None:
    if "from django" in code:
        if importlib.util.find_spec("django") is None:
            return
        code = _DJANGO + code
    expected = re.findall(r"print\(.*\)  # (.*)", code)
    assert expected, f"{where} prints nothing"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("6543", str(port))],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{where}: {done.stderr}"
    assert done.stdout.splitlines() == expected, where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links(page: Path) -> None:
    """Files that are linked to exist, and so do the headings."""
    for match in _LINK.finditer(page.read_text(encoding="utf-8")):
        target, _, anchor = match["target"].partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {match['target']}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {match['target']}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_functions_that_are_named_exist(page: Path) -> None:
    known = {function.name for function in DECLARED} | {type.name for type in COMPOSITE}
    known |= {*VIEWS, STAT_ACTIVITY, HISTORY}
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bpg_background_[a-z_0-9]+\b", text)) <= known | {"pg_background_proxy"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_configurations_can_be_read(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in ("passfile", "replicas"):
        (tmp_path / name).touch(0o600)
    file = tmp_path / "proxy.toml"
    for block in re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        file.write_text(block, encoding="utf-8")
        config.load(file=file)


def test_startup_parameters_that_a_pooler_must_ignore() -> None:
    page = (REPOSITORY / "docs" / "limits.md").read_text(encoding="utf-8")
    assert f"\nignore_startup_parameters = {', '.join(OURS)}\n" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_files_that_are_named_exist(page: Path) -> None:
    """A ``*`` in a name stands for anything."""
    text = page.read_text(encoding="utf-8")
    for name in set(_FILE.findall(text)):
        assert any(REPOSITORY.glob(name.rstrip("/."))), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_pages_are_merged(page: Path) -> None:
    assert not re.findall(r"^(?:<{7}|>{7}) .*", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


@pytest.mark.parametrize("end", ["demo --once", "&& .venv/bin/pytest"])
def test_readme_has_the_commands_that_ci_takes_from_it(end: str) -> None:
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(rf"^python3 -m venv .* {re.escape(end)}$", page, re.MULTILINE)) == 1


def test_architecture_names_what_there_is() -> None:
    """What looks like a name in the code is one, so renaming it changes the page too."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("proxy", "protocol", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
    )
    names = set(re.findall(r"`(?:\w+\.)*(_?[A-Za-z]\w*)(?:\(…\))?`", page))
    names = {name for name in names if "_" in name or name[0].isupper()}
    assert len(names) > 50
    missing = {
        name
        for name in names
        if not re.search(rf"\b(?:def|class) {name}\b|\b{name}\b[^\n]*[=:]", code)
    }
    assert not missing


def test_architecture_names_every_package_and_top_level_file() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ("proxy", "protocol"):
        for path in (REPOSITORY / package).iterdir():
            if (path / "__init__.py").is_file():
                assert f"`{package}/{path.name}/`" in page
            elif path.suffix == ".py" and path.name != "__init__.py":
                table = page.partition(f"| file of `{package}/` |")[2].partition("\n\n")[0]
                assert f"`{path.name}`" in table


def test_architecture_names_files_that_exist() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.as_posix() for path in REPOSITORY.rglob("*.py") if ".venv" not in path.parts}
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page):
        assert any(file.endswith(f"/{name}") for file in files), name
