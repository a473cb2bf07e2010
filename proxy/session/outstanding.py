"""The client's requests that the server has not answered yet.

Invariant: this reads the client's messages as the server does, in their order. What the server
skips is never answered, so nobody may wait for it (manual, "Extended Query", "COPY Operations").

The state is the server's, once it has answered what is queued. Other events leave it unchanged.

========= ======================================= =====================================
state     event                                   next
========= ======================================= =====================================
ANSWERING an error in the extended protocol, and  SKIPPING
          the client has not sent Sync yet;
          any error within an interception
ANSWERING CopyInResponse, and the client has not  COPYING
          sent yet what ends the COPY
COPYING   CopyDone, CopyFail; any other message   ANSWERING (that ends the COPY: the server
          of the client but CopyData, Flush, Sync fails at any other message)
COPYING   an error                                ANSWERING or SKIPPING, as above
SKIPPING  Sync from the client                    ANSWERING
any       ReadyForQuery                           ANSWERING
========= ======================================= =====================================

A message of the client is queued while ANSWERING, except an end of COPY if nothing is queued; a
Sync while SKIPPING, too. An interception keeps its own requests (`exchange`), and tells only of
errors and ReadyForQuery.
"""

from __future__ import annotations

import enum
from collections import deque

from protocol.kinds import ENDS_COPY_IN, EXTENDED, GETS_READY, F


class State(enum.Enum):
    """The server's; see the table above.

    Attributes:
        ANSWERING: it answers what is queued, then waits for the client.
        COPYING: it reads COPY data, whose end the client has not sent.
        SKIPPING: it skips everything up to a Sync that the client has not sent.
    """

    ANSWERING = enum.auto()
    COPYING = enum.auto()
    SKIPPING = enum.auto()


ANSWERING, COPYING, SKIPPING = State


class OutstandingRequests:
    """A queue of message types.

    Attributes:
        state: the server's, once it has answered what is queued.
    """

    __slots__ = ("_queue", "state")

    def __init__(self) -> None:
        # The login is answered like a Sync.
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
        """Whether the server skips messages."""
        return self.state is SKIPPING

    @property
    def owes_ready(self) -> bool:
        """Whether a ReadyForQuery is due."""
        return any(kind in GETS_READY for kind in self._queue)

    def add(self, kind: int) -> None:
        """The client has sent a message that is answered or ends a COPY."""
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
        """The server has ended the answer to a message of the extended protocol."""
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
        """The server has sent an error to an interception, whose requests are not queued here."""
        self.state = SKIPPING

    def copy_in(self) -> None:
        """The server begins to read COPY data for the first request in the queue."""
        copier = self._queue.popleft() if self._queue else F.QUERY
        self.state = COPYING
        while self._queue and self.state is COPYING:
            if self._queue.popleft() != F.SYNC:
                self.state = ANSWERING
        self._queue.appendleft(copier)

    def ready(self) -> int:
        """The server is ready for the next query. Returns the type of the message answered."""
        self.state = ANSWERING
        kind = F.SYNC
        while self._queue:
            kind = self._queue.popleft()
            if kind in GETS_READY:
                break
        self._drop_strays()
        return kind

    def _drop_strays(self) -> None:
        """Drop ends of COPY that the server ignores: its COPY has failed, or never began."""
        while self._queue and self._queue[0] in ENDS_COPY_IN:
            self._queue.popleft()
