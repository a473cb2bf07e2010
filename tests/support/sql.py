"""How the proxy reads a statement that is given as bytes."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.api.functions import FUNCTIONS, Function
from proxy.sql.lexer import LexError, split
from proxy.sql.tokens import Tokens
from proxy.statements import analysis
from proxy.statements.plan import Plan


def statement(
    sql: bytes, *, standard_conforming_strings: bool = True, encoding: str | None = None
) -> Tokens | None:
    """The tokens of a text of one statement, which the proxy can read."""
    try:
        parts = split(
            sql,
            standard_conforming_strings=standard_conforming_strings,
            encoding=encoding,
            bounded=True,
        )
    except LexError:
        return None
    return Tokens(sql, parts[0].tokens, encoding) if len(parts) == 1 else None


def analyze(
    sql: bytes,
    *,
    standard_conforming_strings: bool = True,
    encoding: str | None = None,
    functions: Mapping[str, tuple[Function, ...]] = FUNCTIONS,
) -> Plan | None:
    """How the calls in a text are served."""
    found = statement(
        sql, standard_conforming_strings=standard_conforming_strings, encoding=encoding
    )
    return None if found is None else analysis.analyze(found, functions)
