"""How side backends log in: the files, what is learned from a client's login, and real logins.

Invariant: what lets a role in is shown on real servers, what keeps somebody out on bytes alone.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.auth import md5_password, md5_secret
from protocol.errors import SQLError
from protocol.framing import MessageBuffer, frame
from protocol.messages import (
    AuthenticationCleartextPassword,
    AuthenticationGSS,
    AuthenticationGSSContinue,
    AuthenticationKerberosV5,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    AuthenticationSCMCredential,
    AuthenticationSSPI,
    ErrorResponse,
    Message,
    PasswordMessage,
    ReadyForQuery,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
    parse_backend,
)
from protocol.scram import MECHANISM, ScramClient, ScramSecret, ScramServer, saslprep
from protocol.startup import StartupMessage
from proxy.auth.authenticator import Authenticator
from proxy.auth.credentials import Credentials, CredentialStore
from proxy.auth.files import AuthFile, PassFile, parse_auth_file, parse_passfile
from proxy.auth.observer import LoginObserver
from proxy.auth.secret import Cleartext, MD5Secret
from proxy.config import Host
from tests.support.servers import PASSWORDS, Server

PASSWORD = b"s3cr3t-p\xc3\xa4ss"
SALT = b"\x01\x02\x03\x04"
OK = AuthenticationOk()
CLEARTEXT = AuthenticationCleartextPassword()
MD5 = AuthenticationMD5Password(SALT)
SASL = AuthenticationSASL((MECHANISM,))
SCRAM_SECRET = ScramSecret.from_password(PASSWORD, iterations=100)

# What a test does with the server's side of a login: respond() of an Authenticator, or the like.
Respond = Callable[[AuthenticationRequest], bytes | None]


def private_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def body(message: bytes | None) -> bytes:
    """What follows type and length of a message that is to be sent."""
    assert message is not None
    ((kind, content),) = MessageBuffer(message)
    assert kind == ord("p")
    return content


def observe(observer: LoginObserver, *messages: Message) -> None:
    """Shows the messages of a login to an observer."""
    for message in messages:
        content = message.serialize()[5:]
        if message.type == ord("p"):
            observer.frontend_message(content)
        else:
            observer.backend_message(message.type, content)


def observed(*messages: Message) -> LoginObserver:
    observer = LoginObserver()
    observe(observer, *messages)
    return observer


def scram_login(secret: ScramSecret, password: bytes) -> list[Message]:
    """The messages of a client's login by SCRAM, as they pass through the proxy."""
    client, server = ScramClient(password), ScramServer(secret)
    client_first = client.first_message()
    server_first = server.first_message(client_first)
    client_final = client.final_message(server_first)
    assert server.verify(client_final)
    return [
        SASL,
        SASLInitialResponse(MECHANISM, client_first),
        AuthenticationSASLContinue(server_first),
        SASLResponse(client_final),
        AuthenticationSASLFinal(server.final_message()),
        OK,
    ]


def credentials(
    user: bytes = b"alice",
    *,
    login: LoginObserver | None = None,
    passfile: Path | None = None,
    auth_file: Path | None = None,
) -> Credentials:
    """Credentials from these sources; the client logged in without a password unless told."""
    store = CredentialStore(passfile, auth_file)
    return store.credentials(Host("127.0.0.1", 5432), b"db", user, login or observed(OK))


def log_in_by_scram(secret: ScramSecret, respond: Respond) -> None:
    """The server's side of a login by SCRAM; fails the test if the client does not get in."""
    server = ScramServer(secret)
    initial = SASLInitialResponse.parse(body(respond(SASL)))
    server_first = server.first_message(initial.response or b"")
    final = SASLResponse.parse(body(respond(AuthenticationSASLContinue(server_first))))
    assert server.verify(final.response)
    assert respond(AuthenticationSASLFinal(server.final_message())) is None
    assert respond(OK) is None


# The passfile


Lookup = Callable[..., bytes | None]


@pytest.fixture
def lookup(tmp_path: Path) -> Lookup:
    """Asks a passfile of these lines for the password of alice."""

    def lookup(lines: str, host: str = "db1", database: bytes = b"app") -> bytes | None:
        path = private_file(tmp_path / "passfile", lines.encode())
        return PassFile(path).lookup(host, 5432, database, b"alice")

    return lookup


