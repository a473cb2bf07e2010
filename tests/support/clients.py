"""What the tests of real clients share: the same thing done direct and by the proxy, and programs.

Invariant: both sides begin alike (a fresh database of the same name), and nothing that a program or
a driver shows is left out of the comparison but what a direct repetition would change too.
"""

from __future__ import annotations

import difflib
import itertools
import pprint
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import pytest

from tests.support.servers import Proxy, Server, clean_environment, database, psql_path

T = TypeVar("T")
Endpoint: TypeAlias = Server | Proxy

DATABASE: Final = "clients"
TIMEOUT: Final = 60.0


def same(server: Server, proxy: Proxy, action: Callable[[Endpoint], T]) -> T:
    """Does it direct and by the proxy, each in a fresh DATABASE; returns what both gave."""
    with database(server, DATABASE):
        direct = action(server)
    with database(server, DATABASE):
        proxied = action(proxy)
    if proxied != direct:
        before, after = (
            pprint.pformat(found, width=100).splitlines() for found in (direct, proxied)
        )
        difference = difflib.unified_diff(before, after, "direct", "by the proxy", lineterm="", n=1)
        pytest.fail("\n".join(itertools.islice(difference, 60)))
    return direct


@dataclass(frozen=True)
class Done:
    """What a program said."""

    code: int
    out: str
    err: str


def find_tool(server: Server, name: str) -> str | None:
    """A client program that works and is not older than the server: its own, or the machine's."""
    for found in (server.bin / name, shutil.which(name, path=psql_path())):
        if found is None:
            continue
        try:
            # Debian's /usr/bin/pg_dump and the like are wrappers, and tell the version they choose.
            said = subprocess.run(
                [found, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):  # a wheel's pg_verifybackup crashes
            continue
        version = re.search(r"\) (\d+)", said)
        if version and int(version[1]) >= server.version // 10000:
            return str(found)
    return None


def tool(server: Server, name: str) -> str:
    """``find_tool``; skips the test if there is none."""
    found = find_tool(server, name)
    if found is None:
        pytest.skip(f"no working {name} of version {server.version // 10000} or newer")
    return found


def start(
    endpoint: Endpoint,
    program: str,
    *args: str | Path,
    dbname: str | None = DATABASE,
    user: str = "postgres",
) -> subprocess.Popen[bytes]:
    """Starts a program that takes libpq's variables; it has no input."""
    return subprocess.Popen(
        [program, *args],
        env=environment(endpoint, dbname, user),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def environment(
    endpoint: Endpoint, dbname: str | None = DATABASE, user: str = "postgres"
) -> dict[str, str]:
    """Variables for libpq."""
    return {
        **clean_environment(),
        "PGHOST": endpoint.host,
        "PGPORT": str(endpoint.port),
        "PGUSER": user,
        "PGCONNECT_TIMEOUT": "10",
        "PGOPTIONS": "-c timezone=UTC",
        "PAGER": "cat",
        **({"PGDATABASE": dbname} if dbname else {}),
    }


def run(
    endpoint: Endpoint,
    program: str,
    *args: str | Path,
    input: str = "",
    dbname: str | None = DATABASE,
    user: str = "postgres",
    timeout: float = TIMEOUT,
) -> Done:
    """Runs such a program to its end; the endpoint's port is shown as PORT."""
    done = subprocess.run(
        [program, *args],
        env=environment(endpoint, dbname, user),
        input=input.encode(),
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return finished(endpoint, done.returncode, done.stdout, done.stderr)


def finished(endpoint: Endpoint, code: int, out: bytes, err: bytes) -> Done:
    """What a program said, less the port that it spoke to."""
    port = re.compile(rf"\b{endpoint.port}\b")
    return Done(code, *(port.sub("PORT", text.decode()) for text in (out, err)))


def succeed(endpoint: Endpoint, program: str, *args: str | Path, **options: str) -> Done:
    """``run``, for what must not fail."""
    done = run(endpoint, program, *args, **options)  # type: ignore[arg-type]
    assert done.code == 0, done.err
    return done
