"""The settings that decide how the server reads SQL.

Invariant: a text is read with the settings that the server will have when it reads the text, or the
settings make no difference to that text.

The server reads a whole Query string, or the text of a Parse, when the message comes. Two settings
decide what it reads: client_encoding, where characters end, and standard_conforming_strings, what a
backslash in '…' is. The others change no token: backslash_quote and escape_string_warning what is
refused or warned of, transform_null_equals what ``= NULL`` does, server_encoding never changes.
"""

from __future__ import annotations

from typing import NamedTuple


class Reading(NamedTuple):
    """What these settings are."""

    client_encoding: bytes
    standard_conforming_strings: bytes

    def reads_as(self, other: Reading, sql: bytes) -> bool:
        """Whether a text means the same with other settings."""
        return not (
            (self.client_encoding != other.client_encoding and not sql.isascii())
            or (
                self.standard_conforming_strings != other.standard_conforming_strings
                and b"\\" in sql
            )
        )


def depends_on_settings(sql: bytes) -> bool:
    """Whether there is a setting that makes another text of this. All client encodings have ASCII
    in common."""
    return b"\\" in sql or not sql.isascii()
