"""Commands about the extension pg_background, as the client writes them.

Invariant: a statement that is not recognised for certain, to its last token, gives None and goes to
the server as it came. So the server reports syntax errors and handles every other extension.
"""

from __future__ import annotations

import re
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
from proxy.sql.lexer import Kind, LexError, Token, identifier, keyword, mask, split

_HINT: Final = re.compile(rb"[\s;]*+(?:create|drop|alter|comment|--|/\*)", re.IGNORECASE)
_NAME: Final = NAME.encode()


def parse(
    sql: bytes, *, standard_conforming_strings: bool = True, encoding: str | None = None
) -> Command | None:
    """The command about our extension that a statement is, None if it is another.

    Args:
        sql: the text of one statement, in the client's encoding.
        standard_conforming_strings: the session's setting.
        encoding: client_encoding, as PostgreSQL names it.
    """
    if not _HINT.match(sql) or b"extension" not in sql.lower():
        return None
    try:
        statements = split(
            sql,
            standard_conforming_strings=standard_conforming_strings,
            encoding=encoding,
            bounded=True,
        )
        if len(statements) != 1:
            return None
        return _Parser(sql, statements[0].tokens, encoding).command()
    except (LexError, _OtherError):
        return None


class _OtherError(Exception):
    """It is none of our commands."""


class _Parser:
    """Reads the tokens of one statement, from the first to the last."""

    def __init__(self, sql: bytes, tokens: list[Token], encoding: str | None) -> None:
        self.sql = sql
        self.tokens = tokens
        self.encoding = encoding
        self.at = 0

    def command(self) -> Command:
        parsed = self.any_command()
        if self.at != len(self.tokens):
            raise _OtherError
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
        raise _OtherError

    def create(self) -> CreateExtension:
        if_not_exists = self.takes("if", "not", "exists")
        self.our_name()
        self.takes("with")
        schema: bytes | None = None
        version: str | None = None
        cascade = False
        while self.at < len(self.tokens):
            if schema is None and self.takes("schema"):
                schema = self.name()
            elif version is None and self.takes("version"):
                version = self.version()
            elif not cascade and self.takes("cascade"):
                cascade = True  # it needs no other extension
            else:
                raise _OtherError
        return CreateExtension(if_not_exists, schema, version)

    def drop(self) -> DropExtension:
        if_exists = self.takes("if", "exists")
        others: list[bytes] = []
        count = 0
        while True:
            begin = self.at
            if self.name() != _NAME:
                others.append(self.text(begin))
            count += 1
            if not self.is_sign(b","):
                break
            self.at += 1
        if len(others) == count:
            raise _OtherError
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
        raise _OtherError

    def comment(self) -> CommentOnExtension:
        self.our_name()
        if not self.takes("is"):
            raise _OtherError
        if self.takes("null"):
            return CommentOnExtension(b"NULL")
        if self.kind() is not Kind.STRING:
            raise _OtherError
        self.at += 1
        return CommentOnExtension(self.text(self.at - 1))

    # Tokens

    def kind(self) -> Kind | None:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else None

    def text(self, index: int) -> bytes:
        token = self.tokens[index]
        return self.sql[token.start : token.end]

    def takes(self, *words: str) -> bool:
        """Whether these key words come next; if so they are taken."""
        tokens = self.tokens[self.at : self.at + len(words)]
        if tuple(keyword(self.sql, token) for token in tokens) != words:
            return False
        self.at += len(words)
        return True

    def is_sign(self, sign: bytes) -> bool:
        return self.at < len(self.tokens) and self.text(self.at) == sign

    def name(self) -> bytes:
        if self.at == len(self.tokens):
            raise _OtherError
        name = identifier(self.sql, self.tokens[self.at], self.encoding)
        if name is None:
            raise _OtherError
        self.at += 1
        return name

    def our_name(self) -> None:
        if self.name() != _NAME:
            raise _OtherError

    def version(self) -> str:
        """A name, or a string constant."""
        if self.kind() is not Kind.STRING:
            return self.name().decode("utf-8", "replace")
        text = self.text(self.at)
        self.at += 1
        if text[:1] == b"'" and b"\\" not in text and b"'" not in text[1:-1]:
            return mask(text[1:-1], self.encoding).decode("utf-8", "replace")
        if text[:2] == b"$$":
            return text[2:-2].decode("utf-8", "replace")
        raise _OtherError
