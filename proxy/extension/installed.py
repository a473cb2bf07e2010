"""Whether a database has the extension as created through the proxy, and which objects it has.

Invariant: the server's catalogs are asked each time. The extension is where its `MARKER` function
is: the marker's schema is the extension's, its body has the version, its comment is the
extension's. So transactions, dumps and SET SCHEMA treat it like any other object.

This SQL trusts nothing of the session: all names and operators are qualified.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.errors import (
    INSUFFICIENT_PRIVILEGE,
    UNDEFINED_FUNCTION,
    UNDEFINED_TABLE,
    SQLError,
)
from proxy.api.functions import (
    ERROR_INFO_1,
    ERROR_INFO_2,
    HANDLE,
    OUTCOME,
    PROGRESS,
    RESULT_INFO_1,
    RESULT_INFO_2,
    RUN,
    RUN_WITH_RETRIES,
    STATS_1,
    STATS_2,
    VIEWS,
    Function,
    Type,
    is_view,
)
from proxy.extension.texts import sql
from proxy.sql.text import EXECUTOR_ROLE

NAME: Final = "pg_background"
IS_NAMED: Final = (
    f"(a.application_name OPERATOR(pg_catalog.=) '{NAME}' OR"
    f" pg_catalog.left(a.application_name, {len(NAME) + 1}) OPERATOR(pg_catalog.=) '{NAME}:')"
)
"""Whether a row ``a`` of pg_stat_activity has a job's name."""
MARKER: Final = "_pg_background_version"
"""The function that marks the extension as present."""
TAG: Final = "-- pg-background-proxy"
"""Part of the body of every function of the extension."""
HELPER: Final = "_pg_background_"
"""Prefix of the functions that serve others only."""

IS_HELPER: Final = (
    f"(pg_catalog.left(CAST(p.proname AS pg_catalog.text), {len(HELPER)})"
    f" OPERATOR(pg_catalog.=) '{HELPER}')"
)
"""Whether ``p`` is such a function. PUBLIC may execute them; they grant nothing."""

VERSIONS: Final = (*(f"1.{minor}" for minor in range(11)), "2.0")
"""In order. All have all functions; 2.0 has the second version of the API."""

VERSION: Final = "pg_catalog.\"substring\"(p.prosrc, '[0-9.]+')"
"""The extension's version, where ``p`` is the marker."""


def is_trusted(owner: str) -> str:
    """Whether objects of a role may pass for the extension in this session: a superuser's, the
    database owner's, or the session's own. No other role can pretend to have created it.

    Args:
        owner: an SQL expression, the OID of the role.
    """
    return sql("is_trusted", owner=owner)


FIND: Final = sql(
    "find_marker",
    marker=MARKER,
    version=VERSION,
    versions=",".join(VERSIONS),
    owner_is_trusted=is_trusted("p.proowner"),
    schema_is_trusted=is_trusted("n.nspowner"),
)
"""FROM … of the marker, as ``p``, and its schema, as ``n``: one row or none. Both must belong to
somebody whom the session trusts; a superuser's comes first."""


def _is_settled(row: str) -> str:
    """Whether no open transaction has dropped or replaced a row of a catalog."""
    return (
        f"({row}.xmax OPERATOR(pg_catalog.=) 0 OR NOT EXISTS(SELECT 1 FROM pg_catalog.pg_locks k"
        f" WHERE k.transactionid OPERATOR(pg_catalog.=) {row}.xmax AND k.granted))"
    )


def speaks(function: str, schema: str) -> str:
    """Whether a function without arguments is one of the extension's, visible to all sessions.

    Args:
        function: its name.
        schema: an SQL expression, the name of its schema.
    """
    settled = " AND ".join(_is_settled(row) for row in "pna")
    return sql("speaks", find=FIND, function=function, schema=schema, are_settled=settled)


