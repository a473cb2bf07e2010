"""Whether a database has the extension that CREATE EXTENSION made through the proxy, and which
objects belong to it.

Invariant: the server is asked, each time; nothing but its catalogs says so. One function, the
`MARKER`, says that the extension is here: its schema is the extension's, its body has the version,
its comment is the extension's. So it goes with transactions, dumps and SET SCHEMA as all objects
do.

These pieces of SQL trust nothing of the session: all names and operators are qualified.
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
)
from proxy.extension.texts import sql
from proxy.sql.text import EXECUTOR_ROLE

NAME: Final = "pg_background"
IS_NAMED: Final = (
    f"(a.application_name OPERATOR(pg_catalog.=) '{NAME}' OR"
    f" pg_catalog.left(a.application_name, {len(NAME) + 1}) OPERATOR(pg_catalog.=) '{NAME}:')"
)
"""Whether a row ``a`` of pg_stat_activity has the name of a job."""
MARKER: Final = "_pg_background_version"
"""The function that says that the extension is here."""
TAG: Final = "-- pg-background-proxy"
"""Stands in the body of every function of the extension."""
HELPER: Final = "_pg_background_"
"""How the names of the functions begin that are for the others only."""

IS_HELPER: Final = (
    f"(pg_catalog.left(CAST(p.proname AS pg_catalog.text), {len(HELPER)})"
    f" OPERATOR(pg_catalog.=) '{HELPER}')"
)
"""Whether ``p`` is such a function. PUBLIC may execute them: they grant nothing, and each role that
may call a function of the API needs them."""

VERSIONS: Final = (*(f"1.{minor}" for minor in range(11)), "2.0")
"""In order. All have all functions; those of 2.0 are of the second version of the API."""

VERSION: Final = "pg_catalog.\"substring\"(p.prosrc, '[0-9.]+')"
"""The extension's version, where ``p`` is the marker."""


def is_trusted(owner: str) -> str:
    """Whether what a role owns may pass for the extension in this session: a superuser's, the
    database owner's, or the session's own. No other role can make others believe in one.

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
    """Whether no open transaction has dropped or replaced a catalog's row."""
    return (
        f"({row}.xmax OPERATOR(pg_catalog.=) 0 OR NOT EXISTS(SELECT 1 FROM pg_catalog.pg_locks k"
        f" WHERE k.transactionid OPERATOR(pg_catalog.=) {row}.xmax AND k.granted))"
    )


def speaks(function: str, schema: str) -> str:
    """Whether a function without arguments is one of the extension's, as all others see it.

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
"""Whether the server has the C extension in this database."""


def api_version(version: str) -> int:
    """Which version of the API a version of the extension has, 1 or 2."""
    return 1 if version.startswith("1.") else 2


# --- as a call finds it ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Installed:
    """The extension, as the session sees it that makes a call.

    Attributes:
        version: one of CREATE EXTENSION's.
        marker: the OID of its marker.
        schema: its name, in the client's encoding.
        in_search_path: whether an unqualified name finds what is in there.
        usable: whether the current role may use the schema.
        allowed: what the current role may call, of what was asked about.
    """

    version: str
    marker: bytes
    schema: bytes
    in_search_path: bool
    usable: bool
    allowed: frozenset[str]

    @property
    def api(self) -> int:
        """The version of its API."""
        return api_version(self.version)

    def allows(self, function: Function) -> bool:
        """Whether the current role may call it, or select from the view that it is."""
        return _key(function) in self.allowed

    def finds(self, schema: bytes | None) -> bool:
        """Whether a name with this schema, or with none, finds what is in the extension's."""
        return self.in_search_path if schema is None else schema == self.schema

    def check(self, function: Function, schema: bytes | None) -> None:
        """Raises SQLError if the current role does not find the function, or may not call it.

        Args:
            function: what is called, or selected from.
            schema: what the call says, if anything.
        """
        is_view = _is_view(function)
        own = self.schema.decode("utf-8", "replace")
        if not self.finds(schema):
            types = ", ".join(parameter.type.name for parameter in function.parameters)
            raise SQLError(
                UNDEFINED_TABLE if is_view else UNDEFINED_FUNCTION,
                f'relation "{function.name}" does not exist'
                if is_view
                else f"function {function.name}({types}) does not exist",
                hint=f'The extension {NAME} is in the schema "{own}".',
            )
        if not self.usable:
            raise SQLError(INSUFFICIENT_PRIVILEGE, f"permission denied for schema {own}")
        if not self.allows(function):
            kind = "view" if is_view else "function"
            raise SQLError(INSUFFICIENT_PRIVILEGE, f"permission denied for {kind} {function.name}")


def _is_view(function: Function) -> bool:
    return VIEWS.get(function.name) is function


def _key(function: Function) -> str:
    return f"{function.name}/{'view' if _is_view(function) else len(function.parameters)}"


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
    """A subquery: the text that `parse_installed` reads, NULL if the extension is not there.

    Args:
        functions: which of the current role's privileges to look up; views too.
    """
    names: dict[bool, dict[str, None]] = {}
    for function in functions:
        names.setdefault(_is_view(function), {})[function.name] = None
    allowed = (
        _ALLOWED[are_views].replace("@{names}", ",".join(named))
        for are_views, named in names.items()
    )
    return _INSTALLED.replace("@{allowed}", " UNION ALL ".join(allowed))


def parse_installed(values: Sequence[bytes | None]) -> Installed:
    """From the elements of the array that `installed_query` gives."""
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
    """A subquery: whether a role may execute one of the extension's functions; NULL without it.

    Args:
        name: an SQL expression, the name of the function.
        parameters: how many it has, the same.
        role: the OID of the role, the same.
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
"""The types that the extension has beside its views'."""

# With version 1 the plain name is that of the columns of version 1.
RENAMED: Final = {
    STATS_1: (STATS_2.name, STATS_1.name),
    STATS_2: (f"{STATS_2.name}_2", STATS_2.name),
    RESULT_INFO_1: (RESULT_INFO_2.name, RESULT_INFO_1.name),
    RESULT_INFO_2: (f"{RESULT_INFO_2.name}_2", RESULT_INFO_2.name),
    ERROR_INFO_1: (ERROR_INFO_2.name, ERROR_INFO_1.name),
    ERROR_INFO_2: (f"{ERROR_INFO_2.name}_2", ERROR_INFO_2.name),
}
"""Types whose names in the two versions of the API differ."""

HISTORY: Final = "pg_background_history"
"""The view that shows what became of jobs."""

HISTORY_TABLE: Final = "_pg_background_history"
"""The table behind it, its owner's alone."""

STAT_ACTIVITY: Final = "pg_background_stat_activity"
"""A view that is the server's alone: pg_stat_activity for definitions, which the proxy leaves as
they are."""


def type_name(type: Type, api: int) -> str:
    """The name of a composite type in the extension's schema."""
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
    """The same for its table, which is there only if this version of the proxy has made it."""
    return _relations(namespace, (HISTORY_TABLE,), "r")


def _relations(namespace: str, names: Iterable[str], kind: str) -> str:
    return (
        f"FROM pg_catalog.pg_class c WHERE c.relnamespace OPERATOR(pg_catalog.=) {namespace}"
        f" AND c.relkind OPERATOR(pg_catalog.=) '{kind}' AND c.relname OPERATOR(pg_catalog.=)"
        f" ANY (CAST('{{{','.join(names)}}}' AS pg_catalog.name[]))"
    )
