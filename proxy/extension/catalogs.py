"""The system catalogs as they would be if pg_background were the C extension.

Invariant: a query sees more, and nothing is stored. In statements that begin as queries, rows of
the same type replace these relations in FROM, if the query can show a difference. So views and
functions that the client defines are not affected, and what is not recognised for certain goes to
the server unchanged. The relations:

- ``pg_extension`` lists the extension; in a query that mentions it, ``pg_depend`` has the
  extension's objects, and ``pg_description`` its comment (psql's ``\\dx`` and ``\\dx+``);
- ``pg_stat_activity`` shows the ``backend_type`` of jobs as ``pg_background``; in the query's own
  row, ``query`` is what the client has sent;
- ``pg_prepared_statements`` and ``pg_cursors`` show the client's names and texts for what has a
  call, if the session has any (`hidden`).

Columns are the server's: our rows are made by jsonb_populate_record(), which knows them. Dumps must
see the real catalogs: pg_dump is recognised by its application_name, and queries with system
columns (such as pg_dump's) are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from proxy.extension import installed
from proxy.sql.lexer import RESERVED, Kind, identifier
from proxy.sql.rewrite import Change, with_changes
from proxy.sql.text import literal
from proxy.sql.tokens import NESTING, Tokens
from proxy.statements.hidden import PREFIX, TEXT, TEXT_TAG
from proxy.statements.mentions import (
    PG_CURSORS,
    PG_EXTENSION,
    PG_PREPARED_STATEMENTS,
    PG_STAT_ACTIVITY,
)
from proxy.statements.plan import Substitute

TOOLS: Final = frozenset((b"pg_dump", b"pg_dumpall", b"pg_restore", b"pg_upgrade"))
"""The application_name of clients that see the real catalogs."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """How a query recognises jobs.

    Attributes:
        pids: of the backends of running jobs.
        by_name: whether there may be others, recognised by application_name only: those of other
            worker processes, and those that start before a prepared statement is executed.
    """

    pids: Collection[int]
    by_name: bool


# Subqueries have none of these.
_SYSTEM_COLUMNS: Final = frozenset((b"tableoid", b"ctid", b"xmin", b"xmax", b"cmin", b"cmax"))
# In these, FROM begins no clause.
_FROM_IN: Final = frozenset(("extract", "trim", "substring", "overlay", "position"))


def analyze(
    statement: Tokens, *, server_version: int, jobs: Jobs, sent: bytes, has_stand_ins: bool = False
) -> Substitute | None:
    """A query with its catalogs replaced; None if it must go unchanged.

    Args:
        statement: one statement, as the session's server reads it.
        server_version: as server_version_num, e.g. 150004.
        jobs: which backends are jobs.
        sent: the text of the message that it is in, for pg_stat_activity.
        has_stand_ins: whether the session may have prepared statements or portals with calls.
    """
    lower = statement.sql.lower()
    if not any(relation in lower for relation in _SHOWING):
        return None
    major = server_version // 10000
    return Query(statement).replaced(major, jobs, sent, has_stand_ins=has_stand_ins)


@dataclass(frozen=True, slots=True)
class Reference:
    """One of our relations in FROM: its tokens, and those of its alias, if any."""

    relation: bytes
    first: int
    last: int
    alias: int | None


class Query(Tokens):
    """The tokens of a statement, by index."""

    def __init__(self, statement: Tokens) -> None:
        super().__init__(statement.sql, statement.tokens, statement.encoding)
        self.names = [identifier(self.sql, token, self.encoding) for token in self.tokens]
        self.openings, self.clauses = self.surroundings()

    def replaced(
        self, major: int, jobs: Jobs, sent: bytes, *, has_stand_ins: bool
    ) -> Substitute | None:
        if not self.is_query() or self.has_other_needs():
            return None
        references = self.references()
        if references is None:
            return None
        sources = self.extension_sources(major)
        if sources is None:
            return None
        activity = [each for each in references if each.relation == PG_STAT_ACTIVITY]
        if (jobs.pids or jobs.by_name) and self.shows(b"backend_type", activity):
            text = sent if self.shows(b"query", activity) else None
            sources[PG_STAT_ACTIVITY] = _activity(major, jobs, text)
        if has_stand_ins:
            sources.update(_stand_ins(major))
        return self.with_sources(sources, references)

    def extension_sources(self, major: int) -> dict[bytes, bytes] | None:
        """Replacements for pg_extension, if mentioned, and related catalogs; None if unfaithful."""
        if PG_EXTENSION not in self.sql.lower():  # psql's \\dx+ has it in a constant only
            return {}
        with_oid = major < 12 and b"oid" in self.names
        # `*` does not include the OID.
        if self.may_group_by_key() or (with_oid and self.has_star()):
            return None
        return dict(_extension(major, with_oid))

    def has_other_needs(self) -> bool:
        """Whether it locks rows, uses system columns, or has names that are not read."""
        return (
            self.locks_rows()
            or self.has_unread_names()
            or not _SYSTEM_COLUMNS.isdisjoint(name for name in self.names if name is not None)
        )

    def references(self) -> list[Reference] | None:
        """References to our relations; None if some are uncertain, or there are too many."""
        found: list[Reference] = []
        for at, name in enumerate(self.names):
            if name not in _RELATIONS:
                continue
            first = self.first_of_relation(at)
            if first is None or (first < at and self.text(at + 1) == b"."):
                return None
            if self.is_common_table_expression(at):
                return None
            if not self.is_relation(first, at):
                continue
            alias = None
            if self.has_alias(at + 1):
                alias = at + 2 if self.keyword(at + 1) == "as" else at + 1
            found.append(Reference(name, first, at, alias))
        if len(found) > _MAX_REPLACED:
            return None
        return found

    def with_sources(
        self, sources: Mapping[bytes, bytes], references: Iterable[Reference]
    ) -> Substitute | None:
        changes = self.changes(sources, references)
        return Substitute(with_changes(self.sql, changes)) if changes else None

    def changes(
        self, sources: Mapping[bytes, bytes], references: Iterable[Reference]
    ) -> list[Change] | None:
        """The replacements of these relations; None if the result would differ."""
        changes: list[Change] = []
        for each in references:
            source = sources.get(each.relation)
            if source is None:
                continue
            if source.startswith(b"(") and self.uses_row(each):
                return None  # rows of a subquery have no named type
            alias = b" AS " + each.relation if each.alias is None else b""
            changes.append((self.start(each.first), self.end(each.last), source + alias))
        return changes

    # What could show a difference

    def shows(self, column: bytes, references: Collection[Reference]) -> bool:
        """Whether the query may use a column of these."""
        return bool(references) and (
            column in self.names
            or self.has_star()
            or any(self.keyword(at) == "natural" for at in range(self.count))
            or any(self.renames(each) or self.uses_row(each) for each in references)
        )

    def has_star(self) -> bool:
        """Whether there is a star other than count(*); it may multiply."""
        return any(
            text == b"*" and not (self.text(at - 1) == b"(" and self.text(at + 1) == b")")
            for at, text in enumerate(self.texts)
        )

    def renames(self, reference: Reference) -> bool:
        """Whether its columns are renamed."""
        return reference.alias is not None and self.text(reference.alias + 1) == b"("

    def uses_row(self, reference: Reference) -> bool:
        """Whether its name may stand for a whole row somewhere."""
        name = reference.relation
        if reference.alias is not None:
            name = self.names[reference.alias] or b""
        return any(
            each == name
            and self.text(at + 1) != b"."
            and self.text(at - 1) != b"."
            and not self.is_in_from(at)
            for at, each in enumerate(self.names)
        )

    def is_in_from(self, index: int) -> bool:
        """Whether this is an item of FROM or its alias, not within ON."""
        before = self.text(index - 1) if self.keyword(index - 1) == "as" else None
        first = index - 1 if before is not None else index
        return self.is_relation(first, index) or (
            self.names[first - 1] is not None
            and self.keyword(self.clauses[index]) == "from"
            and self.keyword(first - 1) not in RESERVED
        )

    def may_group_by_key(self) -> bool:
        """Whether it may group by pg_extension's primary key, on which all columns depend."""
        if not any(self.keyword(at) == "group" for at in range(self.count)):
            return False
        return self.has_star() or any(
            name == b"oid" and self.clause_of(at) not in ("from", "where")
            for at, name in enumerate(self.names)
        )

    def clause_of(self, index: int) -> str:
        """The word that begins the clause of a token, in its brackets or around them."""
        while self.clauses[index] < 0 and self.openings[index] >= 0:
            index = self.openings[index]
        return self.keyword(self.clauses[index])

    # Tokens

    def has_unread_names(self) -> bool:
        """Whether it has U&"…", which could be any name."""
        return any(
            token.kind is Kind.QUOTED_IDENTIFIER and name is None
            for token, name in zip(self.tokens, self.names, strict=True)
        )

    def is_query(self) -> bool:
        first = next((at for at, text in enumerate(self.texts) if text != b"("), 0)
        return self.keyword(first) in ("select", "with")

    def locks_rows(self) -> bool:
        """Whether it has FOR UPDATE or the like, which needs a table."""
        return any(
            self.keyword(at) == "for" and self.keyword(at + 1) in ("update", "share", "no", "key")
            for at in range(self.count)
        )

    def first_of_relation(self, index: int) -> int | None:
        """Where the relation's name begins; None if its schema is another."""
        if self.text(index - 1) != b".":
            return index
        if self.names[index - 2] == b"pg_catalog" and self.text(index - 3) != b".":
            return index - 2
        return None

    def is_common_table_expression(self, index: int) -> bool:
        if self.text(index + 1) == b"(":  # column names
            index = self.closings.get(index + 1, index)
        return self.keyword(index + 1) == "as" and (
            self.text(index + 2) == b"(" or self.keyword(index + 2) in ("materialized", "not")
        )

    def is_relation(self, first: int, last: int) -> bool:
        """Whether these tokens are an item of FROM, and a plain one."""
        if self.text(last + 1) in (b"(", b".", b"*") or self.keyword(last + 1) == "tablesample":
            return False
        before = self.keyword(first - 1)
        if before == "join":
            return True
        if before == "from":
            return self.begins_from(first - 1)
        if self.text(first - 1) == b",":
            clause = self.clauses[first - 1]
            return self.keyword(clause) == "from" and self.begins_from(clause)
        return False

    def begins_from(self, index: int) -> bool:
        """Whether this FROM belongs to a query."""
        if self.keyword(index - 1) in ("distinct", "delete"):
            return False
        return self.keyword(self.openings[index] - 1) not in _FROM_IN

    def surroundings(self) -> tuple[list[int], list[int]]:
        """For each token its bracket, and the word that begins its clause in that; -1 for none."""
        openings: list[int] = []
        clauses: list[int] = []
        around = [(-1, -1)]
        for at, text in enumerate(self.texts):
            nesting = NESTING.get(text, 0)
            if nesting < 0 and len(around) > 1:
                around.pop()
            opening, clause = around[-1]
            openings.append(opening)
            clauses.append(clause)
            if nesting > 0:
                around.append((at, -1))
            elif self.keyword(at) in _CLAUSES:
                around[-1] = (opening, at)
            elif text == b";":
                around[-1] = (opening, -1)
        return openings, clauses

    def has_alias(self, index: int) -> bool:
        if self.text(index) == b"" or self.tokens[index].kind not in _NAMES:
            return False
        if self.keyword(index) == "as":
            return self.text(index + 1) != b""
        return self.keyword(index) not in RESERVED


