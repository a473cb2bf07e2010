"""``pg-background-proxy demo``: a temporary PostgreSQL, the proxy in front of it, a guided tour.

Each step shows its SQL and checks the result, so the tour is also a test of the whole program.

Invariant: only the user who runs the demo (and root) can connect. Every connection is a
superuser's, so server and proxy listen on Unix sockets only, in a folder that is closed to others.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from proxy import log
from proxy.config import Config, Host, ListenAddress, Upstream
from proxy.loop import run

if TYPE_CHECKING:
    import psycopg

    from proxy.demo.embedded import Cluster

Rows = list[tuple[Any, ...]]

_MISSING: Final = (
    "the demo needs a PostgreSQL and a client: pip install 'pg-background-proxy[demo]'"
)
_SETTINGS: Final = {"listen_addresses": "''"}
_HBA: Final = ("local all all trust",)
_START_TIMEOUT: Final = 15.0  # seconds
_STEP_TIMEOUT: Final = 30.0
_WIDTH: Final = 60  # of one column


class StepFailedError(Exception):
    """A step of the tour had an unexpected result; the message says what was expected."""


class DemoError(Exception):
    """The demo cannot run on this machine; the message is one line that says what to do."""


def main(*, once: bool) -> int:
    """Runs the demo; returns the exit code.

    Args:
        once: end after the tour, instead of staying up until SIGINT or SIGTERM.

    Raises:
        DemoError: it cannot run on this machine.
    """
    if sys.platform == "win32":
        raise DemoError("the demo does not run on Windows")
    try:
        import psycopg  # noqa: F401 - the tour needs it
    except ImportError:
        raise DemoError(_MISSING) from None
    from proxy.demo.embedded import Cluster, ClusterError, find_system_bin, find_wheel_bin

    programs = find_wheel_bin() or find_system_bin()
    if programs is None:
        raise DemoError(_MISSING)
    log.configure("warning")
    print("Starting PostgreSQL in a temporary folder and the proxy in front of it ...", flush=True)
    try:
        with Cluster(programs, _SETTINGS, _HBA, private=True) as cluster:
            code = run(_serve_and_show(cluster, programs, once=once))
    except ClusterError as error:
        raise DemoError(str(error)) from error
    print("Stopped. Nothing is left behind.")
    return code


async def _serve_and_show(cluster: Cluster, programs: Path, *, once: bool) -> int:
    from proxy.server import serve

    folder = cluster.socket_dir
    port = cluster.port % 65535 + 1
    proxy = asyncio.create_task(
        serve(
            Config(
                listen=(ListenAddress(folder, port),),
                upstream=Upstream((Host(folder, cluster.port),)),
                shutdown_timeout=1.0,
            )
        )
    )
    tour = asyncio.create_task(_show(f"host={folder} port={port}"))
    # The proxy is done first if it could not start, or on Ctrl-C.
    await asyncio.wait({proxy, tour}, return_when=asyncio.FIRST_COMPLETED)
    if proxy.done():
        tour.cancel()
        await asyncio.wait({tour})
        return proxy.result()
    failure = tour.exception()
    if failure is not None:
        print(f"\nFAILED: {str(failure).strip()}", file=sys.stderr)
    elif not once:
        psql = shutil.which("psql") or str(programs / "psql")
        command = shlex.join([psql, "-h", folder, "-p", str(port), "-U", "postgres"])
        print(f"\nThe proxy is up. Try it, as the same user:\n\n    {command}\n")
        print("Ctrl-C stops everything.", flush=True)
    if failure is not None or once:
        os.kill(os.getpid(), signal.SIGTERM)
    return await proxy or (1 if failure else 0)


async def _show(conninfo: str) -> None:
    connection = await _connect(conninfo)
    try:
        async with asyncio.timeout(_STEP_TIMEOUT * 2):
            await Tour(connection).run()
    finally:
        await connection.close()


async def _connect(conninfo: str) -> psycopg.AsyncConnection[tuple[Any, ...]]:
    """Connects as soon as the proxy listens."""
    import psycopg

    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        try:
            return await psycopg.AsyncConnection.connect(
                conninfo, user="postgres", dbname="postgres", autocommit=True, connect_timeout=10
            )
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.02)


class Tour:
    """The steps, typed into one connection."""

    def __init__(self, connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
        self._connection = connection
        self._notices: list[str] = []
        connection.add_notice_handler(self._notice)

    async def run(self) -> None:
        """Runs all steps.

        Raises:
            StepFailedError: one had an unexpected result.
        """
        steps: Sequence[Callable[[], Awaitable[None]]] = (
            self.launch_and_fetch,
            self.watch_and_cancel,
            self.notices,
            self.columns,
            self.autonomous_transaction,
            self.inside_the_database,
        )
        for number, step in enumerate(steps, 1):
            title = (step.__doc__ or "").strip()
            print(f"\n-- {number}. {title}\n")
            try:
                async with asyncio.timeout(_STEP_TIMEOUT):
                    await step()
            except TimeoutError:
                raise StepFailedError(f"step {number} took over {_STEP_TIMEOUT:g} s") from None
        print(f"\nAll {len(steps)} steps had the expected results.", flush=True)

    async def launch_and_fetch(self) -> None:
        """A job runs on a connection of its own; launching returns its pid at once."""
        await self.sql("CREATE TABLE bg_test (id serial PRIMARY KEY, data text)")
        pid = await self.launch(
            "INSERT INTO bg_test (data) SELECT 'Record ' || generate_series(1, 1000)"
        )
        rows = await self.sql(f"SELECT * FROM pg_background_result({pid}) AS (result text)")
        _expect(rows, [("INSERT 0 1000",)])

    async def watch_and_cancel(self) -> None:
        """It is an ordinary backend: pg_stat_activity shows it, pg_cancel_backend() ends it."""
        started = time.monotonic()
        pid = await self.launch("SELECT pg_sleep(50)")
        if time.monotonic() - started > 10:
            raise StepFailedError("pg_background_launch() did not return at once")
        query = (
            "SELECT application_name, state, wait_event, query FROM pg_stat_activity"
            f" WHERE pid = {pid}"
        )
        await self.until(query, [("pg_background", "active", "PgSleep", "SELECT pg_sleep(50)")])
        _expect(await self.sql(f"SELECT pg_cancel_backend({pid})"), [(True,)])
        error = await self.error(f"SELECT pg_background_result({pid})")
        _expect(
            [(error.sqlstate, f"background worker, pid {pid}" in (error.diag.context or ""))],
            [("57014", True)],
        )

    async def notices(self) -> None:
        """A job's notices come when its result is fetched; VACUUM can be a job, too."""
        pid = await self.launch("VACUUM VERBOSE bg_test")
        rows = await self.sql(f"SELECT pg_background_result({pid})")
        _expect(rows, [("VACUUM",)])
        if not any("bg_test" in notice for notice in self._notices):
            raise StepFailedError("no INFO message of VACUUM VERBOSE came")

    async def columns(self) -> None:
        """The result has the job's own columns: no column definition list is needed."""
        sql = "SELECT count(*) AS n, min(data) AS first FROM bg_test"
        rows = await self.sql(f"SELECT * FROM pg_background_result(pg_background_launch('{sql}'))")
        _expect(rows, [(1000, "Record 1")])

    async def autonomous_transaction(self) -> None:
        """A job has its own transaction: what it writes outlives the caller's ROLLBACK."""
        await self.sql("CREATE TABLE audit_log (what text)")
        await self.sql("BEGIN")
        await self.sql("DELETE FROM bg_test")
        await self.sql(
            "SELECT pg_background_detach(pg_background_launch("
            "'INSERT INTO audit_log VALUES (''a job wrote this'')'))"
        )
        await self.sql("ROLLBACK")
        await self.until("SELECT what FROM audit_log", [("a job wrote this",)])
        _expect(await self.sql("SELECT count(*) FROM bg_test"), [(1000,)])

    async def inside_the_database(self) -> None:
        """After CREATE EXTENSION, functions and triggers can launch jobs, too."""
        await self.sql("CREATE EXTENSION pg_background")
        await self.sql(
            "CREATE FUNCTION log_audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " PERFORM pg_background_detach(pg_background_launch(format("
            "'INSERT INTO audit_log VALUES (%L)', TG_OP || ' ' || TG_TABLE_NAME)));"
            " RETURN NULL; END $$"
        )
        await self.sql("CREATE TRIGGER audit AFTER DELETE ON bg_test EXECUTE PROCEDURE log_audit()")
        await self.sql("BEGIN")
        await self.sql("DELETE FROM bg_test")
        await self.sql("ROLLBACK")
        await self.until("SELECT what FROM audit_log OFFSET 1", [("DELETE bg_test",)])

    async def launch(self, sql: str) -> int:
        """Launches a job, showing the call. Returns its pid."""
        quoted = sql.replace("'", "''")
        rows = await self.sql(f"SELECT pg_background_launch('{quoted}') AS pid")
        if len(rows) != 1 or not isinstance(rows[0][0], int):
            raise StepFailedError(f"expected a pid, got {rows}")
        return rows[0][0]

    async def sql(self, sql: str) -> Rows:
        """Runs SQL and shows it with its result."""
        self._notices.clear()
        print(f"=> {sql};")
        started = time.monotonic()
        columns, rows, tag = await self._execute(sql)
        elapsed = (time.monotonic() - started) * 1000
        for notice in self._notices:
            print(notice)
        print("\n".join(_table(columns, rows)) if columns else tag)
        print(f"Time: {elapsed:.1f} ms\n", flush=True)
        return rows

    async def until(self, sql: str, expected: Rows) -> None:
        """Repeats a query until it has this result (a job is running), then shows it."""
        while (await self._execute(sql))[1] != expected:  # noqa: ASYNC110 - nothing to wait on
            await asyncio.sleep(0.02)
        _expect(await self.sql(sql), expected)

    async def error(self, sql: str) -> psycopg.Error:
        """Runs SQL that fails, and shows it with its error."""
        import psycopg

        print(f"=> {sql};")
        try:
            await self._execute(sql)
        except psycopg.Error as error:
            print(f"ERROR:  {error.diag.message_primary}")
            if error.diag.context:
                print(f"CONTEXT:  {error.diag.context}")
            print(flush=True)
            return error
        raise StepFailedError("expected an error")

    async def _execute(self, sql: str) -> tuple[list[str], Rows, str]:
        cursor = await self._connection.execute(sql.encode())
        columns = [column.name for column in cursor.description or ()]
        return columns, await cursor.fetchall() if columns else [], cursor.statusmessage or ""

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        first, *more = (diagnostic.message_primary or "").splitlines() or [""]
        self._notices.append(f"{diagnostic.severity}:  {first}{' ...' if more else ''}")


def _expect(got: Rows, expected: Rows) -> None:
    if got != expected:
        raise StepFailedError(f"expected {expected}, got {got}")


def _table(columns: Sequence[str], rows: Rows) -> list[str]:
    """Writes rows as psql does."""
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    cells = [
        " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in texts
    ]
    names = " | ".join(name.center(width) for name, width in zip(columns, widths, strict=True))
    rule = "-+-".join("-" * width for width in widths)
    count = f"({len(rows)} row{'' if len(rows) == 1 else 's'})"
    return [f" {names}", f"-{rule}-", *(f" {cell}".rstrip() for cell in cells), count]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "t" if value else "f"
    text = str(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
