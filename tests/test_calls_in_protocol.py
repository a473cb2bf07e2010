"""Calls through the extended protocol and within Query strings of several statements.

Invariant: there is a database with functions of our names in plain PL/pgSQL, which answer as ours
do. A script is run there direct, and through the proxy where no such functions are; the messages
must be equal, but for pids. What PL/pgSQL cannot do is asserted explicitly.
"""

# ruff: noqa: E501 (the tables of scripts are read in rows)

from __future__ import annotations

import asyncio
import contextlib
import datetime
import decimal
import functools
import re
import struct
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import asyncpg
import psycopg
import pytest

from protocol import messages as m
from protocol.values import oids
from tests.support.background import wait_until
from tests.support.recorder import (
    READY,
    Frontend,
    H,
    S,
    Script,
    Sent,
    Wait,
    b,
    c,
    d,
    e,
    errors,
    kinds,
    p,
    q,
    record,
    rows,
)
from tests.support.servers import Proxy, Server, database

NATIVE = """
CREATE FUNCTION pg_background_launch(sql text, queue_size int4 DEFAULT 0) RETURNS int4
LANGUAGE plpgsql STRICT AS $$ BEGIN
  IF queue_size = 1 THEN
    RAISE 'queue size must be at least 64 bytes' USING ERRCODE = '22023'; END IF;
  PERFORM set_config('native.job', sql, false);
  RETURN 4194303;
END $$;
CREATE FUNCTION pg_background_result(pid int4) RETURNS SETOF record
LANGUAGE plpgsql STRICT AS $$ BEGIN
  IF pid <> 4194303 THEN
    RAISE 'PID % is not attached to this session', pid USING ERRCODE = '42704'; END IF;
  RETURN QUERY EXECUTE current_setting('native.job');
END $$;
CREATE FUNCTION pg_background_detach(pid int4) RETURNS void
LANGUAGE plpgsql STRICT AS $$ BEGIN
  IF pid <> 4194303 THEN
    RAISE 'PID % is not attached to this session', pid USING ERRCODE = '42704'; END IF;
END $$;
"""

TABLE = """
CREATE TABLE log (n int);
CREATE FUNCTION write_log(n int) RETURNS int LANGUAGE sql AS 'INSERT INTO log VALUES (n) RETURNING n';
"""


@pytest.fixture(scope="module")
def native(server: Server) -> Iterator[str]:
    """A database with functions of our names; the other one is ``ours``."""
    with database(server, "native") as name, database(server, "ours") as ours:
        for dbname in (name, ours):
            with server.connect(dbname=dbname) as conn:
                conn.execute(TABLE)
        with server.connect(dbname=name) as conn:
            conn.execute(NATIVE)
        yield name


LAUNCH = "SELECT pg_background_launch('SELECT 1')"
ROWS = "SELECT i, i::text FROM generate_series(1, 5) i"


def result(job: str, columns: str = "", outputs: str = "*") -> str:
    call = f"pg_background_result(pg_background_launch($job${job}$job$))"
    return f"SELECT {outputs} FROM {call} {columns}"


FIVE = result(ROWS, "AS (n int, t text)")
TEXT = (oids.TEXT,)
COPY_READY = Wait(m.CopyInResponse)

BAD_SYNC = b"S\0\0\0\5x"
BAD_FLUSH = b"H\0\0\0\5x"

