"""A job whose SQL calls the functions itself: by a trigger of the table that it writes to, say.

Invariant: for the functions that it calls, a job is a session of its own, with jobs of its own,
which run on when it ends. It has no client: messages of its jobs are among its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.framing import HEADER_SIZE
from proxy.extension.conversation import Secrets
from proxy.extension.in_database import Inside
from proxy.jobs.owner import Owner
from proxy.jobs.rows import Notice, OutputQueue

if TYPE_CHECKING:
    from proxy.jobs.launcher import Launcher
    from proxy.server import Server


Stop = Callable[[], object]


class Nested(Owner):
    """A job as a caller.

    Attributes:
        inside: serves its calls.
        output: the job's own; None before it begins.
    """

    def __init__(
        self, server: Server, launcher: Launcher, owner: Owner, secrets: Secrets, stop: Stop
    ) -> None:
        """`stop`: cancels what the job runs."""
        super().__init__(server)
        self._launcher = launcher.for_job()
        self._server_version = owner.server_version
        self.system_id = owner.system_id
        # Those that its session had.
        self.custom_settings = tuple(owner.custom_settings)
        self.output: OutputQueue | None = None
        self.inside = Inside(self, secrets)
        self._stop = stop

    # What the job tells

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the job; whether it was a call, and is dealt with."""
        return self.inside.notice(body)

    @property
    def is_talkative(self) -> bool:
        """Whether others should have their turn before more is read."""
        return self.inside.is_talkative

    def statement_ended(self) -> None:
        """The function no longer waits for an answer."""
        self.inside.statement_ended()

    def close(self) -> None:
        """The job has ended."""
        self.inside.statement_ended()
        self.jobs.clear()

    # What its calls ask for

    @property
    def launcher(self) -> Launcher:
        return self._launcher

    @property
    def server_version(self) -> int:
        return self._server_version

    @property
    def client_encoding(self) -> bytes:
        """Not known; each question says its own."""
        return b"UTF8"

    def cancel_statement(self) -> None:
        self._stop()

    async def inject(self, message: bytes) -> None:
        if self.output is not None:
            self.output.put(Notice(message[HEADER_SIZE:]))
