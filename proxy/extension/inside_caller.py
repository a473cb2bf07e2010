"""The caller of the functions for a call from inside the database: context and arguments.

Invariant: the context is what the server says about the role, and only for code that has proven
that it can run as the channel's login role.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    UNDEFINED_OBJECT,
    SQLError,
)
from protocol.values import parse_array
from proxy.api.calls import Caller
from proxy.api.values import decode_argument
from proxy.extension.conversation import Challenge
from proxy.extension.questions import Call, decoded, malformed
from proxy.jobs.context import Context
from proxy.jobs.interrupts import Interrupts
from proxy.jobs.job import Job
from proxy.jobs.launch import launch_at_commit
from proxy.jobs.launcher import Launcher
from proxy.jobs.owner import Owner
from proxy.jobs.request import LaunchRequest
from proxy.jobs.rows import Notice
from proxy.sql import encodings
from proxy.sql.encodings import NO_CONVERSION
from proxy.sql.lexer import has_lookalikes
from proxy.sql.recoding import ASCII, encoding_of, readable

WHOLE_AT_ONCE: Final = 512 * 1024
"""Bytes of a word that are decoded without giving others a turn."""

_CONVERTED: Final = (
    b"SELECT pg_catalog.encode(pg_catalog.convert_to("
    b"pg_catalog.convert_from(pg_catalog.decode($1, 'hex'), $2), $3), 'hex')"
)


def context_of(challenge: Challenge, session_role: bytes) -> Context:
    """What the server says about the role. `session_role`: the session_user of its jobs.

    Raises SQLError if the question does not count.
    """
    call = challenge.call
    if not challenge.found:
        raise SQLError(UNDEFINED_OBJECT, "the current role does not exist")
    role_id, may_become, may_call, usable_roles, trusted, login_id = challenge.found
    if trusted != b"t":
        raise SQLError(
            INSUFFICIENT_PRIVILEGE,
            "calls from inside the database are not served here",
            detail="The extension's functions must be committed. They and their schema must"
            " belong to a superuser, to the owner of the database, or to the role that calls.",
            hint="Commit CREATE EXTENSION first, and let a superuser or the owner of the"
            " database say it.",
        )
    if login_id not in challenge.roles:
        raise SQLError(
            INSUFFICIENT_PRIVILEGE,
            "a background worker may not run as a role that the calling code may not become",
        )
    if may_become != b"t":
        raise SQLError(
            INSUFFICIENT_PRIVILEGE,
            f'the session\'s role may not become "{readable(call.role, call.encoding)}"',
        )
    return Context(
        may_call=may_call == b"t",
        role_id=int(role_id or 0),
        role=call.role,
        session_role=session_role,
        set_role=b"none" if call.role == session_role else call.role,
        statement_timeout=b"0",
        own_settings=call.own_settings,
        usable_roles=frozenset(int(oid or 0) for oid in parse_array(usable_roles or b"{}")),
        settings=call.settings,
    )


async def _long_word(word: bytes) -> bytes | None:
    """Decode a word of many megabytes, with turns for others."""
    parts = []
    for start in range(0, len(word), WHOLE_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        parts.append(decoded(word[start : start + WHOLE_AT_ONCE]))
    if len(parts) == 1:
        return parts[0]
    return b"".join(part or b"" for part in parts)


async def arguments(call: Call) -> dict[str, Any] | None:
    """The arguments by name; None if the function is strict and one is NULL. Raises SQLError."""
    texts = [await _long_word(word) for word in call.argument_words]
    found: dict[str, Any] = {}
    try:
        for parameter, text in zip(call.function.parameters, texts, strict=True):
            value = decode_argument(parameter.type, text)
            if value is None and call.function.strict:
                value = parameter.null
                if value is None:
                    return None
            found[parameter.name] = value
    except ValueError:
        raise malformed() from None
    return found


class InsideCaller(Caller):
    """Makes calls from inside the database."""

    def __init__(
        self,
        session: Owner,
        launcher: Launcher,
        interrupts: Interrupts,
        context: Context,
        call: Call,
    ) -> None:
        super().__init__(session, interrupts)
        self._launcher = launcher
        self._context = context
        self._call = call

    @property
    def context(self) -> Context:
        return self._context

    @property
    def codec(self) -> str:
        return encodings.codec(self._call.encoding)

    @property
    def encodings(self) -> Sequence[bytes]:
        server = self._owner.server_encoding
        # The server converts to its own encoding before the function returns.
        encoding = encoding_of(self._call.encoding, server)
        # It refuses most characters of JOHAB, even in its own output.
        if encoding == b"JOHAB" or self._is_misread(encoding):
            encoding = ASCII
        return server, encoding

    def _is_misread(self, encoding: bytes) -> bool:
        """Whether a database in SQL_ASCII would see backslashes in its characters."""
        is_raw = self._owner.server_encoding in NO_CONVERSION
        return is_raw and has_lookalikes(encoding.decode("ascii", "replace"))

    async def pass_on(self, job: Job, notice: Notice) -> None:
        """Send a job's notice to the client."""
        await self._owner.inject(job.notice(notice, self._owner.encoding))

    def encoding_of_values(self, job: Job) -> bytes:
        """The encoding in which the server reads a job's values; in SQL_ASCII it reads bytes."""
        is_raw = self._owner.server_encoding == b"SQL_ASCII"
        return b"SQL_ASCII" if is_raw else job.encoding

    async def values_of(self, job: Job, text: bytes) -> bytes:
        """A job's values in the encoding of the functions' results, converted by the server. Raises
        SQLError 22P05 for a character that the encoding lacks, OSError."""
        target = encoding_of(self._call.encoding, self._owner.server_encoding)
        if text.isascii():
            return text
        if self._is_misread(target):
            raise SQLError(
                FEATURE_NOT_SUPPORTED,
                f"a database in SQL_ASCII cannot read results in {target.decode()}",
                hint="Use another client_encoding, or fetch the result in a statement of its own.",
            )
        if self.encoding_of_values(job) in (target, b"SQL_ASCII"):
            return text
        # Not the channel whose query the function reads:
        channel = await self._launcher.channel()
        try:
            words = text.hex().encode(), job.encoding, target
            [[found]] = await channel.transact((_CONVERTED, words))
        finally:
            self._owner.service.channels.give_back(channel)
        return bytes.fromhex((found or b"").decode())

    @property
    def _launching(self) -> tuple[Launcher, bytes]:
        return self._launcher, self._call.encoding

    async def launch(self, request: LaunchRequest) -> Job:
        job = await super().launch(request)
        self._call.launched.append(job)
        return job

    async def launch_at_commit(self, request: LaunchRequest) -> Job:
        job, notification = await launch_at_commit(
            self._owner, request, self.context, *self._launching
        )
        self._call.launched.append(job)
        self._call.notification = notification
        return job

    # No function asks for these: they need no proxy (`privileges`, the view's own SQL).

    async def activity(self, jobs: Sequence[Job]) -> dict[int, tuple[bytes | None, ...]]:
        raise malformed()

    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        raise malformed()

    async def drop_executor_role(self) -> bool:
        raise malformed()
