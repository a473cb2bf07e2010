"""Where the log goes: whatever happens there, clients are served and the proxy ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from proxy import log
from proxy.demo.embedded import free_port
from tests.support.background import wait_until
from tests.support.servers import REPOSITORY, STOP_TIMEOUT, Server, clean_environment

CLIENTS = 80
JOB = "SELECT * FROM pg_background_result(pg_background_launch('SELECT 42')) AS (n int)"


@contextlib.contextmanager
def logging_to(
    server: Server, stderr: int | None, *options: str
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A proxy with this for its stderr, None for none at all: its port, and its process."""
    port = free_port()
    serve = [
        *(sys.executable, "-m", "proxy", "serve", "--listen", f"127.0.0.1:{port}"),
        *("--upstream", f"host={server.host} port={server.port}", "--log-level", "debug"),
        *options,
    ]
    if stderr is None:
        serve = ["sh", "-c", 'exec "$@" 2>&-', "sh", *serve]
    process = subprocess.Popen(
        serve,
        cwd=REPOSITORY,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if stderr is None else stderr,
        start_new_session=True,
    )
    try:
        wait_until(lambda: _serves(port))
        yield port, process
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT)


def _serves(port: int) -> bool:
    try:
        connect(port).close()
    except psycopg.OperationalError:
        return False
    return True


def connect(port: int) -> psycopg.Connection:
    return psycopg.connect(
        host="127.0.0.1", port=port, user="postgres", dbname="postgres", connect_timeout=10
    )


def stop(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(STOP_TIMEOUT)


@pytest.fixture
def small_pipe() -> Iterator[tuple[int, int]]:
    """A pipe of 4 kB."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(reading)
    with contextlib.suppress(OSError):
        os.close(writing)


def read(reading: int) -> bytes:
    """All that comes until nobody has the pipe open for writing."""
    said = b""
    while data := os.read(reading, 65536):
        said += data
    return said


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_log_that_nobody_reads_makes_no_client_wait(
    server: Server, small_pipe: tuple[int, int], workers: str
) -> None:
    _, writing = small_pipe
    with logging_to(server, writing, "--workers", workers) as (port, process):
        for _ in range(CLIENTS):
            with connect(port) as conn:
                assert conn.execute(JOB).fetchone() == (42,)
        assert stop(process) == 0


def test_what_waited_is_written_when_somebody_reads(
    server: Server, small_pipe: tuple[int, int]
) -> None:
    reading, writing = small_pipe
    with logging_to(server, writing) as (port, process):
        for _ in range(60):
            with connect(port) as conn:
                conn.execute(JOB)
        os.close(writing)
        process.send_signal(signal.SIGTERM)
        said = read(reading).decode()
        assert process.wait(STOP_TIMEOUT) == 0
    assert said.count("DEBUG:  job launched") == 60
    assert "shutting down" in said
    assert "dropped" not in said


@pytest.mark.parametrize(
    ("where", "workers"), [("closed", "1"), ("closed", "2"), ("nobody", "2"), ("full disk", "1")]
)
def test_a_log_that_cannot_be_written(server: Server, where: str, workers: str) -> None:
    with contextlib.ExitStack() as stack:
        stderr = None
        if where == "nobody":
            reading, stderr = os.pipe()
            os.close(reading)
            stack.callback(os.close, stderr)
        elif where == "full disk":
            stderr = stack.enter_context(Path("/dev/full").open("wb")).fileno()
        port, process = stack.enter_context(logging_to(server, stderr, "--workers", workers))
        for _ in range(5):
            with connect(port) as conn:
                assert conn.execute(JOB).fetchone() == (42,)
        if where == "closed":  # no connection has its number
            for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children()):
                assert Path(f"/proc/{one.pid}/fd/2").readlink() == Path("/dev/null")
        assert stop(process) == 0


def test_dropped_events_are_counted(small_pipe: tuple[int, int]) -> None:
    reading, writing = small_pipe
    handler = log.BackgroundHandler(writing, most=20_000)
    for number in range(1000):
        handler.emit(record(f"event {number:04} {'x' * 90}"))
    os.set_blocking(reading, False)
    said = b""

    def all_read() -> bool:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(reading, 65536)
        return b"dropped" in said and said.endswith(b"\n")

    wait_until(all_read)
    handler.emit(record("the next one"))
    handler.close()
    *lines, last = (said + os.read(reading, 65536)).decode().splitlines()
    assert last == "the next one"
    number = 0
    for line in lines:  # of each event either itself is there, or a count of those that are not
        if dropped := re.fullmatch(r"dropped (\d+) events of the log, .*", line):
            number += int(dropped[1])
        else:
            assert line == f"event {number:04} {'x' * 90}"
            number += 1
    assert number == 1000


def test_one_event_may_be_longer_than_all_that_may_wait(small_pipe: tuple[int, int]) -> None:
    reading, writing = small_pipe
    handler = log.BackgroundHandler(writing, most=1000)
    os.set_blocking(writing, False)  # as another process with the same pipe may do
    handler.emit(record("x" * 100_000))
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(reading, 65536)
    assert said == b"x" * 100_000 + b"\n"
    handler.close()


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("proxy", logging.INFO, "", 0, text, (), None)
