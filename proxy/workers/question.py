"""A question to other processes, while answers come.

Invariant: it is over when an answer is enough, or when all that were asked have answered, are gone
or hang, or when the asker gives up. How long to wait is up to the asker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any


class OpenQuestion:
    """A question.

    Args:
        take: gets each answer, or piece of one, with its peer's number; returns whether it is
            enough.
        lasting: whether `take` also gets answers that come when the question is over.

    Attributes:
        over: done when the question is over.
    """

    def __init__(self, take: Callable[[int, Any], bool], *, lasting: bool = False) -> None:
        self._take = take
        self._lasting = lasting
        # Peers that must answer; None until it is known who was asked.
        self._missing: set[int] | None = None
        # Peers that hang, and peers that could not answer.
        self._silent: set[int] = set()
        self._failed: set[int] = set()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def asked(self, peers: Iterable[int], hanging: Iterable[int] = ()) -> None:
        """Wait for these peers, but not for those that hang."""
        self._missing = set(peers)
        self._silent.update(hanging)
        if not self._missing:
            self._end()

    def answer(self, peer: int, answer: Any, *, more: bool = False) -> None:
        """Take an answer; `more`: a part of one. None: the peer could not answer."""
        if answer is None:
            self._failed.add(peer)
        elif (self._lasting or not self.over.done()) and self._take(peer, answer):
            self._end()
            more = False
        if not more:
            self._said_all(peer)

    def gone(self, peer: int) -> None:
        """A peer is gone, and knows nothing."""
        self._failed.discard(peer)
        self._said_all(peer)

    def give_up(self) -> None:
        """No more answers will come, though somebody may know."""
        self._missing = None
        self._end()

    @property
    def unanswered(self) -> int:
        """Number of peers that have not answered."""
        if self._missing is None:
            return 1  # nobody knows who was asked
        return len(self._silent | self._failed | self._missing)

    def _said_all(self, peer: int) -> None:
        self._silent.discard(peer)
        if self._missing is not None:
            self._missing.discard(peer)
            if not self._missing:
                self._end()

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
