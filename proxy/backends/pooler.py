"""Explains the errors that a connection pooler in front of the server causes.

Invariant: the server tells whether there is a pooler: its pid differs from the one at login.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import (
    ACTIVE_SQL_TRANSACTION,
    INVALID_TRANSACTION_TERMINATION,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
)
from protocol.messages import ErrorResponse

_NO_PROXY: Final = b"this session does not go through pg-background-proxy"
"""The error of the extension's functions (`extension/sql/ask.sql`) if the word is missing that the
proxy gives each session at login, and that no pooler passes on."""

_REFUSES_BLOCKS: Final = (ACTIVE_SQL_TRANSACTION, INVALID_TRANSACTION_TERMINATION)

_WORDS: Final = {
    "M": b"calls from inside the database are not possible behind a connection pooler",
    "D": b"The proxy reaches the server through a connection pooler, and an answer would not find"
    b" the function that waits for it.",
    "H": b"Call the function in a SELECT of its own, or have the proxy connect to the server"
    b" itself.",
}


def explained(error: ErrorResponse) -> ErrorResponse:
    """An error from behind a pooler, reworded if it is about a call from inside the database."""
    if error.sqlstate == OBJECT_NOT_IN_PREREQUISITE_STATE and error.message == _NO_PROXY:
        return error.with_fields(**_WORDS)
    return error


def explained_of_job(error: ErrorResponse) -> ErrorResponse:
    """The same for a job; an error of a statement that refuses transaction blocks is explained."""
    if error.sqlstate not in _REFUSES_BLOCKS:
        return explained(error)
    return error.with_fields(
        H=b"The proxy reaches the server through a connection pooler, so background workers run in"
        b" a transaction block. Have the proxy connect to the server itself."
    )
