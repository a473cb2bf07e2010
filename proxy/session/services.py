"""What a session asks of the process that serves it, and what the process sees of a session.

Invariant: a session knows no more of its process than this, so `server` stands above it.
"""

from __future__ import annotations

from typing import Protocol

from protocol.startup import CancelRequest
from proxy.backends.route import Route
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.service import JobService
from proxy.net.connection import Connection
from proxy.runtime import Runtime


class Served(Protocol):
    """A session, as its process sees it.

    Attributes:
        client: its connection.
        route: to its server.
    """

    client: Connection
    route: Route

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