@pytest.mark.parametrize(
    "line",
    [
        "db1:5432:app:alice:pw",
        "*:*:*:*:pw",
        "db1:*:app:*:pw",
        "*:5432:*:alice:pw",
        "db1:5432:app:alice:pw\r",
        "db1:5432:app:alice:pw:what follows is ignored",
        r"\d\b1:5432:ap\p:alice:p\w",
        "# a comment: with: so: many: colons\n\nnonsense\ndb1:5432:app:alice:pw",
        "db2:*:*:*:no\n*:5433:*:*:no\n*:*:app2:*:no\n*:*:*:bob:no\n*:*:*:*:pw\n*:*:*:*:too late",
    ],
)
def test_passfile_line_matches(lookup: Lookup, line: str) -> None:
    assert lookup(line) == b"pw"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "db1:5432:app:alice",
        "db:5432:app:alice:pw",
        "db1:5432:app:Alice:pw",
        " db1:5432:app:alice:pw",
        "#*:*:*:*:pw",
        r"\*:*:*:*:pw",
        "db*:*:*:*:pw",
        "*:*:*:*:",
        "*:*:*:*:p\0w",
    ],
)
def test_passfile_line_does_not_match(lookup: Lookup, line: str) -> None:
    assert lookup(line) is None


def test_passfile_escapes_in_names_and_password(lookup: Lookup) -> None:
    assert lookup(r"\:\:1:5432:a\:b\\c:alice:p\:w\\", host="::1", database=rb"a:b\c") == b"p:w\\"
    assert lookup("*:*:*:*:ends with a backslash\\") == b"ends with a backslash\\"
    assert lookup(r"\*:*:*:*:pw", host="*") == b"pw"


@pytest.mark.parametrize("host", ["/var/run/postgresql", "/tmp", "@abstract", ""])
def test_passfile_host_of_a_unix_socket(lookup: Lookup, host: str) -> None:
    assert lookup("localhost:5432:app:alice:pw", host=host) == b"pw"
    assert lookup(f"{host}:5432:app:alice:pw", host=host) == b"pw"
    assert lookup("127.0.0.1:5432:app:alice:pw", host=host) is None


@given(st.lists(st.text(st.characters(exclude_characters="\0\n\r"), min_size=1), min_size=5))
def test_passfile_reads_back_what_was_escaped(texts: list[str]) -> None:
    names = [text.encode("utf-8", "surrogatepass") for text in texts[:5]]
    escaped = [name.replace(b"\\", b"\\\\").replace(b":", b"\\:") for name in names]
    escaped[0] = b"\\" + escaped[0] if escaped[0].startswith(b"#") else escaped[0]
    (entry,) = parse_passfile(b":".join(escaped))
    expected = [None if name == b"*" else name for name in names[:4]]
    assert [entry.host, entry.port, entry.database, entry.user] == expected
    assert entry.password == names[4]


@given(st.binary())
def test_passfile_of_any_bytes_is_read(data: bytes) -> None:
    parse_passfile(data)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can")
