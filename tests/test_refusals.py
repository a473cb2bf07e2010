"""Calls from inside the database for which no channel can be opened: the statement is canceled, the
client gets the reason, and nothing else is canceled."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from protocol.startup import CancelRequest
from proxy.backends.backend import send_cancel
from proxy.extension.questions import Message
from proxy.extension.refusal import Refusal
from tests.conftest import StartProxy
from tests.support import background
from tests.support.background import failure, message, wait_until
from tests.support.in_database import inside, one, wait_until_nothing_is_left, with_extension
from tests.support.servers import DEFAULT_HBA, Connection, Proxy, Server
from tests.support.statement import Statement
from tests.support.upstream_relay import UpstreamRelay
from tests.support.wire import Gate
from tests.support.wire import gate as closed_gate

P = TypeVar("P", bound=asyncio.BaseProtocol)

pytestmark = pytest.mark.every_server

OPTIONS = ("--spares=0", "--spare-lifetime=1ms")
"""Of a proxy that keeps no other connection."""

NO_CHANNEL = {
    "limit": ("ALTER ROLE lonely CONNECTION LIMIT 1", "53300"),
    "nologin": ("ALTER ROLE lonely NOLOGIN", "28000"),
    "expired": ("ALTER ROLE lonely PASSWORD 'lonely' VALID UNTIL '2000-01-01'", "28P01"),
    "password": ("ALTER ROLE lonely PASSWORD 'another'", "28P01"),
    "connect": ("REVOKE CONNECT ON DATABASE {} FROM PUBLIC", "53000"),
}
NO_LOGIN, SQLSTATE = NO_CHANNEL["nologin"]
CALL = "SELECT inside('pg_background_launch(''SELECT 1'')')"
CHANNELS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name"
    " ~ '^[0-9a-f]{12}' AND datname = current_database()"
)
"""Ends those that sessions have."""
NO_ANSWER = "no answer to a call from inside the database"
CANCELED = ("57014", "canceling statement due to user request")
CATCHES = """
CREATE FUNCTION catches() RETURNS text LANGUAGE plpgsql AS $f$
BEGIN
  PERFORM pg_background_launch('SELECT 1');
  RETURN 'launched';
EXCEPTION WHEN OTHERS OR query_canceled THEN
  RETURN SQLSTATE;
END $f$"""


@pytest.fixture(autouse=True, scope="module")
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the extension."""
    yield from with_extension(server, proxy, scratch)


@pytest.fixture(autouse=True)
def nothing_is_left(observer: Connection) -> Iterator[None]:
    """After each test."""
    yield
    wait_until_nothing_is_left(observer)


@pytest.fixture
def gate(server: Server, scratch: str) -> Iterator[Gate]:
    """A closed gate in the module's database."""
    with closed_gate(server, scratch) as gate:
        yield gate


@pytest.fixture
def quiet(server: Server, relay: UpstreamRelay, scratch: str) -> Iterator[Proxy]:
    """A proxy that keeps no connection."""
    with Proxy(relay.upstream, *OPTIONS) as proxy:
        yield proxy
        assert "Traceback" not in proxy.log, proxy.log


@pytest.fixture
def lonely(server: Server, quiet: Proxy, scratch: str) -> Iterator[Connection]:
    """A session of a role with a password."""
    server.set_hba(["host all lonely 127.0.0.1/32 password", *DEFAULT_HBA])
    with server.connect(dbname=scratch) as admin:
        admin.execute("CREATE ROLE lonely LOGIN PASSWORD 'lonely' IN ROLE pgbackground_role")
        admin.execute(CATCHES)
        with quiet.connect(dbname=scratch, user="lonely", password="lonely") as conn:
            yield conn
        admin.execute("DROP FUNCTION catches()")
        admin.execute(f'GRANT CONNECT ON DATABASE "{scratch}" TO PUBLIC'.encode())
        admin.execute("DROP ROLE lonely")
    server.set_hba()


@pytest.fixture
def settings_wait(observer: Connection, gate: Gate) -> Iterator[Gate]:
    """The function waits at a gate that gathers the settings, when its question is on its way."""
    name = "'_pg_background_settings()'::regprocedure"
    whole = one(observer, f"SELECT pg_get_functiondef({name})")
    waits = gate.sql.replace("SELECT pg_", "PERFORM pg_catalog.pg_")
    observer.execute(whole.replace("BEGIN", f"BEGIN {waits}", 1).encode())
    yield gate
    gate.open()
    observer.execute(whole.encode())


