"""The channel that a session has for its calls from inside the database, and whose it is.

Invariant: a lease that is over leads to no channel: another session may have that by then. A
channel of another role than the session's is kept open only if code has proven that it has this
role's rights: others must not make us keep the role's connections.
"""

from __future__ import annotations

from proxy.backends.channels import Channel
from proxy.extension.context import role_query
from proxy.extension.questions import Call, Message
from proxy.jobs.owner import Owner


class Lease:
    """A channel from a session's first call in a statement to its end, or a call as another role.

    Attributes:
        login: its role, in the encoding of the database; None for the session's.
        is_proven: whether code has proven that it has the rights of that role.
        is_locked: whether the channel holds the lock that its function waits for.
    """

    __slots__ = ("_channel", "_session", "is_locked", "is_proven", "login")

    def __init__(self, session: Owner, channel: Channel, login: bytes | None) -> None:
        self._session = session
        self._channel: Channel | None = channel
        self.login = login
        self.is_proven = self.is_locked = False

    @property
    def channel(self) -> Channel:
        """What is leased. Raises ConnectionError if that is over."""
        if self._channel is None:
            raise ConnectionError("the channel is gone")
        return self._channel

    @property
    def is_over(self) -> bool:
        return self._channel is None

    def session_role(self, call: Call) -> bytes:
        """The session_user of the call's jobs; for an owner's code it is the owner."""
        return call.session_role if self.login is None else call.role

    def role_query(self, question: Message, call: Call) -> bytes:
        """SQL for the channel, by which the server says what the role in the question may do."""
        session = self._session
        return role_query(
            call.role,
            self.session_role(call),
            call.function,
            question.schema,
            encoding=call.encoding,
            roles=session.service.roles.union(job.role_id for job in session.jobs),
            identity=self.channel.identity,
        )

    def end(self, *, keep: bool) -> None:
        """Give the channel back, or close it. `keep`: if this is allowed."""
        channel, self._channel = self.channel, None
        if keep and (self.login is None or self.is_proven):
            self._session.service.channels.give_back(channel)
        else:
            channel.terminate()


class Leases:
    """The leases of one session: one at a time."""

    def __init__(self, session: Owner) -> None:
        self._session = session
        self._current: Lease | None = None

    def __bool__(self) -> bool:
        """Whether there is one."""
        return self._current is not None

    async def take(self, login: bytes | None) -> Lease:
        """A channel of this role, the present one if possible. Raises SQLError, OSError."""
        if self._current is not None and self._current.login != login:
            self.give_back()
        if self._current is None:
            channel = await self._session.lease_channel(login)
            self._current = Lease(self._session, channel, login)
        return self._current

    def offering(self, login: bytes | None, pid: int) -> Lease | None:
        """The channel with this pid, if it belongs to the role and shows a word."""
        lease = self._current
        if lease is None or (lease.login, lease.channel.pid) != (login, pid):
            channel = self._session.idle_channel(login, pid)
            if channel is None:
                return None
            self.give_back()
            lease = self._current = Lease(self._session, channel, login)
        return lease if lease.channel.is_alive else None

    def give_back(self) -> None:
        """The statement is over, or its next call is another role's."""
        self._end(keep=True)

    def hang_up(self) -> None:
        """Close the channel: a function that has seen it finds it gone."""
        self._end(keep=False)

    def _end(self, *, keep: bool) -> None:
        lease, self._current = self._current, None
        if lease is not None:
            lease.end(keep=keep)

    def retire(self) -> None:
        """The channel's login does not hold any more: close it, and others like it."""
        if self._current is not None:
            self._session.service.spares.retire(self._current.channel.login)
        self.hang_up()
