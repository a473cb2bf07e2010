"""DO blocks that create the extension, or ask for it, as migrations do.

Invariant: a command about our extension that is a statement of the block, or a constant after
EXECUTE, is carried out by a block of ours, which the client's block executes in its place: with the
same rights, in the same transaction, with errors that can be caught. Queries on pg_extension list
the extension. All else stays unchanged, on the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from proxy.extension import commands
from proxy.extension.code import Code
from proxy.extension.ddl import Command
from proxy.extension.installed import NAME
from proxy.sql.constants import StringConstant
from proxy.sql.lexer import Kind, LexError, tokenize
from proxy.sql.rewrite import Change, with_changes
from proxy.sql.tokens import Tokens
from proxy.statements.mentions import PG_EXTENSION
from proxy.statements.plan import Block, Substitute

MakeBlock = Callable[[Command, bytes], bytes]
"""Makes the DO statement for a command, given the command and its text."""

_MAX_COMMANDS: Final = 16
"""Limit in one block; each is replaced by a long text."""
_COMMANDS: Final = frozenset(("create", "drop", "alter", "comment"))
_LONGEST: Final = 64
"""Tokens of a command."""
_MAX_READ: Final = 64 * 1024
"""Bytes of a command, and of all constants after EXECUTE that may be one."""


def analyze(
    statement: Tokens,
    make_block: MakeBlock,
    *,
    server_version: int,
    standard_conforming_strings: bool,
    with_catalogs: bool,
) -> Substitute | None:
    """A DO block with its uses of our extension replaced; None if there are none.

    Args:
        statement: one statement, as the session's server reads it.
        make_block: makes the statement for a command.
        server_version: as server_version_num, e.g. 150004.
        standard_conforming_strings: the session's setting.
        with_catalogs: whether pg_extension must list the extension.
    """
    if statement.keyword(0) != "do":
        return None
    lower = statement.sql.lower()
    if NAME.encode() not in lower or b"extension" not in lower:
        return None
    outer = Code(statement, standard_conforming_strings=standard_conforming_strings)
    constants = list(outer.bodies())
    if len(constants) != 1 or outer.language != b"plpgsql":
        return None
    constant = outer.constant(constants[0])
    if constant is None:
        return None
    try:
        tokens = constant.tokens(standard_conforming_strings=standard_conforming_strings)
    except LexError:
        return None
    code = Code(tokens, standard_conforming_strings=standard_conforming_strings, source=constant)
    return _replaced(
        code, constant, make_block, server_version if with_catalogs else 0, statement.sql
    )


def _replaced(
    code: Code, constant: StringConstant, make_block: MakeBlock, server_version: int, sql: bytes
) -> Substitute | None:
    changes: list[Change] = []
    blocks: list[Block] = []
    for first, last, command, written in _commands(code):
        if len(blocks) == _MAX_COMMANDS:
            return None
        block = make_block(command, written)
        is_executed = code.keyword(first) == "execute"
        blocks.append(Block(block, written, is_executed))
        # Hexadecimal digits are the same in every constant and encoding.
        text = b"EXECUTE pg_catalog.convert_from(pg_catalog.decode('%b', 'hex'), 'UTF8')"
        changes.append((code.start(first), code.end(last), text % block.hex().encode()))
    changes += _catalogs(code, server_version)
    if not changes:
        return None
    spans = [
        (
            *constant.span(start, end),
            _within(constant, _in_as_many_lines(text, code.sql, start, end)),
        )
        for start, end, text in sorted(changes)
    ]
    return Substitute(with_changes(sql, spans), blocks=tuple(blocks))


def _in_as_many_lines(text: bytes, sql: bytes, start: int, end: int) -> bytes:
    """A text with as many line feeds as what it replaces: PL/pgSQL reports lines."""
    assert b"--" not in text
    return text.replace(b"\n", b" ") + b"\n" * sql.count(b"\n", start, end)


def _within(constant: StringConstant, text: bytes) -> bytes:
    """A text as written within a constant; it needs no other escapes."""
    assert b"$" not in text
    assert b"\\" not in text
    return text.replace(b"'", b"''") if constant.is_quoted else text


def _commands(code: Code) -> Iterator[tuple[int, int, Command, bytes]]:
    """The commands about our extension: their first and last tokens, and their text."""
    left = _MAX_READ
    for at in range(code.count):
        if at and not (code.begins_statement(at - 1) or code.text(at - 1) in (b">>", b">")):
            continue
        if code.keyword(at) == "execute":
            constant = code.text(at + 1)
            if code.text(at + 2) != b";" or not _may_name_ours(constant):
                continue
            left -= len(constant)
            if left > 0 and (found := _executed(code, at + 1)) is not None:
                yield at, at + 1, *found
        elif code.keyword(at) in _COMMANDS and "extension" in map(code.keyword, (at + 1, at + 2)):
            end = at
            while end < min(code.count, at + _LONGEST) and code.text(end) != b";":
                end += 1
            if code.end(end - 1) - code.start(at) > _MAX_READ:
                continue
            part = Tokens(code.sql, code.tokens[at:end], None)
            text = code.sql[code.start(at) : code.end(end - 1)]
            if text.isascii() and (command := commands.parse(part)) is not None:
                yield at, end - 1, command, text


def _may_name_ours(constant: bytes) -> bool:
    """Whether a constant may contain our name: plainly, by escapes, or in several pieces."""
    return NAME.encode() in constant.lower() or any(
        mark in constant for mark in (b"\\", b"\r", b"\n")
    )


def _executed(code: Code, index: int) -> tuple[Command, bytes] | None:
    """The command in a constant after EXECUTE."""
    constant = code.constant(index)
    if constant is None or not constant.text.isascii():
        return None
    try:
        tokens = constant.tokens(standard_conforming_strings=code.conforming)
    except LexError:
        return None
    count = tokens.count
    while tokens.text(count - 1) == b";":
        count -= 1
    command = commands.parse(Tokens(tokens.sql, tokens.tokens[:count], None))
    return None if command is None else (command, constant.text)


def _catalogs(code: Code, server_version: int) -> list[Change]:
    """Makes queries on pg_extension see ours; no changes if that is not certain. Definitions are
    stored, so they are left alone.

    Args:
        code: the block's.
        server_version: as server_version_num; 0: change nothing.
    """
    if server_version < 100000 or PG_EXTENSION not in code.names or not _names_ours(code):
        return []
    references = None if code.has_other_needs() else code.references()
    sources = code.extension_sources(server_version // 10000)
    if references is None or sources is None:
        return []
    if any(code.keyword(at) == "atomic" for at in range(code.count)):
        return []
    references = [each for each in references if not code.is_defined(each.first)]
    ours = {PG_EXTENSION: _with_own_names(sources[PG_EXTENSION])}
    return code.changes(ours, references) or []


def _with_own_names(query: bytes) -> bytes:
    """A query of ours with aliases (of one letter) that no PL/pgSQL variable or label has."""
    changes = [
        (start, end, b"_pg_background_" + query[start:end])
        for kind, start, end in tokenize(query)
        if kind is Kind.IDENTIFIER and end - start == 1
    ]
    return with_changes(query, changes).sql


def _names_ours(code: Code) -> bool:
    return any(
        token.kind is Kind.STRING and NAME.encode() in code.text(at)
        for at, token in enumerate(code.tokens)
    ) or any(name == NAME.encode() for name in code.names)
