"""What each function does when it is called.

The rule: one coroutine a function, under its name. It gets the caller and the arguments as Python
values (text as bytes in the client's encoding), and returns a Python value. It knows nothing of
messages, statements or formats. NULL for a strict function never gets here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from protocol.errors import INSUFFICIENT_PRIVILEGE, SQLError
from proxy.context import Context
from proxy.functions import Function
from proxy.jobs import Job, Jobs
from proxy.sql import EXECUTOR_ROLE

Value = int | bool | bytes | None

VOID: Final = b""
"""What a function that returns void returns."""


class Caller(Protocol):
    """The session that calls, as the functions see it."""

    @property
    def jobs(self) -> Jobs: ...

    @property
    def context(self) -> Context: ...

    async def launch(self, sql: bytes, queue_size: int) -> Job:
        """Start a job with the context's role and settings."""

    async def change_privileges(self, verb: str, role: bytes, *, print_commands: bool) -> bool:
        """GRANT or REVOKE in the primary backend, in the caller's transaction."""


async def launch(caller: Caller, sql: bytes, queue_size: int = 0) -> int:
    return (await caller.launch(sql, queue_size)).pid


async def detach(caller: Caller, pid: int) -> bytes:
    caller.jobs.remove(attached(caller, pid))
    return VOID


async def grant(caller: Caller, role_name: bytes | None, print_commands: bool = False) -> bool:
    return await caller.change_privileges("GRANT", role_name or b"", print_commands=print_commands)


async def revoke(caller: Caller, role_name: bytes | None, print_commands: bool = False) -> bool:
    return await caller.change_privileges("REVOKE", role_name or b"", print_commands=print_commands)


def attached(caller: Caller, pid: int) -> Job:
    """The session's job of this pid, if the current role may touch it. Raises SQLError."""
    job = caller.jobs.get(pid)
    context = caller.context
    if job.role_id != context.role_id and job.role_id not in context.usable_roles:
        raise SQLError(
            INSUFFICIENT_PRIVILEGE, f'permission denied for background worker with PID "{pid}"'
        )
    return job


IMPLEMENTATIONS: Final[dict[str, Callable[..., Awaitable[Value]]]] = {
    "pg_background_launch": launch,
    "pg_background_detach": detach,
    "grant_pg_background_privileges": grant,
    "revoke_pg_background_privileges": revoke,
}

ON_PRIMARY: Final = frozenset({grant, revoke})
"""Those that need the primary backend for themselves, so the statement's rows are read first."""


def check_privilege(context: Context, function: Function) -> None:
    """Raises SQLError 42501 if the current role may not call this function.

    Granting needs no membership: the server itself judges the GRANT.
    """
    needs_membership = IMPLEMENTATIONS.get(function.name) not in ON_PRIMARY
    if needs_membership and not context.may_call:
        raise SQLError(
            INSUFFICIENT_PRIVILEGE,
            f"permission denied for function {function.name}",
            hint=f"Superusers and members of the role {EXECUTOR_ROLE} may call it; a superuser can"
            " say SELECT grant_pg_background_privileges('role').",
        )
