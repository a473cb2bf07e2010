"""What the tests of real clients share: doing a thing directly and through the proxy, and programs.

Invariant: both sides begin alike (a fresh database of the same name), and the comparison leaves out
only what would differ in a direct repetition too.
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
    """Does it directly and through the proxy, each in a fresh DATABASE; returns both results."""
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
    """The output of a program, and its exit code."""

    code: int
    out: str
    err: str


def find_tool(server: Server, name: str) -> str | None:
    """A working client program, not older than the server: the server's own, or the machine's."""
    for found in (server.bin / name, shutil.which(name, path=psql_path())):
        if found is None:
            continue
        try:
            # Debian's /usr/bin/pg_dump and the like are wrappers, and print the version that they
            # choose.
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
    """`find_tool`; skips the test if there is no such program."""
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
    """Starts a program, which takes libpq's variables and has no input."""
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
    """Environment variables for libpq."""
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
    """Runs such a program to its end; its output has PORT in place of the endpoint's port."""
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
    """The output of a program, without the port that it connected to."""
    port = re.compile(rf"\b{endpoint.port}\b")
    return Done(code, *(port.sub("PORT", text.decode()) for text in (out, err)))


def succeed(endpoint: Endpoint, program: str, *args: str | Path, **options: str) -> Done:
    """`run`, but it must not fail."""
    done = run(endpoint, program, *args, **options)  # type: ignore[arg-type]
    assert done.code == 0, done.err
    return done
