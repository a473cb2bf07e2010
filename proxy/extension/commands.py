"""Parses commands about the extension pg_background.

Invariant: a statement that is not recognised for certain, to its last token, gives None and goes to
the server unchanged. So the server reports syntax errors and handles every other extension.
"""

from __future__ import annotations

from typing import Final

from proxy.extension.ddl import (
    Command,
    CommentOnExtension,
    CreateExtension,
    DropExtension,
    MoveExtension,
    UpdateExtension,
)
from proxy.extension.installed import NAME
from proxy.sql.lexer import Kind, mask
from proxy.sql.tokens import NotRecognizedError, Tokens

_NAME: Final = NAME.encode()


def parse(statement: Tokens) -> Command | None:
    """The command about our extension; None for any other statement."""
    try:
        return _Parser(statement).command()
    except NotRecognizedError:
        return None


class _Parser:
    """Reads the tokens of one statement in order."""

    def __init__(self, statement: Tokens) -> None:
        self.statement = statement
        self.at = 0

    def command(self) -> Command:
        parsed = self.any_command()
        if not self.is_at_end():
            raise NotRecognizedError("another command")
        return parsed

    def any_command(self) -> Command:
        if self.takes("create", "extension"):
            return self.create()
        if self.takes("drop", "extension"):
            return self.drop()
        if self.takes("alter", "extension"):
            return self.alter()
        if self.takes("comment", "on", "extension"):
            return self.comment()
        raise NotRecognizedError("another command")

    def create(self) -> CreateExtension:
        if_not_exists = self.takes("if", "not", "exists")
        self.our_name()
        self.takes("with")
        schema: bytes | None = None
        version: str | None = None
        cascade = False
        while not self.is_at_end():
            if schema is None and self.takes("schema"):
                schema = self.name()
            elif version is None and self.takes("version"):
                version = self.version()
            elif not cascade and self.takes("cascade"):
                cascade = True  # there is nothing else to install
            else:
                raise NotRecognizedError("another command")
        return CreateExtension(if_not_exists, schema, version)

    def drop(self) -> DropExtension:
        if_exists = self.takes("if", "exists")
        others: list[bytes] = []
        count = 0
        while True:
            if self.name() != _NAME:
                others.append(self.statement.text(self.at - 1))
            count += 1
            if self.statement.text(self.at) != b",":
                break
            self.at += 1
        if len(others) == count:
            raise NotRecognizedError("another command")
        cascade = self.takes("cascade")
        if not cascade:
            self.takes("restrict")
        rest = b"DROP EXTENSION %b%b%b" % (
            b"IF EXISTS " if if_exists else b"",
            b", ".join(others),
            b" CASCADE" if cascade else b"",
        )
        return DropExtension(if_exists, cascade, rest if others else None)

    def alter(self) -> UpdateExtension | MoveExtension:
        self.our_name()
        if self.takes("update"):
            return UpdateExtension(self.version() if self.takes("to") else None)
        if self.takes("set", "schema"):
            return MoveExtension(self.name())
        raise NotRecognizedError("another command")

    def comment(self) -> CommentOnExtension:
        self.our_name()
        if not self.takes("is"):
            raise NotRecognizedError("another command")
        if self.takes("null"):
            return CommentOnExtension(b"NULL")
        if not self.is_string():
            raise NotRecognizedError("not a string")
        return CommentOnExtension(self.take())

    # Tokens

    def is_at_end(self) -> bool:
        return self.at == self.statement.count

    def is_string(self) -> bool:
        return not self.is_at_end() and self.statement.tokens[self.at].kind is Kind.STRING

    def takes(self, *words: str) -> bool:
        """If these key words come next, consume them; whether they did."""
        if any(self.statement.keyword(self.at + n) != word for n, word in enumerate(words)):
            return False
        self.at += len(words)
        return True

    def take(self) -> bytes:
        """Consume the next token, and return its text."""
        self.at += 1
        return self.statement.text(self.at - 1)

    def name(self) -> bytes:
        name = self.statement.name(self.at)
        if name is None:
            raise NotRecognizedError("not a name")
        self.at += 1
        return name

    def our_name(self) -> None:
        if self.name() != _NAME:
            raise NotRecognizedError("another command")

    def version(self) -> str:
        """A name, or a string constant."""
        if not self.is_string():
            return self.name().decode("utf-8", "replace")
        text = self.take()
        if text[:1] == b"'" and b"\\" not in text and b"'" not in text[1:-1]:
            return mask(text[1:-1], self.statement.encoding).decode("utf-8", "replace")
        if text[:2] == b"$$":
            return text[2:-2].decode("utf-8", "replace")
        raise NotRecognizedError("another command")
