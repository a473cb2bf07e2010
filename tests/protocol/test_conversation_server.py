"""Whole conversations with a real server, by this package and a plain socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from protocol import messages as m
from protocol.auth import md5_password, md5_response_from_secret, md5_secret
from protocol.errors import QUERY_CANCELED
from protocol.framing import MessageBuffer
from protocol.scram import MECHANISM, ScramClient, ScramSecret, ScramServer
from protocol.startup import CancelRequest, SSLRequest, StartupMessage
from protocol.values.oids import INT4, TEXT
from tests.support.servers import PASSWORDS, Server

pytestmark = pytest.mark.every_server


class Frontend:
    """A client that sends messages and collects the answers."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection((server.host, server.port), timeout=10)
        self._buffer = MessageBuffer()

    def send(self, *requests: m.Message | StartupMessage | CancelRequest | SSLRequest) -> None:
        self.socket.sendall(b"".join(request.serialize() for request in requests))

    def receive(self) -> m.BackendMessage:
        """The next message, which must be what its bytes say: it serializes to them again."""
        while (message := self._buffer.next_message()) is None:
            chunk = self.socket.recv(65536)
            assert chunk, "the server closed the connection"
            self._buffer.feed(chunk)
        parsed = m.parse_backend(*message)
        assert parsed.serialize()[5:] == message[1]
        return parsed

    def until_ready(self) -> list[m.BackendMessage]:
        answers = [self.receive()]
        while not isinstance(answers[-1], m.ReadyForQuery):
            answers.append(self.receive())
        return answers

    def log_in(
        self,
        user: str,
        *,
        version: tuple[int, int] = (3, 0),
        password: bytes = b"",
        scram: ScramClient | None = None,
        md5: bytes | None = None,
    ) -> list[m.BackendMessage]:
        """Logs in and returns what follows AuthenticationOk."""
        parameters = {b"user": user.encode(), b"database": b"postgres"}
        scram = scram or ScramClient(password)
        self.send(StartupMessage(parameters, version))
        while True:
            match self.receive():
                case m.AuthenticationOk():
                    return self.until_ready()
                case m.AuthenticationCleartextPassword():
                    self.send(m.PasswordMessage(password))
                case m.AuthenticationMD5Password(salt):
                    response = (
                        md5_response_from_secret(md5, salt)
                        if md5
                        else md5_password(user.encode(), password, salt)
                    )
                    self.send(m.PasswordMessage(response))
                case m.AuthenticationSASL(mechanisms):
                    assert MECHANISM in mechanisms
                    self.send(m.SASLInitialResponse(MECHANISM, scram.first_message()))
                case m.AuthenticationSASLContinue(data):
                    self.send(m.SASLResponse(scram.final_message(data)))
                case m.AuthenticationSASLFinal(data):
                    scram.verify(data)
                case other:
                    raise AssertionError(other)


@contextmanager
def frontend(server: Server) -> Iterator[Frontend]:
    client = Frontend(server)
    try:
        yield client
    finally:
        client.socket.close()


def test_a_login_without_a_password(server: Server) -> None:
    with frontend(server) as client:
        answers = client.log_in("alice")
    keys = [answer for answer in answers if isinstance(answer, m.BackendKeyData)]
    assert [len(key.secret_key) for key in keys] == [4]
    assert m.ParameterStatus(b"server_encoding", b"UTF8") in answers
    assert answers[-1] == m.ReadyForQuery(b"I")


@pytest.mark.parametrize("user", PASSWORDS)
def test_a_login_by_password(server: Server, user: str) -> None:
    with frontend(server) as client:
        answers = client.log_in(user, password=PASSWORDS[user].encode())
    assert answers[-1] == m.ReadyForQuery(b"I")


def test_a_login_by_md5_secret(server: Server) -> None:
    secret = md5_secret(b"pw_md5", PASSWORDS["pw_md5"].encode())
    with frontend(server) as client:
        answers = client.log_in("pw_md5", md5=secret)
    assert answers[-1] == m.ReadyForQuery(b"I")


def test_a_login_by_a_client_key_that_another_login_revealed(server: Server) -> None:
    with server.connect() as conn:
        row = conn.execute(
            "SELECT rolpassword FROM pg_authid WHERE rolname = 'pw_scram'"
        ).fetchone()
    assert row
    secret = ScramSecret.parse(row[0])
    client, us = ScramClient(PASSWORDS["pw_scram"].encode()), ScramServer(secret)
    assert us.verify(client.final_message(us.first_message(client.first_message())))
    assert us.client_key
    with frontend(server) as session:
        scram = ScramClient.from_keys(us.client_key, secret.server_key)
        answers = session.log_in("pw_scram", scram=scram)
    assert answers[-1] == m.ReadyForQuery(b"I")


def test_a_newer_protocol_is_spoken_or_negotiated_down(server: Server) -> None:
    with frontend(server) as client:
        client.send(StartupMessage({b"user": b"alice", b"database": b"postgres"}, (3, 2)))
        answers = client.until_ready()
    key = next(answer for answer in answers if isinstance(answer, m.BackendKeyData))
    negotiated = [a for a in answers if isinstance(a, m.NegotiateProtocolVersion)]
    if server.version >= 180000:
        assert not negotiated
        assert len(key.secret_key) > 4
    else:
        assert negotiated == [m.NegotiateProtocolVersion((3, 0), ())]


def test_an_option_that_the_server_does_not_know_is_named(server: Server) -> None:
    parameters = {b"user": b"alice", b"database": b"postgres", b"_pq_.unheard_of": b"1"}
    with frontend(server) as client:
        client.send(StartupMessage(parameters, (3, 0)))
        answers = client.until_ready()
    negotiated = [a for a in answers if isinstance(a, m.NegotiateProtocolVersion)]
    assert [answer.options for answer in negotiated] == [(b"_pq_.unheard_of",)]


