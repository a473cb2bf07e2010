"""Honest and hostile clients side by side: the honest ones lose nothing, and nothing is left.

``pytest -m slow tests/test_soak.py`` is the long run, of SOAK_SECONDS (600).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import asyncpg
import pytest

from proxy.demo.embedded import find_system_bin, find_wheel_bin
from tests.conftest import upstream_of
from tests.support.background import wait_until
from tests.support.certificates import Certificates
from tests.support.hostile import CONNECTIONS, DEEDS, ROLE, Villain
from tests.support.in_database import one
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Footprint

SECONDS: Final = float(os.environ.get("SOAK_SECONDS", "600"))
CLIENTS: Final = 20
MEGABYTE: Final = 1 << 20

LENGTHS: Final = [
    pytest.param(4.0, marks=pytest.mark.timeout(240)),
    pytest.param(SECONDS, marks=[pytest.mark.slow, pytest.mark.timeout(SECONDS * 2 + 240)]),
]

SETUP: Final = """
CREATE ROLE honest LOGIN;
CREATE ROLE {hostile} LOGIN CONNECTION LIMIT {limit};
CREATE TABLE accounts (client int PRIMARY KEY, balance int NOT NULL DEFAULT 0);
CREATE TABLE jobs (client int, n int);
CREATE TABLE copied (client int, n int, t text);
GRANT ALL ON accounts, jobs, copied TO honest;
CREATE FUNCTION squared(n int) RETURNS int LANGUAGE plpgsql AS $f$
DECLARE found int;
BEGIN
  SELECT r.n INTO found FROM pg_background_result(pg_background_launch(
    format('SELECT %s * %s', n, n))) AS r(n int);
  RETURN found;
