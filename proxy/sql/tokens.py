"""The tokens of one statement, by index: words, names, brackets and lists.

Invariant: what cannot be read for certain raises NotRecognizedError; time is linear in the text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from proxy.sql.lexer import RESERVED, Kind, Token, identifier, keyword

NESTING: Final = {b"(": 1, b"[": 1, b")": -1, b"]": -1}
"""The change of depth at a bracket."""


class NotRecognizedError(Exception):
    """The statement has a shape that is not read."""


class Tokens:
    """One statement. Indices count tokens unless called offsets."""

    def __init__(self, sql: bytes, tokens: list[Token], encoding: str | None) -> None:
        self.sql = sql
        self.tokens = tokens
        self.texts = [sql[start:end] for _, start, end in tokens]
        self.count = len(tokens)
        self.encoding = encoding

    def start(self, index: int) -> int:
        return self.tokens[index].start

    def end(self, index: int) -> int:
        return self.tokens[index].end

    def text(self, index: int) -> bytes:
        """A token's text; empty behind the last one."""
        return self.texts[index] if 0 <= index < self.count else b""

    def keyword(self, index: int) -> str:
        return keyword(self.sql, self.tokens[index]) if 0 <= index < self.count else ""

    def name(self, index: int) -> bytes | None:
        """The name in a token; None if it is no identifier."""
        if not 0 <= index < self.count:
            return None
        token = self.tokens[index]
        name = identifier(self.sql, token, self.encoding)
        if name is None and token.kind is Kind.QUOTED_IDENTIFIER:
            raise NotRecognizedError("U&: could be any name")
        return name

    def is_name(self, index: int) -> bool:
        """Whether this identifier can name a table, column or parameter."""
        return self.name(index) is not None and self.keyword(index) not in RESERVED

    def label(self, at: int) -> tuple[bytes | None, int]:
        """The label at this index, if any, and the index behind it."""
        if self.keyword(at) == "as" and self.name(at + 1) is not None:
            return self.name(at + 1), at + 2
        if self.is_name(at):
            return self.name(at), at + 1
        return None, at

    def closing(self, index: int) -> int:
        """The bracket that closes the one at ``index``."""
        if index not in self.closings:
            raise NotRecognizedError("unbalanced")
        return self.closings[index]

    @functools.cached_property
    def closings(self) -> dict[int, int]:
        """The closing brackets, by their opening ones."""
        closings: dict[int, int] = {}
        opened: list[int] = []
        for at, text in enumerate(self.texts):
            nesting = NESTING.get(text, 0)
            if nesting > 0:
                opened.append(at)
            elif nesting < 0 and opened:
                closings[opened.pop()] = at
        return closings

    def list_items(self, first: int, end: int) -> list[tuple[int, int]]:
        """The first and last tokens of the items between commas in ``[first, end)``."""
        commas = [first - 1]
        depth = 0
        for at in range(first, end):
            text = self.text(at)
            depth += NESTING.get(text, 0)
            if depth == 0 and text == b",":
                commas.append(at)
        commas.append(end)
        items = [(before + 1, after - 1) for before, after in pairwise(commas)]
        if any(first > last for first, last in items):
            raise NotRecognizedError("an empty item")
        return items

    def qualified(self, index: int) -> int:
        """Where the name that ends here begins, with its schema, if it has one."""
        while self.text(index - 1) == b".":
            index -= 2
            if self.name(index) is None:
                raise NotRecognizedError("not a qualified name")
        return index

    def outermost(self, first: int = 0) -> Iterator[int]:
        """The tokens from ``first`` on that are in no brackets, up to an unmatched closing one."""
        depth = 0
        for at in range(first, self.count):
            nesting = NESTING.get(self.text(at), 0)
            depth += nesting
            if depth < 0:
                return
            if depth == 0 and nesting == 0:
                yield at

    def is_operator(self, index: int) -> bool:
        return 0 <= index < self.count and self.tokens[index].kind is Kind.OPERATOR

    def argument(self, first: int, last: int) -> tuple[str | None, int, int]:
        """The name of an argument, if it has one, and the tokens of its expression."""
        if self.keyword(first) in ("all", "distinct", "variadic") or self.text(first) == b"*":
            raise NotRecognizedError("not a plain argument")
        depth = 0
        for at in range(first, last + 1):
            depth += NESTING.get(self.text(at), 0)
            if depth == 0 and self.keyword(at) == "order":
                raise NotRecognizedError("an aggregate's argument")
        name = self.name(first)
        if name is None or self.text(first + 1) not in (b"=>", b":="):
            return None, first, last
        if first + 2 > last:
            raise NotRecognizedError("an empty argument")
        return name.decode("latin-1"), first + 2, last

    def after_select(self, index: int = 0) -> int:
        if self.keyword(index) != "select":
            raise NotRecognizedError("not a SELECT")
        return index + 2 if self.keyword(index + 1) == "all" else index + 1