REALLY: Final = (
    "EXISTS(SELECT 1 FROM pg_catalog.pg_extension e"
    f" WHERE e.extname OPERATOR(pg_catalog.=) '{NAME}')"
)
"""Whether this database has the C extension."""


def api_version(version: str) -> int:
    """The version of the API, 1 or 2, in a version of the extension."""
    return 1 if version.startswith("1.") else 2


# --- for a call --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Installed:
    """The extension as a calling session sees it.

    Attributes:
        version: the extension's.
        marker: the OID of its marker.
        schema: its schema's name, in the client's encoding.
        in_search_path: whether unqualified names find its objects.
        usable: whether the current role may use the schema.
        allowed: what the current role may call, among what was asked about.
    """

    version: str
    marker: bytes
    schema: bytes
    in_search_path: bool
    usable: bool
    allowed: frozenset[str]

    @property
    def api(self) -> int:
        return api_version(self.version)

    def allows(self, function: Function) -> bool:
        """Whether the current role may call the function, or select from the view."""
        return _key(function) in self.allowed

    def finds(self, schema: bytes | None) -> bool:
        """Whether a name with this schema, or with none, finds the extension's objects."""
        return self.in_search_path if schema is None else schema == self.schema

    def check(self, function: Function, schema: bytes | None) -> None:
        """Raises SQLError if the current role does not find the function, or may not call it.

        Args:
            function: the function or view.
            schema: as written in the call, if at all.
        """
        of_view = is_view(function)
        own = self.schema.decode("utf-8", "replace")
        if not self.finds(schema):
            types = ", ".join(parameter.type.name for parameter in function.parameters)
            raise SQLError(
                UNDEFINED_TABLE if of_view else UNDEFINED_FUNCTION,
                f'relation "{function.name}" does not exist'
                if of_view
                else f"function {function.name}({types}) does not exist",
                hint=f'The extension {NAME} is in the schema "{own}".',
            )
        if not self.usable:
            raise SQLError(INSUFFICIENT_PRIVILEGE, f"permission denied for schema {own}")
        if not self.allows(function):
            kind = "view" if of_view else "function"
            raise SQLError(INSUFFICIENT_PRIVILEGE, f"permission denied for {kind} {function.name}")


def _key(function: Function) -> str:
    return f"{function.name}/{'view' if is_view(function) else len(function.parameters)}"


# Made once, but for the names: each call has the query.
_INSTALLED: Final = sql("installed", version=VERSION, find=FIND, allowed="@{allowed}")
_ALLOWED: Final = {
    False: sql(
        "allowed_functions",
        names="@{names}",
        may_execute=sql("may_execute", role="current_user", executor=EXECUTOR_ROLE),
    ),
    True: sql("allowed_views", names="@{names}"),
}
"""What is allowed of the functions, and of the views."""


def installed_query(functions: Iterable[Function]) -> str:
    """A subquery for the text that `parse_installed` reads; NULL without the extension.

    Args:
        functions: functions and views on which the current role's privileges are wanted.
    """
    names: dict[bool, dict[str, None]] = {}
    for function in functions:
        names.setdefault(is_view(function), {})[function.name] = None
    allowed = (
        _ALLOWED[are_views].replace("@{names}", ",".join(named))
        for are_views, named in names.items()
    )
    nothing = "SELECT CAST(NULL AS pg_catalog.text) WHERE false"
    return _INSTALLED.replace("@{allowed}", " UNION ALL ".join(allowed) or nothing)


def parse_installed(values: Sequence[bytes | None]) -> Installed:
    """From the elements of `installed_query`'s array."""
    version, marker, in_search_path, usable, schema, *allowed = (value or b"" for value in values)
    return Installed(
        version.decode("ascii", "replace"),
        marker,
        schema,
        in_search_path == b"true",
        usable == b"true",
        frozenset(key.decode("ascii", "replace") for key in allowed),
    )


