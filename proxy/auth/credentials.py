"""Credentials with which a side backend logs in as the client's role.

Invariant: a role gets in with what is its own, or not at all. There are five sources, tried in this
order: nothing, if the server asks for nothing (trust, peer); the cleartext password that the client
has sent through us; the passfile (libpq's ``.pgpass``); the auth_file (PgBouncer's
``userlist.txt``); auth_query (`proxy.backends.auth_query`), which works like a line of the
auth_file. A client's role has `Credentials` only from a login that the server accepted.

=====================  ================================================================
the server asks for    the answer is made from
=====================  ================================================================
a cleartext password   the password, sent as it is, as by libpq; to prevent that, leave the
                       method ``password`` out of pg_hba.conf
MD5                    the password, or the role's MD5 secret in the auth_file
SCRAM-SHA-256          the password, or the role's SCRAM secret in the auth_file together with the
                       client's own SCRAM login: both together give the ClientKey
=====================  ================================================================

Names, passwords and secrets are bytes, as on the wire and in the files. No object here shows a
secret in its repr, its errors or the log.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from protocol.auth import md5_password, md5_response_from_secret
from protocol.scram import ScramClient, ScramSecret
from proxy.auth.files import AuthFile, PassFile
from proxy.auth.observer import LoginObserver
from proxy.auth.secret import Cleartext, MD5Secret, Secret
from proxy.config import Host
from proxy.config.require_auth import ANYTHING, Policy


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one role can log in with now.

    Attributes:
        user: the role.
        password: from the first source that has one.
        secret: the role's in the auth_file, otherwise from auth_query.
        login: the client's own login as that role.
        has_passfile, has_auth_file, has_auth_query: whether these are configured.
        client_key: recovered from the client's proof, if the proxy itself has checked it.
        purpose: of the login, for errors.
        policy: what the server may ask for.
        is_ours: whether the password is the proxy's, not the client's.
        source: of the password or secret, for people to read; empty without any.
    """

    user: bytes
    password: bytes | None = field(repr=False)
    secret: Secret | None = field(repr=False)
    login: LoginObserver = field(repr=False)
    has_passfile: bool = False
    has_auth_file: bool = False
    has_auth_query: bool = False
    client_key: bytes | None = field(default=None, repr=False)
    purpose: str = " to start a background worker with"
    policy: Policy = ANYTHING
    is_ours: bool = False
    source: str = ""

    def scram_client(self) -> ScramClient | None:
        """A login by SCRAM: with the password, otherwise with the client's ClientKey."""
        if self.client_key is not None:
            server_key = self.secret.server_key if isinstance(self.secret, ScramSecret) else None
            return ScramClient.from_keys(self.client_key, server_key)
        if self.password is not None:
            return ScramClient(self.password, min_iterations=self.policy.min_iterations)
        if isinstance(self.secret, ScramSecret) and self.login.scram is not None:
            client_key = self.login.scram.client_key(self.secret)
            if client_key is not None:
                return ScramClient.from_keys(client_key, self.secret.server_key)
        return None

    def md5_response(self, salt: bytes) -> bytes | None:
        """The answer to AuthenticationMD5Password, from the password or the MD5 secret."""
        if self.password is not None:
            return md5_password(self.user, self.password, salt)
        if isinstance(self.secret, MD5Secret):
            return md5_response_from_secret(self.secret.text, salt)
        return None

    def searched(self) -> str:
        """Which sources were searched, and what they have, for DETAIL. No secrets."""
        passfile = "no line for this connection" if self.has_passfile else "not set"
        found = self._found()
        in_file = "" if self.has_auth_query else found
        auth_file = in_file or "no line for this role" if self.has_auth_file else "not set"
        queried = found or "nothing for this role"
        auth_query = f"; auth_query: {queried}" if self.has_auth_query else ""
        return (
            f"The client logged in with {self.login.method or 'no password'};"
            f" passfile: {passfile}; auth_file: {auth_file}{auth_query}."
        )

    def _found(self) -> str:
        if self.secret is None:
            return ""
        if not isinstance(self.secret, ScramSecret):
            return "an MD5 secret"  # a password would have been preferred
        if self.login.scram is None:
            return "a SCRAM secret, of use only after a client's login by SCRAM"
        if self.login.scram.client_key(self.secret) is None:
            return "a SCRAM secret, but not the one that the client logged in with"
        return "a SCRAM secret"


