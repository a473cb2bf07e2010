"""Requests of the client that the server has not answered yet.

Invariant: this is the server's own reading of the client's messages, in their order. What it skips
is never answered, so it must not be waited for (manual, "Extended Query", "COPY Operations").

The server is in one of three states. What does not stand here changes none of them.

========= ======================================= =====================================
state     event                                   next
========= ======================================= =====================================
ANSWERING an error in the extended protocol, and  SKIPPING
          the client has not sent Sync yet;
          any error within an interception
ANSWERING CopyInResponse, and the client has not  COPYING
          sent more than Sync behind its COPY
COPYING   any message of the client but Sync      ANSWERING (that ends the COPY: the server
                                                  takes the message for it, or fails)
COPYING   an error                                ANSWERING or SKIPPING, as above
SKIPPING  Sync from the client                    ANSWERING
any       ReadyForQuery                           ANSWERING
========= ======================================= =====================================

A message of the client is queued while ANSWERING, a Sync also while SKIPPING.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from protocol.kinds import ENDS_COPY_IN, EXTENDED, GETS_READY, F

ANSWERING: Final = "answering"
COPYING: Final = "copying"
"""The server reads COPY data, and the client has not sent its end."""
SKIPPING: Final = "skipping"
"""The server skips what comes, up to a Sync that the client has not sent."""


class OutstandingRequests:
    """A queue of message types.

    Attributes:
        state: of the server when it has answered what is in the queue.
    """

    __slots__ = ("_queue", "state")

    def __init__(self) -> None:
        # The login is answered as a Sync is.
        self._queue = deque([F.SYNC])
        self.state = ANSWERING

    def __bool__(self) -> bool:
        """Whether an answer is due."""
        return bool(self._queue)

    @property
    def copying(self) -> bool:
        """Whether the server reads COPY data."""
        return self.state is COPYING

    @property
    def skipping(self) -> bool:
        """Whether the server skips what comes."""
        return self.state is SKIPPING

    @property
    def owes_ready(self) -> bool:
        """Whether a ReadyForQuery is due."""
        return any(kind in GETS_READY for kind in self._queue)

    def add(self, kind: int) -> None:
        """The client has sent a message: one of those that are answered, or that end a COPY."""
        if self.state is COPYING:
            if kind != F.SYNC:
                self.state = ANSWERING
        elif self.state is SKIPPING:
            if kind == F.SYNC:
                self.state = ANSWERING
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
        if self.state is COPYING:
            self.state = ANSWERING
        if self._queue and self._queue[0] in EXTENDED:
            while self._queue and self._queue[0] != F.SYNC:
                self._queue.popleft()
            if not self._queue:
                self.state = SKIPPING

    def skip(self) -> None:
        """The server has sent an error to an interception, whose requests are not in the queue."""
        self.state = SKIPPING

    def copy_in(self) -> None:
        """The server begins to read COPY data, for the first in the queue."""
        copier = self._queue.popleft() if self._queue else F.QUERY
        self.state = COPYING
        while self._queue and self.state is COPYING:
            if self._queue.popleft() != F.SYNC:
                self.state = ANSWERING
        self._queue.appendleft(copier)

    def ready(self) -> int:
        """The server is ready for the next query; after which type of message."""
        self.state = ANSWERING
        kind = F.SYNC
        while self._queue:
            kind = self._queue.popleft()
            if kind in GETS_READY:
                break
        self._drop_strays()
        return kind

    def _drop_strays(self) -> None:
        """The server ignores the end of a COPY that has failed, or never was."""
        while self._queue and self._queue[0] in ENDS_COPY_IN:
            self._queue.popleft()
