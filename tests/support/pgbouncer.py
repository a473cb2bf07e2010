"""PgBouncer between the proxy and the server, in any pool mode."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from proxy.config.gucs import JOB_SETTING, SESSION_SETTING
from proxy.demo.embedded import free_port
from tests.support.servers import Server, _Endpoint, running, wait_for_logins

OURS: Final = (SESSION_SETTING.decode(), JOB_SETTING.decode())
"""Startup parameters that the proxy sends."""

REFUSED: Final = (*OURS, "extra_float_digits", "options")
"""Startup parameters that PgBouncer refuses unless it is told to ignore them."""


class PgBouncer(_Endpoint):
    """A running PgBouncer."""

    def __init__(self, port: int) -> None:
        self.port = port


@contextlib.contextmanager
def pgbouncer(
    server: Server, folder: Path, mode: str, roles: Sequence[str], pool_size: int = 20
) -> Iterator[PgBouncer]:
    """Starts it in front of a server; skips the test if there is none on this machine."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("no pgbouncer found")
    port = free_port()
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # it does not run as root
    (folder / "users").write_text("".join(f'"{role}" ""\n' for role in ("postgres", *roles)))
    (folder / "pgbouncer.ini").write_text(
        "\n".join(
            (
                "[databases]",
                f"* = host={server.host} port={server.port}",
                "[pgbouncer]",
                f"pool_mode = {mode}",
                "listen_addr = 127.0.0.1",
                f"listen_port = {port}",
                "unix_socket_dir =",
                f"default_pool_size = {pool_size}",
                f"ignore_startup_parameters = {','.join(REFUSED)}",
                "auth_type = trust",
                f"auth_file = {folder}/users",
                *([f"user = {_unprivileged()}"] if os.geteuid() == 0 else ()),
                "",
            )
        )
    )
    log = folder / "log"
    with running(program, "-q", str(folder / "pgbouncer.ini"), log=log) as process:
        bouncer = PgBouncer(port)
        wait_for_logins(bouncer, process, log)
        yield bouncer


def _unprivileged() -> str:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    pytest.skip("PgBouncer does not run as root, and there is nobody else")
