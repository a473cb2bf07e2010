"""The SQL objects that CREATE EXTENSION pg_background makes: types, functions, views.

Invariant: the table of functions alone decides what is created; `bodies` and `privileges` have the
functions' bodies. `OWN` stands for the schema in these texts, and must be replaced.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from proxy.api.functions import (
    ACTIVITY,
    BOOL,
    DECLARED,
    FLOAT8,
    HANDLES,
    INT4,
    INT8,
    JSONB,
    LIST,
    OID,
    RECORD,
    TEXT,
    TIMESTAMPTZ,
    VIEWS,
    VOID,
    Function,
    Parameter,
    Type,
)
from proxy.extension import bodies, history, privileges
from proxy.extension.installed import (
    COMPOSITE,
    HISTORY,
    IS_NAMED,
    NAME,
    STAT_ACTIVITY,
    TAG,
    type_name,
)
from proxy.extension.texts import sql
from proxy.sql.text import EXECUTOR_ROLE, literal

_SCHEMA: Final = "<extschema>"
OWN: Final = f'"{_SCHEMA}"'
"""Stands for the extension's schema."""

_TYPE_NAMES: Final = {
    BOOL: "pg_catalog.bool",
    INT8: "pg_catalog.int8",
    INT4: "pg_catalog.int4",
    TEXT: "pg_catalog.text",
    OID: "pg_catalog.oid",
    FLOAT8: "pg_catalog.float8",
    TIMESTAMPTZ: "pg_catalog.timestamptz",
    RECORD: "pg_catalog.record",
    LIST: "pg_catalog.record",  # nine or ten columns, as the caller defines them
    VOID: "pg_catalog.void",
    JSONB: "pg_catalog.jsonb",
    HANDLES: f"{OWN}.pg_background_handle[]",
}
_NAME: Final = Type("name", 19, 64)

# Columns of every version, in fixed order, so that an upgrade can replace the view.
_STAT_ACTIVITY_COLUMNS: Final = (
    *("datid", "datname", "pid", "usesysid", "usename", "application_name", "client_addr"),
    *("client_hostname", "client_port", "backend_start", "xact_start", "query_start"),
    *("state_change", "wait_event_type", "wait_event", "state", "backend_xid", "backend_xmin"),
    "query",
)
_STAT_ACTIVITY: Final = (
    f"SELECT {', '.join(f'a.{name}' for name in _STAT_ACTIVITY_COLUMNS)},"
    " CASE WHEN a.backend_type OPERATOR(pg_catalog.=) 'client backend'"
    f" AND {IS_NAMED} THEN '{NAME}' ELSE a.backend_type END AS backend_type"
    " FROM pg_catalog.pg_stat_activity a"
)
_STAT_ACTIVITY_COMMENT: Final = "'pg_stat_activity, with the backend_type of jobs'"

_SOURCE: Final = re.compile(
    rf"CREATE (?:OR REPLACE )?FUNCTION {OWN}\.(\w+)\(.*?\$body\$(.*?)\$body\$", re.DOTALL
)

RESTORED: Final = f"{OWN}._pg_background_restored"
"""The domain and the aggregate that make the role when a dump is restored: see make_role.sql."""


@functools.cache
def script(api: int, server_version: int) -> str:
    """The commands that create everything but types; or replace it, once the helpers are dropped.

    Args:
        api: the version of the API, 1 or 2.
        server_version: as server_version_num, e.g. 150004.
    """
    functions = list(_functions(api, server_version))
    views = list(_views())
    commands = [
        *bodies.helpers(schema=_SCHEMA, server_version=server_version),
        history.record(OWN),
        sql("make_role", schema=OWN, restored=RESTORED, executor=EXECUTOR_ROLE, tag=TAG),
        *(definition for _, definition, _ in functions),
        *(definition for _, definition, _ in views),
        *(f"COMMENT ON FUNCTION {name} IS {comment}" for name, _, comment in functions),
        *(f"COMMENT ON VIEW {name} IS {comment}" for name, _, comment in views),
        f"GRANT SELECT ON {OWN}.{STAT_ACTIVITY} TO PUBLIC",
    ]
    return "".join(f"{command};\n" for command in commands)


def sources(api: int, server_version: int, schema: str) -> frozenset[tuple[str, str]]:
    """Names and bodies of all functions that the script creates.

    Args:
        api: the version of the API, 1 or 2.
        server_version: as server_version_num, e.g. 150004.
        schema: the extension's, as quote_ident() gives it.
    """
    found = _SOURCE.findall(script(api, server_version))
    return frozenset((name, body.replace(OWN, schema)) for name, body in found)


