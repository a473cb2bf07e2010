"""Progress reports of a job: ``SELECT pg_background_progress(pct, msg)``.

Invariant: the server gets a DO block that evaluates and type-checks the arguments and sends them
at once in an INFO message. A statement that is more than one such call is not changed.
"""

from __future__ import annotations

from typing import Final

from protocol.messages import NoticeResponse
from proxy.jobs.registry import TEXT_SIZE, shortened
from proxy.sql.lexer import MAX_TOKENS, Statement, identifier, keyword
from proxy.sql.rewrite import Piece
from proxy.sql.text import do_block, literal
from proxy.sql.tokens import NotRecognizedError, Tokens

_FUNCTIONS: Final = (b"pg_background_progress", b"pg_background_report_progress")

_SHORTEST: Final = 5
"""Tokens: SELECT, the name, brackets, and pct."""

# Each parameter, and what resolves and converts an argument as it would.
_PARAMETERS: Final = {
    "pct": (b"CAST(pg_catalog.int4up(", b") AS pg_catalog.text)"),
    "msg": (b"pg_catalog.textcat('=', pg_catalog.textcat(", b", ''))"),
}

# A query in a loop, so that the arguments keep their place: they may use aggregates and produce
# several rows. In them, columns take precedence over variables of the block.
_BLOCK: Final = (
    b"#variable_conflict use_column\n"
    b"DECLARE pg_background_report pg_catalog.record;"
    b" BEGIN FOR pg_background_report IN SELECT pg_catalog.concat(%b) AS message LOOP"
    b" RAISE INFO USING MESSAGE = pg_background_report.message; END LOOP; END"
)


def progress_statement(
    sql: bytes, statement: Statement, marker: bytes, *, encoding: str | None = None
) -> tuple[Piece, ...] | None:
    """The block for a statement, whose message parse_progress() reads.

    Args:
        sql: the job's string.
        statement: one of those that it was split into.
        marker: an unguessable word of ASCII letters and digits.
        encoding: client_encoding, by PostgreSQL's name.

    Returns:
        None if the statement is anything but one such call.
    """
    if len(statement.tokens) > MAX_TOKENS or not _begins_as_report(sql, statement, encoding):
        return None
    try:
        given = _arguments(Tokens(sql, statement.tokens, encoding))
    except NotRecognizedError:
        return None
    start = statement.start
    before, after = do_block(_BLOCK % b"\0").split(b"\0")
    pieces = [Piece(start, start, before + literal(marker + b" "))]
    for name, between in (("pct", b", "), ("msg", b", ' ', ")):
        opening, closing = _PARAMETERS[name]
        if name in given:
            first, end = given[name]
            pieces.append(Piece(first, first, between + opening))
            pieces.append(Piece(first, end))
            pieces.append(Piece(end, end, closing))
    return (*pieces, Piece(start, start, after if "msg" in given else b", ' '" + after))


def _begins_as_report(sql: bytes, statement: Statement, encoding: str | None) -> bool:
    """A quick check of its first tokens: the text may be long."""
    tokens = statement.tokens
    if keyword(sql, tokens[0]) != "select" or len(tokens) < _SHORTEST:
        return False
    at = 2 if keyword(sql, tokens[1]) == "all" else 1
    while at + 2 < len(tokens) and sql[tokens[at + 1].start : tokens[at + 1].end] == b".":
        at += 2
    return identifier(sql, tokens[at], encoding) in _FUNCTIONS


def parse_progress(message: bytes, marker: bytes) -> tuple[int | None, bytes | None]:
    """The pct, not clamped, and the msg in a message that begins with the marker; None for NULL.

    The message: the marker, a blank, pct in digits or nothing, a blank, and ``=`` and msg, or none.
    """
    pct, _, text = message[len(marker) + 1 :].partition(b" ")
    return int(pct) if pct else None, text[1:] if text else None


def _arguments(tokens: Tokens) -> dict[str, tuple[int, int]]:
    """Where each parameter's argument begins and ends. Raises NotRecognizedError."""
    at = 2 if tokens.keyword(1) == "all" else 1
    while tokens.text(at + 1) == b"." and tokens.name(at) is not None:
        at += 2
    if (
        tokens.keyword(0) != "select"
        or tokens.name(at) not in _FUNCTIONS
        or tokens.text(at + 1) != b"("
    ):
        raise NotRecognizedError("not a report")
    close = tokens.closing(at + 1)
    _, end = tokens.label(close + 1)
    if end != tokens.count:
        raise NotRecognizedError("not a report alone")
    names = list(_PARAMETERS)
    given: dict[str, tuple[int, int]] = {}
    by_name = False
    for place, item in enumerate(tokens.list_items(at + 2, close)):
        name, first, last = tokens.argument(*item)
        by_name = by_name or name is not None
        name = name if by_name else names[place] if place < len(names) else None
        if name is None or name not in _PARAMETERS or name in given:
            raise NotRecognizedError("not its parameters")
        for inner in range(first, last):
            called = tokens.text(inner + 1) == b"(" and tokens.name(inner)
            if called and b"pg_background" in called and tokens.keyword(inner - 1) != "as":
                raise NotRecognizedError("a call in an argument")
        given[name] = tokens.start(first), tokens.end(last)
    if "pct" not in given:
        raise NotRecognizedError("not its parameters")
    return given


def reported(
    notice: bytes, marker: bytes, encoding: bytes
) -> tuple[int | None, bytes | None] | None:
    """Percentage and text reported by the body of a NoticeResponse; None if it is no report.
    `encoding`: of the job."""
    if marker not in notice:
        return None
    message = NoticeResponse.parse(notice).message
    if not message.startswith(marker):
        return None
    try:
        percentage, text = parse_progress(message, marker)
    except ValueError:
        return None
    clamped = None if percentage is None else min(max(percentage, 0), 100)
    return clamped, None if text is None else shortened(text, TEXT_SIZE, encoding)
