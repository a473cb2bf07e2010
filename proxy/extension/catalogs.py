"""The system catalogs as they would be if pg_background were the C extension.

Invariant: a query sees more, and nothing is stored. In statements that begin as queries, a subquery
with the same columns takes the place of these relations in FROM. So views and functions that the
client defines are not affected, and what is not recognised for certain goes to the server as it
came. Four relations are replaced:

- ``pg_extension`` lists the extension; in a query that mentions it, ``pg_depend`` has the
  extension's objects, and ``pg_description`` its comment (psql's ``\\dx`` and ``\\dx+``);
- ``pg_stat_activity`` says ``pg_background`` as the ``backend_type`` of jobs.

Dumps must see what is really there: pg_dump is known by its application_name, and queries that use
system columns (pg_dump's do) are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

from proxy.extension import installed
from proxy.sql.lexer import RESERVED, Kind, identifier
from proxy.sql.tokens import NESTING, Tokens
from proxy.statements.plan import Piece, Rewrite, Substitute
from proxy.statements.triggers import PG_EXTENSION, PG_STAT_ACTIVITY

TOOLS: Final = frozenset((b"pg_dump", b"pg_dumpall", b"pg_restore", b"pg_upgrade"))
"""The application_name of clients that see what is there."""

_NEWEST: Final = 190000
"""Of later servers the columns are not known."""

# A subquery has none of these.
_SYSTEM_COLUMNS: Final = frozenset((b"tableoid", b"ctid", b"xmin", b"xmax", b"cmin", b"cmax"))
# FROM in these is not a clause.
_FROM_IN: Final = frozenset(("extract", "trim", "substring", "overlay", "position"))


def analyze(statement: Tokens, *, server_version: int) -> Substitute | None:
    """A query with the catalogs replaced, None if it is to go as it is.

    Args:
        statement: one, as the session's server reads it.
        server_version: as server_version_num, e.g. 150004.
    """
    lower = statement.sql.lower()
    if PG_EXTENSION not in lower and PG_STAT_ACTIVITY not in lower:
        return None
    if not 100000 <= server_version < _NEWEST:
        return None
    relations = _relations(server_version // 10000)
    if PG_EXTENSION not in lower:
        relations = {PG_STAT_ACTIVITY: relations[PG_STAT_ACTIVITY]}
    return _Query(statement).replaced(relations)


class _Query(Tokens):
    """The tokens of a statement; indices count them."""

    def __init__(self, statement: Tokens) -> None:
        super().__init__(statement.sql, statement.tokens, statement.encoding)
        # U&"…" is not a name here.
        self.names = [identifier(self.sql, token, self.encoding) for token in self.tokens]
        self.openings, self.clauses = self.surroundings()

    def replaced(self, relations: Mapping[bytes, bytes]) -> Substitute | None:
        if not self.is_query() or self.locks_rows():
            return None
        if not _SYSTEM_COLUMNS.isdisjoint(name for name in self.names if name is not None):
            return None
        pieces: list[Piece] = []
        done = count = 0
        for at, name in enumerate(self.names):
            subquery = relations.get(name or b"")
            if subquery is None:
                continue
            first = self.first_of_relation(at)
            if first is None or (first < at and self.text(at + 1) == b"."):
                return None
            if self.is_common_table_expression(at):
                return None
            if not self.is_relation(first, at):
                continue
            count += 1
            if count > _MAX_REPLACED:
                return None
            start = self.start(first)
            alias = b"" if self.has_alias(at + 1) else b" AS " + (name or b"")
            pieces += [Piece(done, start), Piece(start, start, b"(%b)%b" % (subquery, alias))]
            done = self.end(at)
        if not pieces:
            return None
        pieces.append(Piece(done, len(self.sql)))
        return Substitute(Rewrite(self.sql, tuple(pieces)))

    def is_query(self) -> bool:
        first = next((at for at, text in enumerate(self.texts) if text != b"("), 0)
        return self.keyword(first) in ("select", "with")

    def locks_rows(self) -> bool:
        """FOR UPDATE and its kin, which want a table."""
        return any(
            self.keyword(at) == "for" and self.keyword(at + 1) in ("update", "share", "no", "key")
            for at in range(self.count)
        )

    def first_of_relation(self, index: int) -> int | None:
        """Where the relation's name begins, None if it is of another schema."""
        if self.text(index - 1) != b".":
            return index
        if self.names[index - 2] == b"pg_catalog" and self.text(index - 3) != b".":
            return index - 2
        return None

    def is_common_table_expression(self, index: int) -> bool:
        return self.keyword(index + 1) == "as" and (
            self.text(index + 2) == b"(" or self.keyword(index + 2) in ("materialized", "not")
        )

    def is_relation(self, first: int, last: int) -> bool:
        """Whether what these tokens name is an item of FROM, and a plain one."""
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
        """Whether this FROM is that of a query."""
        if self.keyword(index - 1) in ("distinct", "delete"):
            return False
        return self.keyword(self.openings[index] - 1) not in _FROM_IN

    def surroundings(self) -> tuple[list[int], list[int]]:
        """Of each token the bracket around it, and the word that begins the clause that it is in,
        in the same brackets; -1 for none."""
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
        return openings, clauses

    def has_alias(self, index: int) -> bool:
        if self.text(index) == b"" or self.tokens[index].kind not in _NAMES:
            return False
        return self.keyword(index) == "as" or self.keyword(index) not in RESERVED


