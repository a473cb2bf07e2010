"""Roles that may launch, in a server whose other tests may have made the role for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.support.servers import Connection

EXECUTOR: Final = "pgbackground_role"


@contextmanager
def executors(admin: Connection, *roles: str) -> Iterator[None]:
    """They may launch, for a while; ``admin``: a superuser in autocommit mode."""
    known = "SELECT FROM pg_roles WHERE rolname = %s"
    was_there = bool(admin.execute(known, [EXECUTOR]).fetchall())
    if not was_there:
        admin.execute(f"CREATE ROLE {EXECUTOR} NOLOGIN")
    for role in roles:
        admin.execute(f"GRANT {EXECUTOR} TO {role}")
    try:
        yield
    finally:
        for role in roles:
            admin.execute(f"REVOKE {EXECUTOR} FROM {role}")
        if not was_there:
            admin.execute(f"DROP ROLE {EXECUTOR}")
