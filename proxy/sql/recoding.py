"""Converts texts of jobs from the encoding of one session to that of another that asks for them.

Invariant: no text makes an answer fail, and none is invalid where it arrives. A byte that is no
character becomes ``\\x93``, as in psql; a character that the target lacks becomes ``?``, as in the
server's messages. (Rows are not such texts: the server converts them.)
"""

from __future__ import annotations

import codecs
import re
from typing import Final

from proxy.sql.encodings import CODECS, NO_CONVERSION, codec, is_valid

_DOUBLE: Final = rb"(?:[\x00-\x7f]|[\xa1-\xfe]{2}"
_STRUCTURES: Final = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        b"EUC_CN": _DOUBLE + rb")*+",
        b"EUC_KR": _DOUBLE + rb")*+",
        b"EUC_JP": _DOUBLE + rb"|\x8e[\xa1-\xdf]|\x8f[\xa1-\xfe]{2})*+",
        b"EUC_JIS_2004": _DOUBLE + rb"|[\x80-\x8d\x90-\xa0]|\x8e[\xa1-\xdf]|\x8f[\xa1-\xfe]{2})*+",
        b"EUC_TW": _DOUBLE + rb"|\x8e[\xa1-\xa7][\xa1-\xfe]{2})*+",
        b"SJIS": rb"(?:[\x00-\x7f\xa1-\xdf]|[\x81-\x9f\xe0-\xfc][\x40-\x7e\x80-\xfc])*+",
        b"SHIFT_JIS_2004": rb"(?:[\x00-\x7f\xa1-\xdf]|[\x81-\x9f\xe0-\xfc][\x40-\x7e\x80-\xfc])*+",
        b"BIG5": rb"(?:[\x00-\x7f]|[\xa1-\xfe][\x40-\x7e\xa1-\xfe])*+",
        b"GBK": rb"(?:[\x00-\x7f]|[\x81-\xfe][\x40-\x7e\x80-\xfe])*+",
        b"UHC": rb"(?:[\x00-\x7f]|[\x81-\xfe][\x41-\x5a\x61-\x7a\x81-\xfe])*+",
        b"JOHAB": rb"(?:[\x00-\x7f]|[\x84-\xf9][\x31-\x7e\x81-\xfe])*+",
        b"GB18030": rb"(?:[\x00-\x7f]|[\x81-\xfe](?:[\x40-\x7e\x80-\xfe]|\d[\x81-\xfe]\d))*+",
    }.items()
}
"""What text in these encodings consists of, whether or not Python knows each character."""

_BACKSLASH_AND_TILDE: Final = {0xA5: "\\", 0x203E: "~"}
"""Characters of Python's SHIFT_JIS_2004, and what ASCII has in their place."""

_RUNS: Final = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]+")
_ABSENT: Final = {
    b"EUC_JP": re.compile("[¥‾]"),
    b"SHIFT_JIS_2004": re.compile("[¥‾]"),
    b"SJIS": re.compile("[\x80\ue000-\uf8ff]"),
}
"""Characters, even of ASCII, that Python has in these encodings and the server has not."""


ASCII: Final = b"ASCII"
"""An encoding with nothing but ASCII; not one of the server's."""


def encoding_of(client_encoding: bytes, server_encoding: bytes) -> bytes:
    """The encoding of the texts of a session with these settings. SQL_ASCII: unknown."""
    if client_encoding == b"UNICODE":
        return b"UTF8"
    return server_encoding if client_encoding in NO_CONVERSION else client_encoding


def readable(text: bytes, encoding: bytes) -> str:
    """A text to show to people. SQL_ASCII is read as UTF-8."""
    if text.isascii():
        return text.decode()
    if encoding in NO_CONVERSION:
        encoding = b"UTF8"
    if encoding not in CODECS:
        return text.decode("ascii", "backslashreplace")
    letters = text.decode(CODECS[encoding], "backslashreplace")
    if encoding == b"SHIFT_JIS_2004":
        return letters.translate(_BACKSLASH_AND_TILDE)
    return letters


def recoded(text: bytes, source: bytes, *targets: bytes) -> bytes:
    """A text in the last of these encodings, with only those characters that all of them have.

    Bytes of SQL_ASCII are assumed to be in the last encoding; for SQL_ASCII, bytes stay unchanged.
    """
    if text.isascii():
        return text
    if source in NO_CONVERSION:
        source = targets[-1]
    for target in targets:
        if target not in NO_CONVERSION:
            if source != target or not _is_whole(text, target):
                text = _encoded(readable(text, source), target)
            source = target
    return text


def _is_whole(text: bytes, encoding: bytes) -> bool:
    """Whether the text consists of this encoding's characters."""
    if encoding == b"UTF8":
        return is_valid(text, "utf_8")
    structure = _STRUCTURES.get(encoding)
    return structure is None or structure.fullmatch(text) is not None


def _encoded(letters: str, encoding: bytes) -> bytes:
    name = CODECS.get(encoding, "ascii")
    if encoding in _ABSENT:
        letters = _ABSENT[encoding].sub("?", letters)
    parts = list[bytes]()
    for run in _RUNS.findall(letters):
        if encoding == b"EUC_JIS_2004" and not run.isascii():
            # Python's encoding also has JIS X 0212.
            run = run.encode("shift_jis_2004", "replace").decode("shift_jis_2004")
        parts.append(run.encode("ascii" if run.isascii() else name, "replace"))
    return b"".join(parts)


def beginning(text: bytes, size: int, encoding: bytes) -> bytes:
    """As many whole characters of a text as fit into `size` bytes."""
    return text if len(text) <= size else whole_characters(text[:size], encoding)


def whole_characters(cut: bytes, encoding: bytes) -> bytes:
    """A truncated text, without an incomplete last character."""
    if cut.isascii():
        return cut
    decoder = codecs.getincrementaldecoder(_counting_codec(encoding))("replace")
    decoder.decode(cut)
    return cut[: len(cut) - len(decoder.getstate()[0])]


def first_characters(text: bytes, count: int, encoding: bytes) -> bytes:
    name = _counting_codec(encoding)
    return text.decode(name, "surrogateescape")[:count].encode(name, "surrogateescape")


def _counting_codec(encoding: bytes) -> str:
    return "utf_8" if encoding in NO_CONVERSION else codec(encoding)