# What a client sends: q is Query, p Parse, b Bind, d Describe, e Execute, c Close, H Flush, S Sync.
# What it waits for: READY, COPY_READY.
# fmt: off
SCRIPTS: dict[str, Script] = {
    # Malformed ends of a batch.
    "a Sync with a body": [p(LAUNCH), b(), e(), BAD_SYNC, READY, p(LAUNCH, "s"), BAD_SYNC, READY, b("s"), e(), S, READY],
    "a Sync with a body after an error": [d(b"P", "p"), p(LAUNCH), b(), e(), BAD_SYNC, READY, q(LAUNCH), READY],
    "a Flush with a body": [p(LAUNCH), b(), e(), BAD_FLUSH, p(LAUNCH), S, READY, q(LAUNCH), READY],
    # Statements and portals.
    "an unnamed statement": [p(LAUNCH), b(), d(b"P"), e(), S, READY],
    "a named statement": [
        p(LAUNCH, "s"), d(b"S", "s"), S, READY, b("s", "p"), d(b"P", "p"), e("p"), c(b"P", "p"), S, READY,
        c(b"S", "s"), S, READY, b("s"), S, READY],
    "execution again and again": [
        p("SELECT pg_background_launch($1)", "s"), S, READY,
        *[item for _ in range(3) for item in (b("s", "", (b"SELECT 1",)), e(), S, READY)]],
    "execution again and again in a batch": [
        p("SELECT pg_background_launch($1)", "s"),
        *[item for _ in range(3) for item in (b("s", "", (b"SELECT 1",)), e())], S, READY],
    "describe at each point": [
        p(LAUNCH, "s"), d(b"S", "s"), H, Wait(m.RowDescription), b("s", "p"), d(b"P", "p"), d(b"S", "s"), H,
        Wait(m.RowDescription, 2), e("p"), d(b"P", "p"), d(b"S", "s"), S, READY],
    "describe alone": [p(FIVE, "s"), S, READY, d(b"S", "s"), S, READY, d(b"S", "s"), d(b"S", "s"), S, READY],
    "a result, everything about it": [
        p(FIVE, "s"), d(b"S", "s"), b("s", "p"), d(b"P", "p"), e("p"), c(b"P", "p"), c(b"S", "s"), S, READY],
    "a result again and again": [
        p(result("SELECT 7", "AS (n int)"), "s"), S, READY, b("s"), e(), S, READY, b("s"), e(), S, READY],
    "columns with modifiers": [
        p(result("SELECT 'x'::varchar, 1.5::numeric", "AS (a varchar(10), b numeric(5,2))")), d(b"S"), b(),
        d(b"P"), S, READY],
    "chosen columns": [p(result(ROWS, "AS x(n int, t text)", "t AS u, x.n")), d(b"S"), b(), d(b"P"), e(), S, READY],
    "a detach": [p("SELECT pg_background_detach(pg_background_launch('SELECT 1')) AS v"), d(b"S"), b(), d(b"P"),
        e(), S, READY],
    "a detach in binary": [p("SELECT pg_background_detach(pg_background_launch('SELECT 1'))"),
        b(results=(1,)), d(b"P"), e(), S, READY],

    # Parameters and formats.
    "a parameter is text": [p("SELECT pg_background_launch($1)"), d(b"S"), S, READY],
    "parameters are inferred": [
        p("SELECT pg_background_launch($1, $2), pg_background_detach($3)"), d(b"S"), S, READY],
    "parameters of a result": [p("SELECT * FROM pg_background_result($1) AS (n int)"), d(b"S"), S, READY],
    "parameters of given types": [
        p("SELECT pg_background_launch($1, $2)", "", (oids.VARCHAR, oids.INT2)), d(b"S"),
        b("", "", (b"SELECT 1", b"\0\0"), (0, 1)), e(), S, READY],
    "a parameter of a wrong type": [p("SELECT pg_background_launch($1)", "", (oids.INT4,)), S, READY],
    "parameters in binary": [
        p("SELECT pg_background_launch($1, $2)"),
        b("", "", (b"SELECT 1", struct.pack(">i", 100000)), (1,)), e(), S, READY],
    "parameters elsewhere": [
        p("SELECT $2::int8 AS x, pg_background_launch('SELECT ' || $1), $3::text"), d(b"S"),
        b("", "", (b"1", b"5", b"y"), (), (1, 0, 1)), d(b"P"), e(), S, READY],
    "NULL": [
        p("SELECT pg_background_launch($1)"), b("", "", (None,)), e(), S, READY,
        p("SELECT pg_background_launch($1)"), b("", "", (None,), (), (1,)), e(), S, READY,
        p("SELECT * FROM pg_background_result($1) AS (n int)"), b("", "", (None,)), e(), S, READY],
    "a pid in binary": [p(LAUNCH), b(results=(1,)), d(b"P"), e(), S, READY],
    "a result in binary": [p(FIVE), b(results=(1,)), d(b"P"), e(), S, READY],
    "a result in mixed formats": [p(FIVE), b(results=(0, 1)), d(b"P"), e(), S, READY],
    "chosen columns in mixed formats": [
        p(result(ROWS, "AS (n int, t text)", "t, n, n AS m")), b(results=(0, 1, 0)), d(b"P"), e(), S, READY],
    "too few parameters": [p("SELECT pg_background_launch($1, $2)"), b("", "", (b"SELECT 1",)), S, READY],
    "too many parameters": [p(LAUNCH), b("", "", (b"SELECT 1",)), S, READY],
    "too many parameter formats": [
        p("SELECT pg_background_launch($1)"), b("", "", (b"SELECT 1",), (0, 0)), S, READY],
    "too many result formats": [p(LAUNCH), b(results=(0, 0)), S, READY],
    "a bad parameter": [p("SELECT pg_background_launch('x', $1)"), b("", "", (b"x",)), e(), S, READY],

    # Row limits.
    "launches in portions": [
        p("SELECT pg_background_launch('SELECT ' || i), i FROM generate_series(1, 5) i"), b(), e("", 2), H,
        Wait(m.PortalSuspended), e("", 2), e("", 2), S, READY],
    "rows in portions": [
        p(FIVE), b(), d(b"P"), e("", 2), H, Wait(m.PortalSuspended), e("", 2), H, Wait(m.PortalSuspended),
        e("", 2), S, READY],
    "rows in portions at once": [p(FIVE), b(), e("", 2), e("", 3), e("", 1), e(), S, READY],
    "as many rows as asked for": [p(FIVE), b(), e("", 5), e("", 5), S, READY],
    "rows in portions over batches": [
        q("BEGIN"), READY, p(FIVE), b("", "p"), e("p", 2), S, READY, e("p", 2), S, READY, q("SELECT 1"), READY,
        e("p"), S, READY, q("COMMIT"), READY],
    "a portal that went with its batch": [
        p(FIVE), b("", "p"), e("p", 2), S, READY, e("p", 2), S, READY, d(b"P", "p"), S, READY],
    "a portal that went with its savepoint": [
        q("BEGIN; SAVEPOINT s"), READY, p(FIVE), b("", "p"), e("p", 2), S, READY, q("ROLLBACK TO s"), READY,
        e("p", 2), S, READY],
    "a portal closed half read": [
        q("BEGIN"), READY, p(FIVE), b("", "p"), e("p", 2), c(b"P", "p"), e("p"), S, READY],
    "the unnamed portal replaced half read": [p(FIVE), b(), e("", 2), p("SELECT 1"), b(), e(), S, READY],
    "the unnamed portal ended by a query": [
        q("BEGIN"), READY, p(FIVE), b(), e("", 2), S, READY, q("SELECT 1"), READY, e("", 2), S, READY],
    "the unnamed portal ended by a query with a call": [
        q("BEGIN"), READY, p(FIVE), b(), e("", 2), S, READY, q(f"{LAUNCH}; SELECT 1"), READY, e("", 2), S, READY],

    # Names that come and go.
    "no such statement": [p(LAUNCH), S, READY, b("none"), S, READY, d(b"S", "none"), S, READY],
    "the unnamed statement replaced": [
        p(LAUNCH), p("SELECT 1"), b(), e(), S, READY, p(LAUNCH), S, READY, p("SELECT 2"), S, READY, b(), e(), S,
        READY, p(LAUNCH), b(), e(), S, READY],
    "the unnamed statement ended by a query": [p(LAUNCH), S, READY, q("SELECT 1"), READY, b(), S, READY],
    "the unnamed statement ended by a query with a call": [
        p(LAUNCH), S, READY, q(LAUNCH), READY, b(), S, READY, q(f"SELECT 1; {LAUNCH}"), READY, b(), S, READY],
    "a query leaves no unnamed statement": [q(f"{FIVE}; SELECT 3"), READY, b(), S, READY, q(LAUNCH), READY, b(), S,
        READY, q(f"SELECT 1; SELECT x; {LAUNCH}"), READY, b(), S, READY],
    "a name that is taken": [
        p(LAUNCH, "s"), S, READY, p("SELECT 1", "s"), S, READY, p(LAUNCH, "s"), S, READY, b("s"), e(), S, READY,
        p("SELECT 1", "t"), p(LAUNCH, "t"), S, READY, b("t"), e(), S, READY],
    "closed and prepared again": [
        p(LAUNCH, "s"), S, READY, c(b"S", "s"), p("SELECT 1", "s"), b("s"), e(), S, READY,
        c(b"S", "s"), p(LAUNCH, "s"), b("s"), e(), S, READY],
    "deallocated and prepared again": [
        p(LAUNCH, "s"), S, READY, q("DEALLOCATE ALL"), READY, b("s"), S, READY, p("SELECT 1", "s"), S, READY,
        b("s"), d(b"P"), e(), S, READY, q("DEALLOCATE s"), READY, p(LAUNCH, "s"), b("s"), e(), S, READY],
    "a close that was skipped": [
        p(LAUNCH, "s"), S, READY, b("s", "", (b"too many",)), c(b"S", "s"), S, READY, b("s"), d(b"P"), e(), S, READY],
    "a parse that was skipped": [
        p(LAUNCH), S, READY, b("", "", (b"too many",)), p("SELECT 1"), S, READY, b(), d(b"P"), e(), S, READY,
        p("SELECT x", "s"), p("SELECT 1"), S, READY, b(), d(b"P"), e(), S, READY],
    "a parse of the unnamed statement that fails": [p(LAUNCH), S, READY, p("SELEC"), S, READY, b(), S, READY],
    "a close and a parse of an error that came first": [
        p(LAUNCH, "s"), S, READY, p("SELECT x"), c(b"S", "s"), p("SELECT 1", "s"), S, READY, b("s"), e(), S, READY],

    # Pipelines.
    "flush instead of sync": [
        p(LAUNCH), H, Wait(m.ParseComplete), b(), H, Wait(m.BindComplete), e(), H, Wait(m.CommandComplete), S, READY],
    "in the middle of a pipeline": [
        p("SELECT 1"), b(), e(), p(LAUNCH), b(), e(), p("SELECT 2"), b(), d(b"P"), e(), S, READY],
    "the last of a pipeline": [p("SELECT 1"), b(), e(), p(FIVE), b(), e(), S, READY],
    "the first of a pipeline": [p(FIVE), b(), e(), p("SELECT 1"), b(), e(), S, READY],
    "several in a pipeline": [
        p(LAUNCH), b(), e(), p(FIVE), b(), e(), p(LAUNCH), b(), e(), p("SELECT 1"), b(), e(), p(FIVE), b(), e(), S,
        READY],
    "several batches in flight": [
        p(LAUNCH), b(), e(), S, p("SELECT 1"), b(), e(), S, p(FIVE), b(), e(), S, q("SELECT 2"), q(LAUNCH),
        Wait(m.ReadyForQuery, 5)],
    "an error before it": [p("SELECT x"), b(), e(), p(LAUNCH), b(), e(), S, READY, p(LAUNCH), b(), e(), S, READY],
    "an error of execution before it": [
        p("SELECT 1/0"), b(), e(), p(LAUNCH), b(), e(), p("SELECT 1"), S, READY],
    "an error in it": [
        p("SELECT pg_background_launch('x', 1)"), b(), e(), p("SELECT 1"), b(), e(), S, READY],
    "an error after it": [p(LAUNCH), b(), e(), p("SELECT 1/0"), b(), e(), p(LAUNCH), b(), e(), S, READY],
    "what comes before a failed call is undone": [
        p("INSERT INTO log VALUES (1)"), b(), e(), p("SELECT pg_background_launch('x', 1)"), b(), e(), S, READY,
        q("TABLE log"), READY],
    "what comes before a failed result is undone": [
        p("INSERT INTO log VALUES (1)"), b(), e(), p("SELECT * FROM pg_background_result(1) AS (n int)"), b(),
        e(), S, READY, q("TABLE log"), READY],
    "what a failed call's own statement did is undone": [
        p("SELECT write_log(2), pg_background_launch('x', 1)"), b(), e(), S, READY, q("TABLE log"), READY,
        q("SELECT write_log(2), pg_background_launch('x', 1)"), READY, q("TABLE log"), READY,
        q("SELECT * FROM pg_background_result(write_log(2)) AS (n int)"), READY, q("TABLE log"), READY],
    "a query in the middle of a batch": [p(LAUNCH), b(), e(), q("SELECT 2"), READY, p(LAUNCH), b(), e(), S, READY],
    "a query with a call in the middle of a batch": [
        p("SELECT 1"), b(), e(), q(LAUNCH), READY, p("SELECT 1"), b(), e(), S, READY],
    "a query in a failed batch": [
        p("SELECT pg_background_launch('x', 1)"), b(), e(), q("SELECT 2"), q(LAUNCH), S, READY],
    "a function call after it": [
        p(LAUNCH), b(), e(), m.FunctionCall(1395, (), (b"-3",), 0), READY, S, READY],
    "copy out in the pipeline": [
        p(LAUNCH), b(), e(), p("COPY (VALUES (1)) TO STDOUT"), b(), e(), S, READY],
    "copy in in the pipeline": [
        p(LAUNCH), b(), e(), p("COPY log FROM STDIN"), b(), e(), H, COPY_READY, m.CopyData(b"1\n"), m.CopyDone(), S,
        READY, q("DELETE FROM log"), READY],
    "copy in in the pipeline with the extra sync": [
        p(LAUNCH), b(), e(), p("COPY log FROM STDIN"), b(), e(), S, COPY_READY, m.CopyData(b"1\n"), m.CopyDone(), S,
        READY, q("DELETE FROM log"), READY],
    "copy in in the pipeline given up": [
        p(LAUNCH), b(), e(), p("COPY log FROM STDIN"), b(), e(), S, COPY_READY, m.CopyFail(b"no"), S, READY],
    "copy in in the pipeline of bad data": [
        p(LAUNCH), b(), e(), p("COPY log FROM STDIN"), b(), e(), S, COPY_READY, m.CopyData(b"x\n"), m.CopyDone(), S,
        READY],
    "begin and commit in the pipeline": [
        p("BEGIN"), b(), e(), p(LAUNCH), b(), e(), p("COMMIT"), b(), e(), p(LAUNCH), b(), e(), S, READY],

    # Transactions.
    "in a transaction": [q("BEGIN"), READY, p(LAUNCH), b(), e(), S, READY, q(FIVE), READY, q("COMMIT"), READY],
    "in a failed transaction": [
        q("BEGIN"), READY, q("SELECT 1/0"), READY, p(LAUNCH), b(), e(), S, READY, q(LAUNCH), READY,
        q(f"SELECT 1; {LAUNCH}"), READY, q("ROLLBACK"), READY],
    "prepared before, executed in a failed transaction": [
        p(LAUNCH, "s"), S, READY, q("BEGIN; SELECT 1/0"), READY, b("s"), e(), S, READY, q("ROLLBACK"), READY,
        b("s"), e(), S, READY],
    "a call that fails in a transaction": [
        q("BEGIN"), READY, p("SELECT pg_background_launch('x', 1)"), b(), e(), S, READY, q(LAUNCH), READY,
        q("COMMIT"), READY],
    "back to a savepoint": [
        q("BEGIN; SAVEPOINT a"), READY, q("SELECT pg_background_launch('x', 1)"), READY, q("ROLLBACK TO a"), READY,
        q(LAUNCH), READY, q("COMMIT"), READY],

    # Query.
    "a query": [q(LAUNCH), READY, q(FIVE), READY],
    "queries of several statements": [
        q(f"SELECT 1; {LAUNCH}; SELECT 2"), READY, q(f"{LAUNCH}; {LAUNCH}"), READY, q(f"; ;{FIVE}; ; SELECT 2;;"),
        READY, q(f"CREATE TEMP TABLE x (a int); INSERT INTO x VALUES (1); {FIVE}; TABLE x; DROP TABLE x"), READY],
    "begin and commit in a query": [
        q(f"BEGIN; {LAUNCH}; COMMIT"), READY, q(f"BEGIN; {LAUNCH}"), READY, q(f"{LAUNCH}; COMMIT; {LAUNCH}"), READY,
        q(f"SELECT 1; BEGIN; INSERT INTO log VALUES (5); {LAUNCH}; ROLLBACK; TABLE log"), READY],
    "an error in a query of several statements": [
        q(f"INSERT INTO log VALUES (1); {LAUNCH}; SELECT 1/0; SELECT 2"), READY, q("TABLE log"), READY,
        q("INSERT INTO log VALUES (1); SELECT pg_background_launch('x', 1); SELECT 2"), READY, q("TABLE log"), READY],
    "copy in a query": [
        q(f"COPY log FROM STDIN; {LAUNCH}; COPY log FROM STDIN; TABLE log; DELETE FROM log"), COPY_READY,
        m.CopyData(b"1\n"), m.CopyDone(), COPY_READY, m.CopyData(b"2\n"), m.CopyDone(), READY],
    "copy out in a query": [q(f"{LAUNCH}; COPY (VALUES (1), (2)) TO STDOUT; SELECT 1"), READY],
    "copy given up in a query": [q(f"{LAUNCH}; COPY log FROM STDIN; SELECT 2"), COPY_READY, m.CopyFail(b"no"), READY],
    "copy of bad data in a query": [
        q(f"{LAUNCH}; COPY log FROM STDIN; SELECT 2"), COPY_READY, m.CopyData(b"x\n"), m.CopyDone(), READY],
    "notices and settings in a query": [
        q(f"DROP TABLE IF EXISTS none; {LAUNCH}; SET application_name = 'x'; DO $$ BEGIN RAISE NOTICE 'n'; END $$"),
        READY],
    "notifications in a query": [q(f"LISTEN c; NOTIFY c; {LAUNCH}"), READY],
    "locks and cursors in a query": [
        q(f"BEGIN; LOCK TABLE log; {LAUNCH}; DECLARE c CURSOR FOR SELECT 1; FETCH ALL c; COMMIT"), READY],

    # Errors and their places.
    "places of errors": [
        q("SELECT 'äöü', pg_background_launch(nope)"), READY, p("SELECT '€', pg_background_launch($1, nope)"), S, READY,
        q("SELECT 'äöü𝄞' AS \"ß\", pg_background_launch('x', 'y'), nope"), READY,
        q(f"SELECT 'ä'; {LAUNCH}; SELECT 'ö' || nope"), READY,
        q("SELECT 'ä'; SELECT 'ö', pg_background_launch('x', nope)"), READY,
        q("SELECT 1; SELECT pg_background_launch('x') FROM none"), READY,
        q("SELECT 1; SELECT pg_background_launch('x') WHERE"), READY,
        q("SELECT 'ü', pg_background_launch(1)"), READY,
        p("SELECT * FROM pg_background_result('x'::text) AS (n int)"), S, READY,
        p("SELECT * FROM pg_background_result(1) AS (n none)"), S, READY],
    "functions that do not exist": [
        q("SELECT pg_background_launch()"), READY, q("SELECT pg_background_launch('x', 1, 'l', 2)"), READY,
        q("SELECT pg_background_launch(nope => 'x')"), READY],
    "named arguments": [
        q("SELECT pg_background_launch(sql => 'SELECT 1'), pg_background_launch(queue_size => 0, sql := 'SELECT 1')"),
        READY],
}
# fmt: on


