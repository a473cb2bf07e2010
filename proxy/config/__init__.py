"""The configuration: the settings of ``serve``, and the types of their values.

=================  =============================================================================
`settings`         `Config`: every setting, with its reader and its help
`loading`          makes a `Config` from flags, a TOML file and the environment
`addresses`        where clients connect, and the servers' hosts
`upstream`         the server: libpq's keywords, read by `conninfo`
`require_auth`     what the server may ask for in a login
`keepalive`        TCP keepalive
`readers`          from texts to values
`gucs`             the settings ``pg_background.*`` of a session; sizes and times
=================  =============================================================================

Invariant: nothing here opens a connection or knows of one.
"""

from proxy.config.addresses import Host, ListenAddress, parse_listen
from proxy.config.keepalive import Keepalive
from proxy.config.loading import ConfigError, Given, build, check_together, collect, load, read
from proxy.config.readers import Sender
from proxy.config.settings import SETTINGS, Config
from proxy.config.upstream import Upstream, parse_upstream

__all__ = [
    "SETTINGS",
    "Config",
    "ConfigError",
    "Given",
    "Host",
    "Keepalive",
    "ListenAddress",
    "Sender",
    "Upstream",
    "build",
    "check_together",
    "collect",
    "load",
    "parse_listen",
    "parse_upstream",
    "read",
]
