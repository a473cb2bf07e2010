"""The messages between the supervisor and the worker processes.

Invariant: a message is a dataclass of this file, one line of JSON on the way, so none holds a line
feed. Both ends of a channel are ours (`bus`), so what comes in is well-formed. Questions, answers
and news are for other workers: the supervisor forwards them, and says who has sent them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias, cast, get_args

from proxy.config import Given
from proxy.jobs.registry import Handle

# Beside each client's connection, in a socket of their own

PLAIN: Final = b"+"
WITH_HEADER: Final = b"P"
"""It begins with a header of the PROXY protocol."""

# From a worker to the supervisor


class Event(StrEnum):
    """What a worker tells of itself."""

    READY = "ready"
    """It serves now."""
    TAKEN = "taken"
    """It has a connection that it was given."""
    REFUSED = "refused"
    """It has no file descriptor for one."""
    CLOSED = "closed"
    """One of its sessions has ended."""
    DRAINING = "draining"
    """It is to get no more connections."""
    ALIVE = "alive"
    """Its event loop runs: the answer to a Ping."""
    DONE = "done"
    """Its sessions and jobs have ended."""


@dataclass(frozen=True, slots=True)
class Report:
    """Something has happened to the worker."""

    event: Event


@dataclass(frozen=True, slots=True)
class Order:
    """The console wants something of the supervisor: ``processes``, ``drain``, ``reload`` or
    ``shut_down``; `worker`: the number of the one to drain. There is an Outcome."""

    number: int
    what: str
    worker: int = 0


@dataclass(frozen=True, slots=True)
class TakeSlot:
    """May I run a job of this role in this database? There is a SlotAnswer, and another one when a
    slot is granted later. `arrived`: when the launch came, by the system's monotonic clock."""

    number: int
    role: str
    database: str
    arrived: float


@dataclass(frozen=True, slots=True)
class HasSlot:
    """I run such a job since before there were limits."""

    number: int
    role: str
    database: str


@dataclass(frozen=True, slots=True)
class FreeSlot:
    """It has ended, or is not wanted any more."""

    number: int


Slotting: TypeAlias = TakeSlot | HasSlot | FreeSlot


# From the supervisor to a worker


@dataclass(frozen=True, slots=True)
class SlotAnswer:
    """Whether the slot of this number is granted; the setting that keeps it waiting, and its
    value."""

    number: int
    granted: bool
    setting: str = ""
    most: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of an Order. `error` is why it was not carried out: SQLSTATE, message, detail and hint, the
    latter two perhaps empty."""

    number: int
    body: Any = None
    error: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Configure:
    """Serve with this configuration. The first time, `name`: the worker's; `group`: what tells
    these workers from those of other supervisors, in hexadecimal digits (`sealed.GROUP`)."""

    given: Given
    name: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class EndNow:
    """Wait for nothing any more."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another proxy takes the clients: sessions may go on for takeover_timeout."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Say that you are alive."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question has gone to these workers, and to those which hang: they are not waited for."""

    number: int
    peers: Sequence[int]
    hanging: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Gone:
    """Another worker has ended."""

    peer: int


# Between workers, and by the supervisor, whose number is 0: what is asked

SUPERVISOR: Final = 0


@dataclass(frozen=True, slots=True)
class Roles:
    """Of which roles do you know jobs? A list of OIDs."""


@dataclass(frozen=True, slots=True)
class NewRole:
    """I know jobs of this role; true when noted."""

    role_id: int


@dataclass(frozen=True, slots=True)
class FindJobs:
    """Which of these jobs do you know? Whole snapshots."""

    handles: Sequence[Handle]


@dataclass(frozen=True, slots=True)
class ListJobs:
    """Which jobs of these roles do you know? Snapshots, their texts shortened."""

    roles: Sequence[int]


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Have the server stop your job; true when it was told."""

    pid: int
    cookie: int


@dataclass(frozen=True, slots=True)
class CancelStatement:
    """A cancel request: is it for a session of yours? The key has a character for each byte."""

    pid: int
    secret_key: str


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Close your spares; whether there were any."""


@dataclass(frozen=True, slots=True)
class ConsoleTable:
    """What do you know for this table of the console (`console.tables`)? Rows."""

    name: str


@dataclass(frozen=True, slots=True)
class JobsWithPid:
    """Which jobs of yours run with this PID? Handles."""

    pid: int


@dataclass(frozen=True, slots=True)
class KillSession:
    """End this session, as the console calls it; whether it is yours."""

    session: str


ConsoleAsk: TypeAlias = ConsoleTable | JobsWithPid | KillSession


@dataclass(frozen=True, slots=True)
class Measure:
    """The supervisor asks: what have you counted? `admin.figures.collect`."""


@dataclass(frozen=True, slots=True)
class ShowJobs:
    """The supervisor asks: which jobs are there to show? `admin.overview.Overview.show`."""


Ask: TypeAlias = (
    ConsoleAsk
    | Roles
    | NewRole
    | FindJobs
    | ListJobs
    | CancelJob
    | CancelStatement
    | GiveWay
    | Measure
    | ShowJobs
)


@dataclass(frozen=True, slots=True)
class Question:
    """To all other workers, or to one."""

    number: int
    ask: Ask
    to: int | None = None
    sender: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """To a question, or a piece of an answer. `body` is what the question says; None: no answer.
    With the number 0 a worker tells the supervisor its last figures (`Measure`), unasked."""

    number: int
    to: int
    body: Any
    more: bool = False
    sender: int = 0


# Between workers: what is told


@dataclass(frozen=True, slots=True)
class RoleGone:
    """I know no job of this role any more."""

    role_id: int


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job that you have asked about has ended."""

    snapshot: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExtensionChanged:
    """A command about the extension has done its work in some database."""


@dataclass(frozen=True, slots=True)
class LeaveDatabases:
    """A statement is about to drop, rename or copy databases; it has a character for each byte."""

    sql: str


News: TypeAlias = RoleGone | JobEnded | ExtensionChanged | LeaveDatabases


@dataclass(frozen=True, slots=True)
class Told:
    """To all other workers, or to one; there is no answer."""

    news: News
    to: int | None = None
    sender: int = 0


Message: TypeAlias = (
    Report
    | Order
    | Outcome
    | Configure
    | EndNow
    | TakenOver
    | Ping
    | Asked
    | Gone
    | Question
    | Answer
    | Told
    | Slotting
    | SlotAnswer
)

_CLASSES: Final[dict[str, type]] = {cls.__name__: cls for cls in get_args(Message | Ask | News)}
_CLASS: Final = "class"


def encode(message: Message) -> bytes:
    """One line, with its end."""
    return json.dumps(_plain(message), default=_plain, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line."""
    return cast(Message, json.loads(line, object_hook=_typed))


def _plain(value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        raise TypeError(f"cannot be sent: {value!r}")
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {_CLASS: type(value).__name__, **named}


def _typed(value: dict[str, Any]) -> Any:
    name = value.pop(_CLASS, None)
    return value if name is None else _CLASSES[name](**value)