_NAMES: Final = (Kind.IDENTIFIER, Kind.QUOTED_IDENTIFIER)

# A subquery has kilobytes, and no sensible query uses a catalog this often.
_MAX_REPLACED: Final = 64

# A comma after ON belongs to FROM.
_CLAUSES: Final = frozenset(
    ("select", "from", "where", "group", "having", "window", "order", "limit", "offset", "fetch")
)


_SHOWING: Final = (PG_EXTENSION, PG_STAT_ACTIVITY, PG_PREPARED_STATEMENTS, PG_CURSORS)
_RELATIONS: Final = (*_SHOWING, b"pg_depend", b"pg_description")


@functools.cache
def _extension(major: int, with_oid: bool) -> dict[bytes, bytes]:
    """Replacements for pg_extension and related catalogs.

    Args:
        major: the server's version.
        with_oid: whether pg_extension has its hidden column, as before version 12.
    """
    marker = f"(SELECT p.oid, p.proowner, p.pronamespace, p.prosrc {installed.FIND}) x"
    version = installed.VERSION.replace("p.", "x.")
    extension_class = (
        "CAST(CAST('pg_catalog.pg_extension' AS pg_catalog.regclass) AS pg_catalog.oid)"
    )
    members = " UNION ALL ".join(
        f"SELECT CAST(CAST('pg_catalog.{catalog}' AS pg_catalog.regclass) AS pg_catalog.oid)"
        f" AS classid, {oid} AS objid {source('x.pronamespace')}"
        for catalog, oid, source in (
            ("pg_proc", "p.oid", installed.functions),
            ("pg_type", "c.reltype", installed.types),
            ("pg_class", "c.oid", installed.views),
            ("pg_class", "c.oid", installed.tables),
        )
    )
    extension = _made(
        "pg_extension",
        oid="x.oid",
        extname=f"CAST('{installed.NAME}' AS pg_catalog.text)",
        extowner="x.proowner",
        extnamespace="x.pronamespace",
        extrelocatable="true",
        extversion=version,
    )
    member = _made(
        "pg_depend",
        classid="m.classid",
        objid="m.objid",
        objsubid="0",
        refclassid=extension_class,
        refobjid="x.oid",
        refobjsubid="0",
        deptype="CAST('e' AS pg_catalog.text)",
    )
    comment = _made(
        "pg_description",
        objoid="x.oid",
        classoid=extension_class,
        objsubid="0",
        description="d.description",
    )
    extensions = (
        "FROM pg_catalog.pg_extension q",
        f"FROM {marker}, {extension} WHERE NOT {installed.REALLY}",
    )
    return {
        PG_EXTENSION: _rows(extensions, major, ("q.oid, ", "x.oid, ") if with_oid else ("", "")),
        b"pg_depend": _subquery(
            (
                "FROM pg_catalog.pg_depend q",
                f"FROM {marker}, LATERAL ({members}) m, {member}",
            )
        ),
        b"pg_description": _subquery(
            (
                "FROM pg_catalog.pg_description q",
                f"FROM {marker}, pg_catalog.pg_description d, {comment}"
                " WHERE d.objoid OPERATOR(pg_catalog.=) x.oid"
                " AND d.objsubid OPERATOR(pg_catalog.=) 0 AND d.classoid OPERATOR(pg_catalog.=)"
                " CAST('pg_catalog.pg_proc' AS pg_catalog.regclass)",
            )
        ),
    }