NOT_ON_18 = {
    "a function call after it": "the server itself fails: unexpected state STARTED",
    # Its implicit transaction goes on to Sync; ours ends with the Query.
    "a query with a call in the middle of a batch": "known difference: ReadyForQuery says T",
}
NOT_ON_19 = {
    # Where the functions exist, the server says which of their arguments do not fit.
    "functions that do not exist": "known difference: DETAIL says that there is no such function",
}


def comparable(messages: list[m.BackendMessage]) -> list[m.BackendMessage]:
    """The messages, less pids, and less the place in the server's source where an error arose."""
    tables: dict[int, int] = {}

    def value(value: bytes | None) -> bytes | None:
        if value is None:
            return None
        if re.fullmatch(rb"\d{3,7}", value):
            return b"pid"
        binary = struct.unpack(">i", value)[0] if len(value) == 4 else 0
        return b"bpid" if 100 < binary < (1 << 22) else value

    def comparable(message: m.BackendMessage) -> m.BackendMessage:
        match message:
            case m.DataRow(values):
                return m.DataRow(tuple(map(value, values)))
            case m.ErrorResponse(fields):
                return m.ErrorResponse({k: v for k, v in fields.items() if k in "SVCMDHPcdnst"})
            case m.NotificationResponse():
                return replace(message, pid=0)
            case m.RowDescription(fields=columns):
                return m.RowDescription(
                    tuple(
                        replace(
                            field,
                            table_oid=field.table_oid
                            and tables.setdefault(field.table_oid, len(tables) + 1),
                        )
                        for field in columns
                    )
                )
        return message

    return [comparable(message) for message in messages]


