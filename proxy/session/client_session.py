"""A session as its interceptions see it: two connections, and what is known about the server.

Invariant: modules that serve a batch know no more of `session.Session` than this.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from protocol.startup import CancelRequest
from proxy.backends.route import Route
from proxy.jobs.owner import Owner
from proxy.net.connection import Connection
from proxy.session.custom_settings import CustomSettings
from proxy.session.extension_state import ExtensionState
from proxy.session.reader import SqlReader
from proxy.session.relay import Hooks, Relay
from proxy.sql import encodings
from proxy.sql.lexer import READING
from proxy.statements.reading import Reading


class ClientSession(Owner, Hooks):
    """
    Attributes:
        client: its connection.
        primary: the connection to its server, once there is one.
        route: to its server; before it is connected, to the first host.
        relay: passes bytes on, after the login.
        reader: reads its SQL, after the login.
        extension_state: which pg_background its database has.
        has_been_warned: whether the client knows that the server has the C extension too.
    """

    client: Connection
    primary: Connection | None
    route: Route
    _key: CancelRequest | None
    relay: Relay
    reader: SqlReader
    custom_settings: CustomSettings
    extension_state: ExtensionState
    has_been_warned = False

    @abstractmethod
    def complaint_from_inside(self, error: bytes) -> bytes | None:
        """The same as `complaint`, for a statement that the client has not sent as it is: the
        message that replaces what a call from inside the database has failed with."""

    @property
    def pid(self) -> int:
        """The primary backend's, as the server has told it; 0 before."""
        return self._key.pid if self._key is not None else 0

    @property
    def client_encoding(self) -> bytes:
        return self.reported[b"client_encoding"] or b"UTF8"

    @property
    def server_encoding(self) -> bytes:
        return self.reported[b"server_encoding"]

    @property
    def codec(self) -> str:
        """The Python codec for client_encoding."""
        return encodings.codec(self.reported[b"client_encoding"])

    @property
    def reading(self) -> Reading:
        """The known settings that affect how SQL is read."""
        return Reading(*map(self.reported.__getitem__, READING))

    @property
    def server_version(self) -> int:
        return self.reader.server_version

    def cancel_statement(self, is_meant: Callable[[], bool]) -> None:
        if self._key is None or self.primary is None:
            return
        primary = self.primary

        def is_still_meant() -> bool:
            # What the server says next is read when it is done with the request (before 17 it
            # signals the backend twice): it must not be for what the client sends after that.
            if may_send := is_meant():
                primary.take_a_break()
                told.add_done_callback(lambda _: primary.end_break())
            return may_send

        told = self.service.cancel_statement(self.route, self._key, is_still_meant)

    @property
    def zone(self) -> tzinfo:
        """The session's time zone; UTC if Python does not know it."""
        name = self.reported[b"TimeZone"].decode("ascii", "replace") or "UTC"
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            return UTC
