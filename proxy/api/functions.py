"""The pg_background functions, each declared once.

Invariant: a function's parameters, result and coroutine are declared only here. The calls that the
proxy serves, the SQL objects for calls from inside the database, and the reference in
docs/functions.md are all made from this table. Elsewhere are the names of functions with special
treatment (`progress`, `privileges`, `bodies`), and the views' SQL (`objects`).

The extension has had three generations. Version 1 identifies a job by pid. Versions 1.6 to 1.10
added functions that end in _v2 and take a cookie too; 2.0 gave these the plain names. All are
served at once. A declaration with two names, such as `cancel`, is pg_background_cancel_v2 and
pg_background_cancel; where 2.0 returns more columns, the plain name does.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from protocol.values import oids
from proxy.api import calls, launches, run_calls
from proxy.jobs.registry import NO_PID


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a composite type."""

    name: str
    type: Type


@dataclass(frozen=True, slots=True)
class Type:
    """A PostgreSQL type.

    ``name`` is as printed by format_type(), ``oid`` as in pg_type, ``size`` is pg_type.typlen: in
    bytes, or -1. Values of a type with ``columns`` are sent as records if the server lacks it.
    """

    name: str
    oid: int
    size: int
    columns: tuple[Column, ...] = ()


BOOL: Final = Type("boolean", oids.BOOL, 1)
INT8: Final = Type("bigint", oids.INT8, 8)
INT4: Final = Type("integer", oids.INT4, 4)
TEXT: Final = Type("text", oids.TEXT, -1)
OID: Final = Type("oid", oids.OID, 4)
FLOAT8: Final = Type("double precision", oids.FLOAT8, 8)
TIMESTAMPTZ: Final = Type("timestamp with time zone", oids.TIMESTAMPTZ, 8)
RECORD: Final = Type("record", oids.RECORD, -1)
VOID: Final = Type("void", oids.VOID, 4)
JSONB: Final = Type("jsonb", oids.JSONB, -1)


def _composite(name: str, *columns: Mapping[str, Type]) -> Type:
    return Type(
        name,
        RECORD.oid,
        RECORD.size,
        tuple(Column(*column) for part in columns for column in part.items()),
    )


HANDLE: Final = _composite("pg_background_handle", {"pid": INT4, "cookie": INT8})
HANDLES: Final = Type("pg_background_handle[]", 2287, -1)
"""An array of handles; the OID is that of record[]."""
PROGRESS: Final = _composite("pg_background_progress", {"progress_pct": INT4, "progress_msg": TEXT})
RESULT_INFO_1: Final = _composite(
    "pg_background_result_info_v2",
    {"row_count": INT8, "command_tag": TEXT, "completed": BOOL, "has_error": BOOL},
)
RESULT_INFO_2: Final = _composite(
    "pg_background_result_info",
    {column.name: column.type for column in RESULT_INFO_1.columns},
    {"started_at": TIMESTAMPTZ, "finished_at": TIMESTAMPTZ},
)
ERROR_INFO_1: Final = _composite(
    "pg_background_error_info_v2",
    dict.fromkeys(("sqlstate", "message", "detail", "hint", "context"), TEXT),
)
ERROR_INFO_2: Final = _composite(
    "pg_background_error_info",
    {column.name: column.type for column in ERROR_INFO_1.columns},
    dict.fromkeys(("schema_name", "table_name", "column_name", "constraint_name"), TEXT),
)
OUTCOME: Final = _composite(
    "pg_background_outcome",
    {"pid": INT4, "cookie": INT8, "state": TEXT, "consumed": BOOL, "completed": BOOL},
    {"has_error": BOOL, "row_count": INT8, "command_tag": TEXT, "sqlstate": TEXT},
    {"error_message": TEXT, "label": TEXT, "launched_at": TIMESTAMPTZ},
)
RUN: Final = _composite(
    "pg_background_run",
    {column.name: column.type for column in OUTCOME.columns},
    {"timed_out": BOOL, "elapsed_ms": INT8},
)
RUN_WITH_RETRIES: Final = _composite(
    "pg_background_run_retries",
    {column.name: column.type for column in RUN.columns},
    {"attempts": INT4},
)
_COUNTS: Final = ("workers_launched", "workers_completed", "workers_failed", "workers_canceled")
_REST_OF_STATS: Final = {"workers_active": INT4, "avg_execution_ms": FLOAT8, "max_workers": INT4}
STATS_1: Final = _composite("pg_background_stats_v2", dict.fromkeys(_COUNTS, INT8), _REST_OF_STATS)
STATS_2: Final = _composite(
    "pg_background_stats", dict.fromkeys((*_COUNTS, "workers_timed_out"), INT8), _REST_OF_STATS
)
LIST: Final = _composite(
    "pg_background_list",
    {"pid": INT4, "cookie": INT8, "launched_at": TIMESTAMPTZ, "user_id": OID, "queue_size": INT4},
    {"state": TEXT, "sql_preview": TEXT, "last_error": TEXT, "consumed": BOOL, "label": TEXT},
)
ACTIVITY: Final = _composite(
    "pg_background_activity",
    {"pid": INT4, "cookie": INT8, "launched_at": TIMESTAMPTZ, "user_id": OID, "queue_size": INT4},
    {"pgbg_state": TEXT, "sql_preview": TEXT, "last_error": TEXT, "consumed": BOOL, "label": TEXT},
    {"backend_state": TEXT, "wait_event_type": TEXT, "wait_event": TEXT},
    {"xact_start": TIMESTAMPTZ, "query_start": TIMESTAMPTZ, "backend_start": TIMESTAMPTZ},
    {"query": TEXT},
)


