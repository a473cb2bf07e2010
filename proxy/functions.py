"""The pg_background functions, each declared once.

The rule: what a function is called, takes and returns is said here and nowhere else. Which calls
the proxy catches, the SQL objects for calls from inside the database, and the reference
documentation are all made from this table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Type:
    """A PostgreSQL type.

    ``name`` is as the server prints it (format_type), ``oid`` as in pg_type, ``size`` as
    RowDescription's typlen: in bytes, -1 if it varies.
    """

    name: str
    oid: int
    size: int


BOOL: Final = Type("boolean", 16, 1)
INT4: Final = Type("integer", 23, 4)
TEXT: Final = Type("text", 25, -1)
RECORD: Final = Type("record", 2249, -1)
VOID: Final = Type("void", 2278, 4)


class _Required(enum.Enum):
    REQUIRED = "REQUIRED"


REQUIRED: Final = _Required.REQUIRED


@dataclass(frozen=True, slots=True)
class Parameter:
    """An input parameter; ``aliases`` are further names that named notation may use for it."""

    name: str
    type: Type
    default: str | int | bool | Literal[_Required.REQUIRED] | None = REQUIRED
    aliases: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Has no default."""
        return self.default is REQUIRED

    def is_called(self, name: str) -> bool:
        """Named notation may call this parameter ``name``."""
        return name == self.name or name in self.aliases


@dataclass(frozen=True, slots=True)
class Function:
    """One overload of a function.

    ``strict``: with a NULL argument it is not called: the result is NULL, or no rows.
    ``summary`` is one line of Markdown for the reference.
    """

    name: str
    parameters: tuple[Parameter, ...]
    result_type: Type
    returns_set: bool
    strict: bool
    summary: str


def _privileges(verb: str, summary: str) -> Function:
    return Function(
        name=f"{verb}_pg_background_privileges",
        parameters=(
            Parameter("role_name", TEXT, aliases=("user_name",)),
            Parameter("print_commands", BOOL, default=False),
        ),
        result_type=BOOL,
        returns_set=False,
        strict=False,
        summary=summary,
    )


_ALL: Final = (
    Function(
        name="pg_background_launch",
        parameters=(Parameter("sql", TEXT), Parameter("queue_size", INT4, default=0)),
        result_type=INT4,
        returns_set=False,
        strict=True,
        summary="Starts a job that runs `sql` in a backend of its own; returns that backend's pid.",
    ),
    Function(
        name="pg_background_result",
        parameters=(Parameter("pid", INT4),),
        result_type=RECORD,
        returns_set=True,
        strict=True,
        summary="Waits for the job and returns its rows; once for each job.",
    ),
    Function(
        name="pg_background_detach",
        parameters=(Parameter("pid", INT4),),
        result_type=VOID,
        returns_set=False,
        strict=True,
        summary="Forgets the job, which runs on to its end.",
    ),
    _privileges("grant", "Lets a role call the functions; false, with a notice, if it fails."),
    _privileges("revoke", "Takes that from a role; false, with a notice, if it fails."),
)

FUNCTIONS: Final[dict[str, tuple[Function, ...]]] = {
    name: tuple(function for function in _ALL if function.name == name)
    for name in dict.fromkeys(function.name for function in _ALL)
}
"""The overloads of each name."""
