"""How a side backend logs in as the client's role.

The rule: a role gets in with what is its own, or not at all. There are five sources, tried in this
order: nothing, where the server asks for nothing (trust, peer); the cleartext password that the
client itself sent through us; the passfile (libpq's ``.pgpass``); the auth_file (PgBouncer's
``userlist.txt``); what auth_query finds (`proxy.auth_query`), which is the same as a line of the
auth_file. `Credentials` of a client's role come only from a login that the server accepted.

=====================  ================================================================
the server asks for    what answers it
=====================  ================================================================
a cleartext password   the password. It goes out as it is, as from libpq: whoever does not want
                       that forbids the method ``password`` in pg_hba.conf
MD5                    the password, or the role's MD5 secret in the auth_file
SCRAM-SHA-256          the password, or the role's SCRAM secret in the auth_file together with the
                       client's own SCRAM login: the two give the ClientKey
=====================  ================================================================

Role and database names, passwords and secrets are bytes, as on the wire and in the files. None of
the objects here shows a secret in its repr, its errors or the log, and none that holds one can be
pickled.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, NoReturn, SupportsIndex, TypeAlias, TypeVar

from protocol.auth import md5_password, md5_response_from_secret
from protocol.errors import INVALID_AUTHORIZATION_SPECIFICATION, ProtocolViolation, SQLError
from protocol.messages import (
    AuthenticationCleartextPassword,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from protocol.scram import (
    MECHANISM,
    ClientFinal,
    ClientFirst,
    ScramClient,
    ScramSecret,
    client_key_from_proof,
)
from proxy import private
from proxy.auth.methods import ANYTHING, CLEARTEXT_HINT, PROVE_HINT, Guard, Policy, in_words
from proxy.log import logger

T = TypeVar("T")


class _HoldsSecrets:
    """Refuses to be pickled or copied: what it holds stays in this process, and in one place."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds secrets and cannot be pickled")


# The two files