class _Required(enum.Enum):
    REQUIRED = "REQUIRED"


REQUIRED: Final = _Required.REQUIRED


@dataclass(frozen=True, slots=True)
class Parameter:
    """An input parameter. ``aliases`` are other names for it in named notation. ``null`` is what a
    strict function gets for a NULL; None if it is then not called."""

    name: str
    type: Type
    default: str | int | bool | Literal[_Required.REQUIRED] | None = REQUIRED
    aliases: tuple[str, ...] = ()
    null: int | None = None

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is REQUIRED

    def is_called(self, name: str) -> bool:
        """Whether ``name`` denotes it in named notation."""
        return name == self.name or name in self.aliases


class Needs(enum.Flag):
    """What a call needs of the session besides its arguments."""

    NOTHING = 0
    SETTINGS = enum.auto()
    """The session's settings, for a job that it launches."""
    TIME = enum.auto()
    """It may wait for a job, until a cancel request or statement_timeout."""
    PRIMARY = enum.auto()
    """The primary backend, so the rows of the statement are read first. Without the extension no
    privilege is checked but by the statements that it gets: see `calls.activity`."""
    COMMIT = enum.auto()
    """The end of its transaction, in which it must take part; rows are read first, too."""


@dataclass(frozen=True, slots=True)
class Function:
    """One overload of a function.

    ``strict``: with a NULL argument it is not called, and returns NULL or no rows, except as in
    `Parameter.null`.
    ``run``: its coroutine, called with the caller and the given arguments by name. For a function
    that returns records it returns the job whose rows these are.
    ``api``: the only ``api_version`` that has it; 0: both have it.
    ``summary``: a line of Markdown for the reference.
    """

    name: str
    parameters: tuple[Parameter, ...]
    result_type: Type
    returns_set: bool
    strict: bool
    run: Callable[..., Awaitable[Any]]
    needs: Needs
    api: int
    summary: str

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of its composite type; empty if the caller or the job determines them."""
        return self.result_type.columns

    @property
    def is_never_called_with_null(self) -> bool:
        """Whether it is strict without exception, as the server understands it."""
        return self.strict and all(parameter.null is None for parameter in self.parameters)


_SQL: Final = Parameter("sql", TEXT)
_QUEUE_SIZE: Final = Parameter("queue_size", INT4, default=0)
_PID: Final = Parameter("pid", INT4)
_COOKIE: Final = Parameter("cookie", INT8)
_HANDLE: Final = (Parameter("pid", INT4, null=NO_PID), _COOKIE)
_HANDLES: Final = Parameter("handles", HANDLES)
_GRACE: Final = Parameter("grace_ms", INT4, default=0)
_TIMEOUT: Final = Parameter("timeout_ms", INT4, default=0)
_LABELLED: Final = (_SQL, Parameter("queue_size", INT4), Parameter("label", TEXT))
_RETRIES: Final = Parameter("retries", INT4)
_NO_LABEL: Final = Parameter("label", TEXT, default=None)
_RUN: Final = (_SQL, _QUEUE_SIZE, _TIMEOUT, _NO_LABEL)

_functions: list[Function] = []


def _declare(
    names: str,
    parameters: tuple[Parameter, ...],
    result: Type,
    run: Callable[..., Awaitable[Any]],
    *,
    returns_set: bool = False,
    strict: bool = True,
    needs: Needs = Needs.NOTHING,
    api: int = 0,
) -> Callable[[str], None]:
    """Declares a function; to be called with its summary, which adds it under each of its names."""

    def add(summary: str) -> None:
        for name in names.split():
            full = name if "pg_background" in name else f"pg_background_{name}"
            _functions.append(
                Function(full, parameters, result, returns_set, strict, run, needs, api, summary)
            )

    return add


# Version 1

_LAUNCHES: Final = Needs.SETTINGS
_AT_COMMIT: Final = Needs.SETTINGS | Needs.COMMIT

_declare("launch", (_SQL, _QUEUE_SIZE), INT4, launches.launch, needs=_LAUNCHES, api=1)(
    "Starts a job that runs `sql` in a backend of its own; returns that backend's pid."
)
_declare("result", (_PID,), RECORD, calls.result, returns_set=True, needs=Needs.TIME)(
    "Waits for the job and returns its rows; once for each job."
)
_declare("detach", (_PID,), VOID, calls.detach)("Forgets the job, which runs on to its end.")

for _names, _run, _summary in (
    (
        "grant_pg_background_privileges grant_privileges",
        calls.grant,
        "Lets a role call the functions; false, with a notice, if it fails.",
    ),
    (
        "revoke_pg_background_privileges revoke_privileges",
        calls.revoke,
        "Revokes that from a role; false, with a notice, if it fails.",
    ),
):
    _declare(
        _names,
        (
            Parameter("role_name", TEXT, aliases=("user_name",)),
            Parameter("print_commands", BOOL, default=False),
        ),
        BOOL,
        _run,
        strict=False,
        needs=Needs.PRIMARY,
    )(_summary)

# Versions 1.6 to 2.0

_declare("launch_v2", (_SQL, _QUEUE_SIZE), HANDLE, launches.launch_v2, needs=_LAUNCHES)(
    "Starts a job; returns its pid and the cookie that goes with it."
)
_declare("launch", (_SQL, _QUEUE_SIZE), HANDLE, launches.launch_v2, needs=_LAUNCHES, api=2)(
    "With `api_version = 2`: as `pg_background_launch_v2`."
)
_declare("launch_v2 launch", _LABELLED, HANDLE, launches.launch_v2, strict=False, needs=_LAUNCHES)(
    "The same with a label, which shows in `application_name`; size and label may be NULL."
)
_declare("submit_v2 submit", (_SQL, _QUEUE_SIZE), HANDLE, launches.submit, needs=_LAUNCHES)(
    "Starts a job whose rows nobody needs: they are discarded as they arrive."
)
_declare("submit_v2 submit", _LABELLED, HANDLE, launches.submit, strict=False, needs=_LAUNCHES)(
    "The same with a label."
)
_declare(
    "submit_v2 submit",
    (*_LABELLED, _RETRIES),
    HANDLE,
    launches.submit,
    strict=False,
    needs=_LAUNCHES,
)("The same, with up to `retries` further attempts if it fails by chance.")
_declare(
    "launch_at_commit",
    (_SQL, _QUEUE_SIZE, _NO_LABEL),
    HANDLE,
    launches.launch_at_commit,
    strict=False,
    needs=_AT_COMMIT,
)(
    "Starts a job when the calling transaction commits, and never if it, or the savepoint, is"
    " rolled back. The handle has no pid; its cookie is enough for all functions."
)
_declare(
    "submit_at_commit",
    (_SQL, _QUEUE_SIZE, _NO_LABEL),
    HANDLE,
    launches.submit_at_commit,
    strict=False,
    needs=_AT_COMMIT,
)("The same for a job whose rows nobody needs.")
_declare("result_v2 result", _HANDLE, RECORD, calls.result, returns_set=True, needs=Needs.TIME)(
    "Waits for the job and returns its rows; once for each job."
)
_declare("detach_v2 detach", _HANDLE, VOID, calls.detach)(
    "Forgets the job, which runs on to its end."
)
_declare("cancel_v2 cancel", (*_HANDLE, _GRACE), VOID, calls.cancel, needs=Needs.TIME)(
    "Stops the job: nothing more of it runs or commits. Waits up to `grace_ms` for that."
)
_declare(
    "cancel_v2_grace", (*_HANDLE, Parameter("grace_ms", INT4)), VOID, calls.cancel, needs=Needs.TIME
)("As `pg_background_cancel_v2`.")
_declare("wait_v2", _HANDLE, VOID, calls.wait_void, needs=Needs.TIME, api=1)(
    "Waits for the job to end."
)
_declare("wait_v2", _HANDLE, BOOL, calls.wait, needs=Needs.TIME, api=2)(
    "Waits for the job to end; true."
)
_declare("wait", (*_HANDLE, _TIMEOUT), BOOL, calls.wait, needs=Needs.TIME)(
    "Waits for the job, at most `timeout_ms` (0 or less: for ever); returns whether it has ended."
)
_declare(
    "wait_v2_timeout",
    (*_HANDLE, Parameter("timeout_ms", INT4)),
    BOOL,
    calls.wait_timeout,
    needs=Needs.TIME,
)("The same, but 0 asks without waiting.")
_declare("list_v2 list", (), LIST, calls.list_jobs, returns_set=True)(
    "The session's jobs. With a column definition list of nine columns, the label is left out."
)
_declare("list_all", (), LIST, calls.list_all, returns_set=True)(
    "The jobs of the current role in all sessions; for superusers, everyone's."
)
_declare("stats_v2", (), STATS_1, calls.stats)(
    "Counts of this session's jobs, and their mean duration."
)
_declare("stats", (), STATS_2, calls.stats_2)("The same, and how many timed out.")
_declare("get_progress_v2 get_progress", _HANDLE, PROGRESS, calls.get_progress)(
    "The progress that the job last reported with `pg_background_progress`; NULLs before that."
)
_declare("result_info_v2", _HANDLE, RESULT_INFO_1, calls.result_info)(
    "How the job has gone so far; its rows are not fetched."
)
_declare("result_info", _HANDLE, RESULT_INFO_2, calls.result_info)("The same, and when it ran.")
_declare("error_info_v2", _HANDLE, ERROR_INFO_1, calls.error_info)(
    "The job's error; NULL if there is none."
)
_declare("error_info", _HANDLE, ERROR_INFO_2, calls.error_info)(
    "The same, and which object the error is about."
)
_declare("outcome_v2 outcome", _HANDLE, OUTCOME, calls.outcome)(
    "Everything that is known about a job, in one row. It raises no error: an unknown"
    " job has a NULL state."
)
_status = functools.partial(calls.status, names=[column.name for column in OUTCOME.columns])
_declare("status_v2", _HANDLE, JSONB, _status)("The same as JSON.")
_declare("run_v2 run", _RUN, RUN, run_calls.run, strict=False, needs=Needs.SETTINGS | Needs.TIME)(
    "Starts a job, waits for its end or cancels it on timeout, and returns its outcome."
)
_declare(
    "run_v2 run",
    (
        *(_SQL, Parameter("queue_size", INT4), Parameter("timeout_ms", INT4)),
        *(Parameter("label", TEXT), _RETRIES),
    ),
    RUN_WITH_RETRIES,
    run_calls.run_with_retries,
    strict=False,
    needs=Needs.SETTINGS | Needs.TIME,
)("The same, with up to `retries` further attempts if it fails by chance.")
_declare(
    "run_query_v2 run_query",
    (*_RUN, Parameter("col_def", TEXT, default=None)),
    RECORD,
    run_calls.run_query,
    returns_set=True,
    strict=False,
    needs=Needs.SETTINGS | Needs.TIME,
)("Starts a job, and returns its rows; 57014 on timeout.")
_declare(
    "drain_v2 drain", (_HANDLES, _TIMEOUT), OUTCOME, calls.drain, returns_set=True, needs=Needs.TIME
)(
    "Waits for all of them, at most `timeout_ms` in total; returns their outcomes in"
    " order, and detaches them."
)
_declare("wait_any_v2 wait_any", (_HANDLES, _TIMEOUT), HANDLE, calls.wait_any, needs=Needs.TIME)(
    "Returns the first of them to end; NULL on timeout."
)
_declare(
    "cancel_by_label_v2 cancel_by_label",
    (Parameter("pattern", TEXT), _GRACE),
    INT4,
    calls.cancel_by_label,
    needs=Needs.TIME,
)("Cancels the jobs whose label is LIKE the pattern; returns how many.")
_declare("cancel_all_v2 cancel_all", (), INT4, calls.cancel_all)(
    "Cancels all jobs; returns how many."
)
_declare("detach_all_v2 detach_all", (), INT4, calls.detach_all)(
    "Detaches all jobs; returns how many."
)
_declare("purge_v2 purge", (), INT4, calls.purge)(
    "Detaches the jobs that have ended; returns how many."
)
_declare("full_sql_v2 full_sql", _HANDLE, TEXT, calls.full_sql)(
    "The job's SQL; `[...]` stands for what exceeds 64 KiB."
)
_declare(
    "progress report_progress",
    (Parameter("pct", INT4), Parameter("msg", TEXT, default=None)),
    VOID,
    calls.progress,
    strict=False,
)("In a job: reports its progress, 0 to 100; visible at once.")
_declare("drop_executor_role", (), BOOL, calls.drop_executor_role, needs=Needs.PRIMARY)(
    "Drops the role `pgbackground_role`."
)

DECLARED: Final = tuple(_functions)
"""All functions under all names, in the order of the reference."""


def catalog(api_version: int) -> dict[str, tuple[Function, ...]]:
    """The overloads of each name in a version of the API, 1 or 2."""
    served = [function for function in DECLARED if function.api in (0, api_version)]
    return {
        name: tuple(function for function in served if function.name == name)
        for name in dict.fromkeys(function.name for function in served)
    }


CATALOGS: Final = {version: catalog(version) for version in (1, 2)}
"""The overloads of each name, by version of the API."""

FUNCTIONS: Final = CATALOGS[1]
"""The overloads of each name in API 1."""

VIEWS: Final[dict[str, Function]] = {
    name: Function(name, (), type, True, True, run, needs, 0, summary)
    for name, type, run, needs, summary in (
        ("pg_background_list", LIST, calls.list_jobs, Needs.NOTHING, "The session's jobs."),
        (
            "pg_background_activity",
            ACTIVITY,
            calls.activity,
            Needs.PRIMARY,
            "The same, with what pg_stat_activity has about them.",
        ),
    )
}
"""The views, each as a function that returns its rows."""


def is_view(function: Function) -> bool:
    """Whether it is one of `VIEWS`; a function of the same name is not."""
    return VIEWS.get(function.name) is function