def test_passfile_of_root_may_be_readable_by_its_group(tmp_path: Path) -> None:
    """So Kubernetes mounts secrets, and systemd hands over credentials (by an ACL)."""
    path = private_file(tmp_path / "passfile", b"*:*:*:*:" + PASSWORD)
    for mode in (0o640, 0o440):
        path.chmod(mode)
        assert PassFile(path).lookup("h", 1, b"d", b"u") == PASSWORD


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660])
def test_passfile_that_others_can_read_is_ignored_until_made_private(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = private_file(tmp_path / "passfile", b"*:*:*:*:" + PASSWORD)
    path.chmod(mode)
    passfile = PassFile(path)
    for _ in range(3):
        assert passfile.lookup("h", 1, b"d", b"u") is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert "chmod 0600" in record.getMessage()
    path.chmod(0o600)
    assert passfile.lookup("h", 1, b"d", b"u") == PASSWORD


def test_passfile_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "passfile"
    passfile = PassFile(path)
    assert passfile.lookup("h", 1, b"d", b"u") is None
    private_file(path, b"*:*:*:*:one")
    assert passfile.lookup("h", 1, b"d", b"u") == b"one"
    private_file(path, b"*:*:*:*:three")
    assert passfile.lookup("h", 1, b"d", b"u") == b"three"
    private_file(tmp_path / "new", b"*:*:*:*:seven").rename(path)
    assert passfile.lookup("h", 1, b"d", b"u") == b"seven"
    path.unlink()
    assert passfile.lookup("h", 1, b"d", b"u") is None
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == [
        "No such file or directory"
    ] * 2


def test_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passfile = PassFile(private_file(tmp_path / "passfile", b"*:*:*:*:one"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read again"))
    assert passfile.lookup("h", 1, b"d", b"u") == b"one"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_passfile_that_is_no_plain_file_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    assert PassFile(path).lookup("h", 1, b"d", b"u") is None
    assert "not a plain file" in caplog.text


# The auth_file


def test_auth_file_has_passwords_and_secrets() -> None:
    md5 = md5_secret(b"bob", PASSWORD)
    data = b"\r\n".join(
        [
            b"; a comment",
            b'"alice" "it""s a ""password"""',
            b'"bob"\t"%b" "" further fields' % md5,
            b'  "ca""rol" "%b"' % SCRAM_SECRET.serialize(),
            b"",
            b'"dave" "md5abcdef012342345"',
            b'"erin" "old"',
            b'"erin" ""',
        ]
    )
    assert parse_auth_file(data) == {
        b"alice": Cleartext(b'it"s a "password"'),
        b"bob": MD5Secret(md5),
        b'ca"rol': SCRAM_SECRET,
        b"dave": Cleartext(b"md5abcdef012342345"),
        b"erin": Cleartext(b""),
    }


@pytest.mark.parametrize(
    "line",
    [
        b'alice "s3cr3t"',
        b'"alice" s3cr3t',
        b'"alice"',
        b'"alice" "s3cr3t',
        b'"alice" "s3cr3t""',
        b'"alice" "s3cr3t"trailing',
        b'"alice""s3cr3t"',
        b'"alice" "s3cr3t\0"',
        b'"alice" "SCRAM-SHA-256$4096:s3cr3t"',
    ],
)
def test_malformed_auth_file_names_file_and_line_and_no_secret(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "userlist.txt"
    path.touch(mode=0o600)
    path.write_bytes(b'; comment\n"bob" "fine"\n' + line)
    with pytest.raises(ValueError, match="line 3") as caught:
        AuthFile(path)
    assert str(path) in str(caught.value)
    assert_tells_nothing(caught.value, b"s3cr3t")


def test_auth_file_that_becomes_malformed_stays_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "userlist.txt"
    path.touch(mode=0o600)
    path.write_bytes(b'"alice" "one"')
    auth_file = AuthFile(path)
    path.write_bytes(b'"alice" "s3cr3t')
    for _ in range(3):
        assert auth_file.lookup(b"alice") == Cleartext(b"one")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"{path}: line 1" in record.getMessage()
    assert "s3cr3t" not in caplog.text
    path.write_bytes(b'"alice" "two"')
    assert auth_file.lookup(b"alice") == Cleartext(b"two")
    path.unlink()
    assert auth_file.lookup(b"alice") is None


@given(st.binary())
def test_auth_file_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    try:
        parse_auth_file(data)
    except ValueError as error:
        assert "line" in str(error)  # noqa: PT017 (it may also be read)


# What is learned from a client's login


def test_login_without_a_password() -> None:
    observer = observed(OK)
    assert observer.accepted
    assert (observer.method, observer.password, observer.scram) == (None, None, None)


def test_cleartext_password_counts_once_the_server_has_accepted_it() -> None:
    observer = observed(CLEARTEXT, PasswordMessage(PASSWORD))
    assert (observer.accepted, observer.password) == (False, None)
    with pytest.raises(ValueError, match="let in"):
        credentials(login=observer)
    observe(observer, OK)
    assert (observer.accepted, observer.password) == (True, PASSWORD)
    assert credentials(login=observer).password == PASSWORD


def test_nothing_after_the_login_is_a_password() -> None:
    observer = observed(CLEARTEXT, PasswordMessage(PASSWORD), OK)
    observe(observer, PasswordMessage(b"x"), CLEARTEXT, PasswordMessage(b"y"))
    assert observer.password == PASSWORD


@pytest.mark.parametrize(
    "messages",
    [
        [MD5, PasswordMessage(md5_password(b"alice", PASSWORD, SALT))],
        [PasswordMessage(PASSWORD)],
        [PasswordMessage(PASSWORD), CLEARTEXT],
        [CLEARTEXT],
        [AuthenticationGSS(), PasswordMessage(PASSWORD), AuthenticationGSSContinue(b"x")],
        [CLEARTEXT, PasswordMessage(PASSWORD), MD5, PasswordMessage(b"md5...")],
    ],
)
def test_login_that_leaves_nothing_to_use_again(messages: list[Message]) -> None:
    observer = observed(*messages, OK)
    assert (observer.accepted, observer.password, observer.scram) == (True, None, None)


def test_scram_login_and_the_servers_secret_give_the_client_key() -> None:
    observer = observed(*scram_login(SCRAM_SECRET, PASSWORD))
    assert observer.method == "SCRAM-SHA-256"
    assert observer.password is None
    assert observer.scram is not None
    assert observer.scram.client_key(SCRAM_SECRET) is not None
    other = ScramSecret.from_password(PASSWORD, iterations=100)
    assert observer.scram.client_key(other) is None


def test_scram_login_with_channel_binding_gives_the_client_key() -> None:
    """What a client with TLS of its own sends; our ScramClient does no channel binding."""
    salted = hashlib.pbkdf2_hmac("sha256", saslprep(PASSWORD), SCRAM_SECRET.salt, 100)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    header = b"p=tls-server-end-point,,"
    bare = b"n=,r=abc"
    server_first = b"r=abcdef,s=%b,i=100" % b64encode(SCRAM_SECRET.salt)
    without_proof = b"c=%b,r=abcdef" % b64encode(header + bytes(32))
    auth_message = b",".join((bare, server_first, without_proof))
    signature = hmac.digest(SCRAM_SECRET.stored_key, auth_message, "sha256")
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    observer = observed(
        AuthenticationSASL((MECHANISM + b"-PLUS", MECHANISM)),
        SASLInitialResponse(MECHANISM + b"-PLUS", header + bare),
        AuthenticationSASLContinue(server_first),
        SASLResponse(without_proof + b",p=" + b64encode(proof)),
        OK,
    )
    assert observer.scram is not None
    assert observer.scram.client_key(SCRAM_SECRET) == client_key


@pytest.mark.parametrize("cut", range(5))
def test_incomplete_scram_login_gives_nothing(cut: int) -> None:
    messages = scram_login(SCRAM_SECRET, PASSWORD)
    del messages[cut]
    observer = observed(*messages)
    expected_proof = cut == 4  # the server's signature is no part of it
    assert (observer.scram is not None) == expected_proof


@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 13), st.binary(max_size=40))))
def test_no_message_makes_the_observer_fail(messages: list[tuple[bool, int, bytes]]) -> None:
    observer = LoginObserver()
    for from_backend, code, content in messages:
        if from_backend:
            observer.backend_message(ord("R"), code.to_bytes(4, "big", signed=True) + content)
        else:
            observer.frontend_message(content)
    assert observer.accepted or (observer.password, observer.scram) == (None, None)


