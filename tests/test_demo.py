"""The demo and the benchmark run to their ends: what a newcomer tries first."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.servers import REPOSITORY, clean_environment


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, in which nothing may be left at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pgbg-test-"))
    folder.chmod(0o755)  # PostgreSQL's user must get in
    yield folder
    left = list(folder.iterdir())
    folder.rmdir()
    assert not left


def start(temporary: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *args],
        cwd=REPOSITORY,
        env={**clean_environment(), "TMPDIR": str(temporary)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_tour_shows_what_it_says(temporary: Path) -> None:
    with start(temporary, "proxy", "demo", "--once") as process:
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "INSERT 0 1000" in said
    assert "ERROR:  canceling statement due to user request" in said
    assert "All 6 steps had the expected results." in said


def test_the_demo_stays_up_until_it_is_interrupted(temporary: Path) -> None:
    with start(temporary, "proxy", "demo") as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        told = list(itertools.takewhile(lambda line: "Ctrl-C stops everything." not in line, lines))
        [command] = [line.strip() for line in told if line.startswith("    ") and " -p " in line]
        try:
            _check_that_the_command_works(command)
            _check_that_nobody_else_gets_in(process.pid, command)
        finally:
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Nothing is left behind." in said
    assert "Traceback" not in said


def _pasted(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", f"{command} -XAtc \"SELECT current_user, pg_background_launch('') > 0\""],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **options,
    )


def _check_that_the_command_works(command: str) -> None:
    done = _pasted(command)
    assert (done.stdout, done.stderr) == ("postgres|t\n", "")


def _check_that_nobody_else_gets_in(pid: int, command: str) -> None:
    """Each client is a superuser, and could have a shell by COPY FROM PROGRAM."""
    demo = psutil.Process(pid)
    for process in (demo, *demo.children(recursive=True)):
        # A spare's backend may have ended since.
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("inet"):
                assert socket.status != psutil.CONN_LISTEN, (process, socket)
    if os.geteuid() == 0:
        server = next(p for p in demo.children(recursive=True) if p.name().startswith("postgres"))
        nobody = pwd.getpwnam("nobody")
        assert nobody.pw_uid != server.uids().real
        done = _pasted(command, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[])
        assert "Permission denied" in done.stderr
        assert done.returncode != 0
        at_server = re.sub(r"-p \d+", f"-p {_port_of(server)}", command)
        done = _pasted(at_server, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[])
        assert done.returncode != 0


def _port_of(server: psutil.Process) -> str:
    words: list[str] = server.cmdline()
    return words[words.index("-p") + 1]


def test_without_the_extra_the_demo_says_what_to_install() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; sys.modules['psycopg'] = None; import proxy.cli as c; sys.exit(c.main())",
            "demo",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'pg-background-proxy[demo]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        "--trial --only launch --only rows --only pgbench",
        pytest.param("--trial", marks=pytest.mark.slow),
        pytest.param("--quick", marks=pytest.mark.slow),
    ],
)
def test_the_benchmark_runs(temporary: Path, tmp_path: Path, options: str) -> None:
    with start(temporary, "bench", *options.split(), "--results", str(tmp_path)) as process:
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "launch, then result" in said
    assert "pgbench -S -M prepared -c 8" in said
    assert "failed" not in said
