"""Which traffic may pass with a look at the types and lengths of its messages only.

Invariant: what they let pass neither holds a call nor sets what a call would take over. When in
doubt they say no, and the relay looks closer.

They run for each transaction of each session, so they are written for speed.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from protocol.framing import HEADER_SIZE
from protocol.kinds import ENDS_EXTENDED, B, F
from protocol.messages import Sync

_LONGEST_BATCH: Final = 4096
"""In bytes, since it is kept until it is answered."""

_QUERY: Final = F.QUERY  # an attribute costs more
WITH_TEXT: Final = frozenset((F.QUERY, F.PARSE))
"""Messages with SQL."""

# How CREATE, ALTER and DROP DATABASE may begin. Most statements do not, and are not searched.
_COMMANDS: Final = b"cad \t\n\r\f\v-/"
_IN_BATCH: Final = bytes(kind in (F.BIND, F.DESCRIBE, F.EXECUTE, F.CLOSE) for kind in range(256))
_IN_ANSWER: Final = bytes(
    kind in (*ENDS_EXTENDED, B.PARAMETER_DESCRIPTION, B.DATA_ROW) for kind in range(256)
)
# Unsigned, unlike `unpack_length`: here an impossible length must lead on, to where nothing fits.
_unpack: Final = Struct("!I").unpack_from
_SYNC: Final = Sync().serialize()
_READY: Final = bytes([B.READY_FOR_QUERY, 0, 0, 0, 5])
_READY_SIZE: Final = len(_READY) + 1


def is_plain_batch(data: bytes) -> bool:
    """Whether this is one whole short batch that cannot concern calls or settings."""
    size = len(data)
    if not HEADER_SIZE <= size <= _LONGEST_BATCH:
        return False
    end = 0
    kind = data[0]
    if kind in WITH_TEXT:
        text = data.lower()
        if b"pg_" in text or b"set" in text:  # and more than these: that takes the slow path
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
    """Whether this is the whole answer to a batch, and all its messages are only passed on."""
    last = len(data) - _READY_SIZE
    end = 0
    while end < last and _IN_ANSWER[data[end]]:
        end += _unpack(data, end + 1)[0] + 1
    return end == last and data.startswith(_READY, end)