def have_the_proxy_serve_others(proxy: Proxy, dbname: str) -> None:
    """What it was about to do it has done then."""
    with proxy.connect(dbname=dbname) as other:
        for _ in range(3):
            inside(other, "(pg_background_stats()).workers_active")


@pytest.mark.parametrize("why", NO_CHANNEL)
def test_without_a_channel_a_call_fails_at_once(
    lonely: Connection, observer: Connection, scratch: str, why: str
) -> None:
    change, sqlstate = NO_CHANNEL[why]
    observer.execute(change.format(f'"{scratch}"').encode())
    begin = time.monotonic()
    for _ in range(3):
        error = failure(lonely, CALL)
        assert error.sqlstate == sqlstate
        assert error.diag.message_hint
        assert "_pg_background" not in str(error)
        # What comes next is not disturbed.
        assert one(lonely, "SELECT 1 FROM pg_sleep(0.02)") == 1
    assert one(lonely, "SELECT catches()") == "57014"
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    "sql", [f"SELECT pg_background_launch(({CALL}))", f"SELECT pg_background_detach(1), ({CALL})"]
)
def test_the_reason_is_told_in_the_arguments_of_a_call(
    lonely: Connection, observer: Connection, sql: str
) -> None:
    """The proxy makes the outer one itself, and has the server evaluate the rest."""
    observer.execute(NO_LOGIN)
    error = failure(lonely, sql)
    assert error.sqlstate == SQLSTATE
    assert "_pg_background" not in str(error)


def test_a_job_without_a_channel_fails_at_once(lonely: Connection, observer: Connection) -> None:
    job = background.launch(lonely, "SELECT catches() FROM pg_sleep(1)")
    observer.execute(NO_LOGIN)
    begin = time.monotonic()
    [(caught,)] = background.result(lonely, job, "t text")
    assert caught == "57014"
    assert time.monotonic() - begin < 15


def test_a_job_tells_the_reason(lonely: Connection, observer: Connection, gate: Gate) -> None:
    job = background.launch(lonely, gate.sql + CALL)
    observer.execute(NO_LOGIN)
    gate.open()
    error = failure(lonely, f"SELECT * FROM pg_background_result({job}) AS (t text)")
    assert error.sqlstate == SQLSTATE
    assert error.diag.message_hint
    assert "_pg_background" not in str(error)


def test_the_reason_is_told_wherever_the_function_was(
    lonely: Connection, observer: Connection, quiet: Proxy, scratch: str, settings_wait: Gate
) -> None:
    """It is canceled where it waits for the answer, not before."""
    observer.execute(NO_LOGIN)
    call = Statement(lonely, CALL)
    settings_wait.wait_until_one_waits()
    quiet.wait_for_log(NO_ANSWER)
    have_the_proxy_serve_others(quiet, scratch)
    settings_wait.wait_until_one_waits()
    assert not call.is_over
    settings_wait.open()
    assert call.error.sqlstate == SQLSTATE
    assert call.error.diag.message_hint
    assert "_pg_background" not in str(call.error)


def test_a_channel_is_lost_before_the_function_has_seen_it(
    lonely: Connection, observer: Connection, quiet: Proxy, scratch: str, settings_wait: Gate
) -> None:
    """The function would search for it for 20 seconds."""
    call = Statement(lonely, CALL)
    settings_wait.wait_until_one_waits()
    shows_a_word = CHANNELS.replace("}'", "}p'")
    wait_until(lambda: observer.execute(shows_a_word).fetchall())
    wait_until(lambda: not observer.execute(CHANNELS).fetchall())
    have_the_proxy_serve_others(quiet, scratch)
    assert not call.is_over
    begin = time.monotonic()
    settings_wait.open()
    assert message(call.error) == ("08006", "the channel is gone")
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("is_one_query", [False, True])
def test_another_statement_is_canceled_by_who_cancels_it(
    lonely: Connection, observer: Connection, gate: Gate, is_one_query: bool
) -> None:
    """Though the code of the one before has caught our cancel: then no error has told the
    reason."""
    if is_one_query and observer.info.server_version < 170000:
        pytest.skip("the server signals twice for a cancel, and the second may meet the next one")
    observer.execute(NO_LOGIN)
    sql = "SELECT catches(); "
    if not is_one_query:
        assert one(lonely, sql) == "57014"
        sql = ""
    waiting = Statement(lonely, f"{sql}{gate.sql}SELECT 1")
    gate.wait_until_one_waits()
    waiting.cancel()
    assert message(waiting.error) == CANCELED


