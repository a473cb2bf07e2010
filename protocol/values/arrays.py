r"""Arrays: ``[2:3]={1,NULL}`` as dimensions and elements (manual, "Array Input and Output Syntax").

Invariant: any array that PostgreSQL accepts is read, since users write them; elements are only
delimited. The delimiter is a comma, as for every type but ``box``.

In a client_encoding whose characters can end in an ASCII byte (SJIS, BIG5, GBK, UHC, GB18030,
JOHAB), that byte may look like ``\``, ``{`` or ``}``. There the structure is read from a *masked*
copy of the same length, in which such characters are replaced by bytes from 0x80 on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol import wire
from protocol.wire import ProtocolViolation

MAX_DIMENSIONS: Final = 6
"""PostgreSQL's MAXDIM."""

_SPACE = rb"[ \t\n\r\v\f]*+"
_BOUND = re.compile(rb"%b\[(?:([+-]?[0-9]{1,10}):)?([+-]?[0-9]{1,10})\]" % _SPACE)
_EQUALS = re.compile(rb"%b=" % _SPACE)
_OPEN = re.compile(rb"%b\{" % _SPACE)
_CLOSE = re.compile(rb"%b\}" % _SPACE)
_END = re.compile(rb"%b\Z" % _SPACE)
_DELIMITER = re.compile(rb"%b([,}])" % _SPACE)
_QUOTED = rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
_WORD = rb'(?:[^"\\{}, \t\n\r\v\f]|\\.)++'
_PLAIN = rb"(%b(?:[ \t\n\r\v\f]++%b)*+)" % (_WORD, _WORD)
# An element with the delimiter behind it, in one match: arrays may be long.
_ELEMENT = re.compile(rb"%b(?:%b|%b)%b([,}])" % (_SPACE, _QUOTED, _PLAIN, _SPACE), re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Array:
    """An array of anything.

    Attributes:
        dimensions: (size, lower bound) of each, outermost first; empty for an empty array.
        elements: the text of each, None for NULL, in storage order (the last index runs first).
    """

    dimensions: tuple[tuple[int, int], ...]
    elements: list[bytes | None]

    @classmethod
    def parse(cls, text: bytes, masked: bytes | None = None) -> Array:
        """The array that this literal denotes.

        Raises:
            ProtocolViolation: malformed.
        """
        return _Parser(text, text if masked is None else masked).array()

    def to_binary(self, element_oid: int, convert: Callable[[bytes], bytes]) -> bytes:
        """Binary form: number of dimensions, whether there are NULLs, type, dimensions, elements.

        `convert` gives the binary form of an element.
        """
        header = (len(self.dimensions), int(None in self.elements))
        parts = [*map(wire.int32, header), wire.uint32(element_oid)]
        parts += [wire.int32(number) for dimension in self.dimensions for number in dimension]
        parts += [
            wire.value(None if element is None else convert(element)) for element in self.elements
        ]
        return b"".join(parts)


def parse_array(text: bytes, masked: bytes | None = None) -> list[bytes | None]:
    """The elements of an array of at most one dimension; None is NULL.

    Raises:
        ProtocolViolation: malformed, or of more dimensions.
    """
    if text == b"{}":  # most are
        return []
    if (elements := _plain_list(text, text if masked is None else masked)) is not None:
        return elements
    array = Array.parse(text, masked)
    if len(array.dimensions) > 1:
        raise ProtocolViolation("the array has more than one dimension")
    return array.elements


def _plain_list(text: bytes, masked: bytes) -> list[bytes | None] | None:
    """The elements of an array as the server writes it, of one dimension and without bounds. None
    for any other text: `_Parser` says what it is, or what is wrong with it."""
    if masked[:1] != b"{":
        return None
    elements: list[bytes | None] = []
    at = 1
    while match := _ELEMENT.match(masked, at):
        elements.append(_element(text, masked, match))
        at = match.end()
        if match[3] == b"}":
            return elements if at == len(masked) else None
    return None


def _element(text: bytes, masked: bytes, match: re.Match[bytes]) -> bytes | None:
    """What `_ELEMENT` has matched; None for NULL."""
    quoted, plain, _ = match.groups()
    if quoted is None and plain.upper() == b"NULL":
        return None
    start, end = match.span(2 if quoted is None else 1)
    if b"\\" not in (plain if quoted is None else quoted):
        return text[start:end]
    parts = []
    for escape in _ESCAPE.finditer(masked, start, end):
        parts.append(text[start : escape.start()])
        start = escape.start(1)
    return b"".join([*parts, text[start:end]])


class _Parser:
    """Reads one literal."""

    def __init__(self, text: bytes, masked: bytes) -> None:
        self._text = text
        self._masked = masked
        self._at = 0
        self._elements: list[bytes | None] = []
        self._sizes: dict[int, int] = {}  # by depth, known once the first array there is closed
        self._element_depth: int | None = None

    def array(self) -> Array:
        declared = self._declared_dimensions()
        self._expect(_OPEN)
        if not self._accept(_CLOSE):
            self._items(0)
        self._expect(_END)
        sizes = [self._sizes[depth] for depth in range(len(self._sizes))]
        if declared and [size for size, _ in declared] != sizes:
            raise ProtocolViolation("the array's bounds do not match its contents")
        return Array(tuple(declared or [(size, 1) for size in sizes]), self._elements)

    def _declared_dimensions(self) -> list[tuple[int, int]]:
        """An optional ``[1:2][0:4]=``."""
        dimensions = []
        while match := self._accept(_BOUND):
            lower, upper = int(match[1] or 1), int(match[2])
            if not -(2**31) <= lower <= upper < 2**31 - 1:
                raise _malformed()
            dimensions.append((upper - lower + 1, lower))
        if dimensions:
            self._expect(_EQUALS)
        return dimensions

    def _items(self, depth: int) -> None:
        """The items up to the closing brace, which is consumed."""
        if depth == MAX_DIMENSIONS:
            raise ProtocolViolation(f"an array has {MAX_DIMENSIONS} dimensions at most")
        count = 0
        delimiter = b","
        while delimiter == b",":
            if match := self._accept(_ELEMENT):
                if self._element_depth not in (None, depth):
                    raise _malformed()
                self._element_depth = depth
                self._elements.append(_element(self._text, self._masked, match))
                delimiter = match[3]
            else:
                self._expect(_OPEN)
                if self._element_depth is not None and self._element_depth <= depth:
                    raise _malformed()
                self._items(depth + 1)
                delimiter = self._expect(_DELIMITER)[1]
            count += 1
        if self._sizes.setdefault(depth, count) != count:
            raise ProtocolViolation("the rows of a multidimensional array differ in length")

    def _accept(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        match = pattern.match(self._masked, self._at)
        if match:
            self._at = match.end()
        return match

    def _expect(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        match = self._accept(pattern)
        if match is None:
            raise _malformed()
        return match


def _malformed() -> ProtocolViolation:
    return ProtocolViolation("malformed array literal")
