"""SCRAM-SHA-256, as client and as server (manual, "SASL Authentication"; RFC 5802, RFC 7677).

Invariant: these objects hold one conversation. Each method takes the message received and returns
the one to send, in this order:

    ScramClient                              ScramServer
    first_message()          ── client-first ─→   first_message(…)
    final_message(…)        ←─ server-first ──
                             ── client-final ─→   verify(…)
    verify(…)               ←─ server-final ──    final_message()

Three things serve in a login, each stronger than the one before:

- the secret that the server stores (`ScramSecret`: StoredKey, ServerKey) checks logins;
- the ClientKey logs in to every server that has the same salt and iteration count;
- the password logs in everywhere.

The secret and one login reveal the ClientKey: `client_key_from_proof`. Channel binding is not
supported. No secret is in any repr or error message.
"""

from __future__ import annotations

import binascii
import functools
import hashlib
import hmac
import re
import secrets
import stringprep
import unicodedata
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from protocol.wire import ProtocolViolation

MECHANISM = b"SCRAM-SHA-256"

MAX_ITERATIONS = 1_000_000
"""More are refused: the client does this work (about 0.2 s) before the server has proved anything.
PostgreSQL's default is 4096."""

MIN_ITERATIONS = 4096
"""The minimum of RFC 7677. A server may be configured to use fewer; the caller decides."""

_KeySource = Callable[[bytes, int], tuple[bytes, bytes | None]]
"""From salt and iteration count to ClientKey and ServerKey."""

_DIGEST = "sha256"
_KEY_LENGTH = 32
_PRINTABLE = rb"[!-+\--~]+"  # RFC 5802: printable, without the comma
_BASE64 = rb"[A-Za-z0-9+/]+={0,2}"

_SECRET = re.compile(rb"SCRAM-SHA-256\$([1-9][0-9]{0,9}):(%b)\$(%b):(%b)" % ((_BASE64,) * 3))
_CLIENT_FIRST = re.compile(
    rb"((?:n|y|p=[A-Za-z0-9.-]+),(?:a=[^,]*)?,)(n=[^,]*,r=(%b)(?:,.*)?)" % _PRINTABLE, re.DOTALL
)
_SERVER_FIRST = re.compile(
    rb"r=(%b),s=(%b),i=([1-9][0-9]{0,9})(?:,.*)?" % (_PRINTABLE, _BASE64), re.DOTALL
)
_CLIENT_FINAL = re.compile(
    rb"(c=(%b),r=(%b)(?:,.*)?),p=(%b)" % (_BASE64, _PRINTABLE, _BASE64), re.DOTALL
)
_SERVER_FINAL = re.compile(rb"v=(%b)(?:,.*)?" % _BASE64, re.DOTALL)


@dataclass(frozen=True, slots=True)
class ScramSecret:
    """What a server stores for a password (pg_authid.rolpassword). `salt` is raw, not base64."""

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """The secret in ``SCRAM-SHA-256$4096:salt$StoredKey:ServerKey``.

        Raises:
            ValueError: it has another form. The message does not contain it.
        """
        text = text.encode("utf-8", "replace") if isinstance(text, str) else text
        try:
            iterations, salt, *keys = _match(_SECRET, text, "secret")
            stored_key, server_key = map(_key, keys)
            return cls(int(iterations), _unbase64(salt), stored_key, server_key)
        except ProtocolViolation:
            raise ValueError("not a SCRAM-SHA-256 secret") from None

    @classmethod
    def from_password(
        cls, password: bytes, *, salt: bytes | None = None, iterations: int = 4096
    ) -> Self:
        """The secret of a password, with a random salt unless one is given."""
        salt = secrets.token_bytes(16) if salt is None else salt
        client_key, server_key = _derive(password, salt, iterations)
        return cls(iterations, salt, _hash(client_key), server_key)

    def serialize(self) -> bytes:
        """The text that `parse` reads."""
        salt, stored_key, server_key = map(b64encode, (self.salt, self.stored_key, self.server_key))
        return b"%b$%d:%b$%b:%b" % (MECHANISM, self.iterations, salt, stored_key, server_key)


