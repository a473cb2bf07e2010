"""A failed login does not tell which roles the proxy knows. With TLS on both sides, where the proxy
checks clients itself."""

from __future__ import annotations

import re
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from protocol import messages as m
from protocol.scram import ScramSecret
from protocol.startup import SSLRequest, StartupMessage
from proxy.auth.checks import Checks
from proxy.auth.secret import Cleartext, MD5Secret, Secret
from tests.conftest import StartProxy
from tests.support.certificates import Certificates
from tests.support.recorder import TIMEOUT
from tests.support.servers import PASSWORDS, Proxy, Server
from tests.test_login import TLS_HBA, auth_file, secret_of, tls_roles, upstream
from tests.test_tls import tls_options

__all__ = ["tls_roles"]

PROOF = b64encode(bytes(32))


def attempt(proxy: Proxy, user: str, first: bytes = b"y,,n=,r=nonce") -> tuple[bytes, bytes]:
    """A login by somebody with TLS who could bind, and does not know the password: the salt and
    iteration count, and the error."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((proxy.host, proxy.port), timeout=TIMEOUT) as plain:
        plain.sendall(SSLRequest().serialize())
        assert plain.recv(1) == b"S"
        with context.wrap_socket(plain) as connection:
            stream = connection.makefile("rb")

            def read() -> bytes:
                header = stream.read(5)
                return header[:1] + stream.read(int.from_bytes(header[1:], "big") - 4)

            startup = StartupMessage({b"user": user.encode(), b"database": b"postgres"})
            connection.sendall(startup.serialize())
            assert read()[:5] == b"R\0\0\0\x0a"
            connection.sendall(m.SASLInitialResponse(b"SCRAM-SHA-256", first).serialize())
            answer = read()
            if answer[:1] == b"E":
                return b"", answer
            server_first = re.fullmatch(rb"R\0\0\0\x0br=(nonce[^,]+),(s=[^,]+,i=\d+)", answer)
            assert server_first is not None, answer
            final = b"c=%b,r=%b,p=%b" % (b64encode(first[:3]), server_first[1], PROOF)
            connection.sendall(m.SASLResponse(final).serialize())
            return server_first[2], read()


@pytest.fixture
def scram_for_all(tls_roles: Server) -> Iterator[Server]:
    tls_roles.set_hba([*TLS_HBA[:2], "host all all 127.0.0.1/32 scram-sha-256"])
    yield tls_roles
    tls_roles.set_hba(TLS_HBA)


@pytest.mark.parametrize("lookup", [False, True])
def test_all_roles_get_the_same_conversation_and_the_same_error(
    scram_for_all: Server,
    start_proxy: StartProxy,
    certificates: Certificates,
    tmp_path: Path,
    *,
    lookup: bool,
) -> None:
    server = scram_for_all
    passwords = {"lookup": "lookup pass", "pw_plain": PASSWORDS["pw_plain"]}
    secrets = {"pw_scram": secret_of(server, "pw_scram"), "pw_md5": secret_of(server, "pw_md5")}
    options = [
        *tls_options(certificates, "require"),
        *("--auth-file", auth_file(tmp_path, **passwords, **secrets)),
        *(["--auth-user", "lookup"] if lookup else []),
    ]

    def proxy(workers: str) -> Proxy:
        return start_proxy(
            *options, "--workers", workers, upstream=upstream(server, sslmode="require")
        )

    proxies = [proxy("2"), proxy("1")]  # as after a restart
    roles = [*PASSWORDS, "lookup", "alice", "nobody", "no'one", "x" * 60, "é", "mallory"]
    errors, salts = set(), set()
    for role in roles:
        seen = [attempt(proxies[n % 2], role) for n in range(6)]
        assert len({salt for salt, _ in seen}) == 1, role
        salts.add(seen[0][0])
        errors |= {error.replace(role.encode(), b"ROLE") for _, error in seen}
    assert len(salts) == len(roles)
    [error] = errors
    assert b"C28P01\0" in error
    assert b"does not have the role's password or SCRAM secret" in error
    for salt in salts:
        assert re.fullmatch(rb"s=[A-Za-z0-9+/]{22}==,i=4096", salt)
    # And who knows the password gets in, where the proxy knows the role.
    for role in ("pw_scram", "lookup"):
        password = {**PASSWORDS, **passwords}[role]
        with proxies[0].connect(user=role, password=password, sslmode="require") as conn:
            assert conn.execute("SELECT current_user").fetchone() == (role,)
    # The error says what to do if it is not known; without any secret, that of the server stays.
    without = start_proxy(
        *tls_options(certificates, "require"), upstream=upstream(server, sslmode="require")
    )
    for role in ("pw_scram", "nobody"):
        with pytest.raises(psycopg.OperationalError, match="channel binding negotiation"):
            without.connect(user=role, password="x", sslmode="require")


def test_salts_are_a_roles_own_and_last_as_long_as_the_key(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(b"a key")
    known = ScramSecret.from_password(b"x", iterations=9000)
    checks, again = (Checks(key, [known, MD5Secret(b"md5"), Cleartext(b"x")]) for _ in range(2))
    names = [b"user%d" % number for number in range(1000)]
    for name in names:
        assert checks.check(name, None) == again.check(name, None)
    made_up = {checks.check(name, None).secret.salt for name in names}
    assert len(made_up) == len(names)
    # A role does not change its salt because it is known, or by its password.
    of_password = checks.check(b"user1", Cleartext(b"one"))
    assert of_password.secret.salt == checks.check(b"user1", None).secret.salt
    assert of_password.secret.salt == checks.check(b"user1", Cleartext(b"two")).secret.salt
    assert of_password.secret.stored_key != checks.check(b"user1", None).secret.stored_key
    assert of_password.secret == ScramSecret.from_password(
        b"one", salt=of_password.secret.salt, iterations=9000
    )
    assert checks.check(b"user1", None).secret.iterations == 9000
    assert checks.check(b"user1", MD5Secret(b"md5")).known is None
    assert checks.check(b"user1", known).secret is known
    key.write_bytes(b"another")
    assert Checks(key, []).check(b"user1", None).secret.salt != of_password.secret.salt
    # Without a key they hold for the process.
    loose = Checks(None, [])
    assert loose.check(b"a", None) == loose.check(b"a", None)
    assert loose.check(b"a", None) != Checks(None, []).check(b"a", None)


def test_an_unknown_role_takes_as_long_as_most_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """To derive a key takes milliseconds, when a role comes for the first time."""
    password, scram = Cleartext(b"x"), ScramSecret.from_password(b"x")
    derived: list[bytes] = []
    derive = ScramSecret.from_password

    def count(password: bytes, **how: Any) -> ScramSecret:
        derived.append(password)
        return derive(password, **how)

    monkeypatch.setattr(ScramSecret, "from_password", count)
    cases: list[tuple[list[Secret], int]] = [
        ([password, password, scram], 1),
        ([scram, scram, password], 0),
        ([], 0),
    ]
    for known, times in cases:
        checks = Checks(None, known)
        for user, secret in ((b"known", known[0] if known else None), (b"unknown", None)):
            for so_often in (times, 0):
                derived.clear()
                checks.check(user, secret)
                assert len(derived) == so_often
