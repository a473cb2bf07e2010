"""Much data: COPY out and in, a SELECT of many small rows, one very long value.

The client only reads bytes, or sends prepared ones, so that the way to the server dominates.
Throughput counts the bytes of the protocol in the direction of the data.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import psycopg

from bench.client import Session
from bench.harness import Bench, Turn
from bench.results import BANDWIDTH, CPU_MEGABYTE, Outcome
from bench.targets import Target
from protocol.messages import CopyData, CopyDone

COPY_ROWS: Final = 1_000_000
SELECT_ROWS: Final = 2_000_000
VALUE_BYTES: Final = 200_000_000
COPY_PIECE: Final = 8192
"""Bytes in one CopyData message: what psql sends."""

_TABLES: Final = """
DROP TABLE IF EXISTS bench_out, bench_in;
CREATE UNLOGGED TABLE bench_out AS
    SELECT i AS id, md5(i::text) AS hash FROM generate_series(1, %d) i;
VACUUM ANALYZE bench_out;
CREATE UNLOGGED TABLE bench_in (id int, hash text)
"""


def run(bench: Bench) -> None:
    """Each kind of transfer."""
    rows = int(COPY_ROWS * bench.effort.bulk)
    selected = int(SELECT_ROWS * bench.effort.bulk)
    length = int(VALUE_BYTES * bench.effort.bulk)
    with psycopg.connect(bench.targets.direct.conninfo(), autocommit=True) as connection:
        for sql in (_TABLES % rows).split(";"):
            connection.execute(sql.encode())
    try:
        data = copy_data(rows)
        _measure(
            bench,
            f"COPY {rows:,} rows out",
            lambda session: session.skim("COPY bench_out TO STDOUT", f"COPY {rows}"),
        )
        _measure(bench, f"COPY {rows:,} rows in", lambda session: _copy_in(session, data, rows))
        _measure(
            bench,
            f"SELECT of {selected:,} rows",
            lambda session: session.skim(
                f"SELECT i FROM generate_series(1, {selected}) i", f"SELECT {selected}"
            ),
        )
        _measure(
            bench,
            f"one value of {length // 1_000_000} MB",
            lambda session: session.skim(f"SELECT repeat('x', {length})", "SELECT 1"),
        )
    finally:
        with psycopg.connect(bench.targets.direct.conninfo(), autocommit=True) as connection:
            connection.execute("DROP TABLE IF EXISTS bench_out, bench_in")


def copy_data(rows: int) -> bytes:
    """Rows of a number and its MD5, as CopyData messages and the CopyDone after them."""
    lines = "".join(
        f"{i}\t{hashlib.md5(b'%d' % i, usedforsecurity=False).hexdigest()}\n" for i in range(rows)
    ).encode()
    pieces = (lines[at : at + COPY_PIECE] for at in range(0, len(lines), COPY_PIECE))
    return b"".join(CopyData(piece).serialize() for piece in pieces) + CopyDone().serialize()


def _copy_in(session: Session, data: bytes, rows: int) -> int:
    return session.copy_in("COPY bench_in FROM STDIN", data, f"COPY {rows}")


def _measure(bench: Bench, case: str, transfer: Callable[[Session], int]) -> None:
    turns = [
        Turn((case,), target.name, partial(_transfer, target, transfer))
        for target in bench.targets.all()
    ]
    bench.alternate(turns)


def _transfer(target: Target, transfer: Callable[[Session], int]) -> Outcome:
    with target.connect() as session:
        session.value("TRUNCATE bench_in")
        before = target.usage()
        started = time.perf_counter()
        megabytes = transfer(session) / 1e6
        outcome = {BANDWIDTH: megabytes / (time.perf_counter() - started)}
        after = target.usage()
    if before is not None and after is not None:
        outcome[CPU_MEGABYTE] = (after.cpu - before.cpu) * 1000 / megabytes
    return outcome
