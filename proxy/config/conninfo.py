"""Reads libpq's connection strings: ``key=value`` pairs and ``postgresql://`` URIs.

Invariant: only the syntax is here (manual, "Connection Strings"); `upstream` has the keywords.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

_URI_PREFIXES: Final = ("postgresql://", "postgres://")
_KEY: Final = re.compile(r"\s*(?P<key>[^\s=]+)\s*(?P<equals>=?)\s*")
_QUOTED: Final = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
_UNQUOTED: Final = re.compile(r"((?:[^\s\\]|\\.|\\\Z)*)", re.DOTALL)
_PERCENT: Final = re.compile(r"%(?![0-9a-fA-F]{2})")


def parse_conninfo(text: str) -> dict[str, str]:
    """Reads a connection string into keywords and values; the last of a repeated keyword counts.

    Commas separate several hosts and ports in ``host`` and ``port``, as in libpq.

    Raises:
        ValueError: it is malformed; the message says where. It never quotes a password.
    """
    for prefix in _URI_PREFIXES:
        if text.startswith(prefix):
            return _parse_uri(text.removeprefix(prefix))
    return _parse_pairs(text)


def _parse_pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    position = 0
    while match := _KEY.match(text, position):
        key = match["key"]
        if not match["equals"]:
            raise ValueError(f'missing "=" after "{key}" in the connection string')
        quoted = text.startswith("'", match.end())
        value = (_QUOTED if quoted else _UNQUOTED).match(text, match.end())
        if value is None:
            raise ValueError(f'unterminated quoted string after "{key}=" in the connection string')
        position = value.end()
        if quoted and text[position : position + 1].strip():
            raise ValueError(f'a space is missing after the quoted value of "{key}"')
        pairs[key] = re.sub(r"\\(.?)", r"\1", value[1], flags=re.DOTALL)
    return pairs


def _parse_uri(rest: str) -> dict[str, str]:
    """Reads [user[:password]@][host[:port],...][/dbname][?key=value&...], after the scheme."""
    rest, _, query = rest.partition("?")
    # The separating @ precedes the first slash; in names it is written %40.
    authority, slash, database = rest.partition("/")
    userinfo, at, hosts = authority.rpartition("@")
    found: dict[str, str] = {}
    if at:
        user, colon, password = userinfo.partition(":")
        if user:
            found["user"] = _decode(user, "user")
        if colon:
            found["password"] = _decode(password, "password")
    if hosts:
        pairs = [_host_and_port(host) for host in hosts.split(",")]
        found["host"] = ",".join(host for host, _ in pairs)
        if any(port for _, port in pairs):
            found["port"] = ",".join(port for _, port in pairs)
    if slash and database:
        found["dbname"] = _decode(database, "dbname")
    for parameter in query.split("&") if query else []:
        key, equals, value = parameter.partition("=")
        if not equals or not key:
            raise ValueError(f'missing "=" after "{key}" in the URI\'s parameters')
        key, value = _decode(key, "parameter"), _decode(value, key)
        if (key, value) == ("ssl", "true"):  # JDBC's spelling, which libpq accepts
            key, value = "sslmode", "require"
        found[key] = value
    return found


def _host_and_port(text: str) -> tuple[str, str]:
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or not host:
            raise ValueError('an IPv6 address in the URI lacks its "]" or is empty')
        if port and not port.startswith(":"):
            raise ValueError(f'"{port}" after the "]" of an IPv6 address is not a port')
        return host, port[1:]
    host, _, port = text.partition(":")
    return _decode(host, "host"), _decode(port, "port")


def _decode(text: str, what: str) -> str:
    if _PERCENT.search(text):
        raise ValueError(f'invalid percent-encoding in the URI\'s "{what}"')
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ValueError(f'the URI\'s "{what}" is not valid UTF-8') from None
    if "\0" in decoded:
        raise ValueError(f'forbidden %00 in the URI\'s "{what}"')
    return decoded
