"""What a job says reaches each session in that session's encoding, and so do its rows.

What is expected of a character is what the server's own conversions make of it; of rows, what a
direct session gets for the same query.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import psycopg
import pytest

from protocol.messages import Bind, DataRow, Execute, Parse, Query, Sync
from tests.conftest import upstream_of
from tests.support.in_database import with_extension
from tests.support.servers import Proxy, Server
from tests.support.wire import Wire, error_of

pytestmark = pytest.mark.every_server

LETTERS: Final = "aäéß‰яБ日本表ソ能한국語中·~\\\"{}',"
ENCODINGS: Final = (
    *("UTF8", "LATIN1", "LATIN9", "WIN1252", "KOI8R", "WIN1251", "SJIS", "EUC_JP", "GBK"),
    *("GB18030", "BIG5", "UHC", "EUC_KR", "EUC_CN", "SHIFT_JIS_2004", "EUC_JIS_2004"),
    *("EUC_TW", "SQL_ASCII"),
)
UNKNOWN: Final = ("EUC_TW",)
"""To Python."""

DATABASES: Final = ("UTF8", "LATIN1", "EUC_JP", "SQL_ASCII")


class Raw:
    """A session whose texts are bytes."""

    def __init__(self, endpoint: Proxy | Server, dbname: str) -> None:
        self._conn = endpoint.connect(dbname=dbname)
        self._pg = self._conn.pgconn
        self.message: bytes | None = None
        self.notices: list[bytes | None] = []
        self._pg.notice_handler = lambda notice: self.notices.append(
            notice.error_field(psycopg.pq.DiagnosticField.MESSAGE_PRIMARY)
        )

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._conn.close()

    def takes(self, encoding: str) -> bool:
        """Set client_encoding; whether the database can convert it."""
        result = self._pg.exec_(f"SET client_encoding = '{encoding}'".encode())
        return result.status == psycopg.pq.ExecStatus.COMMAND_OK

    def rows(
        self, sql: bytes, values: Sequence[bytes | None] | None = None, *, binary: bool = False
    ) -> list[tuple[bytes | None, ...]] | str:
        """The rows of a statement, or the SQLSTATE; by a simple query if there are no values."""
        if values is None:
            result = self._pg.exec_(sql)
        else:
            result = self._pg.exec_params(sql, values, result_format=int(binary))
        if result.status == psycopg.pq.ExecStatus.TUPLES_OK:
            return [
                tuple(result.get_value(row, column) for column in range(result.nfields))
                for row in range(result.ntuples)
            ]
        self.message = result.error_field(psycopg.pq.DiagnosticField.MESSAGE_PRIMARY)
        return (result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) or b"").decode()

    def row(self, sql: bytes, values: Sequence[bytes | None] | None = None) -> Any:
        """The one row."""
        found = self.rows(sql, values)
        assert isinstance(found, list), (found, self.message)
        [row] = found
        return row


class World(NamedTuple):
    """Databases, and what the server makes of each character."""

    proxy: Proxy
    names: dict[str, str]
    letters: dict[str, dict[str, bytes]]

    def session(self, database: str = "UTF8") -> Raw:
        return Raw(self.proxy, self.names[database])

    def text(self, encoding: str) -> bytes:
        """All characters that an encoding has."""
        return b"".join(self.letters[encoding].values())

    def converted(self, encoding: str, *targets: str) -> bytes:
        """The same in another one, by way of those before it."""
        targets = tuple(target for target in targets if target != "SQL_ASCII")
        if {encoding, *targets} - {encoding} and encoding in UNKNOWN:
            text = "".join(
                letter if code.isascii() else "".join(f"\\x{byte:02x}" for byte in code)
                for letter, code in self.letters[encoding].items()
            )
            return text.encode()
        kept = list[bytes]()
        for letter in self.letters[encoding]:
            known = all(
                letter in self.letters[target]
                and (letter.isascii() or target == encoding or target not in UNKNOWN)
                for target in targets
            )
            kept.append(self.letters[(encoding, *targets)[-1]][letter] if known else b"?")
        return b"".join(kept)


@pytest.fixture(scope="module")
def world(server: Server) -> Iterator[World]:
    names = {encoding: "encodings_" + encoding.lower() for encoding in DATABASES}
    with (
        Proxy(upstream_of(server)) as proxy,  # others list the jobs of a shared one
        server.connect() as conn,
        contextlib.ExitStack() as stack,
    ):
        for encoding, name in names.items():
            conn.execute(
                f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}'"
                " LC_COLLATE 'C' LC_CTYPE 'C'".encode()
            )
            stack.callback(conn.execute, f"DROP DATABASE {name} WITH (FORCE)".encode())
            stack.enter_context(contextlib.contextmanager(with_extension)(server, proxy, name))
        letters: dict[str, dict[str, bytes]] = {}
        for encoding in ENCODINGS[:-1]:
            letters[encoding] = {}
            for letter in LETTERS:
                with contextlib.suppress(psycopg.errors.UntranslatableCharacter):
                    row = conn.execute("SELECT convert_to(%s, %s)", [letter, encoding]).fetchone()
                    assert row is not None
                    letters[encoding][letter] = row[0]
        yield World(proxy, names, letters)


# --- texts ------------------------------------------------------------------------------------

LISTED: Final = (
    b" AS r(pid int4, cookie int8, launched_at timestamptz, user_id oid, queue_size int4,"
    b" state text, sql_preview text, last_error text, consumed bool, label text)"
)
DIRECT: Final = b"SELECT * FROM %b"
INSIDE: Final = b"SELECT r.* FROM (SELECT 1 OFFSET 0) o, LATERAL %b"
READ_AS_BYTES: Final = ("SJIS", "GBK", "GB18030", "BIG5", "UHC", "SHIFT_JIS_2004")
"""Whose characters a database in SQL_ASCII would take apart."""


def sql_of(text: bytes) -> bytes:
    return b"SELECT CAST('%b' AS int4)" % text.replace(b"'", b"''")


def complaint(text: bytes) -> bytes:
    return b'invalid input syntax for type integer: "%b"' % text


def failed_job(session: Raw, text: bytes) -> tuple[bytes, bytes]:
    """Pid and cookie of a job that has the text in its SQL, its label and its error."""
    launch = b"SELECT pid, cookie FROM pg_background_launch_v2($1, 0, $2)"
    pid, cookie = session.row(launch, [sql_of(text), text])
    assert session.row(b"SELECT pg_background_wait(%b, %b)" % (pid, cookie)) == (b"t",)
    return pid, cookie


def listed(session: Raw, sql: bytes, values: list[bytes | None] | None) -> dict[bytes, Any]:
    """SQL, error and label by the cookie."""
    found = session.rows(sql, values)
    assert isinstance(found, list), (found, session.message)
    return {row[1] or b"": (row[6], row[7], row[9]) for row in found}


@pytest.fixture(scope="module")
def jobs(world: World) -> dict[str, tuple[bytes, bytes]]:
    """A job for each encoding."""
    made = {}
    for encoding in ENCODINGS[:-1]:
        with world.session() as session:
            assert session.takes(encoding)
            made[encoding] = failed_job(session, world.text(encoding))
    return made


@pytest.mark.parametrize("database", DATABASES)
def test_texts_of_jobs_in_each_encoding(
    world: World, jobs: dict[str, tuple[bytes, bytes]], database: str
) -> None:
    asked = 0
    for number, asker in enumerate(ENCODINGS):
        with world.session(database) as session:
            if not session.takes(asker):
                continue
            asked += 1
            ways: list[tuple[bytes, list[bytes | None] | None]] = [
                (DIRECT % b"pg_background_list_all()", None),
                (DIRECT % b"pg_background_list_all()", []),
                (INSIDE % b"pg_background_list_all()" + LISTED, []),
            ]
            for sql, values in ways:
                is_inside = sql.startswith(INSIDE[:30])
                if is_inside and database == "SQL_ASCII" and asker in READ_AS_BYTES:
                    continue
                found = listed(session, sql, values)
                for place, (launcher, (pid, cookie)) in enumerate(jobs.items()):
                    own = database if asker == "SQL_ASCII" else asker
                    text = world.converted(launcher, *([database, own] if is_inside else [own]))
                    expected = sql_of(text), complaint(text), text
                    assert found[cookie] == expected, (launcher, asker, sql)
                    if (place - number) % 6:
                        continue
                    handle = b"(%b, %b)" % (pid, cookie)
                    start = INSIDE + b" AS r" if is_inside else DIRECT
                    outcome = session.row(start % (b"pg_background_outcome" + handle), values)
                    error = session.row(start % (b"pg_background_error_info" + handle), values)
                    [whole] = session.row(start % (b"pg_background_full_sql" + handle), values)
                    assert (whole, error[1], outcome[10]) == expected, (launcher, asker, sql)
                    assert outcome[9] == error[1]
    assert asked >= 3


# --- rows -------------------------------------------------------------------------------------

COLUMNS: Final = (
    "t text, a text[], c held_pair, j json, jb jsonb, n name, k char(40), i int4, b bytea"
)
SELECTED: Final = (
    "t, ARRAY[t, NULL, t], ROW(1, t)::held_pair, to_json(t), to_jsonb(t), t::name, t::char(40),"
    " 5, convert_to(t, 'UTF8')"
)
HELD: Final = f"SELECT {SELECTED} FROM held WHERE which = '{{}}' ORDER BY number"


@pytest.fixture(scope="module")
def held(world: World, server: Server) -> World:
    """For each pair of encodings, rows of the characters that both have; for each encoding, of its
    own; some have none but ASCII."""
    with server.connect(dbname=world.names["UTF8"]) as conn:
        conn.execute("CREATE TABLE held (number serial, which text, t text)")
        conn.execute("CREATE TYPE held_pair AS (i int4, t text)")
        rows = []
        for one in ENCODINGS[:-1]:
            own = "".join(world.letters[one])
            rows += [(one, "plain"), (one, own)]
            for other in ENCODINGS[:-1]:
                both = "".join(letter for letter in own if letter in world.letters[other])
                rows += [(f"{one} {other}", text) for text in ("plain", both, '"\\')]
        conn.cursor().executemany("INSERT INTO held (which, t) VALUES (%s, %s)", rows)
    return world


@pytest.mark.turns(4)
@pytest.mark.parametrize("launcher", ENCODINGS[:-1])
def test_rows_in_another_encoding_than_the_launch(
    held: World, server: Server, launcher: str
) -> None:
    with held.session() as session, Raw(server, held.names["UTF8"]) as direct:
        for number, fetcher in enumerate(ENCODINGS):
            if (number + ENCODINGS.index(launcher)) % 3:
                continue
            assert direct.takes(fetcher)
            for which in (f"{launcher} {fetcher}", launcher):
                query = HELD.format(which)
                ways: list[tuple[str, list[bytes | None] | None, bool]] = [
                    ("SELECT * FROM {}", None, False),
                    ("SELECT * FROM {}", [], False),
                    ("SELECT * FROM {}", [], True),
                    (f"SELECT a, t, i FROM {{}} AS ({COLUMNS})", [], True),
                    (
                        f"SELECT r.* FROM (SELECT 1 OFFSET 0) o, LATERAL {{}} AS r({COLUMNS})",
                        [],
                        True,
                    ),
                ]
                # All of them, and all fetchers, take three minutes.
                for way, values, binary in (ways[number % 5], ways[(number + 2) % 5]):
                    assert session.takes(launcher)
                    pid, cookie = session.row(
                        b"SELECT pid, cookie FROM pg_background_launch_v2($1)", [query.encode()]
                    )
                    assert session.takes(fetcher)
                    call = f"pg_background_result({pid.decode()}, {cookie.decode()})"
                    names = "t, a, c, j, jb, n, k, i, b"
                    chosen = "a, t, i" if "a, t, i" in way else "*"
                    same = f"SELECT {chosen} FROM ({query}) AS q({names})"
                    found = session.rows(way.format(call).encode(), values, binary=binary)
                    expected = direct.rows(same.encode(), [], binary=binary)
                    assert found == expected, (fetcher, which, way, session.message)


def data(messages: Sequence[tuple[str, bytes]]) -> list[bytes | None]:
    """The first values of the rows among messages."""
    return [DataRow.parse(body).values[0] for kind, body in messages if kind == "D"]


def test_rows_that_come_in_parts_and_the_encoding_changes_between(held: World) -> None:
    """The rows of a portal, too, are printed as they are fetched."""
    job = b"SELECT unnest(ARRAY['\xc3\xa4', '\xc3\xb6', '\xc3\xbc'])"
    fetch = b"SELECT * FROM pg_background_result(pg_background_launch($job$%b$job$))" % job
    one_row = Execute(b"p", 1).serialize() + Sync().serialize()
    with Wire(("127.0.0.1", held.proxy.port), database=held.names["UTF8"]) as wire:

        def ask(*messages: bytes) -> list[tuple[str, bytes]]:
            wire.send(b"".join(messages))
            return wire.until_ready()

        ask(Query(b"BEGIN").serialize())
        begin = Parse(b"s", fetch, ()).serialize(), Bind(b"p", b"s", (), (), ()).serialize()
        found = data(ask(*begin, one_row))
        ask(Query(b"SET client_encoding = 'LATIN1'").serialize())
        found += data(ask(one_row))
        ask(Query(b"SET client_encoding = 'KOI8R'").serialize())
        error = error_of(ask(one_row))
    assert found == [b"\xc3\xa4", b"\xf6"]
    assert error.sqlstate == "22P05"
