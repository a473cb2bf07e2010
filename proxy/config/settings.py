"""All settings of ``serve``, each declared once as a field of `Config`.

The command line, the file's keys and docs/configuration.md are made from these declarations.
"""

# ruff: noqa: RUF009 - _setting() is dataclasses.field() with the metadata that every field has
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proxy.config.addresses import DEFAULT_PORT, ListenAddress, parse_admin_listen, parse_listen
from proxy.config.gucs import (
    DEFAULT_QUEUE_SIZE,
    LAUNCH_AT_COMMIT,
    LAUNCH_TIMEOUT,
    MAX_WORKERS,
    QUEUE,
    WORKER_TIMEOUT,
    parse_memory,
)
from proxy.config.readers import (
    Network,
    Sender,
    one_of,
    parse_api_version,
    parse_command,
    parse_count,
    parse_file,
    parse_min_duration,
    parse_network,
    parse_path,
    parse_seconds,
    parse_sender,
    parse_switch,
    parse_timeout,
    parse_workers,
)
from proxy.config.upstream import SSL_MODES, Upstream, parse_upstream
from proxy.log import FORMATS

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
        read: converts a text; raises ValueError.
        metavar: stands for the value in ``--help``.
        help: a clause for ``--help`` and docs/configuration.md.
        more: further sentences for docs/configuration.md, in Markdown.
        many: whether it may be repeated.
    """
    value = read(default) if default or read is str else None
    values = (value,) if default else ()
    return dataclasses.field(
        default=values if many else value,
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
        ' "/run/pgbg:6543"]`. With `?proxy_protocol=on` behind an address, each connection there'
        " must begin with a header of the PROXY protocol. See [Behind a load"
        " balancer](operation.md#behind-a-load-balancer).",
        many=True,
    )
    upstream: Upstream = _setting(
        "host=localhost port=5432",
        parse_upstream,
        "CONNINFO",
        "the server: a libpq connection string or URI with host and port, or several; PGHOST and"
        " PGPORT fill in what is missing",
        more="It has no user and database: these come from each client. `PGSSLMODE` and the like"
        " fill in what is missing, too. See [Connecting to the server](#connecting-to-the-server).",
    )
    passfile: Path | None = _setting(
        "",
        parse_file,
        "FILE",
        "passwords for side backends, in the format of .pgpass; PGPASSFILE if not given",
        more="Lines are `host:port:database:user:password`; the file's mode must be 0600, or 0640"
        " if root owns it."
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
        "which side asks the client for its password. server: the server; the login passes"
        " through. plain: the proxy, in clear text (only over TLS, a Unix socket or loopback); it"
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
        "the query by which auth_user finds the secret of a role that is not in auth_file; $1 is"
        " the role, the second column its secret",
        more="The default needs a superuser. For another role, call a `SECURITY DEFINER` function"
        " of your own, with its schema, and set `auth_dbname`. An empty query turns this off."
        " Answers are remembered for 10 seconds.",
    )
    auth_dbname: str = _setting(
        "",
        str,
        "DATABASE",
        "the database that auth_user logs in to; postgres if not given. An auth_query of your own"
        " needs it, and runs with search_path = pg_catalog, so name its schemas",
        more="`auth_user` never logs in to a database that a client names.",
    )
    password_command: tuple[str, ...] | None = _setting(
        "",
        parse_command,
        "COMMAND",
        "a command that prints the password or token of a role for side backends; {user}, {host},"
        " {port} and {database} in its arguments are replaced; it runs without a shell",
        more="It takes precedence over all other sources, including the client's own password,"
        " which may be an expired token. It may take as long as `connect_timeout`. See"
        " [Tokens](logins.md#tokens).",
    )
    password_ttl: float = _setting(
        "10min",
        parse_seconds,
        "TIME",
        "how long the output of password_command is used again; 0: not at all",
        more="A password that the server refuses is forgotten at once. A token of RDS IAM is valid"
        " for 15 minutes.",
    )
    proxy_protocol_from: tuple[Sender, ...] = _setting(
        "",
        parse_sender,
        "NETWORK|unix",
        "who may connect to listeners with proxy_protocol=on, and is trusted to say where its"
        " clients are: an address, or a network such as 192.0.2.0/24, or unix, for the Unix"
        " sockets among them; may be given more than once; nobody if not given",
        many=True,
    )
    allow_from: tuple[Network, ...] = _setting(
        "",
        parse_network,
        "NETWORK",
        "which clients may connect: an address, or a network such as 192.0.2.0/24; may be given"
        " more than once; all if not given. Unix sockets always may",
        many=True,
    )
    allow_roles: tuple[str, ...] = _setting(
        "",
        str,
        "ROLE",
        "which roles may log in through the proxy; may be given more than once; all if not given",
        more="The server decides whether they get in.",
        many=True,
    )
    allow_databases: tuple[str, ...] = _setting(
        "",
        str,
        "DATABASE",
        "which databases may be reached through the proxy; may be given more than once; all if not"
        " given",
        more="`replication` stands for physical replication, as in `pg_hba.conf`.",
        many=True,
    )
    application_name_add_host: bool = _setting(
        "off",
        parse_switch,
        "on|off",
        "adds the client's address and port to its application_name: psql - 192.0.2.7:50000",
        more="So `pg_stat_activity` and the server's log show who is behind the proxy. This does"
        " not apply to replication connections, whose name is that of a standby.",
    )
    admin_users: tuple[str, ...] = _setting(
        "",
        str,
        "ROLE",
        "who may administer the proxy; may be given more than once; nobody if not given",
        more="They log in with the password or secret that `auth_file` has for the name; the"
        " server need not know it. See [The console](operation.md#the-console).",
        many=True,
    )
    stats_users: tuple[str, ...] = _setting(
        "",
        str,
        "ROLE",
        "who may look at what the proxy does, but change nothing; may be given more than once;"
        " nobody if not given",
        many=True,
    )
    client_tls_sslmode: str = _setting(
        "disable",
        one_of(*SSL_MODES),
        "MODE",
        "TLS from clients. disable: none; allow or prefer: clients may use it; require: they must;"
        " verify-ca or verify-full: they must, with a certificate signed by client_tls_ca_file."
        " Unix sockets have no TLS",
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
    hung_worker_timeout: float = _setting(
        "30s",
        parse_seconds,
        "TIME",
        "how long one of several processes may hang before it is killed and replaced; 0: for ever",
        more="Its sessions and jobs are lost. New clients go to the others after 3 seconds.",
    )
    replica_secret_file: Path | None = _setting(
        "",
        parse_file,
        "FILE",
        "a file with a secret that all proxies in front of one server share, so that each can ask"
        " the others about their jobs",
        more="The secret has at least 32 bytes; the file's mode must be 0600, or 0640 if root owns"
        " it. Needs `auth_user`. See [Several replicas](operation.md#several-replicas).",
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
        "unanswered probes after which a client counts as gone; 0: the system's value",
    )
    tcp_user_timeout: int = _setting(
        "0",
        parse_count,
        "MILLISECONDS",
        "milliseconds that sent data may stay unacknowledged by a client; 0: the system's value",
    )
    shutdown_timeout: float = _setting(
        "30s",
        parse_timeout,
        "TIME",
        "how long sessions and jobs may go on after SIGTERM or SIGINT; unlimited: as long as they"
        " want",
        more="A second signal ends them at once.",
    )
    takeover: Path | None = _setting(
        "",
        parse_path,
        "PATH",
        "a Unix socket by which a new process takes the listening sockets over from this one, in a"
        " folder to which nobody else can write",
        more="A process that is started with the path of a running one takes over from it. See"
        " [Upgrade without downtime](operation.md#upgrade-without-downtime).",
    )
    takeover_timeout: float = _setting(
        "unlimited",
        parse_timeout,
        "TIME",
        "how long sessions and jobs may go on in a process that another has taken over from;"
        " unlimited: as long as they want",
    )
    connect_timeout: float = _setting(
        "10s",
        parse_seconds,
        "TIME",
        "how long to wait for a connection to the server; 0 waits for ever",
    )
    server_required: bool = _setting(
        "off",
        parse_switch,
        "on|off",
        "whether serve exits with code 1 if the server cannot be reached at the start; off: it"
        " keeps trying, and refuses clients until the server is there",
        more="Off by default, because services start in any order: systemd gives up on a unit that"
        " fails five times in a row, and Kubernetes waits up to five minutes before the next try.",
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
        "how many jobs a session may have at most, whatever its pg_background.max_workers is",
    )
    max_jobs: int = _setting(
        "0",
        parse_count,
        "N",
        "how many jobs may run at a time, in all sessions and processes; 0: any number",
        more="A launch beyond that fails (`53400`) or waits: see [Waiting for"
        " room](jobs.md#waiting-for-room).",
    )
    max_jobs_per_role: int = _setting(
        "0", parse_count, "N", "the same for the jobs of one login role; 0: any number"
    )
    max_jobs_per_database: int = _setting(
        "0", parse_count, "N", "the same for the jobs in one database; 0: any number"
    )
    max_pending_jobs: int = _setting(
        "1000",
        parse_count,
        "N",
        "how many jobs of one login role may wait for the commit of their transactions, in each"
        " process; 0: none",
        more="Together they may have 64 MB of SQL. See [Starting at commit]"
        "(jobs.md#starting-at-commit).",
    )
    max_queue_size: int = _setting(
        "256MB",
        DEFAULT_QUEUE_SIZE.parse,
        "SIZE",
        "how much of a job's result is held at most, whatever queue size is asked for",
    )
    queue_memory: int = _setting(
        "256MB",
        parse_memory,
        "SIZE",
        "how much of all results together a process holds; beyond that, jobs wait for their"
        " readers",
    )
    role_queue_memory: int = _setting(
        "128MB", parse_memory, "SIZE", "the same for the results of one login role"
    )
    worker_timeout: str = _setting(
        WORKER_TIMEOUT.default,
        WORKER_TIMEOUT.show,
        "TIME",
        "default of pg_background.worker_timeout: how long a job may run, in milliseconds unless a"
        " unit is given; 0: the session's statement_timeout applies",
        more="It applies to each statement of a job; before PostgreSQL 13, to the whole string.",
    )
    launch_timeout: str = _setting(
        LAUNCH_TIMEOUT.default,
        LAUNCH_TIMEOUT.show,
        "TIME",
        "default of pg_background.launch_timeout: how long a launch waits for room, in"
        " milliseconds unless a unit is given; 0: it does not wait, but fails at once",
        more="See [Waiting for room](jobs.md#waiting-for-room).",
    )
    launch_at_commit: str = _setting(
        LAUNCH_AT_COMMIT.default,
        LAUNCH_AT_COMMIT.show,
        "on|off",
        "default of pg_background.launch_at_commit: whether pg_background_launch and _submit start"
        " jobs only when the calling transaction commits",
        more="See [Starting at commit](jobs.md#starting-at-commit).",
    )
    queue: str = _setting(
        QUEUE.default,
        QUEUE.show,
        "on|off",
        "default of pg_background.queue: whether pg_background_submit queues a job for which there"
        " is no room",
        more="See [Queued jobs](jobs.md#queued-jobs).",
    )
    max_queued_jobs: int = _setting(
        "1000",
        parse_count,
        "N",
        "how many jobs of one login role may be queued, in each process",
        more="Their SQL may take as much memory as results may: `queue_memory` in all,"
        " `role_queue_memory` for one role.",
    )
    spares: int = _setting(
        "2",
        parse_count,
        "N",
        "how many logged-in connections to keep ready for the next jobs of a role and database"
        " that has launched one; 0: none",
        more="This applies to each of the `workers`. Spares do not take the last tenth of the"
        " server's connection slots, and there are none for roles or databases with a connection"
        " limit.",
    )
    spare_lifetime: float = _setting(
        "60s",
        parse_seconds,
        "TIME",
        "how long a spare is kept; a changed password applies to all new jobs after that time at"
        " the latest",
        more="Everything else that a new login would meet applies to the next job at once:"
        " `NOLOGIN`, `NOSUPERUSER`, `VALID UNTIL`, `CONNECT`, `DROP ROLE`, `ALTER ROLE … SET`, a"
        " reload of `pg_hba.conf`. There are no spares in databases with an event trigger on"
        " login.",
    )
    reuse_lifetime: float = _setting(
        "1s",
        parse_seconds,
        "TIME",
        "how long a connection whose job has ended waits for the next job of the same session; 0:"
        " each job gets a new connection",
        more="`DISCARD ALL` resets it at once. It is used again when the session has fetched or"
        " detached the last job. A session keeps at most `spares` of them. [Backends that are used"
        " again](limits.md#backends-that-are-used-again) says how such a connection differs from a"
        " new one.",
    )
    api_version: int = _setting(
        "1",
        parse_api_version,
        "N",
        "what pg_background_launch returns. 1: the pid, as version 1 of the extension; 2: a handle",
        more="In a database with the extension, the extension's version decides instead.",
    )
    extension: str = _setting(
        "proxy",
        one_of("proxy", "server"),
        "proxy|server",
        "which side carries out CREATE EXTENSION pg_background. proxy: the proxy, with SQL"
        " objects; server: the server, which needs the C extension's files",
        more="With `server`, calls go to the C extension in databases that have it.",
    )
    catalogs: str = _setting(
        "on",
        one_of("on", "off", "definitions"),
        "on|off|definitions",
        "whether queries on pg_extension list the extension that the proxy has created, and"
        " queries on pg_stat_activity give pg_background as the backend_type of jobs; definitions:"
        " new views and functions are changed to do so, too",
        more="With `off`, every query is passed on unchanged. See [What tools"
        " see](in-database.md#what-tools-see), and for `definitions` [Definitions that look for"
        " jobs](differences.md#definitions-that-look-for-jobs).",
    )
    outcome_retention: float = _setting(
        "10min",
        parse_seconds,
        "TIME",
        "how long a job's outcome stays known after its end, also to other sessions of its role",
    )
    history: str = _setting(
        "off",
        one_of("off", "errors", "labeled", "all"),
        "off|errors|labeled|all",
        "which jobs' outcomes are written to pg_background_history, in databases with the"
        " extension. errors: jobs that fail or are lost; labeled: jobs with a label",
        more="See [Job history](jobs.md#job-history).",
    )
    history_sql: bool = _setting(
        "on",
        parse_switch,
        "on|off",
        "whether these rows have the SQL, up to 8 kB of it; off: a hash of it",
    )
    history_retention: float = _setting(
        "30d",
        parse_seconds,
        "TIME",
        "how long a row is kept; a change applies to rows that are written after it",
    )
    log_level: str = _setting(
        "info", one_of(*LOG_LEVELS), "LEVEL", f"what is logged: {', '.join(LOG_LEVELS)}"
    )
    log_format: str = _setting(
        "text",
        one_of(*FORMATS),
        "FORMAT",
        "text: lines like those of PostgreSQL's log; json: one JSON object a line",
        more="See [The log](operation.md#the-log) for the keys.",
    )
    log_min_job_duration: int = _setting(
        "0",
        parse_min_duration,
        "TIME",
        "logs the end of each job that has run at least this long, in milliseconds unless a unit"
        " is given, and of each that has failed; 0: of all; -1: of none",
        more="All jobs are logged by default, because nobody may be waiting for a job, and its"
        " outcome is forgotten after `outcome_retention`.",
    )
    log_job_sql: bool = _setting(
        "off",
        parse_switch,
        "on|off",
        "whether these lines have the beginning of the job's SQL, up to 120 characters",
        more="It may contain what should not be in a log, such as the password in `ALTER ROLE`.",
    )
    log_connections: bool = _setting(
        "off",
        parse_switch,
        "on|off",
        "logs each client that connects, is let in, or is refused, with its address",
        more="The server's own log has the proxy's address.",
    )
    log_disconnections: bool = _setting(
        "off",
        parse_switch,
        "on|off",
        "logs the end of each session, with its duration",
    )
    admin_listen: ListenAddress | None = _setting(
        "",
        parse_admin_listen,
        "HOST:PORT",
        "where metrics, health checks and the jobs page are served by HTTP, such as"
        " 127.0.0.1:6544; off if not given",
        more="Needs the extra `admin`. With `client_tls_sslmode` other than `disable` it is HTTPS,"
        " with the same certificate. See [Metrics, health checks and the jobs"
        " page](operation.md#metrics-health-checks-and-the-jobs-page).",
    )

    @property
    def admins(self) -> frozenset[str]:
        """The names in admin_users."""
        return frozenset(filter(None, self.admin_users))

    @property
    def watchers(self) -> frozenset[str]:
        """The names in admin_users and stats_users."""
        return self.admins | frozenset(filter(None, self.stats_users))

    @property
    def lookup_database(self) -> str:
        """The database that auth_user logs in to."""
        return self.auth_dbname or DEFAULT_LOOKUP_DATABASE

    @property
    def session_defaults(self) -> Mapping[str, str]:
        """By name, what SHOW prints of session settings that nothing on the server has set."""
        return _shown(
            self.max_workers,
            self.default_queue_size,
            self.worker_timeout,
            self.launch_timeout,
            self.launch_at_commit,
            self.queue,
        )


@functools.lru_cache(maxsize=8)  # each launch asks for them several times
def _shown(
    max_workers: int,
    default_queue_size: str,
    worker_timeout: str,
    launch_timeout: str,
    launch_at_commit: str,
    queue: str,
) -> Mapping[str, str]:
    configured = {
        MAX_WORKERS: str(max_workers),
        DEFAULT_QUEUE_SIZE: default_queue_size,
        WORKER_TIMEOUT: worker_timeout,
        LAUNCH_TIMEOUT: launch_timeout,
        LAUNCH_AT_COMMIT: launch_at_commit,
        QUEUE: queue,
    }
    return {guc.name: guc.show(text) for guc, text in configured.items()}


SETTINGS: Final = tuple(dataclasses.fields(Config))
