"""The prepared statements and portals of a session that concern us, by their names.

Invariant: this follows the server's own record. It changes when a message is sent, and is restored
if the server fails before it has carried that out (`Undo`). Only SQL can remove a statement or
portal unnoticed; for statements, `is_doubtful` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from protocol.kinds import STATEMENT, F
from proxy.session.custom_settings import CustomSettings
from proxy.session.reported import ReportedSettings
from proxy.sql import encodings
from proxy.statements.hidden import HiddenNames
from proxy.statements.mentions import may_be_ours, may_change_names, may_use_name

if TYPE_CHECKING:
    from proxy.session.prepared import Portal, Prepared

Undo = Callable[[bool], object]
"""Takes back what sending a message has changed; called with true if the server has read it."""


class NamedStatements:
    """Those of one session, under the names that the server keeps (`key`).

    Attributes:
        statements, portals: those with calls, and followed commands.
        hidden: their names in the server.
        is_doubtful: SQL may have removed or replaced some of the statements.
    """

    __slots__ = (
        "_custom_settings",
        "_reported",
        "_setters",
        "hidden",
        "is_doubtful",
        "portals",
        "statements",
    )

    def __init__(self, reported: ReportedSettings, custom_settings: CustomSettings) -> None:
        """
        Args:
            reported: has the encodings of names.
            custom_settings: collects the names of settings that are bound to set_config.
        """
        self._reported = reported
        self._custom_settings = custom_settings
        self.statements: dict[bytes, Prepared] = {}
        self.portals: dict[bytes, Portal] = {}
        self.hidden = HiddenNames()
        self.is_doubtful = False
        # Names of statements that may call set_config.
        self._setters: set[bytes] = set()

    def is_empty(self) -> bool:
        """Whether no message can concern one of these."""
        return not (self.statements or self.portals or self._setters)

    def key(self, name: bytes) -> bytes:
        """The name under which the server knows a statement or portal."""
        reported = self._reported
        return encodings.name_key(name, reported[b"client_encoding"], reported[b"server_encoding"])

    def statement(self, name: bytes) -> Prepared | None:
        """The statement that the client calls so, if it is one of these."""
        return self.statements.get(self.key(name))

    def portal(self, name: bytes) -> Portal | None:
        """The same for a portal."""
        return self.portals.get(self.key(name))

    # What the relay sees

    def must_read(self, text: bytes) -> bool:
        """Whether SQL in lower case must be read: it may be served or changed, or may use or show
        one of these by its name."""
        return may_be_ours(text) or (bool(self.statements or self.portals) and may_use_name(text))

    def note_message(self, kind: int, body: bytes) -> bool:
        """Note a message: a Bind or Close of what may call set_config, the end of the unnamed
        portal. Returns whether it concerns, or (Parse) would replace, one of these. The beginning
        of the body, with the names, is enough."""
        if kind == F.PARSE:
            return self.key(body.partition(b"\0")[0]) in self.statements
        if kind == F.BIND:
            portal, _, rest = body.partition(b"\0")
            statement = self.key(rest.partition(b"\0")[0])
            self.note_bound(statement, body)
            if statement in self.statements:
                return True
            if not portal:
                self._forget_portal(b"")
            return bool(portal and self.portals) and self.key(portal) in self.portals
        if kind == F.EXECUTE:
            return self.key(body.partition(b"\0")[0]) in self.portals
        name = self.key(body[1:].partition(b"\0")[0])
        if kind == F.CLOSE and body[:1] == STATEMENT:
            self._setters.discard(name)
        return name in (self.statements if body[:1] == STATEMENT else self.portals)

    def note_sent(self, text: bytes) -> None:
        """SQL goes to the server; given in lower case, before it is changed."""
        if self.statements and may_change_names(text):
            self.is_doubtful = True

    def note_unread(self) -> None:
        """SQL that is too long to be read goes to the server."""
        self.is_doubtful = bool(self.statements)

    def note_setter(self, name: bytes) -> None:
        """A statement of this name, which may call set_config, goes to the server."""
        self._setters.add(self.key(name))

    def note_bound(self, key: bytes, body: bytes) -> None:
        """Note the settings in a Bind to the statement with this key."""
        if key in self._setters:
            self._custom_settings.bound(body)

    # What changes them

    def parsed(self, name: bytes, statement: Prepared | None) -> tuple[Prepared | None, Undo]:
        """A Parse is sent, of this statement if it is one of ours. Returns what it replaces."""
        key = self.key(name)
        old = self.statements.pop(key, None)
        if statement is not None:
            self.statements[key] = statement

        def undo(was_read: bool) -> None:
            self.statements.pop(key, None)
            # A failed attempt ends the unnamed statement.
            if old is not None and (key or not was_read):
                self.statements[key] = old

        return old, undo

    def bound(self, name: bytes) -> tuple[Portal | None, Undo]:
        """A Bind is sent. Returns the named portal that it replaces: if the server still has that
        one, it refuses the Bind."""
        if not name:
            self._forget_portal(b"")
        key = self.key(name)
        old = self.portals.pop(key, None)

        def undo(was_read: bool) -> None:
            self.portals.pop(key, None)
            if old is not None:
                self.portals[key] = old

        return old, undo

    def closed(self, name: bytes) -> tuple[Prepared | None, Undo]:
        """A Close of a statement is sent. Returns it if it is one of these."""
        key = self.key(name)
        old = self.statements.pop(key, None)

        def undo(was_read: bool) -> None:
            if old is not None:
                self.statements[key] = old

        return old, undo

    def forget_portal(self, name: bytes) -> None:
        """A portal is closed, or its name is taken by another."""
        self._forget_portal(self.key(name))

    def _forget_portal(self, key: bytes) -> None:
        portal = self.portals.pop(key, None)
        if portal is not None:
            self.hidden.forget(portal.server_name)
            portal.close()

    def forget_unnamed(self) -> None:
        """A Query ends the unnamed statement and portal."""
        self.statements.pop(b"", None)
        self._forget_portal(b"")

    def transaction_ended(self) -> None:
        """The portals end with the transaction."""
        for key in tuple(self.portals):
            self._forget_portal(key)

    # Which the server still has

    def names_to_ask(self) -> list[bytes]:
        """The names of the statements that SQL can ask for. Others, as the server has truncated
        them, are not valid text."""
        client, server = self._reported[b"client_encoding"], self._reported[b"server_encoding"]
        codec = encodings.codec(client)
        return [
            name
            for name in self.statements
            if name and (name.isascii() or (client == server and encodings.is_valid(name, codec)))
        ]

    def forget_missing(self, asked: Collection[bytes], found: Collection[bytes]) -> list[Prepared]:
        """Keep those of the statements asked for that the server has. Returns the others."""
        self.is_doubtful = False
        return [self.statements.pop(name) for name in asked if name not in found]
