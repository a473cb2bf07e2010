"""What the proxy was told: the settings of ``serve``, from a TOML file, the environment and flags.

Each setting is declared once, as a field of Config with its reader and its help. The command line,
the file's keys and docs/configuration.md are made from it. A value that cannot be read is an error
of one line, and so is an unknown key; nothing is ignored.
"""

# ruff: noqa: RUF009 - _setting() is dataclasses.field() with the metadata that every field has
from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from proxy.auth.methods import Policy, parse_require_auth
from proxy.config.conninfo import parse_conninfo
from proxy.config.gucs import (
    DEFAULT_QUEUE_SIZE,
    MAX_WORKERS,
    WORKER_TIMEOUT,
    parse_memory,
    parse_time_ms,
)
from proxy.config.keepalive import Keepalive

DEFAULT_PORT: Final = 6543
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
MAX_PROCESSES: Final = 256
AUTH_TYPES: Final = ("server", "plain")
EXTENSIONS: Final = ("proxy", "server")
DEFAULT_LOOKUP_DATABASE: Final = "postgres"
DEFAULT_AUTH_QUERY: Final = (
    "SELECT rolname, CASE WHEN rolvaliduntil OPERATOR(pg_catalog.<) pg_catalog.now() THEN NULL"
    " ELSE rolpassword END FROM pg_catalog.pg_authid"
    " WHERE rolname OPERATOR(pg_catalog.=) $1 AND rolcanlogin"
)

_LISTEN: Final = re.compile(r"(?P<host>/.*?|\[[^\]]+\]|[^:\[\]/]*)(?::(?P<port>[0-9]*))?")

# Keywords of a connection string that the proxy has no use for, and why not.
_CLIENTS_OWN: Final = "comes from each client's own connection; leave it out of the upstream"
_REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("user", "dbname", "options", "application_name", "client_encoding", "replication"),
        _CLIENTS_OWN,
    ),
    "password": "clients log in with their own; for side backends see --passfile and --auth-file",
    "passfile": "use --passfile",
}
SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TARGET_SESSION_ATTRS: Final = (
    *("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
)
_CONNECTING: Final = (
    *("host", "hostaddr", "port", "connect_timeout", "require_auth"),
    *("sslrootcert", "sslcert", "sslkey"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    "tcp_user_timeout",
)
# Keywords of which only some values are known, or mean what the proxy does anyway.
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": SSL_MODES,
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": TARGET_SESSION_ATTRS,
    "gssencmode": ("disable", "prefer"),
    "channel_binding": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
}
# libpq's environment variables that stand for a keyword of the upstream.
_ENVIRONMENT: Final[Mapping[str, str]] = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "require_auth": "PGREQUIREAUTH",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}


class ConfigError(Exception):
    """A setting that cannot be used; the message is one line for the user and names its place."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where clients come in: a TCP address, or a Unix socket in a directory."""

    host: str
    """A name or address; ``*`` for all interfaces; a directory if it begins with a slash."""
    port: int
    """0: any free one."""

    @property
    def socket_path(self) -> Path | None:
        """The Unix socket's file, named as PostgreSQL names it; None for TCP."""
        return Path(self.host, f".s.PGSQL.{self.port}") if self.host.startswith("/") else None

    def __str__(self) -> str:
        ipv6 = ":" in self.host and self.socket_path is None
        return f"[{self.host}]:{self.port}" if ipv6 else f"{self.host}:{self.port}"


