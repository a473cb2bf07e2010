"""The lexer: by example, and against what a real server makes of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from psycopg import pq

from proxy.sql.lexer import (
    MAX_TOKENS,
    RESERVED,
    Kind,
    LexError,
    identifier,
    is_client_copy,
    is_transaction_control,
    keyword,
    split,
    split_in_turns,
    tokenize,
)
from tests.support.examples import examples
from tests.support.servers import Connection, Server

pytestmark = pytest.mark.every_server

I, Q, S, N, P, O, C = (  # noqa: E741
    Kind.IDENTIFIER,
    Kind.QUOTED_IDENTIFIER,
    Kind.STRING,
    Kind.NUMBER,
    Kind.PARAMETER,
    Kind.OPERATOR,
    Kind.PUNCTUATION,
)


def lexed(sql: str | bytes, *, scs: bool = True, encoding: str | None = None) -> list[bytes]:
    """The texts of the tokens."""
    sql = sql.encode() if isinstance(sql, str) else sql
    tokens = tokenize(sql, standard_conforming_strings=scs, encoding=encoding)
    return [sql[token.start : token.end] for token in tokens]


@pytest.mark.parametrize(
    ("sql", "kinds", "texts"),
    [
        ("select a", [I, I], ["select", "a"]),
        ("_a$1 é9 b\u00a0c", [I, I, I], ["_a$1", "é9", "b\u00a0c"]),
        ('"a" "b""c" u&"d"', [Q, Q, Q], ['"a"', '"b""c"', 'u&"d"']),
        ("'a''b' '' ''''", [S, S, S], ["'a''b'", "''", "''''"]),
        (r"E'a\'b' e'\\' '\'", [S, S, S], [r"E'a\'b'", r"e'\\'", r"'\'"]),
        ("B'01' x'1f' N'n' U&'u' se'x'", [S, S, S, S, I, S], None),
        ("$$a$$ $x$ $$ $y$ $x$ $é$'$é$", [S, S, S], ["$$a$$", "$x$ $$ $y$ $x$", "$é$'$é$"]),
        ("$a$ $a $aa$ $a$", [S], None),
        ("'a' -- b'\n 'c'", [S], None),
        ("E'a'\n'b\\'c'", [S], None),
        ("'a' 'b'", [S, S], None),
        ("'a' /* \n */ 'b'", [S, S], None),
        ("1 1.5 .5 1. 1e5 1.5E-3 1_000 0x1F 0b1_0 0o17", [N] * 10, None),
        ("1..2 a.1 1.5.5", [N, C, N, I, N, N, N], ["1", "..", "2", "a", ".1", "1.5", ".5"]),
        ("1a 1e 0xg", [N, I, N, I, N, I], ["1", "a", "1", "e", "0", "xg"]),
        ("$1 $2a a$3", [P, P, I, I], ["$1", "$2", "a", "a$3"]),
        ("a::b a:=1 a=>2 a:b", [I, C, I, I, C, N, I, C, N, I, C, I], None),
        ("/* /* ' */ \" */ a -- $$\r b", [I, I], ["a", "b"]),
        (" \t\r\n\f\v", [], []),
        ("", [], []),
    ],
)
def test_tokens(sql: str, kinds: list[Kind] | None, texts: list[str] | None) -> None:
    tokens = tokenize(sql.encode())
    if kinds is not None:
        assert [token.kind for token in tokens] == kinds
    if texts is not None:
        assert lexed(sql) == [text.encode() for text in texts]


@pytest.mark.parametrize(
    ("sql", "spaced"),
    [
        ("a=-1 a@-1 a*-1 a<>b", "a = - 1 a @- 1 a * - 1 a <> b"),
        ("a=>-1 a+-+1 a->>-1", "a => - 1 a + - + 1 a ->> - 1"),
        ("a*/**/b a+--c\n+d", "a * b a + + d"),
        ("a[1:2].b(c,d);", "a [ 1 : 2 ] . b ( c , d ) ;"),
    ],
)
def test_operators(sql: str, spaced: str) -> None:
    assert lexed(sql) == spaced.encode().split()


@pytest.mark.parametrize(
    "sql",
    ["'a", '"a', "E'a\\'", "$$a", "$a$ $b$", "/* /* */", "'a'\n'b", 'U&"a', "\\", "{", "$", "a\0"],
)
def test_what_the_server_cannot_read_is_an_error(sql: str) -> None:
    with pytest.raises(LexError):
        tokenize(sql.encode())


def test_nonconforming_strings_know_backslashes() -> None:
    assert lexed(r"'a\'b' N'\'' 'c'", scs=False) == [rb"'a\'b'", rb"N'\''", b"'c'"]
    assert lexed(r"B'\' U&'\'", scs=False) == [rb"B'\'", rb"U&'\'"]
    with pytest.raises(LexError):
        tokenize(rb"'a\'", standard_conforming_strings=False)


def test_words() -> None:
    sql = 'SELECT "A""b" Ünï U&"x" \'s\''.encode()
    tokens = tokenize(sql)
    assert [keyword(sql, token) for token in tokens][:2] == ["select", ""]
    names = [identifier(sql, token) for token in tokens]
    assert names == [b"select", b'A"b', "Ünï".encode(), None, None]


# --- statements -----------------------------------------------------------------------------


def parts(sql: str) -> list[str]:
    return [sql.encode()[s.start : s.end].decode() for s in split(sql.encode())]


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 20_000])
@pytest.mark.parametrize("part", ["a ", "a; ", "-+- ", "1, ", "'x' /* y */ $$ z $$ ", "(a; b) "])
def test_split_in_turns_is_split(part: str, count: int) -> None:
    sql = b"copy " + (part * count).encode()
    found = list(split_in_turns(sql))
    assert (None in found) or len(tokenize(sql)) < 4096
    expected = split(sql)
    statements = [statement for statement in found if statement is not None]
    assert [s[:2] for s in statements] == [s[:2] for s in expected]
    for one, other in zip(statements, expected, strict=True):
        assert one.tokens[:MAX_TOKENS] == other.tokens[:MAX_TOKENS]
        assert one.tokens[-1] == other.tokens[-1]
        assert is_client_copy(sql, one) is (len(other.tokens) > MAX_TOKENS)


def test_split() -> None:
    assert parts("; a ;; b -- x;\n; /* ; */ 'c;' ") == ["a", "b", "'c;'"]
    assert parts("") == []
    assert parts("-- nothing") == []
    assert parts("a /* b */ ; /* c */") == ["a"]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE RULE r AS ON INSERT TO t DO (SELECT 1; SELECT 2)",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
        "create or replace procedure f() language sql begin atomic END",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC; SELECT CASE WHEN true THEN 1 END; END",
        "CREATE FUNCTION f(a int DEFAULT (1)) RETURNS int BEGIN ATOMIC SELECT 1 AS end; END",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE 1 WHEN 1 THEN 2 END end; END",
        "CREATE FUNCTION f() RETURNS int AS 'a; b' LANGUAGE sql",
        "CREATE FUNCTION f() RETURNS void AS $$ BEGIN; END; $$ LANGUAGE plpgsql",
        "SELECT begin atomic FROM t",
        "SELECT ')'",
    ],
)
def test_one_statement_is_not_cut(statement: str) -> None:
    assert parts(f"SELECT 1; {statement}; SELECT ')'; END") == [
        "SELECT 1",
        statement,
        "SELECT ')'",
        "END",
    ]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("BEGIN", True),
        ("begin isolation level serializable", True),
        ("START TRANSACTION", True),
        ("COMMIT AND CHAIN", True),
        ("END", True),
        ("/* x */ ROLLBACK TO SAVEPOINT a", True),
        ("ABORT", True),
        ("SAVEPOINT a", True),
        ("RELEASE a", True),
        ("PREPARE TRANSACTION 'a'", True),
        ("COMMIT PREPARED 'a'", True),
        ("ROLLBACK PREPARED 'a'", True),
        ("PREPARE a AS SELECT 1", False),
        ("PREPARE transaction AS SELECT 1", False),
        ("PREPARE transaction (int) AS SELECT 1", False),
        ('"begin"', False),
        ("SELECT 'BEGIN'", False),
        ("SET TRANSACTION READ ONLY", False),
    ],
)
def test_transaction_control(sql: str, expected: bool) -> None:
    [statement] = split(sql.encode())
    assert is_transaction_control(sql.encode(), statement) is expected


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("COPY t FROM STDIN", True),
        ("copy s.t (a, b) to stdout with (format csv)", True),
        ("COPY (SELECT a FROM stdin) TO STDOUT", True),
        ("COPY BINARY t FROM stdin", True),
        ("COPY s.from FROM stdin", True),
        ("COPY t FROM STDOUT", True),
        ("COPY t FROM 'stdin'", False),
        ("COPY t TO PROGRAM 'stdout'", False),
        ("COPY (SELECT a FROM stdin) TO '/x'", False),
        ('COPY t FROM "stdin"', False),
        ("COPY t FROM", False),
        ("SELECT a FROM stdin", False),
    ],
)
def test_client_copy(sql: str, expected: bool) -> None:
    [statement] = split(sql.encode())
    assert is_client_copy(sql.encode(), statement) is expected


# --- encodings ------------------------------------------------------------------------------


def test_second_bytes_that_look_like_ascii() -> None:
    # The second byte of these characters is a backslash, a letter, a bar; GB18030 has digits.
    so = "ソ".encode("shift_jis")
    assert so == b"\x83\x5c"
    sql = b"'" + so + b"' " + so
    assert lexed(sql, scs=False, encoding="SJIS") == [b"'" + so + b"'", so]
    assert lexed(b"\xb1'x'", encoding="SJIS") == [b"\xb1", b"'x'"]
    assert lexed(b"a\xa5\x7cb", encoding="BIG5") == [b"a\xa5\x7cb"]
    assert lexed(b"a\x81\x30\x81\x30b", encoding="GB18030") == [b"a\x81\x30\x81\x30b"]
    assert lexed(b"a\x81\x7cb", encoding="GBK") == [b"a\x81\x7cb"]


def test_folding_leaves_second_bytes_alone() -> None:
    sql = b"AB\x83\x41C"
    [token] = tokenize(sql, encoding="SJIS")
    assert identifier(sql, token, "SJIS") == b"ab\x83\x41c"


@pytest.mark.parametrize(
    ("encoding", "codec", "text"),
    [
        ("SJIS", "shift_jis", "ソ表能"),
        ("BIG5", "big5", "功許蓋"),
        ("GBK", "gbk", "誠乗丗"),
        ("GB18030", "gb18030", "誠乗ß€"),
        ("UHC", "cp949", "갂똠"),
        ("LATIN1", "latin-1", "é"),
    ],
)
def test_the_server_reads_encodings_alike(
    server: Server, encoding: str, codec: str, text: str
) -> None:
    with server.connect() as conn:
        conn.execute("SET standard_conforming_strings = off")
        conn.execute("SET escape_string_warning = off")
        conn.execute(f"SET client_encoding = '{encoding}'")
        sql = f"SELECT '{text}', 'a' AS {text}, '{text}{text}'".encode(codec)
        result = conn.pgconn.exec_(sql)
        assert result.status == pq.ExecStatus.TUPLES_OK, result.error_message
        assert result.get_value(0, 0) == text.encode(codec)
        texts = lexed(sql, scs=False, encoding=encoding)
        assert texts == [
            *(b"SELECT", f"'{text}'".encode(codec), b",", b"'a'", b"AS", text.encode(codec)),
            *(b",", f"'{text * 2}'".encode(codec)),
        ]


# --- against the server ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    with server.connect() as conn:
        conn.execute("SET client_min_messages = error")
        yield conn


def results(conn: Connection, sql: bytes) -> list[pq.abc.PGresult]:
    """What the server makes of a Query string: one result for each statement."""
    conn.pgconn.send_query(sql)
    found = []
    while (result := conn.pgconn.get_result()) is not None:
        found.append(result)
    return found


BODY = st.lists(
    st.sampled_from(["'", '"', "$$", "$a$", "--", "/*", "*/", "\n", "\\", ";", ",", "a", "é", "("]),
    max_size=5,
).map("".join)


def _tag(body: str) -> str:
    tag = "$a$"
    while tag in body or (body + "$").endswith(tag):
        tag = "$a" + tag[1:]
    return tag


LITERAL = st.one_of(
    BODY.map(lambda body: "'" + body.replace("'", "''") + "'"),
    BODY.map(lambda body: "E'" + body.replace("\\", "\\\\").replace("'", "\\'") + "'"),
    BODY.map(lambda body: f"{_tag(body)}{body}{_tag(body)}"),
    BODY.map(lambda body: "U&'" + body.replace("\\", "\\\\").replace("'", "''") + "'"),
    BODY.map(lambda body: '1 AS "' + body.replace('"', '""') + 'x"'),
    st.tuples(BODY, BODY).map(
        lambda bodies: "\n".join("'" + body.replace("'", "''") + "'" for body in bodies)
    ),
    st.sampled_from(["1", ".5", "1.", "1e5", "a.b", "1=-1", "1*-1", "2::text", "B'01'", "X'1F'"]),
)
GAP = st.sampled_from([" ", "\n", "\t ", "/* ' */", "/* /* ; */ , */", "-- $$ ' , ;\n", ""])
SELECT = st.lists(st.tuples(GAP, LITERAL, GAP).map("".join), min_size=1, max_size=4).map(
    lambda items: "SELECT " + ",".join(items) + " FROM (SELECT 1 AS b) a"
)
LENIENT = settings(
    max_examples=examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@LENIENT
@given(st.lists(SELECT, min_size=1, max_size=3), GAP)
def test_the_server_sees_the_same_statements(
    connection: Connection, selects: list[str], gap: str
) -> None:
    sql = (gap + ";" + gap).join(selects).encode()
    found = results(connection, sql)
    assert [result.error_message for result in found if result.error_message] == []
    statements = split(sql)
    assert len(statements) == len(found)
    for statement, result in zip(statements, found, strict=True):
        commas = sum(sql[token.start : token.end] == b"," for token in statement.tokens)
        assert result.nfields == commas + 1
        # What stands between two statements and tokens has no meaning of its own.
        alone = b" ".join(sql[token.start : token.end] for token in statement.tokens)
        assert columns(connection.pgconn.exec_(alone)) == columns(result)


def columns(result: pq.abc.PGresult) -> list[tuple[bytes | None, bytes | None]]:
    return [(result.fname(at), result.get_value(0, at)) for at in range(result.nfields)]


SOUP = st.lists(
    st.sampled_from(
        [
            *("'", '"', "$$", "$a$", "$", "--", "/*", "*/", "\n", " ", "\\", ";", ",", "a", "1"),
            *("E'", "U&'", "SELECT ", "(", ")", "+", "-", "*", "=", ".", "::text", "'b'", '"c"'),
        ]
    ),
    max_size=12,
).map("".join)


@settings(LENIENT, max_examples=examples(1500))
@given(SOUP)
def test_the_server_agrees_on_any_soup(connection: Connection, soup: str) -> None:
    sql = ("SELECT " + soup).encode()
    found = results(connection, sql)
    messages = b"".join(result.error_message for result in found)
    try:
        statements = split(sql)
    except LexError:
        assert messages
        return
    assert b"unterminated" not in messages
    assume(not messages)
    assert len(statements) == len(found)


@pytest.mark.parametrize("before", [b"SELECT 1", b"SELECT '1'", b"SELECT a", b"SELECT (1"])
def test_the_server_agrees_on_any_two_bytes_after_a_token(
    connection: Connection, before: bytes
) -> None:
    newer = connection.info.server_version >= 160000
    for first in range(1, 128):
        for second in range(1, 128):
            sql = before + bytes((first, second)) + b"1 FROM (SELECT 1 AS a) a"
            result = connection.pgconn.exec_(sql)
            try:
                tokens = tokenize(sql, vertical_tab=newer)
            except LexError:
                assert result.error_message, sql
                continue
            assert b"unterminated" not in result.error_message, sql
            if not result.error_message:
                # With blanks and nothing else between the tokens it is the same.
                alone = b" ".join(sql[token.start : token.end] for token in tokens)
                assert columns(connection.pgconn.exec_(alone)) == columns(result), sql


@pytest.mark.parametrize("template", ["SELECT%s1", "SELECT 1%sAS%sa", "SELECT 'a'%s\n'b'"])
def test_the_server_agrees_on_what_is_white_space(connection: Connection, template: str) -> None:
    newer = connection.info.server_version >= 160000
    for code in (*range(1, 33), 127):
        sql = template.replace("%s", chr(code)).encode()
        result = connection.pgconn.exec_(sql)
        try:
            tokens = tokenize(sql, vertical_tab=newer)
        except LexError:
            tokens = []
        blank = [kind for kind, _, _ in tokenize(template.replace("%s", " ").encode())]
        assert ([kind for kind, _, _ in tokens] == blank) == (not result.error_message), sql


def test_reserved_words_are_the_servers(connection: Connection) -> None:
    rows = connection.execute("SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')")
    assert {word for (word,) in rows} <= RESERVED


def test_tokens_are_in_order() -> None:
    tokens = tokenize(b"SELECT a+-1 /* b */ FROM $$c$$ --d\n WHERE x=>-y")
    assert all(a.start < a.end <= b.start for a, b in pairwise(tokens))
