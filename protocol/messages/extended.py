"""Messages of the section "Extended Query": Parse, Bind, Describe, Execute, Close, and the answers.

Invariant: the unnamed statement or portal has the empty name, as on the wire; never None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from protocol import wire
from protocol.kinds import PORTAL, STATEMENT
from protocol.messages.base import Bare, Message
from protocol.wire import ProtocolViolation, Reader


@dataclass(frozen=True, slots=True)
class Parse(Message):
    """Prepares `query` as `statement`.

    `parameter_types` are OIDs; the server infers types that are 0 or omitted at the end.
    """

    type: ClassVar[int] = ord("P")
    statement: bytes
    query: bytes
    parameter_types: tuple[int, ...] = ()

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string(), reader.string(), reader.uint32s())

    def _write(self) -> bytes:
        names = wire.string(self.statement) + wire.string(self.query)
        return names + wire.uint32s(self.parameter_types)


@dataclass(frozen=True, slots=True)
class Bind(Message):
    """Makes `portal` from `statement` and parameter values.

    Format codes are 0 for text and 1 for binary. With no code all values are text; a single code
    applies to all of them; otherwise each value has its own.
    """

    type: ClassVar[int] = ord("B")
    portal: bytes
    statement: bytes
    parameter_formats: tuple[int, ...] = ()
    parameters: tuple[bytes | None, ...] = ()
    result_formats: tuple[int, ...] = ()

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            reader.string(), reader.string(), reader.int16s(), reader.values(), reader.int16s()
        )

    def _write(self) -> bytes:
        return b"".join(
            (
                wire.string(self.portal),
                wire.string(self.statement),
                wire.int16s(self.parameter_formats),
                wire.values(self.parameters),
                wire.int16s(self.result_formats),
            )
        )


@dataclass(frozen=True, slots=True)
class _Named(Message):
    """A message about a prepared statement (`kind` is ``S``) or a portal (``P``)."""

    kind: bytes
    name: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(_kind(reader.take(1), ProtocolViolation), reader.string())

    def _write(self) -> bytes:
        return _kind(self.kind, ValueError) + wire.string(self.name)


def _kind(kind: bytes, error: type[ValueError]) -> bytes:
    if kind not in (STATEMENT, PORTAL):
        raise error(f"neither a prepared statement nor a portal: {kind!r}")
    return kind


@dataclass(frozen=True, slots=True)
class Describe(_Named):
    """Asks for ParameterDescription (statements only) and RowDescription or NoData."""

    type: ClassVar[int] = ord("D")


@dataclass(frozen=True, slots=True)
class Close(_Named):
    """Drops a prepared statement or a portal; an unknown name is not an error."""

    type: ClassVar[int] = ord("C")


@dataclass(frozen=True, slots=True)
class Execute(Message):
    """Runs a portal, for at most `max_rows` rows; 0 means no limit."""

    type: ClassVar[int] = ord("E")
    portal: bytes
    max_rows: int = 0

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string(), reader.int32())

    def _write(self) -> bytes:
        return wire.string(self.portal) + wire.int32(self.max_rows)


@dataclass(frozen=True, slots=True)
class Flush(Bare):
    """Asks the backend to send the answers so far."""

    type: ClassVar[int] = ord("H")


@dataclass(frozen=True, slots=True)
class Sync(Bare):
    """Ends a pipeline: after an error the backend skips to it; ReadyForQuery answers it."""

    type: ClassVar[int] = ord("S")


@dataclass(frozen=True, slots=True)
class ParseComplete(Bare):
    """Parse succeeded."""

    type: ClassVar[int] = ord("1")


@dataclass(frozen=True, slots=True)
class BindComplete(Bare):
    """Bind succeeded."""

    type: ClassVar[int] = ord("2")


@dataclass(frozen=True, slots=True)
class CloseComplete(Bare):
    """Close succeeded."""

    type: ClassVar[int] = ord("3")


@dataclass(frozen=True, slots=True)
class ParameterDescription(Message):
    """The types of a statement's parameters, as OIDs."""

    type: ClassVar[int] = ord("t")
    types: tuple[int, ...]

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.uint32s())

    def _write(self) -> bytes:
        return wire.uint32s(self.types)


@dataclass(frozen=True, slots=True)
class NoData(Bare):
    """In place of RowDescription: the statement returns no rows."""

    type: ClassVar[int] = ord("n")


@dataclass(frozen=True, slots=True)
class PortalSuspended(Bare):
    """Execute's `max_rows` was reached; another Execute may continue."""

    type: ClassVar[int] = ord("s")
