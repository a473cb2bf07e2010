"""The state of one call from inside the database, from its question to the end of its answer.

Invariant: what belongs to a call hangs on one object. When its function waits no longer (it asks
another question, or the statement has ended), that is dropped whole, and with it the work for it.

The state is what the function has been shown, and says which of its messages count; others change
nothing (``still`` is for `refusal`). They are handled one after the other, in tasks: while one is
handled, one more waits, and further ones are dropped.

===== ============================================================ ==============
state message that counts                                          next
===== ============================================================ ==============
None  none: the question is new, or the answer is being made       Posed or Shown
None  ``settings``, of which the answer is made (`settings_by`)    None
Posed ``proof``; if that is wrong, no other counts                 None
Posed ``custom`` again, as the owner of the calling code           Posed or Shown
Shown ``next``                                                     Shown
Shown ``settings``, if the answer asks for them (`rest` is Posed)  Shown
Shown ``custom``, if the answer to ``call`` asks for them          Posed or Shown
===== ============================================================ ==============

A question becomes Shown at once if it cannot be proven: what is shown is the error. One that is
proven in advance, by a word that was shown for it, is never Posed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from proxy.extension.blocks import Blocks
from proxy.extension.conversation import Answer, AnswerPieces, Challenge
from proxy.extension.lease import Lease
from proxy.extension.questions import Call, Message


@dataclass(frozen=True, slots=True)
class Posed:
    """A question, and the channel whose word proves it."""

    challenge: Challenge
    lease: Lease


@dataclass(slots=True)
class Shown:
    """An answer that the function reads piece by piece.

    Attributes:
        pieces: of the answer, or of its present block.
        lease: the channel that shows them.
        coming: the next block, made while the function handles this one.
    """

    pieces: AnswerPieces
    lease: Lease
    coming: asyncio.Task[Answer] | None = None


class ServedCall:
    """One call, while its function waits.

    Attributes:
        state: what the function has been shown.
        rest: what follows the answer: more blocks of the result; or another answer to this
            question, whose settings the function is asked for.
        task: handles a message.
        next_task: waits for that to end, to handle the next.
    """

    __slots__ = ("_call", "_settings", "next_task", "rest", "state", "task")

    def __init__(self, question: Message) -> None:
        self._call: Message | Call = question
        self.state: Posed | Shown | None = None
        self.rest: Blocks | Posed | None = None
        self.task: asyncio.Task[None] | None = None
        self.next_task: asyncio.Task[None] | None = None
        self._settings: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    @property
    def call(self) -> Call:
        """What is called. Raises NotOursError."""
        if isinstance(self._call, Message):  # not read yet; a loop's questions are dropped unread
            call = Call(self._call)
            call.check_size(len(self._call.text))
            self._call = call
        return self._call

    @property
    def lacks_settings(self) -> bool:
        """Whether the answer asks for custom settings, which the next ``settings`` brings."""
        return isinstance(self.rest, Posed)

    def settings_arrive(self, message: Message) -> None:
        """Those that follow the question."""
        if self._settings.done():
            self._settings = asyncio.get_running_loop().create_future()
        self._settings.set_result(message)

    async def settings_by(self, challenge: Challenge) -> Message:
        """Those proven by the question's word; what is proven by an older word is dropped."""
        while True:
            arriving = self._settings
            message = await arriving
            if challenge.is_continued_by(message, challenge.proof_of(message)):
                return message
            if self._settings is arriving:
                self._settings = asyncio.get_running_loop().create_future()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Handle a message, in a task."""
        task = asyncio.get_running_loop().create_task(work)
        if self.task is None:
            self.task = task
        else:
            self.next_task = task
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task is self.task:
            self.task, self.next_task = self.next_task, None
        elif task is self.next_task:
            self.next_task = None

    def end_blocks(self) -> None:
        """The result has no more blocks, or nobody wants them."""
        if isinstance(self.rest, Blocks):
            self.rest.end()
            self.rest = None

    def drop(self) -> None:
        """The function no longer waits: stop the work for it."""
        coming = self.state.coming if isinstance(self.state, Shown) else None
        for task in (self.task, self.next_task, coming):
            if task is not None:
                task.cancel()
        self.end_blocks()
