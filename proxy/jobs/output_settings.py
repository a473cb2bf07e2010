"""Keeps output settings (DateStyle, bytea_output, …) that a job changes away from its result.

Invariant: a job's values are read with the settings that the caller had at launch, so none may be
printed with others. Where a job's text may change them, its last statement becomes a cursor: the
query runs to its end with the job's settings, then its rows are printed with the caller's, all in
the job's one transaction. Where no such cursor is possible, or a function changes settings out of
sight, they are compared afterwards, and the result ends in an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from protocol.errors import FEATURE_NOT_SUPPORTED, ProtocolViolation, SQLError
from protocol.messages import Field
from proxy.sql.lexer import MAX_TOKENS, Statement, Token, identifier, keyword
from proxy.sql.rewrite import Piece
from proxy.sql.text import literal

_NAMES: Final = (
    b"client_encoding",
    b"bytea_output",
    b"datestyle",
    b"extra_float_digits",
    b"intervalstyle",
    b"lc_monetary",
    b"timezone",
)

COLUMNS: Final = b", ".join(b"pg_catalog.current_setting(%b)" % literal(name) for name in _NAMES)
"""Columns of a SELECT: the present settings."""

_SETS: Final = frozenset((*_NAMES, b"time", b"names"))
"""Words that begin a SET of one of them."""

_HIDDEN: Final = (b"set_config", b"pg_settings", b'u&"')
"""Texts of statements that change settings themselves, or use names that are not read."""

_LONG: Final = 64 * 1024
"""In bytes."""

_MAY_SET: Final = frozenset(
    ("call", "copy", "discard", "do", "execute", "explain", "fetch", "load", "move", "reset")
)
# A query may begin with a bracket: its first word is empty.
_QUERIES: Final = frozenset(("", "select", "table", "values", "with"))
_RETURNS: Final = frozenset(("call", "execute", "fetch", *_QUERIES))
_CHANGES: Final = frozenset(("delete", "insert", "merge", "update"))
_IN_A_BLOCK: Final = frozenset((*_QUERIES, *_CHANGES))
"""Statements that certainly do not refuse a transaction block."""

_KNOWN: Final = re.compile(
    rb"pg_(try_)?advisory_\w+|pg_sleep(_for|_until)?|pg_notify|pg_backend_pid|pg_background_\w+"
    rb"|now|clock_timestamp|generate_series|nextval|setval|count|sum|min|max|avg"
    rb"|select|values|with|as|from|in|exists|any|all|and|or|not|coalesce|greatest|least"
)
"""Common functions that change no setting, and key words in front of brackets. Statements with
no others are sent unchanged, as pg_stat_activity should show them."""

_UNAFFECTED: Final = frozenset(
    (
        # bool, "char", name, integers, reg…, text, oid, tid, xid, cid, vectors, json, inet and its
        # kin, bpchar, varchar, bit, varbit, numeric, void, uuid, pg_lsn, tsvector, jsonb, jsonpath;
        *(16, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 114, 650, 774, 829, 869, 1042),
        *(1043, 1560, 1562, 1700, 2202, 2203, 2204, 2205, 2206, 2278, 2950, 3220, 3614, 3615, 3802),
        *(4072, 4089, 4096, 5069),
        # and arrays of them, and ranges of integers and numeric.
        *(199, 651, 775, 1000, 1002, 1003, 1005, 1007, 1009, 1010, 1011, 1012, 1014, 1015, 1016),
        *(1028, 1040, 1041, 1231, 1561, 1563, 2951, 3221, 3643, 3807, 3904, 3906, 3926),
    )
)
"""Types whose text depends on no setting but client_encoding."""

_CURSOR: Final = b'"pg_background result"'
_DECLARE: Final = b"DECLARE %b SCROLL CURSOR FOR WITH %b AS %%b(" % (_CURSOR, _CURSOR)
# The first MOVE runs the query; the second only returns to the first row, since rows are kept
# (MATERIALIZED). WITH HOLD would run it at the commit, too late to fail by statement_timeout.
_FETCH: Final = (
    b") TABLE %b; MOVE ALL IN %b; SELECT %%b; MOVE ABSOLUTE 0 IN %b; FETCH ALL IN %b"
    % ((_CURSOR,) * 4)
)
_BEHIND_DECLARE: Final = 4
"""Statements behind DECLARE; the last returns the rows."""

_ENCODING: Final = 2
"""The bit of client_encoding among the differences; 1 is that of all others."""


class OutputSettings:
    """The output settings of one job, from its text to its end.

    Attributes:
        callers: the caller's, with which the job begins (`read`); empty if not known.
        compares: whether a statement behind the job's compares them.
    """

    def __init__(self, parameters: dict[bytes, bytes]) -> None:
        """`parameters`: those of the job's backend."""
        self.callers: Sequence[bytes] = ()
        self.compares = False
        self._parameters = parameters
        # Whether a statement before the last may change them, or runs code of others.
        self._may_change = False
        self._runs_code = False
        self._differ = 0
        # The index of the cursor's statement.
        self._cursor: int | None = None

    # The text

    def look(self, sql: bytes, statement: Statement) -> None:
        """Examine a statement before the last."""
        self._may_change = self._may_change or _may_change(sql, statement)
        self._runs_code = self._runs_code or _runs_code(sql, statement)

    def may_need_callers(self, sql: bytes, last: Statement) -> bool:
        """Whether the caller's must be known before the text is sent."""
        return self._may_change or self._runs_code or _is_hidden(sql, last)

    def last_statement(self, sql: bytes, last: Statement, place: int) -> list[Piece]:
        """What is sent in place of the last statement.

        Args:
            sql: the job's string.
            last: its last statement.
            place: number of statements before that.
        """
        may_change = self._may_change or _is_hidden(sql, last)
        if may_change and _can_be_cursor(sql, last):
            version = re.match(rb"\d*", self._parameters.get(b"server_version", b""))
            kept = b"MATERIALIZED " if version and int(version[0] or b"0") >= 12 else b""
            self._cursor = place
            return [
                Piece(last.start, last.start, _DECLARE % kept),
                Piece(last.start, last.end),
                Piece(last.end, last.end, _FETCH % _restoration(self.callers)),
            ]
        # A single statement may be one that refuses a transaction block.
        is_in_a_block = place or keyword(sql, last.tokens[0]) in _IN_A_BLOCK
        if not ((may_change or self._runs_code) and is_in_a_block and _may_return_rows(sql, last)):
            return [Piece(last.start, len(sql))]
        self.compares = True
        comparison = Piece(last.end, last.end, b"; " + _comparison(self.callers))
        return [Piece(last.start, last.end), comparison]

    @property
    def added_statements(self) -> int:
        """Number of our statements between the last one and the one that returns its rows."""
        return 0 if self._cursor is None else _BEHIND_DECLARE

    def tag(self, place: int, tag: bytes) -> bytes | None:
        """The command tag for the caller of one of the statements; None if it is ours."""
        if self._cursor is None or place < self._cursor:
            return tag
        if place < self._cursor + _BEHIND_DECLARE:
            return None
        return tag.replace(b"FETCH", b"SELECT")

    # Result

    def question(self, columns: Sequence[Field]) -> bytes | None:
        """A query to send behind a job that returns these columns; None if none is needed."""
        if self._cursor is not None or self.compares or not _depends(columns):
            return None
        self.compares = True
        return _comparison(self.callers)

    def compared(self, tag: bytes) -> None:
        """The comparison has ended with this command tag."""
        self._differ |= int(tag.rpartition(b" ")[2])

    def reported_encoding(self, encoding: bytes) -> None:
        """The server has reported a change of client_encoding."""
        if not self.compares:
            self._differ = _ENCODING * (encoding != self.callers[0])

    def fault(self, columns: Sequence[Field]) -> SQLError | None:
        """0A000 if these columns were printed with other settings, as far as is known."""
        is_wrong = self._differ & _ENCODING or (self._differ and _depends(columns))
        if self._cursor is not None or not is_wrong:
            return None
        return SQLError(
            FEATURE_NOT_SUPPORTED,
            "the job's result is printed with other settings than the session's",
            detail="The job's SQL has changed DateStyle, IntervalStyle, TimeZone, bytea_output,"
            " extra_float_digits, lc_monetary or client_encoding. It has run to its end.",
            hint="Set it back before the last statement, let the last statement be a plain SELECT"
            " behind the SET, or cast the columns to text.",
        )


