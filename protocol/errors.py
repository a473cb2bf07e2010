"""The errors that clients get, and the SQLSTATEs in use.

Invariant: an `SQLError` holds everything that its ErrorResponse will say. SQLSTATE and texts are
chosen where it is raised; nothing is added later.

The constants are named as in the manual's appendix "PostgreSQL Error Codes", in upper case.
"""

from __future__ import annotations

from typing import Final

from protocol.messages import ErrorResponse
from protocol.wire import ProtocolViolation as ProtocolViolation

WARNING: Final = "01000"
CONNECTION_FAILURE: Final = "08006"
PROTOCOL_VIOLATION: Final = "08P01"
FEATURE_NOT_SUPPORTED: Final = "0A000"
NULL_VALUE_NOT_ALLOWED: Final = "22004"
INVALID_PARAMETER_VALUE: Final = "22023"
INVALID_ESCAPE_SEQUENCE: Final = "22025"
INVALID_TEXT_REPRESENTATION: Final = "22P02"
ACTIVE_SQL_TRANSACTION: Final = "25001"
INVALID_AUTHORIZATION_SPECIFICATION: Final = "28000"
INVALID_PASSWORD: Final = "28P01"  # noqa: S105 - a SQLSTATE
INVALID_TRANSACTION_TERMINATION: Final = "2D000"
TRANSACTION_ROLLBACK: Final = "40000"
INSUFFICIENT_PRIVILEGE: Final = "42501"
INVALID_NAME: Final = "42602"
UNDEFINED_COLUMN: Final = "42703"
UNDEFINED_OBJECT: Final = "42704"
DATATYPE_MISMATCH: Final = "42804"
UNDEFINED_TABLE: Final = "42P01"
UNDEFINED_FUNCTION: Final = "42883"
INSUFFICIENT_RESOURCES: Final = "53000"
TOO_MANY_CONNECTIONS: Final = "53300"
CONFIGURATION_LIMIT_EXCEEDED: Final = "53400"
PROGRAM_LIMIT_EXCEEDED: Final = "54000"
OBJECT_NOT_IN_PREREQUISITE_STATE: Final = "55000"
QUERY_CANCELED: Final = "57014"
ADMIN_SHUTDOWN: Final = "57P01"
CANNOT_CONNECT_NOW: Final = "57P03"
DEADLOCK_DETECTED: Final = "40P01"
SERIALIZATION_FAILURE: Final = "40001"
INTERNAL_ERROR: Final = "XX000"


class SQLError(Exception):
    """An error to report to a client, with the fields of an ErrorResponse.

    Args:
        sqlstate: five characters, one of the constants of this module.
        message: the primary message; one line, no full stop (manual, "Error Message Style Guide").
        detail, hint, context: the secondary messages, if any.
        severity: ERROR; FATAL and PANIC end the session.
    """

    def __init__(
        self,
        sqlstate: str,
        message: str,
        *,
        detail: str | None = None,
        hint: str | None = None,
        context: str | None = None,
        severity: str = "ERROR",
    ) -> None:
        super().__init__(sqlstate, message)
        self.sqlstate = sqlstate
        self.message = message
        self.detail = detail
        self.hint = hint
        self.context = context
        self.severity = severity

    def __str__(self) -> str:
        return f"{self.message} (SQLSTATE {self.sqlstate})"

    @property
    def is_fatal(self) -> bool:
        """Whether it ends the session."""
        return self.severity in ("FATAL", "PANIC")

    def response(self, encoding: str = "utf-8") -> ErrorResponse:
        """The ErrorResponse of this error, in `encoding` (a Python codec's name).

        NUL and characters that the encoding lacks become ``?``.
        """
        texts = {
            "S": self.severity,
            "V": self.severity,
            "C": self.sqlstate,
            "M": self.message,
            "D": self.detail,
            "H": self.hint,
            "W": self.context,
        }
        return ErrorResponse(
            {
                code: text.replace("\0", "?").encode(encoding, "replace")
                for code, text in texts.items()
                if text is not None
            }
        )


class ServerError(SQLError):
    """An error that a server has sent. Its ErrorResponse is passed on unchanged, with all fields.

    The exception's own texts serve logs and errors about this one.
    """

    def __init__(self, response: ErrorResponse) -> None:
        detail, hint, context = map(response.text, "DHW")
        super().__init__(
            response.sqlstate,
            response.text("M") or "",
            detail=detail,
            hint=hint,
            context=context,
            severity=response.severity,
        )
        self._response = response

    def __str__(self) -> str:
        return self.message

    def response(self, encoding: str = "utf-8") -> ErrorResponse:
        return self._response
