"""ErrorResponse, and what a backend may send at any time (section "Asynchronous Operations").

Invariant: an error or notice keeps every field the server sent, known to us or not, in their order.
The field codes are in the manual's "Error and Notice Message Fields".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from protocol import wire
from protocol.messages.base import Message
from protocol.wire import Reader


@dataclass(frozen=True, slots=True)
class _Report(Message):
    """An error or notice: texts by one-character field codes, in the order of the wire."""

    fields: dict[str, bytes]

    @property
    def severity(self) -> str:
        """ERROR, FATAL, NOTICE, …; not translated (``V``) from server version 9.6 on."""
        return self.fields.get("V", self.fields.get("S", b"")).decode("ascii", "replace")

    @property
    def sqlstate(self) -> str:
        """The five characters of ``C``; empty if the server has left it out."""
        return self.fields.get("C", b"").decode("ascii", "replace")

    @property
    def message(self) -> bytes:
        """The primary message, in client_encoding and in the language of lc_messages."""
        return self.fields.get("M", b"")

    def text(self, code: str) -> str | None:
        """A field to show to people, decoded as UTF-8; None if it is absent."""
        field = self.fields.get(code)
        return None if field is None else field.decode("utf-8", "replace")

    def with_fields(self, **codes: bytes) -> Self:
        """A copy with these fields replaced, or added at the end."""
        return type(self)({**self.fields, **codes})

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        fields = {}
        while code := reader.byte():
            fields[chr(code)] = reader.string()
        return cls(fields)

    def _write(self) -> bytes:
        parts: list[bytes] = []
        for code, text in self.fields.items():
            if not (len(code) == 1 and 0 < ord(code) < 256):
                raise ValueError(f"a field's code is one byte: {code!r}")
            parts += (code.encode("latin-1"), wire.string(text))
        return b"".join(parts) + b"\0"


@dataclass(frozen=True, slots=True)
class ErrorResponse(_Report):
    """The command has failed, or the session (severity FATAL, PANIC)."""

    type: ClassVar[int] = ord("E")


@dataclass(frozen=True, slots=True)
class NoticeResponse(_Report):
    """A warning, notice or other information; nothing has failed."""

    type: ClassVar[int] = ord("N")


@dataclass(frozen=True, slots=True)
class ParameterStatus(Message):
    """A setting that the server reports, at start-up and whenever it changes."""

    type: ClassVar[int] = ord("S")
    name: bytes
    value: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string(), reader.string())

    def _write(self) -> bytes:
        return wire.string(self.name) + wire.string(self.value)


@dataclass(frozen=True, slots=True)
class NotificationResponse(Message):
    """A NOTIFY from the backend with this pid."""

    type: ClassVar[int] = ord("A")
    pid: int
    channel: bytes
    payload: bytes

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.int32(), reader.string(), reader.string())

    def _write(self) -> bytes:
        return wire.int32(self.pid) + wire.string(self.channel) + wire.string(self.payload)
