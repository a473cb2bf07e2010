"""Passwords printed by a command: tokens of RDS IAM, Cloud SQL, Entra.

Invariant: the command runs without a shell, and each placeholder stays within one argument, so
names of roles and databases cannot be misread. It runs for a role that the server has let in, or as
which code in a session claims to run. The password is kept for ``password_ttl``, unless the server
refuses it; it is in no repr, error or log.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final

from protocol.errors import INVALID_AUTHORIZATION_SPECIFICATION, SQLError
from proxy.config import Config, Host
from proxy.log import logger
from proxy.reasons import explain

SOURCE: Final = "what password_command prints"

_PLACEHOLDER: Final = re.compile(r"\{(user|host|port|database)\}")
_MAX_REMEMBERED: Final = 1000
"""Number of passwords that are kept."""
_LONGEST: Final = 64 * 1024
"""Bytes of a password: more than PostgreSQL accepts."""
_STDERR: Final = 500
"""Characters of its stderr that are logged."""

_HINT: Final = "The proxy's log has what the command said on stderr."

Arguments = tuple[str, ...]


class PasswordCommand:
    """Runs the command, and remembers its answers."""

    def __init__(self, config: Config) -> None:
        self._command: Sequence[str] = config.password_command or ()
        self._ttl = config.password_ttl
        self._timeout = config.connect_timeout or None
        # By arguments: when the password expires, by the loop's clock, and the password.
        self._known: dict[Arguments, tuple[float, bytes]] = {}
        self._asked: dict[Arguments, asyncio.Task[bytes]] = {}

    @property
    def enabled(self) -> bool:
        """Whether a command is configured."""
        return bool(self._command)

    async def password(self, host: Host, database: bytes, user: bytes) -> bytes:
        """The role's password, remembered or new. Concurrent launches share one run.

        Raises SQLError if there is none.
        """
        arguments = self._arguments(host, database, user)
        now = asyncio.get_running_loop().time()
        for other in [key for key, (until, _) in self._known.items() if until <= now]:
            del self._known[other]
        if arguments in self._known:
            return self._known[arguments][1]
        task = self._asked.get(arguments)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._ask(arguments))
            self._asked[arguments] = task
            task.add_done_callback(lambda done: self._answered(arguments, done))
        try:
            # If one launch is cancelled, the others still get their answer.
            return await asyncio.shield(task)
        except (OSError, ValueError) as error:
            role = user.decode("utf-8", "replace")
            raise SQLError(
                INVALID_AUTHORIZATION_SPECIFICATION,
                f'no password for role "{role}" to start a background worker with',
                detail=f"password_command: {explain(error)}.",
                hint=_HINT,
            ) from None

    def forget(self, host: Host, database: bytes, user: bytes) -> None:
        """Drop a password, since the server has refused it."""
        self._known.pop(self._arguments(host, database, user), None)

    def _answered(self, arguments: Arguments, task: asyncio.Task[bytes]) -> None:
        del self._asked[arguments]
        if task.cancelled() or task.exception() is not None:
            return
        if self._ttl and len(self._known) < _MAX_REMEMBERED:
            until = asyncio.get_running_loop().time() + self._ttl
            self._known[arguments] = (until, task.result())

    def _arguments(self, host: Host, database: bytes, user: bytes) -> Arguments:
        values = {
            "user": user.decode("utf-8", "surrogateescape"),
            "host": host.name,
            "port": str(host.port),
            "database": database.decode("utf-8", "surrogateescape"),
        }
        return tuple(
            _PLACEHOLDER.sub(lambda match: values[match[1]], part) for part in self._command
        )

    async def _ask(self, arguments: Arguments) -> bytes:
        """Raises OSError; ValueError: the output is no password."""
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self._timeout):
                output, said = await process.communicate()
        except TimeoutError:
            raise TimeoutError(f"it took longer than {self._timeout:g} seconds") from None
        finally:
            if process.returncode is None:
                process.kill()
        if words := said.decode("utf-8", "replace").strip():
            logger.warning("password_command: %s", words[:_STDERR])
        if process.returncode:
            raise ValueError(f"it ended with exit code {process.returncode}")
        password = output.removesuffix(b"\n").removesuffix(b"\r")
        if not password or b"\n" in password or b"\0" in password or len(password) > _LONGEST:
            raise ValueError("what it printed is not one line with a password")
        return password
