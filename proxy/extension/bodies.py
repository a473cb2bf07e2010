"""The bodies of the SQL functions behind calls from inside the database.

Invariant: a body trusts nothing of the session that runs it. If it runs with the session's own
search_path, all names and operators are schema-qualified; otherwise it sets its own. `conversation`
specifies the messages between a body and the proxy.

A role that was granted one function must be able to run its body, so PUBLIC may execute the
helpers. That grants nothing: the proxy believes only `_pg_background_say`, which reports the
current role, and asks the server whether that role may execute the function in question.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

from proxy.api.functions import (
    BOOL,
    FLOAT8,
    INT4,
    INT8,
    LIST,
    OID,
    RECORD,
    TEXT,
    TIMESTAMPTZ,
    VOID,
    Function,
    Needs,
)
from proxy.config.gucs import GUCS
from proxy.extension.conversation import NAMES
from proxy.extension.questions import identity
from proxy.extension.texts import sql

_TYPES: Final = {
    BOOL: "bool",
    INT4: "int4",
    INT8: "int8",
    FLOAT8: "float8",
    TEXT: "text",
    OID: "oid",
    TIMESTAMPTZ: "timestamptz",
}
"""By short names, which can be schema-qualified."""


_HELPERS: Final = (
    *("setting", "settings", "elements", "say", "xor", "seen", "ask", "answer"),
    *("queries", "retry"),
)
"""Files of `sql/` with functions that the bodies call."""

_SHAPES: Final = {RECORD: "rows", LIST: "list", VOID: "void"}
"""Files of `sql/` with the bodies of functions that return this; `_shape` has the others."""


@dataclass(frozen=True, slots=True)
class Body:
    """What follows the result type in CREATE FUNCTION, except STRICT and quoting.

    ``source`` may hold any quote, but no ``$body$``. All functions are VOLATILE, SECURITY INVOKER
    and, from 9.6 on, PARALLEL UNSAFE (the defaults).
    """

    language: str
    source: str


def body(function: Function, *, schema: str, server_version: int) -> Body:
    """The body of a function.

    A function whose result is a record or a `LIST` must be declared RETURNS SETOF record.
    `privileges` has the bodies of its functions.

    Args:
        function: one of the table.
        schema: of the extension, not quoted.
        server_version: as server_version_num, e.g. 150004.
    """
    own = quoted(schema)
    if function.name in ("pg_background_progress", "pg_background_report_progress"):
        return Body("plpgsql", "\n" + sql("progress", schema=own))
    arguments = ", ".join(
        parameter.name if parameter.type == TEXT else f"CAST({parameter.name} AS pg_catalog.text)"
        for parameter in function.parameters
    )
    settings = "CAST(NULL AS pg_catalog.text[])"
    if Needs.SETTINGS in function.needs:
        settings = f"{own}._pg_background_settings()"
    call = (
        f"{own}._pg_background_answer({own}._pg_background_ask("
        f"CAST('{identity(function)}' AS pg_catalog.text),"
        f" CAST(ARRAY[{arguments}] AS pg_catalog.text[])), {settings})"
    )
    source = sql(
        _shape(function),
        schema=own,
        call=call,
        fields=_columns(function, "answer[{}]", first=2),
        columns=_columns(function, "rows[i][{}]"),
        but_one=_columns(function, "rows[i][{}]", last=-1),
    )
    return Body("plpgsql", "\n" + source)


def _shape(function: Function) -> str:
    """The file with the body of such functions."""
    result = function.result_type
    if result in _SHAPES:
        return _SHAPES[result]
    if function.returns_set:
        return "table"
    return "composite" if result.columns else "scalar"


def _columns(function: Function, value: str, *, first: int = 1, last: int | None = None) -> str:
    """A select list that makes a composite result from texts."""
    return ", ".join(
        f"CAST({value.format(number)} AS pg_catalog.{_TYPES[column.type]})"
        for number, column in enumerate(function.columns[:last], first)
    )


def helpers(*, schema: str, server_version: int) -> list[str]:
    """The CREATE FUNCTION statements of the functions that the bodies call.

    PUBLIC keeps EXECUTE on them. Their names begin with ``_pg_background_``. Bodies are not checked
    on creation, so these may be created later.
    """
    own = quoted(schema)
    words = NAMES | {
        "schema": own,
        "own": ", ".join(f"{own}._pg_background_setting(CAST('{name}' AS text))" for name in GUCS),
        "settings": str(len(GUCS)),
        "random": (
            "replace(CAST(gen_random_uuid() AS text), '-', '')"
            if server_version >= 130000
            else "md5(concat(secret, clock_timestamp(), random()))"
        ),
        "hash_of_question": _hash("secret || nonce", server_version),
        "lock_of_word": f"CAST(CAST('x' || left({_hash('word', server_version)}, 16) AS bit(64))"
        " AS int8)",
        "proof": _hash("word || message", server_version),
        "proof_of_settings": _hash("word || shown", server_version),
        "block": _hash("key || n", server_version),
        "fields": _raise_error(),
    }
    return ["\n" + sql(name, **words).rstrip("\n") for name in _HELPERS]


def _hash(text: str, server_version: int) -> str:
    """The hash that `conversation` uses."""
    if server_version >= 110000:
        return f"encode(sha256(convert_to({text}, 'UTF8')), 'hex')"
    return f"(md5({text} || 'a') || md5({text} || 'b'))"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _raise_error() -> str:
    """RAISE for an error's fields: a statement for each combination, as no option may be NULL."""
    objects = ("SCHEMA", "TABLE", "COLUMN", "DATATYPE", "CONSTRAINT")
    branches: list[str] = []
    for detail, hint, about in itertools.product((True, False), repeat=3):
        conditions: list[str] = []
        options = ["ERRCODE = answer[2]", "MESSAGE = answer[3]"]
        for given, place, name in ((detail, 4, "DETAIL"), (hint, 5, "HINT")):
            conditions.append(f"answer[{place}] IS {'NOT ' if given else ''}NULL")
            if given:
                options.append(f"{name} = answer[{place}]")
        if about:
            conditions.append("array_to_string(answer[6:10], '') <> ''")
            options += [
                f"{name} = coalesce(answer[{place}], '')" for place, name in enumerate(objects, 6)
            ]
        branches.append(
            f"IF {' AND '.join(conditions)} THEN\n"
            f"      RAISE EXCEPTION USING {', '.join(options)};\n"
        )
    return "    " + "    ELS".join(branches) + "    END IF;"
