"""Every typed message of the protocol: a frozen dataclass each, with `parse` and `serialize`.

Invariant: a message is a value that holds what its bytes say. The manual's "Message Flow" by file:

- `authentication`: start-up, up to the first ReadyForQuery
- `query`: the simple protocol, and result rows
- `extended`: Parse, Bind, Describe, Execute, Close, Sync
- `copy`: COPY in, out and both ways
- `function_call`: the legacy function call
- `asynchronous`: errors, notices, settings, notifications

A type byte means one thing from a frontend and another from a backend (``D``: Describe, DataRow),
so there are two ways in: `parse_frontend` and `parse_backend`.
"""

from __future__ import annotations

from typing import get_args

from protocol.messages.asynchronous import (
    ErrorResponse,
    NoticeResponse,
    NotificationResponse,
    ParameterStatus,
)
from protocol.messages.authentication import (
    AuthenticationCleartextPassword,
    AuthenticationGSS,
    AuthenticationGSSContinue,
    AuthenticationKerberosV5,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    AuthenticationSCMCredential,
    AuthenticationSSPI,
    BackendKeyData,
    GSSResponse,
    NegotiateProtocolVersion,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from protocol.messages.base import Message
from protocol.messages.copy import (
    CopyBothResponse,
    CopyData,
    CopyDone,
    CopyFail,
    CopyInResponse,
    CopyOutResponse,
)
from protocol.messages.extended import (
    Bind,
    BindComplete,
    Close,
    CloseComplete,
    Describe,
    Execute,
    Flush,
    NoData,
    ParameterDescription,
    Parse,
    ParseComplete,
    PortalSuspended,
    Sync,
)
from protocol.messages.function_call import FunctionCall, FunctionCallResponse
from protocol.messages.query import (
    CommandComplete,
    DataRow,
    EmptyQueryResponse,
    Field,
    Query,
    ReadyForQuery,
    RowDescription,
    Terminate,
)
from protocol.wire import ProtocolViolation

FrontendMessage = (
    Bind
    | Close
    | CopyData
    | CopyDone
    | CopyFail
    | Describe
    | Execute
    | Flush
    | FunctionCall
    | GSSResponse
    | Parse
    | PasswordMessage
    | Query
    | SASLInitialResponse
    | SASLResponse
    | Sync
    | Terminate
)

BackendMessage = (
    AuthenticationRequest
    | BackendKeyData
    | BindComplete
    | CloseComplete
    | CommandComplete
    | CopyBothResponse
    | CopyData
    | CopyDone
    | CopyInResponse
    | CopyOutResponse
    | DataRow
    | EmptyQueryResponse
    | ErrorResponse
    | FunctionCallResponse
    | NegotiateProtocolVersion
    | NoData
    | NoticeResponse
    | NotificationResponse
    | ParameterDescription
    | ParameterStatus
    | ParseComplete
    | PortalSuspended
    | ReadyForQuery
    | RowDescription
)

_FRONTEND: dict[int, type[FrontendMessage]] = {
    **{message.type: message for message in get_args(FrontendMessage)},
    PasswordMessage.type: PasswordMessage,
}

_BACKEND: dict[int, type[BackendMessage]] = {
    message.type: message for message in get_args(BackendMessage)
}


def parse_frontend(type: int, body: bytes | bytearray | memoryview) -> FrontendMessage:
    """The frontend message with this type byte and body (what follows the length word).

    ``p`` gives PasswordMessage. If the backend has asked for SASL or GSS, use
    `SASLInitialResponse.parse`, `SASLResponse.parse` or `GSSResponse.parse` instead.

    Raises:
        ProtocolViolation: malformed, or a type that frontends do not send.
    """
    message = _FRONTEND.get(type)
    if message is None:
        raise ProtocolViolation(f"unknown frontend message type {type}")
    return message.parse(body)


def parse_backend(type: int, body: bytes | bytearray | memoryview) -> BackendMessage:
    """The backend message with this type byte and body (what follows the length word).

    Raises:
        ProtocolViolation: malformed, or a type that backends do not send.
    """
    if type == AuthenticationOk.type:
        return parse_authentication(body)
    message = _BACKEND.get(type)
    if message is None:
        raise ProtocolViolation(f"unknown backend message type {type}")
    return message.parse(body)


__all__ = [
    "AuthenticationCleartextPassword",
    "AuthenticationGSS",
    "AuthenticationGSSContinue",
    "AuthenticationKerberosV5",
    "AuthenticationMD5Password",
    "AuthenticationOk",
    "AuthenticationRequest",
    "AuthenticationSASL",
    "AuthenticationSASLContinue",
    "AuthenticationSASLFinal",
    "AuthenticationSCMCredential",
    "AuthenticationSSPI",
    "BackendKeyData",
    "BackendMessage",
    "Bind",
    "BindComplete",
    "Close",
    "CloseComplete",
    "CommandComplete",
    "CopyBothResponse",
    "CopyData",
    "CopyDone",
    "CopyFail",
    "CopyInResponse",
    "CopyOutResponse",
    "DataRow",
    "Describe",
    "EmptyQueryResponse",
    "ErrorResponse",
    "Execute",
    "Field",
    "Flush",
    "FrontendMessage",
    "FunctionCall",
    "FunctionCallResponse",
    "GSSResponse",
    "Message",
    "NegotiateProtocolVersion",
    "NoData",
    "NoticeResponse",
    "NotificationResponse",
    "ParameterDescription",
    "ParameterStatus",
    "Parse",
    "ParseComplete",
    "PasswordMessage",
    "PortalSuspended",
    "Query",
    "ReadyForQuery",
    "RowDescription",
    "SASLInitialResponse",
    "SASLResponse",
    "Sync",
    "Terminate",
    "parse_authentication",
    "parse_backend",
    "parse_frontend",
]
