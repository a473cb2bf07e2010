"""What is known of the session that makes a call, and how a side backend takes it over.

Invariant: a job runs with the role and the settings that its call had, or not at all. All names in
this SQL are schema-qualified, operators too: the session's search_path is among its settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proxy.jobs.output_settings import COLUMNS
from proxy.sql.text import literal

NOT_CARRIED_OVER: Final = frozenset(
    # Of the caller's transaction or connection, not of its session.
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
        own_settings: the ``pg_background.`` settings as SHOW prints them, by name; one that the
            server has lost is missing.
        usable_roles: of the role OIDs asked about, those whose rights the current role has.
        settings: names and values of all that was set in this session, ready for set_config();
            empty if they were not asked for.
        client_encoding, time_zone: the settings, as PostgreSQL names them.
        extension: what CREATE EXTENSION has made in this database, None if it is not there or
            does not matter. If it is there, the privileges on its functions count, not `may_call`.
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
        """OIDs of those whose jobs the current role may touch."""
        return self.usable_roles | {self.role_id}


def takeover_query(
    context: Context, login_role: bytes, overrides: dict[bytes, bytes], pid: int
) -> bytes:
    """The SELECT that gives a fresh side backend the settings and the role of a session.

    Its first column is the backend's pid, and from the third on there are the `output_settings`
    that the job begins with. If that is not `pid`, the one that BackendKeyData has
    told, there is a connection pooler in between, and nothing is set: it would stay with a server
    connection that the next transaction of another client may get, and this one may not.
    """
    return (
        b"SELECT pg_catalog.pg_backend_pid(),"
        b" CASE WHEN pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %d THEN %b END, %b"
        % (pid, _set_all(context, login_role, overrides, local=False), COLUMNS)
    )


def takeover_block(context: Context, login_role: bytes, overrides: dict[bytes, bytes]) -> bytes:
    """Begins a transaction with the settings and the role of a session, which end with it.

    For what is behind a connection pooler: none gives the server connection of an open transaction
    to another client. The row is that of `takeover_query`.
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
"""What a setting says about a transaction, if it holds before the transaction begins."""

_PROXYS_OWN: Final = b"pg_background_proxy."
"""How the names of settings begin that the proxy gives each backend, and no other may have."""


def _set_all(
    context: Context, login_role: bytes, overrides: dict[bytes, bytes], *, local: bool
) -> bytes:
    """An expression that sets all that a job takes over. The role comes last, since what was set
    may be above its rights."""
    settings = [
        (name, value)
        for name, value in context.settings
        if name not in overrides and not name.startswith(_PROXYS_OWN)
    ]
    settings += overrides.items()
    if context.session_role != login_role:
        settings.append((b"session_authorization", context.session_role))
    # Also if it is none: ALTER ROLE … SET role has made the login another.
    settings.append((b"role", context.set_role))
    return b"ARRAY[%b]" % b", ".join(
        b"pg_catalog.set_config(%b, %b, %b)"
        % (literal(name), literal(value), b"true" if local else b"false")
        for name, value in settings
    )


def activity_query(pids: Sequence[int]) -> bytes:
    """What pg_stat_activity has on these backends: pid, and the columns that the view
    pg_background_activity takes from there."""
    return (
        b"SELECT pid, state, wait_event_type, wait_event, xact_start, query_start, backend_start,"
        b" query FROM pg_catalog.pg_stat_activity WHERE pid OPERATOR(pg_catalog.=)"
        b" ANY (CAST('{%b}' AS pg_catalog.int4[]))" % b",".join(b"%d" % p for p in pids)
    )
