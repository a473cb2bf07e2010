"""The server behind the proxy, from a libpq connection string.

Invariant: a keyword means what it means in libpq, or is refused; none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from proxy.config.addresses import Host, parse_port
from proxy.config.conninfo import parse_conninfo
from proxy.config.keepalive import Keepalive
from proxy.config.readers import parse_count, parse_seconds
from proxy.config.require_auth import Policy, parse_require_auth

# Keywords that the proxy cannot use, and why
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
# Keywords of which only some values are supported
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": SSL_MODES,
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": TARGET_SESSION_ATTRS,
    "gssencmode": ("disable", "prefer"),
    "channel_binding": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
}
# The environment variables for keywords, as in libpq
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


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server, or several; names are libpq's."""

    hosts: tuple[Host, ...] = (Host("localhost", 5432),)
    """Tried in this order."""
    connect_timeout: float | None = None
    """In seconds, if in the connection string: the default of Config.connect_timeout."""
    sslmode: str = "prefer"
    sslnegotiation: str = "postgres"
    sslrootcert: str = ""
    """A file; ``system`` for the operating system's authorities; empty for none."""
    sslcert: str = ""
    sslkey: str = ""
    target_session_attrs: str = "any"
    keepalive: Keepalive = field(default_factory=Keepalive)
    require_auth: frozenset[str] | None = None
    """The methods that the server may ask for; None for all."""

    @property
    def verifies(self) -> bool:
        """Whether the certificate of every TCP connection is verified."""
        return self.sslmode in ("verify-ca", "verify-full") or (
            self.sslmode == "require" and bool(self.sslrootcert)
        )

    def proves(self, host: Host) -> bool:
        """Whether the host's identity is proven: by its certificate, or because it is local."""
        return self.verifies or host.is_on_this_machine

    def policy(self, host: Host) -> Policy:
        """What this host may ask for in a login."""
        return Policy(self.require_auth, self.proves(host), self.sslmode)

    def __str__(self) -> str:
        return ",".join(map(str, self.hosts))


def parse_upstream(text: str, environ: Mapping[str, str] | None = None) -> Upstream:
    """Reads a libpq connection string; missing keywords come from PGHOST, PGPORT and the like.

    Raises:
        ValueError: the string is malformed, or asks for something that the proxy does not support.
    """
    given = parse_conninfo(text)
    for keyword, variable in _ENVIRONMENT.items():
        value = (environ or {}).get(variable, "")
        # PGHOSTADDR does not apply to a host named in the string.
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
        # As in libpq: with the system's authorities, the certificate's name must match.
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
        Host(name or address or "localhost", parse_port(port or "5432"), address)
        for name, address, port in zip(
            names, addresses, ports * (len(names) // len(ports)), strict=True
        )
    )


def _check_ssl(upstream: Upstream) -> None:
    """Refuses the combinations that libpq refuses."""
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