def may_execute(name: str, parameters: str, role: str) -> str:
    """A subquery: whether a role may execute a function of the extension; NULL without it.

    Args:
        name: an SQL expression, the name of the function.
        parameters: an SQL expression, their number.
        role: an SQL expression, the OID of the role.
    """
    condition = sql("may_execute", role=role, executor=EXECUTOR_ROLE)
    return (
        f"(SELECT pg_catalog.bool_or({condition})"
        " FROM pg_catalog.pg_proc f WHERE f.pronamespace OPERATOR(pg_catalog.=)"
        f" (SELECT p.pronamespace {FIND}) AND f.proname OPERATOR(pg_catalog.=) {name}"
        f" AND f.pronargs OPERATOR(pg_catalog.=) {parameters})"
    )


# --- its objects -----------------------------------------------------------------------------

COMPOSITE: Final = (
    *(HANDLE, PROGRESS, OUTCOME, RUN, RUN_WITH_RETRIES),
    *(RESULT_INFO_1, RESULT_INFO_2, ERROR_INFO_1, ERROR_INFO_2, STATS_1, STATS_2),
)
"""Types of the extension other than its views'."""

# In API 1 the plain name is that of the version 1 columns.
RENAMED: Final = {
    STATS_1: (STATS_2.name, STATS_1.name),
    STATS_2: (f"{STATS_2.name}_2", STATS_2.name),
    RESULT_INFO_1: (RESULT_INFO_2.name, RESULT_INFO_1.name),
    RESULT_INFO_2: (f"{RESULT_INFO_2.name}_2", RESULT_INFO_2.name),
    ERROR_INFO_1: (ERROR_INFO_2.name, ERROR_INFO_1.name),
    ERROR_INFO_2: (f"{ERROR_INFO_2.name}_2", ERROR_INFO_2.name),
}
"""Types whose names differ between versions of the API."""

HISTORY: Final = "pg_background_history"
"""The view that shows the outcomes of jobs."""

HISTORY_TABLE: Final = "_pg_background_history"
"""The table behind the view, its owner's alone."""

STAT_ACTIVITY: Final = "pg_background_stat_activity"
"""The view that replaces pg_stat_activity in definitions; the proxy leaves it as it is."""


def type_name(type: Type, api: int) -> str:
    """A composite type's name in the extension's schema."""
    return RENAMED[type][api - 1] if type in RENAMED else type.name


def functions(namespace: str) -> str:
    """FROM and WHERE of the extension's functions, as ``p``.

    Args:
        namespace: an SQL expression, the OID of the extension's schema.
    """
    return (
        f"FROM pg_catalog.pg_proc p WHERE p.pronamespace OPERATOR(pg_catalog.=) {namespace}"
        f" AND ({IS_HELPER} OR pg_catalog.strpos(p.prosrc, '{TAG}') OPERATOR(pg_catalog.>) 0)"
    )


def types(namespace: str) -> str:
    """FROM and WHERE of its composite types' rows in pg_class, as ``c``."""
    names = dict.fromkeys(type_name(type, api) for type in COMPOSITE for api in (1, 2))
    return _relations(namespace, names, "c")


def views(namespace: str) -> str:
    """FROM and WHERE of its views' rows in pg_class, as ``c``."""
    return _relations(namespace, (*VIEWS, STAT_ACTIVITY, HISTORY), "v")


def tables(namespace: str) -> str:
    """FROM and WHERE of its table, which older versions of the proxy have not made."""
    return _relations(namespace, (HISTORY_TABLE,), "r")


def _relations(namespace: str, names: Iterable[str], kind: str) -> str:
    return (
        f"FROM pg_catalog.pg_class c WHERE c.relnamespace OPERATOR(pg_catalog.=) {namespace}"
        f" AND c.relkind OPERATOR(pg_catalog.=) '{kind}' AND c.relname OPERATOR(pg_catalog.=)"
        f" ANY (CAST('{{{','.join(names)}}}' AS pg_catalog.name[]))"
    )
