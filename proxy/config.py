"""What the proxy was told: the settings of ``serve``, from a TOML file, the environment and flags.

Each setting is declared once, as a field of Config with its reader and its help; the command line,
the file's keys and the README's table come from there. A value that cannot be read, or a key that
nobody knows, is an error that says so in one line; nothing is ignored.
"""

# ruff: noqa: RUF009 - _setting() is dataclasses.field() with the metadata that every field has
from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from proxy.conninfo import parse_conninfo
from proxy.settings import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT, parse_time_ms

DEFAULT_PORT: Final = 6543
LOG_LEVELS: Final = ("debug", "info", "warning", "error")

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
_CONNECTING: Final = ("host", "hostaddr", "port", "connect_timeout")
# Keywords that would change how we connect, with the values that mean what the proxy does anyway.
_HARMLESS: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": ("disable", "allow", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "channel_binding": ("disable", "prefer"),
    "target_session_attrs": ("any",),
    "load_balance_hosts": ("disable",),
}
# libpq's environment variables that stand for a keyword of the upstream.
_ENVIRONMENT: Final[Mapping[str, str]] = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "sslmode": "PGSSLMODE",
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


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server behind the proxy."""

    hosts: tuple[tuple[str, int], ...] = (("localhost", 5432),)
    """(host, port), to be tried in this order; a host that begins with a slash is the directory of
    a Unix socket."""
    connect_timeout: float | None = None
    """Seconds, if the connection string says so; Config.connect_timeout is what holds."""

    def __str__(self) -> str:
        return ",".join(str(ListenAddress(host, port)) for host, port in self.hosts)


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
    hosts = (given.get("hostaddr") or given.get("host") or "localhost").split(",")
    ports = (given.get("port") or "5432").split(",")
    if len(ports) not in (1, len(hosts)):
        raise ValueError(f"{len(ports)} ports do not match {len(hosts)} hosts")
    timeout = given.get("connect_timeout")
    return Upstream(
        tuple(
            (host or "localhost", _port(port or "5432"))
            for host, port in zip(hosts, ports * (len(hosts) // len(ports)), strict=True)
        ),
        None if timeout is None else parse_seconds(timeout),
    )


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


def parse_log_level(text: str) -> str:
    """Takes one of LOG_LEVELS, in any case.

    Raises:
        ValueError: it is another.
    """
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f'"{text}" is none of {", ".join(LOG_LEVELS)}')
    return text.lower()


def _check_keyword(keyword: str, value: str) -> None:
    if keyword in _CONNECTING:
        return
    if keyword in _REFUSED:
        raise ValueError(f'"{keyword}" {_REFUSED[keyword]}')
    if keyword in _HARMLESS:
        if value not in _HARMLESS[keyword]:
            allowed = ", ".join(_HARMLESS[keyword])
            raise ValueError(f"{keyword}={value} is not supported yet (allowed: {allowed})")
        return
    supported = ", ".join([*_CONNECTING, *_HARMLESS])
    raise ValueError(f'"{keyword}" is not supported in the upstream (supported: {supported})')


def _port(text: str, lowest: int = 1) -> int:
    if text.strip().isdecimal() and lowest <= int(text) <= 65535:
        return int(text)
    raise ValueError(f'invalid port number: "{text}" ({lowest} to 65535)')


def _setting(
    default: str, read: Callable[[str], object], metavar: str, help: str, *, many: bool = False
) -> Any:
    """Declares a field of Config; the default is written as a user would, "" for none."""
    value = read(default) if default else None
    return dataclasses.field(
        default=(value,) if many else value,
        metadata={"read": read, "metavar": metavar, "help": help, "many": many, "default": default},
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
        many=True,
    )
    upstream: Upstream = _setting(
        "host=localhost port=5432",
        parse_upstream,
        "CONNINFO",
        "the server: a libpq connection string or URI with host and port, several if you like;"
        " PGHOST and PGPORT fill what is missing",
    )
    passfile: Path | None = _setting(
        "",
        parse_file,
        "FILE",
        "passwords for side backends, in the format of .pgpass; PGPASSFILE if not given",
    )
    auth_file: Path | None = _setting(
        "",
        parse_file,
        "FILE",
        'passwords, md5 or SCRAM secrets for side backends: lines of "role" "secret", as'
        " PgBouncer's auth_file",
    )
    shutdown_timeout: float = _setting(
        "30s",
        parse_seconds,
        "TIME",
        "how long sessions and jobs may go on after SIGTERM or SIGINT",
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
        "default of pg_background.max_workers: how many jobs a session may have, 1 to 1000",
    )
    default_queue_size: str = _setting(
        DEFAULT_QUEUE_SIZE.default,
        DEFAULT_QUEUE_SIZE.show,
        "SIZE",
        "default of pg_background.default_queue_size: how much of a job's result is held for its"
        " reader, 4kB to 256MB",
    )
    worker_timeout: str = _setting(
        WORKER_TIMEOUT.default,
        WORKER_TIMEOUT.show,
        "TIME",
        "default of pg_background.worker_timeout: how long a job may run, in milliseconds unless a"
        " unit is given; 0: the session's statement_timeout",
    )
    log_level: str = _setting(
        "info", parse_log_level, "LEVEL", f"what is logged: {', '.join(LOG_LEVELS)}"
    )


SETTINGS: Final = tuple(dataclasses.fields(Config))

Given: TypeAlias = Mapping[str, "str | list[str] | None"]


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
    environ = environ or {}
    given: dict[str, tuple[str, list[str]]] = {}
    if environ.get("PGPASSFILE"):
        given["passfile"] = ("PGPASSFILE", [environ["PGPASSFILE"]])
    given["upstream"] = ("upstream", [""])
    if file is not None:
        given |= {key: (f"{file}: {key}", texts) for key, texts in _read_file(file).items()}
    for name, value in (flags or {}).items():
        if value is not None:
            texts = value if isinstance(value, list) else [value]
            given[name] = (f"--{name.replace('_', '-')}", texts)

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
    return Config(**values)


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