def test_only_authentication_messages_are_observed() -> None:
    observer = LoginObserver()
    observer.backend_message(ord("N"), OK.serialize()[5:])
    assert not observer.accepted


# Which secret answers which request


def test_cleartext_password_answers_every_method() -> None:
    found = credentials(login=observed(CLEARTEXT, PasswordMessage(PASSWORD), OK))
    respond = Authenticator(found).respond
    assert PasswordMessage.parse(body(respond(CLEARTEXT))).password == PASSWORD
    expected = md5_password(b"alice", PASSWORD, SALT)
    assert PasswordMessage.parse(body(respond(MD5))).password == expected
    log_in_by_scram(SCRAM_SECRET, Authenticator(found).respond)


def test_md5_secret_answers_md5(tmp_path: Path) -> None:
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(b'"alice" "%b"' % md5_secret(b"alice", PASSWORD))
    respond = Authenticator(credentials(auth_file=auth_file)).respond
    expected = md5_password(b"alice", PASSWORD, SALT)
    assert PasswordMessage.parse(body(respond(MD5))).password == expected


def test_scram_secret_answers_scram_after_a_login_by_scram(tmp_path: Path) -> None:
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(b'"alice" "%b"' % SCRAM_SECRET.serialize())
    login = observed(*scram_login(SCRAM_SECRET, PASSWORD))
    log_in_by_scram(
        SCRAM_SECRET, Authenticator(credentials(login=login, auth_file=auth_file)).respond
    )


