"""Finds code that may compare backend_type with 'pg_background', in a statement or a function body.

Invariant: a comparison is found only if the code names pg_stat_activity, and the two are operands
of an operator, in a list, in CASE, or in a function that compares; also through a variable or alias
set in the same code. What takes more than linear time is bounded.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterator
from typing import Final

from proxy.extension.catalogs import Query, Reference
from proxy.extension.installed import NAME, STAT_ACTIVITY
from proxy.sql import constants
from proxy.sql.constants import StringConstant
from proxy.sql.lexer import RESERVED, Kind, keyword
from proxy.sql.tokens import Tokens
from proxy.statements.mentions import PG_STAT_ACTIVITY

BACKEND_TYPE: Final = b"backend_type"
_ACTIVITY_FUNCTION: Final = b"pg_stat_get_activity"
_VIEW: Final = STAT_ACTIVITY.encode()
_NOT_IN_VIEW: Final = frozenset((b"leader_pid", b"query_id"))
"""Columns of pg_stat_activity that some versions lack, so the view has none of them."""

_OUR_TYPE: Final = re.compile(rb"[\^%]*+" + NAME.encode() + rb"[%$]*+")
_OUR_ELEMENT: Final = re.compile(rb"[{,]\s*+\"?" + NAME.encode() + rb"\"?\s*+[,}]")
"""What backend_type is compared with: a value or pattern; an element of an array."""

_NO_COMPARISON: Final = frozenset(
    (b"||", b"->", b"->>", b"#>", b"#>>", b"+", b"-", b"*", b"/", b"@", b"?")
)
_COMPARING_FUNCTIONS: Final = frozenset(
    (
        *("starts_with", "strpos", "position", "nullif", "array_position", "array_positions"),
        *("regexp_match", "regexp_matches", "regexp_like", "regexp_count", "texteq", "textne"),
    )
)
# What ends an operand, besides SQL's reserved words: those of PL/pgSQL, and others.
_EDGES: Final = (
    RESERVED - {"any", "all", "some", "array", "cast", "case", "end", "collate", "true", "false"}
) | frozenset(("if", "elsif", "elseif", "while", "return", "perform", "values", "set", "assert"))
_STATEMENT_EDGES: Final = frozenset(("begin", "then", "else", "loop", "declare"))
_OF_OPERATORS: Final = frozenset(("is", "not", "distinct", "similar"))
_MAX_LOOKED_AT: Final = 64
"""Limit of constants with this value, of columns with this name, of brackets around one."""
_LONGEST_TYPE: Final = 1024
_MAX_TYPES: Final = 64 * 1024
"""Bytes of such a constant; and of all that may be such."""
_SELECTS: Final = frozenset(("select", "distinct", "all", "returning"))


def _is_our_type(text: bytes) -> bool:
    """Whether a constant has this value."""
    if text[:1] == b"{":
        return text[-1:] == b"}" and _OUR_ELEMENT.search(text) is not None
    return _OUR_TYPE.fullmatch(text) is not None


class Code(Query):
    """The tokens of a statement, or of a function body in SQL or PL/pgSQL."""

    def __init__(
        self,
        code: Tokens,
        *,
        standard_conforming_strings: bool,
        source: StringConstant | None = None,
        header: Code | None = None,
    ) -> None:
        """
        Args:
            code: the tokens.
            standard_conforming_strings: the session's setting.
            source: the constant that holds the code, if any.
            header: the statement that defines the function, if this is a body.
        """
        super().__init__(code)
        self.header = header
        self.conforming = standard_conforming_strings
        self.source = source
        self._operands: dict[int, int] = {}

    @functools.cached_property
    def keywords(self) -> list[str]:
        """For each token, the key word that it is."""
        return [keyword(self.sql, token) for token in self.tokens]

    def keyword(self, index: int) -> str:
        return self.keywords[index] if 0 <= index < self.count else ""

    def constant(self, index: int) -> StringConstant | None:
        """The value of a string constant."""
        return constants.read(
            self, index, standard_conforming_strings=self.conforming, around=self.source
        )

    # Definitions of functions, and blocks

    @property
    def language(self) -> bytes | None:
        """The language of the function or block."""
        for at in self.outermost():
            if self.keyword(at) == "language":
                constant = self.constant(at + 1)
                if constant is not None:
                    return constant.text.lower()
                return self.names[at + 1] if at + 1 < self.count else None
        return b"plpgsql" if self.keyword(0) == "do" else b"sql"

    def bodies(self) -> Iterator[int]:
        """The constants that are the body."""
        is_block = self.keyword(0) == "do"
        for at in self.outermost():
            if self.tokens[at].kind is not Kind.STRING or self.keyword(at - 1) == "language":
                continue
            if is_block or self.keyword(at - 1) == "as":
                yield at

    # Relations

    @functools.cached_property
    def segments(self) -> list[int]:
        """The number of semicolons before each token."""
        numbers: list[int] = []
        count = 0
        for text in self.texts:
            numbers.append(count)
            count += text == b";"
        return numbers

    @functools.cached_property
    def mentions(self) -> list[int]:
        """Where the server's pg_stat_activity and its function are named."""
        if any(
            name == PG_STAT_ACTIVITY and self.is_common_table_expression(at)
            for at, name in enumerate(self.names)
        ):
            return []
        return [
            at
            for at, name in enumerate(self.names)
            if name in (PG_STAT_ACTIVITY, _ACTIVITY_FUNCTION)
            and self.first_of_relation(at) is not None
        ]

    @functools.cached_property
    def views(self) -> list[int]:
        """Where the extension's view is named."""
        return [at for at, name in enumerate(self.names) if name == _VIEW]

    def compares(self) -> bool:
        """Whether it compares backend_type of pg_stat_activity with 'pg_background'."""
        if not (self.mentions or (self.header is not None and self.header.mentions)):
            return False
        subjects = self._subjects()
        return bool(subjects) and any(
            self._is_compared(at, subjects) for at in self._constants()[:_MAX_LOOKED_AT]
        )

    def _constants(self) -> list[int]:
        """The constants with this value, and the variables set to it."""
        names = self.set_to_it | (frozenset() if self.header is None else self.header.set_to_it)
        named = [at for at, name in enumerate(self.names) if name in names]
        return self._our_types + named

    @functools.cached_property
    def set_to_it(self) -> frozenset[bytes | None]:
        """The variables and parameters that are set to this value."""
        return frozenset(self._assigned(at) for at in self._our_types) - {None}

    @functools.cached_property
    def _our_types(self) -> list[int]:
        found: list[int] = []
        left = _MAX_TYPES
        for at, token in enumerate(self.tokens):
            if token.kind is not Kind.STRING or not self._may_be_our_type(at):
                continue
            left -= token.end - token.start
            if left < 0 or len(found) == _MAX_LOOKED_AT:
                break
            constant = self.constant(at)
            if constant is not None and _is_our_type(constant.text):
                found.append(at)
        return found

    def _may_be_our_type(self, index: int) -> bool:
        text = self.texts[index]
        if len(text) > _LONGEST_TYPE:
            return False
        # A constant in several pieces, or with escapes, may not show its value.
        return NAME.encode() in text or b"\\" in text or b"\n" in text or b"\r" in text

    def _assigned(self, index: int) -> bytes | None:
        """The variable to which a constant is assigned, or whose default it is."""
        if self.text(index - 1) != b":=" and self.keyword(index - 1) != "default":
            return None
        at = index - 1
        first = self._firsts[at]
        while at > first and self.texts[at - 1] not in (b"(", b","):
            at -= 1
        return self.names[at]

    def begins_statement(self, index: int) -> bool:
        """Whether a PL/pgSQL statement, or a similar clause, begins behind this token."""
        return self.text(index) == b";" or self.keyword(index) in _STATEMENT_EDGES

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """For each token, the first token of its statement."""
        firsts: list[int] = []
        first = 0
        for at in range(self.count):
            firsts.append(first)
            if self.begins_statement(at):
                first = at + 1
        return firsts

    # Names for backend_type

    def _subjects(self) -> list[int]:
        """The tokens that stand for pg_stat_activity's backend_type, in order."""
        columns = [
            at
            for at, name in enumerate(self.names)
            if name == BACKEND_TYPE and self._is_of_activity(at)
        ]
        names: set[bytes | None] = set()
        for at in columns[:_MAX_LOOKED_AT]:
            if self.keyword(at + 1) == "as":
                names.add(self.names[at + 2] if at + 2 < self.count else None)
        for first in {self._firsts[at] for at in columns[:_MAX_LOOKED_AT]}:
            names.update(self._set_in(first))
        names -= {None, BACKEND_TYPE}
        others = [at for at, name in enumerate(self.names) if name in names]
        return sorted({*columns, *others})

    def _is_of_activity(self, index: int) -> bool:
        """Whether a column may be pg_stat_activity's, not the extension's view's."""
        if self.text(index - 1) == b".":
            qualifier = self.names[index - 2] if index > 1 else None
            return qualifier not in self._names_of_views
        if not self.views:
            return True
        segment, opening = self.segments[index], self.openings[index]
        for _ in range(_MAX_LOOKED_AT):
            for places in self._places:
                if (segment, opening) in places:
                    return places is self._places[0]
            if opening < 0:
                break
            opening = self.openings[opening]
        return segment not in self._with_view

    @functools.cached_property
    def _with_view(self) -> frozenset[int]:
        """The segments in which the extension's view is named."""
        return frozenset(self.segments[at] for at in self.views)

    @functools.cached_property
    def _places(self) -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]:
        """The statements and brackets that name pg_stat_activity, and those that name the view."""
        mentions, views = (
            frozenset((self.segments[at], self.openings[at]) for at in relations)
            for relations in (self.mentions, self.views)
        )
        return mentions, views

    @functools.cached_property
    def _names_of_views(self) -> frozenset[bytes | None]:
        names: set[bytes | None] = set()
        for at in self.views:
            if self.has_alias(at + 1):
                names.add(self.names[at + 2 if self.keyword(at + 1) == "as" else at + 1])
            else:
                names.add(_VIEW)
        return frozenset(names)

    def _set_in(self, first: int) -> Iterator[bytes | None]:
        """The variables set by the statement that begins here."""
        for at in range(first, self.count):
            if self.begins_statement(at):
                return
            if self.text(at) == b":=" and self.openings[at] == self.openings[first]:
                yield self._name_at(first)
            elif self.keyword(at) == "into":
                at += 2 if self.keyword(at + 1) == "strict" else 1
                yield self._name_at(at)
                while self.text(at + 1) == b",":
                    at += 2
                    yield self._name_at(at)

    def _name_at(self, index: int) -> bytes | None:
        """A variable's name; none for a field, which may belong to anything."""
        if index >= self.count or self.text(index + 1) == b"." or self.keyword(index) in _EDGES:
            return None
        return self.names[index]

    # Comparisons

    def _is_compared(self, index: int, subjects: list[int]) -> bool:
        """Whether a constant is compared with one of these."""
        first = last = index
        for _ in range(_MAX_LOOKED_AT):
            last = self._after_casts(last)
            if (operator := self._comparison_before(first)) is not None:
                return self._has(subjects, self._operand_before(operator), operator)
            if (operator := self._comparison_after(last)) is not None:
                return self._has(subjects, operator + 1, self._operand_end(operator + 1))
            if (case := self._case_of(first)) is not None:
                return self._has(subjects, *case)
            opening = self.openings[first]
            if opening < 0 or opening not in self.closings:
                return False
            first, last = opening, self.closings[opening]
            if self.keyword(first - 1) in _COMPARING_FUNCTIONS and self._has(subjects, first, last):
                return True
            first = self._before_bracket(first)
            if self.keyword(first - 1) == "in":
                return self._has(subjects, self._operand_before(first - 1), first - 1)
        return False

    @staticmethod
    def _has(subjects: list[int], first: int, end: int) -> bool:
        return bisect.bisect_left(subjects, first) < bisect.bisect_left(subjects, end)

    def _after_casts(self, last: int) -> int:
        """The last token of ``… :: type``."""
        while self.text(last + 1) in (b"::", b"."):
            last += 2
            while self.text(last + 1) in (b"(", b"["):
                last = self.closings.get(last + 1, last + 1)
        if self.keyword(last + 1) == "collate":
            last += 2
        return last

    def _comparison_before(self, first: int) -> int | None:
        """The first token of the operator in front of an operand."""
        at = first - 1
        if self._compares(at):
            return at
        word, before = self.keyword(at), self.keyword(at - 1)
        if word in ("like", "ilike") or (word, before) in (("to", "similar"), ("from", "distinct")):
            return at
        if self.text(at) == b")":  # OPERATOR(pg_catalog.=)
            opening = self._closed.get(at, -1)
            if self.keyword(opening - 1) == "operator":
                return opening - 1
        return None

    def _comparison_after(self, last: int) -> int | None:
        """The last token of the operator behind an operand."""
        at = last + 1
        if self._compares(at):
            return at
        while self.keyword(at) in _OF_OPERATORS:
            at += 1
        words = ("like", "ilike", "in", *(("from", "to") if at > last + 1 else ()))
        if self.keyword(at) in words:
            return at
        if self.keyword(at) == "operator" and self.text(at + 1) == b"(":
            return self.closings.get(at + 1)
        return None

    def _compares(self, index: int) -> bool:
        return self.is_operator(index) and self.text(index) not in _NO_COMPARISON

    @functools.cached_property
    def _closed(self) -> dict[int, int]:
        """The opening brackets, by their closing ones."""
        return {closing: opening for opening, closing in self.closings.items()}

    def _before_bracket(self, opening: int) -> int:
        """The first token of ``ANY (``, ``ARRAY[``, ``CAST(``, ``lower(`` and the like."""
        first = opening
        while True:
            word = self.keyword(first - 1)
            if word in ("any", "all", "some", "array", "cast") or (
                self.text(first) == b"("
                and first > 0
                and self.names[first - 1] is not None
                and word not in RESERVED
                and word not in _EDGES
            ):
                first -= 1
                while self.text(first - 1) == b".":
                    first -= 2
            else:
                return first

    def _case_of(self, first: int) -> tuple[int, int] | None:
        """The operand of the CASE that has this value after WHEN."""
        at = first - 1
        while self.text(at) == b"," or (at > 0 and self.tokens[at].kind is Kind.STRING):
            at -= 1
        return self._cases.get(at)

    @functools.cached_property
    def _cases(self) -> dict[int, tuple[int, int]]:
        """For each WHEN, the operand of its CASE."""
        found: dict[int, tuple[int, int]] = {}
        # For each bracket: its open CASEs, and the first WHEN of each.
        cases: dict[int, list[tuple[int, int]]] = {}
        for at, word in enumerate(self.keywords):
            if word not in ("case", "when", "end"):
                continue
            around = cases.setdefault(self.openings[at], [])
            if word == "case":
                around.append((at, -1))
            elif around and word == "end":
                around.pop()
            elif around:
                case, when = around[-1]
                if when < 0:
                    around[-1] = case, at
                found[at] = (case + 1, at if when < 0 else when)
        return found

    def _operand_before(self, operator: int) -> int:
        """Where the operand in front of an operator begins."""
        if operator not in self._operands:
            self._operands[operator] = self._operand_in_front_of(operator)
        return self._operands[operator]

    def _operand_in_front_of(self, operator: int) -> int:
        level, at = self.openings[operator], operator
        while at > 0 and self.keyword(at - 1) in _OF_OPERATORS:
            at -= 1
        while at - 1 > level and not (self.openings[at - 1] == level and self._is_edge(at - 1)):
            at -= 1
        return at

    def _operand_end(self, first: int) -> int:
        """The token behind the operand that begins here."""
        if first >= self.count:
            return first
        level, at = self.openings[first], first
        end = self.closings.get(level, self.count)
        while at < end and not (self.openings[at] == level and self._is_edge(at)):
            at += 1
        return at

    def _is_edge(self, index: int) -> bool:
        return (
            self.text(index) in (b",", b";", b":=")
            or self.keyword(index) in _EDGES
            or self._compares(index)
        )

    @property
    def has_our_type(self) -> bool:
        """Whether it has a constant with this value."""
        return bool(self._our_types)

    def compares_with_other(self) -> bool:
        """Whether it compares pg_stat_activity's backend_type with a parameter, with an argument of
        format(), or with something appended to the constant that holds the code."""
        return bool(self.mentions) and any(
            name == BACKEND_TYPE and self._is_compared_with_other(at)
            for at, name in enumerate(self.names)
        )

    def _is_compared_with_other(self, column: int) -> bool:
        operator = self._comparison_after(self._after_casts(column))
        if operator is None or not self._is_of_activity(column):
            return False
        at = operator + 1
        while self.text(at) in (b"(", b"[") or self.keyword(at) in ("any", "array"):
            at += 1
        return at >= self.count or self.text(at) == b"%" or self.tokens[at].kind is Kind.PARAMETER

    # Replacement

    def replaceable(self) -> list[Reference] | None:
        """Where pg_stat_activity is a relation, if the extension's view may replace it everywhere;
        None if something may differ or be misread."""
        references = self.references()
        if references is None or self.has_unread_names():
            return None
        if any(name in _NOT_IN_VIEW or name == _ACTIVITY_FUNCTION for name in self.names):
            return None
        if self.header is not None and self.header.mentions:
            return None  # a parameter of its type
        found = [each for each in references if each.relation == PG_STAT_ACTIVITY]
        known = {each.last for each in found}
        if any(at not in known and self.text(at + 1) != b"." for at in self.mentions):
            return None
        if any(self.keyword(at) == "natural" for at in range(self.count)):
            return None
        if any(self.renames(each) or self.uses_row(each) for each in found):
            return None
        if any(self._shows_all(at, found) for at, text in enumerate(self.texts) if text == b"*"):
            return None
        return found

    def _shows_all(self, star: int, references: list[Reference]) -> bool:
        """Whether a star may stand for the columns of one of these."""
        before = star - 1
        if self.text(before) == b".":
            qualifier = self.names[before - 1]
            return any(
                qualifier == (each.relation if each.alias is None else self.names[each.alias])
                for each in references
            )
        if self.keyword(before) not in _SELECTS and self.text(before) != b",":
            return False  # a multiplication, or count(*)
        opening = self.openings[star]
        if self.keyword(before) == "select" and self.keyword(opening - 1) == "exists":
            return False
        return any(
            self.openings[each.first] == opening
            and self.segments[each.first] == self.segments[star]
            for each in references
        )

    # PL/pgSQL around a constant

    def statement_words(self, index: int) -> list[str]:
        """The key words of the statement around a token, up to it."""
        return self.keywords[self._firsts[index] : index]

    def is_defined(self, index: int) -> bool:
        """Whether a token is in the definition of a view or the like, not of a table."""
        words = self.statement_words(index)
        return words[:1] == ["create"] and "table" not in words[1:4]

    def is_executed(self, index: int) -> bool:
        """Whether a constant is, or is part of, what EXECUTE executes."""
        words = self.statement_words(index)
        if "execute" in words:
            return "using" not in words and "into" not in words
        first = index - len(words)
        if self.text(first + 1) != b":=":
            return False
        return self.names[first] in self._executed

    @functools.cached_property
    def _executed(self) -> frozenset[bytes | None]:
        """The names after EXECUTE."""
        return frozenset(
            name for at, name in enumerate(self.names) if self.keyword(at - 1) == "execute"
        )

    def has_alias(self, index: int) -> bool:
        return self.keyword(index) != "loop" and super().has_alias(index)
