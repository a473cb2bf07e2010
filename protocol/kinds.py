"""The types of messages, by the manual's names ("Message Formats").

A type byte means one thing from a frontend and another from a backend (``D``: Describe, DataRow),
so there are two namespaces, under the letters with which the manual marks its messages. Below them
stand the groups of types that its "Message Flow" treats alike.
"""

from __future__ import annotations

from typing import Final


class F:
    """(F): what a frontend sends. ``p`` is the type of all its answers during the login."""

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
    """(B): what a backend sends. ``R`` is the type of all its authentication requests."""

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
    """What ReadyForQuery says of the transaction."""

    IDLE: Final = ord("I")
    """Not in a transaction block."""
    IN_BLOCK: Final = ord("T")
    FAILED: Final = ord("E")
    """In a failed transaction block: up to its end the server rejects everything else."""


# Of the frontend

EXTENDED: Final = bytes([F.PARSE, F.BIND, F.DESCRIBE, F.EXECUTE, F.CLOSE])
"""The extended protocol, where each of these has an answer of its own, and after an error none has
one up to the next Sync."""

ENDS_COPY_IN: Final = bytes([F.COPY_DONE, F.COPY_FAIL])
"""What ends the data of COPY FROM STDIN; ignored where nothing is copied."""

GETS_READY: Final = bytes([F.QUERY, F.SYNC, F.FUNCTION_CALL])
"""What is answered with a ReadyForQuery in the end."""

AFTER_LOGIN: Final = bytes(
    [*EXTENDED, *ENDS_COPY_IN, *GETS_READY, F.COPY_DATA, F.FLUSH, F.TERMINATE]
)
"""All that a frontend may send after the login; for any other type the server ends the session."""


# Of the backend

ENDS_PARSE: Final = bytes([B.PARSE_COMPLETE])
ENDS_BIND: Final = bytes([B.BIND_COMPLETE])
ENDS_CLOSE: Final = bytes([B.CLOSE_COMPLETE])
ENDS_DESCRIBE: Final = bytes([B.ROW_DESCRIPTION, B.NO_DATA])
ENDS_EXECUTE: Final = bytes([B.COMMAND_COMPLETE, B.EMPTY_QUERY_RESPONSE, B.PORTAL_SUSPENDED])
"""What ends the answer to a message of the extended protocol, unless that is an ErrorResponse."""

ENDS_EXTENDED: Final = ENDS_PARSE + ENDS_BIND + ENDS_CLOSE + ENDS_DESCRIBE + ENDS_EXECUTE

ASYNCHRONOUS: Final = bytes([B.NOTICE_RESPONSE, B.NOTIFICATION_RESPONSE, B.PARAMETER_STATUS])
"""What may come at any time, within another answer or between two."""
