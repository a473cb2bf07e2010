"""A session as its interceptions see it: two connections, and what is known about the server.

Invariant: modules that serve a batch know no more of `session.Session` than this.
"""

from __future__ import annotations

from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

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
        relay: passes bytes on, after the login.
        reader: reads its SQL, after the login.
        extension_state: which pg_background its database has.
        has_been_warned: whether the client knows that the server has the C extension too.
    """

    client: Connection
    primary: Connection | None
    relay: Relay
    reader: SqlReader
    custom_settings: CustomSettings
    extension_state: ExtensionState
    has_been_warned = False

    @property
    def client_encoding(self) -> bytes:
        return self.relay.setting(b"client_encoding") or b"UTF8"

    @property
    def server_encoding(self) -> bytes:
        return self.relay.setting(b"server_encoding")

    @property
    def codec(self) -> str:
        """The Python codec for client_encoding."""
        return encodings.codec(self.relay.setting(b"client_encoding"))

    @property
    def reading(self) -> Reading:
        """The known settings that affect how SQL is read."""
        return Reading(*map(self.relay.setting, READING))

    @property
    def server_version(self) -> int:
        return self.reader.server_version

    @property
    def zone(self) -> tzinfo:
        """The session's time zone; UTC if Python does not know it."""
        name = self.relay.setting(b"TimeZone").decode("ascii", "replace") or "UTC"
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            return UTC
