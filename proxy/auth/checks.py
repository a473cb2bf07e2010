"""SCRAM secrets by which the proxy itself checks clients, where the server cannot.

Invariant: without the password, a client cannot find out whether the proxy knows its role. Every
role has a fixed salt and the same error; an unknown one has keys that no password yields, like
PostgreSQL's mock authentication.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from protocol.scram import MIN_ITERATIONS, ScramSecret
from proxy.auth.secret import Cleartext, Secret

_MAX_DERIVED: Final = 1000


@dataclass(frozen=True, slots=True)
class Check:
    """How to check a client that claims to be a role.

    Attributes:
        secret: for the SCRAM exchange.
        known: the secret that it was made from; None for an unknown role, which must fail.
    """

    secret: ScramSecret = field(repr=False)
    known: Cleartext | ScramSecret | None = field(repr=False)


class Checks:
    """Makes the checks.

    Args:
        key_file: the private key for TLS, from which salts are derived, so that they are the same
            in all workers and after a restart. Without it, they are this process's own.
        secrets_known: those in the files. Made-up secrets have their most common iteration count,
            and take as long as most of them.
    """

    def __init__(self, key_file: Path | None, secrets_known: Iterable[Secret]) -> None:
        material = secrets.token_bytes(32) if key_file is None else key_file.read_bytes()
        self._key = hmac.digest(material, b"pg_background_proxy: salts of roles", "sha256")
        known = list(secrets_known)
        counts = Counter(s.iterations for s in known if isinstance(s, ScramSecret))
        self._derives = sum(isinstance(s, Cleartext) for s in known) > counts.total()
        self._iterations = counts.most_common(1)[0][0] if counts else MIN_ITERATIONS
        self._derived: dict[tuple[bytes, bytes], ScramSecret] = {}

    def check(self, user: bytes, known: Secret | None) -> Check:
        """The check for a role. `known`: its secret, if the proxy has one."""
        match known:
            case ScramSecret():
                return Check(known, known)
            case Cleartext(password):
                return Check(self._from_password(user, password), known)
            case _:  # unknown; an MD5 secret cannot check a SCRAM login
                if self._derives:
                    self._from_password(user, self._pseudorandom(b"password", user))
                made_up = (self._pseudorandom(what, user) for what in (b"stored", b"server"))
                salt = self._salt(user)
                return Check(ScramSecret(self._iterations, salt, *made_up), None)

    def _from_password(self, user: bytes, password: bytes) -> ScramSecret:
        """Cached, since a client could measure the milliseconds this takes. If most known roles
        have passwords, it is computed for unknown ones too."""
        key = user, hashlib.sha256(password).digest()
        if key not in self._derived:
            if len(self._derived) >= _MAX_DERIVED:
                self._derived.clear()
            self._derived[key] = ScramSecret.from_password(
                password, salt=self._salt(user), iterations=self._iterations
            )
        return self._derived[key]

    def _salt(self, user: bytes) -> bytes:
        return self._pseudorandom(b"salt", user)[:16]

    def _pseudorandom(self, what: bytes, user: bytes) -> bytes:
        return hmac.digest(self._key, what + b"\0" + user, "sha256")
