"""Prepared statements and portals with calls, and how the client sees their columns.

Invariant: the server describes the stand-in; the client gets the description of its own statement,
derived from the plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from protocol.errors import DATATYPE_MISMATCH, INTERNAL_ERROR, SQLError
from protocol.messages import Field, Parse
from protocol.values import oids, parse_array
from proxy.api.functions import Column, Type
from proxy.extension.composites import Composites
from proxy.session.results import Result, choose, fields_of
from proxy.statements.plan import ItemOutput, Plan, ResultPlan, ScalarPlan, Substitute

if TYPE_CHECKING:
    from proxy.jobs.job import Job


@dataclass(slots=True)
class Command:
    """A prepared statement without calls whose execution is followed: a command that a block of
    ours carries out, or a definition with a notice. The server has it under the client's name.

    Attributes:
        plan: its substitute.
        server_name: the client's name for it.
        notice_sent: whether the client has had the notice.
    """

    plan: Substitute
    server_name: bytes = b""
    notice_sent: bool = False

    def stand_in_formats(self, formats: tuple[int, ...]) -> tuple[int, ...]:
        """The stand-in's result formats, from those of the client's Bind."""
        return formats


@dataclass(slots=True)
class RowCalls:
    """A prepared statement with calls for each row of its stand-in.

    Attributes:
        result_types: of the calls, by the plan's columns, as the database has them.
        marker: of the extension that has these types, if a call returns one and it is installed.
        fields: the stand-in's columns, as the server describes them.
        server_name: the stand-in's name; see `hidden`.
        client_parse: a Parse of the client's text under our OWN_NAME, if the server can run that
            text too. Then the server has the text under the client's name as well; if that is
            empty, named portals are bound to OWN_NAME.
    """

    plan: ScalarPlan
    result_types: Sequence[Type]
    marker: bytes | None = None
    fields: tuple[Field, ...] = ()
    server_name: bytes = b""
    client_parse: Parse | None = None

    has_columns = True

    def described(self, fields: tuple[Field, ...]) -> None:
        """Note the server's description. Raises SQLError XX000 if it does not match the plan."""
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
        """The result types of the calls, by their columns in the stand-in."""
        count = len(self.fields)
        return {
            column.index % count: type
            for column, type in zip(self.plan.columns, self.result_types, strict=True)
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
        outputs = self.plan.outputs
        if outputs is None or len(formats) != len(outputs):
            return formats
        if not any(formats):
            return ()  # all text: their number may not be known yet
        wanted = [0] * len(self.fields)
        for output, format in zip(outputs, formats, strict=True):
            wanted[output.column] = format
        return tuple(wanted)


@dataclass(slots=True)
class FunctionResult:
    """A prepared statement whose rows come from a function in FROM: its own, or a job's.

    Attributes:
        columns: the function's, with types as the database has them; none if only its job knows.
        marker, fields, server_name, client_parse: as in `RowCalls`.
        described_columns: a job's columns as told by Describe, which later executions must match.
    """

    plan: ResultPlan
    columns: Sequence[Column] = ()
    marker: bytes | None = None
    fields: tuple[Field, ...] = ()
    server_name: bytes = b""
    client_parse: Parse | None = None
    described_columns: tuple[Field, ...] = ()

    @property
    def has_columns(self) -> bool:
        """Whether the columns are known before execution; otherwise only the job knows them."""
        return bool(self.plan.defined_columns or self.columns)

    def described(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        width = 1
        if defined := self.plan.defined_columns:
            shown = sum(1 if item.column is not None else defined for item in self.plan.outputs)
            width = shown + 2
        _check(fields, [-2, -1] if defined else [-1], width)

    def defined(self, row: Sequence[bytes | None]) -> tuple[Field, ...]:
        """The column definition list, from the stand-in's row; empty if there is none. Domains are
        not resolved. Names and modifiers are missing: the plan's chosen columns have them.

        Raises SQLError XX000.
        """
        if not self.plan.defined_columns:
            return ()
        types = parse_array(row[-2] or b"{}")
        if len(types) != self.plan.defined_columns:
            raise misread()
        return tuple(Field(b"", 0, 0, int(type or b"0"), -1, -1, 0) for type in types)

    def client_fields(self) -> tuple[Field, ...]:
        """The columns of the client's statement, if known."""
        if self.plan.defined_columns:
            return self.fields[:-2]
        return choose(self.plan.outputs, fields_of(self.columns))[1]

    def stand_in_formats(self, formats: tuple[int, ...]) -> tuple[int, ...]:
        if not self.plan.defined_columns:
            return ()
        return (*formats, 0, 0) if len(formats) > 1 else formats


WithCalls = RowCalls | FunctionResult
Prepared = Command | WithCalls


def prepare(plan: Plan, composites: Composites) -> WithCalls:
    """A statement with calls to be prepared, still nameless, in a database with these types."""
    types = [composites.resolved(call.function.result_type) for call in plan.calls]
    shown = types if isinstance(plan, ScalarPlan) else [c.type for c in types[0].columns]
    marker = composites.marker if any(type.columns for type in shown) else None
    if isinstance(plan, ScalarPlan):
        return RowCalls(plan, types, marker)
    return FunctionResult(plan, types[0].columns, marker)


@dataclass(slots=True)
class Portal:
    """A portal of such a statement.

    Attributes:
        server_name: the stand-in's name; see `hidden`.
        formats: the result formats of the client's Bind.
        offset: where the statement begins in the client's text, in characters.
        in_query: whether it belongs to a Query, not to the extended protocol.
        result: of a function in FROM, once called.
    """

    statement: Prepared
    server_name: bytes = b""
    formats: tuple[int, ...] = ()
    offset: int = 0
    in_query: bool = False
    result: Result | None = None

    @property
    def is_hidden(self) -> bool:
        """Whether the server has a guard under the client's name."""
        return bool(self.server_name) and not isinstance(self.statement, Command)

    @property
    def job(self) -> Job | None:
        """The job whose result was begun, if it is a job's."""
        return None if self.result is None else self.result.job

    def close(self) -> None:
        """Drop the rest of the result."""
        if self.result is not None:
            self.result.discard_rest()


def _check(fields: Sequence[Field], calls: Sequence[int], width: int | None) -> None:
    """Raises SQLError XX000 if a stand-in has other columns than planned: then server and proxy
    have read the statement differently, and none of its calls may be made.

    Args:
        fields: the server's description.
        calls: positions of columns that hold a call's arguments, each a text.
        width: number of columns; None if a ``*`` hides it.
    """
    count = len(fields)
    if width not in (None, count) or not all(
        -count <= call < count and fields[call].type_oid == oids.TEXT for call in calls
    ):
        raise misread()


def misread() -> SQLError:
    """The error for a statement with a call that server and proxy have read differently."""
    return SQLError(
        INTERNAL_ERROR,
        "the server has read a statement with a pg_background call in another way than the proxy",
        detail="No call was made.",
    )


def as_defined(columns: Sequence[Column], defined: Sequence[Field]) -> Sequence[Column]:
    """A function's columns under a column definition list, which may omit the last ones.

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
        Column(field.name.decode("utf-8", "surrogateescape"), column.type)
        for field, column in zip(defined, columns, strict=False)
    ]


def format_of(formats: Sequence[int], column: int) -> int:
    """The result format of a column (in Bind, none means text for all; one applies to all)."""
    if len(formats) <= 1:
        return formats[0] if formats else 0
    return formats[column]
