"""No reader of text takes more than linear time, whatever is repeated in the text: clients may send
statements that are made to be slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from protocol.messages import ErrorResponse
from protocol.values.arrays import parse_array
from protocol.values.records import parse_record
from proxy.api.functions import HANDLES
from proxy.api.like import like
from proxy.api.values import decode_argument
from proxy.extension import catalogs, commands
from proxy.jobs.output_settings import OutputSettings
from proxy.jobs.progress import progress_statement
from proxy.session.custom_settings import CustomSettings
from proxy.sql import encodings, lexer
from proxy.sql.rewrite import Piece, Rewrite
from proxy.sql.tokens import Tokens
from proxy.statements.mentions import may_be_ours
from proxy.statements.plan import ScalarPlan
from proxy.statements.standin import complaint
from proxy.statements.unserved import unavailable, unserved
from tests.support.growth import LINEAR, cpu_time, growth
from tests.support.sql import analyze as plan_in
from tests.support.sql import statement as read_one

Reader = Callable[[bytes], object]


def plan_of(sql: bytes) -> ScalarPlan:
    """A plan whose statement this is, though it may be none."""
    plan = plan_in(b"SELECT pg_background_launch('x'), 1")
    assert isinstance(plan, ScalarPlan)
    rewrite = Rewrite(sql, (Piece(0, len(sql)),))
    return ScalarPlan(rewrite, plan.columns)


def error(sqlstate: bytes, message: bytes) -> bytes:
    fields = {"S": b"ERROR", "V": b"ERROR", "C": sqlstate, "M": message, "W": message}
    return ErrorResponse({k: v.replace(b"\0", b"") for k, v in fields.items()}).serialize()[5:]


def analyze(sql: bytes, **options: object) -> None:
    plan = plan_in(sql, **options)  # type: ignore[arg-type]
    if plan is not None:
        plan.rewrite.original_position(len(plan.rewrite.sql), "utf-8")
        complaint(plan, b"function pg_catalog.textcat(integer, unknown)", len(sql))


def of_statement(read: Callable[[Tokens], object]) -> Reader:
    def read_text(sql: bytes) -> None:
        if (one := read_one(sql)) is not None:
            read(one)

    return read_text


def job(sql: bytes) -> None:
    """What a job's string is read for."""
    for statement in lexer.split_in_turns(sql):
        if statement is None:
            continue
        lexer.is_transaction_control(sql, statement)
        lexer.is_client_copy(sql, statement)
        progress_statement(sql, statement, b"marker")
        settings = OutputSettings({})
        settings.callers = [b"UTF8"] * 7
        settings.look(sql, statement)
        settings.last_statement(sql, statement, 1)


# Each with the size of the text that it is given: within the budget, if it has one.
SHORT: Final = 30_000
LONG: Final = 30_000
QUICK: Final = 3
"""By so much shorter are the texts of a quick sweep."""

READERS: Final[dict[str, tuple[int, Reader]]] = {
    "split": (SHORT, lambda sql: lexer.split(sql, bounded=True)),
    "split without a budget": (LONG, lexer.split),
    "split, backslashes": (LONG, lambda sql: lexer.split(sql, standard_conforming_strings=False)),
    "split in SJIS": (LONG, lambda sql: lexer.split(sql, encoding="SJIS")),
    "split in GB18030": (LONG, lambda sql: lexer.split(sql, encoding="GB18030")),
    "analyze": (SHORT, analyze),
    "analyze over the budget": (LONG, analyze),
    "catalogs": (
        SHORT,
        of_statement(
            lambda one: catalogs.analyze(
                one, server_version=180000, jobs=catalogs.Jobs((1,), by_name=True), sent=one.sql
            )
        ),
    ),
    "commands": (SHORT, of_statement(commands.parse)),
    # A quarter of a quick sweep's, too, is more than split_in_turns reads in a turn.
    "job": (3 * LONG, job),
    "complaint": (LONG, lambda sql: complaint(plan_of(b""), sql, 1)),
    "unserved function": (LONG, lambda sql: unserved(error(b"42883", sql))),
    "unserved view": (LONG, lambda sql: unserved(error(b"42P01", sql))),
    "unavailable": (LONG, lambda sql: unavailable(error(b"0A000", sql))),
    "settings": (LONG, lambda sql: CustomSettings().mentioned(sql.lower())),
    "settings of Bind": (LONG, lambda sql: CustomSettings().bound(sql)),
    "mentions": (LONG, may_be_ours),
    "array": (LONG, parse_array),
    "array in SJIS": (LONG, lambda sql: encodings.parse_array(sql + b"\x81\x5c", b"SJIS")),
    "array made": (LONG, lambda sql: encodings.array_text([sql, sql], b"SJIS")),
    "record": (LONG, parse_record),
    "handles": (LONG, lambda sql: decode_argument(HANDLES, sql)),
    "error": (LONG, lambda sql: ErrorResponse.parse(error(b"42883", sql))),
    "like": (8_000, lambda sql: like(sql * 2, sql)),
    "like, any first": (8_000, lambda sql: like(sql * 2, b"%" + sql + b"!")),
}