# What is not the same yet; the last of each says how.
# fmt: off
DIFFERENT: dict[str, Script] = {
    # The words count the hidden columns of the stand-in too.
    "too many result formats for a result": [p(FIVE), b(results=(0, 0, 0)), S, READY],
    # The types of arguments are the declared ones, where the server says unknown.
    "an argument of a wrong type beside a constant": [q("SELECT pg_background_launch('x', true)"), READY],
    # Statements of such a Query run through the extended protocol, each as if it were alone.
    "LOCK in a query": [q(f"LOCK TABLE log; {LAUNCH}"), READY],
    "a cursor in a query": [q(f"DECLARE c CURSOR FOR SELECT 1; {LAUNCH}; FETCH c"), READY],
    "SET LOCAL in a query": [q(f"SET LOCAL a.b = 'c'; {LAUNCH}; SHOW a.b"), READY],
    # The server would have read the whole string before it runs any of it.
    "a syntax error behind a call in a query": [q(f"SELECT 1; {LAUNCH}; SELEC 2"), READY],
}
# fmt: on


@pytest.mark.xfail(strict=True, reason="known difference")
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_answered_differently(server: Server, proxy: Proxy, native: str, name: str) -> None:
    with Frontend(server, database=native) as client:
        direct = record(client, DIFFERENT[name])
    with Frontend(proxy, database="ours") as client:
        assert comparable(record(client, DIFFERENT[name])) == comparable(direct)