def test_sources_are_tried_in_order(tmp_path: Path) -> None:
    login = observed(CLEARTEXT, PasswordMessage(b"from the client"), OK)
    passfile = private_file(tmp_path / "passfile", b"127.0.0.1:5432:db:alice:from the passfile")
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(b'"alice" "from the auth_file"')
    found = credentials(login=login, passfile=passfile, auth_file=auth_file)
    assert found.password == b"from the client"
    assert credentials(passfile=passfile, auth_file=auth_file).password == b"from the passfile"
    passfile.write_bytes(b"")
    assert credentials(passfile=passfile, auth_file=auth_file).password == b"from the auth_file"
    assert credentials(b"bob", passfile=passfile, auth_file=auth_file).password is None


def test_server_that_asks_for_nothing_needs_nothing() -> None:
    assert Authenticator(credentials()).respond(OK) is None


# Errors


@pytest.mark.parametrize(
    ("request_", "detail", "hint"),
    [
        (CLEARTEXT, "asks for a cleartext password", "passfile"),
        (MD5, "asks for an MD5 password", "the MD5 secret from pg_authid is enough"),
        (SASL, "asks for SCRAM-SHA-256", "the SCRAM secret from pg_authid is enough"),
    ],
)
def test_nothing_to_log_in_with_says_what_to_configure(
    request_: AuthenticationRequest, detail: str, hint: str
) -> None:
    with pytest.raises(SQLError) as caught:
        Authenticator(credentials()).respond(request_)
    error = caught.value
    assert error.sqlstate == "28000"
    assert error.message == 'no password for role "alice" to start a background worker with'
    assert error.detail is not None
    assert detail in error.detail
    assert "logged in with no password; passfile: not set; auth_file: not set." in error.detail
    assert error.hint is not None
    assert hint in error.hint


def test_error_tells_what_the_files_have_instead(tmp_path: Path) -> None:
    passfile = private_file(tmp_path / "passfile", b"*:*:*:bob:x")
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(
        b'"md5" "%b"\n"scram" "%b"\n' % (md5_secret(b"md5", PASSWORD), SCRAM_SECRET.serialize())
    )

    def detail(
        user: bytes, login: LoginObserver, request: AuthenticationRequest = SASL
    ) -> str | None:
        found = credentials(user, login=login, passfile=passfile, auth_file=auth_file)
        with pytest.raises(SQLError) as caught:
            Authenticator(found).respond(request)
        return caught.value.detail

    by_scram = observed(*scram_login(SCRAM_SECRET, PASSWORD))
    by_other = observed(*scram_login(ScramSecret.from_password(b"x", iterations=9), b"x"))
    expected = (
        "The server asks for SCRAM-SHA-256. The client logged in with no password;"
        " passfile: no line for this connection; auth_file: {}."
    )
    assert detail(b"alice", observed(OK)) == expected.format("no line for this role")
    assert detail(b"md5", observed(OK)) == expected.format("an MD5 secret")
    for login, request, words in (
        (observed(OK), SASL, "a SCRAM secret, of use only after a client's login by SCRAM."),
        (by_other, SASL, "a SCRAM secret, but not the one that the client logged in with."),
        (by_scram, MD5, "a SCRAM secret."),
    ):
        text = detail(b"scram", login, request)
        assert text is not None
        assert text.endswith(f"auth_file: {words}")


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (AuthenticationGSS(), "GSSAPI"),
        (AuthenticationGSSContinue(b""), "GSSAPI"),
        (AuthenticationSSPI(), "SSPI"),
        (AuthenticationKerberosV5(), "Kerberos V5"),
        (AuthenticationSCMCredential(), "SCM credentials"),
        (AuthenticationSASL((b"OAUTHBEARER", b"X")), "SASL (OAUTHBEARER, X)"),
        (AuthenticationSASLContinue(b""), "SASL"),
        (AuthenticationSASLFinal(b""), "SASL"),
    ],
)
def test_method_that_the_proxy_cannot_do(request_: AuthenticationRequest, name: str) -> None:
    found = credentials(login=observed(CLEARTEXT, PasswordMessage(PASSWORD), OK))
    with pytest.raises(SQLError) as caught:
        Authenticator(found).respond(request_)
    assert caught.value.sqlstate == "28000"
    assert caught.value.detail is not None
    assert f"asks for {name}, which" in caught.value.detail
    assert caught.value.hint is not None
    assert "pg_hba.conf" in caught.value.hint


