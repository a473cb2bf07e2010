"""Roles that may launch, in a server whose other tests may have made the role for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.support.servers import Connection, Server

EXECUTOR: Final = "pgbackground_role"


@contextmanager
def executors(admin: Connection, *roles: str) -> Iterator[None]:
    """They may launch, for a while; ``admin``: a superuser in autocommit mode."""
    was_there = _has_executor(admin)
    create_executor(admin)
    for role in roles:
        admin.execute(f"GRANT {EXECUTOR} TO {role}")
    try:
        yield
    finally:
        for role in roles:
            admin.execute(f"REVOKE {EXECUTOR} FROM {role}")
        if not was_there:
            admin.execute(f"DROP ROLE {EXECUTOR}")


@contextmanager
def executor_as_before(server: Server) -> Iterator[None]:
    """At the end the role is dropped, if it was made meanwhile."""
    with server.connect() as admin:
        was_there = _has_executor(admin)
    try:
        yield
    finally:
        if not was_there:
            with server.connect() as admin:
                admin.execute(f"DROP ROLE IF EXISTS {EXECUTOR}")


def create_executor(admin: Connection) -> None:
    """Make the role, if nobody has."""
    if not _has_executor(admin):
        admin.execute(f"CREATE ROLE {EXECUTOR} NOLOGIN")


def _has_executor(admin: Connection) -> bool:
    return bool(admin.execute("SELECT FROM pg_roles WHERE rolname = %s", [EXECUTOR]).fetchall())
