"""All settings of ``serve``: each is declared once, as a field of `Config`.

The command line, the file's keys and docs/configuration.md are made from these declarations.
"""

# ruff: noqa: RUF009 - _setting() is dataclasses.field() with the metadata that every field has
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proxy.config.addresses import DEFAULT_PORT, ListenAddress, parse_listen
from proxy.config.gucs import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT, parse_memory
from proxy.config.readers import (
    one_of,
    parse_api_version,
    parse_count,
    parse_file,
    parse_seconds,
    parse_switch,
    parse_workers,
)
from proxy.config.upstream import SSL_MODES, Upstream, parse_upstream

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
DEFAULT_LOOKUP_DATABASE: Final = "postgres"
DEFAULT_AUTH_QUERY: Final = (
    "SELECT rolname, CASE WHEN rolvaliduntil OPERATOR(pg_catalog.<) pg_catalog.now() THEN NULL"
    " ELSE rolpassword END FROM pg_catalog.pg_authid"
    " WHERE rolname OPERATOR(pg_catalog.=) $1 AND rolcanlogin"
)


def _setting(
    default: str,
    read: Callable[[str], object],
    metavar: str,
    help: str,
    *,
    more: str = "",
    many: bool = False,
) -> Any:
    """Declares a field of Config.

    Args:
        default: as a user would write it; "" for none.
        read: makes the value from a text; raises ValueError.
        metavar: stands for the value in ``--help``.
        help: a clause for ``--help`` and docs/configuration.md.
        more: further sentences for docs/configuration.md, in Markdown.
        many: whether it may be given more than once.
    """
    value = read(default) if default or read is str else None
    return dataclasses.field(
        default=(value,) if many else value,
        metadata={
            "read": read,
            "metavar": metavar,
            "help": help,
            "more": more,
            "many": many,
            "default": default,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of ``serve``."""

    listen: tuple[ListenAddress, ...] = _setting(
        f"127.0.0.1:{DEFAULT_PORT}",
        parse_listen,
        "ADDRESS",
        "where clients connect: HOST:PORT, *:PORT for all interfaces, or /DIRECTORY:PORT for a Unix"
        " socket; may be given more than once",
        more='In a file it may be a list: `listen = ["127.0.0.1:6543", "[::1]:6543",'
        ' "/run/pgbg:6543"]`.',
        many=True,
    )
    upstream: Upstream = _setting(
        "host=localhost port=5432",
        parse_upstream,
        "CONNINFO",
        "the server: a libpq connection string or URI with host and port, several if you like;"
        " PGHOST and PGPORT fill what is missing",
        more="Without user and database, which come from each client. `PGSSLMODE` and the"
        " like fill what is missing, too. See [The way to the"
        " server](#the-way-to-the-server).",
    )
    passfile: Path | None = _setting(
        "",
        parse_file,
        "FILE",
        "passwords for side backends, in the format of .pgpass; PGPASSFILE if not given",
        more="Lines are `host:port:database:user:password`; the file's mode must be 0600."
        " See [Logins](logins.md).",
    )
    auth_file: Path | None = _setting(
        "",
        parse_file,
        "FILE",
        'passwords, md5 or SCRAM secrets for side backends: lines of "role" "secret", as'
        " PgBouncer's auth_file",
        more="The file's mode must be 0600, or 0640 if root owns it. A SCRAM secret can be"
        " used once the client has logged in through the proxy by SCRAM. See"
        " [Logins](logins.md).",
    )
    auth_type: str = _setting(
        "server",
        one_of("server", "plain"),
        "TYPE",
        "which side asks the client for its password: server: the server, and the login passes"
        " through; plain: the proxy, in clear text (only over TLS, a Unix socket or loopback); it"
        " then logs in by whatever method the server asks for",
        more="With `plain` a managed server needs no other credentials in the proxy.",
    )
    auth_user: str = _setting(
        "",
        str,
        "ROLE",
        "role for auth_query and target_session_attrs; its password comes from passfile or"
        " auth_file",
    )
    auth_query: str = _setting(
        DEFAULT_AUTH_QUERY,
        str,
        "SQL",
        "how auth_user finds a role's secret that is not in auth_file; $1 is the role, the second"
        " column its secret",
        more="The default needs a superuser. For another role, call a `SECURITY DEFINER`"
        " function of your own, with its schema, and set `auth_dbname`. Empty: off."
        " Answers are remembered for 10 seconds.",
    )
    auth_dbname: str = _setting(
        "",
        str,
        "DATABASE",
        "where auth_user logs in; postgres if not given. An auth_query of your own needs it, and"
        " runs with search_path = pg_catalog: name its schemas",
        more="It never logs in to a database that a client names.",
    )
    client_tls_sslmode: str = _setting(
        "disable",
        one_of(*SSL_MODES),
        "MODE",
        "TLS from clients: disable; allow or prefer: clients may use it; require: they must;"
        " verify-ca or verify-full: they must, with a certificate of client_tls_ca_file. Unix"
        " sockets have no TLS",
    )
    client_tls_cert_file: Path | None = _setting(
        "", parse_file, "FILE", "the proxy's certificate for clients, PEM, with its chain"
    )
    client_tls_key_file: Path | None = _setting(
        "", parse_file, "FILE", "the private key of client_tls_cert_file, PEM"
    )
    client_tls_ca_file: Path | None = _setting(
        "", parse_file, "FILE", "the authorities that sign clients' certificates, PEM"
    )
    client_login_timeout: float = _setting(
        "60s",
        parse_seconds,
        "TIME",
        "how long a client may take from connecting to being logged in; 0: for ever",
    )
    workers: int = _setting(
        "1",
        parse_workers,
        "N|auto",
        "how many processes serve the clients; auto: one for each core",
        more="See [More than one core](operation.md#more-than-one-core).",
    )
    tcp_keepalive: int = _setting(
        "1",
        parse_count,
        "0|1",
        "TCP keepalive to clients; for the server, see keepalives in upstream",
    )
    tcp_keepidle: int = _setting(
        "0",
        parse_count,
        "SECONDS",
        "seconds of silence before a keepalive probe; 0: the system's value",
    )
    tcp_keepintvl: int = _setting(
        "0", parse_count, "SECONDS", "seconds between keepalive probes; 0: the system's value"
    )
    tcp_keepcnt: int = _setting(
        "0",
        parse_count,
        "N",
        "unanswered probes until a client counts as gone; 0: the system's value",
    )
    tcp_user_timeout: int = _setting(
        "0",
        parse_count,
        "MILLISECONDS",
        "milliseconds that sent data may stay unacknowledged by a client; 0: the system's value",
    )
    shutdown_timeout: float = _setting(
        "30s",
        parse_seconds,
        "TIME",
        "how long sessions and jobs may go on after SIGTERM or SIGINT",
        more="A second signal ends them at once.",
    )
    connect_timeout: float = _setting(
        "10s",
        parse_seconds,
        "TIME",
        "how long to wait for a connection to the server; 0 waits for ever",
    )
    max_workers: int = _setting(
        MAX_WORKERS.default,
        MAX_WORKERS.parse,
        "N",
        "default of pg_background.max_workers: how many jobs a session may have at a time, 1 to"
        " 1000",
    )
    default_queue_size: str = _setting(
        DEFAULT_QUEUE_SIZE.default,
        DEFAULT_QUEUE_SIZE.show,
        "SIZE",
        "default of pg_background.default_queue_size: how much of a job's result is held for its"
        " reader, 4kB to 256MB",
    )
    max_session_workers: int = _setting(
        "1000",
        MAX_WORKERS.parse,
        "N",
        "how many jobs a session may have at the most, whatever it sets pg_background.max_workers"
        " to",
    )
    max_queue_size: int = _setting(
        "256MB",
        DEFAULT_QUEUE_SIZE.parse,
        "SIZE",
        "how much of a job's result is held at the most, whatever queue size is asked for",
    )
    queue_memory: int = _setting(
        "256MB",
        parse_memory,
        "SIZE",
        "how much of all results a process holds together; beyond it jobs wait for their readers",
    )
    role_queue_memory: int = _setting(
        "128MB", parse_memory, "SIZE", "the same, of the results of one login role"
    )
    worker_timeout: str = _setting(
        WORKER_TIMEOUT.default,
        WORKER_TIMEOUT.show,
        "TIME",
        "default of pg_background.worker_timeout: how long a job may run, in milliseconds unless a"
        " unit is given; 0: the session's statement_timeout",
        more="It holds for each statement of a job; before PostgreSQL 13, for the whole string.",
    )
    spares: int = _setting(
        "2",
        parse_count,
        "N",
        "how many logged-in connections to keep ready for the next jobs of a role and database that"
        " has launched one; 0 for none",
        more="The number holds for each of the `workers`. Each spare serves one job. None"
        " takes the last tenth of the server's connection slots, and there are none for"
        " roles or databases with a connection limit.",
    )
    spare_lifetime: float = _setting(
        "60s",
        parse_seconds,
        "TIME",
        "how long a spare is kept; a changed password or pg_hba.conf holds for all new jobs after"
        " that time at the latest",
        more="Everything else that a new login would meet holds for the next job at once:"
        " `NOLOGIN`, `NOSUPERUSER`, `VALID UNTIL`, `CONNECT`, `DROP ROLE`, `ALTER ROLE … SET`.",
    )
    api_version: int = _setting(
        "1",
        parse_api_version,
        "N",
        "what pg_background_launch returns: 1: the pid, as version 1 of the extension; 2: a handle",
        more="In a database with the extension, the extension's version decides instead.",
    )
    extension: str = _setting(
        "proxy",
        one_of("proxy", "server"),
        "proxy|server",
        "which side carries out CREATE EXTENSION pg_background: proxy: the proxy, with SQL objects;"
        " server: the server, which needs the C extension's files",
        more="With `server`, calls go to the C extension where it is installed.",
    )
    catalogs: bool = _setting(
        "on",
        parse_switch,
        "on|off",
        "whether queries on pg_extension list the extension that the proxy has made, and queries on"
        " pg_stat_activity give pg_background as the backend_type of jobs",
        more="`off`: every query is passed on as it is. See [What tools see]"
        "(in-database.md#what-tools-see).",
    )
    outcome_retention: float = _setting(
        "10min",
        parse_seconds,
        "TIME",
        "how long a job's outcome stays known after its end, to other sessions of its role too",
    )
    log_level: str = _setting(
        "info", one_of(*LOG_LEVELS), "LEVEL", f"what is logged: {', '.join(LOG_LEVELS)}"
    )

    @property
    def lookup_database(self) -> str:
        """The database that auth_user logs in to."""
        return self.auth_dbname or DEFAULT_LOOKUP_DATABASE


SETTINGS: Final = tuple(dataclasses.fields(Config))
