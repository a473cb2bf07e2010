"""What all typed messages have in common: a type byte, a length word, a body.

Invariant: a subclass describes its body only, in `_read` and in `_write`, side by side. Type,
length and the end of the body are handled here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from protocol import wire
from protocol.wire import Reader


class Message(ABC):
    """A message of the protocol (manual, "Message Formats"). Subclasses are frozen dataclasses.

    Strings are bytes in the session's encoding, without their NUL.
    """

    __slots__ = ()

    type: ClassVar[int]
    """The message's first byte, as a number."""

    @classmethod
    def parse(cls, body: bytes | bytearray | memoryview) -> Self:
        """The message with this body (what follows the length word).

        Raises:
            ProtocolViolation: the body is malformed, too short or too long.
        """
        reader = Reader(body)
        message = cls._read(reader)
        reader.end()
        return message

    def serialize(self) -> bytes:
        """The whole message as sent: type, length, body.

        Raises:
            ValueError: a number does not fit its field, or a string contains a NUL.
        """
        body = self._write()
        return bytes((self.type,)) + wire.int32(len(body) + 4) + body

    @classmethod
    @abstractmethod
    def _read(cls, reader: Reader) -> Self: ...

    @abstractmethod
    def _write(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Bare(Message):
    """A message without a body."""

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls()

    def _write(self) -> bytes:
        return b""
