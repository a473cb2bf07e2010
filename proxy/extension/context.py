"""The queries that read a call's `Context` from the server.

Invariant: for direct calls the primary is asked in the call's transaction, in the same round trip;
otherwise a channel is asked before the call is served. Roles and settings are never remembered:
functions, SET LOCAL, rollbacks and other sessions' GRANTs change them where a proxy cannot see it.
All names and operators in this SQL are schema-qualified, since the client chooses search_path.

A direct call's query is planned each time, since the session would see a prepared statement. So it
uses functions on system caches, and tables only where necessary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from proxy.api.functions import Function
from proxy.backends.identity import IDENTITY
from proxy.config.gucs import GUCS
from proxy.extension.installed import (
    Installed,
    installed_query,
    may_execute,
    parse_installed,
    speaks,
)
from proxy.extension.names import Meant, Name, is_there, meant_query, parse_meant
from proxy.extension.questions import SPEAKER
from proxy.extension.texts import sql
from proxy.jobs.context import NOT_CARRIED_OVER, Context
from proxy.sql.encodings import parse_array
from proxy.sql.text import EXECUTOR_ROLE, literal

_IS_EXECUTOR: Final = (
    b"(r.rolsuper OR COALESCE(pg_catalog.pg_has_role(r.oid,"
    b" CAST(pg_catalog.to_regrole(%b) AS pg_catalog.oid), 'MEMBER'), false))"
    % literal(EXECUTOR_ROLE.encode())
)
"""Whether the role ``r`` may call the functions in a database without the extension's objects."""

# The same for the current role, without a table, which would take five times as long as the whole
# context. Only a superuser has the rights of a role that cannot exist.
_I_AM_EXECUTOR: Final = (
    b"(pg_catalog.pg_has_role(CAST(0 AS pg_catalog.oid), 'USAGE') OR COALESCE("
    b"pg_catalog.pg_has_role(CAST(pg_catalog.to_regrole(%b) AS pg_catalog.oid), 'MEMBER'), false))"
    % literal(EXECUTOR_ROLE.encode())
)
_MY_OID: Final = (
    b"CAST(CAST(pg_catalog.quote_ident(CAST(current_user AS pg_catalog.text))"
    b" AS pg_catalog.regrole) AS pg_catalog.oid)"
)

_MANY_ROLES: Final = 16
"""Up to this many roles are checked one by one, without planning a query."""


@dataclass(frozen=True, slots=True)
class CallContext(Context):
    """The context of a direct call.

    Attributes:
        extension: which extension of ours the database has.
        meant: what else it has under the names as written.
        is_whole: whether both are known. If not, something has these names.
    """

    is_whole: bool = True
    extension: Installed | None = None
    meant: Meant = field(default_factory=Meant)


@functools.lru_cache(maxsize=64)  # a few forms recur
def context_query(
    *,
    names: tuple[Name, ...],
    closely: bool,
    has_no_objects: bool,
    roles: frozenset[int],
    settings: bool,
    custom_settings: tuple[bytes, ...] = (),
) -> bytes:
    """The SELECT whose one row is a `CallContext`; all columns are text.

    Args:
        names: what is called.
        closely: as in `meant_query`.
        has_no_objects: whether the database seems to have neither the extension nor anything else
            under our names. Then the query only checks that, at a fifth of the cost.
        roles: OIDs of roles, to learn which of their rights the current role has.
        settings: whether to read the session's settings, the expensive part (about 0.5 ms).
        custom_settings: names with a dot that may be set, which pg_settings does not list.
    """
    ours = b", ".join(
        b"pg_catalog.current_setting(%b, true)" % literal(name.encode()) for name in GUCS
    )
    columns = [
        _I_AM_EXECUTOR,
        _MY_OID,
        b"current_user, session_user, pg_catalog.current_setting('role')",
        b"pg_catalog.current_setting('statement_timeout')",
        b"pg_catalog.current_setting('client_encoding'), pg_catalog.current_setting('TimeZone')",
        ours,
        _usable_roles(roles),
    ]
    if has_no_objects:
        columns.append(
            b"NULL, CASE WHEN %b THEN NULL ELSE '{}' END"
            % is_there(name.function for name in names)
        )
    else:
        columns.append(installed_query(name.function for name in names).encode())
        columns.append(meant_query(names, closely=closely))
    if settings:
        columns.append(
            b"CAST(ARRAY(SELECT pg_catalog.unnest(ARRAY[s.name, s.setting])"
            b" FROM pg_catalog.pg_settings s WHERE s.source OPERATOR(pg_catalog.=) 'session')"
            b" AS pg_catalog.text)"
        )
    if settings and custom_settings:
        values = b", ".join(
            b"pg_catalog.current_setting(%b, true)" % literal(name) for name in custom_settings
        )
        columns.append(b"CAST(ARRAY[%b] AS pg_catalog.text)" % values)
    return b"SELECT " + b", ".join(columns)


