"""The settings that affect how the server reads SQL.

Invariant: a text is read with the settings that the server will have, unless they do not matter.

The server reads a whole Query string, or the text of a Parse, when the message arrives. Two
settings matter: client_encoding decides where characters end, standard_conforming_strings what a
backslash in '…' means. The others change no token: backslash_quote and escape_string_warning refuse
or warn, transform_null_equals affects ``= NULL``, server_encoding never changes.
"""

from __future__ import annotations

from typing import NamedTuple


class Reading(NamedTuple):
    """The values of these settings."""

    client_encoding: bytes
    standard_conforming_strings: bytes

    def reads_as(self, other: Reading, sql: bytes) -> bool:
        """Whether a text means the same under other settings."""
        return not (
            (self.client_encoding != other.client_encoding and not sql.isascii())
            or (
                self.standard_conforming_strings != other.standard_conforming_strings
                and b"\\" in sql
            )
        )


def depends_on_settings(sql: bytes) -> bool:
    """Whether settings matter to this text; ASCII is the same in all client encodings."""
    return b"\\" in sql or not sql.isascii()