@pytest.mark.parametrize("calls", [1, 2])
def test_who_has_an_answer_is_not_canceled(
    start_proxy: StartProxy, observer: Connection, scratch: str, gate: Gate, calls: int
) -> None:
    """The channel goes while its session's code does something else."""
    proxy = start_proxy(*OPTIONS)
    with proxy.connect(dbname=scratch) as conn:
        call = "PERFORM pg_background_stats();"
        body = f"{call * calls} {gate.sql.replace('SELECT', 'PERFORM')} RETURN 'done';"
        conn.execute(
            "CREATE FUNCTION pg_temp.goes_on() RETURNS text LANGUAGE plpgsql AS"
            f" $$ BEGIN {body} END $$".encode()
        )
        running = Statement(conn, "SELECT pg_temp.goes_on()")
        gate.wait_until_one_waits()
        assert observer.execute(CHANNELS).fetchall() == [(True,)]
        wait_until(lambda: not observer.execute(CHANNELS).fetchall())
        have_the_proxy_serve_others(proxy, scratch)
        gate.open()
        assert running.value == "done"
        assert inside(conn, "(pg_background_stats()).workers_active") == "0"


async def test_a_cancel_that_comes_too_late_is_not_sent() -> None:
    """The statement may end otherwise while the proxy connects to cancel it."""
    sent: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()

        async def connect(factory: Callable[[], P]) -> P:
            loop = asyncio.get_running_loop()
            return (await loop.create_connection(factory, *address))[1]

        for is_meant in (False, True):
            request = CancelRequest(1, b"2345")
            sending = asyncio.ensure_future(
                send_cancel(connect, request, iter([is_meant]).__next__)
            )
            connection, _ = await asyncio.to_thread(listening.accept)
            with connection:
                sent.append(await asyncio.to_thread(connection.recv, 100))
            await sending
    assert sent == [b"", request.serialize()]


async def test_which_cancels_are_meant() -> None:
    """One for each question, for a function that waits, and no longer than it can wait."""
    asked: list[Callable[[], bool]] = []
    refusal = Refusal(asked.append)
    questions = [Message(b"", b"", nonce, b"ask", ()) for nonce in (b"1", b"2")]
    for question in questions:
        refusal.waits(b"0")
        refusal.refuse(question, ConnectionError("lost"))
        assert not asked[int(question.nonce) - 1 :]
        refusal.waits(b"0")
        assert not asked[int(question.nonce) - 1 :]
        refusal.waits(question.nonce)
        refusal.waits(question.nonce)
        refusal.forget()
    refusal.waits(b"2")
    assert [is_meant() for is_meant in asked] == [False, False]
    # One that has been heard to wait already.
    refusal.waits(b"1")
    refusal.refuse(questions[0], ConnectionError("lost"))
    assert [is_meant() for is_meant in asked] == [False, False, True]
    # One that may have its answer.
    refusal.forget()
    refusal.waits(b"2")
    refusal.is_shown()
    refusal.refuse(questions[1], ConnectionError("lost"))
    assert len(asked) == 3


async def test_who_may_have_given_up_is_not_canceled() -> None:
    """A function says 18 times or more that it waits; after the last time it may wait no longer
    than a twentieth of a second."""
    asked: list[Callable[[], bool]] = []
    refusal = Refusal(asked.append)
    question = Message(b"", b"", b"1", b"ask", ())
    for times in (17, 18):
        refusal.forget()
        for _ in range(times):
            refusal.waits(question.nonce)
        await asyncio.sleep(0.06)
        refusal.refuse(question, ConnectionError("lost"))
    assert len(asked) == 1
    # It has not given up.
    refusal.waits(question.nonce)
    assert [is_meant() for is_meant in asked] == [False, True]
    # By the time that the proxy has connected it may have.
    refusal.forget()
    refusal.refuse(question, ConnectionError("lost"))
    for _ in range(18):
        refusal.waits(question.nonce)
    await asyncio.sleep(0.06)
    assert [is_meant() for is_meant in asked[2:]] == [False]


def test_a_cancel_in_time_is_sent_once(
    lonely: Connection, observer: Connection, relay: UpstreamRelay
) -> None:
    observer.execute(NO_LOGIN)
    first = len(relay.connections)
    assert failure(lonely, CALL).sqlstate == SQLSTATE
    assert [late.is_cancel_request for late in relay.connections[first:]] == [False, True]
