"""A job whose SQL calls the functions itself, for instance by a trigger of a table it writes to.

Invariant: for these calls a job is a session of its own, with jobs of its own, which outlive it. It
has no client: messages of its jobs are among its own.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.framing import HEADER_SIZE
from proxy.backends.backend import Backend
from proxy.config.gucs import SESSION_SETTING
from proxy.extension.conversation import Secrets
from proxy.extension.in_database import DatabaseCalls
from proxy.jobs.launcher import Launcher
from proxy.jobs.owner import Owner
from proxy.jobs.rows import Notice, OutputQueue


class JobSession(Owner):
    """A job as an owner of jobs.

    Attributes:
        database_calls: serves its calls.
    """

    def __init__(self, owner: Owner, launcher: Launcher, backend: Backend) -> None:
        """
        Args:
            owner: the job's owner. No reference is kept: the job may outlive its session.
            launcher: opens backends for jobs that this one launches.
            backend: runs the job.
        """
        super().__init__(owner.service)
        self._launcher = launcher
        self._key = backend.cancel_request()
        self._server_version = owner.server_version
        self.system_id = owner.system_id
        # As in the owner's session.
        self.custom_settings = tuple(owner.custom_settings)
        self._output: OutputQueue | None = None
        self._backend = backend
        self.database_calls = DatabaseCalls(self, Secrets(backend.own_settings[SESSION_SETTING]))

    # Called by the job

    def begin(self, output: OutputQueue) -> None:
        """The job is about to start. `output`: for messages of its own jobs."""
        self._output = output

    def notice(self, body: bytes) -> bool:
        """A NoticeResponse of the job. Returns whether it was a call, which is then served."""
        return self.database_calls.notice(body)

    @property
    def is_talkative(self) -> bool:
        """Whether others should get a turn before more is read."""
        return self.database_calls.is_talkative

    def statement_ended(self) -> None:
        """No function waits for an answer any more."""
        self.database_calls.statement_ended()

    def failed(self, error: bytes) -> bytes:
        """The statement has ended with this error (its body). Returns the body to report."""
        said = self.database_calls.complaint(error)
        self.database_calls.statement_ended()
        return error if said is None else said[HEADER_SIZE:]

    def close(self, *, is_idle: bool) -> None:
        """The job has ended. `is_idle`: its backend is ready for another."""
        self.database_calls.statement_ended()
        if is_idle:  # the backend may serve another job
            self.transaction_ended()
        else:
            self.transaction_lost(self._launcher.pid)
        self.jobs.clear()
        self._launcher.reuse.close()

    # Used by its calls

    @property
    def launcher(self) -> Launcher:
        return self._launcher

    @property
    def server_version(self) -> int:
        return self._server_version

    @property
    def client_encoding(self) -> bytes:
        """As at the start of the job; each question states its own."""
        return self._backend.parameters.get(b"client_encoding", b"")

    @property
    def server_encoding(self) -> bytes:
        return self._backend.parameters.get(b"server_encoding", b"")

    def cancel_statement(self, is_meant: Callable[[], bool]) -> None:
        self._backend.is_spent = True  # the request may arrive late
        self.service.cancel_statement(self._launcher.route, self._key, is_meant)

    async def inject(self, message: bytes) -> None:
        if self._output is not None:
            self._output.put(Notice(message[HEADER_SIZE:]))

    def job_session(self, launcher: Launcher, backend: Backend) -> JobSession:
        return JobSession(self, launcher, backend)
