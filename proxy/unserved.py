"""Calls that the proxy has not served: the server's complaint about them, in our words.

The rule: such a statement goes to the server as it is. Functions of ours do not exist there, so
the server stops at the call, wherever it stands (a DO block, a view, a function's body), with
undefined_function. Only this error is replaced; whatever else is wrong with a statement, the
server says it first, and says it as it does without us.
"""

from __future__ import annotations

import re
from typing import Final

from protocol.errors import FEATURE_NOT_SUPPORTED, UNDEFINED_FUNCTION
from protocol.messages import ErrorResponse
from proxy.functions import BOOL, FUNCTIONS, HANDLES, INT4, INT8, TEXT, Function, Type

_CALL: Final = re.compile(r"(?:(?:\w+|\"[^\"]+\")\.)?(\w*pg_background\w*)\((.*?)\)(?=\W*\s|$)")

# What the server converts to a parameter's type by itself.
_ACCEPTED: Final[dict[Type, frozenset[str]]] = {
    TEXT: frozenset({"text", "character varying", "character", "name", "unknown", '"char"'}),
    INT4: frozenset({"integer", "smallint", "unknown"}),
    INT8: frozenset({"bigint", "integer", "smallint", "unknown"}),
    BOOL: frozenset({"boolean", "unknown"}),
    HANDLES: frozenset({"pg_background_handle[]", "record[]", "text", "unknown"}),
}


def unserved(body: bytes) -> bytes | None:
    """The ErrorResponse in place of one with this body, or None if it is not about such a call."""
    if b"C42883\0" not in body or b"pg_background" not in body:
        return None
    error = ErrorResponse.parse(body)
    call = _CALL.search(error.message.decode("utf-8", "replace"))
    if call is None or error.sqlstate != UNDEFINED_FUNCTION:
        return None
    name, arguments = call.groups()
    if not any(_accepts(function, arguments) for function in FUNCTIONS.get(name, ())):
        return None
    fields = {code: value for code, value in error.fields.items() if code in "SVPpqW"}
    fields["C"] = FEATURE_NOT_SUPPORTED.encode()
    fields["M"] = f"{name} cannot be called in this place".encode()
    fields["D"] = (
        b"The proxy serves calls in the select list of a plain SELECT, and functions that are"
        b" alone in FROM."
    )
    fields["H"] = f"Call it directly, as in SELECT {name}(...).".encode()
    return ErrorResponse(fields).serialize()


def _accepts(function: Function, arguments: str) -> bool:
    """Whether the server's list of argument types, as in its message, fits a function."""
    given = [argument for argument in arguments.split(", ") if argument]
    required = sum(parameter.required for parameter in function.parameters)
    if not required <= len(given) <= len(function.parameters):
        return False
    for parameter, argument in zip(function.parameters, given, strict=False):
        name, arrow, type_name = argument.rpartition(" => ")
        if arrow:
            named = [p for p in function.parameters if p.is_called(name)]
            if not named:
                return False
            parameter = named[0]
        if type_name not in _ACCEPTED[parameter.type]:
            return False
    return True
