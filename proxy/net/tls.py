"""TLS contexts for both sides of the proxy, by PostgreSQL's conventions.

Invariant: every ssl.SSLContext is made here, when the configuration is read. So an unusable file is
a configuration error, and both sides have PostgreSQL's minimum: TLS 1.2, ALPN ``postgresql``, no
renegotiation, no session tickets.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final, cast

from proxy import private
from proxy.config import Config, ConfigError, Upstream
from proxy.reasons import explain

ALPN_PROTOCOL: Final = "postgresql"

SHUTDOWN_TIMEOUT: Final = 2.0
"""Seconds for the peer to answer when we end a TLS session."""

REQUIRED: Final = ("require", "verify-ca", "verify-full")
"""The modes that require TLS."""


def client_context(config: Config) -> ssl.SSLContext | None:
    """The context for connections from clients; None if TLS is disabled.

    As in PgBouncer, a client's certificate is verified only by verify-ca and verify-full, which are
    equivalent here, since a client has no host name.

    Raises:
        ConfigError: a file is missing, exposed or malformed.
    """
    mode = config.client_tls_sslmode
    if mode == "disable":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _set_minimum(context)
    context.num_tickets = 0
    _load_certificate(
        context,
        "client_tls_cert_file",
        str(config.client_tls_cert_file),
        "client_tls_key_file",
        str(config.client_tls_key_file),
    )
    if mode.startswith("verify-"):
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, "client_tls_ca_file", str(config.client_tls_ca_file))
    return context


def http_context(config: Config) -> ssl.SSLContext | None:
    """The context for HTTPS, without client certificates; None if TLS is disabled.

    Raises:
        ConfigError: as for `client_context`.
    """
    if config.client_tls_sslmode == "disable":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _set_minimum(context)
    context.set_alpn_protocols(["http/1.1"])
    files = str(config.client_tls_cert_file), str(config.client_tls_key_file)
    _load_certificate(context, "client_tls_cert_file", files[0], "client_tls_key_file", files[1])
    return context


def server_context(upstream: Upstream) -> ssl.SSLContext | None:
    """The context for connections to the server; None if TLS is disabled.

    As in libpq, sslrootcert is always used if given, so ``require`` with it is ``verify-ca``.
    Unlike libpq, there are no default files in a home directory.

    Raises:
        ConfigError: a file is missing, exposed or malformed.
    """
    if upstream.sslmode == "disable":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _set_minimum(context)
    context.check_hostname = upstream.sslmode == "verify-full"
    if upstream.sslrootcert == "system":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    elif upstream.sslrootcert:
        _load_authorities(context, "sslrootcert", upstream.sslrootcert)
    else:
        context.verify_mode = ssl.CERT_NONE
    if upstream.sslcert:
        key = upstream.sslkey or upstream.sslcert
        _load_certificate(context, "sslcert", upstream.sslcert, "sslkey", key)
    return context


def _set_minimum(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.set_alpn_protocols([ALPN_PROTOCOL])


def _load_certificate(
    context: ssl.SSLContext, cert_name: str, cert: str, key_name: str, key: str
) -> None:
    def encrypted() -> str:
        raise ValueError("the key is encrypted; the proxy needs one without a passphrase")

    for name, file in ((cert_name, cert), (key_name, key)):
        try:
            with Path(file).expanduser().open("rb"):
                pass
        except OSError as error:
            raise ConfigError(f"{name}: cannot read {file}: {explain(error)}") from None
    if private.is_exposed(Path(key).expanduser().stat()):
        raise ConfigError(f"{key_name}: {private.exposed(key)}")
    try:
        context.load_cert_chain(Path(cert).expanduser(), Path(key).expanduser(), password=encrypted)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{cert_name} and {key_name}: {explain(error)}") from None


def _load_authorities(context: ssl.SSLContext, name: str, file: str) -> None:
    try:
        context.load_verify_locations(Path(file).expanduser())
    except ssl.SSLError:
        raise ConfigError(f"{name}: {file} has no certificate in PEM format") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {file}: {explain(error)}") from None


def is_encrypted(transport: asyncio.BaseTransport) -> bool:
    """Whether a connection has TLS."""
    return transport.get_extra_info("ssl_object") is not None


def speaks_postgresql(transport: asyncio.BaseTransport) -> bool:
    """Whether both sides of a TLS connection have named the protocol, as direct TLS requires."""
    tls = cast("ssl.SSLObject | None", transport.get_extra_info("ssl_object"))
    return tls is not None and tls.selected_alpn_protocol() == ALPN_PROTOCOL