END $f$;
"""


class Honest:
    """One honest client: it works, and knows what must have come of it.

    Attributes:
        did: how often each kind of work was done.
        wrong: what was not as it should be.
    """

    def __init__(self, number: int, proxy: Proxy, tls: ssl.SSLContext | None) -> None:
        self.number = number
        self._proxy = proxy
        self._tls = tls
        self._random = random.Random(number)
        self._conn: Any = None
        self.balance = 0
        self.jobs = 0
        self.copied = 0
        self.did: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def work(self, stop: asyncio.Event) -> None:
        """One thing after the other; now and then by a new connection."""
        while not stop.is_set() and not self.wrong:
            try:
                await self._connect()
                for _ in range(self._random.randrange(5, 50)):
                    kind = self._random.choice(
                        [self.transaction, self.job, self.inside, self.copy, self.prepared]
                    )
                    await asyncio.wait_for(kind(), 60)
                    self.did[kind.__name__] += 1
                    if stop.is_set():
                        break
                await self._conn.close(timeout=20)
            except Exception as error:
                self.wrong.append(repr(error))

    async def _connect(self) -> None:
        self._conn = await asyncpg.connect(
            host=self._proxy.host,
            port=self._proxy.port,
            user="honest",
            database="postgres",
            ssl=self._tls or False,
            timeout=60,
            server_settings={"application_name": f"honest {self.number}"},
        )

    def check(self, found: object, expected: object) -> None:
        if found != expected:
            self.wrong.append(f"{found!r} instead of {expected!r}")

    async def transaction(self) -> None:
        amount = self._random.randrange(-100, 100)
        commits = self._random.random() < 0.7
        transaction = self._conn.transaction()
        await transaction.start()
        balance = await self._conn.fetchval(
            "UPDATE accounts SET balance = balance + $1 WHERE client = $2 RETURNING balance",
            amount,
            self.number,
        )
        self.check(balance, self.balance + amount)
        if commits:
            await transaction.commit()
            self.balance += amount
        else:
            await transaction.rollback()

    async def job(self) -> None:
        self.jobs += 1
        pid = await self._conn.fetchval(
            "SELECT pg_background_launch($1)",
            f"INSERT INTO jobs VALUES ({self.number}, {self.jobs}) RETURNING n, repeat('x', n)",
        )
        rows = await self._conn.fetch(
            "SELECT * FROM pg_background_result($1) AS (n int, t text)", pid
        )
        self.check([tuple(row) for row in rows], [(self.jobs, "x" * self.jobs)])

    async def inside(self) -> None:
        n = self._random.randrange(10_000)
        self.check(await self._conn.fetchval("SELECT squared($1)", n), n * n)

    async def copy(self) -> None:
        rows = [(self.number, self.copied + n, "ü" * (n % 50)) for n in range(200)]
        await self._conn.copy_records_to_table("copied", records=rows)
        self.copied += len(rows)

    async def prepared(self) -> None:
        statement = await self._conn.prepare("SELECT $1::int + $2::int, $3::text")
        a, b = self._random.randrange(1000), self._random.randrange(1000)
        for _ in range(5):
            row = await statement.fetchrow(a, b, "pg_background_launch('x')")
            self.check(tuple(row), (a + b, "pg_background_launch('x')"))


class Soak:
    """A server and a proxy of their own, and what was there before anybody came."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.root = server.connect()
        self.honest: list[Honest] = []
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE
        self._seeds = iter(range(1_000_000))

    def run(self, seconds: float) -> Counter[str]:
        """All clients at once; returns what the villains have done."""
        stop = threading.Event()
        deeds: Counter[str] = Counter()

        def rage(seed: int) -> None:
            villain = Villain(self.proxy, "postgres", seed)
            choose = random.Random(seed)
            while not stop.is_set():
                deed = choose.choice(DEEDS)
                villain.do(deed)
                deeds[deed.__name__] += 1

        villains = [threading.Thread(target=rage, args=[next(self._seeds)]) for _ in range(CLIENTS)]
        for thread in villains:
            thread.start()
        try:
            asyncio.run(self._work(seconds))
        finally:
            stop.set()
            for thread in villains:
                thread.join(60)
        assert not any(thread.is_alive() for thread in villains)
        return deeds

    async def _work(self, seconds: float) -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        await asyncio.gather(*(client.work(stop) for client in self.honest))

    def settle(self) -> None:
        """Everybody has gone, and so have their backends; channels and spares may stay a while."""
        deadline = time.monotonic() + 60
        while (left := self.others()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, "\n".join(map(str, left))

    def others(self) -> list[tuple[Any, ...]]:
        """Backends that should not be there."""
        return self.root.execute(
            "SELECT pid, usename, application_name, state, wait_event, now() - state_change,"
            " left(query, 100), length(query) FROM pg_stat_activity"
            " WHERE client_port IS NOT NULL AND pid <> pg_backend_pid()"
            " AND application_name NOT IN ('pg_background channel', 'pg_background spare')"
        ).fetchall()


@pytest.fixture(scope="module")
def soak(certificates: Certificates) -> Iterator[Soak]:
    """One server will do: with TLS, if there is one."""
    bin_dir = find_system_bin() or find_wheel_bin()
    assert bin_dir is not None
    with contextlib.closing(Server(bin_dir)) as server:
        with contextlib.suppress(pytest.skip.Exception):
            server.start_tls(certificates)
        options = (
            *("--client-tls-sslmode", "prefer"),
            *("--client-tls-cert-file", str(certificates.server.cert)),
            *("--client-tls-key-file", str(certificates.server.key)),
        )
        with Proxy(upstream_of(server), *options) as proxy:
            soak = Soak(server, proxy)
            with proxy.connect() as conn:
                prepare(conn)
            for number in range(CLIENTS):
                soak.root.execute("INSERT INTO accounts (client) VALUES (%s)", [number])
                tls = soak._tls if number % 2 else None
                soak.honest.append(Honest(number, proxy, tls))
            yield soak
            soak.root.close()


def prepare(conn: Connection) -> None:
    """The extension, for both kinds of clients, and the tables of the honest ones."""
    conn.execute("CREATE EXTENSION pg_background")
    conn.execute(SETUP.replace("{hostile}", ROLE).replace("{limit}", str(CONNECTIONS)).encode())
    for role in ("honest", ROLE):
        assert one(conn, "SELECT grant_pg_background_privileges(%s)", [role]) is True


@pytest.mark.parametrize("seconds", LENGTHS)
def test_honest_clients_lose_nothing_beside_hostile_ones(soak: Soak, seconds: float) -> None:
    footprint = Footprint(soak.proxy)
    # What everybody needs at some time is not what stays behind.
    soak.run(min(60.0, seconds / 2))
    soak.settle()
    time.sleep(1.5)  # spares
    fds, rss = footprint.fds, footprint.rss

    deeds = soak.run(seconds)
    soak.settle()

    assert [wrong for client in soak.honest for wrong in client.wrong] == []
    done = sum((client.did for client in soak.honest), Counter[str]())
    assert set(done) == {"transaction", "job", "inside", "copy", "prepared"}
    assert len(deeds) > len(DEEDS) // 2
    for client in soak.honest:
        balance = "SELECT balance FROM accounts WHERE client = %s"
        assert one(soak.root, balance, [client.number]) == client.balance
        jobs = "SELECT coalesce(array_agg(n ORDER BY n), '{}') FROM jobs WHERE client = %s"
        assert one(soak.root, jobs, [client.number]) == list(range(1, client.jobs + 1))
        copied = "SELECT count(DISTINCT n)::int FROM copied WHERE client = %s"
        assert one(soak.root, copied, [client.number]) == client.copied

    wait_until(lambda: footprint.fds <= fds + 2 * 3, 90)
    # The highest of what 20 hostile clients need at once is reached at some time, and no more.
    assert footprint.rss - rss < 128 * MEGABYTE
    log = soak.proxy.log
    for word in ("Traceback", "internal error", "RuntimeWarning"):
        assert word not in log, log[max(0, log.index(word) - 500) :][:3000]
    print(
        f"{seconds} s; honest: {dict(done)}; hostile: {dict(deeds)}; rss {rss} -> {footprint.rss}"
    )
