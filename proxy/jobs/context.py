"""What is known about the calling session, and SQL by which a side backend takes it over.

Invariant: a job runs with the role and settings of its call, or not at all. All names in this SQL,
operators too, are schema-qualified: the session's search_path is one of the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proxy.jobs.output_settings import COLUMNS
from proxy.sql.text import literal

NOT_CARRIED_OVER: Final = frozenset(
    # They belong to the caller's transaction or connection.
    {
        b"application_name",
        b"transaction_deferrable",
        b"transaction_isolation",
        b"transaction_read_only",
    }
)
"""Settings that a job does not take over."""


@dataclass(frozen=True, slots=True)
class Context:
    """A session as it was when its call was evaluated.

    Attributes:
        may_call: whether the current role may call the functions.
        role_id, role, session_role: OID and name of the current role, name of the session's.
        set_role: the setting ``role``: ``none``, or what SET ROLE has set.
        statement_timeout: as SHOW prints it.
        own_settings: ``pg_background.`` settings that the server has, as SHOW prints them, by name.
        usable_roles: of the role OIDs asked about, those whose rights the current role has.
        settings: names and values of all set in the session, for set_config(); empty if not wanted.
        client_encoding, time_zone: by PostgreSQL's names.
        extension: what CREATE EXTENSION has made in this database; None if it is not installed or
            does not matter. If it is installed, privileges on its functions replace `may_call`.
    """

    may_call: bool
    role_id: int
    role: bytes
    session_role: bytes
    set_role: bytes
    statement_timeout: bytes
    own_settings: dict[str, str]
    usable_roles: frozenset[int]
    settings: tuple[tuple[bytes, bytes], ...]
    extension: object = None
    client_encoding: bytes = b""
    time_zone: bytes = b""

    @property
    def roles(self) -> frozenset[int]:
        """OIDs of the roles whose jobs the current role may see and stop."""
        return self.usable_roles | {self.role_id}


def setup_query(
    context: Context, login_role: bytes, overrides: dict[bytes, bytes], pid: int
) -> bytes:
    """The SELECT that gives a fresh side backend the settings and role of a session.

    Its first column is the backend's pid; from the third on come the `output_settings` that the job
    begins with. If the pid is not `pid`, the one in BackendKeyData, there is a connection pooler in
    between and nothing is set: the setting would stay with a server connection that another client
    may get next, and this one may not.
    """
    return (
        b"SELECT pg_catalog.pg_backend_pid(),"
        b" CASE WHEN pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %d THEN %b END, %b"
        % (pid, _set_all(context, login_role, overrides, local=False), COLUMNS)
    )


def setup_block(context: Context, login_role: bytes, overrides: dict[bytes, bytes]) -> bytes:
    """Begins a transaction with the settings and role of a session, which end with it.

    It is for backends behind a connection pooler: no pooler gives the server connection of an open
    transaction to another client. The row is that of `setup_query`.
    """
    return b"BEGIN%b; SELECT pg_catalog.pg_backend_pid(), %b, %b" % (
        b"".join(_TRANSACTION_MODES.get(pair, b"") for pair in context.settings),
        _set_all(context, login_role, overrides, local=True),
        COLUMNS,
    )


_TRANSACTION_MODES: Final = {
    **{
        (b"default_transaction_isolation", level.lower()): b" ISOLATION LEVEL " + level
        for level in (b"SERIALIZABLE", b"REPEATABLE READ", b"READ COMMITTED", b"READ UNCOMMITTED")
    },
    (b"default_transaction_read_only", b"on"): b" READ ONLY",
    (b"default_transaction_read_only", b"off"): b" READ WRITE",
    (b"default_transaction_deferrable", b"on"): b" DEFERRABLE",
    (b"default_transaction_deferrable", b"off"): b" NOT DEFERRABLE",
}
"""The mode of BEGIN that has the effect of a setting made before the transaction."""

_PROXYS_OWN: Final = b"pg_background_proxy."
"""Prefix of the settings that the proxy gives its backends, and that nobody else may have."""


def _set_all(
    context: Context, login_role: bytes, overrides: dict[bytes, bytes], *, local: bool
) -> bytes:
    """An expression that sets all that a job takes over; the role last, as it may lack rights."""
    settings = [
        (name, value)
        for name, value in context.settings
        if name not in overrides and not name.startswith(_PROXYS_OWN)
    ]
    settings += overrides.items()
    if context.session_role != login_role:
        settings.append((b"session_authorization", context.session_role))
    # Even if it is none: ALTER ROLE … SET role may have changed the login's.
    settings.append((b"role", context.set_role))
    return b"ARRAY[%b]" % b", ".join(
        b"pg_catalog.set_config(%b, %b, %b)"
        % (literal(name), literal(value), b"true" if local else b"false")
        for name, value in settings
    )


def activity_query(pids: Sequence[int]) -> bytes:
    """The query for the columns of pg_background_activity from pg_stat_activity, pids first."""
    return (
        b"SELECT pid, state, wait_event_type, wait_event, xact_start, query_start, backend_start,"
        b" query FROM pg_catalog.pg_stat_activity WHERE pid OPERATOR(pg_catalog.=)"
        b" ANY (CAST('{%b}' AS pg_catalog.int4[]))" % b",".join(b"%d" % p for p in pids)
    )
