"""SCRAM-SHA-256: RFC 7677's conversation, the two sides against each other, and hostile peers."""

from __future__ import annotations

import re
import time
from base64 import b64encode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation
from protocol.scram import (
    MAX_ITERATIONS,
    ClientFinal,
    ClientFirst,
    ScramClient,
    ScramSecret,
    ScramServer,
    client_key_from_proof,
    saslprep,
)

# RFC 7677, section 3
NONCE = b"rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
SERVER_FIRST = (
    b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
)
CLIENT_FINAL = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
    b"p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
SALT = bytes.fromhex("5b6d99689d12358eeca04b141236fa81")

SECRET = ScramSecret.from_password(b"pencil", salt=SALT)


def rfc_client() -> ScramClient:
    return ScramClient(b"pencil", user=b"user", nonce=NONCE)


def test_the_client_speaks_as_in_the_rfc() -> None:
    client = rfc_client()
    assert client.first_message() == CLIENT_FIRST
    assert client.final_message(SERVER_FIRST) == CLIENT_FINAL
    client.verify(SERVER_FINAL)


def test_the_server_speaks_as_in_the_rfc() -> None:
    server = ScramServer(SECRET, nonce=SERVER_NONCE)
    assert server.first_message(CLIENT_FIRST) == SERVER_FIRST
    assert server.verify(CLIENT_FINAL)
    assert server.final_message() == SERVER_FINAL


def test_the_client_key_can_be_recovered_from_a_proof_and_logs_in() -> None:
    final = ClientFinal.parse(CLIENT_FINAL)
    bare = ClientFirst.parse(CLIENT_FIRST).bare
    auth_message = b",".join((bare, SERVER_FIRST, final.without_proof))
    client_key = client_key_from_proof(SECRET.stored_key, auth_message, final.proof)
    assert client_key is not None
    converse(ScramClient.from_keys(client_key, SECRET.server_key), ScramServer(SECRET))
    converse(ScramClient.from_keys(client_key, None), ScramServer(SECRET))


@pytest.mark.parametrize("proof", [b"", b"x" * 31, b"x" * 32, b"x" * 33])
def test_no_key_comes_from_a_wrong_proof(proof: bytes) -> None:
    assert client_key_from_proof(SECRET.stored_key, b",%b," % SERVER_FIRST, proof) is None


def converse(client: ScramClient, server: ScramServer) -> None:
    final = client.final_message(server.first_message(client.first_message()))
    assert server.verify(final)
    client.verify(server.final_message())
    assert server.client_key is not None


@settings(max_examples=20)
@given(st.binary(max_size=20), st.binary(min_size=1, max_size=20), st.integers(1, 50))
def test_the_two_sides_agree(password: bytes, salt: bytes, iterations: int) -> None:
    secret = ScramSecret.from_password(password, salt=salt, iterations=iterations)
    converse(ScramClient(password), ScramServer(secret))


def test_a_wrong_password_is_not_let_in() -> None:
    client, server = ScramClient(b"pen"), ScramServer(SECRET)
    assert not server.verify(client.final_message(server.first_message(client.first_message())))
    assert server.client_key is None


def test_a_server_that_does_not_know_the_secret_is_found_out() -> None:
    client = rfc_client()
    client.final_message(SERVER_FIRST)
    with pytest.raises(ProtocolViolation, match="signature"):
        client.verify(b"v=" + b64encode(b"x" * 32))


@pytest.mark.parametrize(
    "server_first",
    [
        SERVER_FIRST.replace(NONCE, b"another"),
        SERVER_FIRST.replace(SERVER_NONCE, b""),
        SERVER_FIRST.replace(b"4096", b"0"),
        SERVER_FIRST.replace(b"4096", b"-1"),
        SERVER_FIRST.replace(b"4096", b"%d" % (MAX_ITERATIONS + 1)),
        SERVER_FIRST.replace(b"4096", b"9" * 5000),
        SERVER_FIRST.replace(b"s=W22ZaJ0SNY7soEsUEjb6gQ==", b"s=W"),
        SERVER_FIRST.replace(b"s=W22ZaJ0SNY7soEsUEjb6gQ==", b"s="),
        b"m=extension," + SERVER_FIRST,
        b"",
    ],
)
def test_a_server_that_is_up_to_something_is_refused_at_once(server_first: bytes) -> None:
    start = time.thread_time()
    with pytest.raises(ProtocolViolation):
        rfc_client().final_message(server_first)
    assert time.thread_time() - start < 0.5


@pytest.mark.parametrize("server_final", [b"", b"v=", b"v=!", b"e=other-error", b"v=AAA"])
def test_a_server_final_message_without_a_signature_is_refused(server_final: bytes) -> None:
    client = rfc_client()
    client.final_message(SERVER_FIRST)
    with pytest.raises(ProtocolViolation):
        client.verify(server_final)


