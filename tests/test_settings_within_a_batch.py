"""Settings that change how SQL is read, changed within a batch or a Query string.

Invariant: data never becomes SQL. Text that the server reads as a string is no call, whatever was
set just before; and text that it reads as a call gets the arguments that the server sees.
As in `test_calls_in_protocol`, a script runs direct, where functions of our names are PL/pgSQL,
and through the proxy, where there are none; the proxy may refuse what it cannot serve.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protocol import messages as m
from tests.conftest import StartProxy
from tests.support.examples import examples
from tests.support.recorder import READY, Frontend, H, S, Sent, b, d, e, errors, p, q, record, rows
from tests.support.servers import Proxy, Server, database
from tests.test_calls_in_protocol import NATIVE

pytestmark = pytest.mark.every_server

SETTER = """
CREATE FUNCTION change(name text, value text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
  RETURN set_config(name, value, false);
END $$;
CREATE TABLE deferred (name text, value text);
CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  PERFORM set_config(new.name, new.value, false); RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER change AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE PROCEDURE change();
"""


@pytest.fixture(scope="module")
def native(server: Server) -> Iterator[str]:
    """A database with functions of our names; the other one is ``ours_set``."""
    with database(server, "native_set") as name, database(server, "ours_set") as ours:
        for dbname in (name, ours):
            with server.connect(dbname=dbname) as conn:
                conn.execute(SETTER)
        with server.connect(dbname=name) as conn:
            conn.execute(NATIVE)
        yield name


def parse(sql: bytes, name: bytes = b"") -> m.Parse:
    return m.Parse(name, sql, ())


def words(error: m.ErrorResponse) -> tuple[str, bytes]:
    return error.sqlstate, error.fields["M"]


Compared = tuple[object, ...]


def compared(message: m.BackendMessage) -> Compared:
    """What must be equal: all but the pids of jobs, and of errors what clients act on."""
    match message:
        case m.ErrorResponse():
            return ("E", *words(message))
        case m.DataRow(values):
            # A pid, by its form: the scripts select no numbers.
            return ("D", *[b"pid" if v is not None and v.isdigit() else v for v in values])
        case m.RowDescription(fields):
            return ("T", *[(field.name, field.type_oid) for field in fields])
    return (message,)


# --- the attacks ---------------------------------------------------------------------------------

OFF = "SET standard_conforming_strings = off"
PWN = "CREATE TABLE pwned (a int)"


@pytest.fixture
def session(proxy: Proxy, native: str) -> Iterator[Frontend]:
    with Frontend(proxy, database="ours_set") as frontend:
        yield frontend


def test_data_in_a_query_string_stays_data(session: Frontend) -> None:
    r"""`'\', current_user --'` is a string for the server, which reads all before the SET."""
    data = r"'\', current_user --'"
    answer = session.query(f"{OFF}; SELECT pg_background_launch('SELECT 1'); SELECT {data}")
    assert not any(row == (b"'", b"postgres") for row in rows(answer))
    assert [error.sqlstate for error in errors(answer)] == ["0A000"]
    # It was undone, as all of the string.
    assert session.value("SHOW standard_conforming_strings") == "on"


def test_what_reads_the_same_is_served_all_the_same(session: Frontend) -> None:
    answer = session.query(f"{OFF}; SELECT pg_background_launch('SELECT 1'); SELECT 'it''s'")
    assert not errors(answer)
    assert rows(answer)[-1] == (b"it's",)
    answer = session.query(r"SELECT pg_background_launch('SELECT 1'); SELECT '\\', E'\\'")
    assert rows(answer)[-1] == (b"\\", b"\\")


# For the server one string; with the old setting a call, its arguments what a string says.
DATA = rf"""SELECT '{{"{PWN}"}}','\', pg_background_launch($q$x$q$) AS a --'"""


@pytest.mark.parametrize(
    "change",
    [
        [p(OFF), b(), e()],
        [p("SELECT set_config('standard_conforming_strings', 'off', false)"), b(), e()],
        [p("SELECT change('standard_conforming_strings', 'off')"), b(), e()],
        [p(OFF), b(), e(), H],
        [q(OFF)],
        [q("INSERT INTO deferred VALUES ('standard_conforming_strings', 'off')")],
        [p("INSERT INTO deferred VALUES ('standard_conforming_strings', 'off')"), b(), e(), S],
        [q(f"BEGIN; {OFF}"), p("COMMIT"), b(), e()],
        [p("SELECT pg_background_launch('SELECT 1')"), b(), e(), p(OFF), b(), e()],
    ],
)
def test_data_in_a_pipeline_stays_data(
    server: Server, session: Frontend, change: Sequence[Sent]
) -> None:
    session.send(*change, p(DATA), b(), e(), S, q("SELECT 'the end'"))
    answer = session.until(lambda message: message == m.DataRow((b"the end",)))
    session.until_ready()
    expected = (f'{{"{PWN}"}}', "', pg_background_launch($q$x$q$) AS a --")
    assert expected[1].encode() not in [row[0] for row in rows(answer)]
    with server.connect(dbname="ours_set") as conn:
        assert conn.execute("SELECT to_regclass('pwned')").fetchone() == (None,)


def test_arguments_are_read_in_the_encoding_of_their_rows(
    server: Server, session: Frontend
) -> None:
    r"""In SJIS the second byte of this letter is a backslash, which ended the argument early."""
    job = b'SELECT $j$\x83\x5c" , "$j$'
    launch = parse(b"SELECT * FROM pg_background_result(pg_background_launch($1)) AS (t text)")
    answer = session.ask(
        *(launch, p("SET client_encoding = 'SJIS'", "s"), b("s"), e()),
        *(m.Bind(b"", b"", (), (job,), ()), e(), S),
    )
    assert rows(answer) == [(b'\x83\x5c" , "',)]


def test_a_statement_that_changes_its_own_encoding_launches_nothing(session: Frontend) -> None:
    for order in (
        "set_config('client_encoding', 'SJIS', false), pg_background_launch('SELECT ''ソ''')",
        "pg_background_launch('SELECT ''ソ'''), change('client_encoding', 'SJIS')",
    ):
        answer = session.query(f"SELECT {order}")
        assert [error.sqlstate for error in errors(answer)] == ["0A000"]
        assert session.value("SHOW client_encoding") == "UTF8"
    answer = session.query(
        "SELECT pg_background_launch('SELECT ''ソ'''), change('work_mem', '1MB')"
    )
    assert not errors(answer)


def test_what_was_undone_is_forgotten(session: Frontend) -> None:
    """The server does not report a setting that is what it was."""
    launch = p(r"SELECT pg_background_launch('SELECT 1'), '\' AS x")
    answer = session.ask(p(OFF), b(), e(), launch, S)
    assert errors(answer)  # unterminated, as it is read now
    answer = session.ask(launch, b(), e(), S)
    assert [row[1] for row in rows(answer)] == [b"\\"]


@pytest.mark.parametrize(
    "sql",
    [
        b"SELECT pg_background_launch('SELECT 1') -- \xff",
        b"SELECT pg_background_launch('SELECT 1') /* \xff */; SELECT 1",
        b"SELECT /* \xff */ * FROM pg_background_result(7) AS (t int)",
        b"SELECT /* \xff */ * FROM pg_background_list_v2()",
        b"SELECT /* \xff */ pg_background_result(pg_background_launch('SELECT 1'))",
    ],
)
def test_bytes_that_are_no_text_are_seen_in_a_comment_too(session: Frontend, sql: bytes) -> None:
    for message in (m.Query(sql), parse(sql)):
        [error] = errors(session.ask(message, *([] if isinstance(message, m.Query) else [S])))
        assert error.sqlstate == "22021"


def test_a_vertical_tab_is_white_space_where_it_is_for_the_server(
    server: Server, session: Frontend
) -> None:
    for sql in (
        "SELECT\vpg_background_launch('SELECT 1')",
        "SELECT pg_background_launch('SELECT 1');\vSELECT 1",
        "SELECT pg_background_launch('SELECT ' -- a\n\v'1')",
        "CREATE\vEXTENSION IF NOT EXISTS pg_background",
    ):
        answer = session.query(sql)
        assert [error.sqlstate for error in errors(answer)] == (
            [] if server.version >= 160000 else ["42601"]
        )
    assert not errors(session.query("SELECT pg_background_launch('SELECT ''\v''')"))
    # Its objects would answer where the other database has no function of the name.
    session.query("DROP EXTENSION IF EXISTS pg_background")


# --- any batch -----------------------------------------------------------------------------------

CHANGES = [
    b"SET standard_conforming_strings = off",
    b"SET standard_conforming_strings = on",
    b"SET LOCAL standard_conforming_strings = off",
    b"RESET standard_conforming_strings",
    b"SELECT change('standard_conforming_strings', 'off')",
    b"SELECT set_config('standard_conforming_strings', 'off', true)",
    b"DO $$ BEGIN SET standard_conforming_strings = off; END $$",
    b"INSERT INTO deferred VALUES ('standard_conforming_strings', 'off')",
    b"SET client_encoding = 'SJIS'",
    b"SET client_encoding = 'GBK'",
    b"SET client_encoding = 'BIG5'",
    b"SET LOCAL client_encoding = 'SJIS'",
    b"SET client_encoding = 'LATIN1'",
    b"RESET client_encoding",
    b"SELECT change('client_encoding', 'GBK')",
    b"INSERT INTO deferred VALUES ('client_encoding', 'BIG5')",
    b"RESET ALL",
]
CONTROL = [
    *(b"BEGIN", b"COMMIT", b"ROLLBACK", b"SAVEPOINT s", b"ROLLBACK TO s"),
    *(b"SELECT 1/0", b"SELECT 'plain'", b""),
]
# Letters whose second byte is a backslash; in UTF-8 they are none, in LATIN1 there are two.
BACKSLASHED = [b"\x83\x5c", b"\x81\x5c", b"\xa5\x5c"]
CALL = b"pg_background_launch($q$SELECT 1$q$)"
LETTERS = st.sampled_from([b"a", b"\\", b"''", b'"', b",", *BACKSLASHED, "é".encode()])
INSIDE = st.one_of(
    st.lists(LETTERS, max_size=4).map(b"".join),
    # Data that is a call, if the quote before it is believed to end the string.
    st.sampled_from([b"\\", b"\\\\", *BACKSLASHED]).flatmap(
        lambda ending: st.sampled_from(
            [
                ending + b"', " + CALL + b" AS a --",
                ending + b"'', " + CALL + b" AS a --",
                b'{"SELECT 2"}' + b"','" + ending + b"', " + CALL + b" AS a --",
                ending + b"' FROM pg_background_list() AS (pid int4) --",
            ]
        )
    ),
)
LITERAL = st.tuples(st.sampled_from([b"'", b"'", b"'", b"E'", b"N'"]), INSIDE).map(
    lambda parts: parts[0] + parts[1] + b"'"
)
ITEM = st.one_of(LITERAL, LITERAL, st.just(CALL), st.just(b"1 AS b"))
SELECTS = st.lists(ITEM, min_size=1, max_size=3).map(lambda items: b"SELECT " + b", ".join(items))
RESULTS = LITERAL.map(
    lambda text: (
        b"SELECT * FROM pg_background_result(pg_background_launch("
        b"'SELECT $j$' || " + text + b" || '$j$')) AS (t text)"
    )
)
STATEMENT = st.one_of(st.sampled_from(CHANGES), st.sampled_from(CONTROL), SELECTS, SELECTS, RESULTS)
QUERY = st.lists(STATEMENT, min_size=1, max_size=4).map(lambda parts: m.Query(b"; ".join(parts)))
EXTENDED = STATEMENT.map(lambda sql: (parse(sql), b(), d(b"P"), e()))
PREPARED = st.tuples(st.just(b"SELECT $j$"), INSIDE, st.just(b"$j$")).map(
    lambda parts: (m.Bind(b"", b"prepared", (), (b"".join(parts),), ()), e())
)
PREPARE = parse(
    b"SELECT * FROM pg_background_result(pg_background_launch($1)) AS (t text)", b"prepared"
)
ITEMS = st.one_of(
    # A Query in an extended batch makes 18 fail: "unexpected state STARTED".
    QUERY.map(lambda query: (S, query)),
    st.just((S, q("DISCARD ALL"), m.Close(b"S", b"prepared"), PREPARE, S)),
    *[EXTENDED] * 3,
    PREPARED,
    st.just((S,)),
    st.just((H,)),
)
SCRIPTS = st.lists(ITEMS, min_size=1, max_size=8).map(lambda items: [x for i in items for x in i])
REFUSED = ("0A000", "42883")

EXAMPLES = int(os.environ.get("BATCHES") or examples(150))


@pytest.mark.timeout(120 + EXAMPLES)
def test_any_batch_is_read_as_by_the_server(
    server: Server, start_proxy: StartProxy, native: str
) -> None:
    # A slow machine may have more jobs of a batch at once than the default.
    proxy = start_proxy("--max-workers", "200")
    whole = calls = 0

    def attempt(script: list[Sent]) -> None:
        nonlocal whole, calls
        answers: list[list[m.BackendMessage]] = []
        for endpoint, dbname in ((server, native), (proxy, "ours_set")):
            with Frontend(endpoint, timeout=30, database=dbname) as frontend:
                answers.append(record(frontend, [PREPARE, S, READY, *script]))
        # Warnings of SET LOCAL and BEGIN tell one statement from several in a Query.
        has_several = any(isinstance(item, m.Query) and b";" in item.query for item in script)
        direct, proxied = (
            [message for message in answer if not isinstance(message, m.NoticeResponse)]
            for answer in answers
        )
        for theirs, ours in zip(direct, proxied, strict=False):
            if isinstance(theirs, m.ErrorResponse) and theirs.sqlstate == "42601" and has_several:
                return  # the proxy executes what comes before in the string
            if isinstance(ours, m.ErrorResponse) and compared(ours) != compared(theirs):
                assert ours.sqlstate in REFUSED, (ours, theirs)
                return
            assert compared(ours) == compared(theirs)
        assert len(direct) == len(proxied)
        whole += 1
        names = [
            f.name for item in proxied if isinstance(item, m.RowDescription) for f in item.fields
        ]
        calls += b"pg_background_launch" in names or b"t" in names

    @settings(
        max_examples=EXAMPLES,
        phases=(Phase.generate,),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(SCRIPTS)
    def try_it(script: list[Sent]) -> None:
        attempt(script)

    try_it()
    assert whole > EXAMPLES / 3
    print(f"{EXAMPLES} batches, {whole} compared to the end, {calls} of them with calls")
