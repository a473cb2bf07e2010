"""The command line: help, errors of one line, exit codes, the log, how it stops."""

from __future__ import annotations

import logging
import re
import signal
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from proxy import __version__, log
from proxy.config import SETTINGS
from tests.conftest import StartProxy
from tests.support.servers import REPOSITORY, Server, clean_environment

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC \[\d+\] [A-Z]+:  \S|\t")


def run(*args: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxy", *args],
        cwd=REPOSITORY,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"pg-background-proxy {__version__}\n")


def test_help_tells_every_setting_and_gives_examples() -> None:
    done = run("serve", "--help")
    assert done.returncode == 0
    for field in SETTINGS:
        assert f"--{field.name.replace('_', '-')} " in done.stdout
    assert "examples:" in done.stdout
    assert "examples:" in run("--help").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "COMMAND"),
        (["serf"], "invalid choice: 'serf'"),
        (["serve", "--max-worker", "3"], "unrecognized arguments: --max-worker"),
        (["serve", "--listen"], "argument --listen: expected one argument"),
        (["serve", "--listen", "::1"], '--listen: invalid address: "::1"'),
        (["serve", "--max-workers", "0"], "--max-workers: 0 is outside the valid range"),
        (["serve", "--upstream", "sslmode=verify-full"], "sslmode=verify-full needs sslrootcert"),
        (["serve", "--config", "/no/such/file"], "cannot read /no/such/file"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(args: list[str], message: str) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pg-background-proxy: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_one_line_and_exit_code_1(server: Server) -> None:
    upstream = f"host={server.host} port={server.port}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", "--listen", address, "--upstream", upstream)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    failures = [line for line in done.stderr.splitlines() if address in line]
    assert len(failures) == 1
    assert re.search("address already in use", failures[0], re.IGNORECASE)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_required_server_that_is_not_there_is_one_line_and_exit_code_1(workers: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        port = nobody.getsockname()[1]
        done = run(
            *("serve", "--listen", "127.0.0.1:0", "--upstream", f"host=127.0.0.1 port={port}"),
            *("--server-required", "on", "--workers", workers),
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    failures = [line for line in done.stderr.splitlines() if f"127.0.0.1:{port}" in line]
    assert len(failures) == 1


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_an_idle_proxy_cleanly(
    server: Server, start_proxy: StartProxy, signal_: int
) -> None:
    proxy = start_proxy()
    proxy.connect().close()
    assert proxy.stop(signal_) == 0
    assert all(LOG_LINE.match(line) for line in proxy.log.splitlines()), proxy.log


def test_it_runs_on_the_standard_loop_where_there_is_no_uvloop(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    proxy = start_proxy(env={"PYTHONPATH": str(tmp_path)})
    proxy.wait_for_log("uvloop is not installed")
    with proxy.connect() as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert proxy.stop() == 0


def test_it_listens_on_a_unix_socket_too(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy("--listen", f"{tmp_path}:7777")
    proxy.wait_for_log("listening on Unix socket")
    with proxy.connect(host=tmp_path, port=7777) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert proxy.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_upstream_may_be_a_unix_socket(server: Server, start_proxy: StartProxy) -> None:
    proxy = start_proxy(upstream=f"host={server.socket_dir} port={server.port}")
    with proxy.connect() as conn:
        row = conn.execute("SELECT inet_client_addr()").fetchone()
    assert row == (None,)


def test_the_log_has_postgresqls_form_and_no_event_can_pass_for_another() -> None:
    record = logging.LogRecord("proxy", logging.INFO, "", 0, "role %s", ("a\nERROR:  b",), None)
    first, second = log.PostgresFormatter().format(record).split("\n")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC \[\d+\] LOG:  role a", first)
    assert second == "\tERROR:  b"


def test_no_control_character_reaches_who_reads_the_log() -> None:
    """Every character that there is, as a client may have it in its role's name."""
    text = "".join(map(chr, range(0x110000)))
    record = logging.LogRecord("proxy", logging.INFO, "", 0, "role %s", (text,), None)
    said = log.PostgresFormatter().format(record)
    _, *more = said.split("\n")
    assert len(more) == 1
    assert more[0].startswith("\t")
    kept = set(said.replace("\n\t", ""))
    bidirectional = {chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))}
    for character in kept:
        assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") or character == "\t"
    assert not kept & (bidirectional | {chr(code) for code in range(0x2066, 0x206A)})
    for harmless in "aZ~ éß漢😀\u0301":
        assert harmless in kept
    for escape in ("\\x00", "\\x1b", "\\x7f", "\\x9b", "\\r", "\\u202e", "\\ud800"):
        assert escape in said
    assert len(said.splitlines()) == 2
    said.encode()
