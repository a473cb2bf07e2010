"""Real servers for the tests: PostgreSQL itself, and the proxy as a process of its own.

Everything that waits here has a limit, and everything that is started is stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeAlias

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from proxy.demo.embedded import TRUST_LOCAL
from tests.support.certificates import Certificates
from tests.support.cluster import ChangingCluster
from tests.support.forks import Fork, ForkServer

REPOSITORY: Final = Path(__file__).parents[2]
START_TIMEOUT: Final = 20.0
STOP_TIMEOUT: Final = 20.0

# Roles whose lines in pg_hba.conf ask for a password, and the method asked for.
PASSWORDS: Final = {"pw_plain": "plain pass", "pw_md5": "md5 pass", "pw_scram": "scram päss"}
METHODS: Final = {"pw_plain": "password", "pw_md5": "md5", "pw_scram": "scram-sha-256"}

DEFAULT_HBA: Final = (
    *(f"local all {role} {method}" for role, method in METHODS.items()),
    *(f"host all {role} 127.0.0.1/32 {method}" for role, method in METHODS.items()),
    *TRUST_LOCAL,
)

SETTINGS: Final = {
    "max_connections": "300",
    "max_prepared_transactions": "10",
    "max_worker_processes": "16",
    "log_min_messages": "warning",
}

Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"


class _Endpoint:
    """Something that clients connect to."""

    host = "127.0.0.1"
    port: int

    def dsn(self, **params: Any) -> str:
        """A connection string; user and dbname are ``postgres`` unless given."""
        defaults = {"host": self.host, "port": self.port, "user": "postgres", "dbname": "postgres"}
        return make_conninfo("", **{**defaults, "connect_timeout": 10, **params})

    def connect(self, *, autocommit: bool = True, **params: Any) -> Connection:
        """A psycopg connection, autocommit unless told."""
        return psycopg.connect(self.dsn(**params), autocommit=autocommit)


class Server(_Endpoint):
    """A PostgreSQL server with the tests' roles.

    ``postgres`` is the superuser; ``alice`` is an ordinary role; both need no password. PASSWORDS
    has the roles that need one.
    """

    def __init__(self, bin_dir: Path) -> None:
        self.cluster = ChangingCluster(bin_dir, SETTINGS, DEFAULT_HBA)
        try:
            self.cluster.start()
            self.bin = self.cluster.bin
            self.version = self.cluster.version
            self.port = self.cluster.port
            self.socket_dir = self.cluster.socket_dir
            self._create_roles()
        except BaseException:
            self.cluster.close()
            raise

    def start(self) -> None:
        """Starts it again after ``stop``, on the same port."""
        self.cluster.start()

    def stop(self, *, immediate: bool = False) -> None:
        """Stops it; ``immediate``: as after a crash."""
        self.cluster.stop(immediate=immediate)

    def restart(self, *, immediate: bool = False) -> None:
        """Restarts it: ``stop`` and ``start``."""
        self.cluster.restart(immediate=immediate)

    def set(self, name: str, value: str) -> None:
        """Sets a parameter of the server, for all connections made after this returns."""
        with self.connect() as conn:
            conn.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        self.cluster.reload()

    def set_hba(self, lines: list[str] | None = None) -> None:
        """Replaces pg_hba.conf and reloads; ``None`` goes back to DEFAULT_HBA."""
        self.cluster.set_hba(lines)

    def start_tls(self, certificates: Certificates) -> None:
        """Offers TLS from now on, with the certificate ``server``; skips the test if it cannot."""
        cluster = self.cluster
        with self.connect() as conn:
            try:
                conn.execute("ALTER SYSTEM SET ssl = on")
            except psycopg.Error:
                pytest.skip("this PostgreSQL was built without TLS")
            conn.execute("ALTER SYSTEM SET ssl_ca_file = 'ca.pem'")
        for name, file in (
            ("ca.pem", certificates.ca),
            ("server.crt", certificates.server.cert),
            ("server.key", certificates.server.key),
        ):
            cluster.write(name, file.read_text().splitlines())
        cluster.reload()

    def log(self, start: int = 0) -> str:
        """The server's log so far, from byte ``start``: see ``cluster.log_size()``."""
        return self.cluster.log(start)

    def close(self) -> None:
        """Stops the server and removes its folder."""
        self.cluster.close()

    def clients(self) -> list[tuple[Any, ...]]:
        """Other client backends that the server has now: pid, application_name, state, query."""
        with self.connect() as conn:
            return _other_clients(conn)

    def wait_for_no_clients(self, timeout: float = 20.0) -> list[tuple[Any, ...]]:
        """Waits until no other client is connected; returns those that are still left."""
        deadline = time.monotonic() + timeout
        with self.connect() as conn:  # connecting takes as long as a look
            while (left := _other_clients(conn)) and time.monotonic() < deadline:
                time.sleep(0.02)
            return left

    def _create_roles(self) -> None:
        with self.connect() as conn:
            conn.execute("CREATE ROLE alice LOGIN")
            for role, password in PASSWORDS.items():
                if self.version >= 100000:
                    encryption = "md5" if METHODS[role] == "md5" else "scram-sha-256"
                    conn.execute(f"SET password_encryption = '{encryption}'")
                conn.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")


