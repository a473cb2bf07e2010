"""Recognises traffic that may pass after a look at message types and lengths only.

Invariant: what passes has no call and sets nothing that a call would take over. When in doubt the
answer is no, and the relay looks closer.

These functions run for each transaction of each session, so they are written for speed.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from protocol.framing import HEADER_SIZE
from protocol.kinds import ENDS_EXTENDED, B, F
from protocol.messages import Sync

_LONGEST_BATCH: Final = 4096
"""In bytes; a batch is kept until it is answered."""

_QUERY: Final = F.QUERY  # an attribute is slower
WITH_TEXT: Final = frozenset((F.QUERY, F.PARSE))
"""Messages with SQL."""

# First bytes of CREATE, ALTER and DROP DATABASE; other statements are not searched.
_COMMANDS: Final = b"cad \t\n\r\f\v-/"
_IN_BATCH: Final = bytes(kind in (F.BIND, F.DESCRIBE, F.EXECUTE, F.CLOSE) for kind in range(256))
_IN_ANSWER: Final = bytes(
    kind in (*ENDS_EXTENDED, B.PARAMETER_DESCRIPTION, B.DATA_ROW) for kind in range(256)
)
# Unsigned, unlike `unpack_length`, so that an impossible length leads far out of the data.
_unpack: Final = Struct("!I").unpack_from
_SYNC: Final = Sync().serialize()
_READY: Final = bytes([B.READY_FOR_QUERY, 0, 0, 0, 5])
_READY_SIZE: Final = len(_READY) + 1


def is_plain_batch(data: bytes) -> bool:
    """Whether this is one whole, short batch that cannot affect calls or settings."""
    size = len(data)
    if not HEADER_SIZE <= size <= _LONGEST_BATCH:
        return False
    end = 0
    kind = data[0]
    if kind in WITH_TEXT:
        text = data.lower()
        if b"pg_" in text or b"set" in text:  # or something similar: the slow path will see
            return False
        start = HEADER_SIZE if kind == _QUERY else text.find(0, HEADER_SIZE) + 1
        if text[start : start + 1] in _COMMANDS and b"database" in text:
            return False
        end = _unpack(data, 1)[0] + 1
        if kind == _QUERY:
            return bool(end == size)
    last = size - HEADER_SIZE
    while end <= last and _IN_BATCH[data[end]]:
        end += _unpack(data, end + 1)[0] + 1
    return end == last and data.endswith(_SYNC)


def is_plain_answer(data: bytes) -> bool:
    """Whether this is the whole answer to a batch, with nothing that the relay must handle."""
    last = len(data) - _READY_SIZE
    end = 0
    while end < last and _IN_ANSWER[data[end]]:
        end += _unpack(data, end + 1)[0] + 1
    return end == last and data.startswith(_READY, end)
