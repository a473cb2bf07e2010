"""``pg-background-proxy check``: what is wrong with a configuration, and what to do about it.

Invariant: it does what clients and jobs do. The client is one of a proxy that runs in this process
without listening, so logins, launches and their errors are the proxy's own. Nothing is changed: the
one job that it launches runs ``SELECT 1``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

from protocol.errors import (
    CANNOT_CONNECT_NOW,
    TOO_MANY_CONNECTIONS,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.messages import AuthenticationOk
from protocol.startup import StartupMessage
from proxy import config
from proxy.auth.credentials import Credentials
from proxy.auth.methods import in_words
from proxy.auth.observer import LoginObserver
from proxy.auth.secret import Cleartext
from proxy.backends.backend import Backend, number, open_backend
from proxy.backends.route import Route
from proxy.config import Config, ConfigError, Given
from proxy.extension import installed, objects
from proxy.log import logger, printable
from proxy.net.peer import Peer
from proxy.reasons import cause, explain
from proxy.server import Server
from proxy.session.session import Session
from proxy.sql.encodings import parse_array
from proxy.sql.text import literal

_NAME: Final = b"pg-background-proxy check"

_TIMEOUT: Final = 30.0
"""Seconds for a login or a query, in addition to connect_timeout."""

_GRANT: Final = (
    "As a superuser, run SELECT grant_pg_background_privileges('{role}') in the database, through"
    " the proxy."
)
_MORE_CONNECTIONS: Final = (
    "Raise max_connections of the server, or close sessions: each session needs a connection, and"
    " each running job another."
)
_HINTS: Final[Mapping[str, str]] = {
    "28P01": "Give the role's password in PGPASSWORD, as its clients do.",
    "28000": "Let pg_hba.conf have a line for this role and database, and the proxy's address.",
    "3D000": "Name a database that is there, by --database.",
    "42501": "Grant CONNECT on the database to the role.",
    TOO_MANY_CONNECTIONS: _MORE_CONNECTIONS,
    CANNOT_CONNECT_NOW: "See the server's log.",
}
"""Advice on logins that the server has refused, by SQLSTATE."""

_SLOTS: Final = b"""
SELECT c.most - CASE WHEN r.rolsuper THEN 0 ELSE c.reserved END - c.used, c.most,
       CASE WHEN r.rolconnlimit >= 0 AND NOT r.rolsuper THEN r.rolconnlimit - r.used END,
       CASE WHEN d.datconnlimit >= 0 AND NOT r.rolsuper THEN d.datconnlimit - d.used END
FROM (SELECT current_setting('max_connections')::int AS most,
             (SELECT sum(s.setting::int) FROM pg_settings s WHERE s.name IN
                ('superuser_reserved_connections', 'reserved_connections')) AS reserved,
             (SELECT sum(s.numbackends) FROM pg_stat_database s) AS used) c,
     (SELECT o.rolsuper, o.rolconnlimit, (SELECT count(*)
        FROM pg_stat_activity a WHERE a.usesysid = o.oid AND a.datid IS NOT NULL) AS used
      FROM pg_roles o WHERE o.rolname = session_user) r,
     (SELECT b.datconnlimit, s.numbackends AS used
      FROM pg_database b, pg_stat_database s
      WHERE s.datid = b.oid AND b.datname = current_database()) d
"""
"""Connections: left to the role by the server's limit; max_connections; left by the role's and the
database's own limits, NULL without one."""

_RUN: Final = b"SELECT state, error_message FROM %bpg_background_run('SELECT 1', 0, 10000)"
_SCHEMA: Final = b"SELECT quote_ident(%b)"
_FUNCTIONS: Final = (
    b"SELECT p.proname, p.prosrc %b"
    % installed.functions("(SELECT n.oid FROM pg_namespace n WHERE n.nspname = %b)").encode()
)