_NAMES: Final = (Kind.IDENTIFIER, Kind.QUOTED_IDENTIFIER)

# A subquery has kilobytes; no sensible query looks into a catalog this often.
_MAX_REPLACED: Final = 64

# A comma behind ON is one of FROM.
_CLAUSES: Final = frozenset(
    ("select", "from", "where", "group", "having", "window", "order", "limit", "offset", "fetch")
)


@functools.cache
def _relations(major: int) -> dict[bytes, bytes]:
    """What takes the place of each relation, by the server's major version."""
    marker = f"(SELECT p.* {installed.FIND}) x"
    version = installed.VERSION.replace("p.", "x.")
    # As the catalog's own columns, or the two could not be sorted together.
    c = ' COLLATE pg_catalog."C"' if major >= 12 else ""
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
        )
    )
    texts = {
        "pg_extension": "SELECT r.oid, r.extname, r.extowner, r.extnamespace, r.extrelocatable,"
        " r.extversion, r.extconfig, r.extcondition FROM pg_catalog.pg_extension r UNION ALL"
        f" SELECT x.oid, CAST('{installed.NAME}' AS pg_catalog.name), x.proowner, x.pronamespace,"
        f" true, {version}{c}, CAST(NULL AS pg_catalog.oid[]),"
        f" CAST(NULL AS pg_catalog.text[]) FROM {marker} WHERE NOT {installed.REALLY}",
        "pg_depend": "SELECT d.classid, d.objid, d.objsubid, d.refclassid, d.refobjid,"
        " d.refobjsubid, d.deptype FROM pg_catalog.pg_depend d UNION ALL"
        f" SELECT m.classid, m.objid, 0, {extension_class}, x.oid, 0,"
        f" CAST('e' AS pg_catalog.\"char\") FROM {marker}, LATERAL ({members}) m",
        "pg_description": "SELECT d.objoid, d.classoid, d.objsubid, d.description"
        " FROM pg_catalog.pg_description d UNION ALL"
        f" SELECT x.oid, {extension_class}, 0, d.description FROM {marker},"
        " pg_catalog.pg_description d WHERE d.objoid OPERATOR(pg_catalog.=) x.oid"
        " AND d.objsubid OPERATOR(pg_catalog.=) 0 AND d.classoid OPERATOR(pg_catalog.=)"
        " CAST('pg_catalog.pg_proc' AS pg_catalog.regclass)",
        "pg_stat_activity": _activity(major),
    }
    return {name.encode(): text.encode() for name, text in texts.items()}


def _activity(major: int) -> str:
    """pg_stat_activity, where jobs are known by their application_name."""
    columns = [
        *("datid", "datname", "pid"),
        *(["leader_pid"] if major >= 13 else []),
        *("usesysid", "usename", "application_name", "client_addr", "client_hostname"),
        *("client_port", "backend_start", "xact_start", "query_start", "state_change"),
        *("wait_event_type", "wait_event", "state", "backend_xid", "backend_xmin"),
        *(["query_id"] if major >= 14 else []),
        "query",
    ]
    is_job = (
        "a.backend_type OPERATOR(pg_catalog.=) 'client backend' AND (a.application_name"
        f" OPERATOR(pg_catalog.=) '{installed.NAME}' OR pg_catalog.left(a.application_name,"
        f" {len(installed.NAME) + 1}) OPERATOR(pg_catalog.=) '{installed.NAME}:')"
    )
    return (
        f"SELECT {', '.join(f'a.{column}' for column in columns)},"
        f" CASE WHEN {is_job} THEN '{installed.NAME}' ELSE a.backend_type END AS backend_type"
        " FROM pg_catalog.pg_stat_activity a"
    )