class Host(NamedTuple):
    """One server, as a passfile and its certificate name it."""

    name: str
    """A name or address; the directory of a Unix socket if it begins with a slash."""
    port: int
    hostaddr: str = ""
    """The address to connect to, if the name is not to be looked up."""

    @property
    def is_local(self) -> bool:
        """Whether it is reached by a Unix socket."""
        return not self.hostaddr and self.name.startswith("/")

    @property
    def is_on_this_machine(self) -> bool:
        """Whether its address says that nothing on a network can be in its place."""
        address = self.hostaddr or self.name
        if self.is_local or address == "localhost":
            return True
        try:
            return ipaddress.ip_address(address).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return str(ListenAddress(self.name, self.port))


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server behind the proxy; the names are libpq's."""

    hosts: tuple[Host, ...] = (Host("localhost", 5432),)
    """To be tried in this order."""
    connect_timeout: float | None = None
    """Seconds, if the connection string says so; Config.connect_timeout is what holds."""
    sslmode: str = "prefer"
    sslnegotiation: str = "postgres"
    sslrootcert: str = ""
    """A file; ``system`` for the certificates that the operating system trusts; empty for none."""
    sslcert: str = ""
    sslkey: str = ""
    target_session_attrs: str = "any"
    keepalive: Keepalive = Keepalive()
    require_auth: frozenset[str] | None = None
    """The methods that a server may ask for; None for all."""

    @property
    def verifies(self) -> bool:
        """Whether each connection by TCP shows a certificate of an authority that we know."""
        return self.sslmode in ("verify-ca", "verify-full") or (
            self.sslmode == "require" and bool(self.sslrootcert)
        )

    def proves(self, host: Host) -> bool:
        """Whether nobody on a network can be in that host's place."""
        return self.verifies or host.is_on_this_machine

    def policy(self, host: Host) -> Policy:
        """What that host may ask for in a login."""
        return Policy(self.require_auth, self.proves(host), self.sslmode)

    def __str__(self) -> str:
        return ",".join(map(str, self.hosts))


def parse_listen(text: str) -> ListenAddress:
    """Reads ``host:port``, ``[ipv6]:port``, ``*:port``, ``/directory:port``; without a port, 6543.

    Raises:
        ValueError: it is none of these.
    """
    match = _LISTEN.fullmatch(text.strip())
    if match is None or not text.strip() or match[0].isdecimal():
        raise ValueError(f'"{text}" is no address: write host:port, [ipv6]:port or /directory:port')
    host = match["host"].removeprefix("[").removesuffix("]")
    return ListenAddress(host or "*", _port(match["port"], 0) if match["port"] else DEFAULT_PORT)


def parse_upstream(text: str, environ: Mapping[str, str] | None = None) -> Upstream:
    """Reads a libpq connection string; what it does not say comes from PGHOST, PGPORT and such.

    Raises:
        ValueError: the string cannot be read, or asks for what the proxy does not do.
    """
    given = parse_conninfo(text)
    for keyword, variable in _ENVIRONMENT.items():
        value = (environ or {}).get(variable, "")
        # A host given alone is not to be reached at another host's address.
        if value and keyword not in given and not (keyword == "hostaddr" and "host" in given):
            given[keyword] = value
    for keyword, value in given.items():
        _check_keyword(keyword, value)
    timeout = given.get("connect_timeout")
    required = given.get("require_auth")
    upstream = Upstream(
        _hosts(given),
        None if timeout is None else parse_seconds(timeout),
        sslnegotiation=given.get("sslnegotiation") or "postgres",
        sslrootcert=given.get("sslrootcert", ""),
        sslcert=given.get("sslcert", ""),
        sslkey=given.get("sslkey", ""),
        # As libpq: who trusts the system's authorities means a server by its name.
        sslmode=given.get("sslmode")
        or ("verify-full" if given.get("sslrootcert") == "system" else "prefer"),
        target_session_attrs=given.get("target_session_attrs") or "any",
        keepalive=Keepalive(
            enabled=_number(given, "keepalives", 1) != 0,
            idle=_number(given, "keepalives_idle"),
            interval=_number(given, "keepalives_interval"),
            count=_number(given, "keepalives_count"),
            user_timeout=_number(given, "tcp_user_timeout"),
        ),
        require_auth=parse_require_auth(required) if required else None,
    )
    _check_ssl(upstream)
    return upstream