class Report:
    """Writes a line for each finding, and remembers whether one was bad.

    Args:
        write: called with each line.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.all_well = True

    def ok(self, what: str, found: str) -> None:
        """Report that something works."""
        self._line("ok", what, found)

    def note(self, what: str, found: str, todo: str = "") -> None:
        """Report something that may be intended."""
        self._line("note", what, found, todo)

    def no(self, what: str, found: str, todo: str = "") -> None:
        """Report that something does not work. `todo`: what to do about it."""
        self.all_well = False
        self._line("no", what, found, todo)

    def _line(self, mark: str, what: str, found: str, todo: str = "") -> None:
        sentences = [text.strip().rstrip(".") for text in (found, todo) if text.strip()]
        text = " ".join(". ".join(sentences).split())
        self._write(printable(f"{mark:<4}  {what}: {text}."))


class _FromLog(logging.Handler):
    """Puts the proxy's log messages into the report."""

    def __init__(self, report: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report("configuration", record.getMessage())


def check(
    flags: Mapping[str, str | list[str] | None],
    file: Path | None,
    *,
    role: str | None,
    database: str | None,
    environ: Mapping[str, str],
    run: Callable[[Coroutine[Any, Any, int]], int],
    write: Callable[[str], object],
) -> int:
    """Check everything, and report line by line. Returns 0 if all is well, otherwise 1.

    Args:
        flags: the settings, as for `serve`.
        file: the configuration file.
        role: of a client; None for libpq's default.
        database: of a client; None for libpq's default.
        environ: has PGUSER, PGDATABASE and PGPASSWORD.
        run: runs a coroutine.
        write: called with each line.
    """
    report = Report(write)
    from_log = _FromLog(report.no)
    logger.handlers[:] = [from_log]
    logger.propagate = False
    settings = _read(flags, file, environ, report)
    if settings is None:
        return 1
    user = role or environ.get("PGUSER") or _system_user()
    client = _Client(
        user.encode("utf-8", "surrogateescape"),
        (database or environ.get("PGDATABASE") or user).encode("utf-8", "surrogateescape"),
        environ["PGPASSWORD"].encode("utf-8", "surrogateescape")
        if environ.get("PGPASSWORD")
        else None,
    )
    return run(Doctor(settings, client, report, from_log).check())


def _system_user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _read(
    flags: Mapping[str, str | list[str] | None],
    file: Path | None,
    environ: Mapping[str, str],
    report: Report,
) -> Config | None:
    """The configuration; None if it has any errors, all of which are reported."""
    try:
        given = config.collect(flags, file=file, environ=environ)
    except ConfigError as error:
        report.no("configuration", str(error))
        return None
    for name in given:
        alone: Given = {"upstream": ("upstream", [""]), name: given[name]}
        try:
            config.read(alone, environ)
        except ConfigError as error:
            report.no("configuration", str(error))
    try:
        return config.build(given, environ) if report.all_well else None
    except ConfigError as error:
        report.no("configuration", str(error))
        return None


@dataclasses.dataclass(frozen=True)
class _Client:
    """The client to be let in."""

    role: bytes
    database: bytes
    password: bytes | None = dataclasses.field(repr=False)

    @property
    def names(self) -> dict[bytes, bytes]:
        """The parameters of its StartupMessage."""
        return {
            b"user": self.role,
            b"database": self.database,
            b"application_name": _NAME,
            b"client_encoding": b"UTF8",
            b"search_path": b"pg_catalog",  # our queries trust no other operators
        }

    @property
    def in_words(self) -> str:
        return f'role "{_text(self.role)}", database "{_text(self.database)}"'


class Doctor:
    """Examines one server as one client."""

    def __init__(
        self, settings: Config, client: _Client, report: Report, from_log: _FromLog
    ) -> None:
        # Our own queries must pass unchanged, and nothing must be kept ready.
        self._config = dataclasses.replace(
            settings, catalogs="off", spares=0, log_min_job_duration=-1
        )
        self._client = client
        self._schema = ""  # of our extension, quoted; empty if it is not installed
        self._report = report
        self._from_log = from_log

    async def check(self) -> int:
        """Check everything that makes sense. Returns the exit code."""
        try:
            server = Server(self._config)
        except ConfigError as error:
            self._report.no("configuration", str(error))
            return 1
        if self._report.all_well:
            self._report.ok("configuration", "it can be used")
        self._from_log.report = self._report.note
        try:
            await self._check(server)
        finally:
            await server.jobs.end_all()
            server.jobs.close()
        return 0 if self._report.all_well else 1

    async def _check(self, server: Server) -> None:
        try:
            route = await server.runtime.check()
        except OSError as error:
            self._report.no(
                "server",
                str(error),
                "Start it, or correct upstream; listen_addresses of the server and firewalls must"
                " let the proxy's machine in",
            )
            return
        self._report.ok("server", f"{route} answers, {'with' if route.encrypted else 'no'} TLS")
        await self._look_for_replicas(server, route)
        session = Session(server)
        backend = await self._log_in(server, session)
        if backend is None:
            return
        try:
            async with asyncio.timeout(self._time_limit):
                await self._look(server, session, backend)
        except TimeoutError:
            self._report.no("session", "the server does not answer", "See what it is busy with")
        except (OSError, ProtocolViolation, ServerError) as error:
            self._report.no("session", f"the session was lost: {explain(error)}")
        finally:
            backend.terminate()
            session.close()

    async def _look_for_replicas(self, server: Server, route: Route) -> None:
        """Check whether replicas could communicate, if there is a secret for that."""
        config = self._config
        if config.replica_secret_file is None:
            return
        where = f'"{config.auth_user}" in database "{config.lookup_database}"'
        try:
            backend = await server.runtime.dialer.login_as_auth_user(route.host)
            try:
                async with asyncio.timeout(self._time_limit):
                    await backend.rows(b"LISTEN pg_background_proxy_check")
            finally:
                backend.terminate()
        except (SQLError, OSError, ProtocolViolation) as error:
            self._report.no(
                "replicas",
                f"they cannot be asked by {where}: {cause(error).rstrip('.')}",
                "Give the proxy the password of auth_user in its passfile or auth_file. It needs"
                " CONNECT on auth_dbname, and a primary server with no pooler before it",
            )
            return
        self._report.ok("replicas", f"those with the same secret can be asked by {where}")

    @property
    def _time_limit(self) -> float:
        return self._config.connect_timeout + _TIMEOUT

    # The session

    async def _log_in(self, server: Server, session: Session) -> Backend | None:
        """Log in as the client. None if that failed, which is reported."""
        client, loop = self._client, asyncio.get_running_loop()
        password = client.password
        if password is None:
            host = self._config.upstream.hosts[0]
            known = server.runtime.credentials.secret(host, client.database, client.role)
            password = known.password if isinstance(known, Cleartext) else None
        ours, theirs = socket.socketpair()
        for one in (ours, theirs):
            one.setblocking(False)
        session.received(Peer.of(theirs))
        backend: Backend | None = None
        try:
            async with asyncio.timeout(self._time_limit):
                await loop.connect_accepted_socket(lambda: session.client, theirs)
                _, backend = await loop.create_unix_connection(Backend, sock=ours)
                await backend.login(
                    StartupMessage(client.names),
                    Credentials(client.role, password, None, LoginObserver(), purpose=""),
                )
        except (SQLError, OSError, ProtocolViolation) as error:
            self._not_let_in(session, password, error)
            if backend is not None:
                backend.transport.abort()
            session.close()
            return None
        asked = session.observer.method or "nothing (trust, peer or a certificate)"
        version = _text(backend.parameters.get(b"server_version"))
        asks = "the server asks"
        if self._config.auth_type == "plain" and session.observer.method:
            asks = "the proxy asks (auth_type = plain)"
        found = f"PostgreSQL {version} lets in {client.in_words}; {asks} for {asked}"
        self._report.ok("session", found)
        return backend

    def _not_let_in(self, session: Session, password: bytes | None, error: Exception) -> None:
        asked, who = session.observer.method, self._client.in_words
        asks = f"the server asks for {asked}; " if asked else ""
        if asked and password is None and not isinstance(error, ServerError):
            todo = "Set PGPASSWORD to the role's password, as its clients give it"
            self._report.no("session", f"{who}: {asks}there is no password to log in with", todo)
        elif isinstance(error, SQLError):
            said = ". ".join(filter(None, (error.message, error.detail)))
            todo = _HINTS.get(error.sqlstate, error.hint or "See the server's log")
            self._report.no("session", f"{who}: {asks}{said}", todo)
        else:
            self._report.no("session", f"{who}: {asks}{explain(error)}", "See the server's log")

    # What the client finds

    async def _look(self, server: Server, session: Session, backend: Backend) -> None:
        is_theirs = await self._look_at_extension(session, backend)
        has_room = await self._count_connections(backend)
        if is_theirs and self._config.extension == "server":
            self._report.note("jobs", "the C extension runs them; the proxy has no part in that")
            return
        if not has_room:
            return
        logs_in = await self._log_in_for_job(server, session)
        await self._launch(backend, logs_in=logs_in)

    async def _look_at_extension(self, session: Session, backend: Backend) -> bool:
        """Check what the database has. Returns whether it is the C extension."""
        query = f"SELECT {installed.installed_query(())}, {installed.REALLY}"
        found, real = await backend.row(query.encode(), 2)
        if real == b"t":
            self._theirs()
            return True
        if self._config.extension == "server":
            self._report.no(
                "extension",
                "extension = server, and the C extension is not installed in this database",
                "Install it on the server and run CREATE EXTENSION pg_background, or set"
                ' extension = "proxy"',
            )
        elif found is None:
            self._report.note(
                "extension",
                "the database has no objects of it, so calls in statements are served, and calls"
                " from functions, triggers and views are not",
                "If you need these, run CREATE EXTENSION pg_background through the proxy",
            )
        else:
            extension = installed.parse_installed(parse_array(found, b"UTF8"))
            [quoted] = await backend.row(_SCHEMA % literal(extension.schema))
            self._schema = _text(quoted)
            await self._compare(session, backend, extension)
        return False

    def _theirs(self) -> None:
        if self._config.extension == "server":
            self._report.ok("extension", "the database has the C extension, and serves the calls")
            return
        self._report.no(
            "extension",
            "the server has the C extension in this database, and the proxy serves the calls: the"
            " two do not know each other's jobs",
            'Set extension = "server", or run DROP EXTENSION pg_background and CREATE EXTENSION'
            " pg_background, both through the proxy",
        )

    async def _compare(
        self, session: Session, backend: Backend, extension: installed.Installed
    ) -> None:
        """Check whether the functions are those of this version of the proxy."""
        rows = await backend.rows(_FUNCTIONS % literal(extension.schema))
        there = {(_text(name), _text(body)) for name, body in rows}
        wanted = objects.sources(extension.api, session.server_version, self._schema)
        other = len(wanted - there)
        found = f"version {extension.version} in schema {self._schema}"
        if not other:
            self._report.ok("extension", f"{found}, as this proxy makes it")
            return
        self._report.no(
            "extension",
            f"{found} has {other} functions that another version of the proxy has made",
            "Run ALTER EXTENSION pg_background UPDATE through the proxy",
        )

    async def _count_connections(self, backend: Backend) -> bool:
        """Count the connections left. Returns whether there are any."""
        row = await backend.row(_SLOTS, 4)
        most = number(row[1])
        left = [
            (number(value), name)
            for value, name in zip((row[0], *row[2:]), _LIMITS, strict=True)
            if value is not None
        ]
        free, name = min(left)
        if free <= 0:
            self._report.no("connections", f"none is left for a job: {name}", _MORE_CONNECTIONS)
            return False
        found = f"{free} are left for this role ({name.format(most=most)})"
        if free < self._config.max_workers:
            many = f"a session may run {self._config.max_workers} jobs at a time (max_workers)"
            self._report.note("connections", f"{found}; {many}", _MORE_CONNECTIONS)
        else:
            self._report.ok("connections", found)
        return True

    # A job

    async def _log_in_for_job(self, server: Server, session: Session) -> bool:
        client, route, runtime = self._client, session.route, server.runtime
        try:
            credentials = await runtime.credentials_of(
                route, client.database, client.role, session.observer
            )
            side = await open_backend(
                lambda factory: runtime.dialer.connect_by(route, factory),
                StartupMessage(client.names),
                credentials,
                runtime.config.connect_timeout,
            )
        except SQLError as error:
            self._report.no("jobs", f"they cannot log in: {cause(error)}", error.hint or "")
            return False
        side.terminate()
        assert side.asked is not None
        source = credentials.source
        if isinstance(side.asked, AuthenticationOk):
            source = "nothing"
        found = f"the server asks them for {in_words(side.asked)}, and they log in with {source}"
        self._report.ok("jobs", found)
        return True

    async def _launch(self, backend: Backend, *, logs_in: bool) -> None:
        role = _text(self._client.role)
        prefix = self._schema and f"{self._schema}."
        query = _RUN % prefix.encode()
        try:
            state, failure = await backend.row(query, 2)
        except ServerError as error:
            if error.is_fatal:
                raise
            if not logs_in and error.sqlstate.startswith("28"):
                self._report.ok("launch", f'role "{role}" may launch jobs')
                return
            reason = ". ".join(filter(None, (error.message, error.detail)))
            todo = _GRANT.format(role=role) if error.sqlstate == "42501" else error.hint or ""
            self._report.no("launch", f'role "{role}": {reason}', todo)
            return
        if state == b"stopped":
            self._report.ok("launch", f'role "{role}" may launch jobs, and one has run')
        else:
            self._report.no("launch", f"a job has failed: {_text(failure or state or b'')}")


_LIMITS: Final = (
    "max_connections = {most}, less what is reserved",
    "the role's CONNECTION LIMIT",
    "the database's CONNECTION LIMIT",
)


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")