@pytest.mark.parametrize("waiting", [True, False], ids=["", "all at once"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_calls_are_answered_as_functions_are(
    server: Server, proxy: Proxy, native: str, name: str, waiting: bool
) -> None:
    if server.version >= 180000 and name in NOT_ON_18:
        pytest.skip(NOT_ON_18[name])
    if server.version >= 190000 and name in NOT_ON_19:
        pytest.skip(NOT_ON_19[name])
    with Frontend(server, database=native) as client:
        client.query("TRUNCATE log")
        direct = record(client, SCRIPTS[name], waiting=waiting)
    with Frontend(proxy, database="ours") as client:
        client.query("TRUNCATE log")
        proxied = record(client, SCRIPTS[name], waiting=waiting)
        assert comparable(proxied) == comparable(direct)
        answer = client.query(result("SELECT 42", "AS (n int)"))
        assert rows(answer) == [(b"42",)]
        assert rows(client.query("SELECT name FROM pg_prepared_statements WHERE name ~ '^_'")) == []
        assert rows(client.query("SELECT name FROM pg_cursors")) == []


# --- results without a column list, which no function can have -----------------------------------


BARE = "SELECT * FROM pg_background_result(pg_background_launch($job$SELECT 1 AS a, 'x' AS b$job$))"


def test_columns_that_only_the_job_knows(proxy: Proxy) -> None:
    with Frontend(proxy) as client:
        answer = client.ask(p(BARE), b(results=(1, 0)), d(b"P"), e(), S)
        assert kinds(answer) == "12TDCZ"
        (description,) = (m_ for m_ in answer if isinstance(m_, m.RowDescription))
        assert [(f.name, f.type_oid, f.format) for f in description.fields] == [
            (b"a", oids.INT4, 1),
            (b"b", oids.TEXT, 0),
        ]
        assert rows(answer) == [(b"\0\0\0\1", b"x")]


def test_describing_a_statement_of_unknown_columns_fails_and_says_why(proxy: Proxy) -> None:
    with Frontend(proxy) as client:
        answer = client.ask(p(BARE, "s"), d(b"S", "s"), b("s"), e(), S)
        assert kinds(answer) == "1tEZ"
        assert [error.sqlstate for error in errors(answer)] == ["0A000"]
        assert kinds(client.ask(b("s"), d(b"P"), e(), S)) == "2TDCZ"


def test_a_job_does_not_hang_when_its_portal_is_left(server: Server, proxy: Proxy) -> None:
    """More rows than its queue holds: it must be let go on to its end."""
    job = "SELECT repeat('x', 1000) FROM generate_series(1, 10000)"
    sql = result(job, "AS (t text)")
    leave: dict[str, Script] = {
        "sync": [S],
        "close": [c(b"P", ""), S],
        "bind": [b(), S],
        "query": [S, READY, q("SELECT 1")],
        "rollback": [S, READY, q("ROLLBACK")],
        "error": [p("SELECT x"), S, READY, q("ROLLBACK")],
    }
    with server.connect() as other:
        for name, script in leave.items():
            with Frontend(proxy) as client:
                if name != "sync":
                    client.query("BEGIN")
                client.send(p(sql), b(), e("", 1), H)
                client.until_type(m.PortalSuspended)
                record(client, script)
                wait_until(lambda: not _jobs(other))
                pid = client.value("SELECT pg_background_launch('SELECT 1')")
                assert rows(client.query(f"SELECT * FROM pg_background_result({pid}) AS (n int)"))


def test_a_launch_is_not_delayed_by_what_follows_it(server: Server, proxy: Proxy) -> None:
    """The job has ended while the rest of the string still runs."""
    with database(server, "delay") as name, server.connect(dbname=name) as other:
        other.execute("CREATE TABLE done (n int)")
        launch = "SELECT pg_background_launch('INSERT INTO done VALUES (1)')"
        wait = "SELECT pg_advisory_lock(1)"
        other.execute(wait)
        unlock = "SELECT pg_advisory_unlock(1)"
        pipeline = [p(launch), b(), e(), p(wait), b(), e(), p(unlock), b(), e(), S]
        scripts: list[list[Sent]] = [[q(f"{launch}; {wait}; {unlock}")], [*pipeline]]
        for count, script in enumerate(scripts, 1):
            with Frontend(proxy, database=name) as client:
                client.send(*script)
                wait_until(functools.partial(_has_done, other, count))
                other.execute(unlock)
                assert errors(client.until_ready()) == []
            other.execute(wait)


def _has_done(connection: Any, count: int) -> bool:
    row: tuple[int] = connection.execute("SELECT count(*) FROM done").fetchone()
    return row == (count,)


def test_a_failure_after_a_launch_does_not_undo_it(server: Server, proxy: Proxy) -> None:
    with database(server, "undone") as name, server.connect(dbname=name) as other:
        other.execute("CREATE TABLE done (n int)")
        launch = "SELECT pg_background_launch('INSERT INTO done VALUES (2)')"
        with Frontend(proxy, database=name) as client:
            client.ask(
                p("INSERT INTO done VALUES (1)"), b(), e(), p(launch), b(), e(), p("SELECT x"), S
            )
            client.query(f"INSERT INTO done VALUES (1); {launch}; SELECT 1/0")
            query = "SELECT array_agg(n) FROM done"
            wait_until(lambda: other.execute(query).fetchone() == ([2, 2],))


def test_an_error_in_copy_arrives_while_the_client_still_sends(proxy: Proxy) -> None:
    """It must not wait for the end of the data."""
    with Frontend(proxy) as client:
        client.query("CREATE TEMP TABLE t (n int)")
        client.send(q(f"{LAUNCH}; COPY t FROM STDIN"))
        client.until_type(m.CopyInResponse)
        client.send(m.CopyData(b"x\n1\n"))
        assert kinds(client.until_ready()) == "EZ"
        client.send(m.CopyData(b"1\n"), m.CopyDone())
        assert client.value("SELECT 7") == "7"


def _jobs(connection: Any) -> list[Any]:
    query = "SELECT pid, query FROM pg_stat_activity WHERE application_name = 'pg_background'"
    rows_: list[Any] = connection.execute(query).fetchall()
    return [row for row in rows_ if "repeat" in row[1]]


# --- drivers ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def asyncpg_connection(proxy: Proxy) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(
        host=proxy.host, port=proxy.port, user="postgres", database="postgres", timeout=10
    )
    try:
        yield connection
    finally:
        await connection.close(timeout=10)


TYPES = [
    ("int2", "-3", -3),
    ("int4", "123456", 123456),
    ("int8", "9000000000", 9000000000),
    ("float4", "1.5", 1.5),
    ("float8", "0.1", 0.1),
    ("bool", "true", True),
    ("text", "'ä€'", "ä€"),
    ("varchar(5)", "'x'", "x"),
    ("bytea", "'\\x00ff'", b"\0\xff"),
    (
        "uuid",
        "'6d0f7f2e-6c5a-4b5e-9d4c-1f6d2b1f0a11'",
        uuid.UUID("6d0f7f2e-6c5a-4b5e-9d4c-1f6d2b1f0a11"),
    ),
    ("date", "'2024-02-29'", datetime.date(2024, 2, 29)),
    ("timestamp", "'2024-02-29 12:00:00.5'", datetime.datetime(2024, 2, 29, 12, 0, 0, 500000)),
    (
        "timestamptz",
        "'2024-02-29 12:00:00+00'",
        datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC),
    ),
    ("numeric", "12345.6789", decimal.Decimal("12345.6789")),
    ("interval", "'1 day 02:03:04'", datetime.timedelta(days=1, hours=2, minutes=3, seconds=4)),
    ("json", """'{"a": 1}'""", '{"a": 1}'),
    ("jsonb", """'{"a": 1}'""", '{"a": 1}'),
    ("int4[]", "'{{1,2},{3,NULL}}'", [[1, 2], [3, None]]),
    ("text[]", """'{a,"b c",NULL}'""", ["a", "b c", None]),
    ("int4", "NULL", None),
]


