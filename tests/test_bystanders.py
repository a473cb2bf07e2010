"""How long a session waits for an answer while another sends texts that are hard to read.

It is compared with the wait beside a statement of the same length without pg_background, in
the session's own unit: round trips on an idle proxy. Each is the least of several tries, since
a busy machine makes everybody wait at times; a blocked event loop does so every time. The wait
beside an attack is tried again only if it was too long; and with a wait of few round trips there is
nothing to compare.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from protocol.messages import Query
from tests.support.servers import Proxy
from tests.support.wire import Wire

TRIES: Final = 4
TIMES: Final = 20
"""How many times as long the wait may be."""
ROUND_TRIPS: Final = 100
"""A wait of fewer round trips does not count."""


class Bystander:
    """Says SELECT 1 again and again."""

    def __init__(self, proxy: Proxy) -> None:
        self.waits: list[float] = []
        self._wire = Wire(("127.0.0.1", proxy.port))
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        query = Query(b"SELECT 1").serialize()
        while not self._ended:
            started = time.monotonic()
            self._wire.send(query)
            self._wire.until_ready()
            self.waits.append(time.monotonic() - started)
            time.sleep(0.002)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._wire.close()


@contextmanager
def bystander(proxy: Proxy) -> Iterator[Bystander]:
    one = Bystander(proxy)
    try:
        yield one
    finally:
        one.close()


def longest_wait(
    proxy: Proxy,
    statements: list[str],
    database: str = "postgres",
    *,
    tries: int = TRIES,
    limit: float = 0.0,
) -> float:
    """The least of several tries of the longest wait beside these statements.

    ``limit``: seconds; a wait that is shorter is not tried again.
    """
    least = float("inf")
    for _ in range(tries):
        with Wire(("127.0.0.1", proxy.port), database=database) as attacker:
            attacker.socket.settimeout(120)
            for statement in statements[:-1]:
                attacker.query(statement)
            data = Query(statements[-1].encode()).serialize()
            with bystander(proxy) as other:
                time.sleep(0.02)
                attacker.send(data)
                attacker.until_ready()
        least = min(least, max(other.waits))
        if least < limit:
            break
    return least


def raising(message: str, sqlstate: str = "42883") -> list[str]:
    return [
        f"DO $$ BEGIN RAISE EXCEPTION USING errcode = '{sqlstate}', message = {message}; END $$"
    ]


def labelled(label: str, pattern: str) -> list[str]:
    return [
        f"SELECT pg_background_launch_v2('SELECT pg_sleep(1)', 0, '{label}')",
        f"SELECT pg_background_cancel_by_label('{pattern}')",
    ]


LAUNCH: Final = "SELECT pg_background_launch('x')"
ATTACKS: Final[dict[str, list[str]]] = {
    "a message of undefined_function": raising("repeat('a', 100000) || 'pg_background'"),
    "joins without ON": [f"{LAUNCH} FROM t JOIN " + " JOIN ".join(["a"] * 24)],
    "left joins without ON": [f"{LAUNCH} FROM t LEFT JOIN " + " LEFT JOIN ".join(["a"] * 24)],
    "a pattern of %a%a%a": labelled("a" * 34, "%a" * 17 + "b"),
    "a catalog 4000 times in FROM": [
        "SELECT 1 FROM " + ",".join(["pg_stat_activity"] * 4000) + " WHERE none"
    ],
    "4 MB of tokens": ["SELECT 'pg_stat_activity'" + ",1" * 2_000_000],
    "4 MB of rows": ["SELECT FROM (VALUES ('pg_background')" + ",('1')" * 670_000 + ") v LIMIT 1"],
    "60 kB of brackets beside an argument": [f"{LAUNCH}, " + "(" * 30_000 + "1" + ")" * 30_000],
    "300 kB of brackets in an argument": [
        "SELECT pg_background_launch(" + "(" * 150_000 + "'x'" + ")" * 150_000 + ")"
    ],
    # Found when these were mended.
    "a name that goes on": ["SELECT '" + "pg_background" * 20_000 + "'"],
    "a message about a stand-in": [
        "CREATE OR REPLACE FUNCTION pg_temp.f() RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION '%', repeat('pg_catalog.textcat(', 20000); END $$",
        "SELECT pg_background_launch(pg_temp.f())",
    ],
    "a name with many dollars": [
        f"{LAUNCH} FROM x" + "".join(f"$a{number}$" for number in range(8000))
    ],
    "the most that is read": [f"{LAUNCH}, " + ", ".join(["t.a + f(b)"] * 1100) + " FROM t"],
    "a job of a megabyte of tokens": [
        "SELECT pg_background_launch('SELECT 1" + ",1" * 500_000 + "')",
    ],
    "a job of many statements": ["SELECT pg_background_launch('" + "SELECT 1; " * 30_000 + "')"],
    "a job of many reports": [
        "SELECT pg_background_launch('" + "SELECT pg_background_progress(1); " * 3000 + "')"
    ],
    "a job of 100 MB": [
        "SELECT pg_background_launch('SELECT length($a$' || repeat('x''y\\', 25000000) || '$a$)')"
    ],
    "many that are not served": [";".join(["SELECT 1 + pg_background_launch('x')"] * 1100)],
}


SAY: Final = (
    "DO $$ BEGIN PERFORM set_config('pg_background_proxy.message',"
    " left(current_setting('pg_background_proxy.session'), 32) || ' ' || md5('x') || {}, true);"
    " FOR i IN 1..{} LOOP PERFORM public._pg_background_say(); END LOOP; END $$"
)
FROM_INSIDE: Final = {
    "100,000 messages": SAY.format("' next 1'", 100_000),
    "100,000 questions": SAY.format("' call - - - eA== VVRGOA== - - - MA=='", 20_000),
    "a message of 50 MB": SAY.format("' next ' || repeat('1', 50000000)", 1),
    "a question of 50 MB": SAY.format("' call - - - - - ' || repeat('eA== ', 10000000)", 1),
    "a job of 100,000 messages": "SELECT pg_background_run($job$"
    + SAY.format("' next 1'", 100_000)
    + "$job$)",
    "a job's error of 100 MB": "SELECT * FROM pg_background_run($job$DO $$ BEGIN RAISE EXCEPTION"
    " '%', repeat('x', 100000000); END $$ $job$)",
    "a line of CONTEXT that goes on": "DO $$ BEGIN EXECUTE 'SELECT 1/0 /* _pg_background_ask('"
    " || repeat('pg_background_a(', 15000) || ' */'; END $$",
}


@pytest.fixture
def extended(proxy: Proxy, db: str) -> Iterator[str]:
    """A database with the extension, which anybody may create things in."""
    with proxy.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background SCHEMA public")
        yield db
        conn.execute("DROP EXTENSION pg_background")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", FROM_INSIDE)
def test_a_bystander_does_not_wait_for_what_code_says(
    proxy: Proxy, extended: str, attack: str
) -> None:
    judge(proxy, attack, [FROM_INSIDE[attack]], extended)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bystander_does_not_wait(proxy: Proxy, attack: str) -> None:
    judge(proxy, attack, ATTACKS[attack])


def round_trip(proxy: Proxy) -> float:
    """The median on an idle proxy."""
    with bystander(proxy) as alone:
        time.sleep(0.3)
    return sorted(alone.waits)[len(alone.waits) // 2]


def judge(proxy: Proxy, attack: str, statements: list[str], database: str = "postgres") -> None:
    """Compare a bystander's wait with that beside something innocent."""
    alone = round_trip(proxy)
    limit = TIMES * ROUND_TRIPS * alone
    beside = longest_wait(proxy, statements, database, tries=1)
    print(f"\n{attack}: {beside * 1000:.1f} ms; alone {alone * 1000:.2f} ms")
    if beside >= limit:
        innocent = longest_wait(proxy, [f"SELECT '{'x' * len(statements[-1])}'"])
        print(f"beside an innocent one {innocent * 1000:.1f} ms")
        limit = max(limit, TIMES * innocent)
    if beside >= limit:
        beside = longest_wait(proxy, statements, database, limit=limit)
    if beside >= limit:
        # Perhaps all takes longer on this machine than it did a moment ago.
        limit = max(limit, TIMES * ROUND_TRIPS * round_trip(proxy))
    assert beside < limit
