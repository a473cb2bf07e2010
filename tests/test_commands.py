"""Which statements are commands about the extension, and which queries look into the catalogs: read
from bytes alone."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.extension import catalogs, commands
from proxy.extension.ddl import (
    Command,
    CommentOnExtension,
    CreateExtension,
    DropExtension,
    MoveExtension,
    UpdateExtension,
)
from proxy.statements.plan import Substitute, joined, substitute
from tests.support.sql import statement


def parse(sql: bytes, encoding: str | None = None) -> Command | None:
    one = statement(sql, encoding=encoding)
    return None if one is None else commands.parse(one)


def replaced(sql: bytes, version: int) -> Substitute | None:
    one = statement(sql)
    jobs = catalogs.Jobs((1,), by_name=False)
    if one is None:
        return None
    return catalogs.analyze(one, server_version=version, jobs=jobs, sent=sql)


@pytest.mark.parametrize(
    ("sql", "command"),
    [
        ("CREATE EXTENSION pg_background", CreateExtension(False, None, None)),
        (
            'create extension if not exists "pg_background" with schema "A" version "1.8" cascade',
            CreateExtension(True, b"A", "1.8"),
        ),
        ("CREATE EXTENSION pg_background SCHEMA Foo", CreateExtension(False, b"foo", None)),
        ("CREATE EXTENSION pg_background VERSION v1", CreateExtension(False, None, "v1")),
        ("DROP EXTENSION pg_background", DropExtension(False, False, None)),
        (
            'DROP EXTENSION IF EXISTS a, pg_background , "B" CASCADE',
            DropExtension(True, True, b'DROP EXTENSION IF EXISTS a, "B" CASCADE'),
        ),
        ("DROP EXTENSION pg_background RESTRICT", DropExtension(False, False, None)),
        ("ALTER EXTENSION pg_background UPDATE", UpdateExtension(None)),
        ("ALTER EXTENSION pg_background UPDATE TO '2.0'", UpdateExtension("2.0")),
        ("ALTER EXTENSION pg_background SET SCHEMA s", MoveExtension(b"s")),
        ("COMMENT ON EXTENSION pg_background IS NULL", CommentOnExtension(b"NULL")),
        ("COMMENT ON EXTENSION pg_background IS E'\\n'", CommentOnExtension(b"E'\\n'")),
        ("/* a */ ALTER --b\nEXTENSION pg_background UPDATE ;", UpdateExtension(None)),
    ],
)
def test_commands(sql: str, command: Command) -> None:
    assert parse(sql.encode()) == command


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE EXTENSION",
        "CREATE EXTENSION pg_background pg_background",
        "CREATE EXTENSION pg_background SCHEMA a SCHEMA b",
        "CREATE EXTENSION pg_background VERSION",
        "CREATE EXTENSION pg_background; SELECT 1",
        "CREATE EXTENSION pg_background2",
        'CREATE EXTENSION U&"pg\\005fbackground"',
        "CREATE EXTENSION 'pg_background'",
        "DROP EXTENSION a, b",
        "DROP EXTENSION pg_background,",
        "ALTER EXTENSION pg_background ADD FUNCTION f()",
        "ALTER EXTENSION pg_background UPDATE TO",
        "COMMENT ON EXTENSION pg_background IS 1",
        "COMMENT ON EXTENSION pg_background IS",
        "SELECT 'CREATE EXTENSION pg_background'",
        "DO 'CREATE EXTENSION pg_background'",
        "CREATE EXTENSION pg_background VERSION '1",
    ],
)
def test_others_are_for_the_server(sql: str) -> None:
    assert parse(sql.encode()) is None


def test_name_in_an_encoding_that_hides_quotes() -> None:
    # The second byte of the character is a backslash, in the schema's name.
    sql = 'CREATE EXTENSION pg_background SCHEMA "ソ"'.encode("shift_jis")
    command = parse(sql, encoding="SJIS")
    assert command == CreateExtension(False, "ソ".encode("shift_jis"), None)


FRAGMENTS = (
    *("SELECT", "FROM", "pg_extension", "pg_catalog.pg_extension", "pg_stat_activity", "a", ","),
    *("JOIN", "ON true", "(", ")", "AS", "x", "WHERE", "'pg_extension'", "e.extname", "WITH", "*"),
    *("--c\n", "/* FROM pg_extension */", "ä", "$$", "pg_depend", ";", "UNION", "tableoid"),
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.sampled_from([100000, 150000, 180000]))
@example(words=["FROM", "pg_extension", "AS"], version=100000)
def test_what_is_replaced_in_a_query_is_all_that_changes(words: list[str], version: int) -> None:
    sql = f"SELECT {' '.join(words)}".encode()
    found = replaced(sql, version)
    if found is None:
        return
    done = 0
    for piece in found.rewrite.pieces:
        if piece.inserted is None:
            kept = sql[done : piece.start]
            # What is left out is the name of a relation.
            assert kept == b"" or kept.startswith(b"pg_")
            done = piece.end
        else:
            assert piece.inserted.startswith((b"(SELECT ", b"pg_catalog.unnest("))
    assert done == len(sql)
    assert found.tag is None


def test_positions_in_a_query_of_several_statements() -> None:
    sql = "SELECT 'ä'; CREATE EXTENSION pg_background; SELECT * FROM pg_extension, nope".encode()
    first = sql.index(b"CREATE")
    second = sql.index(b"SELECT *")
    block = substitute(sql[first : sql.index(b";", first)], b"DO 'something longer'", b"TAG")
    query = replaced(sql[second:], 150000)
    assert query is not None
    whole = joined(sql, [(first, block), (second, query)])
    assert isinstance(whole, Substitute)
    text = whole.rewrite.sql.decode()
    assert text.startswith("SELECT 'ä'; DO 'something longer'; SELECT * FROM pg_catalog.unnest(")
    position = text.index("nope") + 1
    assert whole.rewrite.original_position(position, "utf-8") == sql.decode().index("nope") + 1
