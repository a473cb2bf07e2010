"""Two database clusters behind one proxy: an OID means something in one of them alone."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.conftest import StartProxy
from tests.support.background import failure, run, spares_of, value, wait_until
from tests.support.executors import executors
from tests.support.servers import Connection, Server, database

pytestmark = pytest.mark.every_server

OPTIONS = ("--spare-lifetime", "60s")
REVOKE = "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
GRANT = "GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC"

PEEKS = (
    "SELECT pg_background_cancel_v2(%s, %s)",
    "SELECT pg_background_wait_v2(%s, %s)",
    "SELECT pg_background_get_progress_v2(%s, %s)",
)


class Address:
    """A port that leads to one server, and later to another."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                there = socket.create_connection((self.server.host, self.server.port))
                self._sockets += [client, there]
                for pair in ((client, there), (there, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture(scope="module")
def other(server: Server) -> Iterator[Server]:
    """Another cluster of the same programs."""
    other = Server(server.bin)
    yield other
    other.close()


@pytest.fixture
def address(server: Server) -> Iterator[Address]:
    address = Address(server)
    yield address
    address.close()


def _handle(conn: Connection, job: str) -> tuple[int, int]:
    row = conn.execute("SELECT (h).* FROM pg_background_launch_v2(%s) h", [job]).fetchone()
    assert row is not None
    return row[0], row[1]


def _list(conn: Connection) -> list[int]:
    return [pid for (pid,) in conn.execute("SELECT pid FROM pg_background_list_all()")]


def _knows_nothing(conn: Connection, handle: tuple[int, int]) -> None:
    assert handle[0] not in _list(conn)
    for peek in PEEKS:
        assert failure(conn, peek, handle).sqlstate == "42501"
    outcome = conn.execute("SELECT state FROM pg_background_outcome_v2(%s, %s)", handle)
    assert outcome.fetchone() == (None,)


def test_the_same_oid_of_another_cluster_is_another_role(
    start_proxy: StartProxy, server: Server, other: Server, address: Address
) -> None:
    """The clusters even have the same address, one after the other."""
    proxy = start_proxy(*OPTIONS, upstream=f"host=127.0.0.1 port={address.port}")
    with proxy.connect() as conn:
        handle = _handle(conn, "SELECT pg_sleep(60)")
        address.server = other
        with proxy.connect() as stranger:
            _knows_nothing(stranger, handle)
        address.server = server
        with proxy.connect() as same:
            assert handle[0] in _list(same)
            same.execute("SELECT pg_background_cancel_v2(%s, %s, 10000)", handle)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_that_keeps_its_identifier_to_itself_is_known_by_its_address(
    start_proxy: StartProxy, server: Server, workers: str
) -> None:
    proxy = start_proxy(*OPTIONS, "--workers", workers)
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(server.connect())
        admin.execute(f"{REVOKE}; CREATE ROLE bob LOGIN")
        stack.callback(admin.execute, f"{GRANT}; DROP ROLE bob")
        stack.enter_context(executors(admin, "bob"))
        with proxy.connect(user="bob") as conn:
            handle = _handle(conn, "SELECT pg_sleep(60)")
            for _ in range(4):  # on both workers
                with proxy.connect(user="bob") as same:
                    assert handle[0] in _list(same)
            conn.execute("SELECT pg_background_cancel_v2(%s, %s, 10000)", handle)


def test_a_spare_of_another_cluster_is_no_spare(
    start_proxy: StartProxy, server: Server, other: Server, address: Address, db: str
) -> None:
    proxy = start_proxy(*OPTIONS, upstream=f"host=127.0.0.1 port={address.port}")
    with (
        database(other, db),
        server.connect() as admin,
        proxy.connect(dbname=db) as conn,
    ):
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares_of(admin, conn)) >= 2)
        address.server = other
        with proxy.connect(dbname=db) as stranger:
            assert value(stranger, "SHOW port") == str(other.port)