def _other_clients(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute(
        "SELECT pid, application_name, state, query FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND client_port IS NOT NULL"
    ).fetchall()


class Proxy(_Endpoint):
    """``python -m proxy serve`` as a process of its own, on a free loopback port.

    Args:
        upstream: the connection string of the server behind it.
        options: further command line options.
        env: further environment variables.

    Attributes:
        every: command line options for every proxy.
        forks: the fork server, for proxies without variables that Python reads; None: not used.
    """

    every: ClassVar[list[str]] = []
    forks: ClassVar[ForkServer | None] = None

    def __init__(self, upstream: str, *options: str, env: dict[str, str] | None = None) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()
        args = (
            *("serve", "--listen", "127.0.0.1:0", "--upstream", upstream),
            # So that spares end soon, and whatever is left over can be told from them.
            *("--spare-lifetime", "1s", *Proxy.every, *options),
        )
        reader, writer = os.pipe()
        self._stderr = os.fdopen(reader, errors="replace")
        try:
            with Path(os.devnull).open("wb") as nowhere:
                self._process = start_program(args, env, stdout=nowhere.fileno(), stderr=writer)
        finally:
            os.close(writer)
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        try:
            self.port = int(self.wait_for_log(r"listening on 127\.0\.0\.1:(\d+)")[1])
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """Its log so far: what it has written to stderr."""
        with self._changed:
            return "".join(self._lines)

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    def wait_for_log(self, pattern: str, timeout: float = START_TIMEOUT) -> re.Match[str]:
        """Waits for a line of the log in which the pattern is found, earlier lines included.

        Raises:
            TimeoutError: there was none, or the proxy ended; the message has the log.
        """

        def find() -> re.Match[str] | None:
            return next((m for line in self._lines if (m := re.search(pattern, line))), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or not self._reader.is_alive(), timeout)
            match = find()
        if match is None:
            raise TimeoutError(f"the proxy did not log {pattern!r}; its log:\n{self.log}")
        return match

    def stop(self, signal_: int = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> int:
        """Sends a signal and waits for the end; returns the exit code.

        Raises:
            TimeoutError: it did not end in time (it was killed then); the message has the log.
        """
        self._process.send_signal(signal_)
        return self.wait(timeout)

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Waits for the end; returns the exit code."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the proxy did not end; its log:\n{self.log}") from None
        self._close()
        return code

    def kill(self) -> None:
        """Kills the process, if it still runs."""
        if self.running:
            self._process.kill()
        self._process.wait(STOP_TIMEOUT)
        self._close()

    def _close(self) -> None:
        self._reader.join(5.0)
        self._stderr.close()

    def _drain(self) -> None:
        for line in self._stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()


def psql(
    port: int,
    *args: str,
    input: str | None = None,
    timeout: float = 60.0,
    **params: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs psql against a port of this machine, without the user's .psqlrc; params are libpq's."""
    defaults = {"host": "127.0.0.1", "port": port, "user": "postgres", "dbname": "postgres"}
    return subprocess.run(
        [_psql(), "-X", "-d", make_conninfo("", **{**defaults, **params}), *args],
        input=input if input is not None else "",
        env={**clean_environment(), "PAGER": "cat", "PGCONNECT_TIMEOUT": "10"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start_psql(found: _Endpoint, *args: str, **params: Any) -> subprocess.Popen[str]:
    """Starts psql, as `psql` does, with pipes; what it writes to stderr comes with its output."""
    return subprocess.Popen(
        [_psql(), "-X", "-d", found.dsn(**params), *args],
        env={**clean_environment(), "PAGER": "cat"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _psql() -> str:
    program = shutil.which("psql", path=psql_path())
    assert program is not None, "no psql found"
    return program


def psql_path() -> str:
    """A search path for client programs: the machine's own first, then those of the wheel."""
    from proxy.demo.embedded import find_wheel_bin

    wheel = find_wheel_bin()
    return os.pathsep.join(
        ["/usr/bin", os.environ.get("PATH", ""), *([str(wheel)] if wheel else [])]
    )


def clean_environment() -> dict[str, str]:
    """Our environment without libpq's variables; messages in English."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C.UTF-8"}


def run_program(
    *args: str, env: Mapping[str, str] | None = None, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m proxy`` with these arguments to its end.

    Args:
        args: its arguments.
        env: further variables, beside those of `program_environment`.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    with tempfile.TemporaryFile("r+") as stdout, tempfile.TemporaryFile("r+") as stderr:
        process = start_program(args, env, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT)
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(args, code, stdout.read(), stderr.read())


def start_program(
    args: Sequence[str], env: Mapping[str, str] | None, *, stdout: int, stderr: int
) -> Fork | subprocess.Popen[bytes]:
    """Starts ``python -m proxy`` with these arguments: see `run_program`."""
    environment = {**program_environment(), **(env or {})}
    if Proxy.forks is not None and not any(name.startswith("PYTHON") for name in env or ()):
        return Proxy.forks.start(args, environment, stdout=stdout, stderr=stderr)
    return subprocess.Popen(
        [sys.executable, "-m", "proxy", *args],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def program_environment() -> dict[str, str]:
    """`clean_environment` for a proxy whose log is read while it runs."""
    return {**clean_environment(), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running(
    *command: str, log: Path, pass_fds: Collection[int] = (), env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program in a session of its own, at the top of the checkout; kills it at the end.

    Args:
        command: the program and its arguments.
        log: where its output goes.
        pass_fds: the descriptors that it inherits.
        env: variables beside those of `clean_environment`.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**clean_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT)


def wait_for_logins(found: _Endpoint, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a program lets clients in. Raises TimeoutError with its log."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(psycopg.Error), found.connect() as conn:
            conn.execute("SELECT 1")
            return
        time.sleep(0.05)
    raise TimeoutError(f"it did not start: {log.read_text(errors='replace')[-1000:]}")


@contextlib.contextmanager
def database(server: Server, name: str) -> Iterator[str]:
    """A database of its own, where every role may create what it likes; dropped at the end."""
    # The default since version 15, WAL_LOG, takes half as much CPU again.
    strategy = "STRATEGY file_copy" if server.version >= 150000 else ""
    with server.connect() as conn:
        conn.execute(f'CREATE DATABASE "{name}" TEMPLATE template0 {strategy}')
    try:
        with server.connect(dbname=name) as conn:
            conn.execute("GRANT ALL ON SCHEMA public TO PUBLIC")
        yield name
    finally:
        if server.cluster.running:
            with server.connect() as conn:
                # A proxy may be opening a spare just now.
                conn.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    [name],
                )
                conn.execute(f'DROP DATABASE "{name}"')