def test_server_that_does_not_know_the_secret_is_refused() -> None:
    found = credentials(login=observed(CLEARTEXT, PasswordMessage(PASSWORD), OK))
    authenticator = Authenticator(found)
    server = ScramServer(SCRAM_SECRET)
    initial = SASLInitialResponse.parse(body(authenticator.respond(SASL)))
    challenge = AuthenticationSASLContinue(server.first_message(initial.response or b""))
    authenticator.respond(challenge)
    with pytest.raises(SQLError, match="could not log in") as caught:
        authenticator.respond(AuthenticationSASLFinal(b"v=" + b64encode(bytes(32))))
    assert caught.value.sqlstate == "28000"


@pytest.mark.parametrize("step", [AuthenticationSASLContinue, AuthenticationSASLFinal])
def test_server_cannot_leave_out_its_proof(step: type[Message]) -> None:
    """Whatever comes in place of the next SCRAM message: no login, nothing is sent."""
    for request in (OK, SASL, CLEARTEXT, MD5, AuthenticationSASLFinal(b"v=AA==")):
        found = credentials(login=observed(CLEARTEXT, PasswordMessage(PASSWORD), OK))
        authenticator = Authenticator(found)
        initial = SASLInitialResponse.parse(body(authenticator.respond(SASL)))
        if step is AuthenticationSASLFinal:
            server = ScramServer(SCRAM_SECRET)
            first = server.first_message(initial.response or b"")
            authenticator.respond(AuthenticationSASLContinue(first))
        with pytest.raises(SQLError):
            authenticator.respond(request)


def test_malformed_challenge_is_an_error_of_the_login() -> None:
    found = credentials(login=observed(CLEARTEXT, PasswordMessage(PASSWORD), OK))
    authenticator = Authenticator(found)
    authenticator.respond(SASL)
    with pytest.raises(SQLError, match="could not log in"):
        authenticator.respond(AuthenticationSASLContinue(b"r=other,s=AAAA,i=1"))


# Secrets stay secret


def assert_tells_nothing(thing: object, *secrets: bytes) -> None:
    """Neither the texts of an object nor, for an error, those of what led to it show a secret."""
    texts = [repr(thing), str(thing), f"{thing}"]
    if isinstance(thing, SQLError):
        texts += [str(thing.args), repr(thing.response())]
    if isinstance(thing, BaseException):
        assert thing.__suppress_context__ or thing.__context__ is None
    for secret in secrets:
        for form in (secret.decode("utf-8", "replace"), repr(secret)[2:-1], secret.hex()):
            assert not any(form in text for text in texts), type(thing)