@dataclass(frozen=True, slots=True)
class ClientFirst:
    """A client-first-message: `gs2_header` (``n,,``), then `bare`."""

    gs2_header: bytes
    bare: bytes
    nonce: bytes

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """Raises ProtocolViolation."""
        return cls(*_match(_CLIENT_FIRST, message, "client-first-message"))


@dataclass(frozen=True, slots=True)
class ClientFinal:
    """A client-final-message. `channel_binding` and `proof` are decoded from base64."""

    without_proof: bytes
    channel_binding: bytes
    nonce: bytes
    proof: bytes = field(repr=False)

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """Raises ProtocolViolation."""
        without_proof, channel_binding, nonce, proof = _match(
            _CLIENT_FINAL, message, "client-final-message"
        )
        return cls(without_proof, _unbase64(channel_binding), nonce, _unbase64(proof))


class ScramClient:
    """One login as a client.

    Args:
        password: as bytes; `saslprep` is applied.
        min_iterations: fewer are refused: they make the password easier to guess from our answer.
        user: ignored by PostgreSQL (the StartupMessage has the role), hence empty by default.
        nonce: for tests; random otherwise.
    """

    def __init__(
        self,
        password: bytes,
        *,
        min_iterations: int = 1,
        user: bytes = b"",
        nonce: bytes | None = None,
    ) -> None:
        self._derive: _KeySource = functools.partial(_derive, password)
        self._min_iterations = min_iterations
        self._nonce = nonce or _nonce()
        name = user.replace(b"=", b"=3D").replace(b",", b"=2C")
        self._client_first_bare = b"n=%b,r=%b" % (name, self._nonce)
        self._server_key: bytes | None = None
        self._auth_message = b""

    @classmethod
    def from_keys(cls, client_key: bytes, server_key: bytes | None) -> Self:
        """A login by ClientKey. Without a ServerKey, `verify` accepts any server's signature."""
        client = cls(b"")
        client._derive = lambda salt, iterations: (client_key, server_key)
        return client

    def first_message(self) -> bytes:
        """The client-first-message, for SASLInitialResponse."""
        return b"n,," + self._client_first_bare

    def final_message(self, server_first: bytes) -> bytes:
        """The client-final-message, with the proof that we have the key.

        From a password, this takes about a millisecond per 4000 iterations.

        Raises:
            ProtocolViolation: malformed, a foreign nonce, too few or over `MAX_ITERATIONS`.
        """
        nonce, salt, iterations = _match(_SERVER_FIRST, server_first, "server-first-message")
        if not nonce.startswith(self._nonce) or nonce == self._nonce:
            raise ProtocolViolation("the server's SCRAM nonce does not extend ours")
        if not self._min_iterations <= int(iterations) <= MAX_ITERATIONS:
            raise ProtocolViolation(f"the server asks for {int(iterations)} SCRAM iterations")
        client_key, self._server_key = self._derive(_unbase64(salt), int(iterations))
        without_proof = b"c=biws,r=" + nonce
        self._auth_message = b",".join((self._client_first_bare, server_first, without_proof))
        proof = _xor(client_key, _hmac(_hash(client_key), self._auth_message))
        return without_proof + b",p=" + b64encode(proof)

    def verify(self, server_final: bytes) -> None:
        """Check that the server knows the secret; an impostor does not.

        Raises:
            ProtocolViolation: it does not, or the message is malformed or premature.
        """
        if not self._auth_message:
            raise ProtocolViolation("a SCRAM server-final-message before the server-first-message")
        (signature,) = _match(_SERVER_FINAL, server_final, "server-final-message")
        if self._server_key is None:
            return
        expected = _hmac(self._server_key, self._auth_message)
        if not hmac.compare_digest(expected, _unbase64(signature)):
            raise ProtocolViolation("the server's SCRAM signature is wrong")


