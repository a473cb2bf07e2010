"""A client's login: everything between the startup packet and AuthenticationOk.

Invariant: the server always decides who is let in. There are three ways to ask it:

- The messages pass through. Only SCRAM-SHA-256-PLUS is removed from the server's offer: it binds a
  login to one TLS connection, and here there are two.
- ``auth_type = plain``: whatever the server asks for, the proxy asks the client for the password in
  clear text, and answers the server with it.
- SCRAM on both sides, where it cannot pass through: a client with TLS, which could use channel
  binding, reports that the server does not offer it, which a server with TLS takes for an attack.
  With the role's secret the proxy checks the client itself, and recovers from its proof the key to
  log in with. A client with a wrong password fails at the server, with a random key; so does, if
  the proxy knows any secrets, a client whose role it does not know.

During the login messages are read whole. None is longer than `_LIMIT`, and the server's are no
longer than libpq allows (`limit_before_login`). The client's messages are read only when the server
has asked for something; the relay gets what the client sends ahead.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from protocol.errors import (
    INVALID_AUTHORIZATION_SPECIFICATION,
    INVALID_PASSWORD,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.framing import MessageBuffer, frame, limit_before_login
from protocol.kinds import B, F
from protocol.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    ErrorResponse,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from protocol.scram import MECHANISM, ClientFirst, ScramServer
from proxy.auth.authenticator import Authenticator
from proxy.auth.checks import Check
from proxy.auth.credentials import Credentials
from proxy.auth.methods import Guard
from proxy.auth.observer import LoginObserver
from proxy.auth.secret import Cleartext, Secret
from proxy.config.require_auth import Policy
from proxy.net.connection import Connection

_PLUS: Final = MECHANISM + b"-PLUS"
_LIMIT: Final = 64 * 1024
"""Bytes of a message; PostgreSQL's own limit for clients at this stage."""

_DOOMED_HINT: Final = (
    "If the password is right, the proxy does not have the role's password or SCRAM secret"
    " (auth_file, passfile or auth_query): it ends TLS on both sides, so SCRAM channel binding"
    " cannot reach the server. channel_binding=disable in the client does without."
)
_BINDING_HINT: Final = (
    "The proxy ends TLS on both sides, so SCRAM channel binding cannot reach the server. Let the"
    " proxy know the role's SCRAM secret (auth_file or auth_query), or set auth_type = plain in the"
    " proxy, or channel_binding=disable in the client."
)


class RefusedError(ServerError):
    """The server sent an error before it asked for anything, as pg_hba.conf may cause.

    `messages`: the server's messages for the client, this error last.
    """

    def __init__(self, response: ErrorResponse, messages: bytes) -> None:
        super().__init__(response)
        self.messages = messages


class _ServerSpokeError(Exception):
    """The server sent something instead of waiting for the client's answer."""


class _Mailbox:
    """Messages from one side."""

    def __init__(self, source: Connection, news: asyncio.Event) -> None:
        self._source = source
        self._news = news
        self._buffer = MessageBuffer()
        self.ended = False

    def feed(self, data: bytes) -> None:
        self._buffer.feed(data)
        if len(self._buffer) > _LIMIT:
            self._source.pause_reading()
        self._news.set()

    def bound(self, limit: Callable[[int], int]) -> None:
        """Set the limit of a message, by type."""
        self._buffer.limit = limit

    def end(self) -> None:
        self.ended = True
        self._news.set()

    def next(self) -> tuple[int, bytes] | None:
        """The next message, if any. Raises ProtocolViolation for one that is too long."""
        message = self._buffer.next_message()
        if message is None and len(self._buffer) > _LIMIT:
            raise ProtocolViolation("invalid message length")
        if len(self._buffer) <= _LIMIT:
            self._source.resume_reading()
        return message

    def take_rest(self) -> bytes:
        self._source.resume_reading()
        return self._buffer.take_rest()

    def __bool__(self) -> bool:
        return len(self._buffer) > 0 or self.ended


