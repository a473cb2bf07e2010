"""HAProxy in front of one or several proxies: each connection goes to the next one in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.demo.embedded import free_port
from tests.support.servers import _Endpoint, running, wait_for_logins


class HAProxy(_Endpoint):
    """A running HAProxy."""

    def __init__(self, port: int) -> None:
        self.port = port


@contextlib.contextmanager
def haproxy(folder: Path, *servers: str) -> Iterator[HAProxy]:
    """Starts it; skips the test if there is none on this machine.

    Args:
        folder: for its configuration and log.
        servers: each as in its configuration: an address and options.
    """
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("no haproxy found")
    port = free_port()
    config = (
        "defaults",
        "  mode tcp",
        "  timeout connect 5s",
        "  timeout client 1h",
        "  timeout server 1h",
        "listen pg_background",
        f"  bind 127.0.0.1:{port}",
        "  balance roundrobin",
        *(f"  server p{number} {server}" for number, server in enumerate(servers)),
    )
    (folder / "haproxy.cfg").write_text("".join(f"{line}\n" for line in config))
    log = folder / "haproxy.log"
    with running(program, "-db", "-f", str(folder / "haproxy.cfg"), log=log) as process:
        found = HAProxy(port)
        wait_for_logins(found, process, log)
        yield found