def test_tls_is_refused_by_one_byte(server: Server) -> None:
    with frontend(server) as client:
        client.send(SSLRequest())
        assert client.socket.recv(1) in (b"N", b"S")


def test_simple_queries(server: Server) -> None:
    with frontend(server) as client:
        client.log_in("alice")
        client.send(m.Query(b"SELECT 1 AS n, NULL::text; "))
        assert client.until_ready() == [
            m.RowDescription(
                (m.Field(b"n", 0, 0, INT4, 4, -1, 0), m.Field(b"text", 0, 0, TEXT, -1, -1, 0))
            ),
            m.DataRow((b"1", None)),
            m.CommandComplete(b"SELECT 1"),
            m.ReadyForQuery(b"I"),
        ]
        client.send(m.Query(b""))
        assert client.until_ready() == [m.EmptyQueryResponse(), m.ReadyForQuery(b"I")]
        client.send(m.Query(b"BEGIN; SELECT 1/0"))
        _, error, ready = client.until_ready()
        assert isinstance(error, m.ErrorResponse)
        assert (error.severity, error.sqlstate) == ("ERROR", "22012")
        assert ready == m.ReadyForQuery(b"E")


def test_extended_queries(server: Server) -> None:
    with frontend(server) as client:
        client.log_in("alice")
        client.send(
            m.Parse(b"s", b"SELECT generate_series(1, $1)", (INT4,)),
            m.Describe(b"S", b"s"),
            m.Bind(b"p", b"s", (1,), (b"\0\0\0\3",), (1,)),
            m.Describe(b"P", b"p"),
            m.Execute(b"p", 2),
            m.Execute(b"p"),
            m.Close(b"P", b"p"),
            m.Flush(),
            m.Parse(b"", b"SET application_name = 'x'"),
            m.Bind(b"", b""),
            m.Describe(b"P", b""),
            m.Sync(),
        )
        field = m.Field(b"generate_series", 0, 0, INT4, 4, -1, 0)
        in_binary = m.Field(b"generate_series", 0, 0, INT4, 4, -1, 1)
        assert client.until_ready() == [
            m.ParseComplete(),
            m.ParameterDescription((INT4,)),
            m.RowDescription((field,)),
            m.BindComplete(),
            m.RowDescription((in_binary,)),
            m.DataRow((b"\0\0\0\1",)),
            m.DataRow((b"\0\0\0\2",)),
            m.PortalSuspended(),
            m.DataRow((b"\0\0\0\3",)),
            m.CommandComplete(b"SELECT 1"),
            m.CloseComplete(),
            m.ParseComplete(),
            m.BindComplete(),
            m.NoData(),
            m.ReadyForQuery(b"I"),
        ]


def test_copy_in_and_out(server: Server) -> None:
    with frontend(server) as client:
        client.log_in("alice")
        client.send(
            m.Query(b"CREATE TEMPORARY TABLE t (a int, b text)"),
            m.Query(b"COPY t FROM STDIN"),
            m.CopyData(b"1\to"),
            m.CopyData(b"ne\n"),
            m.CopyDone(),
        )
        client.until_ready()
        assert client.until_ready()[:2] == [
            m.CopyInResponse(0, (0, 0)),
            m.CommandComplete(b"COPY 1"),
        ]
        client.send(m.Query(b"COPY t TO STDOUT"))
        assert client.until_ready()[:3] == [
            m.CopyOutResponse(0, (0, 0)),
            m.CopyData(b"1\tone\n"),
            m.CopyDone(),
        ]
        client.send(m.Query(b"COPY t FROM STDIN"), m.CopyFail(b"no more"))
        error = client.until_ready()[1]
        assert isinstance(error, m.ErrorResponse)
        assert b"no more" in error.message


def test_notices_notifications_and_function_calls(server: Server) -> None:
    with frontend(server) as client:
        client.log_in("alice")
        client.send(
            m.Query(b"LISTEN c; NOTIFY c, 'payload'"),
            m.Query(b"DO $$ BEGIN RAISE WARNING 'w' USING HINT = 'h'; END $$"),
            m.FunctionCall(1598, (), (), 1),  # random()
        )
        answers = client.until_ready() + client.until_ready() + client.until_ready()
    heard = [answer for answer in answers if isinstance(answer, m.NotificationResponse)]
    assert [(answer.channel, answer.payload) for answer in heard] == [(b"c", b"payload")]
    (notice,) = (answer for answer in answers if isinstance(answer, m.NoticeResponse))
    assert (notice.severity, notice.sqlstate, notice.message) == ("WARNING", "01000", b"w")
    assert notice.fields["H"] == b"h"
    (result,) = (answer for answer in answers if isinstance(answer, m.FunctionCallResponse))
    assert len(result.value or b"") == 8


def test_a_cancel_request(server: Server) -> None:
    with frontend(server) as client:
        answers = client.log_in("alice")
        key = next(answer for answer in answers if isinstance(answer, m.BackendKeyData))
        client.send(m.Query(b"SELECT pg_sleep(10)"))
        while True:
            with frontend(server) as other:
                other.send(CancelRequest(key.pid, key.secret_key))
                assert other.socket.recv(1) == b""
            client.socket.settimeout(0.2)
            try:
                answers = client.until_ready()
            except TimeoutError:
                continue  # the query had not begun
            break
    error = next(answer for answer in answers if isinstance(answer, m.ErrorResponse))
    assert error.sqlstate == QUERY_CANCELED
