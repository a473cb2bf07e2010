"""Statements and portals with calls, and what the client is told of their columns.

Invariant: the server describes the stand-in, and the client sees the description of its own
statement. What is between the two is worked out here, from the plan alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from protocol.errors import DATATYPE_MISMATCH, INTERNAL_ERROR, SQLError
from protocol.messages import Field
from protocol.values import oids
from proxy.api.functions import Column, Function, Needs, Type
from proxy.session.fetch import Fetch
from proxy.session.results import Table, choose, fields_of
from proxy.statements.plan import Call, ItemOutput, Plan, ResultPlan, ScalarPlan, Substitute


@dataclass(slots=True)
class PreparedCall:
    """A prepared statement with a call, or a command that a block of ours carries out. `fields` are
    the server's, of the stand-in."""

    plan: Plan | Substitute
    fields: tuple[Field, ...] = ()
    has_parameters: bool = False


@dataclass(slots=True)
class Portal:
    """A portal of such a statement, and its result, once somebody has asked for it."""

    statement: PreparedCall
    formats: tuple[int, ...]
    result: Fetch | Table | None = None

    def close(self) -> None:
        """The rest is not wanted."""
        if self.result is not None:
            self.result.abandon()


def functions_of(plan: Plan) -> list[Function]:
    """What a plan calls."""

    def of(call: Call) -> Iterator[Function]:
        yield call.function
        for argument in call.arguments:
            if isinstance(argument.value, Call):
                yield from of(argument.value)

    calls = [plan.call] if isinstance(plan, ResultPlan) else [c.call for c in plan.columns]
    return [function for call in calls for function in of(call)]


def needs_of(plan: Plan) -> Needs:
    """What all calls of a plan need together."""
    return functools.reduce(operator.or_, (function.needs for function in functions_of(plan)))


def shape_unknown(plan: Plan | Substitute) -> bool:
    """A result whose columns only its job knows."""
    return (
        isinstance(plan, ResultPlan) and not plan.defined_columns and not plan.call.function.columns
    )


def outputs_of(plan: ScalarPlan, count: int) -> Sequence[ItemOutput]:
    """What the client's columns are, of the stand-in's so many."""
    if plan.outputs is not None:
        return plan.outputs
    return [ItemOutput(column, None, b"") for column in range(count)]


def call_types(plan: ScalarPlan, count: int) -> dict[int, Type]:
    """The types of the calls, by their columns in a stand-in of so many."""
    return {column.index % count: column.call.function.result_type for column in plan.columns}


def check_stand_in(plan: Plan, fields: Sequence[Field]) -> None:
    """Raises SQLError XX000 if the server describes a stand-in otherwise than the plan has it: one
    of the two has read something else, and nothing in it is ours to run."""
    count = len(fields)
    if isinstance(plan, ResultPlan):
        calls = [-1]
        width: int | None = 1
        if plan.defined_columns:
            shown = [
                1 if item.column is not None else plan.defined_columns for item in plan.outputs
            ]
            width = sum(shown) + plan.defined_columns + 1
    else:
        calls = [column.index for column in plan.columns]
        width = plan.width
    if width not in (None, count) or not all(
        -count <= call < count and fields[call].type_oid == oids.TEXT for call in calls
    ):
        raise misread()


def misread() -> SQLError:
    """The server has read a statement with a call otherwise than the proxy."""
    return SQLError(
        INTERNAL_ERROR,
        "the server has read a statement with a pg_background call in another way than the proxy",
        detail="No call was made.",
    )


def client_fields(statement: PreparedCall) -> tuple[Field, ...]:
    """The columns of the client's statement, from those of its stand-in."""
    plan = statement.plan
    if isinstance(plan, ResultPlan):
        if plan.defined_columns:
            return statement.fields[: -1 - plan.defined_columns]
        return choose(plan.outputs, fields_of(plan.call.function.columns))[1]
    assert isinstance(plan, ScalarPlan)
    given = statement.fields
    types = {column.index % len(given): column.call.function.result_type for column in plan.columns}
    fields: list[Field] = []
    for output in outputs_of(plan, len(given)):
        field = given[output.column]
        type = types.get(output.column)
        if type is not None:
            if output.field is not None:
                type = type.columns[output.field].type
            field = replace(field, type_oid=type.oid, type_size=type.size, type_modifier=-1)
        fields.append(replace(field, name=output.label or field.name))
    return tuple(fields)


def stand_in_formats(statement: PreparedCall, formats: tuple[int, ...]) -> tuple[int, ...]:
    """The result formats for the stand-in, where the client has said them for each column."""
    plan = statement.plan
    if isinstance(plan, ResultPlan):
        if not plan.defined_columns:
            return ()
        return (*formats, *[0] * (plan.defined_columns + 1)) if len(formats) > 1 else formats
    if isinstance(plan, Substitute) or plan.outputs is None or len(formats) != len(plan.outputs):
        return formats
    if not any(formats):
        return ()  # all of them: their number may not be known yet
    wanted = [0] * len(statement.fields)
    for output, format in zip(plan.outputs, formats, strict=True):
        wanted[output.column] = format
    return tuple(wanted)


def as_defined(columns: Sequence[Column], defined: Sequence[Field]) -> Sequence[Column]:
    """A function's columns under a column definition list, which may leave out the last.

    Raises SQLError 42804 if they do not fit.
    """
    fits = len(columns) - 1 <= len(defined) <= len(columns) and all(
        field.type_oid == column.type.oid for field, column in zip(defined, columns, strict=False)
    )
    if not fits:
        raise SQLError(
            DATATYPE_MISMATCH,
            "function return row and query-specified return row do not match",
        )
    return [
        Column(field.name.decode("utf-8", "replace"), column.type)
        for field, column in zip(defined, columns, strict=False)
    ]


def format_of(formats: Sequence[int], column: int) -> int:
    """The result format of a column (Bind: none means all text, one is for all)."""
    if len(formats) <= 1:
        return formats[0] if formats else 0
    return formats[column]
