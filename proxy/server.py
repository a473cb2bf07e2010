"""The proxy itself: it listens, makes a session of each client, and ends them all in good order.

The rule: what belongs to no single session is here: the listening sockets, the way to the server,
the cancel keys, and the jobs that are running, also those whose session has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from protocol.startup import CancelRequest, SSLRequest
from proxy.backend import send_cancel
from proxy.config import Config, ConfigError, ListenAddress
from proxy.connection import Connection
from proxy.credentials import CredentialStore
from proxy.jobs import Job
from proxy.log import logger
from proxy.session import Session
from proxy.settings import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT

P = TypeVar("P", bound=asyncio.BaseProtocol)

Address = tuple[str, int]
"""Host and port; a host that begins with a slash is the directory of a Unix socket."""

_BACKLOG = 1024
_LAST_WORDS = 2.0
"""Seconds that connections get to send what is left when the time to shut down is over."""


class Server:
    """What all sessions share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sessions: set[Session] = set()
        self.jobs: set[Job] = set()
        self.keys: dict[CancelRequest, Session] = {}
        try:
            self.credentials = CredentialStore(config.passfile, config.auth_file)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.own_settings = {
            MAX_WORKERS.name: str(config.max_workers),
            DEFAULT_QUEUE_SIZE.name: config.default_queue_size,
            WORKER_TIMEOUT.name: config.worker_timeout,
        }
        self._idle = asyncio.Event()

    # The way to the server

    async def connect(
        self, address: Address, factory: Callable[[], P]
    ) -> tuple[asyncio.Transport, P]:
        """A connection to one server. Raises OSError."""
        loop = asyncio.get_running_loop()
        host, port = address
        if host.startswith("/"):
            path = f"{host}/.s.PGSQL.{port}"
            transport, protocol = await loop.create_unix_connection(factory, path)
        else:
            transport, protocol = await loop.create_connection(factory, host, port)
        return transport, protocol

    async def connect_upstream(self, factory: Callable[[], P]) -> tuple[Address, P]:
        """A connection to the first of the servers that takes it, and which one it is.

        Raises OSError, with the last server's reason, or TimeoutError.
        """
        *others, last = self.config.upstream.hosts
        for address in others:
            with contextlib.suppress(OSError):
                return address, await self._connect_in_time(address, factory)
        return last, await self._connect_in_time(last, factory)

    async def _connect_in_time(self, address: Address, factory: Callable[[], P]) -> P:
        try:
            async with asyncio.timeout(self.config.connect_timeout or None):
                return (await self.connect(address, factory))[1]
        except TimeoutError:
            host, port = address
            raise TimeoutError(f"connection to {host}:{port} timed out") from None

    async def cancel(self, request: CancelRequest) -> None:
        """Cancel what waits in the proxy, or pass the request on to the server."""
        session = self.keys.get(request)
        call = session.interception if session is not None else None
        if call is not None and call.is_waiting:
            call.cancel()
            return
        address = session.address if session is not None else self.config.upstream.hosts[0]
        await self._cancel_at(address, request)
        # The server may have done its part of the call before it heard of this.
        if call is not None and call.is_calling:
            call.cancel()

    async def _cancel_at(self, address: Address, request: CancelRequest) -> None:
        async def connect(factory: Callable[[], P]) -> tuple[asyncio.Transport, P]:
            return await self.connect(address, factory)

        try:
            async with asyncio.timeout(self.config.connect_timeout or None):
                await send_cancel(connect, request)
        except OSError as error:
            logger.warning("could not pass on a cancel request: %s", error)

    # Its life

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then let sessions and jobs end.

        Raises OSError if the server cannot be reached or an address is taken.
        """
        await self._probe()
        stop = asyncio.Event()
        now = asyncio.Event()
        loop = asyncio.get_running_loop()

        def signalled() -> None:
            (now if stop.is_set() else stop).set()

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, signalled)
        async with contextlib.AsyncExitStack() as listeners:
            for address in self.config.listen:
                listener = await self._listen(address)
                listeners.callback(listener.close)
                if address.socket_path is not None:
                    # Python removes it only from 3.13 on.
                    listeners.callback(address.socket_path.unlink, missing_ok=True)
            await stop.wait()
        await self._shut_down(now)

    async def _probe(self) -> None:
        """Is there a server? Asks it for TLS, as a client does first, and hangs up."""

        class Probe(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.answered = asyncio.get_running_loop().create_future()
                self.transport = cast(asyncio.Transport, transport)
                self.transport.write(SSLRequest().serialize())

            def data_received(self, data: bytes) -> None:
                self._done()

            def connection_lost(self, exc: Exception | None) -> None:
                self._done()

            def _done(self) -> None:
                if not self.answered.done():
                    self.answered.set_result(None)

        try:
            (host, port), probe = await self.connect_upstream(Probe)
        except (OSError, TimeoutError) as error:
            raise OSError(f"cannot reach the server {self.config.upstream}: {error}") from None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(probe.answered, self.config.connect_timeout or None)
        probe.transport.close()
        logger.info("passing on to %s:%s", host, port)

    async def _listen(self, address: ListenAddress) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        try:
            if address.socket_path is not None:
                _remove_stale(address.socket_path)
                listener = await loop.create_unix_server(
                    self._client, str(address.socket_path), backlog=_BACKLOG
                )
                logger.info("listening on Unix socket %s", address.socket_path)
                return listener
            host = None if address.host == "*" else address.host
            listener = await loop.create_server(self._client, host, address.port, backlog=_BACKLOG)
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror or error}") from None
        for name in sorted({listening.getsockname()[:2] for listening in listener.sockets}):
            logger.info("listening on %s", ListenAddress(*name))
        return listener

    def _client(self) -> Connection:
        return Session(self).client

    async def _shut_down(self, now: asyncio.Event) -> None:
        logger.info("shutting down: %s", self._what_runs())
        ways_out = [
            asyncio.ensure_future(self._all_done()),
            asyncio.ensure_future(now.wait()),
        ]
        await asyncio.wait(
            ways_out,
            timeout=self.config.shutdown_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for way in ways_out:
            way.cancel()
        if self.sessions or self.jobs:
            logger.warning("ending what still runs: %s", self._what_runs())
        closing = [session.client for session in self.sessions]
        jobs = tuple(self.jobs)
        for session in tuple(self.sessions):
            session.shut_down()
        await asyncio.gather(*(self._cancel_at(job.address, job.cancel_request()) for job in jobs))
        for job in jobs:
            job.abandon()
        deadline = asyncio.get_running_loop().time() + _LAST_WORDS
        while any(client.is_open for client in closing):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        logger.info("shut down")

    async def _all_done(self) -> None:
        while self.sessions or self.jobs:
            self._idle.clear()
            await self._idle.wait()

    def _what_runs(self) -> str:
        return f"{len(self.sessions)} sessions, {len(self.jobs)} jobs"

    def session_ended(self, session: Session) -> None:
        """One that has closed its connections."""
        self.sessions.discard(session)
        self._idle.set()

    def job_ended(self, job: Job) -> None:
        """One whose backend is done."""
        self.jobs.discard(job)
        self._idle.set()


def _remove_stale(path: Path) -> None:
    """Remove the socket of a proxy that is gone. Raises OSError if one is listening there."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError("another process is listening there")


async def serve(config: Config) -> int:
    """Run the proxy until it is told to stop; the exit code.

    Raises OSError if it cannot start, ConfigError for a malformed auth_file.
    """
    await Server(config).run()
    return 0