class ScramServer:
    """One login as the server, with the secret of the role.

    `client_key` is the key that the login has revealed, set once `verify` has returned True.
    """

    def __init__(self, secret: ScramSecret, *, nonce: bytes | None = None) -> None:
        self._secret = secret
        self._server_nonce = nonce or _nonce()
        self._gs2_header = b""
        self._client_first_bare = b""
        self._nonce = b""
        self._server_first = b""
        self._auth_message = b""
        self.client_key: bytes | None = None

    def first_message(self, client_first: bytes) -> bytes:
        """The server-first-message, for AuthenticationSASLContinue.

        Raises:
            ProtocolViolation: malformed, or the client demands channel binding.
        """
        first = ClientFirst.parse(client_first)
        if first.gs2_header not in (b"n,,", b"y,,"):
            raise ProtocolViolation("SCRAM channel binding and authorization ids are not supported")
        self._gs2_header = first.gs2_header
        self._client_first_bare = first.bare
        self._nonce = first.nonce + self._server_nonce
        salt = b64encode(self._secret.salt)
        self._server_first = b"r=%b,s=%b,i=%d" % (self._nonce, salt, self._secret.iterations)
        return self._server_first

    def verify(self, client_final: bytes) -> bool:
        """Whether the client has the key.

        Raises:
            ProtocolViolation: malformed, or part of another conversation.
        """
        final = ClientFinal.parse(client_final)
        if final.channel_binding != self._gs2_header:
            raise ProtocolViolation("SCRAM channel binding does not match")
        if not hmac.compare_digest(final.nonce, self._nonce):
            raise ProtocolViolation("SCRAM nonce does not match")
        self._auth_message = b",".join(
            (self._client_first_bare, self._server_first, final.without_proof)
        )
        self.client_key = client_key_from_proof(
            self._secret.stored_key, self._auth_message, final.proof
        )
        return self.client_key is not None

    def final_message(self) -> bytes:
        """The server-final-message, once `verify` has returned True."""
        return b"v=" + b64encode(_hmac(self._secret.server_key, self._auth_message))


def client_key_from_proof(stored_key: bytes, auth_message: bytes, proof: bytes) -> bytes | None:
    """The ClientKey that a client has proved to have.

    ClientKey = ClientProof XOR HMAC(StoredKey, AuthMessage), and is right if its hash is StoredKey
    (RFC 5802, section 3). AuthMessage is client-first-message-bare, server-first-message and
    client-final-message-without-proof, joined by commas.

    Returns:
        The key, 32 bytes, or None if the proof is wrong. `proof` is raw, not base64.
    """
    signature = _hmac(stored_key, auth_message)
    if len(proof) != len(signature):
        return None
    client_key = _xor(proof, signature)
    return client_key if hmac.compare_digest(_hash(client_key), stored_key) else None


def saslprep(password: bytes) -> bytes:
    """The password as PostgreSQL hashes it: SASLprep (RFC 4013) where that is possible.

    Invalid UTF-8 and passwords with characters that SASLprep forbids are used as they are.
    """
    if password.isascii():  # nothing to map; control characters stay too
        return password
    try:
        text = password.decode("utf-8")
    except UnicodeDecodeError:
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(character) else character
        for character in text
        if stringprep.in_table_c12(character) or not stringprep.in_table_b1(character)
    )
    if not mapped or any(map(_is_prohibited, mapped)) or not _is_bidi_consistent(mapped):
        return password
    return unicodedata.normalize("NFKC", mapped).encode()


_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


def _is_prohibited(character: str) -> bool:
    return any(in_table(character) for in_table in _PROHIBITED)


def _is_bidi_consistent(text: str) -> bool:
    """RFC 3454, section 6: right-to-left text is so throughout, and at both ends."""
    if not any(map(stringprep.in_table_d1, text)):
        return True
    if any(map(stringprep.in_table_d2, text)):
        return False
    return stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])


def _derive(password: bytes, salt: bytes, iterations: int) -> tuple[bytes, bytes]:
    """ClientKey and ServerKey."""
    salted = hashlib.pbkdf2_hmac(_DIGEST, saslprep(password), salt, iterations)
    return _hmac(salted, b"Client Key"), _hmac(salted, b"Server Key")


def _match(pattern: re.Pattern[bytes], message: bytes, name: str) -> tuple[bytes, ...]:
    match = pattern.fullmatch(message)
    if match is None:
        raise ProtocolViolation(f"malformed SCRAM {name}")
    return match.groups()


def _unbase64(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise ProtocolViolation("malformed base64 in a SCRAM message") from None


def _key(text: bytes) -> bytes:
    key = _unbase64(text)
    if len(key) != _KEY_LENGTH:
        raise ProtocolViolation("a SCRAM key has 32 bytes")
    return key


def _nonce() -> bytes:
    return b64encode(secrets.token_bytes(18))


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, _DIGEST)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))
