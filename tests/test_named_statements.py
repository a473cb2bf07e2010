"""What a session knows of its statements and portals: no server is needed."""

from __future__ import annotations

import pytest

from protocol.kinds import F
from proxy.session.custom_settings import CustomSettings
from proxy.session.named import NamedStatements
from proxy.session.prepared import Command, Portal
from proxy.session.reported import ReportedSettings
from proxy.statements.plan import substitute


@pytest.fixture
def named() -> NamedStatements:
    return NamedStatements(ReportedSettings(), CustomSettings())


def command() -> Command:
    return Command(substitute(b"x", b"y", b"z"))


def test_portals_end_with_the_transaction_whatever_their_names() -> None:
    reported = ReportedSettings()
    reported.parameter_status(b"client_encoding\0LATIN1\0")
    reported.parameter_status(b"server_encoding\0UTF8\0")
    named = NamedStatements(reported, CustomSettings())
    name = "ä".encode("latin-1")
    named.portals[named.key(name)] = Portal(command())
    assert named.portal(name) is not None
    named.transaction_ended()
    assert named.is_empty()


@pytest.mark.parametrize("was_read", [False, True])
@pytest.mark.parametrize("name", [b"", b"s"])
def test_a_failed_parse_leaves_the_statement_unless_unnamed(
    named: NamedStatements, name: bytes, was_read: bool
) -> None:
    first = command()
    named.parsed(name, first)
    old, undo = named.parsed(name, command())
    assert old is first
    undo(was_read)
    assert named.statement(name) is (None if was_read and not name else first)


def test_a_failed_close_leaves_the_statement(named: NamedStatements) -> None:
    first = command()
    named.parsed(b"s", first)
    old, undo = named.closed(b"s")
    assert old is first
    assert named.statement(b"s") is None
    undo(True)
    assert named.statement(b"s") is first


def test_what_concerns_a_statement(named: NamedStatements) -> None:
    named.parsed(b"s", command())
    named.portals[b"p"] = Portal(command())
    assert named.note_message(F.PARSE, b"s\0SELECT 1\0\0\0")
    assert named.note_message(F.BIND, b"other\0s\0")
    assert named.note_message(F.BIND, b"p\0other\0")
    assert named.note_message(F.DESCRIBE, b"Ss\0")
    assert named.note_message(F.DESCRIBE, b"Pp\0")
    assert named.note_message(F.EXECUTE, b"p\0\0\0\0\0")
    for kind, body in [
        (F.PARSE, b"p\0SELECT 1\0\0\0"),
        (F.BIND, b"s\0p\0"),
        (F.DESCRIBE, b"Sp\0"),
        (F.CLOSE, b"Ps\0"),
        (F.EXECUTE, b"s\0\0\0\0\0"),
    ]:
        assert not named.note_message(kind, body)


def test_a_query_ends_what_is_unnamed(named: NamedStatements) -> None:
    for name in (b"", b"s"):
        named.parsed(name, command())
        named.portals[name] = Portal(command())
    named.forget_unnamed()
    assert set(named.statements) == set(named.portals) == {b"s"}


def test_an_answer_counts_until_the_server_reports_or_is_ready() -> None:
    reported = ReportedSettings()
    assert reported[b"TimeZone"] == b""
    reported.parameter_status(b"TimeZone\0UTC\0")
    reported.answered(b"TimeZone", b"Europe/Berlin")
    assert reported[b"TimeZone"] == b"Europe/Berlin"
    reported.ready()
    assert reported[b"TimeZone"] == b"UTC"
    reported.answered(b"TimeZone", b"Europe/Berlin")
    reported.parameter_status(b"TimeZone\0Asia/Tokyo\0")
    assert reported[b"TimeZone"] == b"Asia/Tokyo"
