"""Every message: what is serialized parses back, and what is not a message is a violation."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.errors import ProtocolViolation
from protocol.kinds import B, F
from protocol.messages.authentication import AuthenticationSCMCredential

strings = st.binary(max_size=40).map(lambda text: text.replace(b"\0", b" "))
names = strings.filter(bool)
data = st.binary(max_size=80)
values = st.lists(st.none() | data, max_size=6).map(tuple)
int16s = st.integers(-(2**15), 2**15 - 1)
int32s = st.integers(-(2**31), 2**31 - 1)
uint16s = st.integers(0, 2**16 - 1)
oids = st.integers(0, 2**32 - 1)
formats = st.lists(int16s, max_size=4).map(tuple)
kinds = st.sampled_from([b"S", b"P"])
keys = st.binary(min_size=4, max_size=256)
report_fields = st.dictionaries(st.characters(min_codepoint=1, max_codepoint=255), strings)
columns = st.builds(m.Field, strings, oids, int16s, oids, int16s, int32s, int16s)

COPY = {
    "overall_format": st.integers(0, 255),
    "column_formats": formats,
}
FRONTEND: dict[type[m.Message], st.SearchStrategy[Any]] = {
    m.Bind: st.builds(m.Bind, strings, strings, formats, values, formats),
    m.Close: st.builds(m.Close, kinds, strings),
    m.CopyData: st.builds(m.CopyData, data),
    m.CopyDone: st.builds(m.CopyDone),
    m.CopyFail: st.builds(m.CopyFail, strings),
    m.Describe: st.builds(m.Describe, kinds, strings),
    m.Execute: st.builds(m.Execute, strings, int32s),
    m.Flush: st.builds(m.Flush),
    m.FunctionCall: st.builds(m.FunctionCall, oids, formats, values, int16s),
    m.Parse: st.builds(m.Parse, strings, strings, st.lists(oids, max_size=5).map(tuple)),
    m.PasswordMessage: st.builds(m.PasswordMessage, strings),
    m.Query: st.builds(m.Query, strings),
    m.Sync: st.builds(m.Sync),
    m.Terminate: st.builds(m.Terminate),
}
ALSO_P: dict[type[m.Message], st.SearchStrategy[Any]] = {
    m.GSSResponse: st.builds(m.GSSResponse, data),
    m.SASLInitialResponse: st.builds(m.SASLInitialResponse, strings, st.none() | data),
    m.SASLResponse: st.builds(m.SASLResponse, data),
}
BACKEND: dict[type[m.Message], st.SearchStrategy[Any]] = {
    m.AuthenticationCleartextPassword: st.builds(m.AuthenticationCleartextPassword),
    m.AuthenticationGSS: st.builds(m.AuthenticationGSS),
    m.AuthenticationGSSContinue: st.builds(m.AuthenticationGSSContinue, data),
    m.AuthenticationKerberosV5: st.builds(m.AuthenticationKerberosV5),
    m.AuthenticationMD5Password: st.builds(
        m.AuthenticationMD5Password, st.binary(min_size=4, max_size=4)
    ),
    m.AuthenticationOk: st.builds(m.AuthenticationOk),
    m.AuthenticationSASL: st.builds(m.AuthenticationSASL, st.lists(names, max_size=3).map(tuple)),
    m.AuthenticationSASLContinue: st.builds(m.AuthenticationSASLContinue, data),
    m.AuthenticationSASLFinal: st.builds(m.AuthenticationSASLFinal, data),
    AuthenticationSCMCredential: st.builds(AuthenticationSCMCredential),
    m.AuthenticationSSPI: st.builds(m.AuthenticationSSPI),
    m.BackendKeyData: st.builds(m.BackendKeyData, int32s, keys),
    m.BindComplete: st.builds(m.BindComplete),
    m.CloseComplete: st.builds(m.CloseComplete),
    m.CommandComplete: st.builds(m.CommandComplete, strings),
    m.CopyBothResponse: st.builds(m.CopyBothResponse, **COPY),
    m.CopyData: st.builds(m.CopyData, data),
    m.CopyDone: st.builds(m.CopyDone),
    m.CopyInResponse: st.builds(m.CopyInResponse, **COPY),
    m.CopyOutResponse: st.builds(m.CopyOutResponse, **COPY),
    m.DataRow: st.builds(m.DataRow, values),
    m.EmptyQueryResponse: st.builds(m.EmptyQueryResponse),
    m.ErrorResponse: st.builds(m.ErrorResponse, report_fields),
    m.FunctionCallResponse: st.builds(m.FunctionCallResponse, st.none() | data),
    m.NegotiateProtocolVersion: st.builds(
        m.NegotiateProtocolVersion,
        st.tuples(uint16s, uint16s),
        st.lists(strings, max_size=3).map(tuple),
    ),
    m.NoData: st.builds(m.NoData),
    m.NoticeResponse: st.builds(m.NoticeResponse, report_fields),
    m.NotificationResponse: st.builds(m.NotificationResponse, int32s, strings, strings),
    m.ParameterDescription: st.builds(
        m.ParameterDescription, st.lists(oids, max_size=5).map(tuple)
    ),
    m.ParameterStatus: st.builds(m.ParameterStatus, strings, strings),
    m.ParseComplete: st.builds(m.ParseComplete),
    m.PortalSuspended: st.builds(m.PortalSuspended),
    m.ReadyForQuery: st.builds(m.ReadyForQuery, st.sampled_from([b"I", b"T", b"E"])),
    m.RowDescription: st.builds(m.RowDescription, st.lists(columns, max_size=4).map(tuple)),
}
ALL = [*FRONTEND, *ALSO_P, *(kind for kind in BACKEND if kind not in FRONTEND)]
PARSERS: list[Callable[[bytes], Any]] = [kind.parse for kind in ALL]


@given(st.one_of(*FRONTEND.values()))
def test_a_frontend_message_parses_back_to_itself(message: m.Message) -> None:
    wire = message.serialize()
    assert m.parse_frontend(wire[0], wire[5:]) == message


@given(st.one_of(*BACKEND.values()))
def test_a_backend_message_parses_back_to_itself(message: m.Message) -> None:
    wire = message.serialize()
    assert m.parse_backend(wire[0], memoryview(wire)[5:]) == message


@given(st.one_of(*ALSO_P.values()))
def test_a_sasl_or_gss_response_is_parsed_by_its_class(message: m.Message) -> None:
    wire = message.serialize()
    assert wire[0] == ord("p")
    assert message.parse(wire[5:]) == message


@given(st.one_of(*FRONTEND.values(), *ALSO_P.values(), *BACKEND.values()))
def test_the_length_word_counts_itself_and_the_body(message: m.Message) -> None:
    wire = message.serialize()
    assert wire[0] == message.type
    assert int.from_bytes(wire[1:5], "big") == len(wire) - 1


def test_the_types_have_the_names_of_the_messages() -> None:
    for namespace, types in ((F, FRONTEND), (B, BACKEND)):
        named = {name.replace("_", ""): kind for name, kind in vars(namespace).items()}
        for message in types:
            if message.type != B.AUTHENTICATION:
                assert named[message.__name__.upper()] == message.type


def test_every_message_of_the_unions_is_covered_by_these_tests() -> None:
    assert set(m.FrontendMessage.__args__) == {*FRONTEND, *ALSO_P}
    assert set(m.BackendMessage.__args__) == set(BACKEND)


@given(st.sampled_from(PARSERS), st.binary(max_size=60))
@example(m.RowDescription.parse, b"\xff\xff" + b"x" * 30)
@example(m.DataRow.parse, b"\x00\x01\xff\xff\xff\xfe")
def test_garbage_is_a_violation_or_a_message(parse: Callable[[bytes], Any], body: bytes) -> None:
    try:
        message = parse(body)
    except ProtocolViolation:
        return
    if not isinstance(message, m.ErrorResponse | m.NoticeResponse):  # a field may come twice
        assert message.serialize()[5:] == body


@given(st.integers(0, 255), st.binary(max_size=60))
def test_garbage_of_any_type_raises_only_a_violation(type_: int, body: bytes) -> None:
    for parse in (m.parse_frontend, m.parse_backend):
        with contextlib.suppress(ProtocolViolation):
            parse(type_, body)


@given(st.one_of(*FRONTEND.values(), *BACKEND.values()), st.data())
def test_a_message_cut_short_or_too_long_is_a_violation(message: Any, draw: st.DataObject) -> None:
    whole = message.serialize()[5:]
    if message.type not in b"dpRKN" and not isinstance(message, m.ErrorResponse):
        with pytest.raises(ProtocolViolation):
            message.parse(whole + b"\0")
    cut = whole[: draw.draw(st.integers(0, max(len(whole) - 1, 0)))]
    with contextlib.suppress(ProtocolViolation):
        assert message.parse(cut) != message or cut == whole


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (m.Query.parse, b"SELECT 1"),
        (m.Query.parse, b"SELECT 1\0\0"),
        (m.Sync.parse, b"\0"),
        (m.Parse.parse, b"\0\0\xff\xff"),
        (m.Bind.parse, b"\0\0\0\0\0\1\xff\xff\xff\xfe\0\0"),
        (m.Bind.parse, b"\0\0\0\0\0\1\x7f\xff\xff\xff\0\0"),
        (m.Describe.parse, b"X\0"),
        (m.Execute.parse, b"\0\0\0\0"),
        (m.ReadyForQuery.parse, b"X"),
        (m.ReadyForQuery.parse, b""),
        (m.BackendKeyData.parse, b"\0\0\0\1abc"),
        (m.BackendKeyData.parse, b"\0\0\0\1" + b"k" * 257),
        (m.AuthenticationOk.parse, b"\0\0\0\3"),
        (m.AuthenticationMD5Password.parse, b"\0\0\0\5abc"),
        (m.AuthenticationSASL.parse, b"\0\0\0\nSCRAM-SHA-256\0"),
        (m.NegotiateProtocolVersion.parse, b"\0\3\0\0\xff\xff\xff\xff"),
        (m.NegotiateProtocolVersion.parse, b"\0\3\0\0\x7f\xff\xff\xff"),
        (m.SASLInitialResponse.parse, b"SCRAM-SHA-256\0\xff\xff\xff\xfe"),
        (m.ErrorResponse.parse, b"SERROR\0"),
        (m.ErrorResponse.parse, b"SERROR"),
        (m.parse_authentication, b"\0\0\0\x63"),
        (m.parse_authentication, b"\0\0"),
    ],
)
def test_what_the_manual_does_not_allow_is_a_violation(
    parse: Callable[[bytes], Any], body: bytes
) -> None:
    with pytest.raises(ProtocolViolation):
        parse(body)


@pytest.mark.parametrize("parse", [m.parse_frontend, m.parse_backend])
def test_an_unknown_type_is_a_violation(parse: Callable[[int, bytes], Any]) -> None:
    with pytest.raises(ProtocolViolation):
        parse(ord("!"), b"")


@pytest.mark.parametrize(
    "message",
    [
        m.Query(b"SELECT\0 1"),
        m.DataRow((b"",) * 65536),
        m.Parse(b"", b"", (-1,)),
        m.Execute(b"", 2**31),
        m.Describe(b"X", b""),
        m.ReadyForQuery(b""),
        m.AuthenticationMD5Password(b"salt too long"),
        m.AuthenticationSASL((b"",)),
        m.ErrorResponse({"\0": b""}),
        m.ErrorResponse({"no code": b""}),
        m.CopyInResponse(256, ()),
    ],
)
def test_what_cannot_be_a_message_is_not_serialized(message: m.Message) -> None:
    with pytest.raises(ValueError, match=r"."):
        message.serialize()


def test_counts_go_up_to_65535() -> None:
    bind = m.Bind(b"", b"", (), (None,) * 65535)
    assert m.Bind.parse(bind.serialize()[5:]) == bind


@pytest.mark.parametrize("kind", ALL)
def test_no_memory_is_taken_on_the_word_of_a_length_field(kind: type[m.Message]) -> None:
    tracemalloc.start()
    for body in (b"\x7f" * 12, b"\0\0" + b"\x7f" * 12, b"\0\0\0\1" + b"\x7f" * 12):
        with contextlib.suppress(ProtocolViolation):
            kind.parse(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_bytes_are_those_of_the_manual() -> None:
    assert m.Sync().serialize() == b"S\0\0\0\4"
    assert m.Query(b"SELECT 1").serialize() == b"Q\0\0\0\rSELECT 1\0"
    assert (
        m.Bind(b"p", b"s", (1,), (b"\0\1", None), (0, 1)).serialize()
        == b"B\0\0\0\x1ep\0s\0\0\1\0\1\0\2\0\0\0\2\0\1\xff\xff\xff\xff\0\2\0\0\0\1"
    )
    field = m.Field(b"n", 1259, 2, 23, 4, -1, 0)
    assert (
        m.RowDescription((field,)).serialize()
        == b"T\0\0\0\x1a\0\1n\0\0\0\x04\xeb\0\2\0\0\0\x17\0\4\xff\xff\xff\xff\0\0"
    )


def test_an_error_has_its_fields_in_the_order_of_the_wire() -> None:
    body = b"SFEHLER\0VERROR\0C42P01\0Mrelation missing\0P15\0\0"
    error = m.ErrorResponse.parse(body)
    assert list(error.fields) == ["S", "V", "C", "M", "P"]
    assert (error.severity, error.sqlstate, error.message) == (
        "ERROR",
        "42P01",
        b"relation missing",
    )
    changed = error.with_fields(M=b"gone", W=b"in a job")
    assert list(changed.fields.items())[3:] == [("M", b"gone"), ("P", b"15"), ("W", b"in a job")]
    assert error.serialize()[5:] == body


def test_an_error_of_an_old_or_careless_server_has_its_properties_too() -> None:
    error = m.ErrorResponse({"S": b"FATAL"})
    assert (error.severity, error.sqlstate, error.message) == ("FATAL", "", b"")


@pytest.mark.parametrize(
    "message",
    [
        m.PasswordMessage(b"tell-nobody"),
        m.SASLInitialResponse(b"SCRAM-SHA-256", b"tell-nobody"),
        m.SASLResponse(b"tell-nobody"),
        m.GSSResponse(b"tell-nobody"),
        m.AuthenticationGSSContinue(b"tell-nobody"),
        m.BackendKeyData(1, b"tell-nobody"),
    ],
)
def test_no_secret_is_in_a_repr(message: m.Message) -> None:
    assert "tell" not in repr(message)
