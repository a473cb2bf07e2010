"""Decides who may try to log in, before the server is: allow_from, allow_roles, allow_databases.

Invariant: what these do not allow never reaches the server. For the rest, the server decides.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import INVALID_AUTHORIZATION_SPECIFICATION, SQLError
from protocol.startup import StartupMessage
from proxy.config import Config
from proxy.net.connection import Connection

_LONGEST_NAME: Final = 63
"""Bytes of an application_name that the server keeps."""

_REPLICATION: Final = "replication"
"""Stands for physical replication in allow_databases, as in pg_hba.conf."""


def check_address(client: Connection, config: Config) -> None:
    """Raises SQLError, FATAL, if allow_from excludes the client. Unix sockets always pass."""
    if not config.allow_from or (address := client.peer.address) is None:
        return
    if not any(address in network for network in config.allow_from):
        raise _refused(f'no connections are taken from host "{address}"', "allow_from")


def check_names(startup: StartupMessage, config: Config) -> None:
    """Raises SQLError, FATAL, if the role or the database is not allowed."""
    role = _text(startup.user)
    database = _REPLICATION if startup.is_physical_replication else _text(startup.database)
    if config.allow_roles and role not in config.allow_roles:
        raise _refused(f'role "{role}" is not allowed to connect', "allow_roles")
    if config.allow_databases and database not in config.allow_databases:
        raise _refused(f'connections to database "{database}" are not allowed', "allow_databases")


def name_with_host(name: bytes, client: Connection) -> bytes:
    """The application_name followed by the client's address, as PgBouncer writes it."""
    address = client.peer.address
    if address is None:
        host = b"[local]"
    else:
        host = f"{f'[{address}]' if address.version == 6 else address}:{client.peer.port}".encode()
    return b"%b - %b" % (name[: _LONGEST_NAME - 3 - len(host)], host) if name else host


def _refused(message: str, setting: str) -> SQLError:
    return SQLError(
        INVALID_AUTHORIZATION_SPECIFICATION,
        message,
        detail=f"The proxy is configured so ({setting}).",
        severity="FATAL",
    )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
