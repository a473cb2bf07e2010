"""A relay between proxy and server that calls the test when a login begins and when it ends."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from protocol.kinds import B
from protocol.startup import CancelRequest, SSLRequest
from tests.support.servers import Server

_TIMEOUT = 30.0
_CODE = struct.Struct("!ii")


@dataclass
class Connection:
    """One connection of the proxy's.

    Attributes:
        sent: what the proxy has sent on it.
    """

    sent: bytearray = field(default_factory=bytearray)

    @property
    def startup(self) -> bytes:
        """The startup packet, if it has been sent; it comes in one piece."""
        return bytes(self.sent) if b"user\0" in self.sent else b""

    @property
    def is_cancel_request(self) -> bool:
        """Whether it has sent one, as its first packet or after a request for TLS."""
        first = _CODE.size if self.sent[: _CODE.size] == SSLRequest().serialize() else 0
        if len(self.sent) < first + _CODE.size:
            return False
        major, minor = CancelRequest.code
        _, code = _CODE.unpack_from(self.sent, first)
        return bool(code == major << 16 | minor)


class UpstreamRelay:
    """Made by `upstream_relay`.

    Attributes:
        upstream: the connection string for a proxy.
        connections: all so far.
        at_login: called with False when a login begins, before the server gets it; and with True
            when it is complete, before the proxy learns that.
        at_answer: called with each piece of what the server sends after a login, before the proxy
            gets it.
    """

    def __init__(self, server: Server) -> None:
        self._address = server.host, server.port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.upstream = f"host=127.0.0.1 port={self._listening.getsockname()[1]}"
        self.connections: list[Connection] = []
        self.at_login: Callable[[Connection, bool], None] = lambda connection, is_complete: None
        self.at_answer: Callable[[Connection], None] = lambda connection: None
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                proxy, _ = self._listening.accept()
                connection = Connection()
                self.connections.append(connection)
                server = socket.create_connection(self._address, timeout=_TIMEOUT)
                server.settimeout(None)
                for target in (self._from_proxy, self._from_server):
                    arguments = (connection, proxy, server)
                    self._threads.append(
                        threading.Thread(target=target, args=arguments, daemon=True)
                    )
                    self._threads[-1].start()

    def _from_proxy(
        self, connection: Connection, proxy: socket.socket, server: socket.socket
    ) -> None:
        with contextlib.suppress(OSError):
            while data := proxy.recv(65536):
                began = connection.startup
                connection.sent += data
                if connection.startup and not began:
                    self.at_login(connection, False)
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _from_server(
        self, connection: Connection, proxy: socket.socket, server: socket.socket
    ) -> None:
        has_logged_in = False
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if has_logged_in:
                    self.at_answer(connection)
                # The last message of a login, whole: six bytes.
                elif data[-6:-1] == bytes([B.READY_FOR_QUERY, 0, 0, 0, 5]):
                    has_logged_in = True
                    self.at_login(connection, True)
                proxy.sendall(data)
        for each in (proxy, server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        """Closes it. The proxy must have ended."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(_TIMEOUT)
            assert not thread.is_alive()


@contextlib.contextmanager
def upstream_relay(server: Server) -> Iterator[UpstreamRelay]:
    """A relay for the proxies that a test starts; they must end within the block."""
    relay = UpstreamRelay(server)
    try:
        yield relay
    finally:
        relay.close()
