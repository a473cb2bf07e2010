"""The names of custom settings (those with a dot) that a session may have set.

Invariant: servers do not list them, so each SET, set_config and Bind that goes by is searched for
names. A false one costs little: the server is asked and has no value. The number of names is
bounded; the latest are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

# SET [SESSION | LOCAL] a.b = …, in lower-case SQL
_CUSTOM_SETTING: Final = re.compile(
    rb"""set(?<=\bset)\s++(?:session\s++|local\s++)?+"""
    rb"""("?[a-z_\x80-\xff][\w$\x80-\xff]*+"?\."?[\w$.\x80-\xff]++"?)"""
)
# A constant that may be such a name, in SQL with set_config
_NAME_CONSTANT: Final = re.compile(rb"'([a-z_\x80-\xff][\w$\x80-\xff]*+(?:\.[\w$\x80-\xff]++)++)'")
# The same as a parameter of Bind: its length in bytes, then the name
_NAME_PARAMETER: Final = re.compile(
    rb"(?=\0\0\0([\x03-\x3f])([A-Za-z_\x80-\xff][\w$\x80-\xff]*+(?:\.[\w$\x80-\xff]++)++))"
)
_MAX_NAMES: Final = 1000
_MAX_NAME: Final = 256
"""In bytes; longer names are not carried over to jobs."""
_OUR_SETTINGS: Final = b"pg_background_proxy."

_SEARCHED: Final = 4096
"""Bytes of a Bind that are searched."""


class CustomSettings:
    """The names, the most recently mentioned last."""

    __slots__ = ("_names",)

    def __init__(self) -> None:
        self._names: dict[bytes, None] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._names)

    def mentioned(self, sql: bytes) -> None:
        """Note the names in a Query or Parse that contains "set", given in lower case."""
        names = [
            name.replace(b'"', b"")
            for name in _CUSTOM_SETTING.findall(sql)
            if len(name) <= _MAX_NAME
        ]
        if b"set_config" in sql:
            names += _NAME_CONSTANT.findall(sql)
        self._note(names)

    def bound(self, body: bytes) -> None:
        """Note the names among the parameters of a Bind whose statement calls set_config. The
        beginning of the body is enough."""
        found = _NAME_PARAMETER.findall(body[:_SEARCHED])
        self._note([name[: size[0]].lower() for size, name in found])

    def _note(self, names: Sequence[bytes]) -> None:
        for name in names:
            if len(name) <= _MAX_NAME and b"." in name and not name.startswith(_OUR_SETTINGS):
                self._names.pop(name, None)
                self._names[name] = None
        while len(self._names) > _MAX_NAMES:
            del self._names[next(iter(self._names))]