def _hosts(given: Mapping[str, str]) -> tuple[Host, ...]:
    names = (given.get("host") or given.get("hostaddr") or "localhost").split(",")
    addresses = given["hostaddr"].split(",") if given.get("hostaddr") else [""] * len(names)
    if len(addresses) != len(names):
        raise ValueError(f"{len(names)} hosts do not match {len(addresses)} hostaddr values")
    ports = (given.get("port") or "5432").split(",")
    if len(ports) not in (1, len(names)):
        raise ValueError(f"{len(ports)} ports do not match {len(names)} hosts")
    return tuple(
        Host(name or address or "localhost", _port(port or "5432"), address)
        for name, address, port in zip(
            names, addresses, ports * (len(names) // len(ports)), strict=True
        )
    )


def _check_ssl(upstream: Upstream) -> None:
    """What libpq refuses to combine."""
    weak = upstream.sslmode in ("disable", "allow", "prefer")
    if upstream.sslnegotiation == "direct" and weak:
        raise ValueError(
            f'weak sslmode "{upstream.sslmode}" may not be used with sslnegotiation=direct'
            ' (use "require", "verify-ca", or "verify-full")'
        )
    if upstream.sslrootcert == "system" and upstream.sslmode != "verify-full":
        raise ValueError(
            f'weak sslmode "{upstream.sslmode}" may not be used with sslrootcert=system'
            ' (use "verify-full")'
        )
    if upstream.sslmode in ("verify-ca", "verify-full") and not upstream.sslrootcert:
        raise ValueError(f"sslmode={upstream.sslmode} needs sslrootcert: a file, or system")
    if upstream.sslkey and not upstream.sslcert:
        raise ValueError("sslkey needs sslcert")


def _number(given: Mapping[str, str], keyword: str, default: int = 0) -> int:
    try:
        return parse_count(given.get(keyword) or str(default))
    except ValueError as error:
        raise ValueError(f"{keyword}: {error}") from None


def parse_seconds(text: str) -> float:
    """Reads a time; a bare number is seconds, and ``500ms`` or ``2min`` work too.

    Raises:
        ValueError: it is no time, or negative.
    """
    seconds = parse_time_ms(text, unit="s") / 1000
    if seconds < 0:
        raise ValueError(f'invalid value: "{text}" is negative')
    return seconds


def parse_file(text: str) -> Path:
    """Takes a path to a file that can be read.

    Raises:
        ValueError: it cannot.
    """
    path = Path(text).expanduser()
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def parse_api_version(text: str) -> int:
    """Takes 1 or 2; 2.0 too.

    Raises:
        ValueError: it is another.
    """
    if text.removesuffix(".0") not in ("1", "2"):
        raise ValueError(f'"{text}" is no version of the API (1 or 2)')
    return int(text[0])


def parse_switch(text: str) -> bool:
    """Takes on or off.

    Raises:
        ValueError: it is neither.
    """
    if text.lower() not in ("on", "off"):
        raise ValueError(f'"{text}" is neither on nor off')
    return text.lower() == "on"


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f'"{text}" is none of {", ".join(choices)}')
        return text.lower()

    return read


def parse_workers(text: str) -> int:
    """Reads a number of processes, 1 or more; ``auto`` is one for each core that we may use.

    Raises:
        ValueError: it is neither.
    """
    if text.strip().lower() == "auto":
        affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    count = parse_count(text)
    if not 1 <= count <= MAX_PROCESSES:
        raise ValueError(f'"{text}" is none of auto, 1 to {MAX_PROCESSES}')
    return count


def parse_count(text: str) -> int:
    """Reads a whole number, 0 or more.

    Raises:
        ValueError: it is none.
    """
    if not text.strip().isdecimal() or int(text) > 2**31 - 1:
        raise ValueError(f'invalid value: "{text}" is not a whole number')
    return int(text)


def _check_keyword(keyword: str, value: str) -> None:
    if keyword in _CONNECTING:
        return
    if keyword in _REFUSED:
        raise ValueError(f'"{keyword}" {_REFUSED[keyword]}')
    if keyword in _CHOICES:
        if value not in ("", *_CHOICES[keyword]):
            allowed = ", ".join(_CHOICES[keyword])
            raise ValueError(f"{keyword}={value} is not supported (allowed: {allowed})")
        return
    supported = ", ".join([*_CONNECTING, *_CHOICES])
    raise ValueError(f'"{keyword}" is not supported in the upstream (supported: {supported})')


def _port(text: str, lowest: int = 1) -> int:
    if text.strip().isdecimal() and lowest <= int(text) <= 65535:
        return int(text)
    raise ValueError(f'invalid port number: "{text}" ({lowest} to 65535)')


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
        default: as a user would write it, "" for none.
        read: makes the value of a text; raises ValueError.
        metavar: what stands for the value in ``--help``.
        help: a clause for ``--help`` and docs/configuration.md.
        more: sentences for docs/configuration.md alone, in Markdown.
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
        _one_of(*AUTH_TYPES),
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
        _one_of(*SSL_MODES),
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
        _one_of(*EXTENSIONS),
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
        "info", _one_of(*LOG_LEVELS), "LEVEL", f"what is logged: {', '.join(LOG_LEVELS)}"
    )

    @property
    def lookup_database(self) -> str:
        """Where auth_user logs in."""
        return self.auth_dbname or DEFAULT_LOOKUP_DATABASE


