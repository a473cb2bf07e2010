"""The messages between the supervisor and the worker processes.

Invariant: a message is a dataclass of this file, sent as one line of JSON, which contains no line
feed. Both ends of a pipe are ours (`bus`), so input is well-formed. Questions, answers and news
are for other workers: the supervisor forwards them and names the sender.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from proxy.config import Given
from proxy.jobs.registry import Handle

# Sent with each client's connection, in a socket of its own

PLAIN: Final = b"+"
WITH_HEADER: Final = b"P"
"""The connection begins with a PROXY protocol header."""

# From a worker to the supervisor


class Event(StrEnum):
    """What a worker reports about itself."""

    READY = "ready"
    """It serves clients now."""
    TAKEN = "taken"
    """It has taken a connection that it was given."""
    REFUSED = "refused"
    """It had no file descriptor for one."""
    CLOSED = "closed"
    """One of its sessions has ended."""
    DRAINING = "draining"
    """It must get no more connections."""
    ALIVE = "alive"
    """Its event loop runs: the answer to a Ping."""
    DONE = "done"
    """Its sessions and jobs have ended."""


@dataclass(frozen=True, slots=True)
class Report:
    """An event in the worker."""

    event: Event


OrderKind: TypeAlias = Literal["processes", "drain", "reload", "shut_down"]


@dataclass(frozen=True, slots=True)
class Order:
    """A command of the console for the supervisor. An Outcome answers it.

    `worker`: the number of the one to drain."""

    number: int
    what: OrderKind
    worker: int = 0


@dataclass(frozen=True, slots=True)
class TakeSlot:
    """May I run a job of this role in this database? A SlotAnswer answers it, and another when a
    slot is granted later. `arrived`: time of the launch, by the system's monotonic clock."""

    number: int
    role: str
    database: str
    arrived: float


@dataclass(frozen=True, slots=True)
class HasSlot:
    """I have run such a job since before there were limits."""

    number: int
    role: str
    database: str


@dataclass(frozen=True, slots=True)
class FreeSlot:
    """The slot is no longer used, or no longer wanted."""

    number: int


Slotting: TypeAlias = TakeSlot | HasSlot | FreeSlot


# From the supervisor to a worker


@dataclass(frozen=True, slots=True)
class SlotAnswer:
    """Whether this slot is granted; if not, the setting that prevents it, and its value."""

    number: int
    granted: bool
    setting: str = ""
    most: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an Order. `error`: why it was not carried out, as SQLSTATE, message, detail
    and hint, the latter two perhaps empty."""

    number: int
    body: Any = None
    error: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Configure:
    """Serve with this configuration. The first one has `name`, the worker's, and `group`, which
    identifies this supervisor's workers, in hexadecimal digits (`sealed.GROUP`)."""

    given: Given
    name: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class EndNow:
    """Do not wait for anything any more."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Report that you are alive."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question went to these workers, and to those that hang, which are not waited for."""

    number: int
    peers: Sequence[int]
    hanging: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Gone:
    """Another worker has ended."""

    peer: int


# Between workers, and from the supervisor, whose number is 0: questions

SUPERVISOR: Final = 0


@dataclass(frozen=True, slots=True)
class Roles:
    """Which roles have jobs that you know? Answer: a list of OIDs."""


@dataclass(frozen=True, slots=True)
class NewRole:
    """I know jobs of this role. Answer: true, once noted."""

    role_id: int


@dataclass(frozen=True, slots=True)
class FindJobs:
    """Which of these jobs do you know? Answer: whole snapshots."""

    handles: Sequence[Handle]


@dataclass(frozen=True, slots=True)
class ListJobs:
    """Which jobs of these roles do you know? Answer: snapshots with shortened texts."""

    roles: Sequence[int]


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Have the server stop your job. Answer: true, once it was told."""

    pid: int
    cookie: int


@dataclass(frozen=True, slots=True)
class CancelStatement:
    """A cancel request: is it for a session of yours? The key has one character for each byte."""

    pid: int
    secret_key: str


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Close your spares. Answer: whether there were any."""


@dataclass(frozen=True, slots=True)
class ConsoleTable:
    """What do you know for this console table (`console.tables`)? Answer: rows."""

    name: str


@dataclass(frozen=True, slots=True)
class JobsWithPid:
    """Which of your jobs run with this pid? Answer: handles."""

    pid: int


@dataclass(frozen=True, slots=True)
class KillSession:
    """End this session, by its name in the console. Answer: whether it was yours."""

    session: str


ConsoleAsk: TypeAlias = ConsoleTable | JobsWithPid | KillSession


@dataclass(frozen=True, slots=True)
class Measure:
    """From the supervisor: what have you counted? Answer: `admin.figures.collect`."""


@dataclass(frozen=True, slots=True)
class ShowJobs:
    """From the supervisor: which jobs can you show? Answer: `admin.jobs_page.JobsPage.show`."""


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
    """A question to all other workers, or to one."""

    number: int
    ask: Ask
    to: int | None = None
    sender: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, or a piece of one. `body`: see the question; None: no answer. With number 0, a
    worker sends the supervisor its last figures (`Measure`), unasked."""

    number: int
    to: int
    body: Any
    more: bool = False
    sender: int = 0


# Between workers: news


@dataclass(frozen=True, slots=True)
class RoleGone:
    """I know no more jobs of this role."""

    role_id: int


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job that you have asked about has ended."""

    snapshot: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExtensionChanged:
    """A command has changed the extension in some database."""


@dataclass(frozen=True, slots=True)
class LeaveDatabases:
    """A statement is about to drop, rename or copy databases; one character for each byte."""

    sql: str


NewsItem: TypeAlias = RoleGone | JobEnded | ExtensionChanged | LeaveDatabases


@dataclass(frozen=True, slots=True)
class News:
    """News for all other workers, or for one; not answered."""

    item: NewsItem
    to: int | None = None
    sender: int = 0


Message: TypeAlias = (
    Report
    | Order
    | Outcome
    | Configure
    | EndNow
    | Ping
    | Asked
    | Gone
    | Question
    | Answer
    | News
    | Slotting
    | SlotAnswer
)

_CLASSES: Final[dict[str, type]] = {cls.__name__: cls for cls in get_args(Message | Ask | NewsItem)}
_CLASS: Final = "class"


def encode(message: Message) -> bytes:
    """The message as one line, with its line feed."""
    return json.dumps(_plain(message), default=_plain, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    return cast(Message, json.loads(line, object_hook=_typed))


def _plain(value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        raise TypeError(f"cannot be sent: {value!r}")
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {_CLASS: type(value).__name__, **named}


def _typed(value: dict[str, Any]) -> Any:
    name = value.pop(_CLASS, None)
    return value if name is None else _CLASSES[name](**value)