class Login:
    """One login. `run` it once.

    Args:
        client, server: their connections, whose input the login gets while it runs.
        user: the role in the startup packet.
        observer: sees the client's side.
        find_check: returns how to check the client, if SCRAM cannot pass; None without secrets.
        asks_password: None unless auth_type is plain; then whether this client's connection may
            carry a password in clear text.
        policy: what the server may ask for.

    Attributes:
        sqlstate: of the error with which the server has refused the client; None if it has not.
    """

    def __init__(
        self,
        client: Connection,
        server: Connection,
        user: bytes,
        observer: LoginObserver,
        find_check: Callable[[], Awaitable[Check | None]],
        *,
        asks_password: bool | None,
        policy: Policy,
    ) -> None:
        self._client = client
        self._server = server
        self._user = user
        self._observer = observer
        self._find_check = find_check
        self._asks_password = asks_password
        self._policy = policy
        self._guard = Guard(policy)
        self.sqlstate: str | None = None
        self._news = asyncio.Event()
        self._from_client = _Mailbox(client, self._news)
        self._from_server = _Mailbox(server, self._news)
        # The server's messages before the login began, to be passed on when it does.
        self._preface: bytes | None = b""
        # The server's request that the client has to answer; None if it is not its turn.
        self._asked: AuthenticationRequest | None = None
        # What to do if the server refuses the client, by SQLSTATE.
        self._hints: dict[str, str] = {}
        # Answers the server in the client's place, if set.
        self._authenticator: Authenticator | None = None
        # Then sent to the client before AuthenticationOk.
        self._last_word = b""
        client.receive = self._from_client.feed
        server.receive = self._from_server.feed
        self._from_server.bound(limit_before_login)

    def server_ended(self) -> None:
        """The server will send no more."""
        self._from_server.end()

    def client_ended(self) -> None:
        """The client will send no more; what it has sent may be enough."""
        self._from_client.end()

    def take_rest(self) -> bytes:
        """What the client has sent and the login has not taken."""
        return self._from_client.take_rest()

    async def run(self) -> tuple[bytes, bytes]:
        """Run until the server lets the client in; return what client and server sent after that.

        Raises:
            RefusedError: the server refused before the client got anything; it can be tried again.
            ConnectionError: the server has closed the connection, after its error if any.
            SQLError: the login cannot go on, and the proxy knows why.
            ProtocolViolation: one side does not speak the protocol.
        """
        while not await self._step():
            pass
        return self._from_client.take_rest(), self._from_server.take_rest()

    async def _step(self) -> bool:
        """Handle the next message of either side. Returns whether the client is in."""
        self._news.clear()
        try:
            if (message := self._from_server.next()) is not None:
                return await self._server_message(*message)
            if self._from_server.ended:
                raise ConnectionError("the server closed the connection")
            if self._asked and (message := self._from_client.next()) is not None:
                await self._client_message(_answer(*message))
            elif self._asked and self._from_client.ended:
                raise ConnectionError("the client closed the connection")
            else:
                await self._news.wait()
        except _ServerSpokeError:
            pass  # its message is the next one
        return False

    # Messages of the server

    async def _server_message(self, kind: int, body: bytes) -> bool:
        """Returns whether the client is in."""
        if kind == B.AUTHENTICATION:
            if self._preface:
                self._client.write(self._preface)
            self._preface = None
            request = parse_authentication(body)
            self._guard.check(request)
            if self._asks_password is not None and not isinstance(request, AuthenticationOk):
                await self._ask_for_password()
            if self._authenticator is not None:
                self._answer_server(self._authenticator, request)
            else:
                self._pass_on(request)
            return isinstance(request, AuthenticationOk)
        message = frame(kind, body)
        if kind == B.ERROR_RESPONSE:
            error = ErrorResponse.parse(body)
            self.sqlstate = error.sqlstate
            if self._preface is not None:
                raise RefusedError(error, self._preface + message)
            if (hint := self._hints.get(error.sqlstate)) is not None:
                message = error.with_fields(H=hint.encode()).serialize()
        if self._preface is None:
            self._client.write(message)
        else:
            self._preface += message
            if len(self._preface) > _LIMIT:
                raise ProtocolViolation("the server says too much before the login")
        return False

    def _pass_on(self, request: AuthenticationRequest) -> None:
        """Pass on a request, whose answer goes to the server."""
        self._ask(_offer(request) if isinstance(request, AuthenticationSASL) else request)
        is_last = isinstance(request, AuthenticationOk | AuthenticationSASLFinal)
        self._asked = None if is_last else request

    def _ask(self, request: AuthenticationRequest) -> None:
        """Send the client a request, and show it to the observer."""
        message = request.serialize()
        self._observer.backend_message(B.AUTHENTICATION, message[5:])
        self._client.write(message)

    def _answer_server(self, authenticator: Authenticator, request: AuthenticationRequest) -> None:
        answer = authenticator.respond(request)
        if answer is not None:
            self._server.write(answer)
        elif isinstance(request, AuthenticationOk):
            self._client.write(self._last_word)
            self._ask(request)

    # Messages of the client

    async def _client_message(self, body: bytes) -> None:
        """Pass on the answer to the server's request."""
        request, self._asked = self._asked, None
        self._observer.frontend_message(body)
        if isinstance(request, AuthenticationSASL) and _PLUS in request.mechanisms:
            first = _first_that_could_bind(body)
            if first is not None and await self._scram_on_both_sides(first, request):
                return
        self._server.write(frame(F.PASSWORD_MESSAGE, body))

    async def _client_answer(self) -> bytes:
        """The client's answer to our own question. Raises _ServerSpokeError."""
        while (message := self._from_client.next()) is None:
            if self._from_server:
                raise _ServerSpokeError
            if self._from_client.ended:
                raise ConnectionError("the client closed the connection")
            self._news.clear()
            await self._news.wait()
        body = _answer(*message)
        self._observer.frontend_message(body)
        return body

    async def _ask_for_password(self) -> None:
        """Ask the client once; then the proxy answers the server with the password."""
        if self._authenticator is not None:
            return
        if not self._asks_password:
            raise SQLError(
                INVALID_AUTHORIZATION_SPECIFICATION,
                "the password may not be sent over this connection",
                detail="With auth_type = plain the proxy asks for it in clear text, and only over"
                " TLS, a Unix socket or a loopback address.",
                hint="Connect with sslmode=require.",
                severity="FATAL",
            )
        self._ask(AuthenticationCleartextPassword())
        password = PasswordMessage.parse(await self._client_answer()).password
        self._authenticate_with(password=password)

    async def _scram_on_both_sides(self, client_first: bytes, request: AuthenticationSASL) -> bool:
        """Check the client, then log in for it. Returns false if nothing is known to check with."""
        check = await self._find_check()
        if check is None:
            self._hints[INVALID_AUTHORIZATION_SPECIFICATION] = _BINDING_HINT
            return False
        known = check.known
        conversation = ScramServer(check.secret)
        self._ask(AuthenticationSASLContinue(conversation.first_message(client_first)))
        client_final = SASLResponse.parse(await self._client_answer()).response
        if not conversation.verify(client_final) or known is None:
            self._hints[INVALID_PASSWORD] = _DOOMED_HINT
            self._authenticate_with(client_key=secrets.token_bytes(32))
        else:
            if isinstance(known, Cleartext):
                self._authenticate_with(password=known.password, is_ours=True)
            else:
                self._authenticate_with(client_key=conversation.client_key, secret=known)
            self._last_word = AuthenticationSASLFinal(conversation.final_message()).serialize()
        assert self._authenticator is not None
        self._answer_server(self._authenticator, request)
        return True

    def _authenticate_with(
        self,
        *,
        password: bytes | None = None,
        client_key: bytes | None = None,
        secret: Secret | None = None,
        is_ours: bool = False,
    ) -> None:
        """From now on, the proxy answers the server with these credentials."""
        credentials = Credentials(
            *(self._user, password, secret, self._observer),
            client_key=client_key,
            purpose="",
            policy=self._policy,
            is_ours=is_ours,
        )
        self._authenticator = Authenticator(credentials)


