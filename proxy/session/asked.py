"""What the client has asked and the server has not answered yet.

Invariant: this is the server's own reading of the client's messages, in their order. After an error
in the extended protocol it skips everything up to a Sync; while it reads COPY data it skips Sync.
What it skips is never answered, so it must not be waited for (manual, "Extended Query", "COPY
Operations").
"""

from __future__ import annotations

from collections import deque

from protocol.kinds import ENDS_COPY_IN, EXTENDED, GETS_READY, F


class Asked:
    """A queue of message types.

    Attributes:
        copying: whether the server reads COPY data, and the client has not sent its end.
        skipping: whether the server skips what comes, up to a Sync that the client has not sent.
    """

    __slots__ = ("_queue", "copying", "skipping")

    def __init__(self) -> None:
        # The login is answered as a Sync is.
        self._queue = deque([F.SYNC])
        self.copying = False
        self.skipping = False

    def __bool__(self) -> bool:
        """Whether an answer is due."""
        return bool(self._queue)

    @property
    def owes_ready(self) -> bool:
        """Whether a ReadyForQuery is due."""
        return any(kind in GETS_READY for kind in self._queue)

    def add(self, kind: int) -> None:
        """The client has sent a message: one of the types above."""
        if self.copying:
            # Any other ends it too: the server fails, with this message read.
            self.copying = kind == F.SYNC
        elif self.skipping:
            if kind == F.SYNC:
                self.skipping = False
                self._queue.append(F.SYNC)
        elif self._queue or kind not in ENDS_COPY_IN:
            self._queue.append(kind)

    def answered(self) -> None:
        """The server has sent what ends the answer to a message of the extended protocol."""
        if self._queue and self._queue[0] in EXTENDED:
            self._queue.popleft()
            self._drop_strays()

    def failed(self) -> None:
        """The server has sent an error."""
        self.copying = False
        if self._queue and self._queue[0] in EXTENDED:
            while self._queue and self._queue[0] != F.SYNC:
                self._queue.popleft()
            self.skipping = not self._queue

    def copy_in(self) -> None:
        """The server begins to read COPY data, for the first in the queue."""
        self.copying = True
        copier = self._queue.popleft() if self._queue else F.QUERY
        while self._queue and self.copying:
            self.copying = self._queue.popleft() == F.SYNC
        self._queue.appendleft(copier)

    def ready(self) -> int:
        """The server is ready for the next query; after which type of message."""
        self.copying = self.skipping = False
        kind = F.SYNC
        while self._queue:
            kind = self._queue.popleft()
            if kind in GETS_READY:
                break
        self._drop_strays()
        return kind

    def _drop_strays(self) -> None:
        """Forget the ends of COPYs that never began or have failed: the server ignores them."""
        while self._queue and self._queue[0] in ENDS_COPY_IN:
            self._queue.popleft()