def test_a_server_that_skips_its_challenge_is_not_verified() -> None:
    for client in (rfc_client(), ScramClient.from_keys(b"k" * 32, None)):
        with pytest.raises(ProtocolViolation, match="before"):
            client.verify(SERVER_FINAL)


@pytest.mark.parametrize(
    "client_first",
    [
        b"",
        b"n=user,r=abc",
        b"p=tls-server-end-point,,n=,r=abc",
        b"n,a=other,n=,r=abc",
        b"n,,m=ext,n=,r=abc",
        b"n,,n=,r=",
        b"n,,n=,r=\xff",
    ],
)
def test_a_client_first_message_that_we_do_not_serve_is_refused(client_first: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        ScramServer(SECRET).first_message(client_first)


@pytest.mark.parametrize(
    "client_final",
    [
        b"",
        CLIENT_FINAL.replace(b"c=biws", b"c=eSws"),
        CLIENT_FINAL.replace(b"c=biws", b"c=b"),
        CLIENT_FINAL.replace(SERVER_NONCE, b"replayed"),
        CLIENT_FINAL.rpartition(b",")[0],
        CLIENT_FINAL + b",x=1",
    ],
)
def test_a_client_final_message_of_another_conversation_is_refused(client_final: bytes) -> None:
    server = ScramServer(SECRET, nonce=SERVER_NONCE)
    server.first_message(CLIENT_FIRST)
    with pytest.raises(ProtocolViolation):
        server.verify(client_final)


@given(st.binary(max_size=60) | st.from_regex(rb"[rnvcspei=,+/0-9a-zA-Z]{0,60}", fullmatch=True))
def test_garbage_raises_only_a_violation(message: bytes) -> None:
    server = ScramServer(SECRET)
    for receive in (
        server.first_message,
        server.verify,
        rfc_client().final_message,
        rfc_client().verify,
    ):
        with pytest.raises(ProtocolViolation):
            receive(message)


def test_a_secret_parses_back_to_itself() -> None:
    text = SECRET.serialize()
    assert re.fullmatch(rb"SCRAM-SHA-256\$4096:W22ZaJ0SNY7soEsUEjb6gQ==\$[^:]{44}:.{44}", text)
    assert ScramSecret.parse(text) == ScramSecret.parse(text.decode()) == SECRET


@pytest.mark.parametrize(
    "text",
    [
        "",
        "md5" + "0" * 32,
        "SCRAM-SHA-256$4096:c2FsdA==$c2hvcnQ=:c2hvcnQ=",
        "SCRAM-SHA-256$0:" + SECRET.serialize().decode()[19:],
        SECRET.serialize().decode() + "\u00e9",
    ],
)
def test_what_is_no_secret_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a SCRAM-SHA-256 secret$"):
        ScramSecret.parse(text)


def test_no_secret_is_in_a_repr() -> None:
    assert repr(SECRET) == "ScramSecret(iterations=4096)"
    assert "pencil" not in repr(ScramClient(b"pencil"))
    assert "proof" not in repr(ClientFinal.parse(CLIENT_FINAL)).replace("without_proof", "")


@pytest.mark.parametrize(
    ("password", "prepared"),
    [
        (b"", b""),
        (b"a\x07b", b"a\x07b"),
        # RFC 4013, section 3
        ("I\u00adX".encode(), b"IX"),
        ("\u00aa".encode(), b"a"),
        ("\u2168".encode(), b"IX"),
        # mapped to a space; to nothing
        ("a\u00a0b".encode(), b"a b"),
        ("\u00e9a\u200bb".encode(), "\u00e9a b".encode()),
        ("\u00e9a\u00adb".encode(), "\u00e9ab".encode()),
        # composed
        ("e\u0301".encode(), "\u00e9".encode()),
        # taken as they are: no UTF-8, nothing left, prohibited, unassigned, mixed directions
        (b"\xff\xfe", b"\xff\xfe"),
        ("\u00ad".encode(), "\u00ad".encode()),
        ("\u00aa\x07".encode(), "\u00aa\x07".encode()),
        ("\u00aa\u0221".encode(), "\u00aa\u0221".encode()),
        ("\u0627\u00aa".encode(), "\u0627\u00aa".encode()),
        ("\u06271".encode(), "\u06271".encode()),
        ("\u06271\u0628".encode(), "\u06271\u0628".encode()),
    ],
)
def test_passwords_are_prepared_as_postgresql_does(password: bytes, prepared: bytes) -> None:
    assert saslprep(password) == prepared