def _activity(major: int, jobs: Jobs, sent: bytes | None) -> bytes:
    """The replacement for pg_stat_activity.

    Args:
        major: the server's version.
        jobs: which backends are jobs.
        sent: ``query`` of the session's own row, if the query may use it.
    """
    pids = ",".join(map(str, sorted(jobs.pids)))
    is_job = (
        f"a.pid OPERATOR(pg_catalog.=) ANY (CAST('{{{pids}}}' AS pg_catalog.int4[]))"
        + (f" OR {installed.IS_NAMED}" if jobs.by_name else "")
    ).encode()
    changes = (
        b"CASE WHEN a.backend_type OPERATOR(pg_catalog.=) 'client backend' AND (%b)"
        b' THEN CAST(\'{"backend_type": "%b"}\' AS pg_catalog.jsonb)%b'
        b" ELSE CAST('{}' AS pg_catalog.jsonb) END"
    ) % (is_job, installed.NAME.encode(), b"" if sent is None else _OWN_QUERY % _shown(sent))
    # In between is the client's text, in the client's encoding.
    before, after = _rows(
        (f"FROM pg_catalog.pg_stat_activity a, {_populated('a', '@')}",), major
    ).split(b"@")
    return before + changes + after


# Without track_activities it is empty.
_OWN_QUERY: Final = (
    b" WHEN a.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()"
    b" AND a.query OPERATOR(pg_catalog.<>) ''"
    b" THEN pg_catalog.jsonb_build_object('query', %b)"
)
_ALWAYS_SHOWN: Final = 99
"""Bytes of a query that every server shows: track_activity_query_size is at least 100."""


