"""A mock server, which plays a real server's recorded answers to every client.

It stands behind the process whose memory is measured, with thousands of idle connections. Real
backends would take some 3 MB each, and exhaust the machine's memory.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import replace
from typing import Self

from bench.client import BenchError
from bench.targets import Target
from protocol.framing import frame
from protocol.messages import BackendKeyData, Terminate
from protocol.startup import SSLRequest, StartupMessage, parse_startup_packet
from tests.support.wire import Wire

QUERY = "SELECT 1"
START_TIMEOUT = 10.0


class Playback:
    """Records the login and the answer to QUERY of a server that trusts us, and plays them.

    Runs in a thread, between ``__enter__`` and ``__exit__``; ``target`` is then its address.
    """

    def __init__(self, server: Target) -> None:
        self.target = server
        with Wire((server.host, server.port), login=False) as wire:
            parameters = {b"user": server.user.encode(), b"database": server.dbname.encode()}
            wire.send(StartupMessage(parameters).serialize())
            self.login = wire.until_ready()
            answer = wire.query(QUERY)
        self.answer = b"".join(frame(ord(kind), body) for kind, body in answer)
        self.pids = itertools.count(100_000)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def greeting(self) -> bytes:
        """The recorded login, with a key of its own for each session."""
        key = BackendKeyData(next(self.pids), b"key!").serialize()
        return b"".join(
            key if ord(kind) == BackendKeyData.type else frame(ord(kind), body)
            for kind, body in self.login
        )

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT):
            raise BenchError("the playback did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_TIMEOUT)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await self._loop.create_server(
            lambda: _Session(self), "127.0.0.1", 0, backlog=1024
        )
        port = server.sockets[0].getsockname()[1]
        self.target = replace(self.target, host="127.0.0.1", port=port)
        self._ready.set()
        await self._stop.wait()
        server.close()


class _Session(asyncio.Protocol):
    """One client. Its packets are short, so each comes in one piece."""

    def __init__(self, playback: Playback) -> None:
        self._playback = playback
        self._is_greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._is_greeted:
            if data[0] == Terminate.type:
                self._transport.close()
            else:
                self._transport.write(self._playback.answer)
            return
        packet = parse_startup_packet(data[4:])
        if isinstance(packet, SSLRequest):
            self._transport.write(b"N")
        elif isinstance(packet, StartupMessage):
            self._is_greeted = True
            self._transport.write(self._playback.greeting())
        else:
            self._transport.close()