class _WatchedFile(ABC, Generic[T]):
    """The content of a file, read again when the file has changed. A look costs one stat().

    A file that cannot be used is logged, once for each change of it, and counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._content = self._load()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path)!r})"

    def content(self) -> T:
        """What the file says now; what it said before if it has become malformed."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._content = self._load()
            except ValueError as error:
                logger.error("%s; its previous content stays in use", error)
        return self._content

    def _stat(self) -> tuple[int, ...] | None:
        """What differs when the file does; the mode is in it because of `chmod 0600`."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns

    def _load(self) -> T:
        try:
            self._check(self._path.stat())
            data = self._path.read_bytes()
        except OSError as error:
            logger.warning("ignoring %s: %s", self._path, error.strerror)
            data = b""
        return self._parse(data)

    def _check(self, status: os.stat_result) -> None:
        """Raises OSError if such a file counts as empty, ValueError if it is malformed."""
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")

    @abstractmethod
    def _parse(self, data: bytes) -> T:
        """Raises ValueError, with path and line, if it is malformed."""


@dataclass(frozen=True, slots=True)
class PassFileEntry(_HoldsSecrets):
    """A line of a passfile. None is the wildcard ``*``."""

    host: bytes | None
    port: bytes | None
    database: bytes | None
    user: bytes | None
    password: bytes = field(repr=False)


_PASSFILE_LINE: Final = re.compile(
    rb"%b:%b:%b:%b:((?:[^\\:]|\\.|\\\Z)*)" % ((rb"((?:[^\\:]|\\.)*)",) * 4)
)


def parse_passfile(data: bytes) -> tuple[PassFileEntry, ...]:
    """The lines ``host:port:database:user:password`` of a file (manual, "The Password File").

    A backslash takes the next character literally. As in libpq, comments (``#``) and lines of
    another form are passed over, and what follows a further colon is not part of the password.
    """
    entries = []
    for line in data.split(b"\n"):
        line = line.rstrip(b"\r")
        match = _PASSFILE_LINE.match(line)
        if match is None or line.startswith(b"#") or b"\0" in line:
            continue
        *patterns, password = match.groups()
        host, port, database, user = (
            None if pattern == b"*" else _unescape(pattern) for pattern in patterns
        )
        entries.append(PassFileEntry(host, port, database, user, _unescape(password)))
    return tuple(entries)


def _unescape(text: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", text)


class PassFile(_WatchedFile[tuple[PassFileEntry, ...]]):
    """A file of passwords in the format of libpq's ``.pgpass``.

    It is ignored, with a warning, while anybody but its owner has access to it.
    """

    def lookup(self, host: str, port: int, database: bytes, user: bytes) -> bytes | None:
        """The password of the first line that matches; None if there is none, or it is empty.

        A `host` that is the directory of a Unix socket also matches lines for ``localhost``, be it
        the default directory or not (libpq: the default one alone).
        """
        hosts = {None, os.fsencode(host)}
        if not host or host.startswith(("/", "@")):
            hosts.add(b"localhost")
        ports = (None, b"%d" % port)
        for entry in self.content():
            if (
                entry.host in hosts
                and entry.port in ports
                and entry.database in (None, database)
                and entry.user in (None, user)
            ):
                return entry.password or None
        return None

    def _check(self, status: os.stat_result) -> None:
        super()._check(status)
        if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PermissionError(
                errno.EPERM, "group or others have access to it; chmod 0600 makes it private"
            )

    def _parse(self, data: bytes) -> tuple[PassFileEntry, ...]:
        return parse_passfile(data)


@dataclass(frozen=True, slots=True)
class Cleartext(_HoldsSecrets):
    """A password in an auth_file."""

    password: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MD5Secret(_HoldsSecrets):
    """``md5`` and 32 digits, as in pg_authid."""

    text: bytes = field(repr=False)


Secret: TypeAlias = Cleartext | MD5Secret | ScramSecret

_AUTH_FILE_LINE: Final = re.compile(rb'"((?:[^"]|"")*)"[ \t]+"((?:[^"]|"")*)"(?:[ \t].*)?')
_MD5_SECRET: Final = re.compile(rb"md5[0-9a-f]{32}")


def parse_auth_file(data: bytes) -> dict[bytes, Secret]:
    """The lines ``"user" "secret"`` of a file (PgBouncer, "Authentication file format").

    A quote inside quotes is doubled; lines that begin with ``;`` are comments; what follows the
    second field is ignored. If a user comes twice the last line counts.

    Raises:
        ValueError: with the line's number, and nothing of what is in it.
    """
    secrets: dict[bytes, Secret] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.strip()
        if not line or line.startswith(b";"):
            continue
        match = _AUTH_FILE_LINE.fullmatch(line)
        if match is None or b"\0" in line:
            raise ValueError(f'line {number} is not of the form "user" "secret"')
        user, secret = (text.replace(b'""', b'"') for text in match.groups())
        try:
            secrets[user] = parse_secret(secret)
        except ValueError:
            raise ValueError(f"line {number} has a malformed SCRAM-SHA-256 secret") from None
    return secrets


def parse_secret(text: bytes) -> Secret:
    """Tells the kinds apart as PostgreSQL does.

    Raises ValueError for a SCRAM secret cut short, which nobody has as a password.
    """
    if text.startswith(MECHANISM + b"$"):
        return ScramSecret.parse(text)
    return MD5Secret(text) if _MD5_SECRET.fullmatch(text) else Cleartext(text)


class AuthFile(_WatchedFile[dict[bytes, Secret]]):
    """A file of passwords and secrets in the format of PgBouncer's ``auth_file``.

    Raises:
        ValueError: it is malformed, and the message names file and line; or others have access to
            it. Once it has been read, a change that makes it so is logged, and what was read before
            stays in use.
    """

    def lookup(self, user: bytes) -> Secret | None:
        """What the file has for this role."""
        return self.content().get(user)

    def _check(self, status: os.stat_result) -> None:
        super()._check(status)
        if private.is_exposed(status):
            raise ValueError(private.exposed(self._path))

    def _parse(self, data: bytes) -> dict[bytes, Secret]:
        try:
            return parse_auth_file(data)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None


# The client's own login


@dataclass(frozen=True, slots=True)
class ScramLogin(_HoldsSecrets):
    """What went over the wire in a SCRAM login: with the StoredKey, enough for the ClientKey."""

    client_first_bare: bytes = field(repr=False)
    server_first: bytes = field(repr=False)
    client_final_without_proof: bytes = field(repr=False)
    proof: bytes = field(repr=False)

    def client_key(self, secret: ScramSecret) -> bytes | None:
        """The ClientKey, or None if the login was made with another secret than this."""
        return client_key_from_proof(
            secret.stored_key,
            self.client_first_bare,
            self.server_first,
            self.client_final_without_proof,
            self.proof,
        )


class LoginObserver(_HoldsSecrets):
    """Watches a client's login as it passes through the proxy, and keeps what can be used again.

    It judges nothing: the server does that. Messages that are malformed or out of order are no
    error here, they only leave it knowing nothing; and nothing is known before the server has
    accepted the login.

    Attributes:
        accepted: AuthenticationOk was seen.
        method: what the server asked the client for, as in an error's DETAIL; None if it asked for
            nothing (trust, peer, cert).
    """

    def __init__(self) -> None:
        self.accepted = False
        self.method: str | None = None
        self._on_response: Callable[[bytes], None] | None = None
        self._password: bytes | None = None
        self._client_first_bare = b""
        self._server_first = b""
        self._scram: ScramLogin | None = None

    @classmethod
    def of_code(cls) -> LoginObserver:
        """One for a role that no client has logged in as, but that code in a client's session runs
        as; it must prove that before anything is done with the login (`proxy.extension.inside`)."""
        observer = cls()
        observer.accepted = True
        observer.method = "the password of another role"
        return observer

    def __repr__(self) -> str:
        return f"<LoginObserver accepted={self.accepted} method={self.method!r}>"

    @property
    def password(self) -> bytes | None:
        """The password that the client sent in cleartext, if it did and was let in with it."""
        return self._password if self.accepted else None

    @property
    def scram(self) -> ScramLogin | None:
        """The client's login by SCRAM-SHA-256 (or -PLUS), if it was let in by one."""
        return self._scram if self.accepted else None

    def backend_message(self, type: int, body: bytes) -> None:
        """A message of the server. Only those of type ``R`` matter, up to AuthenticationOk."""
        if self.accepted or type != AuthenticationOk.type:
            return
        try:
            request = parse_authentication(body)
        except ProtocolViolation:
            self._forget()
            return
        match request:
            case AuthenticationOk():
                self.accepted = True
            case AuthenticationSASLContinue(server_first) if self._client_first_bare:
                self._server_first = server_first
                self._on_response = self._client_final
            case AuthenticationSASLFinal() if self._scram:
                pass
            case _:
                self._begin(request)

    def frontend_message(self, body: bytes) -> None:
        """A message of type ``p`` of the client: the answer to what the server asked for last."""
        if self.accepted:
            return
        on_response, self._on_response = self._on_response, None
        if on_response is None:  # not asked for, or an answer that is of no use to us
            self._forget()
            return
        try:
            on_response(body)
        except ProtocolViolation:
            self._forget()

    def _begin(self, request: AuthenticationRequest) -> None:
        self._forget()
        self.method = in_words(request)
        if isinstance(request, AuthenticationCleartextPassword):
            self._on_response = self._cleartext
        elif isinstance(request, AuthenticationSASL):
            self._on_response = self._client_first

    def _forget(self) -> None:
        self._on_response = None
        self._password = None
        self._client_first_bare = b""
        self._server_first = b""
        self._scram = None

    def _cleartext(self, body: bytes) -> None:
        self._password = PasswordMessage.parse(body).password

    def _client_first(self, body: bytes) -> None:
        initial = SASLInitialResponse.parse(body)
        if initial.mechanism in (MECHANISM, MECHANISM + b"-PLUS"):
            self._client_first_bare = ClientFirst.parse(initial.response or b"").bare

    def _client_final(self, body: bytes) -> None:
        final = ClientFinal.parse(SASLResponse.parse(body).response)
        self._scram = ScramLogin(
            self._client_first_bare, self._server_first, final.without_proof, final.proof
        )


# What a role can log in with


@dataclass(frozen=True, slots=True)
class Credentials(_HoldsSecrets):
    """What one role can log in with, found out now for a login that happens now.

    Attributes:
        user: the role.
        password: from whichever source has one first.
        secret: what the auth_file has for the role, else what auth_query has found.
        login: the client's own, as that role.
        has_passfile, has_auth_file, has_auth_query: whether the proxy has been given one.
        client_key: of a login by SCRAM that the proxy has taken from the client itself.
        purpose: what errors say that the login was for.
        policy: what the server may ask for.
        is_ours: the password is of a file of the proxy's, and not what the client has sent.
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

    def authenticator(self) -> Authenticator:
        """For one login."""
        return Authenticator(self)

    def scram_client(self) -> ScramClient | None:
        """A login by SCRAM: by password, else by the key that the client's own login gave away."""
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
        """The answer to AuthenticationMD5Password: by password, else by MD5 secret."""
        if self.password is not None:
            return md5_password(self.user, self.password, salt)
        if isinstance(self.secret, MD5Secret):
            return md5_response_from_secret(self.secret.text, salt)
        return None

    def searched(self) -> str:
        """Where was looked for a password in vain, and what there was instead: no secrets."""
        passfile = "no line for this connection" if self.has_passfile else "not set"
        found = self._found()
        auth_file = found or "no line for this role" if self.has_auth_file else "not set"
        auth_query = ""
        if self.has_auth_query:
            auth_file, auth_query = (
                "no line for this role" if self.has_auth_file else "not set",
                f"; auth_query: {found or 'nothing for this role'}",
            )
        return (
            f"The client logged in with {self.login.method or 'no password'};"
            f" passfile: {passfile}; auth_file: {auth_file}{auth_query}."
        )

    def _found(self) -> str:
        if self.secret is None:
            return ""
        if not isinstance(self.secret, ScramSecret):
            return "an MD5 secret"  # a password would have been used
        if self.login.scram is None:
            return "a SCRAM secret, of use only after a client's login by SCRAM"
        if self.login.scram.client_key(self.secret) is None:
            return "a SCRAM secret, but not the one that the client logged in with"
        return "a SCRAM secret"


class CredentialStore:
    """Finds the credentials of a session's role.

    Args:
        passfile: in the format of ``.pgpass``, see `PassFile`.
        auth_file: in the format of PgBouncer's ``userlist.txt``, see `AuthFile`.

    Raises:
        ValueError: the auth_file is malformed.
    """

    def __init__(self, passfile: Path | None, auth_file: Path | None) -> None:
        self._passfile = None if passfile is None else PassFile(passfile)
        self._auth_file = None if auth_file is None else AuthFile(auth_file)

    @property
    def has_files(self) -> bool:
        """Whether there is either file."""
        return self._passfile is not None or self._auth_file is not None

    def secrets_of_file(self) -> list[Secret]:
        """All that the auth_file has."""
        return [] if self._auth_file is None else list(self._auth_file.content().values())

    def secret(self, host: str, port: int, database: bytes, user: bytes) -> Secret | None:
        """What the files have for a role, to check a client with. It lets nobody in by itself."""
        secret = None if self._auth_file is None else self._auth_file.lookup(user)
        if secret is None and self._passfile is not None:
            password = self._passfile.lookup(host, port, database, user)
            secret = None if password is None else Cleartext(password)
        return secret

    def own_credentials(
        self, host: str, port: int, database: bytes, user: bytes, policy: Policy
    ) -> Credentials:
        """What auth_user logs in with: a role of the proxy's own, which no client has claimed."""
        observer = LoginObserver()
        observer.accepted = True
        return dataclasses.replace(
            self.credentials(host, port, database, user, observer, policy=policy),
            purpose=", which is the auth_user",
        )

    def credentials(
        self,
        host: str,
        port: int,
        database: bytes,
        user: bytes,
        observer: LoginObserver,
        *,
        queried: Secret | None = None,
        has_auth_query: bool = False,
        policy: Policy = ANYTHING,
    ) -> Credentials:
        """What the role of a session can log in with once more, as the files say now.

        Args:
            host: of the server, as the passfile may name it.
            port: of the server.
            database: of the session's StartupMessage; without one there it is the user's name.
            user: of the session's StartupMessage.
            observer: of the session's login, as that user.
            queried: what auth_query has found, for a role that is in neither file.
            has_auth_query: whether it was asked.
            policy: what the server may ask for.

        Raises:
            ValueError: the server has not accepted that login (yet).
        """
        if not observer.accepted:
            raise ValueError("credentials are for a role that the server has let in")
        password = observer.password
        if password is None and self._passfile is not None:
            password = self._passfile.lookup(host, port, database, user)
        secret = None if self._auth_file is None else self._auth_file.lookup(user)
        if secret is None:
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
        )


