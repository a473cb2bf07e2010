"""What a job says reaches each session in that session's encoding, and so do its rows.

What is expected of a character is what the server's own conversions make of it; of rows, what a
direct session gets for the same query.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
import pytest

from protocol.messages import Bind, DataRow, Execute, Parse, Query, Sync
from tests.conftest import upstream_of
from tests.support.background import wait_until
from tests.support.in_database import with_extension
from tests.support.servers import Proxy, Server
from tests.support.wire import Wire, error_of
from tests.test_console import console, options, show

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
        self.pg = self._conn.pgconn
        self.message: bytes | None = None
        self.notices: list[bytes | None] = []
        self.pg.notice_handler = lambda notice: self.notices.append(
            notice.error_field(psycopg.pq.DiagnosticField.MESSAGE_PRIMARY)
        )

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._conn.close()

    def takes(self, encoding: str) -> bool:
        """Set client_encoding; whether the database can convert it."""
        result = self.pg.exec_(f"SET client_encoding = '{encoding}'".encode())
        return result.status == psycopg.pq.ExecStatus.COMMAND_OK

    def rows(
        self, sql: bytes, values: Sequence[bytes | None] | None = None, *, binary: bool = False
    ) -> list[tuple[bytes | None, ...]] | str:
        """The rows of a statement, or the SQLSTATE; by a simple query if there are no values."""
        if values is None:
            result = self.pg.exec_(sql)
        else:
            result = self.pg.exec_params(sql, values, result_format=int(binary))
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

LAUNCH: Final = b"SELECT pid, cookie FROM pg_background_launch_v2($1)"
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
                    pid, cookie = session.row(LAUNCH, [query.encode()])
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


def test_many_rows_and_long_ones(held: World) -> None:
    """Those in ASCII among the others keep their places."""
    job = (
        "SELECT n, CASE WHEN n % 3 = 0 THEN 'ascii' ELSE repeat('\u00e4', n % 500) END"
        " FROM generate_series(1, 3000) n UNION ALL SELECT 0, repeat('\u00e4', 300000)"
    )
    fetches = (
        "SELECT n, t FROM pg_background_result({}, {}) AS (n int4, t text)",
        "SELECT r.* FROM (SELECT 1 OFFSET 0) o,"
        " LATERAL pg_background_result({}, {}) AS r(n int4, t text)",
    )
    expected = [(n, "ascii" if n % 3 == 0 else "ä" * (n % 500)) for n in range(1, 3_001)] + [
        (0, "ä" * 300_000)
    ]
    for fetch, binary in ((fetches[0], False), (fetches[0], True), (fetches[1], True)):
        with held.proxy.connect(dbname=held.names["UTF8"]) as conn:
            conn.execute("SET client_encoding = 'LATIN1'")
            launch = "SELECT pid, cookie FROM pg_background_launch_v2(%s)"
            [handle] = conn.execute(launch, [job]).fetchall()
            conn.execute("SET client_encoding = 'UTF8'")
            with conn.cursor(binary=binary) as cursor:
                found = cursor.execute(fetch.format(*handle).encode()).fetchall()
            assert found == expected


def test_errors_and_notices_of_a_fetch(held: World) -> None:
    job = "DO $do$ BEGIN RAISE NOTICE 'ä'; RAISE EXCEPTION 'ö' USING DETAIL = 'ü'; END $do$"
    fetches = (
        "SELECT * FROM pg_background_result({}, {})",
        "SELECT r.* FROM (SELECT 1 OFFSET 0) o, LATERAL pg_background_result({}, {}) AS r(t text)",
    )
    with held.session() as session:
        for sql in fetches:
            pid, cookie = session.row(LAUNCH, [job.encode()])
            assert session.takes("LATIN1")
            session.notices.clear()
            found = session.rows(sql.format(pid.decode(), cookie.decode()).encode())
            assert (found, session.message) == ("P0001", "ö".encode("latin-1"))
            assert session.notices == ["ä".encode("latin-1")]
            assert session.takes("UTF8")


def test_names_of_columns(held: World) -> None:
    with held.session() as session:
        pid, cookie = session.row(LAUNCH, ['SELECT 1 AS "ä日"'.encode()])
        assert session.takes("LATIN1")
        result = session.pg.exec_(b"SELECT * FROM pg_background_result(%b, %b)" % (pid, cookie))
        assert result.fname(0) == b"\xe4?"
        sql = b'SELECT r."n\xe4ht" FROM pg_background_result(pg_background_launch($$SELECT 1$$)) r'
        assert session.rows(sql) == "42703"
        assert session.message == b'column "n\xe4ht" does not exist'
        listed = b'SELECT * FROM pg_background_list_all() AS ("\xe4" int4, "\xf6" int8, c'
        listed += LISTED[LISTED.index(b" timestamptz") :]
        assert [session.pg.exec_(listed).fname(n) for n in range(3)] == [b"\xe4", b"\xf6", b"c"]


# --- bytes that are no characters -------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(world: World) -> tuple[bytes, bytes]:
    """A job with a byte that is no character in UTF-8, in its SQL, its label and its error."""
    with world.session("SQL_ASCII") as session:
        assert session.takes("SQL_ASCII")
        return failed_job(session, b"\x93\xc3\xa4\x93")


@pytest.mark.parametrize("database", DATABASES)
def test_a_driver_reads_a_list_with_any_bytes(
    world: World, broken: tuple[bytes, bytes], database: str
) -> None:
    pid, cookie = map(int, broken)
    for encoding, text in (("UTF8", "\\x93ä\\x93"), ("LATIN1", "\x93Ã¤\x93")):
        with world.proxy.connect(dbname=world.names[database]) as conn:
            try:
                conn.execute(f"SET client_encoding = '{encoding}'".encode())
            except psycopg.errors.FeatureNotSupported:
                continue
            queries = ["SELECT * FROM pg_background_list_all()"]
            if encoding == "UTF8":
                queries.append((INSIDE % b"pg_background_list_all()" + LISTED).decode())
            for query in queries:
                rows = conn.execute(query.encode()).fetchall()
                [row] = [row for row in rows if row[1] == cookie]
                assert row[9] == text, (encoding, query)
                assert row[7] == f'invalid input syntax for type integer: "{text}"'
                assert row[6] == f"SELECT CAST('{text}' AS int4)"
            outcome = conn.execute("SELECT * FROM pg_background_outcome(%s, %s)", [pid, cookie])
            assert (outcome.fetchone() or ())[10] == text
            [status] = conn.execute(
                "SELECT pg_background_status_v2(%s, %s)::text", [pid, cookie]
            ).fetchone() or [""]
            assert json.loads(status)["label"] == text


def test_bytes_stay_bytes_where_nothing_is_converted(
    world: World, broken: tuple[bytes, bytes]
) -> None:
    with world.session("SQL_ASCII") as session:
        assert session.takes("SQL_ASCII")
        for way in (
            DIRECT % b"pg_background_list_all()",
            INSIDE % b"pg_background_list_all()" + LISTED,
        ):
            text = b"\x93\xc3\xa4\x93"
            expected = sql_of(text), complaint(text), text
            assert listed(session, way, [])[broken[1]] == expected


def test_a_job_that_changes_its_own_encoding_and_fails(world: World) -> None:
    """Its error is in an encoding that nobody is told."""
    job = "SET client_encoding = 'LATIN1'; SELECT CAST('\u00c3\u00a4' AS int4)"
    with world.proxy.connect(dbname=world.names["UTF8"]) as conn:
        [[pid, cookie]] = conn.execute(
            "SELECT pid, cookie FROM pg_background_launch_v2(%s)", [job]
        ).fetchall()
        with pytest.raises(psycopg.errors.InvalidTextRepresentation) as caught:
            conn.execute("SELECT * FROM pg_background_result(%s, %s)", [pid, cookie])
        assert caught.value.diag.message_primary is not None
        assert "type integer" in caught.value.diag.message_primary
        rows = conn.execute("SELECT * FROM pg_background_list_all()").fetchall()
        assert "type integer" in next(row[7] for row in rows if row[1] == cookie)


# --- other ways to the texts ------------------------------------------------------------------


def test_the_state_as_json_where_characters_end_in_a_backslash(
    world: World, jobs: dict[str, tuple[bytes, bytes]]
) -> None:
    pid, cookie = jobs["SJIS"]
    text = "".join(world.letters["SJIS"])
    for encoding, codec in (("SJIS", "cp932"), ("UTF8", "utf-8"), ("EUC_JP", "euc_jp")):
        with world.session() as session:
            assert session.takes(encoding)
            for sql in (b"SELECT pg_background_status_v2(%b, %b)", b"SELECT inside($1)"):
                values: list[bytes | None] = []
                if b"$1" in sql:
                    values = [b"pg_background_status_v2(%b, %b)" % (pid, cookie)]
                    [found] = session.row(sql, values)
                else:
                    [found] = session.row(sql % (pid, cookie), values)
                label = json.loads(found.decode(codec))["label"]
                assert label.encode(codec, "replace") == world.converted("SJIS", encoding)
    assert "能" in text


def test_progress_and_labels(world: World) -> None:
    job = "SELECT pg_background_progress(50, 'ä'); SELECT pg_sleep(60)"
    with world.session() as session, world.session() as other:
        assert session.takes("LATIN1")
        pid, cookie = session.row(
            b"SELECT pid, cookie FROM pg_background_launch_v2($1, 0, $2)",
            [job.encode("latin-1"), b"n\xe4ht"],
        )
        call = b"SELECT * FROM pg_background_get_progress(%b, %b)" % (pid, cookie)
        wait_until(lambda: other.row(call)[1] == "ä".encode())
        assert session.row(call) == (b"50", b"\xe4")
        assert session.takes("UTF8")
        canceling = b"SELECT pg_background_cancel_by_label($1)"
        assert session.row(canceling, [b"n__ht"]) == (b"0",)
        assert session.row(canceling, ["nä_t".encode()]) == (b"1",)


def test_long_texts_are_cut_between_characters(world: World) -> None:
    for encoding, codec, letter in (("LATIN1", "latin-1", "ä"), ("SJIS", "cp932", "能")):
        with world.session() as session, world.session() as other:
            assert session.takes(encoding)
            text = "x" + letter * 40_000
            pid, cookie = failed_job(session, text.encode(codec))
            handle = pid, cookie
            for asker, its in ((session, codec), (other, "utf-8")):
                of_list = listed(asker, DIRECT % b"pg_background_list_all()", None)[cookie]
                preview, error, label = (part.decode(its) for part in of_list)
                assert preview == ("SELECT CAST('" + text)[:120]
                assert error.startswith('invalid input syntax for type integer: "' + text[:1900])
                assert error.endswith(letter + "[...]")
                assert text.startswith(label)
                assert 500 < len(label) <= 1024
                [whole] = asker.row(b"SELECT pg_background_full_sql(%b, %b)" % handle)
                assert whole.decode(its).startswith("SELECT CAST('" + text[:30_000])


def test_the_name_that_old_drivers_use(world: World) -> None:
    with world.session() as session:
        assert session.takes("UNICODE")
        pid, cookie = failed_job(session, "ä日".encode())
        for asker, text in (("UNICODE", "ä日".encode()), ("LATIN1", b"\xe4?")):
            assert session.takes(asker)
            [sql] = session.row(b"SELECT pg_background_full_sql(%b, %b)" % (pid, cookie))
            assert sql == sql_of(text)


def test_characters_that_the_server_does_not_take_back(
    world: World, jobs: dict[str, tuple[bytes, bytes]]
) -> None:
    """It makes them, and calls them invalid."""
    _, cookie = jobs["EUC_KR"]
    with world.session() as session:
        assert session.takes("JOHAB")
        direct = listed(session, DIRECT % b"pg_background_list_all()", None)[cookie][2]
        inside = listed(session, INSIDE % b"pg_background_list_all()" + LISTED, [])[cookie][2]
        assert "한국" in direct.decode("johab")
        assert inside.isascii()


# --- what stays -------------------------------------------------------------------------------


def _has_failed(session: Raw, sql: bytes) -> bool:
    return session.rows(sql) == [(b"error",)]


def test_the_history(world: World, server: Server) -> None:
    """Another proxy reads it, which knows none of the jobs."""
    cases = (("UTF8", "SJIS", b"?\x94\x5c"), ("SQL_ASCII", "SQL_ASCII", b"\x93\xc3\xa4"))
    made = {}
    with (
        Proxy(upstream_of(server), "--history", "all") as writing,
        Proxy(upstream_of(server), "--history", "all") as reading,
    ):
        for database, encoding, text in cases:
            name = world.names[database]
            with Raw(writing, name) as session, Raw(reading, name) as reader:
                assert session.takes(encoding)
                made[database] = failed_job(session, text)
                _, cookie = made[database]
                view = b"SELECT state FROM pg_background_history WHERE cookie = %b" % cookie
                wait_until(functools.partial(_has_failed, reader, view))
                assert reader.takes("SQL_ASCII")
                if database == "SQL_ASCII":
                    text = b"\\x93\xc3\xa4"
                else:
                    text = "?能".encode()
                columns = b"SELECT sql, message, label FROM pg_background_history WHERE cookie = %b"
                assert reader.row(columns % cookie) == (sql_of(text), complaint(text), text)
        for database, asker, text in (
            ("UTF8", "UTF8", "?能".encode()),
            ("UTF8", "LATIN1", b"??"),
            ("UTF8", "SQL_ASCII", "?能".encode()),
            ("SQL_ASCII", "UTF8", "\\x93ä".encode()),
            ("SQL_ASCII", "LATIN1", b"\\x93\xe4"),
        ):
            _, cookie = made[database]
            with Raw(reading, world.names[database]) as session:
                assert session.takes(asker)
                for way in (
                    DIRECT % b"pg_background_list_all()",
                    INSIDE % b"pg_background_list_all()" + LISTED,
                ):
                    expected = sql_of(text), complaint(text), text
                    assert listed(session, way, [])[cookie] == expected, (database, asker)


def test_a_text_that_is_none_costs_no_other_its_row(world: World, server: Server) -> None:
    """All rows of a moment are written at once."""
    job = "SET client_encoding = 'LATIN1'; SELECT CAST('\u00c3\u00a4' AS int4)"
    with (
        Proxy(upstream_of(server), "--history", "all") as proxy,
        proxy.connect(dbname=world.names["UTF8"]) as conn,
    ):
        labels = [f"ä{number}" for number in range(5)]
        jobs = ["SELECT 1", job, "SELECT 1", job, "SELECT 1"]
        with conn.cursor() as cursor:
            submit = "SELECT pg_background_submit(%s, 0, %s)"
            cursor.executemany(submit, list(zip(jobs, labels, strict=True)))
        query = "SELECT label, state, message FROM pg_background_history WHERE label = ANY (%s)"
        ended = query + " AND state <> 'running' ORDER BY label"
        wait_until(lambda: len(conn.execute(ended.encode(), [labels]).fetchall()) == 5)
        found = conn.execute(ended.encode(), [labels]).fetchall()
        assert [(label, state) for label, state, _ in found] == [
            (label, "error" if each == job else "stopped")
            for label, each in zip(labels, jobs, strict=True)
        ]
        assert found[1][2].startswith("invalid input syntax for type integer")


def test_the_console_and_the_log(server: Server, world: World, tmp_path: Path) -> None:
    extra = "--log-min-job-duration", "0", "--log-job-sql", "on", "--log-format", "json"
    with Proxy(upstream_of(server), *options(tmp_path, *extra)) as proxy:
        for database, encoding, label in (
            ("UTF8", "LATIN1", b"\xe4"),
            ("UTF8", "SJIS", "能".encode("cp932")),
            ("SQL_ASCII", "SQL_ASCII", b"\x93"),
        ):
            with Raw(proxy, world.names[database]) as session:
                assert session.takes(encoding)
                failed_job(session, label)
        with console(proxy) as conn:
            jobs = show(conn, "JOBS")
        assert {job["label"] for job in jobs} == {"ä", "能", "\\x93"}
        assert {job["sql_preview"] for job in jobs} == {
            f"SELECT CAST('{text}' AS int4)" for text in ("ä", "能", "\\x93")
        }
        assert {(job["error_message"] or "")[-3:] for job in jobs} == {'"ä"', '"能"', '93"'}
        lines = [json.loads(line) for line in proxy.log.splitlines() if "job ended" in line]
        assert {line["label"] for line in lines} == {"ä", "能", "\\x93"}


@pytest.mark.parametrize("launcher", ["LATIN1", "EUC_JP", "SJIS", "SQL_ASCII"])
def test_rows_of_a_database_that_converts_nothing(
    world: World, server: Server, launcher: str
) -> None:
    """A backslash there is half of a character to one side, and a whole one to the other."""
    rows = b"SELECT convert_from(decode('%b', 'hex'), 'SQL_ASCII') AS t, 'x'::text AS u"
    with world.session("SQL_ASCII") as session, Raw(server, world.names["SQL_ASCII"]) as direct:
        for text in (b"\x95\\", b"\xa4\xa2", b"\xc3\xa4", b'\x95"', b"\x93"):
            query = rows % text.hex().encode()
            assert direct.takes(launcher)
            if isinstance(direct.rows(query, []), str):
                continue
            for fetcher in ("UTF8", "LATIN1", "EUC_JP", "SQL_ASCII"):
                assert direct.takes(fetcher)
                for way in (
                    "SELECT * FROM {}",
                    f"{(INSIDE % b'{}').decode()} AS r(t text, u text)",
                ):
                    assert session.takes(launcher)
                    pid, cookie = session.row(LAUNCH, [query])
                    assert session.takes(fetcher)
                    call = f"pg_background_result({pid.decode()}, {cookie.decode()})"
                    found = session.rows(way.format(call).encode(), [])
                    assert found == direct.rows(query, []), (text, fetcher, way)
