"""Roles that may launch. Another test may have created the role that lets them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.support.servers import Connection, Server

EXECUTOR: Final = "pgbackground_role"


@contextmanager
def executors(admin: Connection, *roles: str) -> Iterator[None]:
    """Lets these roles launch in the block; ``admin`` is a superuser in autocommit mode."""
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
    """Drops the role at the end of the block, if it was created in it."""
    with server.connect() as admin:
        was_there = _has_executor(admin)
    try:
        yield
    finally:
        if not was_there:
            with server.connect() as admin:
                admin.execute(f"DROP ROLE IF EXISTS {EXECUTOR}")


def create_executor(admin: Connection) -> None:
    """Creates the role, if it is missing."""
    if not _has_executor(admin):
        admin.execute(f"CREATE ROLE {EXECUTOR} NOLOGIN")


def _has_executor(admin: Connection) -> bool:
    return bool(admin.execute("SELECT FROM pg_roles WHERE rolname = %s", [EXECUTOR]).fetchall())