def _shown(sent: bytes) -> bytes:
    """An expression: as much of a text as pg_stat_activity shows, in whole characters."""
    text = b"CAST(%b AS pg_catalog.text)" % literal(sent)
    if len(sent) <= _ALWAYS_SHOWN and sent.isascii():
        return text
    return (
        b"(SELECT pg_catalog.left(t.sent, n.n) FROM (SELECT %b AS sent,"
        b" CAST(s.setting AS pg_catalog.int4) AS size FROM pg_catalog.pg_settings s"
        b" WHERE s.name OPERATOR(pg_catalog.=) 'track_activity_query_size' OFFSET 0) t,"
        b" LATERAL pg_catalog.generate_series(LEAST(pg_catalog.length(t.sent), t.size), 0, -1) n(n)"
        b" WHERE pg_catalog.octet_length(pg_catalog.left(t.sent, n.n))"
        b" OPERATOR(pg_catalog.<) t.size LIMIT 1)"
    ) % text


@functools.cache
def _stand_ins(major: int) -> dict[bytes, bytes]:
    """Replacements for the catalogs of prepared statements and portals: without hidden names, and
    with the client's text and the stand-in's parameters in place of a guard's."""
    tag = f"pg_catalog.\"substring\"(s.statement, '{TEXT_TAG}')"
    parts = f"s.statement, pg_catalog.concat('$', '{TEXT}', {tag}, '$'), 2"
    shown = f"'statement', pg_catalog.split_part({parts})"
    seen = f"pg_catalog.left(s.name, {len(PREFIX)}) OPERATOR(pg_catalog.<>) '{PREFIX}'"

    def rows(relation: str, join: str, columns: str) -> bytes:
        changes = (
            f"CASE WHEN {tag} IS NULL THEN CAST('{{}}' AS pg_catalog.jsonb)"
            f" ELSE pg_catalog.jsonb_build_object({columns}) END"
        )
        source = f"FROM pg_catalog.{relation} s{join}, {_populated('s', changes)} WHERE {seen}"
        return _rows((source,), major)

    join = (
        " LEFT JOIN pg_catalog.pg_prepared_statements h ON h.name OPERATOR(pg_catalog.=)"
        f" pg_catalog.concat('{PREFIX}', {tag})"
    )
    types = ", 'parameter_types', h.parameter_types"
    return {
        PG_PREPARED_STATEMENTS: rows("pg_prepared_statements", join, shown + types),
        PG_CURSORS: rows("pg_cursors", "", shown),
    }