def read(row: Sequence[bytes | None]) -> tuple[bytes, ...]:
    """The values of `COLUMNS`. Raises ProtocolViolation."""
    if len(row) != len(_NAMES):
        raise ProtocolViolation("the server's answer has not all output settings")
    return tuple(value or b"" for value in row)


def _may_change(sql: bytes, statement: Statement) -> bool:
    """Whether a statement before the last changes them itself, or may do so by what it calls."""
    if _is_hidden(sql, statement):
        return True
    first = keyword(sql, statement.tokens[0])
    if first == "set":
        # SET [LOCAL | SESSION] name, SET TIME ZONE, SET NAMES.
        words = (identifier(sql, token) for token in statement.tokens[1:3])
        return any(word is not None and word.lower() in _SETS for word in words)
    return first in _MAY_SET or (first in _QUERIES and _calls(sql, statement.tokens))


def _calls(sql: bytes, tokens: Sequence[Token]) -> bool:
    """Whether it calls functions that are not known."""
    if len(tokens) > MAX_TOKENS:
        return True
    for token, bracket in pairwise(tokens):
        if sql[bracket.start : bracket.end] == b"(":
            name = identifier(sql, token)
            if name is not None and not _KNOWN.fullmatch(name):
                return True
    return False


def _runs_code(sql: bytes, statement: Statement) -> bool:
    """Whether it is more than SET or a query of known functions: code of triggers, views or
    functions may change settings for the transaction."""
    first = keyword(sql, statement.tokens[0])
    reads = any(keyword(sql, token) == "from" for token in statement.tokens)
    return first not in ("set", "select", "values") or reads


