"""Statements and portals with calls, and what the client is told of their columns.

Invariant: the server describes the stand-in, and the client sees the description of its own
statement. What is between the two is worked out here, from the plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from protocol.errors import DATATYPE_MISMATCH, INTERNAL_ERROR, SQLError
from protocol.messages import Field
from protocol.values import oids
from proxy.api.functions import Column, Type
from proxy.session.results import Result, choose, fields_of
from proxy.statements.plan import ItemOutput, Plan, ResultPlan, ScalarPlan, Substitute

if TYPE_CHECKING:
    from proxy.jobs.job import Job


@dataclass(slots=True)
class Command:
    """A command that a block of ours carries out, prepared."""

    plan: Substitute

    def stand_in_formats(self, formats: tuple[int, ...]) -> tuple[int, ...]:
        """The result formats for the stand-in, from those of the client's Bind."""
        return formats


@dataclass(slots=True)
class RowCalls:
    """A prepared statement whose stand-in makes calls with each of its rows.

    `fields`: the server's, of the stand-in.
    """

    plan: ScalarPlan
    fields: tuple[Field, ...] = ()

    has_columns = True

    def described(self, fields: tuple[Field, ...]) -> None:
        """Note the server's description. Raises SQLError XX000 if it is not that of the plan."""
        self.fields = fields
        _check(fields, [column.index for column in self.plan.columns], self.plan.width)

    @property
    def outputs(self) -> Sequence[ItemOutput]:
        """The client's columns."""
        if self.plan.outputs is not None:
            return self.plan.outputs
        return [ItemOutput(column) for column in range(len(self.fields))]

    @property
    def types(self) -> dict[int, Type]:
        """The types of the calls, by their columns in the stand-in."""
        count = len(self.fields)
        return {
            column.index % count: column.call.function.result_type for column in self.plan.columns
        }

    def client_fields(self) -> tuple[Field, ...]:
        """The columns of the client's statement."""
        types = self.types
        fields: list[Field] = []
        for output in self.outputs:
            field = self.fields[output.column]
            type = types.get(output.column)
            if type is not None:
                if output.field is not None:
                    type = type.columns[output.field].type
                field = replace(field, type_oid=type.oid, type_size=type.size, type_modifier=-1)
            fields.append(replace(field, name=output.label or field.name))
        return tuple(fields)

    def stand_in_formats(self, formats: tuple[int, ...]) -> tuple[int, ...]:
        """As in `Command`."""
        outputs = self.plan.outputs
        if outputs is None or len(formats) != len(outputs):
            return formats
        if not any(formats):
            return ()  # all of them: their number may not be known yet
        wanted = [0] * len(self.fields)
        for output, format in zip(outputs, formats, strict=True):
            wanted[output.column] = format
        return tuple(wanted)


@dataclass(slots=True)
class FunctionResult:
    """A prepared statement whose rows a function in FROM returns: its own, or a job's.

    `fields`: the server's, of the stand-in.
    """

    plan: ResultPlan
    fields: tuple[Field, ...] = ()

    @property
    def has_columns(self) -> bool:
        """Whether its columns are known before it is executed; otherwise only its job knows."""
        return bool(self.plan.defined_columns or self.plan.call.function.columns)

    def described(self, fields: tuple[Field, ...]) -> None:
        """As in `RowCalls`."""
        self.fields = fields
        width = 1
        if defined := self.plan.defined_columns:
            shown = sum(1 if item.column is not None else defined for item in self.plan.outputs)
            width = shown + defined + 1
        _check(fields, [-1], width)

    @property
    def defined(self) -> tuple[Field, ...]:
        """The column definition list; empty if there is none."""
        return self.fields[-1 - self.plan.defined_columns : -1]

    def client_fields(self) -> tuple[Field, ...]:
        """The columns of the client's statement, if they are known."""
        if self.plan.defined_columns:
            return self.fields[: -1 - self.plan.defined_columns]
        return choose(self.plan.outputs, fields_of(self.plan.call.function.columns))[1]

    def stand_in_formats(self, formats: tuple[int, ...]) -> tuple[int, ...]:
        """As in `Command`."""
        defined = self.plan.defined_columns
        if not defined:
            return ()
        return (*formats, *[0] * (defined + 1)) if len(formats) > 1 else formats


WithCalls = RowCalls | FunctionResult
Prepared = Command | WithCalls


def prepare(plan: Plan) -> WithCalls:
    """A statement with calls that is being prepared."""
    return RowCalls(plan) if isinstance(plan, ScalarPlan) else FunctionResult(plan)


@dataclass(slots=True)
class Portal:
    """A portal of such a statement.

    Attributes:
        formats: the result formats of the client's Bind.
        offset: where the statement begins in the client's text, in characters.
        in_query: whether a Query has it, and not the extended protocol.
        result: of a function in FROM, once it has been called.
    """

    statement: Prepared
    formats: tuple[int, ...] = ()
    offset: int = 0
    in_query: bool = False
    result: Result | None = None

    @property
    def job(self) -> Job | None:
        """Whose result it is, if it is a job's, and begun."""
        return None if self.result is None else self.result.job

    def close(self) -> None:
        """The rest of its result is not wanted."""
        if self.result is not None:
            self.result.abandon()


def _check(fields: Sequence[Field], calls: Sequence[int], width: int | None) -> None:
    """Raises SQLError XX000 if a stand-in has not these columns: the server and the proxy have read
    the statement differently, and no call in it is to be made.

    Args:
        fields: the server's description.
        calls: the columns with a call's arguments, a text each.
        width: how many columns there are, None if a ``*`` hides that.
    """
    count = len(fields)
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


def as_defined(columns: Sequence[Column], defined: Sequence[Field]) -> Sequence[Column]:
    """A function's columns under a column definition list, which may leave out the last.

    Raises SQLError 42804 if they do not fit.
    """
    fits = len(columns) - 1 <= len(defined) <= len(columns) and all(
        field.type_oid == column.type.oid for field, column in zip(defined, columns, strict=False)
    )
    if not fits:
        raise SQLError(
            DATATYPE_MISMATCH, "function return row and query-specified return row do not match"
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