def _made(relation: str, **columns: str) -> str:
    """A row ``q`` of a relation; columns without an expression are NULL."""
    values = ", ".join(f"'{name}', {value}" for name, value in columns.items())
    base = f"CAST(NULL AS pg_catalog.{relation})"
    return _populated(base, f"pg_catalog.jsonb_build_object({values})")


def _populated(base: str, changes: str) -> str:
    return f"LATERAL pg_catalog.jsonb_populate_record({base}, {changes}) q"


def _rows(sources: Iterable[str], major: int, hidden: Iterable[str] = ("", "")) -> bytes:
    """An item of FROM whose whole rows have the relation's type, where that has arrays.

    Args:
        sources: FROM and WHERE of the rows ``q``.
        major: the server's version.
        hidden: for each source, what a subquery selects besides its columns.
    """
    if major < 14:
        return _subquery(sources, hidden)
    rows = " UNION ALL ".join(f"SELECT q {source}" for source in sources)
    return f"pg_catalog.unnest(ARRAY({rows}))".encode()


def _subquery(sources: Iterable[str], hidden: Iterable[str] = ("", "")) -> bytes:
    """`_rows` as a subquery, so that conditions can use the relation's indexes."""
    parts = zip(sources, hidden, strict=False)
    selects = (f"SELECT {first}q.* {source}" for source, first in parts)
    return f"({' UNION ALL '.join(selects)})".encode()
