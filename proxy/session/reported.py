"""The settings that the server reports, as far as the proxy uses them.

Invariant: a value is the last that the server has told, in a ParameterStatus or in the answer to a
query within the batch. From 14 on the server reports changes only at the end of a batch, and not at
all if they were undone by then; so an answer counts until ReadyForQuery.
"""

from __future__ import annotations

from typing import Final

WATCHED: Final = (
    b"application_name",
    b"client_encoding",
    b"server_encoding",
    b"server_version",
    b"standard_conforming_strings",
    b"TimeZone",
)


class ReportedSettings:
    """The values of the settings in WATCHED, by name; empty while unknown."""

    __slots__ = ("_answers", "_reports")

    def __init__(self) -> None:
        self._reports: dict[bytes, bytes] = {}
        self._answers: dict[bytes, bytes] = {}

    def __getitem__(self, name: bytes) -> bytes:
        return self._answers.get(name) or self._reports.get(name, b"")

    def parameter_status(self, body: bytes) -> None:
        """The server has sent ParameterStatus."""
        name, _, value = body.rstrip(b"\0").partition(b"\0")
        if name in WATCHED:
            self._reports[name] = value
            self._answers.pop(name, None)

    def answered(self, name: bytes, value: bytes) -> None:
        """The server has answered a query for a setting within a batch."""
        self._answers[name] = value

    def ready(self) -> None:
        """The server has sent ReadyForQuery, after all its reports."""
        self._answers.clear()