def _is_hidden(sql: bytes, statement: Statement) -> bool:
    """Whether it contains one of `_HIDDEN`. A very long constant is data, and is not searched."""
    start, end, tokens = statement
    if end - start <= _LONG or len(tokens) > MAX_TOKENS:
        lower = sql[start:end].lower()
    else:
        long = [token for token in tokens if token.end - token.start > _LONG]
        ends = [start, *(token.end for token in long)]
        starts = [*(token.start for token in long), end]
        lower = b"?".join([sql[a:b] for a, b in zip(ends, starts, strict=True)]).lower()
    return any(word in lower for word in _HIDDEN)


def _may_return_rows(sql: bytes, statement: Statement) -> bool:
    """Whether it may have a result with columns other than text."""
    first = keyword(sql, statement.tokens[0])
    return first in _RETURNS or any(
        keyword(sql, token) == "returning" for token in statement.tokens
    )


def _can_be_cursor(sql: bytes, statement: Statement) -> bool:
    """Whether it is certainly a query that may stand in brackets."""
    tokens = statement.tokens
    if len(tokens) > MAX_TOKENS:
        return False
    depth = 0
    first = before = ""
    for token in tokens:
        word = keyword(sql, token)
        mark = sql[token.start : token.end] if token.end - token.start == 1 else b""
        depth += (mark == b"(") - (mark == b")")
        locks = word == "update" and before in ("for", "key")
        if depth < 0 or word == "into" or (word in _CHANGES and not locks):
            return False
        if not first and mark != b"(":
            first = word or "?"
        before = word
    return first in _QUERIES and not depth


def _restoration(callers: Sequence[bytes]) -> bytes:
    """The columns of a SELECT that restores them for the rest of the transaction."""
    return b", ".join(
        b"pg_catalog.set_config(%b, %b, true)" % (literal(name), literal(own))
        for name, own in zip(_NAMES, callers, strict=True)
    )


def _comparison(callers: Sequence[bytes]) -> bytes:
    """A query whose command tag tells which settings differ; its rows have no columns."""
    encoding, *others = (
        b"pg_catalog.current_setting(%b) OPERATOR(pg_catalog.<>) %b" % (literal(name), literal(own))
        for name, own in zip(_NAMES, callers, strict=True)
    )
    return (
        b"SELECT FROM pg_catalog.generate_series(1, CASE WHEN %b THEN %d WHEN %b THEN 1 ELSE 0 END)"
        % (encoding, _ENCODING, b" OR ".join(others))
    )


def _depends(columns: Iterable[Field]) -> bool:
    """Whether settings affect how values of these columns are printed."""
    return any(column.type_oid not in _UNAFFECTED for column in columns)
