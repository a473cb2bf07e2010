"""Definitions that look for jobs in pg_stat_activity by ``backend_type = 'pg_background'``, in
functions, procedures, views, rules, policies and DO blocks.

When a definition runs, it reads the server's own pg_stat_activity, where a job is a client backend.
So the client gets a notice; or the definition is made to read pg_background_stat_activity, a view
of the extension that has the backend_type of jobs.

Invariant: only code that itself names pg_stat_activity is found, not comments or other constants.
Only names of relations are changed, and only if each part of the code with such a comparison can be
read for certain and uses no column that the view lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocol.errors import SQLError
from proxy.extension.code import BACKEND_TYPE, Code
from proxy.extension.installed import FIND, NAME, REALLY, STAT_ACTIVITY
from proxy.sql.constants import StringConstant
from proxy.sql.lexer import BudgetError, Kind, LexError
from proxy.sql.rewrite import with_changes
from proxy.sql.tokens import Tokens
from proxy.statements.mentions import PG_STAT_ACTIVITY
from proxy.statements.plan import Substitute

_BEGINNINGS: Final = frozenset(("create", "alter", "do"))
_ROUTINES: Final = frozenset(("function", "procedure"))
_OTHERS: Final = frozenset(("view", "rule", "policy"))
_LANGUAGES: Final = frozenset((b"sql", b"plpgsql"))
_COMMANDS: Final = frozenset(
    (
        *("select", "with", "insert", "update", "delete", "merge", "create", "do", "call"),
        *("copy", "declare", "prepare", "values", "table"),
    )
)
"""How SQL in a constant within a function may begin."""
_DEEPEST: Final = 3
"""Nesting of constants that are read as code."""
_MAX_READ: Final = 64 * 1024
_CONSTANT_COST: Final = 2048
"""Bytes of constants within functions that are read, and what each counts for in addition."""

VIEW_QUERY: Final = (
    "SELECT pg_catalog.quote_ident(CAST(v.nspname AS pg_catalog.text)),"
    f" pg_catalog.current_setting('client_min_messages'), {REALLY} FROM (SELECT 1) one LEFT JOIN"
    f" (SELECT n.nspname FROM (SELECT p.pronamespace, p.proowner {FIND}) m, pg_catalog.pg_class c,"
    " pg_catalog.pg_namespace n WHERE c.relnamespace OPERATOR(pg_catalog.=) m.pronamespace"
    f" AND c.relname OPERATOR(pg_catalog.=) '{STAT_ACTIVITY}'"
    " AND c.relkind OPERATOR(pg_catalog.=) 'v' AND c.relowner OPERATOR(pg_catalog.=) m.proowner"
    " AND n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')"
    " AND pg_catalog.has_table_privilege(c.oid, 'SELECT')) v ON true"
).encode()
"""Decides how a definition is served: the quoted schema of the extension's view, NULL if the
session has none; client_min_messages; whether the server has the C extension, which needs none."""

# The search in code in another language, and in very long code.
_SEEMS_TO_COMPARE: Final = re.compile(
    rb"backend_type[\"']?(?:::\w+)?\s*(?:=|<>|!=|~|like|ilike|not\s+like|(?:not\s+)?in\s*\()\s*"
    rb"[\\\"']+pg_background[\\\"']"
)

# Schemas whose names are the same in every constant and encoding.
_PLAIN_SCHEMA: Final = re.compile(rb'\w+|"[\w .-]+"', re.ASCII)

_WITHOUT_NOTICES: Final = frozenset((b"warning", b"error", b"fatal", b"panic"))


@dataclass(frozen=True, slots=True)
class Definition:
    """A definition with such a comparison.

    Attributes:
        sql: the statement.
        relations: where it names pg_stat_activity to be replaced, and if by alias; None: uncertain.
    """

    sql: bytes
    relations: tuple[tuple[int, int, bool], ...] | None

    @property
    def undecided(self) -> Substitute:
        """The unchanged definition, until the server has answered `VIEW_QUERY`."""
        return Substitute(with_changes(self.sql, ()), is_undecided=True)

    def with_view(self, schema: bytes) -> Substitute | None:
        """The definition with the extension's view; None if that is not certain.

        Args:
            schema: of the view, quoted if necessary.
        """
        if self.relations is None or not _PLAIN_SCHEMA.fullmatch(schema):
            return None
        name = schema + b"." + STAT_ACTIVITY.encode()
        changes = [
            (start, end, name if has_alias else name + b" AS " + PG_STAT_ACTIVITY)
            for start, end, has_alias in self.relations
        ]
        return Substitute(with_changes(self.sql, changes))

    def with_notice(self, schema: bytes | None, *, rewrites: bool) -> Substitute:
        """The unchanged definition with a notice.

        Args:
            schema: of the view, if it exists.
            rewrites: whether the definition would have been changed if that were possible.
        """
        return Substitute(with_changes(self.sql, ()), notice=notice(schema, rewrites=rewrites))


def notice(schema: bytes | None, *, rewrites: bool) -> SQLError:
    """The notice about a definition; see `Definition.with_notice`."""
    view = STAT_ACTIVITY
    if schema is None:
        hint = f"CREATE EXTENSION {NAME} makes a view for definitions, {view}: select from that."
    else:
        view = f"{schema.decode('utf-8', 'replace')}.{view}"
        hint = f"Select from {view} instead"
        hint += (
            "." if rewrites else ', or set catalogs = "definitions" in the proxy\'s configuration.'
        )
    why = ""
    if rewrites and schema is not None:
        why = f" It could not be changed for certain to read {view}."
    return SQLError(
        "00000",
        f'pg_stat_activity has no backend_type "{NAME}" when this definition reads it',
        detail="To the server, the jobs of pg_background are client backends. They have this"
        f" backend_type only in queries that a client sends to the proxy.{why}",
        hint=hint,
        severity="NOTICE",
    )


def wants_notices(client_min_messages: bytes) -> bool:
    """Whether a session with this setting gets notices."""
    return client_min_messages not in _WITHOUT_NOTICES


def analyze(statement: Tokens, *, standard_conforming_strings: bool) -> Definition | None:
    """The definition in a statement, if it has such a comparison.

    Args:
        statement: one statement, as the session's server reads it.
        standard_conforming_strings: the session's setting.
    """
    if statement.keyword(0) not in _BEGINNINGS or not _may_compare(statement.sql):
        return None
    relations: list[tuple[int, int, bool]] = []
    conforming = standard_conforming_strings
    code = Code(statement, standard_conforming_strings=conforming)
    found = _Finder(conforming=conforming).in_statement(code)
    is_found = is_certain = False
    for piece in found:
        is_found = True
        references = None if piece is None else piece.replaceable()
        is_certain = references is not None
        if piece is None or references is None:
            break
        for each in references:
            start, end = piece.start(each.first), piece.end(each.last)
            if piece.source is not None:
                start, end = piece.source.span(start, end)
            relations.append((start, end, each.alias is not None))
    if not is_found:
        return None
    return Definition(statement.sql, tuple(sorted(relations)) if is_certain else None)


def _may_compare(sql: bytes) -> bool:
    lower = sql.lower()
    return (
        BACKEND_TYPE in lower
        and NAME.encode() in lower
        and (PG_STAT_ACTIVITY in lower or b"pg_stat_get_activity" in lower)
    )


class _Finder:
    """Finds the parts of a definition with a comparison; None for one that may not be code."""

    def __init__(self, *, conforming: bool) -> None:
        """`conforming`: standard_conforming_strings."""
        self.conforming = conforming
        # Bytes of constants within functions yet to be read.
        self.left = _MAX_READ

    def in_statement(self, code: Code, depth: int = 0) -> Iterator[Code | None]:
        """Search a statement, if it is a definition."""
        kind = _kind(code)
        if kind is None:
            return
        if code.compares():
            yield code
        if kind == "other":
            return
        bodies = list(code.bodies())
        # The server accepts one body only.
        body = code.constant(bodies[0]) if len(bodies) == 1 else None
        if body is None:
            return
        if code.language in _LANGUAGES:
            yield from self.in_body(body, depth + 1, code)
        elif _seems_to_compare(body.text):
            yield None

    def in_body(self, body: StringConstant, depth: int, header: Code) -> Iterator[Code | None]:
        """Search a function body, and the SQL that it executes."""
        try:
            code = self._code(body, header)
        except LexError as error:
            if isinstance(error, BudgetError) and _seems_to_compare(body.text):
                yield None
            return
        if code.compares():
            yield code
        if depth >= _DEEPEST:
            return
        for at, token in enumerate(code.tokens):
            if token.kind is Kind.STRING and _may_be_executed(code.text(at)):
                yield from self.in_constant(code, at, depth)

    def in_constant(self, code: Code, at: int, depth: int) -> Iterator[Code | None]:
        """Search a constant within a function, if it is SQL, not a message."""
        self.left -= code.end(at) - code.start(at) + _CONSTANT_COST
        constant = code.constant(at) if self.left > 0 else None
        if constant is None or "raise" in code.statement_words(at):
            return
        try:
            inner = self._code(constant)
        except LexError:
            return
        if inner.keyword(0) not in _COMMANDS:
            return
        found: Iterator[Code | None]
        if _kind(inner) is not None:
            found = self.in_statement(inner, depth + 1)
        elif inner.compares():
            found = iter([inner])
        else:
            found = iter([None] if code.has_our_type and inner.compares_with_other() else [])
        is_executed = code.is_executed(at)
        for each in found:
            yield each if is_executed else None

    def _code(self, constant: StringConstant, header: Code | None = None) -> Code:
        """Raises LexError, BudgetError."""
        conforming = self.conforming
        tokens = constant.tokens(standard_conforming_strings=conforming)
        return Code(tokens, standard_conforming_strings=conforming, source=constant, header=header)


def _may_be_executed(constant: bytes) -> bool:
    lower = constant.lower()
    return BACKEND_TYPE in lower and PG_STAT_ACTIVITY in lower


def _seems_to_compare(text: bytes) -> bool:
    lower = text.lower()
    return _may_compare(lower) and _SEEMS_TO_COMPARE.search(lower) is not None


def _kind(code: Code) -> str | None:
    """What a statement defines: "routine", "block", "other"; None for nothing."""
    first = code.keyword(0)
    if first not in _BEGINNINGS:
        return None
    if first == "do":
        return "block"
    at = 3 if code.keyword(1) == "or" else 1
    while code.keyword(at) in ("temp", "temporary", "materialized", "recursive"):
        at += 1
    if first == "create" and code.keyword(at) in _ROUTINES:
        return "routine"
    if code.keyword(at) in _OTHERS and (first == "create" or code.keyword(at) == "policy"):
        return "other"
    return None
