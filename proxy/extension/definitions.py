"""Definitions that look for jobs in pg_stat_activity by ``backend_type = 'pg_background'``:
functions, procedures, views, rules, policies and DO blocks.

What a definition reads when it runs is the server's own pg_stat_activity, where a job is a client
backend. So the client gets a notice; or the definition is to read pg_background_stat_activity, the
extension's view, which has the backend_type of jobs.

Invariant: what is found is code, not a comment or a constant of another purpose, and names
pg_stat_activity itself. A definition is changed in the names of relations only, and only if each
piece of its code with such a comparison can be read for certain and shows no column that the view
lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocol.errors import SQLError
from proxy.extension.code import BACKEND_TYPE, Code
from proxy.extension.installed import FIND, NAME, REALLY, STAT_ACTIVITY
from proxy.sql.constants import Said
from proxy.sql.lexer import BudgetError, Kind, LexError
from proxy.sql.rewrite import with_changes
from proxy.sql.tokens import Tokens
from proxy.statements.plan import Substitute
from proxy.statements.triggers import PG_STAT_ACTIVITY

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
"""How SQL begins that a constant within a function may be."""
_DEEPEST: Final = 3
"""Constants in constants that are read as code."""
_MOST_READ: Final = 64 * 1024
_CONSTANT_COST: Final = 2048
"""The bytes of constants within functions that are read, and what each counts for besides."""

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
"""What is done about a definition depends on this: the schema of the extension's view, quoted, NULL
if the session has none; client_min_messages; and whether the server has the C extension, whose jobs
have the backend_type."""

# What is read of code in another language, or of very long code.
_SEEMS_TO_COMPARE: Final = re.compile(
    rb"backend_type[\"']?(?:::\w+)?\s*(?:=|<>|!=|~|like|ilike|not\s+like|(?:not\s+)?in\s*\()\s*"
    rb"[\\\"']+pg_background[\\\"']"
)

# A schema whose name means the same in every constant and encoding.
_PLAIN_SCHEMA: Final = re.compile(rb'\w+|"[\w .-]+"', re.ASCII)

_WITHOUT_NOTICES: Final = frozenset((b"warning", b"error", b"fatal", b"panic"))


@dataclass(frozen=True, slots=True)
class Definition:
    """A definition with such a comparison.

    Attributes:
        sql: the statement.
        relations: where pg_stat_activity stands in it that is to be replaced, and whether it has an
            alias there; None if that is not certain.
    """

    sql: bytes
    relations: tuple[tuple[int, int, bool], ...] | None

    @property
    def undecided(self) -> Substitute:
        """It as it is, until the server has answered `VIEW_QUERY`."""
        return Substitute(with_changes(self.sql, ()), is_undecided=True)

    def with_view(self, schema: bytes) -> Substitute | None:
        """It with the extension's view; None if that is not certain.

        Args:
            schema: of the view, quoted where it must be.
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
        """It as it is, with a notice.

        Args:
            schema: of the view, if it is there.
            rewrites: whether the definition would have been changed if it could be.
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
    """The definition that a statement is, if it has such a comparison.

    Args:
        statement: one, as the session's server reads it.
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
            if piece.said is not None:
                start, end = piece.said.span(start, end)
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
    """Finds the pieces of a definition's code that have a comparison; None stands for one that is
    not certain to be executed as it stands there."""

    def __init__(self, *, conforming: bool) -> None:
        """`conforming`: standard_conforming_strings."""
        self.conforming = conforming
        # Bytes of constants within functions that may still be read.
        self.left = _MOST_READ

    def in_statement(self, code: Code, depth: int = 0) -> Iterator[Code | None]:
        """In a statement, if it is a definition."""
        kind = _kind(code)
        if kind is None:
            return
        if code.compares():
            yield code
        if kind == "other":
            return
        bodies = list(code.bodies())
        # The server takes one.
        body = code.constant(bodies[0]) if len(bodies) == 1 else None
        if body is None:
            return
        if code.language in _LANGUAGES:
            yield from self.in_body(body, depth + 1, code)
        elif _seems_to_compare(body.text):
            yield None

    def in_body(self, body: Said, depth: int, header: Code) -> Iterator[Code | None]:
        """In the body of a function, and in the SQL that it executes."""
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
        """In a constant within a function, if that is SQL and not a message."""
        self.left -= code.end(at) - code.start(at) + _CONSTANT_COST
        said = code.constant(at) if self.left > 0 else None
        if said is None or "raise" in code.statement_words(at):
            return
        try:
            inner = self._code(said)
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

    def _code(self, said: Said, header: Code | None = None) -> Code:
        """Raises LexError, BudgetError."""
        conforming = self.conforming
        tokens = said.tokens(standard_conforming_strings=conforming)
        return Code(tokens, standard_conforming_strings=conforming, said=said, header=header)


def _may_be_executed(constant: bytes) -> bool:
    lower = constant.lower()
    return BACKEND_TYPE in lower and PG_STAT_ACTIVITY in lower


def _seems_to_compare(text: bytes) -> bool:
    lower = text.lower()
    return _may_compare(lower) and _SEEMS_TO_COMPARE.search(lower) is not None


def _kind(code: Code) -> str | None:
    """What a statement defines: "routine", "block", "other"; None if nothing."""
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
