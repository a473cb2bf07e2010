"""A cancel request that reaches the server between two requests that the proxy makes for one call,
when the server has nothing to cancel. The call must fail all the same, at whichever it comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from protocol import messages as m
from tests.support.background import wait_until
from tests.support.in_database import one
from tests.support.recorder import S, b, d, e, p, q, serialized
from tests.support.servers import Connection, Proxy, Server
from tests.support.upstream_relay import Connection as Upstream
from tests.support.upstream_relay import UpstreamRelay
from tests.support.wire import Wire, error_of

CALL = "SELECT pg_background_launch('SELECT pg_sleep(60)')"
RUNNING = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"


BATCHES = {
    "query": [q(CALL)],
    "in FROM": [q(CALL.replace("pg", "* FROM pg", 1))],
    "the second of a query": [q(f"SELECT pg_background_launch('SELECT 1'); {CALL}")],
    "extended": [p(CALL), b(), d(b"P"), e(), S],
}


@pytest.fixture(scope="module", params=["without", "with"])
def database(request: pytest.FixtureRequest, server: Server, proxy: Proxy, scratch: str) -> str:
    """Without the extension, then with it."""
    if request.param == "with":
        with proxy.connect(dbname=scratch) as conn:
            conn.execute("CREATE EXTENSION pg_background")
    return scratch


@pytest.fixture
def through_relay(relay: UpstreamRelay) -> Iterator[Proxy]:
    with Proxy(relay.upstream, "--reuse-lifetime", "0") as proxy:
        yield proxy
        assert "Traceback" not in proxy.log, proxy.log


@pytest.mark.parametrize("begins", ["SELECT 1", "SET standard_conforming_strings = on", "BEGIN"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_it_ends_the_call(
    relay: UpstreamRelay,
    through_relay: Proxy,
    observer: Connection,
    database: str,
    batch: list[m.Message],
    begins: str,
) -> None:
    seen = canceled = 0
    for number in itertools.count(1):
        with Wire(
            (through_relay.host, through_relay.port),
            database=database,
            application_name="asks",
        ) as wire:
            wire.query(begins)
            answers = itertools.count(1)
            ran: list[bool] = []

            def at_answer(
                connection: Upstream,
                wire: Wire = wire,
                number: int = number,
                answers: Iterator[int] = answers,
                ran: list[bool] = ran,
            ) -> None:
                if b"asks" in connection.startup and next(answers) == number:
                    wire.request_cancel()
                    ran.append(bool(one(observer, RUNNING)))

            relay.at_answer = at_answer
            wire.send(serialized(batch))
            messages = wire.until_ready()
        relay.at_answer = lambda connection: None
        failed = any(kind == "E" for kind, _ in messages)
        if not failed:
            wait_until(lambda: one(observer, RUNNING))
            observer.execute(RUNNING.replace("count(*)", "pg_terminate_backend(pid)").encode())
        wait_until(lambda: one(observer, RUNNING) == 0)
        if not ran:
            break
        seen += 1
        canceled += failed
        # Where the job ran already, what came was the end of the transaction.
        assert failed is not ran[0], (number, messages)
        assert not failed or error_of(messages).sqlstate == "57014"
    assert canceled
    assert seen <= canceled + 1
