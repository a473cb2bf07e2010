"""Messages of the section "Function Call", the manual's "legacy feature".

Invariant: arguments are encoded like a Bind's parameters, the result like a DataRow's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from protocol import wire
from protocol.messages.base import Message
from protocol.wire import Reader


@dataclass(frozen=True, slots=True)
class FunctionCall(Message):
    """Calls a function by its OID, outside of any statement."""

    type: ClassVar[int] = ord("F")
    function_oid: int
    argument_formats: tuple[int, ...]
    arguments: tuple[bytes | None, ...]
    result_format: int

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.uint32(), reader.int16s(), reader.values(), reader.int16())

    def _write(self) -> bytes:
        return b"".join(
            (
                wire.uint32(self.function_oid),
                wire.int16s(self.argument_formats),
                wire.values(self.arguments),
                wire.int16(self.result_format),
            )
        )


@dataclass(frozen=True, slots=True)
class FunctionCallResponse(Message):
    """What the function returned; None is NULL."""

    type: ClassVar[int] = ord("V")
    value: bytes | None

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.value())

    def _write(self) -> bytes:
        return wire.value(self.value)
