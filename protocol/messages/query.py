"""Messages of the section "Simple Query", and the result of a query, which both protocols share.

Invariant: rows are tuples of bytes as the server wrote them, in the formats of their columns.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from protocol import wire
from protocol.messages.base import Bare, Message
from protocol.wire import ProtocolViolation, Reader

_FIELD = struct.Struct(">IhIhih")


@dataclass(frozen=True, slots=True)
class Query(Message):
    """SQL to run, perhaps several statements; the answer ends with ReadyForQuery."""

    type: ClassVar[int] = ord("Q")
    query: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string())

    def _write(self) -> bytes:
        return wire.string(self.query)


@dataclass(frozen=True, slots=True)
class Field:
    """One column of a RowDescription.

    Attributes:
        name: the column's name.
        table_oid: the table whose column it is, or 0.
        column_number: its attribute number there (negative: a system column), or 0.
        type_oid: its data type.
        type_size: pg_type.typlen; negative for a type of variable length.
        type_modifier: pg_attribute.atttypmod; -1 for none.
        format: 0 text, 1 binary; 0 also where it is not known yet (Describe of a statement).
    """

    name: bytes
    table_oid: int
    column_number: int
    type_oid: int
    type_size: int
    type_modifier: int
    format: int


@dataclass(frozen=True, slots=True)
class RowDescription(Message):
    """The columns of the rows to come."""

    type: ClassVar[int] = ord("T")
    fields: tuple[Field, ...]

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        count = reader.uint16()
        if count * (1 + _FIELD.size) > reader.remaining:
            raise ProtocolViolation(f"{count} columns cannot be in {reader.remaining} bytes")
        return cls(
            tuple(
                [
                    Field(reader.string(), *_FIELD.unpack(reader.take(_FIELD.size)))
                    for _ in range(count)
                ]
            )
        )

    def _write(self) -> bytes:
        parts = [wire.uint16(len(self.fields))]
        for field in self.fields:
            parts += (
                wire.string(field.name),
                wire.uint32(field.table_oid),
                wire.int16(field.column_number),
                wire.uint32(field.type_oid),
                wire.int16(field.type_size),
                wire.int32(field.type_modifier),
                wire.int16(field.format),
            )
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class DataRow(Message):
    """One row; None is NULL."""

    type: ClassVar[int] = ord("D")
    values: tuple[bytes | None, ...]

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.values())

    def _write(self) -> bytes:
        return wire.values(self.values)


@dataclass(frozen=True, slots=True)
class CommandComplete(Message):
    """A statement has completed; the tag names it, and may say how many rows it processed."""

    type: ClassVar[int] = ord("C")
    tag: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string())

    def _write(self) -> bytes:
        return wire.string(self.tag)


@dataclass(frozen=True, slots=True)
class EmptyQueryResponse(Bare):
    """In place of CommandComplete, for an empty query string."""

    type: ClassVar[int] = ord("I")


@dataclass(frozen=True, slots=True)
class ReadyForQuery(Message):
    """The backend is ready: ``I`` idle, ``T`` in a transaction block, ``E`` in a failed one."""

    type: ClassVar[int] = ord("Z")
    status: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(_status(reader.take(1), ProtocolViolation))

    def _write(self) -> bytes:
        return _status(self.status, ValueError)


def _status(status: bytes, error: type[ValueError]) -> bytes:
    if status not in (b"I", b"T", b"E"):
        raise error(f"invalid transaction status: {status!r}")
    return status


@dataclass(frozen=True, slots=True)
class Terminate(Bare):
    """The frontend closes the session."""

    type: ClassVar[int] = ord("X")