def _answer(kind: int, body: bytes) -> bytes:
    """Raises ProtocolViolation, with PostgreSQL's message, for anything but an answer."""
    if kind != F.PASSWORD_MESSAGE:
        raise ProtocolViolation(f"expected password response, got message type {kind}")
    return body


def _offer(request: AuthenticationSASL) -> AuthenticationSASL:
    """The request with those mechanisms that work through the proxy. Raises SQLError: none does."""
    mechanisms = tuple(name for name in request.mechanisms if not name.endswith(b"-PLUS"))
    if not mechanisms:
        offered = b", ".join(request.mechanisms).decode("ascii", "replace")
        raise SQLError(
            INVALID_AUTHORIZATION_SPECIFICATION,
            "no SASL mechanism of the server works through the proxy",
            detail=f"The server offers {offered or 'none'}, and the proxy cannot bind to its"
            " TLS connection.",
            severity="FATAL",
        )
    return AuthenticationSASL(mechanisms)


def _first_that_could_bind(body: bytes) -> bytes | None:
    """The client-first-message, if the client could use channel binding but was not offered it."""
    try:
        response = SASLInitialResponse.parse(body)
        first = ClientFirst.parse(response.response or b"")
    except ProtocolViolation:
        return None  # the server will report what is wrong with it
    could = response.mechanism == MECHANISM and first.gs2_header.startswith(b"y")
    return response.response if could else None
