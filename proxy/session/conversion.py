"""Has the server convert the rows of a job: to the type modifiers of a column definition list, to
binary formats that `protocol.values` does not know, or to another encoding than the job's.

Invariant: each value passes through its type's input function, with its modifier, in the client's
own transaction, and what comes back is passed on unchanged. So values and errors are the server's.
json_to_recordset() hands strings to the input functions unchanged, even for arrays and composite
types; only json would be quoted twice, so it goes as text.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from protocol.errors import FEATURE_NOT_SUPPORTED, SQLError
from protocol.messages import Field
from protocol.values import oids
from proxy.sql import encodings
from proxy.sql.lexer import mask
from proxy.sql.recoding import readable
from proxy.sql.text import literal

Ask = Callable[[bytes, Sequence[bytes], Sequence[int]], Awaitable[Sequence[Sequence[bytes | None]]]]
"""Asks the server: SQL, parameters as text, result formats. Returns the rows."""

_CASTS: Final = {oids.JSON: b"pg_catalog.json", oids.JSONB: b"pg_catalog.jsonb"}
_TEXTUAL: Final = frozenset({oids.UNKNOWN, oids.VOID, oids.CSTRING, oids.PG_NODE_TREE})
"""Types without an input function, whose binary form is the text."""
_ESCAPED: Final = re.compile(rb'[\x00-\x1f"\\]')


class Conversion:
    """The statement that converts rows.

    Args:
        types: of all columns, as SQL.
        given: the job's columns.
        columns: positions of the columns that the client wants.
        formats: of these.
        encoding: of the rows, by PostgreSQL's name.
        client_encoding: to which the server converts.
    """

    def __init__(
        self,
        types: Sequence[bytes],
        given: Sequence[Field],
        columns: Sequence[int],
        formats: Sequence[int],
        encoding: bytes,
        client_encoding: bytes,
    ) -> None:
        items = list[bytes]()
        definitions = list[bytes]()
        for place, (field, type) in enumerate(zip(given, types, strict=True)):
            if field.type_oid in _CASTS or field.type_oid in _TEXTUAL:
                type = b"pg_catalog.text"
            # A type may end in a comment.
            definitions.append(b'"%d" %s\n' % (place, type))
        for place in columns:
            cast = _CASTS.get(given[place].type_oid)
            name = b't."%d"' % place
            items.append(b"CAST(%s AS %s)" % (name, cast) if cast else name)
        self._recodes = encoding != client_encoding
        rows = b"$1"
        if self._recodes:
            rows = b"CAST(pg_catalog.convert_from($1, %b) AS pg_catalog.json)" % literal(encoding)
        self._sql = b"SELECT %s FROM pg_catalog.json_to_recordset(%s) AS t(%s)" % (
            b", ".join(items),
            rows,
            b", ".join(definitions),
        )
        self._formats = formats
        self._encoding = encoding.decode("ascii", "replace")

    async def rows(
        self, rows: Sequence[Sequence[bytes | None]], ask: Ask
    ) -> Sequence[Sequence[bytes | None]]:
        """The rows for the client. Raises BatchFailedError if a value does not fit."""
        objects = [
            b"{%s}"
            % b",".join(
                b'"%d":%s' % (place, b"null" if value is None else self._string(value))
                for place, value in enumerate(row)
            )
            for row in rows
        ]
        array = b"[%s]" % b",".join(objects)
        if self._recodes:
            array = b"\\x" + array.hex().encode()
        return await ask(self._sql, [array], self._formats)

    def _string(self, value: bytes) -> bytes:
        """A JSON string, even where a byte of a character looks like a backslash."""
        masked = value if value.isascii() else mask(value, self._encoding)
        parts: list[bytes] = []
        end = 0
        for special in _ESCAPED.finditer(masked):
            letter = special.group()
            escape = b"\\" + letter if letter in b'"\\' else b"\\u%04x" % letter[0]
            parts += [value[end : special.start()], escape]
            end = special.end()
        return b'"' + b"".join([*parts, value[end:]]) + b'"'


async def types_of(
    given: Sequence[Field],
    columns: Sequence[int],
    fields: Sequence[Field],
    ask: Ask,
    encoding: bytes,
) -> Sequence[bytes]:
    """The types of a job's columns, as SQL; text where the client does not want binary.

    Args:
        given: the job's columns.
        columns: positions of the columns that the client wants.
        fields: those columns, with their formats.
        ask: asks the server.
        encoding: of the column names.

    Raises SQLError 0A000 for a type that does not exist or has no values.
    """
    binary = {place for place, field in zip(columns, fields, strict=True) if field.format}
    found = await ask(
        b"SELECT CASE WHEN typtype OPERATOR(pg_catalog.<>) 'p'"
        b" THEN pg_catalog.format_type(t.oid, -1) END"
        b" FROM pg_catalog.unnest($1::pg_catalog.oid[]) WITH ORDINALITY AS g(o, n)"
        b" LEFT JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) g.o ORDER BY n",
        [encodings.array_text([b"%d" % field.type_oid for field in given], b"UTF8")],
        (),
    )
    types: list[bytes] = []
    for place, (field, (type,)) in enumerate(zip(given, found, strict=True)):
        if place not in binary or field.type_oid in _TEXTUAL:
            type = b"pg_catalog.text"
        if type is None:
            raise no_binary_form(
                readable(field.name, encoding),
                f"The server cannot convert the type with OID {field.type_oid}.",
            )
        types.append(type)
    return types


def no_binary_form(name: str, reason: str) -> SQLError:
    """The error for a column of this name that has no binary format here."""
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        "binary format is not available for this column of pg_background_result",
        detail=f'Column "{name}": {reason}',
        hint="Ask for results in text format, or cast the column to text in the job's SQL.",
    )
