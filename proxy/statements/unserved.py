"""Rewords the server's errors about calls that the proxy has not served.

Invariant: such a statement goes to the server unchanged. There our functions do not exist, so it
stops at the call, wherever that is (a DO block, a view, a function body), with undefined_function,
or at our views with undefined_table. Only these errors are replaced.
"""

from __future__ import annotations

import re
from typing import Final

from protocol.errors import FEATURE_NOT_SUPPORTED, UNDEFINED_FUNCTION, UNDEFINED_TABLE
from protocol.messages import ErrorResponse
from proxy.api.functions import BOOL, FUNCTIONS, HANDLES, INT4, INT8, TEXT, VIEWS, Function, Type
from proxy.sql.lexer import MAX_BYTES, MAX_TEXT, MAX_TOKENS

# A name and argument types. Matches begin at the first letter of a name.
_CALL: Final = re.compile(r"(?<!\w)(\w++)\(([^()]*+)\)")

_MESSAGE_SIZE: Final = 2048
"""Bytes of a message that are read, since anybody can raise one; the server's are shorter."""

# The server's error about an extension without files, in any language
_EXTENSION: Final = re.compile(rb'"pg_background"|/pg_background\.control')

_VIEW: Final = re.compile(rf'["«„.]({"|".join(VIEWS)})["»“]')

# Types that the server converts to a parameter's type by itself
_ACCEPTED: Final[dict[Type, frozenset[str]]] = {
    TEXT: frozenset({"text", "character varying", "character", "name", "unknown", '"char"'}),
    INT4: frozenset({"integer", "smallint", "unknown"}),
    INT8: frozenset({"bigint", "integer", "smallint", "unknown"}),
    BOOL: frozenset({"boolean", "unknown"}),
    HANDLES: frozenset({"pg_background_handle[]", "record[]", "text", "unknown"}),
}


def unserved(body: bytes, *, too_long: bool = False) -> bytes | None:
    """The replacement for an ErrorResponse with this body; None if it is not about such a call.

    `too_long`: the statement was not searched for calls, because it exceeds the lexer's budget.
    """
    if b"pg_background" not in body or not (b"C42883\0" in body or b"C42P01\0" in body):
        return None
    error = ErrorResponse.parse(body)
    message = error.message[:_MESSAGE_SIZE].decode("utf-8", "replace")
    if error.sqlstate == UNDEFINED_TABLE:
        name = found[1] if (found := _VIEW.search(message)) else None
    elif error.sqlstate == UNDEFINED_FUNCTION:
        name = _called(message)
    else:
        return None
    if name is None:
        return None
    if too_long:
        said = (
            f"{name} was not looked for in a text of this length",
            f"The proxy reads up to {MAX_BYTES // 1024} kB outside of string constants, and"
            f" {MAX_TOKENS} tokens, of what is sent as one string, and {MAX_TEXT >> 20} MB in all.",
            f"Send the statement with {name} by itself, and what is long in it as a string constant"
            " or a parameter.",
        )
    elif error.sqlstate == UNDEFINED_TABLE:
        said = (
            f"{name} cannot be selected from in this place",
            "The proxy serves the view where it is alone in FROM, with plain columns.",
            f"Select from it directly, as in SELECT * FROM {name}; or say CREATE EXTENSION"
            " pg_background, to have it everywhere in the search_path.",
        )
    else:
        said = (
            f"{name} cannot be called in this place",
            "The proxy serves calls in the select list of a plain SELECT, and functions that are"
            " alone in FROM.",
            f"Call it directly, as in SELECT {name}(...); or say CREATE EXTENSION pg_background, to"
            " have it everywhere in the search_path.",
        )
    # The position is still right.
    fields = {code: value for code, value in error.fields.items() if code in "SVPpqW"}
    words = zip("CMDH", (FEATURE_NOT_SUPPORTED, *said), strict=True)
    return ErrorResponse(fields | {code: text.encode() for code, text in words}).serialize()


def unavailable(body: bytes) -> bytes | None:
    """The same for CREATE EXTENSION in a block or function: the server lacks its files."""
    if b"pg_background" not in body or not (b"C0A000\0" in body or b"C58P01\0" in body):
        return None
    error = ErrorResponse.parse(body)
    if "W" not in error.fields or not _EXTENSION.search(error.message[:_MESSAGE_SIZE]):
        return None
    hint = (
        b"The proxy carries out CREATE EXTENSION pg_background where it is a statement of its own,"
        b" or one of a DO block; not in a function, or where SQL is put together for EXECUTE."
    )
    return error.with_fields(H=hint).serialize()


def _called(message: str) -> str | None:
    """The function of ours that is undefined, according to a message."""
    for name, arguments in _CALL.findall(message):
        if any(_accepts(function, arguments) for function in FUNCTIONS.get(name, ())):
            return str(name)
    return None


def _accepts(function: Function, arguments: str) -> bool:
    """Whether a function accepts the argument types that the server's message lists."""
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