async def test_asyncpg_gets_each_type_in_binary(proxy: Proxy) -> None:
    job = "SELECT " + ", ".join(f"{literal}::{type_}" for type_, literal, _ in TYPES)
    columns = ", ".join(f"c{number} {type_}" for number, (type_, _, _) in enumerate(TYPES))
    async with asyncpg_connection(proxy) as connection:
        for zone in ("UTC", "Asia/Tokyo", "America/St_Johns"):
            await connection.execute(f"SET timezone = '{zone}'")
            pid = await connection.fetchval("SELECT pg_background_launch($1, $2)", job, 0)
            row = await connection.fetchrow(
                f"SELECT * FROM pg_background_result($1) AS ({columns})", pid
            )
            assert list(row) == [value for _, _, value in TYPES]


async def test_asyncpg_gets_types_that_only_the_server_has_in_binary(proxy: Proxy) -> None:
    sql = "SELECT int4range(n, 9), point(n, 2), n::bit(3), ARRAY[int4range(1, n)], 'x'::tsvector"
    listed = "r int4range, p point, b bit(3), a int4range[], v tsvector"
    sql += " FROM generate_series(1, 3) n"
    async with asyncpg_connection(proxy) as connection:
        pid = await connection.fetchval("SELECT pg_background_launch($1)", sql)
        ours = await connection.fetch(f"SELECT * FROM pg_background_result($1) AS ({listed})", pid)
        assert [tuple(row) for row in ours] == [tuple(row) for row in await connection.fetch(sql)]
        assert await connection.fetchval("SELECT 1") == 1