# One login


_HINT: Final = "Give the proxy the role's password in its passfile or auth_file, or set auth_query."
_HINT_MD5: Final = f"{_HINT} In the auth_file, the MD5 secret from pg_authid is enough."
_HINT_SCRAM: Final = (
    f"{_HINT} In the auth_file, the SCRAM secret from pg_authid is enough for clients that log in"
    " through the proxy by SCRAM."
)
_HINT_HBA: Final = (
    "Let pg_hba.conf ask for scram-sha-256 or another password method where the proxy connects."
)


class Authenticator(_HoldsSecrets):
    """The client's side of one login. Every authentication request of the server goes in."""

    __slots__ = ("_credentials", "_expected", "_guard", "_scram")

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._guard = Guard(credentials.policy)
        self._scram: ScramClient | None = None
        # The next request, once a conversation has begun. It keeps a server that cannot prove to
        # know the role's secret from leaving out the proof.
        self._expected: type[AuthenticationRequest] | None = None

    def respond(self, request: AuthenticationRequest) -> bytes | None:
        """The message to send now, or None if there is nothing to be sent.

        Raises:
            SQLError: 28000. There is nothing to log in with, the server asks for what the proxy
                cannot do or may not have, or the server does not prove that it knows the role's
                SCRAM secret.
        """
        if self._expected is not None and not isinstance(request, self._expected):
            raise self._failed("The server broke off its SCRAM-SHA-256 conversation.")
        self._guard.check(request)
        match request:
            case AuthenticationOk():
                return None
            case AuthenticationCleartextPassword():
                return self._password_message(self._cleartext(), request, _HINT)
            case AuthenticationMD5Password(salt):
                response = self._credentials.md5_response(salt)
                return self._password_message(response, request, _HINT_MD5)
            case AuthenticationSASL(mechanisms) if MECHANISM in mechanisms:
                return self._client_first(request)
            case AuthenticationSASLContinue(server_first) if self._scram is not None:
                return self._client_final(self._scram, server_first)
            case AuthenticationSASLFinal(server_final) if self._scram is not None:
                self._server_final(self._scram, server_final)
                return None
        raise self._failed(
            f"The server asks for {in_words(request)}, which the proxy cannot do for a client.",
            hint=_HINT_HBA,
        )

    def _cleartext(self) -> bytes | None:
        credentials, policy = self._credentials, self._credentials.policy
        if credentials.password is not None and not policy.allows_cleartext(
            ours=credentials.is_ours
        ):
            raise self._failed(
                f"The server asks for a cleartext password. {policy.unproven}", hint=CLEARTEXT_HINT
            )
        return credentials.password

    def _password_message(
        self, password: bytes | None, request: AuthenticationRequest, hint: str
    ) -> bytes:
        if password is None:
            raise self._no_password(request, hint)
        return PasswordMessage(password).serialize()

    def _client_first(self, request: AuthenticationSASL) -> bytes:
        self._scram = self._credentials.scram_client()
        if self._scram is None:
            raise self._no_password(request, _HINT_SCRAM)
        self._expected = AuthenticationSASLContinue
        return SASLInitialResponse(MECHANISM, self._scram.first_message()).serialize()

    def _client_final(self, scram: ScramClient, server_first: bytes) -> bytes:
        try:
            client_final = scram.final_message(server_first)
        except ProtocolViolation as violation:
            hint = None if self._credentials.policy.is_proven else PROVE_HINT
            raise self._failed(f"SCRAM-SHA-256: {violation}.", hint=hint) from None
        self._expected = AuthenticationSASLFinal
        return SASLResponse(client_final).serialize()

    def _server_final(self, scram: ScramClient, server_final: bytes) -> None:
        try:
            scram.verify(server_final)
        except ProtocolViolation as violation:
            raise self._failed(f"SCRAM-SHA-256: {violation}.") from None
        self._expected = AuthenticationOk

    def _no_password(self, request: AuthenticationRequest, hint: str) -> SQLError:
        return SQLError(
            INVALID_AUTHORIZATION_SPECIFICATION,
            f'no password for role "{self._role}"{self._credentials.purpose}',
            detail=f"The server asks for {in_words(request)}. {self._credentials.searched()}",
            hint=hint,
        )

    def _failed(self, detail: str, *, hint: str | None = None) -> SQLError:
        return SQLError(
            INVALID_AUTHORIZATION_SPECIFICATION,
            f'could not log in as role "{self._role}"{self._purpose}',
            detail=detail,
            hint=hint,
        )

    @property
    def _purpose(self) -> str:
        return self._credentials.purpose.removesuffix(" with")

    @property
    def _role(self) -> str:
        return self._credentials.user.decode("utf-8", "replace")
