"""Messages of the section "COPY Operations".

Invariant: the data is opaque. A CopyData may end in the middle of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from protocol import wire
from protocol.messages.base import Bare, Message
from protocol.wire import Reader


@dataclass(frozen=True, slots=True)
class CopyData(Message):
    """A piece of the data, in either direction."""

    type: ClassVar[int] = ord("d")
    data: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.rest())

    def _write(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class CopyDone(Bare):
    """The data is complete."""

    type: ClassVar[int] = ord("c")


@dataclass(frozen=True, slots=True)
class CopyFail(Message):
    """The frontend gives up; the backend answers with an error that quotes the reason."""

    type: ClassVar[int] = ord("f")
    reason: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string())

    def _write(self) -> bytes:
        return wire.string(self.reason)


@dataclass(frozen=True, slots=True)
class _CopyResponse(Message):
    """The backend starts a copy. Format 0 is text, 1 is binary; one format for each column."""

    overall_format: int
    column_formats: tuple[int, ...]

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.byte(), reader.int16s())

    def _write(self) -> bytes:
        return wire.int8(self.overall_format) + wire.int16s(self.column_formats)


@dataclass(frozen=True, slots=True)
class CopyInResponse(_CopyResponse):
    """COPY FROM STDIN: the frontend sends data next."""

    type: ClassVar[int] = ord("G")


@dataclass(frozen=True, slots=True)
class CopyOutResponse(_CopyResponse):
    """COPY TO STDOUT: data follows."""

    type: ClassVar[int] = ord("H")


@dataclass(frozen=True, slots=True)
class CopyBothResponse(_CopyResponse):
    """Streaming replication: data goes both ways."""

    type: ClassVar[int] = ord("W")
