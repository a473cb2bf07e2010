"""The types of messages, by the manual's names ("Message Formats").

A type byte means one thing from a frontend and another from a backend (``D``: Describe, DataRow):
hence two namespaces, named by the manual's marks. "Message Flow" treats the groups below alike.
"""

from __future__ import annotations

from typing import Final


class F:
    """(F): sent by a frontend. ``p`` is the type of all its answers during the login."""

    BIND: Final = ord("B")
    CLOSE: Final = ord("C")
    COPY_DATA: Final = ord("d")
    COPY_DONE: Final = ord("c")
    COPY_FAIL: Final = ord("f")
    DESCRIBE: Final = ord("D")
    EXECUTE: Final = ord("E")
    FLUSH: Final = ord("H")
    FUNCTION_CALL: Final = ord("F")
    PARSE: Final = ord("P")
    PASSWORD_MESSAGE: Final = ord("p")
    QUERY: Final = ord("Q")
    SYNC: Final = ord("S")
    TERMINATE: Final = ord("X")


class B:
    """(B): sent by a backend. ``R`` is the type of all authentication requests."""

    AUTHENTICATION: Final = ord("R")
    BACKEND_KEY_DATA: Final = ord("K")
    BIND_COMPLETE: Final = ord("2")
    CLOSE_COMPLETE: Final = ord("3")
    COMMAND_COMPLETE: Final = ord("C")
    COPY_BOTH_RESPONSE: Final = ord("W")
    COPY_DATA: Final = ord("d")
    COPY_DONE: Final = ord("c")
    COPY_IN_RESPONSE: Final = ord("G")
    COPY_OUT_RESPONSE: Final = ord("H")
    DATA_ROW: Final = ord("D")
    EMPTY_QUERY_RESPONSE: Final = ord("I")
    ERROR_RESPONSE: Final = ord("E")
    FUNCTION_CALL_RESPONSE: Final = ord("V")
    NEGOTIATE_PROTOCOL_VERSION: Final = ord("v")
    NOTICE_RESPONSE: Final = ord("N")
    NOTIFICATION_RESPONSE: Final = ord("A")
    NO_DATA: Final = ord("n")
    PARAMETER_DESCRIPTION: Final = ord("t")
    PARAMETER_STATUS: Final = ord("S")
    PARSE_COMPLETE: Final = ord("1")
    PORTAL_SUSPENDED: Final = ord("s")
    READY_FOR_QUERY: Final = ord("Z")
    ROW_DESCRIPTION: Final = ord("T")


class TransactionStatus:
    """The transaction status in ReadyForQuery."""

    IDLE: Final = ord("I")
    """Not in a transaction block."""
    IN_BLOCK: Final = ord("T")
    FAILED: Final = ord("E")
    """In a failed transaction block: the server rejects everything but its end."""


# Of the frontend

EXTENDED: Final = bytes([F.PARSE, F.BIND, F.DESCRIBE, F.EXECUTE, F.CLOSE])
"""The extended protocol: each message has its own answer; after an error, none has up to Sync."""

ENDS_COPY_IN: Final = bytes([F.COPY_DONE, F.COPY_FAIL])
"""End the data of COPY FROM STDIN; ignored outside a COPY."""

GETS_READY: Final = bytes([F.QUERY, F.SYNC, F.FUNCTION_CALL])
"""Answered, in the end, by ReadyForQuery."""

AFTER_LOGIN: Final = bytes(
    [*EXTENDED, *ENDS_COPY_IN, *GETS_READY, F.COPY_DATA, F.FLUSH, F.TERMINATE]
)
"""All that a frontend may send after the login; the server ends the session at any other type."""


# Of the backend

ENDS_PARSE: Final = bytes([B.PARSE_COMPLETE])
ENDS_BIND: Final = bytes([B.BIND_COMPLETE])
ENDS_CLOSE: Final = bytes([B.CLOSE_COMPLETE])
ENDS_DESCRIBE: Final = bytes([B.ROW_DESCRIPTION, B.NO_DATA])
ENDS_EXECUTE: Final = bytes([B.COMMAND_COMPLETE, B.EMPTY_QUERY_RESPONSE, B.PORTAL_SUSPENDED])
"""End the answer to a message of the extended protocol, unless an ErrorResponse does."""

ENDS_EXTENDED: Final = ENDS_PARSE + ENDS_BIND + ENDS_CLOSE + ENDS_DESCRIBE + ENDS_EXECUTE

ASYNCHRONOUS: Final = bytes([B.NOTICE_RESPONSE, B.NOTIFICATION_RESPONSE, B.PARAMETER_STATUS])
"""May come at any time, between answers or within one."""

STATEMENT: Final = b"S"
PORTAL: Final = b"P"
"""What Close and Describe are about."""
