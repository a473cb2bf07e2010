"""Files that others can read, and files that are not ours to remove."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy import private
from tests.conftest import StartProxy
from tests.support.certificates import Certificates
from tests.support.servers import Server, run_program
from tests.test_tls import tls_options


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    """A proxy that should not start."""
    return run_program("serve", "--listen", "127.0.0.1:0", *options)


def status(mode: int, uid: int) -> os.stat_result:
    return os.stat_result((mode | stat.S_IFREG, 0, 0, 1, uid, 0, 0, 0, 0, 0))


def test_all_modes() -> None:
    """As PostgreSQL takes its server's key: 0600 or less, of root 0640 or less."""
    for mode in range(0o1000):
        assert private.is_exposed(status(mode, 1000)) == bool(mode & 0o077)
        assert private.is_exposed(status(mode, 0)) == bool(mode & 0o037)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o666, 0o777])
def test_secrets_that_others_can_read_are_refused(
    server: Server, certificates: Certificates, tmp_path: Path, mode: int
) -> None:
    upstream = f"host={server.host} port={server.port}"
    auth_file, key = tmp_path / "userlist.txt", tmp_path / "key.pem"
    auth_file.write_text('"alice" "s3cr3t"\n')
    shutil.copyfile(certificates.server.key, key)
    for file in (auth_file, key):
        file.chmod(mode)
    attempts = {
        "auth_file: ": (auth_file, ["--auth-file", str(auth_file)]),
        "client_tls_key_file: ": (
            key,
            [*tls_options(certificates, "require"), "--client-tls-key-file", str(key)],
        ),
        "sslkey: ": (key, []),
    }
    for name, (file, options) in attempts.items():
        conninfo = upstream
        if name == "sslkey: ":
            conninfo += f" sslmode=require sslcert={certificates.server.cert} sslkey={key}"
        done = serve("--upstream", conninfo, *options)
        assert done.returncode in (1, 2), name
        assert f"{name}{file} has group or world access; chmod 600 {file}" in done.stderr
        assert done.stderr.count("\n") == 1
        assert "s3cr3t" not in done.stderr


def test_an_auth_file_that_is_opened_to_others_stays_as_it_was(
    server: Server, start_proxy: StartProxy, tmp_path: Path
) -> None:
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_text('"postgres" "x"\n')
    proxy = start_proxy("--auth-file", str(auth_file), "--spares", "0")
    auth_file.chmod(0o644)
    with proxy.connect() as conn:
        conn.execute(
            "SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (x int)"
        )
    proxy.wait_for_log("userlist.txt has group or world access.*its previous content stays in use")


def _regular(path: Path) -> None:
    path.write_text("precious")


def _linked(path: Path) -> None:
    path.with_suffix(".target").write_text("precious")
    path.symlink_to(path.with_suffix(".target"))


def _link_to_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path.with_suffix(".target")))
    path.symlink_to(path.with_suffix(".target"))


@pytest.mark.parametrize(
    "make", [_regular, _linked, _link_to_socket, Path.mkdir, os.mkfifo], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_no_socket_is_not_removed(
    server: Server, tmp_path: Path, make: Callable[[Path], None], workers: str
) -> None:
    path = tmp_path / ".s.PGSQL.7777"
    make(path)
    before = path.lstat()
    done = serve(
        *("--listen", f"{tmp_path}:7777", "--workers", workers),
        *("--upstream", f"host={server.host} port={server.port}"),
    )
    assert done.returncode == 1
    assert "something else than a socket is there; it is left alone" in done.stderr
    assert path.lstat() == before


@pytest.mark.parametrize("backlog", [0, 5])
def test_a_socket_that_somebody_listens_at_is_not_removed(
    server: Server, tmp_path: Path, backlog: int
) -> None:
    path = tmp_path / ".s.PGSQL.7777"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as waiting:
        listening.bind(str(path))
        listening.listen(backlog)
        waiting.connect(str(path))  # with a backlog of 0 no other client gets in
        done = serve(
            *("--listen", f"{tmp_path}:7777", "--upstream"),
            f"host={server.host} port={server.port}",
        )
    assert done.returncode == 1
    assert "another process is listening there" in done.stderr
    assert path.is_socket()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_socket_of_a_proxy_that_is_gone_is_replaced_and_only_our_own_is_removed(
    start_proxy: StartProxy, tmp_path: Path, workers: str
) -> None:
    path = tmp_path / ".s.PGSQL.7777"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    proxy = start_proxy("--listen", f"{tmp_path}:7777", "--workers", workers)
    proxy.wait_for_log("listening on Unix socket")
    with proxy.connect(host=tmp_path, port=7777) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    path.rename(path.with_suffix(".away"))
    path.write_text("precious")
    assert proxy.stop() == 0
    assert path.read_text() == "precious"
