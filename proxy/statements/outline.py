"""Finds the calls in a statement, and the functions that they call.

Invariant: `Outline` knows tokens, brackets and calls; readers of their own know the shapes.
"""

from __future__ import annotations

import bisect
import functools
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Final, NamedTuple

from proxy.api.functions import Function, Parameter, Type
from proxy.sql.lexer import Kind
from proxy.sql.tokens import NotRecognizedError, Tokens
from proxy.statements import mentions
from proxy.statements.plan import Argument, Call, FieldOf

_OURS: Final = re.compile(re.escape(mentions.FUNCTIONS), re.IGNORECASE)
_token_start: Final = operator.attrgetter("start")

MAX_NAME: Final = 63
"""The server truncates names to this many bytes."""

# The alias of the arguments, and of their column
ARGUMENTS: Final = b"pg_background_arguments"

# Words that begin a clause, or say that rows are not just those of the items of FROM
CLAUSES: Final = frozenset(
    (
        *("where", "group", "having", "window", "union", "intersect", "except", "order", "limit"),
        *("offset", "fetch", "for", "into"),
    )
)
WRITES: Final = frozenset(("insert", "update", "delete", "merge"))
QUERIES: Final = frozenset(
    ("select", "with", "values", "table", "insert", "update", "delete", "merge")
)

ColumnOfCall = Callable[[int, int], tuple[FieldOf, Type] | None]
"""From an argument's first and last token to the column of a call in FROM that it is, if any."""


class Leaf(NamedTuple):
    """The first and last token of an argument, and the name of its call."""

    type: Type
    first: int
    last: int
    name: int


class Site(NamedTuple):
    """An outermost call, with its first token (the schema's name) and its last, the ``)``."""

    call: Call
    leaves: list[Leaf]
    first: int
    last: int


class Outline(Tokens):
    """One statement and its calls. Indices count tokens unless they are called offsets.

    Attributes:
        voids: the parameters of type void, which the server does not count as arguments: drivers
            send them for a function's result in their own notation, ``{? = call f(?)}``.
    """

    def __init__(
        self,
        statement: Tokens,
        functions: Mapping[str, tuple[Function, ...]],
        voids: Collection[int] = (),
    ) -> None:
        super().__init__(statement.sql, statement.tokens, statement.encoding)
        self.functions = functions
        self.voids = voids
        self.column_of_call: ColumnOfCall = lambda first, last: None

    @functools.cached_property
    def ours(self) -> list[int]:
        """The names of our functions before a ``(``."""
        indices: list[int] = []
        seen = -1  # a long constant may contain our name thousands of times
        # The statement may be one of thousands in a text.
        for found in _OURS.finditer(self.sql, self.tokens[0].start, self.tokens[-1].end):
            at = bisect.bisect(self.tokens, found.start(), key=_token_start) - 1
            if at != seen and self.name_of_ours(at):
                indices.append(at)
            seen = at
        return indices

    def ours_between(self, first: int, last: int) -> int | None:
        """The first of ``ours`` in this range."""
        at = bisect.bisect_left(self.ours, first)
        return self.ours[at] if at < len(self.ours) and self.ours[at] <= last else None

    def sites(self) -> list[Site]:
        """All outermost calls, in order."""
        sites: list[Site] = []
        for at in self.ours:
            if not sites or at > sites[-1].last:
                sites.append(self.site(at))
        return sites

    def name_of_ours(self, index: int) -> str | None:
        name = self.name(index)
        if name is None or self.text(index + 1) != b"(":
            return None
        decoded = name.decode("latin-1")
        return decoded if decoded in self.functions else None

    def site(self, index: int, outer: list[Leaf] | None = None) -> Site:
        """The call whose name is at ``index``. ``outer``: leaves before its own, if an argument."""
        name, close = self.name_of_ours(index), self.closing(index + 1)
        items = self.list_items(index + 2, close) if close > index + 2 else []
        given = [self.argument(*item) for item in items if not self.is_void(*item)]
        function, parameters = _resolve(
            self.functions.get(name or "", ()), [argument_name for argument_name, _, _ in given]
        )
        leaves = [] if outer is None else outer
        arguments: list[Argument] = []
        for parameter, (argument_name, first, last) in zip(parameters, given, strict=True):
            ours = self.ours_between(first, last)
            value: int | Call | FieldOf
            if ours is None and (field := self.column_of_call(first, last)) is not None:
                value, type = field
                if type != parameter.type:
                    raise NotRecognizedError("no such function")
            elif ours is None:
                value = len(leaves)
                leaves.append(Leaf(parameter.type, first, last, index))
            elif outer is not None:
                raise NotRecognizedError("nested twice")
            else:
                inner = self.site(ours, leaves)
                if not self.parenthesised(inner, first, last):
                    raise NotRecognizedError("a call within an expression")
                value = inner.call
                if value.function.returns_set or value.function.result_type != parameter.type:
                    raise NotRecognizedError("no such function")
            arguments.append(Argument(parameter, value, argument_name))
        first = self.qualified(index)
        call = Call(function, tuple(arguments), self.schema(first, index))
        return Site(call, leaves, first, close)

    def is_void(self, first: int, last: int) -> bool:
        """Whether an argument is a parameter of type void, in any number of parentheses."""
        if not self.voids:
            return False
        while self.text(first) == b"(" and self.text(last) == b")":
            first, last = first + 1, last - 1
        is_parameter = first == last and self.tokens[first].kind is Kind.PARAMETER
        return is_parameter and int(self.text(first)[1:]) in self.voids

    def schema(self, first: int, last: int) -> bytes | None:
        """The qualification of the name in these tokens."""
        return self.name(last - 2) if first < last else None

    def parenthesised(self, site: Site, first: int, last: int) -> bool:
        """Whether ``first`` to ``last`` are the call alone, in any number of parentheses."""
        return (
            first <= site.first
            and site.first - first == last - site.last
            and all(self.text(at) == b"(" for at in range(first, site.first))
            and all(self.text(at) == b")" for at in range(site.last + 1, last + 1))
        )


def _resolve(
    overloads: tuple[Function, ...], given: list[str | None]
) -> tuple[Function, list[Parameter]]:
    """The overload for arguments with these names (None: positional), and the parameter of each."""
    for function in overloads:
        parameters = _match(function, given)
        if parameters is not None:
            return function, parameters
    raise NotRecognizedError("no such function")


def _match(function: Function, given: list[str | None]) -> list[Parameter] | None:
    """The parameter of each argument, by PostgreSQL's rules: first by position, then by name."""
    positional = next((at for at, name in enumerate(given) if name is not None), len(given))
    if positional > len(function.parameters):
        return None
    matched = list(function.parameters[:positional])
    for name in given[positional:]:
        parameter = next((p for p in function.parameters if name and p.is_called(name)), None)
        if parameter is None or parameter in matched:
            return None
        matched.append(parameter)
    if any(p.required and p not in matched for p in function.parameters):
        return None
    return matched


def column_names(function: Function) -> list[bytes]:
    return [column.name.encode() for column in function.columns]


def position_of(name: bytes | None, names: list[bytes]) -> int:
    """The index of the name, which must occur once."""
    if name is None or names.count(name) != 1:
        raise NotRecognizedError("not a column")
    return names.index(name)
