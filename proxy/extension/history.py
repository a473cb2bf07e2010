"""The job history in CREATE EXTENSION: the table `pg_background_history` and its helpers.

Invariant: only its owner has rights on the table. Roles read their own rows through a view with a
security barrier. The proxy writes by one SECURITY DEFINER function, which takes the role of a row
from the server, never from an argument.
"""

from __future__ import annotations

from typing import Final

from proxy.api.functions import DECLARED, Needs
from proxy.extension.installed import FIND, HISTORY, HISTORY_TABLE
from proxy.extension.texts import sql
from proxy.jobs.history import FIELDS, MAX_ROWS_PER_WRITE
from proxy.sql.text import EXECUTOR_ROLE

MAX_ROWS_OF_ROLE: Final = 10_000
"""Rows kept for one role; beyond that its oldest are deleted."""

_LAUNCHING: Final = ",".join(
    dict.fromkeys(function.name for function in DECLARED if Needs.SETTINGS in function.needs)
)
"""The functions that launch. Whoever may call one of them may write."""

COMMENT: Final = "'What became of the jobs of the current role, and of roles whose rights it has.'"

FIND_HISTORY: Final = sql("find_history", find=FIND, view=HISTORY).encode()
"""A query for the quoted schema of the history; no row if there is none."""


def table(schema: str) -> str:
    """The commands that create the table in a quoted schema."""
    return sql("history_table", schema=schema, table=HISTORY_TABLE).rstrip("\n")


def view(schema: str) -> str:
    query = sql("history_view", schema=schema, table=HISTORY_TABLE).rstrip("\n")
    return f"CREATE OR REPLACE VIEW {schema}.{HISTORY} WITH (security_barrier = true) AS\n{query}"


def record(schema: str) -> str:
    """CREATE FUNCTION for the writing function."""
    may_execute = sql("may_execute", role="caller_id", executor=EXECUTOR_ROLE)
    return sql(
        "record",
        schema=schema,
        table=HISTORY_TABLE,
        launching=_LAUNCHING,
        may_execute=may_execute,
        most_at_once=str(MAX_ROWS_PER_WRITE),
        fields=str(FIELDS),
        most_of_role=str(MAX_ROWS_OF_ROLE),
    ).rstrip("\n")
