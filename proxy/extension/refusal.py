"""The end of a statement whose call has no answer: no channel could be opened to show it on.

Invariant: the proxy cancels a statement only while one of its functions waits in vain, which the
function has just said (``still``), or says all the time (those of older proxies, which speak up
only when they wait). So the cancel meets that function, and not what stands before it or behind.
Whether it waits is asked once more when the proxy has connected to send the request: meanwhile the
statement may have ended, or the function given up. The reason takes the place of the error that the
cancel raises, and of no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from protocol.errors import CONNECTION_FAILURE, QUERY_CANCELED, SQLError
from protocol.messages import ErrorResponse
from proxy.extension.questions import Message
from proxy.reasons import explain

_RECENT: Final = 2.0
"""Seconds for which a function is taken to wait that has said so: it says so more often, unless it
has given up."""

_FEWEST_TIMES: Final = 18
"""Times that a function says so before it gives up (`sql/answer.sql`), or more, up to 24."""

_RECENT_LAST: Final = 0.03
"""`_RECENT` from then on: after the last time it waits for 0.05 seconds, and a cancel must meet it
within that."""

_SIGNALS_ONCE: Final = 170000
"""The first server that does, for a cancel request. Before that, code that catches the cancel may
be canceled a second time, outside of our functions."""


_CANCELED_BY: Final = b"ProcessInterrupts"
"""The routine in the server that raises the error of a cancel."""


class Refusal:
    """Why the last question of a session is not answered, if it is not."""

    def __init__(self, cancel_statement: Callable[[Callable[[], bool]], None]) -> None:
        """`cancel_statement`: as `Owner` has it."""
        self._cancel_statement = cancel_statement
        self._error: SQLError | None = None
        self._nonce = b""
        self._says_it_waits = True
        # Whether the request is being made, and whether it has been sent.
        self._is_connecting = self._is_canceled = False
        # Who has said last that it waits, when, by the loop's clock, and how often it was said.
        self._waits = b""
        self._heard = 0.0
        self._times = 0

    def forget(self) -> None:
        """Another question is asked, or the statement has ended."""
        self._error = None
        self._is_connecting = self._is_canceled = False
        self._waits = b""
        self._times = 0

    def waits(self, nonce: bytes) -> None:
        """A function says that it waits for the answer to this question."""
        self._waits, self._heard = nonce, asyncio.get_running_loop().time()
        self._times += 1
        if self._nonce == nonce:
            self._cancel()

    def is_shown(self) -> None:
        """An answer is there to be seen: the function may wait no longer."""
        self._waits = b""

    def refuse(self, question: Message, error: Exception) -> None:
        """It is not answered, or the answer may be gone before the function has seen it."""
        if self._error is not None and self._nonce == question.nonce:
            return  # the request for the first reason is on its way
        if not isinstance(error, SQLError):
            error = SQLError(CONNECTION_FAILURE, explain(error))
        self._error, self._nonce = error, question.nonce
        self._is_connecting = self._is_canceled = False
        self._says_it_waits = question.verb == b"ask"
        self._cancel()

    @property
    def _is_waiting(self) -> bool:
        age = asyncio.get_running_loop().time() - self._heard
        recent = _RECENT if self._times < _FEWEST_TIMES else _RECENT_LAST
        return not self._says_it_waits or (self._waits == self._nonce and age < recent)

    def _cancel(self) -> None:
        error = self._error
        if error is None or self._is_connecting or self._is_canceled or not self._is_waiting:
            return

        def is_meant() -> bool:
            if self._error is not error:
                return False
            self._is_connecting = False
            self._is_canceled = self._is_waiting  # if not, it is tried when it says so again
            return self._is_canceled

        self._is_connecting = True
        self._cancel_statement(is_meant)

    def reason(
        self, response: ErrorResponse, server_version: int, *, is_ours: bool
    ) -> SQLError | None:
        """What has led to an error, if that is the cancel. `is_ours`: whether it was raised in one
        of the functions that wait."""
        if not self._is_canceled or response.sqlstate != QUERY_CANCELED:
            return None
        if not is_ours and response.fields.get("R") != _CANCELED_BY:
            return None
        return self._error if is_ours or server_version < _SIGNALS_ONCE else None