SETTINGS: Final = tuple(dataclasses.fields(Config))

Given: TypeAlias = Mapping[str, "str | list[str] | None"]


Texts: TypeAlias = "dict[str, tuple[str, list[str]]]"
"""What was given, by field name: where, for the user to read, and the values as typed."""


def load(
    flags: Given | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Puts the settings together: flags over the file's keys over the environment over defaults.

    Args:
        flags: by field name, as typed; None for one that was not given.
        file: a TOML file whose keys are the field names.
        environ: where to look for PGHOST, PGPORT, PGPASSFILE and such.

    Raises:
        ConfigError: a value or key that cannot be used.
    """
    return build(collect(flags, file=file, environ=environ), environ)


def collect(
    flags: Given | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Texts:
    """The first half of `load`: what was given, the one that wins where there are several.

    Raises:
        ConfigError: a file that cannot be read, or a key that nobody knows.
    """
    environ = environ or {}
    given: Texts = {}
    if environ.get("PGPASSFILE"):
        given["passfile"] = ("PGPASSFILE", [environ["PGPASSFILE"]])
    given["upstream"] = ("upstream", [""])
    if file is not None:
        given |= {key: (f"{file}: {key}", texts) for key, texts in _read_file(file).items()}
    for name, value in (flags or {}).items():
        if value is not None:
            texts = value if isinstance(value, list) else [value]
            given[name] = (f"--{name.replace('_', '-')}", texts)
    return given


def build(given: Texts, environ: Mapping[str, str] | None = None) -> Config:
    """The second half of `load`: the values are read.

    Raises:
        ConfigError: one cannot be used.
    """
    values: dict[str, Any] = {}
    for field in SETTINGS:
        if field.name not in given:
            continue
        where, texts = given[field.name]
        read = field.metadata["read"]
        if field.name == "upstream":
            read = lambda text: parse_upstream(text, environ)  # noqa: E731
        try:
            read_values = tuple(read(text) for text in texts)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        values[field.name] = read_values if field.metadata["many"] else read_values[-1]
    timeout = values["upstream"].connect_timeout
    if timeout is not None:
        values.setdefault("connect_timeout", timeout)
    config = Config(**values)
    check_together(config)
    return config


def check_together(config: Config) -> None:
    """Settings that need others. Raises ConfigError."""
    mode = config.client_tls_sslmode
    needed = {
        "client_tls_cert_file": mode != "disable" and config.client_tls_cert_file is None,
        "client_tls_key_file": mode != "disable" and config.client_tls_key_file is None,
        "client_tls_ca_file": mode.startswith("verify-") and config.client_tls_ca_file is None,
    }
    for name, missing in needed.items():
        if missing:
            raise ConfigError(f"client_tls_sslmode: {mode} needs {name}")
    own_query = config.auth_query not in ("", DEFAULT_AUTH_QUERY)
    if config.auth_user and own_query and not config.auth_dbname:
        raise ConfigError(
            "auth_query: a query of your own needs auth_dbname: the database that has what it names"
        )
    attrs = config.upstream.target_session_attrs
    if attrs != "any" and not config.auth_user:
        raise ConfigError(
            f"upstream: target_session_attrs={attrs} needs auth_user: the proxy logs in with it to"
            " see which server is which"
        )


def _read_file(file: Path) -> dict[str, list[str]]:
    """The file's keys, with the values as one would type them."""
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None
    known = {field.name: field for field in SETTINGS}
    found: dict[str, list[str]] = {}
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f'{file}: unknown key "{key}"; allowed: {", ".join(known)}')
        many = known[key].metadata["many"]
        values = value if many and isinstance(value, list) else [value]
        if not values or not all(type(value) in (str, int, float) for value in values):
            wanted = "a string or a list of strings" if many else "a string or a number"
            raise ConfigError(f"{file}: {key}: must be {wanted}")
        if known[key].metadata["read"] is parse_file:
            # A path in a file is meant from where the file is.
            values = [str(file.parent / Path(str(value)).expanduser()) for value in values]
        found[key] = [str(value) for value in values]
    return found
