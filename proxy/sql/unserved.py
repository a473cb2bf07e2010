"""Calls that the proxy has not served: the server's complaint about them, in our words.

The rule: such a statement goes to the server as it is. Functions of ours do not exist there, so
the server stops at the call, wherever it stands (a DO block, a view, a function's body), with
undefined_function, and at our views with undefined_table. Only these errors are replaced; whatever
else is wrong with a statement, the server says it first, and says it as it does without us.
"""

from __future__ import annotations

import re
from typing import Final

from protocol.errors import FEATURE_NOT_SUPPORTED, UNDEFINED_FUNCTION, UNDEFINED_TABLE
from protocol.messages import ErrorResponse
from proxy.functions import BOOL, FUNCTIONS, HANDLES, INT4, INT8, TEXT, VIEWS, Function, Type

_CALL: Final = re.compile(r"(?:(?:\w+|\"[^\"]+\")\.)?(\w*pg_background\w*)\((.*?)\)(?=\W*\s|$)")

# The server's message about an extension whose files it does not have, in any language.
_EXTENSION: Final = re.compile(rb'"pg_background"|/pg_background\.control')

_VIEW: Final = re.compile(rf'["«„.]({"|".join(VIEWS)})["»“]')

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
    if b"pg_background" not in body or not (b"C42883\0" in body or b"C42P01\0" in body):
        return None
    error = ErrorResponse.parse(body)
    if error.sqlstate == UNDEFINED_TABLE:
        return _unserved_view(error)
    call = _CALL.search(error.message.decode("utf-8", "replace"))
    if call is None or error.sqlstate != UNDEFINED_FUNCTION:
        return None
    name, arguments = call.groups()
    if not any(_accepts(function, arguments) for function in FUNCTIONS.get(name, ())):
        return None
    return _replacement(
        error,
        f"{name} cannot be called in this place",
        "The proxy serves calls in the select list of a plain SELECT, and functions that are"
        " alone in FROM.",
        f"Call it directly, as in SELECT {name}(...); or say CREATE EXTENSION pg_background, to"
        " have it everywhere in the search_path.",
    )


def unavailable(body: bytes) -> bytes | None:
    """The same for CREATE EXTENSION from inside a block or function, which only the server sees,
    and which does not know where to find it."""
    if b"pg_background" not in body or not (b"C0A000\0" in body or b"C58P01\0" in body):
        return None
    error = ErrorResponse.parse(body)
    if "W" not in error.fields or not _EXTENSION.search(error.message):
        return None
    hint = (
        b"The proxy carries out CREATE EXTENSION pg_background where it is a statement of its own,"
        b" not in a block or function."
    )
    return error.with_fields(H=hint).serialize()


def _replacement(error: ErrorResponse, message: str, detail: str, hint: str) -> bytes:
    """The error in our words; it is still about the same place."""
    fields = {code: value for code, value in error.fields.items() if code in "SVPpqW"}
    fields["C"] = FEATURE_NOT_SUPPORTED.encode()
    fields["M"] = message.encode()
    fields["D"] = detail.encode()
    fields["H"] = hint.encode()
    return ErrorResponse(fields).serialize()


def _unserved_view(error: ErrorResponse) -> bytes | None:
    found = _VIEW.search(error.message.decode("utf-8", "replace"))
    name = found[1] if found else None
    if name is None:
        return None
    return _replacement(
        error,
        f"{name} cannot be selected from in this place",
        "The proxy serves the view where it is alone in FROM, with plain columns.",
        f"Select from it directly, as in SELECT * FROM {name}; or say CREATE EXTENSION"
        " pg_background, to have it everywhere in the search_path.",
    )


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
