"""The stand-in of a call: an expression that evaluates and type-checks the call's arguments, and
returns them as the text of one text[].

Invariant: SQL is edited by source span, between tokens; nothing is ever printed from a syntax tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from proxy.api.functions import BOOL, HANDLE, HANDLES, INT4, INT8, TEXT, Type
from proxy.sql.rewrite import Piece, Rewrite
from proxy.sql.tokens import NESTING
from proxy.statements.outline import Leaf, Outline, Site
from proxy.statements.plan import Call, Plan, ResultPlan, ScalarPlan, Substitute

# For each type, a function of pg_catalog that takes this type alone, so that the server resolves,
# converts and infers as for our function, and a conversion of its result to text. The client
# chooses search_path, so every name is qualified and no operator is used. For handles there is no
# such function: anything is accepted, and checked later.
TO_TEXT: Final[dict[Type, tuple[bytes, bytes]]] = {
    TEXT: (b"pg_catalog.textcat(", b", '')"),
    INT4: (b"CAST(pg_catalog.int4up(", b") AS pg_catalog.text)"),
    INT8: (b"CAST(pg_catalog.int8up(", b") AS pg_catalog.text)"),
    BOOL: (b"CAST(pg_catalog.booleq(", b", true) AS pg_catalog.text)"),
    HANDLES: (b"CAST(", b" AS pg_catalog.text)"),
}
_OPENINGS: Final = frozenset(opening for opening, _ in TO_TEXT.values())

_MESSAGE_SIZE: Final = 1024
"""Bytes of a message that are read, since anybody can raise one; the server's are shorter."""

# How the server names these functions in complaints about an argument's type
_SIGNATURE: Final = re.compile(
    rb"pg_catalog\.(?:textcat\((?P<text>.*), unknown\)|int4up\((?P<integer>.*)\)"
    rb"|int8up\((?P<bigint>.*)\)|booleq\((?P<boolean>.*), boolean\))",
    re.DOTALL,
)

_HANDLE_TYPE: Final = HANDLE.name.encode()


class Edit(NamedTuple):
    """Replaces ``original[start:end]`` by ``pieces``."""

    start: int
    end: int
    pieces: list[Piece]


def copied(outline: Outline, first: int, last: int) -> Piece:
    return Piece(outline.start(first), outline.end(last))


def insertion(outline: Outline, after: int, *pieces: Piece | bytes) -> Edit:
    """Inserts ``pieces`` right after a token, where no comment can swallow them."""
    offset = outline.end(after)
    return Edit(offset, offset, standing_at(offset, *pieces))


def in_place_of(outline: Outline, first: int, last: int, *pieces: Piece | bytes) -> Edit:
    """Replaces these tokens by ``pieces``."""
    start = outline.start(first)
    return Edit(start, outline.end(last), standing_at(start, *pieces))


def standing_at(offset: int, *pieces: Piece | bytes) -> list[Piece]:
    return [Piece(offset, offset, piece) if isinstance(piece, bytes) else piece for piece in pieces]


def stand_in(outline: Outline, site: Site) -> list[Piece]:
    """The call's arguments as the text of a text[]. Blanks separate it from other words."""
    at = outline.start(site.first)
    if not site.leaves:
        return standing_at(at, b" CAST('{}' AS pg_catalog.text) ")
    pieces = standing_at(at, b" CAST(ARRAY[")
    for number, leaf in enumerate(site.leaves):
        if number:
            pieces += standing_at(at, b", ")
        opening, closing = TO_TEXT[leaf.type]
        # It stands for the call's name, to which the server points if the type is wrong.
        pieces += standing_at(
            outline.start(leaf.name), opening, *expression(outline, leaf), closing
        )
    return pieces + standing_at(at, b"] AS pg_catalog.text) ")


def expression(outline: Outline, leaf: Leaf) -> list[Piece]:
    """An argument as written; but in one of handles, the handle type, unknown to the server,
    becomes text: rows, arrays of rows, string literals and parameters can all be cast to that."""
    pieces: list[Piece] = []
    done = outline.start(leaf.first)
    if leaf.type == HANDLES:
        for first, last in handle_types(outline, leaf.first, leaf.last):
            start = outline.start(first)
            pieces += [Piece(done, start), Piece(start, start, b"pg_catalog.text")]
            done = outline.end(last)
    return [*pieces, Piece(done, outline.end(leaf.last))]


def handle_types(outline: Outline, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The tokens of the type pg_background_handle in casts."""
    is_cast = [False]
    for at in range(first, last + 1):
        nesting = NESTING.get(outline.text(at), 0)
        if nesting > 0:
            is_cast.append(outline.keyword(at - 1) == "cast")
        elif nesting < 0:
            is_cast.pop()
        elif outline.name(at) == _HANDLE_TYPE and outline.text(at + 1) != b".":
            begin = outline.qualified(at)
            if outline.text(begin - 1) == b"::" or (
                outline.keyword(begin - 1) == "as" and is_cast[-1]
            ):
                yield begin, at


def rewritten(outline: Outline, *edits: Edit) -> Rewrite:
    """The statement with ``edits``, which are ordered and do not overlap."""
    pieces: list[Piece] = []
    done = 0
    for edit in edits:
        pieces += [Piece(done, edit.start), *edit.pieces]
        done = edit.end
    pieces.append(Piece(done, len(outline.sql)))
    return Rewrite(
        outline.sql, tuple(piece for piece in pieces if piece.start < piece.end or piece.inserted)
    )


def replacement(outline: Outline, site: Site, *pieces: Piece | bytes) -> Edit:
    """Replaces a call by its stand-in, with ``pieces`` behind that."""
    after = standing_at(outline.end(site.last), *pieces)
    return in_place_of(outline, site.first, site.last, *stand_in(outline, site), *after)


def complaint(
    plan: Plan | Substitute, message: bytes, position: int | None = None, codec: str = "utf-8"
) -> bytes | None:
    """The server's message about a function of the stand-in, reworded for the user's call.

    ``function pg_catalog.textcat(integer, unknown) does not exist`` becomes
    ``function pg_background_launch(integer) does not exist``, in any language.

    Args:
        plan: the plan with the stand-in.
        message: the error's field M.
        position: its field P, which tells one argument from another.
        codec: Python's name of the client encoding.

    Returns:
        None if the message is not about such a function.
    """
    found = _SIGNATURE.search(message, 0, _MESSAGE_SIZE)
    if found is None or isinstance(plan, Substitute):
        return None
    type_name = found.lastgroup or ""
    calls = [plan.call] if isinstance(plan, ResultPlan) else [c.call for c in plan.columns]
    if isinstance(plan, ScalarPlan) and plan.in_from:
        calls = [*calls[1:], calls[0]]
    leaves = [leaf for call in calls for leaf in call.leaves()]
    if position is not None:
        inserted = plan.rewrite.inserted_before(position, codec)
        leaves = leaves[max(sum(text in _OPENINGS for text in inserted) - 1, 0) :]
    for call, place in leaves:
        if call.arguments[place].parameter.type.name == type_name:
            signature = _signature(call, place, found[type_name])
            return message[: found.start()] + signature + message[found.end() :]
    return None


def _signature(call: Call, place: int, given: bytes) -> bytes:
    """The call with the types of its arguments, one of which is not as declared."""
    arguments = [
        (argument.name.encode() + b" => " if argument.name else b"")
        + (given if other == place else argument.parameter.type.name.encode())
        for other, argument in enumerate(call.arguments)
    ]
    return call.function.name.encode() + b"(" + b", ".join(arguments) + b")"
