"""Makes a `Config` from flags, a TOML file and the environment.

Invariant: nothing is ignored. An unreadable value or unknown key is an error of one line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from proxy.config.readers import parse_file, parse_path
from proxy.config.settings import DEFAULT_AUTH_QUERY, SETTINGS, Config
from proxy.config.upstream import parse_upstream
from proxy.reasons import explain


class ConfigError(Exception):
    """A setting that cannot be used; the message is one line for the user and locates it."""


Flags: TypeAlias = Mapping[str, "str | list[str] | None"]
"""By field name, as typed; None for a flag that was not given."""

Given: TypeAlias = "dict[str, tuple[str, list[str]]]"
"""The given settings, by field name: the source, for the user to read, and the values as typed."""


def load(
    flags: Flags | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Reads the settings: flags over the file's keys over the environment over defaults.

    Args:
        flags: of the command line.
        file: a TOML file whose keys are field names.
        environ: has PGHOST, PGPORT, PGPASSFILE and the like.

    Raises:
        ConfigError: a value or key cannot be used.
    """
    return build(collect(flags, file=file, environ=environ), environ)


def collect(
    flags: Flags | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Given:
    """The first half of `load`: for each setting, the source that wins and its texts.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key.
    """
    environ = environ or {}
    given: Given = {}
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


def build(given: Given, environ: Mapping[str, str] | None = None) -> Config:
    """The second half of `load`: read the texts.

    Raises:
        ConfigError: a value cannot be used, or requires another setting.
    """
    values = read(given, environ)
    timeout = values["upstream"].connect_timeout
    if timeout is not None:
        values.setdefault("connect_timeout", timeout)
    config = Config(**values)
    check_together(config)
    return config


def read(given: Given, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The values of some settings, by field name.

    Raises:
        ConfigError: one cannot be used.
    """
    values: dict[str, Any] = {}
    for field in SETTINGS:
        if field.name not in given:
            continue
        where, texts = given[field.name]
        reader = field.metadata["read"]
        if field.name == "upstream":
            reader = lambda text: parse_upstream(text, environ)  # noqa: E731
        try:
            read_values = tuple(reader(text) for text in texts)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        values[field.name] = read_values if field.metadata["many"] else read_values[-1]
    return values


def check_together(config: Config) -> None:
    """Raises ConfigError if a setting requires another one."""
    mode = config.client_tls_sslmode
    needed = {
        "client_tls_cert_file": mode != "disable" and config.client_tls_cert_file is None,
        "client_tls_key_file": mode != "disable" and config.client_tls_key_file is None,
        "client_tls_ca_file": mode.startswith("verify-") and config.client_tls_ca_file is None,
    }
    for name, missing in needed.items():
        if missing:
            raise ConfigError(f"client_tls_sslmode: {mode} needs {name}")
    if any(address.proxy_protocol for address in config.listen) and not config.proxy_protocol_from:
        raise ConfigError(
            "listen: proxy_protocol=on needs proxy_protocol_from: the load balancers that are"
            " believed"
        )
    own_query = config.auth_query not in ("", DEFAULT_AUTH_QUERY)
    if config.auth_user and own_query and not config.auth_dbname:
        raise ConfigError(
            "auth_query: a query of your own needs auth_dbname: the database that has what it names"
        )
    if config.admin_listen is not None and config.watchers and config.auth_file is None:
        name = "admin_users" if config.admins else "stats_users"
        raise ConfigError(f"{name}: needs auth_file, which has their passwords or secrets")
    if config.replica_secret_file is not None and not config.auth_user:
        raise ConfigError(
            "replica_secret_file: needs auth_user: the replicas speak with each other in the"
            " database that it logs in to"
        )
    attrs = config.upstream.target_session_attrs
    if attrs != "any" and not config.auth_user:
        raise ConfigError(
            f"upstream: target_session_attrs={attrs} needs auth_user: the proxy logs in with it to"
            " see which server is which"
        )


def _read_file(file: Path) -> dict[str, list[str]]:
    """The file's keys, with values as for flags."""
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {explain(error)}") from None
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
        if known[key].metadata["read"] in (parse_file, parse_path):
            # Relative paths start from the file's folder.
            values = [str(file.parent / Path(str(value)).expanduser()) for value in values]
        found[key] = [str(value) for value in values]
    return found