async def test_asyncpg_statements_cursors_and_transactions(proxy: Proxy) -> None:
    async with asyncpg_connection(proxy) as connection:
        launch = await connection.prepare("SELECT pg_background_launch($1)")
        assert [parameter.name for parameter in launch.get_parameters()] == ["text"]
        fetch = await connection.prepare("SELECT * FROM pg_background_result($1) AS (n int)")
        for number in range(5):
            pid = await launch.fetchval(f"SELECT {number}")
            assert [tuple(row) for row in await fetch.fetch(pid)] == [(number,)]
        async with connection.transaction():
            pid = await launch.fetchval("SELECT generate_series(1, 100)")
            cursor = await fetch.cursor(pid)
            assert [row[0] for row in await cursor.fetch(30)] == [*range(1, 31)]
            assert [row[0] for row in await cursor.fetch(100)] == [*range(31, 101)]
            pid = await launch.fetchval("SELECT generate_series(1, 100)")
            assert [row[0] async for row in fetch.cursor(pid, prefetch=7)] == [*range(1, 101)]
        with pytest.raises(asyncpg.UndefinedObjectError):
            async with connection.transaction():
                await fetch.fetch(1)
        await connection.execute("DISCARD ALL")
        assert await connection.fetchval(
            "SELECT pg_background_detach(pg_background_launch('SELECT 1'))"
        ) in (None, "")