def test_secrets_are_in_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    md5 = md5_secret(b"bob", PASSWORD)
    passfile_path = private_file(tmp_path / "passfile", b"*:*:*:*:" + PASSWORD)
    auth_file_path = tmp_path / "userlist.txt"
    auth_file_path.touch(mode=0o600)
    auth_file_path.write_bytes(
        b'"alice" "%b"\n"bob" "%b"\n"carol" "%b"' % (PASSWORD, md5, SCRAM_SECRET.serialize())
    )
    by_password = observed(CLEARTEXT, PasswordMessage(PASSWORD), OK)
    by_scram = observed(*scram_login(SCRAM_SECRET, PASSWORD))
    assert by_scram.scram is not None
    client_key = by_scram.scram.client_key(SCRAM_SECRET)
    assert client_key is not None
    secrets = (
        *(PASSWORD, md5, md5[3:], client_key, b64encode(client_key)),
        *(SCRAM_SECRET.stored_key, SCRAM_SECRET.server_key, b64encode(SCRAM_SECRET.stored_key)),
        *(by_scram.scram.proof, b64encode(by_scram.scram.proof)),
    )
    found = [
        credentials(login=by_password),
        credentials(b"bob", auth_file=auth_file_path),
        credentials(b"carol", login=by_scram, auth_file=auth_file_path),
        credentials(passfile=passfile_path),
    ]
    authenticators = [Authenticator(credentials) for credentials in found]
    authenticators[0].respond(SASL)
    authenticators[2].respond(SASL)
    holders = [
        *(by_password, by_scram, by_scram.scram, *found, *authenticators),
        *parse_passfile(passfile_path.read_bytes()),
        *(Cleartext(PASSWORD), MD5Secret(md5)),
    ]
    for thing in holders:
        assert_tells_nothing(thing, *secrets)
    others = [
        PassFile(passfile_path),
        AuthFile(auth_file_path),
        CredentialStore(passfile_path, auth_file_path),
    ]
    for other in others:
        assert_tells_nothing(other, *secrets)
    wrong: list[AuthenticationRequest] = [OK, SASL, MD5, AuthenticationGSS()]
    for authenticator, request in zip(authenticators, wrong, strict=True):
        with pytest.raises(SQLError) as caught:
            authenticator.respond(request)
        assert_tells_nothing(caught.value, *secrets)
    assert_tells_nothing(caplog.text, *secrets)


# Real servers


def log_in(
    server: Server, user: str, respond: Respond, observer: LoginObserver | None = None
) -> None:
    """Logs in by a blocking socket; what goes over the wire is shown to the observer.

    Raises psycopg.OperationalError with the server's message if it refuses.
    """
    startup = StartupMessage({b"user": user.encode(), b"database": b"postgres"})
    buffer = MessageBuffer()
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(startup.serialize())
        while data := connection.recv(65536):
            buffer.feed(data)
            for kind, content in buffer:
                if observer is not None:
                    observer.backend_message(kind, content)
                if kind == OK.type:
                    answer = respond(parse_authentication(content))
                    if answer is not None:
                        connection.sendall(answer)
                    if answer is not None and observer is not None:
                        observer.frontend_message(body(answer))
                    continue
                match parse_backend(kind, content):
                    case ErrorResponse() as error:
                        raise psycopg.OperationalError(error.message.decode())
                    case ReadyForQuery():
                        connection.sendall(frame(ord("X"), b""))
                        return
    raise AssertionError("the server closed the connection")


def with_password(user: str, password: str) -> Authenticator:
    login = observed(CLEARTEXT, PasswordMessage(password.encode()), OK)
    return Authenticator(credentials(user.encode(), login=login))


def stored_secret(server: Server, role: str) -> bytes:
    """pg_authid.rolpassword."""
    with server.connect() as connection:
        row = connection.execute(
            "SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = %s", [role]
        ).fetchone()
    assert row is not None
    secret: str = row[0]
    return secret.encode()


@contextmanager
def observing_relay(server: Server, observer: LoginObserver) -> Iterator[int]:
    """A port where one client gets through to the server, its login being observed."""

    def relay(listener: socket.socket) -> None:
        with (
            listener.accept()[0] as client,
            socket.create_connection((server.host, server.port), timeout=10) as backend,
        ):
            client.settimeout(10)
            backend.sendall(client.recv(65536))  # StartupMessage
            from_backend, from_client = MessageBuffer(), MessageBuffer()
            # Until the client is in, each side waits for the other; then the client only leaves.
            while data := backend.recv(65536):
                from_backend.feed(data)
                for kind, content in from_backend:
                    observer.backend_message(kind, content)
                client.sendall(data)
                if data.endswith(ReadyForQuery(b"I").serialize()):
                    break
                if not observer.accepted:
                    data = client.recv(65536)
                    from_client.feed(data)
                    for _, content in from_client:
                        observer.frontend_message(content)
                    backend.sendall(data)
            backend.sendall(client.recv(65536))  # Terminate

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=relay, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(15)
            assert not thread.is_alive()


