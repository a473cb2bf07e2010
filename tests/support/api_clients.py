"""One session through each client that people use: psql, psycopg in text and binary, asyncpg.

Tests of what a function returns and refuses run with all of them: the fixture `client`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg
import psycopg
import pytest

from tests.support.background import wait_until
from tests.support.servers import Connection, Proxy, start_psql

Row = tuple[Any, ...]

_NULL: Final = "∅"
_SEPARATOR: Final = "\x1f"
_END: Final = "\x1e"

_gates = itertools.count(8_000_000)


class Handle(NamedTuple):
    """A job's."""

    pid: int
    cookie: int

    @property
    def sql(self) -> str:
        """The handle as two arguments."""
        return f"{self.pid}, {self.cookie}"


class Refused(NamedTuple):
    """The fields of an error."""

    sqlstate: str | None
    message: str | None
    hint: str | None = None


class Client(ABC):
    """A session through one of the clients."""

    @abstractmethod
    def rows(self, sql: str) -> list[Row]:
        """The rows that a statement returns; psql's values are strings."""

    @abstractmethod
    def error(self, sql: str) -> Refused:
        """The error of a statement that fails."""

    @abstractmethod
    def close(self) -> None: ...

    def texts(self, sql: str) -> list[tuple[str | None, ...]]:
        """The rows that it returns, as PostgreSQL would print them."""
        return [tuple(text(value) for value in row) for row in self.rows(sql)]

    def one(self, sql: str) -> str | None:
        """The one value, printed."""
        [[value]] = self.texts(sql)
        return value

    def call(self, name: str, *arguments: object) -> str | None:
        """The value of a function in the select list, printed."""
        return self.one(f"SELECT pg_background_{name}({', '.join(map(str, arguments))})")

    def launch(self, sql: str, label: str | None = None, *, by: str = "launch_v2") -> Handle:
        """Launches a job."""
        more = "" if label is None else f", NULL, {quoted(label)}"
        call = f"pg_background_{by}({quoted(sql)}{more})"
        [[pid, cookie]] = self.rows(f"SELECT (h).pid, (h).cookie FROM (SELECT {call} AS h) s")
        return Handle(int(pid), int(cookie))

    def ended(self, sql: str, label: str | None = None) -> Handle:
        """Launches a job and waits for its end."""
        handle = self.launch(sql, label)
        assert self.call("wait", handle.sql) == "t"
        return handle


def quoted(sql: str) -> str:
    """A value as a constant of SQL."""
    return "'" + sql.replace("'", "''") + "'"


def text(value: Any) -> str | None:
    """A value as PostgreSQL prints it; times in UTC."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ")
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple | asyncpg.Record):
        return "(" + ",".join(_field(text(part)) for part in tuple(value)) + ")"
    return str(value)


def _field(part: str | None) -> str:
    if part is None:
        return ""
    return f'"{part}"' if not part or set(part) & set(' ",()') else part


class Psql(Client):
    """psql, which gets one statement after the other."""

    def __init__(self, proxy: Proxy, **params: Any) -> None:
        options = ("-qAt", "-F", _SEPARATOR, "-R", _END, "-P", f"null={_NULL}")
        self._process = start_psql(proxy, *options, "-v", "VERBOSITY=verbose", **params)

    def _run(self, sql: str) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{sql}\n;\n\\echo (done)\n")
        self._process.stdin.flush()
        lines: list[str] = []
        while (line := self._process.stdout.readline()) != "(done)\n":
            assert line, "psql has ended"
            lines.append(line.removesuffix("\n"))
        return lines

    def rows(self, sql: str) -> list[Row]:
        lines = self._run(sql)
        assert not any(line.startswith("ERROR:") for line in lines), lines
        return [
            tuple(None if value == _NULL else value for value in line.split(_SEPARATOR))
            for line in ("\n".join(lines).split(_END) if lines else [])
        ]

    def error(self, sql: str) -> Refused:
        lines = self._run(sql)
        [first] = [line for line in lines if line.startswith("ERROR:")]
        hints = [line[len("HINT:  ") :] for line in lines if line.startswith("HINT:")]
        sqlstate, _, message = first.removeprefix("ERROR:  ").partition(": ")
        return Refused(sqlstate, message, hints[0] if hints else None)

    def close(self) -> None:
        self._process.communicate("\\q\n", timeout=20)


class Psycopg(Client):
    """psycopg with cursors of one format, through the extended protocol."""

    def __init__(self, proxy: Proxy, *, binary: bool, **params: Any) -> None:
        self._conn = proxy.connect(**params)
        self._binary = binary

    def rows(self, sql: str) -> list[Row]:
        cursor = self._conn.cursor(binary=self._binary)
        cursor.execute(sql.replace("%", "%%"), (), prepare=True)
        return cursor.fetchall() if cursor.description else []

    def error(self, sql: str) -> Refused:
        with pytest.raises(psycopg.Error) as caught:
            self.rows(sql)
        diagnostic = caught.value.diag
        return Refused(diagnostic.sqlstate, diagnostic.message_primary, diagnostic.message_hint)

    def close(self) -> None:
        self._conn.close()


class Asyncpg(Client):
    """asyncpg, which always asks for binary results."""

    def __init__(self, proxy: Proxy, **params: Any) -> None:
        self._runner = asyncio.Runner()
        self._conn = self._runner.run(
            asyncpg.connect(
                host=proxy.host,
                port=proxy.port,
                user=params.get("user", "postgres"),
                database=params["dbname"],
            )
        )

    def rows(self, sql: str) -> list[Row]:
        return [tuple(row) for row in self._runner.run(self._conn.fetch(sql))]

    def error(self, sql: str) -> Refused:
        with pytest.raises(asyncpg.PostgresError) as caught:
            self.rows(sql)
        error = caught.value
        return Refused(error.sqlstate, error.message, error.hint)

    def close(self) -> None:
        self._runner.run(self._conn.close())
        self._runner.close()


KINDS: Final = ("psql", "text", "binary", "asyncpg")


def open_client(kind: str, proxy: Proxy, **params: Any) -> Client:
    """A client of one of the KINDS."""
    match kind:
        case "psql":
            return Psql(proxy, **params)
        case "asyncpg":
            return Asyncpg(proxy, **params)
    return Psycopg(proxy, binary=kind == "binary", **params)


class Gate:
    """A gate that jobs wait at until the test opens it: an advisory lock."""

    def __init__(self, observer: Connection) -> None:
        self._observer = observer
        self._key = next(_gates)
        observer.execute("SELECT pg_advisory_lock(%s)", [self._key])
        self.sql = f"SELECT pg_advisory_xact_lock_shared({self._key})"

    def wait_for(self, *handles: Handle) -> None:
        """Waits until these jobs wait at the gate."""
        query = (
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
        )
        wanted = {handle.pid for handle in handles}
        wait_until(lambda: wanted <= {pid for [pid] in self._observer.execute(query, [self._key])})

    def open(self) -> None:
        self._observer.execute("SELECT pg_advisory_unlock(%s)", [self._key])


def handles_sql(handles: Iterable[Handle]) -> str:
    """An array of handles, as a constant."""
    rows = ", ".join(f"ROW({handle.sql})::pg_background_handle" for handle in handles)
    return f"ARRAY[{rows}]::pg_background_handle[]"


def each_client(request: pytest.FixtureRequest, proxy: Proxy, scratch: str) -> Iterator[Client]:
    """The body of the fixture `client`."""
    client = open_client(request.param, proxy, dbname=scratch)
    yield client
    client.close()