async def test_psycopg_async_and_pipeline(proxy: Proxy) -> None:
    connection = await psycopg.AsyncConnection.connect(proxy.dsn(), autocommit=True)
    async with connection:
        async with connection.pipeline():
            cursors = [
                await connection.execute("SELECT pg_background_launch(%s)", [f"SELECT {number}"])
                for number in range(5)
            ]
            pids = [(await cursor.fetchone() or [0])[0] for cursor in cursors]
            results = [
                await connection.execute(f"SELECT * FROM pg_background_result({pid}) AS (n int)")
                for pid in pids
            ]
            assert [await result_.fetchone() for result_ in results] == [(n,) for n in range(5)]

        async def one(number: int) -> Any:
            other = await psycopg.AsyncConnection.connect(proxy.dsn(), autocommit=True)
            async with other:
                cursor = await other.execute(result(f"SELECT {number}", "AS (n int)"))
                return await cursor.fetchone()

        assert await asyncio.gather(*map(one, range(10))) == [(number,) for number in range(10)]


def test_psycopg_binary_prepared_and_failing_in_a_pipeline(proxy: Proxy) -> None:
    with proxy.connect() as connection:
        connection.prepare_threshold = 0
        with connection.cursor(binary=True) as cursor:
            for number in range(3):
                cursor.execute(
                    "SELECT pg_background_launch(%s)", [f"SELECT {number}, 1.5::numeric"]
                )
                [(pid,)] = cursor.fetchall()
                cursor.execute(
                    "SELECT * FROM pg_background_result(%s) AS (n int, x numeric)", [pid]
                )
                assert cursor.fetchall() == [(number, decimal.Decimal("1.5"))]
        with pytest.raises(psycopg.errors.UndefinedObject), connection.pipeline():  # noqa: PT012
            connection.execute("SELECT 1")
            connection.execute("SELECT * FROM pg_background_result(%s) AS (n int)", [1])
            connection.execute("SELECT 2")
        assert connection.execute("SELECT 3").fetchone() == (3,)
        with connection.transaction(), connection.cursor("named") as named:
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                named.execute(result("SELECT 1", "AS (n int)"))
            raise psycopg.Rollback
