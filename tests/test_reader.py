"""What a session reads of a Query or Parse, and what it makes of it: no server is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.kinds import F
from proxy.config import Config
from proxy.session.custom_settings import CustomSettings
from proxy.session.extension_state import ExtensionState
from proxy.session.named import NamedStatements
from proxy.session.reader import SqlReader
from proxy.session.reported import ReportedSettings
from proxy.sql import lexer
from proxy.statements.plan import ScalarPlan, Substitute

LAUNCH = "SELECT pg_background_launch('x')"


class Case:
    """A reader, and what it reads with."""

    def __init__(self, **config: Any) -> None:
        runtime = SimpleNamespace(config=Config(**config))
        self.services: Any = SimpleNamespace(runtime=runtime, extension_changes=0)
        self.services.extension_changed = self.extension_changed
        self.reported = ReportedSettings()
        self.report("server_version", "15.4")
        self.named = NamedStatements(self.reported, CustomSettings())
        self.state = ExtensionState(self.services)
        self.reader = SqlReader(
            *(self.reported, self.named, self.state),
            lambda: self.services.runtime.config,
            lambda: (),
        )

    def report(self, name: str, value: str) -> None:
        self.reported.parameter_status(b"%b\0%b\0" % (name.encode(), value.encode()))

    def extension_changed(self) -> None:
        self.services.extension_changes += 1


@pytest.fixture
def case() -> Case:
    return Case()


def query(sql: str) -> bytes:
    return sql.encode() + b"\0"


def test_statements_of_a_query_and_where_they_begin(case: Case) -> None:
    sql = f"SELECT 'ä';{LAUNCH} ; {LAUNCH}, 2;"
    read = case.reader.read(F.QUERY, query(sql))
    assert [statement.text for statement in read] == [
        "SELECT 'ä'".encode(), LAUNCH.encode(), f"{LAUNCH}, 2".encode()
    ]  # fmt: skip
    for statement in read:
        assert sql.encode()[statement.offset :].startswith(statement.text)
    plans = [case.reader.plan(statement) for statement in read]
    assert plans[0] is None
    for statement, plan in zip(read[1:], plans[1:], strict=True):
        assert isinstance(plan, ScalarPlan)
        assert plan.rewrite.original == statement.text


def test_a_parse_is_one_statement(case: Case) -> None:
    text = f"/* a */ {LAUNCH}; -- b"
    [read] = case.reader.read(F.PARSE, b"name\0" + query(text) + b"\0\0")
    assert read.text == text.encode()
    assert isinstance(case.reader.plan(read), ScalarPlan)
    [read] = case.reader.read(F.PARSE, b"\0" + query(f"{LAUNCH}; {LAUNCH}") + b"\0\0")
    assert case.reader.plan(read) is None


def test_a_text_is_read_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    tokenize = lexer.tokenize

    def counted(sql: bytes, **options: Any) -> list[lexer.Token]:
        read.append(sql)
        return tokenize(sql, **options)

    monkeypatch.setattr(lexer, "tokenize", counted)
    statements = case.reader.calls(F.QUERY, query(LAUNCH))
    assert statements is not None
    [statement] = statements
    plan = case.reader.plan(statement)
    assert case.reader.may_call(statement)
    assert case.reader.plan(statement) is plan
    assert read == [LAUNCH.encode()]


def test_settings_that_may_differ(case: Case) -> None:
    depends = query("SELECT pg_background_launch('ä')")
    assert case.reader.calls(F.QUERY, depends, settings_may_differ=True) == []
    assert case.reader.calls(F.QUERY, query(LAUNCH), settings_may_differ=True) != []


@pytest.mark.parametrize("sql", ["SELECT 1", "SELECT 'pg_background_launch(1)'", "pg_background '"])
def test_what_holds_no_call(case: Case, sql: str) -> None:
    assert case.reader.calls(F.QUERY, query(sql)) is None
    assert not case.reader.too_long


def test_too_long(case: Case) -> None:
    assert case.reader.calls(F.QUERY, query(f"{LAUNCH}{', 1' * lexer.MAX_TOKENS}")) is None
    assert case.reader.too_long
    assert case.reader.calls(F.QUERY, query(LAUNCH)) is not None
    assert not case.reader.too_long


def test_a_vertical_tab_is_no_white_space_before_16(case: Case) -> None:
    sql = query("SELECT\vpg_background_launch('x')")
    assert case.reader.calls(F.QUERY, sql) is None
    case.report("server_version", "16.1")
    assert case.reader.calls(F.QUERY, sql) is not None


def test_catalogs_and_tools(case: Case) -> None:
    [read] = case.reader.read(F.QUERY, query("SELECT * FROM pg_extension"))
    assert isinstance(case.reader.plan(read), Substitute)
    case.report("application_name", "pg_dump")
    assert case.reader.plan(read) is None


def test_the_c_extension_serves_its_calls() -> None:
    case = Case(extension="server")
    assert not case.state.is_known
    [read] = case.reader.read(F.QUERY, query(LAUNCH))
    assert case.reader.may_call(read)
    case.state.learn(None, has_c_extension=True)
    assert case.reader.plan(read) is None


def test_what_is_known_until_the_extension_changes(case: Case) -> None:
    steps: list[Callable[[], object]] = [
        lambda: case.state.learn(None, has_c_extension=False),
        case.state.change,
        case.state.transaction_ended,
        lambda: case.state.learn(b"2.0", has_c_extension=False),
        case.state.transaction_ended,
        case.extension_changed,
    ]
    known: list[bool] = []
    for step in steps:
        step()
        known.append(case.state.is_known)
    assert known == [True, False, False, True, True, False]
    assert case.services.extension_changes == 2


def test_code_of_one_text_is_read_up_to_a_budget(case: Case) -> None:
    """Each block may hold as many tokens as the whole text; they are constants to it."""
    block = "DO $$ BEGIN CREATE EXTENSION pg_background; END $$"
    long = block.replace("END", f"PERFORM {'1, ' * 20_000} 1; END")
    assert case.reader.has_call(case.reader.read(F.QUERY, query(block)))
    read = case.reader.read(F.QUERY, query("; ".join([long] * 2 + [block] * 5)))
    assert [case.reader.has_call([each]) for each in read[:2]] == [False, False]
    assert [case.reader.has_call([each]) for each in read[2:]] == [True] * 5
    many = case.reader.read(F.QUERY, query("; ".join([long] * 8 + [block] * 5)))
    assert not case.reader.has_call(many)
    # The budget is that of a text.
    assert case.reader.has_call(case.reader.read(F.QUERY, query("; ".join([block] * 5))))