# What a text begins with, and what is repeated after it.
BEGINNINGS: Final = (
    b"",
    b"SELECT pg_background_launch('x'), ",
    b"SELECT l.pid FROM t, ",
    b"SELECT pg_background_launch('x') FROM t ",
    b"SELECT pg_background_launch(",
    b"SELECT l.pid FROM t, LATERAL pg_background_launch_v2(t.a) AS l WHERE ",
    b"SELECT 'pg_background_launch(', pg_stat_activity, pg_extension FROM ",
    b"ALTER EXTENSION pg_background ",
    b"DROP EXTENSION pg_background, ",
    b"function pg_background_launch(text, ",
    b'{"(1,2)",',
    b"set_config set ",
)
FRAGMENTS: Final = (
    *(
        b"a",
        b"a ",
        b"a.",
        b"a,",
        b"a, ",
        b"a$",
        b"a(",
        b"a)",
        b"1,",
        b"1_",
        b"0x",
        b" ",
        b"\n",
        b"\t",
    ),
    *(b"(", b")", b"[", b"]", b"{", b"}", b"()", b"(),", b"((a)),", b"(a.b)", b"(.", b"[1],"),
    *(
        b"'",
        b"''",
        b"'a',",
        b"'a' -- \n ",
        b"E'\\'",
        b"E'\\'',",
        b"\\",
        b"\\\\",
        b'"',
        b'"a",',
        b'""',
    ),
    *(b"'a''b'", b"E'\\''\n", b" \t --\n"),
    *(b'U&"a",', b'"a".', b"$", b"$1,", b"$a$", b"$a$ $b$ ", b"$$", b"$a$,$a$,", b"a$b$"),
    *(
        b"/*",
        b"*/",
        b"/**/",
        b"/* */,",
        b"--",
        b"--\n",
        b"-",
        b"+-",
        b"=",
        b"=>",
        b"a=>1,",
        b":",
        b"::a",
    ),
    *(
        b";",
        b"; ",
        b"a;",
        b"%",
        b"_",
        b"a%",
        b"a_",
        b"%a",
        b"%_",
        b"\x81\x5c",
        b"\x81",
        b"\xff",
        b"\x8130",
    ),
    *(b" JOIN a", b" LEFT JOIN a ON true", b" JOIN LATERAL f(x) y", b", pg_stat_activity"),
    *(b" FROM pg_stat_activity", b"(SELECT 1 FROM pg_stat_activity, ", b"pg_catalog."),
    *(b" FROM ", b" WHERE a", b" ORDER BY a,", b" LIMIT 1", b" UNION SELECT 1", b"DISTINCT FROM "),
    *(b"SELECT ", b"(SELECT ", b"(SELECT a FROM b) c,", b"WITH a AS (", b"EXISTS (SELECT 1) AND "),
    *(
        b"CASE WHEN ",
        b"coalesce(",
        b"coalesce(a,",
        b"CAST(",
        b"CAST(a AS b),",
        b"ARRAY[",
        b"AND a ",
    ),
    *(
        b"pg_background",
        b"pg_background_launch",
        b"pg_background_launch(",
        b"pg_background_launch('x'),",
    ),
    *(b"pg_background_wait(l.pid, l.cookie),", b"l.pid,", b"(pg_background_stats()).*,", b"t.*,"),
    *(
        b"pg_background_detach(pg_background_launch(",
        b"ROW(1,2)::pg_background_handle,",
        b"sql => ",
    ),
    *(
        b"pg_catalog.textcat(",
        b"pg_catalog.textcat(integer, ",
        b", unknown)",
        b'"pg_background',
        b"text, ",
    ),
    *(
        b"set ",
        b"set a.b ",
        b"set session ",
        b"set\t",
        b"'a.b.",
        b"a.b.c",
        b"\0\0\0\x10a.b",
        b"set_config(",
    ),
    *(
        b"(1,2)",
        b'"(1,2)",',
        b"NULL,",
        b"VERSION '1' ",
        b"SCHEMA a ",
        b"BEGIN ",
        b"ATOMIC ",
        b"COPY a ",
    ),
    *(
        b"CREATE FUNCTION f() BEGIN ATOMIC ",
        b"END;",
        b"extension",
        b"SELECT pg_background_progress(1);",
    ),
)
ENDINGS: Final = (b"", b"'", b")", b" FROM t", b"*/")


