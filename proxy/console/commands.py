"""The commands of the console: PgBouncer's, and the proxy's own.

Invariant: nothing is guessed. Unknown commands and extra words are errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.errors import FEATURE_NOT_SUPPORTED, SQLError
from protocol.kinds import TransactionStatus
from proxy.console.tables import TABLES, Columns
from proxy.sql import lexer
from proxy.sql.lexer import Kind, LexError

SYNTAX_ERROR: Final = "42601"

SHOWN: Final = ("help", *TABLES)

USAGE: Final = (
    f"SHOW {'|'.join(name.upper() for name in SHOWN)}",
    "CANCEL pid",
    "KILL session",
    "DRAIN worker",
    "RELOAD",
    "SHUTDOWN",
)
"""The output of SHOW HELP."""

_HINT: Final = f"The commands are: {'; '.join(USAGE)}."

_ARGUMENTS: Final = {
    "CANCEL": ("the PID of a job", "jobs"),
    "KILL": ("the id of a session", "sessions"),
    "DRAIN": ("the number of a worker", "workers"),
}
"""What each command requires, and the table that has it."""

# Transaction commands by first word: drivers send them, so they seem to work.
_TRANSACTION: Final = {
    "begin": ("BEGIN", TransactionStatus.IN_BLOCK),
    "start": ("START TRANSACTION", TransactionStatus.IN_BLOCK),
    "commit": ("COMMIT", TransactionStatus.IDLE),
    "end": ("COMMIT", TransactionStatus.IDLE),
    "rollback": ("ROLLBACK", TransactionStatus.IDLE),
    "abort": ("ROLLBACK", TransactionStatus.IDLE),
}

# Commands about session settings and the like: accepted, without effect.
_IGNORED: Final = {
    "set": "SET",
    "reset": "RESET",
    "discard": "DISCARD ALL",
    "deallocate": "DEALLOCATE ALL",
    "unlisten": "UNLISTEN",
    "close": "CLOSE CURSOR ALL",
}


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        tag: its command tag, which is also its name.
        argument: for SHOW the table in lower case; for others their object; or empty.
        status: of the transaction afterwards; None if unchanged.
    """

    tag: str
    argument: str = ""
    status: int | None = None

    @property
    def columns(self) -> Columns | None:
        """The columns of its rows; None if it has none."""
        return TABLES.get(self.argument) if self.tag == "SHOW" else None

    @property
    def is_harmless(self) -> bool:
        """Whether the command changes nothing."""
        return self.tag == "SHOW" or self.status is not None or self.tag in _IGNORED.values()


def parse(sql: bytes) -> list[Command]:
    """The commands of a Query. Raises SQLError."""
    try:
        statements = lexer.split(sql, bounded=True)
    except LexError as error:
        raise SQLError(SYNTAX_ERROR, f"invalid command: {error}", hint=_HINT) from None
    return [
        _command([sql[token.start : token.end] for token in statement.tokens], statement.tokens)
        for statement in statements
    ]


def parse_one(sql: bytes) -> Command | None:
    """The command of a Parse; None if it is empty. Raises SQLError."""
    commands = parse(sql)
    if len(commands) > 1:
        raise SQLError(SYNTAX_ERROR, "cannot insert multiple commands into a prepared statement")
    return commands[0] if commands else None


def _command(texts: list[bytes], tokens: list[lexer.Token]) -> Command:
    words = [text.decode("utf-8", "replace") for text in texts]
    if any(token.kind is Kind.PARAMETER for token in tokens):
        raise SQLError(
            FEATURE_NOT_SUPPORTED,
            "the console takes no parameters",
            hint="Write the value into the command.",
        )
    first, *rest = words
    verb = first.lower()
    if verb in _IGNORED:
        return Command(_IGNORED[verb])
    if verb in _TRANSACTION:
        tag, status = _TRANSACTION[verb]
        return Command(tag, status=status)
    match verb, rest:
        case "show", [table] if table.lower() in SHOWN:
            return Command("SHOW", table.lower())
        case "show", _:
            raise _invalid(words, f"SHOW takes one of: {', '.join(SHOWN)}.")
        case (("cancel" | "kill" | "drain"), [argument]) if tokens[1].kind in _VALUES:
            return Command(verb.upper(), argument.strip("'"))
        case (("cancel" | "kill" | "drain"), _):
            needed, table = _ARGUMENTS[verb.upper()]
            hint = f"{verb.upper()} needs {needed}, which SHOW {table.upper()} lists."
            raise _invalid(words, hint)
        case "reload", []:
            return Command("RELOAD")
        case "shutdown", []:
            return Command("SHUTDOWN")
        case "shutdown", [word] if word.lower() == "wait_for_clients":
            return Command("SHUTDOWN")
        case "shutdown", _:
            raise _invalid(words, "SHUTDOWN waits for clients; a second one does not.")
    raise _invalid(words, _HINT)


_VALUES: Final = (Kind.NUMBER, Kind.STRING)


def _invalid(words: list[str], hint: str) -> SQLError:
    said = " ".join(words)
    said = said if len(said) <= 60 else f"{said[:57]}..."
    return SQLError(SYNTAX_ERROR, f'invalid command "{said}"', hint=hint)
