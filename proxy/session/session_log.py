"""Logs a client's connection, its login or refusal, and its end.

Invariant: the texts are PostgreSQL's, where it has the event. The client's address and the pid of
its backend follow, since one process serves many, and the server's own log has only the pid.
log_connections and log_disconnections decide what is logged.
"""

from __future__ import annotations

import time

from protocol.startup import StartupMessage
from proxy.config import Config
from proxy.log import Event, Milliseconds, Value, listed, logger
from proxy.net.connection import Connection
from proxy.net.peer import Peer
from proxy.stats import counters, error_class

_LOCAL = "[local]"


class SessionLog:
    """The log entries of one client."""

    __slots__ = ("_application", "_authorized", "_began", "_from", "_is_replication", "_who")

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._from: dict[str, Value] = {}
        self._who: dict[str, Value] = {}
        self._application: dict[str, Value] = {}
        self._is_replication = False
        self._authorized = False

    def received(self, peer: Peer, config: Config) -> None:
        """The client has connected."""
        if peer.is_local:
            self._from = {"host": _LOCAL}
        else:
            self._from = {"host": peer.host, "port": peer.port}
        if config.log_connections:
            logger.info(Event("connection received", self._from))

    def asked(self, startup: StartupMessage) -> None:
        """It has sent its startup packet."""
        database = b"" if startup.is_physical_replication else startup.database
        self._who = {"user": _text(startup.user), "database": _text(database)}
        if name := startup.application_name:
            self._application = {"application_name": _text(name)}
        self._is_replication = startup.is_replication

    def authorized(self, client: Connection, pid: int, config: Config) -> None:
        """The server has let it in, on a backend."""
        self._authorized = True
        if not config.log_connections:
            return
        what, named = "connection authorized", self._who | self._application
        if self._is_replication:
            what, named = f"replication {what}", {"user": self._who["user"], **self._application}
        where: dict[str, Value] = {**self._from, "pid": pid}
        text = f"{listed(named)}{_tls(client)} {listed(where)}"
        logger.info(Event(what, named | where, text))

    def ended(self, sqlstate: str | None, config: Config) -> None:
        """The client is gone.

        Args:
            sqlstate: of the error that refused it; None if it left, as psql does to ask a password.
            config: says what is logged.
        """
        if self._authorized:
            if config.log_disconnections:
                self._disconnected()
        elif self._who and sqlstate:
            counters.refused[error_class(sqlstate)] += 1
            if config.log_connections:
                values = {**self._who, **self._from, "sqlstate": sqlstate}
                logger.info(Event("connection refused", values))

    def _disconnected(self) -> None:
        took = Milliseconds(round((time.monotonic() - self._began) * 1000, 3))
        seconds, ms = divmod(int(took), 1000)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        values = self._who | self._from
        text = f"session time: {hours}:{minutes:02}:{seconds:02}.{ms:03} {listed(values)}"
        logger.info(Event("disconnection", values | {"duration": took}, text))


def _tls(client: Connection) -> str:
    found = client.transport.get_extra_info("cipher") if client.is_open else None
    if found is None:
        return ""
    name, version, bits = found
    return f" SSL enabled (protocol={version}, cipher={name}, bits={bits})"


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