def types(api: int) -> Iterator[tuple[str, str]]:
    """Each type's name, and its CREATE command."""
    for type in COMPOSITE:
        name = type_name(type, api)
        columns = ", ".join(f"{column.name} {_TYPE_NAMES[column.type]}" for column in type.columns)
        yield name, f"CREATE TYPE {OWN}.{name} AS ({columns})"


def _functions(api: int, server_version: int) -> Iterator[tuple[str, str, str]]:
    """For each function its signature, CREATE FUNCTION, and the comment as a constant."""
    for function in DECLARED:
        if function.api not in (0, api):
            continue
        if function.name in privileges.HELPERS:
            language, source = "plpgsql", privileges.body(function)
        else:
            body = bodies.body(function, schema=_SCHEMA, server_version=server_version)
            language, source = body.language, body.source
        yield _function(function, api, language, source)
        for other in _with_alias(function):
            names = ", ".join(parameter.name for parameter in function.parameters[1:])
            alias = other.parameters[0].name
            call = f"{OWN}.{function.name}(CAST({alias} AS pg_catalog.text), {names})"
            yield _function(other, api, "sql", f"SELECT {call}")


def _with_alias(function: Function) -> Iterator[Function]:
    """The function again for each other name of the first parameter. That has the type name, to
    which nothing is converted where the original fits."""
    for alias in function.parameters[0].aliases if function.parameters else ():
        first = Parameter(alias, _NAME)
        yield replace(function, parameters=(first, *function.parameters[1:]))


def _function(function: Function, api: int, language: str, source: str) -> tuple[str, str, str]:
    parameters = ", ".join(_parameter(parameter) for parameter in function.parameters)
    result = function.result_type
    returned = f"{OWN}.{type_name(result, api)}" if result in COMPOSITE else _type(result)
    strict = " STRICT" if function.is_never_called_with_null else ""
    assert "$body$" not in source, function.name
    definition = (
        f"CREATE OR REPLACE FUNCTION {OWN}.{function.name}({parameters})"
        f" RETURNS {'SETOF ' if function.returns_set else ''}{returned} LANGUAGE {language}"
        f"{strict} AS $body${source}\n{TAG}\n$body$"
    )
    comment = literal(function.summary.replace("`", "").encode()).decode()
    return signature(function), definition, comment


def _parameter(parameter: Parameter) -> str:
    text = f"{parameter.name} {_type(parameter.type)}"
    if parameter.required:
        return text
    return f"{text} DEFAULT {'NULL' if parameter.default is None else parameter.default}"


def signature(function: Function) -> str:
    """Name and parameter types, as for DROP FUNCTION."""
    return f"{OWN}.{function.name}({', '.join(_type(p.type) for p in function.parameters)})"


def _type(type: Type) -> str:
    return "pg_catalog.name" if type == _NAME else _TYPE_NAMES[type]


def _views() -> Iterator[tuple[str, str, str]]:
    """For each view its name, CREATE VIEW, and the comment as a constant."""
    listed = ", ".join(f"{column.name} {_type(column.type)}" for column in LIST.columns)
    source = f"{OWN}.pg_background_list_v2() AS l({listed})"
    ours = [f"l.{column.name}" for column in LIST.columns]
    renamed = zip(ours, ACTIVITY.columns, strict=False)
    theirs = [
        "a.state AS backend_state" if column.name == "backend_state" else f"a.{column.name}"
        for column in ACTIVITY.columns[len(ours) :]
    ]
    selects = {
        "pg_background_list": f"SELECT {', '.join(ours)} FROM {source}",
        "pg_background_activity": "SELECT "
        + ", ".join([*(f"{name} AS {column.name}" for name, column in renamed), *theirs])
        # An ended job's backend may wait for another, or run it already.
        + f" FROM {source} LEFT JOIN pg_catalog.pg_stat_activity a"
        " ON a.pid OPERATOR(pg_catalog.=) l.pid AND l.state OPERATOR(pg_catalog.=) 'running'",
    }
    for name, view in VIEWS.items():
        comment = literal(view.summary.encode()).decode()
        definition = f"CREATE OR REPLACE VIEW {OWN}.{name} AS {selects[name]}"
        yield f"{OWN}.{name}", definition, comment
    name = f"{OWN}.{STAT_ACTIVITY}"
    yield name, f"CREATE OR REPLACE VIEW {name} AS {_STAT_ACTIVITY}", _STAT_ACTIVITY_COMMENT
    yield f"{OWN}.{HISTORY}", history.view(OWN), history.COMMENT
