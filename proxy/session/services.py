"""What a session asks of the process that serves it, and what the process sees of a session.

Invariant: a session knows no more of its process than this, so `server` stands above it.
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
class Overview:
    """A session, as those see it who watch the proxy.

    Attributes:
        number: which tells it from others of its process, also from those that have ended.
        user, database, application_name: of its startup packet.
        state: as in pg_stat_activity; ``login`` before that.
        connected_at: in UTC.
        backend_pid: of its primary; 0 before the login.
        jobs: how many it has launched and not fetched or detached.
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
    """A session, as its process sees it.

    Attributes:
        client: its connection.
        route: to its server.
        is_console: whether it talks to the proxy, and no server.
    """

    client: Connection
    route: Route
    is_console: bool

    @property
    def overview(self) -> Overview:
        """What there is to see of it."""

    @property
    def interrupts(self) -> Interrupts | None:
        """Of the call that is being made, if any."""

    def shut_down(self) -> None:
        """End the session as a server does that shuts down."""


class Services(Protocol):
    """The process, as its sessions see it."""

    @property
    def runtime(self) -> Runtime:
        """What the configuration has been made into; another one after a reload."""

    @property
    def jobs(self) -> JobService:
        """The jobs of all sessions."""

    @property
    def extension_changes(self) -> int:
        """How many transactions have changed the extension, in any database."""

    def extension_changed(self) -> None:
        """Count one more."""

    def session_began(self, session: Served) -> None:
        """A client has connected."""

    def session_ended(self, session: Served, key: CancelRequest | None) -> None:
        """It has closed its connections; `key`: what cancels its statements."""

    def key_known(self, key: CancelRequest, session: Served) -> None:
        """The server has said what cancels the statements of a session."""

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel what waits in the proxy, or pass the request on to the server."""

    def has_console(self, startup: StartupMessage) -> bool:
        """Whether a client wants to talk to the proxy itself, and there is a way to."""

    async def console(
        self, client: Connection, startup: StartupMessage, rest: bytes, let_in: Callable[[], None]
    ) -> None:
        """Have a client log in to the proxy, and serve it until it leaves.

        Args:
            client: its connection.
            startup: what it wants.
            rest: what it has sent behind that.
            let_in: called when it is let in.

        Raises SQLError, ProtocolViolation, ConnectionError.
        """