def text_of(beginning: bytes, fragment: bytes, ending: bytes) -> Callable[[int], bytes]:
    return lambda size: beginning + fragment * (size // len(fragment)) + ending


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("step", "quick"), [(12, QUICK), pytest.param(1, 1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", READERS)
def test_time_is_linear_in_what_is_repeated(name: str, step: int, quick: int) -> None:
    """Each fragment after some of the beginnings."""
    size, reader = READERS[name]
    slow = {}
    for at, fragment in enumerate(FRAGMENTS):
        for number, beginning in enumerate(BEGINNINGS[at % step :: step]):
            make = text_of(beginning, fragment, ENDINGS[(at + number) % len(ENDINGS)])
            if (grown := growth(reader, make, size // quick)) >= LINEAR:
                slow[beginning, fragment] = grown
    assert not slow, slow


# --- what no repetition makes --------------------------------------------------------------------


def tags(size: int) -> bytes:
    """$a0$ $a1$ $a2$ …: dollar quotes that are never closed."""
    return b"SELECT x" + b"".join(b"$a%d$" % number for number in range(size // 6))


def names(size: int) -> bytes:
    """A column definition list, and all its columns."""
    columns = [b"c%d" % number for number in range(size // 14)]
    items, defined = b",".join(columns), b" int,".join(columns)
    return b"SELECT %b FROM pg_background_result(1) AS (%b int)" % (items, defined)


@pytest.mark.parametrize(
    ("reader", "make", "size"),
    [
        (analyze, tags, LONG),
        (analyze, names, SHORT),
        (analyze, lambda size: b"SELECT pg_background_launch('x') ORDER BY " + b"(" * size + b"1"
         + b")" * size, 4_000),
        (analyze, lambda size: b"SELECT pg_background_launch($a$" + b"'" * size + b"$a$)", LONG),
        (job, lambda size: b"SELECT pg_background_progress(1, $a$"
         + b"".join(b"$pg_background%b$" % (b"_" * n) for n in range(size // 300)) + b"$a$)", LONG),
        (job, lambda size: b"SELECT pg_background_progress(1, '" + b"pg_background" * (size // 13)
         + b"')", 10 * LONG),
        (lambda text: like(text, b"%" + b"_a" * (len(text) // 4) + b"b%"), lambda size: b"a" * size,
         8_000),
    ],
)  # fmt: skip
def test_time_is_linear(reader: Reader, make: Callable[[int], bytes], size: int) -> None:
    assert growth(reader, make, size) < LINEAR


# --- one long constant ---------------------------------------------------------------------------

MEGABYTES: Final = 4_000_000
CONSTANTS: Final = (b"x", b"\xc3\xa9", b"x''yy\\ ", b"\\", b'"', b"''", b"_", b"pg_background ")


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few megabytes are many turns."""
    monkeypatch.setattr(encodings, "_YIELD_AFTER", 64 * 1024)


def argument(sql: bytes) -> None:
    """What is read of a job's text as the argument of a direct call."""
    for _ in encodings.parse_array_in_turns(sql, b"UTF8"):
        pass


def in_array(sql: bytes) -> bytes:
    return b'{"' + sql.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"}'


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize("fragment", CONSTANTS)
def test_time_is_linear_in_a_long_constant(fragment: bytes) -> None:
    make = text_of(b"SELECT length('", fragment, b"')")
    assert growth(job, make, MEGABYTES) < LINEAR
    assert growth(argument, lambda size: in_array(make(size)), MEGABYTES) < LINEAR


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize(
    ("fragment", "as_argument", "as_job"),
    [(b"x", 10, 6), (b"\xc3\xa9", 10, 6), (b"pg_background ", 10, 6), (b"x''yy\\ ", 60, 20)],
)
def test_a_long_constant_is_read_a_few_times_only(
    fragment: bytes, as_argument: int, as_job: int
) -> None:
    """In CPU time of putting it into lower case."""
    sql = text_of(b"SELECT length('", fragment, b"')")(MEGABYTES)
    unit = cpu_time(bytes.lower, sql, 1, 20)
    assert cpu_time(job, sql, 1, 10) < as_job * unit
    assert cpu_time(argument, in_array(sql), 1, 10) < as_argument * unit


# --- the budget ----------------------------------------------------------------------------------


def test_a_long_constant_is_one_token() -> None:
    for quote in (b"'", b"$$"):
        sql = b"SELECT pg_background_launch(" + quote + b"x" * 1_000_000 + quote + b")"
        assert plan_in(sql) is not None


@pytest.mark.parametrize(
    "rest",
    [
        b", 1" * (lexer.MAX_TOKENS // 2),
        b" " * lexer.MAX_BYTES,
        b" /*" + b"x" * lexer.MAX_BYTES + b"*/",
        b" /* x */" * lexer.MAX_TOKENS,
        b", " + b"+" * (lexer.MAX_TOKENS + 1) + b"1",
        b", '" + b"x" * 1_000_000 + b"'" + b" " * lexer.MAX_BYTES,
    ],
)
def test_what_is_over_the_budget_is_not_read(rest: bytes) -> None:
    sql = b"SELECT pg_background_launch('x')" + rest
    assert plan_in(sql) is None
    with pytest.raises(lexer.BudgetError):
        lexer.split(sql, bounded=True)
    assert len(lexer.split(sql)) == 1


def test_a_call_over_the_budget_says_so() -> None:
    body = error(b"42883", b"function pg_background_launch(unknown) does not exist")
    for too_long, hint in ((False, b"Call it directly"), (True, b"by itself")):
        said = unserved(body, too_long=too_long)
        assert said is not None
        assert hint in ErrorResponse.parse(said[5:]).fields["H"]