def libpq_login(server: Server, role: str, dbname: str = "postgres") -> LoginObserver:
    """The login of a real client with its password, as the proxy sees it."""
    observer = LoginObserver()
    with observing_relay(server, observer) as port:
        psycopg.connect(
            host="127.0.0.1",
            port=port,
            user=role,
            password=PASSWORDS[role],
            dbname=dbname,
            sslmode="disable",
            gssencmode="disable",
            connect_timeout=10,
        ).close()
    assert observer.accepted
    return observer


@pytest.mark.parametrize("role", PASSWORDS)
def test_login_with_the_password_in_the_passfile(server: Server, role: str, tmp_path: Path) -> None:
    line = f"{server.host}:{server.port}:postgres:{role}:{PASSWORDS[role]}"
    store = CredentialStore(private_file(tmp_path / "passfile", line.encode()), None)
    found = store.credentials(
        Host(server.host, server.port), b"postgres", role.encode(), observed(OK)
    )
    log_in(server, role, Authenticator(found).respond)


@pytest.mark.parametrize("role", PASSWORDS)
def test_login_with_the_password_in_the_auth_file(
    server: Server, role: str, tmp_path: Path
) -> None:
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_text(f'"{role}" "{PASSWORDS[role]}"', encoding="utf-8")
    log_in(server, role, Authenticator(credentials(role.encode(), auth_file=auth_file)).respond)


def test_login_without_a_password_where_the_server_trusts(server: Server) -> None:
    log_in(server, "alice", Authenticator(credentials()).respond)


def test_login_with_the_password_that_libpq_sent_in_cleartext(server: Server) -> None:
    found = credentials(b"pw_plain", login=libpq_login(server, "pw_plain"))
    log_in(server, "pw_plain", Authenticator(found).respond)


def test_login_with_the_md5_secret_of_pg_authid(server: Server, tmp_path: Path) -> None:
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(b'"pw_md5" "%b"' % stored_secret(server, "pw_md5"))
    login = libpq_login(server, "pw_md5")
    assert login.method == "an MD5 password"
    found = credentials(b"pw_md5", login=login, auth_file=auth_file)
    log_in(server, "pw_md5", Authenticator(found).respond)


def test_login_with_the_scram_secret_of_pg_authid_after_a_login_by_libpq(
    server: Server, tmp_path: Path
) -> None:
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(b'"pw_scram" "%b"' % stored_secret(server, "pw_scram"))
    found = credentials(b"pw_scram", login=libpq_login(server, "pw_scram"), auth_file=auth_file)
    assert found.password is None
    for _ in range(2):
        log_in(server, "pw_scram", Authenticator(found).respond)


def test_login_with_the_scram_secret_after_a_login_of_our_own(
    server: Server, tmp_path: Path
) -> None:
    observer = LoginObserver()
    own = with_password("pw_scram", PASSWORDS["pw_scram"])
    log_in(server, "pw_scram", own.respond, observer)
    auth_file = tmp_path / "userlist.txt"
    auth_file.touch(mode=0o600)
    auth_file.write_bytes(b'"pw_scram" "%b"' % stored_secret(server, "pw_scram"))
    found = credentials(b"pw_scram", login=observer, auth_file=auth_file)
    log_in(server, "pw_scram", Authenticator(found).respond)


@pytest.mark.parametrize("role", PASSWORDS)
def test_wrong_password_is_refused_by_the_server(server: Server, role: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        log_in(server, role, with_password(role, "wrong").respond)


@pytest.mark.parametrize("role", PASSWORDS)
def test_launch_without_any_password_fails_before_the_server_has_to(
    server: Server, role: str
) -> None:
    with pytest.raises(SQLError) as caught:
        log_in(server, role, Authenticator(credentials(role.encode())).respond)
    assert caught.value.sqlstate == "28000"