class CredentialStore:
    """Finds the credentials of a session's role.

    Args:
        passfile: see `PassFile`.
        auth_file: see `AuthFile`.

    Raises:
        ValueError: the auth_file is malformed.
    """

    def __init__(self, passfile: Path | None, auth_file: Path | None) -> None:
        self._passfile = None if passfile is None else PassFile(passfile)
        self._auth_file = None if auth_file is None else AuthFile(auth_file)

    @property
    def has_files(self) -> bool:
        """Whether the proxy has a passfile or an auth_file."""
        return self._passfile is not None or self._auth_file is not None

    def secrets_of_files(self) -> list[Secret]:
        """All secrets of the auth_file, and all passwords of the passfile."""
        found = [] if self._auth_file is None else list(self._auth_file.content().values())
        entries = () if self._passfile is None else self._passfile.content()
        return [*found, *(Cleartext(entry.password) for entry in entries)]

    def secret_in_file(self, user: bytes) -> Secret | None:
        """The auth_file's secret for a name."""
        return None if self._auth_file is None else self._auth_file.lookup(user)

    def secret(self, host: Host, database: bytes, user: bytes) -> Secret | None:
        """A role's secret in the files, to check a client with. The server still decides."""
        secret = self.secret_in_file(user)
        if secret is None and self._passfile is not None:
            password = self._passfile.lookup(host.name, host.port, database, user)
            secret = None if password is None else Cleartext(password)
        return secret

    def own_credentials(
        self, host: Host, database: bytes, user: bytes, policy: Policy
    ) -> Credentials:
        """The credentials of auth_user, the proxy's own role, which has no client."""
        observer = LoginObserver()
        observer.accepted = True
        return dataclasses.replace(
            self.credentials(host, database, user, observer, policy=policy),
            purpose=", which is the auth_user",
        )

    def credentials(
        self,
        host: Host,
        database: bytes,
        user: bytes,
        observer: LoginObserver,
        *,
        queried: Secret | None = None,
        has_auth_query: bool = False,
        policy: Policy = ANYTHING,
    ) -> Credentials:
        """What a session's role can log in with again, by the present files.

        Args:
            host: the server, as in the passfile.
            database: of the session's StartupMessage, by default the user's name.
            user: of the session's StartupMessage.
            observer: of the session's login.
            queried: the secret from auth_query, for a role that is in neither file.
            has_auth_query: whether auth_query has run.
            policy: what the server may ask for.

        Raises:
            ValueError: the server has not accepted that login (yet).
        """
        if not observer.accepted:
            raise ValueError("credentials are for a role that the server has let in")
        password = observer.password
        source = "" if password is None else "the client's own password"
        if password is None and self._passfile is not None:
            password = self._passfile.lookup(host.name, host.port, database, user)
            source = "" if password is None else "its line in the passfile"
        secret = self.secret_in_file(user)
        if secret is not None:
            source = source or "its line in the auth_file"
        elif queried is not None:
            source = source or "what auth_query has found"
            secret = queried
        if password is None and isinstance(secret, Cleartext):
            password = secret.password
        return Credentials(
            user,
            password,
            secret,
            observer,
            has_passfile=self._passfile is not None,
            has_auth_file=self._auth_file is not None,
            has_auth_query=has_auth_query,
            policy=policy,
            is_ours=observer.password is None,
            source=source,
        )