def _usable_roles(roles: frozenset[int]) -> bytes:
    """An SQL expression, an array as text: those roles whose rights the current role has."""
    if not roles:
        return b"'{}'"
    if len(roles) <= _MANY_ROLES:
        return b"CAST(ARRAY[%b] AS pg_catalog.text)" % b", ".join(
            b"CASE WHEN pg_catalog.pg_has_role(CAST(%d AS pg_catalog.oid), 'USAGE')"
            b" THEN CAST(%d AS pg_catalog.oid) END" % (oid, oid)
            for oid in sorted(roles)
        )
    return (
        b"CAST(ARRAY(SELECT o FROM pg_catalog.unnest(CAST('{%b}' AS pg_catalog.oid[])) o"
        b" WHERE pg_catalog.pg_has_role(o, 'USAGE')) AS pg_catalog.text)"
        % b",".join(b"%d" % oid for oid in roles)
    )


def parse_context(
    values: Sequence[bytes | None],
    *,
    names: Sequence[Name],
    custom_settings: Sequence[bytes] = (),
) -> CallContext:
    """The CallContext from the row's values, in text format and the client's encoding."""
    may_call, role_id, role, session_role, set_role, statement_timeout, encoding, zone, *rest = (
        values
    )
    client_encoding = encoding or b""
    own, (usable_roles, extension, meant, *arrays) = rest[: len(GUCS)], rest[len(GUCS) :]
    settings: list[tuple[bytes, bytes]] = []
    if arrays:
        flat = [text or b"" for text in parse_array(arrays[0] or b"{}", client_encoding)]
        pairs = zip(flat[::2], flat[1::2], strict=True)
        settings += [pair for pair in pairs if pair[0] not in NOT_CARRIED_OVER]
    if len(arrays) > 1:
        custom = zip(custom_settings, parse_array(arrays[1] or b"{}", client_encoding), strict=True)
        settings += [(name, value) for name, value in custom if value is not None]
    return CallContext(
        may_call=may_call == b"t",
        role_id=int(role_id or 0),
        role=role or b"",
        session_role=session_role or b"",
        set_role=set_role or b"none",
        statement_timeout=statement_timeout or b"0",
        own_settings={
            name: value.decode("utf-8", "replace")
            for name, value in zip(GUCS, own, strict=True)
            if value is not None
        },
        usable_roles=frozenset(
            int(oid) for oid in parse_array(usable_roles or b"{}", client_encoding) if oid
        ),
        settings=tuple(settings),
        is_whole=meant is not None,
        extension=None
        if extension is None
        else parse_installed(parse_array(extension, client_encoding)),
        meant=parse_meant(
            names,
            (
                (text or b"").decode("ascii", "replace")
                for text in parse_array(meant or b"{}", client_encoding)
            ),
        ),
        client_encoding=client_encoding,
        time_zone=zone or b"",
    )


ROLE_STATEMENT: Final = sql(
    "prepare_role",
    may_execute=may_execute("$3", "$4", "r.oid"),
    is_executor=_IS_EXECUTOR.decode(),
    speaks=speaks(SPEAKER, "$6"),
    identity=IDENTITY.decode(),
).encode()
"""A statement that a channel prepares for role_query()."""


def role_query(
    role: bytes,
    session_role: bytes,
    function: Function,
    schema: bytes,
    *,
    encoding: bytes,
    roles: Iterable[int],
    identity: bytes | None,
) -> bytes:
    """The query to a channel about a role that a session claims to have. It returns one row, none
    if there is no such role: its OID, whether the channel's login role may become it, whether it
    may call the function, those of `roles` whose rights it has, whether the asking function is
    trusted, and the OID of the login role. It fails if the channel's login no longer holds.

    Args:
        role: name of the current role.
        session_role: name of the session's.
        function: what is called.
        schema: of the function that asks.
        encoding: of the names, by PostgreSQL's name.
        roles: OIDs.
        identity: of the channel's login (`identity`); None if it has just logged in.
    """
    return b"EXECUTE pg_background_role(%b, %b, '%b', %d, '{%b}', %b, %b)" % (
        _name(role, encoding),
        _name(session_role, encoding),
        function.name.encode(),
        len(function.parameters),
        b",".join(b"%d" % oid for oid in roles),
        _name(schema, encoding),
        b"NULL" if identity is None else literal(identity),
    )


def _name(name: bytes, encoding: bytes) -> bytes:
    """A name in an encoding that may differ from the connection's."""
    return (
        b"CAST(pg_catalog.convert_from(pg_catalog.decode('%b', 'hex'), %b) AS pg_catalog.name)"
        % (name.hex().encode(), literal(encoding))
    )
