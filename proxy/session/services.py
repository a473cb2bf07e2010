"""The interface between a session and the process that serves it.

Invariant: a session knows no more of its process than this, so `server` is the layer above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from protocol.startup import CancelRequest, StartupMessage
from proxy.backends.route import Route
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.service import JobService
from proxy.net.connection import Connection
from proxy.runtime import Runtime


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session as monitoring shows it.

    Attributes:
        number: unique in its process, among past sessions too.
        user, database, application_name: from its startup packet.
        state: as in pg_stat_activity; ``login`` before that; ``console`` in the console.
        connected_at: in UTC.
        backend_pid: of its primary; 0 before the login.
        jobs: number of jobs that it has launched and not fetched or detached.
    """

    number: int
    user: bytes
    database: bytes
    application_name: bytes
    state: str
    connected_at: datetime
    backend_pid: int
    jobs: int


class Served(Protocol):
    """A session as its process sees it.

    Attributes:
        client: its connection.
        route: to its server.
    """

    client: Connection
    route: Route

    @property
    def is_console(self) -> bool:
        """Whether it is a console session, which has no server."""

    @property
    def summary(self) -> SessionSummary:
        """The session as monitoring shows it."""

    @property
    def interrupts(self) -> Interrupts | None:
        """Those of the call in progress, if any."""

    def shut_down(self) -> None:
        """End the session as a server does that shuts down."""


class Services(Protocol):
    """The process as its sessions see it."""

    @property
    def runtime(self) -> Runtime:
        """The live objects made of the configuration; a reload replaces it."""

    @property
    def jobs(self) -> JobService:
        """The jobs of all sessions."""

    @property
    def extension_changes(self) -> int:
        """Number of transactions that have changed the extension, in any database."""

    def extension_changed(self) -> None:
        """Count one more transaction that has."""

    def session_began(self, session: Served) -> None:
        """A client has connected."""

    def session_ended(self, session: Served, key: CancelRequest | None) -> None:
        """A session has closed its connections. `key`: what cancels its statements."""

    def key_known(self, key: CancelRequest, session: Served) -> None:
        """The server has told the key that cancels a session's statements."""

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel a wait in the proxy, or pass the request on to the server."""

    def has_console(self, startup: StartupMessage) -> bool:
        """Whether a client asks for the console, and there is one."""

    async def console(
        self, client: Connection, startup: StartupMessage, rest: bytes, let_in: Callable[[], None]
    ) -> None:
        """Log a client in to the console, and serve it until it leaves.

        Args:
            client: its connection.
            startup: its startup packet.
            rest: what it has sent behind that.
            let_in: called after the login.

        Raises SQLError, ProtocolViolation, ConnectionError.
        """
