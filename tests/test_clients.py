"""PostgreSQL's own client programs, direct and by the proxy: what they print is the same.

Invariant: a tool is of the server's version or newer, its output is compared whole, and what is
masked (times, OIDs, pids) is named where it is masked. Drivers are in test_drivers.py.
"""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.background import wait_until
from tests.support.clients import (
    DATABASE,
    TIMEOUT,
    Done,
    Endpoint,
    find_tool,
    finished,
    run,
    same,
    start,
    succeed,
    tool,
)
from tests.support.servers import Proxy, Server, database

SEGMENT: Final = 16 << 20

OBJECTS: Final = r"""
CREATE SCHEMA app;
COMMENT ON SCHEMA app IS 'of the application';
CREATE TYPE app.mood AS ENUM ('sad', 'glad');
CREATE TYPE app.pair AS (a int, b text);
CREATE DOMAIN app.positive AS int CHECK (VALUE > 0);
CREATE SEQUENCE app.numbers START 7;
CREATE TABLE app.people (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    mood app.mood DEFAULT 'glad',
    age app.positive,
    pairs app.pair[],
    born timestamptz DEFAULT '2001-02-03 04:05:06Z',
    data jsonb,
    raw bytea,
    CHECK (length(name) < 100)
);
COMMENT ON COLUMN app.people.data IS 'pg_background_launch(''SELECT 1'')';
CREATE TABLE app.orders (
    id bigint PRIMARY KEY,
    person int REFERENCES app.people ON DELETE CASCADE,
    amount numeric(10, 2)
);
CREATE INDEX ON app.orders (person) WHERE amount > 0;
CREATE INDEX by_lower_name ON app.people (lower(name));
CREATE TABLE app.events (at date, what text) PARTITION BY RANGE (at);
CREATE TABLE app.events_old PARTITION OF app.events FOR VALUES FROM (MINVALUE) TO ('2020-01-01');
CREATE TABLE app.events_new PARTITION OF app.events DEFAULT;
CREATE VIEW app.glad AS SELECT id, name FROM app.people WHERE mood = 'glad';
CREATE MATERIALIZED VIEW app.totals AS SELECT person, sum(amount) FROM app.orders GROUP BY 1;
CREATE FUNCTION app.later(job text) RETURNS int LANGUAGE plpgsql AS $_$
BEGIN
    RETURN pg_background_launch('SELECT $$' || job || '$$');  -- never called
END $_$;
CREATE FUNCTION app.twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n';
CREATE PROCEDURE app.nothing() LANGUAGE plpgsql AS 'BEGIN COMMIT; END';
CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER touch BEFORE UPDATE ON app.people FOR EACH ROW EXECUTE FUNCTION app.touch();
CREATE RULE quiet AS ON INSERT TO app.glad DO INSTEAD NOTHING;
CREATE AGGREGATE app.plus (int) (SFUNC = int4pl, STYPE = int, INITCOND = '0');
CREATE PUBLICATION news FOR TABLE app.people;
ALTER TABLE app.orders ENABLE ROW LEVEL SECURITY;
CREATE POLICY few ON app.orders TO alice USING (amount < 10);
GRANT USAGE ON SCHEMA app TO alice;
GRANT SELECT (id, name) ON app.people TO alice;
ALTER DEFAULT PRIVILEGES IN SCHEMA app GRANT SELECT ON TABLES TO alice;
INSERT INTO app.people (name, age, pairs, data, raw)
    SELECT 'nämé ' || i, i, ARRAY[ROW(i, E'\t\\' || i)]::app.pair[],
        jsonb_build_object('call', $$SELECT pg_background_result(1)$$, 'n', i), '\x00ff'
    FROM generate_series(1, 500) i;
INSERT INTO app.orders SELECT i, i % 500 + 1, i / 7.0 FROM generate_series(1, 2000) i;
INSERT INTO app.events VALUES ('2019-01-01', 'old'), ('2021-01-01', NULL), (NULL, '');
REFRESH MATERIALIZED VIEW app.totals;
SELECT setval('app.numbers', 42);
"""


# --- psql ----------------------------------------------------------------------------------------

DESCRIBE: Final = r"""
\set ECHO all
\set VERBOSITY verbose
SET search_path = app, public;
\d
\d+ people
\d orders
\d+ events
\d by_lower_name
\dt+ app.ev*
\di
\dv
\dm
\ds
\df
\df app.plus
\sf app.later
\sf+ app.touch
\sv app.glad
\dT+
\dD
\dn+
\dp
\ddp
\du
\drds
\dx
\dy
\dF
\dRp+
\dL
\do app.*
\dO pg_c_utf8
\des
\z people
\l
\encoding
\conninfo
\set ECHO_HIDDEN on
\d people
\dt none
"""

STATEMENTS: Final = r"""
\set VERBOSITY verbose
SELECT * FROM app.people WHERE id < 3 \gx
SELECT 1 AS one, 'two' AS two \gdesc
SELECT 41 + 1 AS answer \gset
\echo :answer
SELECT format('SELECT %s AS n', i) FROM generate_series(1, 3) i \gexec
SELECT i % 2 AS a, i % 3 AS b, i FROM generate_series(1, 3) i \crosstabview
SELECT 1; SELECT 2 \; SELECT 3;
SELECT none;
\errverbose
SELECT 1/0;
DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two' USING DETAIL = 'd', HINT = 'h'; END $$;
\set FETCH_COUNT 7
SELECT i FROM generate_series(1, 30) i;
SELECT 1/(10 - i) FROM generate_series(1, 30) i;
\unset FETCH_COUNT
\set ON_ERROR_ROLLBACK on
BEGIN;
SELECT none;
CREATE TABLE kept (a int);
COMMIT;
TABLE kept;
\set AUTOCOMMIT off
INSERT INTO kept VALUES (1);
ROLLBACK;
TABLE kept;
COMMIT;
\set AUTOCOMMIT on
PREPARE p (int) AS SELECT $1 + 1;
EXECUTE p (1);
BEGIN;
DECLARE c SCROLL CURSOR FOR SELECT generate_series(1, 5);
FETCH 2 FROM c;
MOVE ABSOLUTE 4 c;
FETCH BACKWARD 2 FROM c;
COMMIT;
SELECT * FROM pg_background_none(1);
SELECT 'pg_background_launch(''x'')' AS pg_background_result;
EXPLAIN (COSTS OFF) SELECT * FROM app.people WHERE lower(name) = 'pg_background_launch';
\timing off
\pset format csv
SELECT 'a,b', NULL;
\c - alice
SELECT current_user, session_user;
SELECT * FROM app.people LIMIT 1;
\c - - - 1
"""


def psql(endpoint: Endpoint, server: Server, *args: str | Path, input: str = "") -> Done:
    return run(endpoint, program(server, "psql"), "-X", *args, input=input)


def program(server: Server, name: str) -> str:
    """A program whose version does not matter."""
    own = server.bin / name
    return str(own) if own.exists() else f"/usr/bin/{name}"


def fill(endpoint: Endpoint, server: Server) -> None:
    done = psql(endpoint, server, "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", input=OBJECTS)
    assert done.code == 0, done.err


def test_psql_describes_objects(server: Server, proxy: Proxy) -> None:
    def describe(endpoint: Endpoint) -> Done:
        fill(endpoint, server)
        done = psql(endpoint, server, "-f", "-", input=DESCRIBE)
        # psql asks by OID, which ECHO_HIDDEN shows; \conninfo of version 18 shows the pid.
        out = re.sub(r"'\d{5,}'|(Backend PID +\|) \d+", r"\1 NUMBER", done.out)
        return Done(done.code, out, done.err)

    done = same(server, proxy, describe)
    assert 'Table "app.people"' in done.out
    assert done.code == 0


def test_psql_runs_statements(server: Server, proxy: Proxy) -> None:
    def talk(endpoint: Endpoint) -> Done:
        fill(endpoint, server)
        return psql(endpoint, server, "-a", "-f", "-", input=STATEMENTS)

    done = same(server, proxy, talk)
    assert "function pg_background_none(integer) does not exist" in done.err


def test_psql_copies(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    text, binary = tmp_path / "text", tmp_path / "binary"
    script = rf"""
        \copy (SELECT i, repeat('x', i % 50), 'pg_background_launch(1)' FROM generate_series(1, 20000) i) TO '{text}'
        CREATE TABLE t (i int, x text, y text);
        \copy t FROM '{text}'
        \copy t TO '{binary}' (FORMAT binary)
        \copy t FROM '{binary}' (FORMAT binary)
        SELECT count(*), sum(i), sum(length(x)) FROM t;
        \copy t FROM stdin (FORMAT csv)
1,"a
b",c
\.
        \copy t FROM stdin
bad
\.
        COPY t (i) FROM stdin;
7
\.
        COPY (SELECT * FROM t WHERE i IN (1, 7)) TO stdout (FORMAT csv, HEADER);
        \copy t TO program 'wc -l'
        \copy t FROM program 'echo 9; exit 3'
        \copy none FROM '{text}'
        SELECT count(*) FROM t;
    """  # noqa: E501

    def copy(endpoint: Endpoint) -> tuple[Done, bytes, bytes]:
        done = psql(endpoint, server, "-f", "-", input=script)
        return done, text.read_bytes(), binary.read_bytes()

    done, _, _ = same(server, proxy, copy)
    assert "COPY 20000\n" in done.out
    assert " 40000 |" in done.out


def test_psql_watches(server: Server, proxy: Proxy) -> None:
    # The count that versions from 16 on take as an option; before, an error ends it.
    script = r"""
        CREATE SEQUENCE s;
        SELECT 6 / (4 - nextval('s')) AS n \watch 0.05
        SELECT 'after';
    """

    def watch(endpoint: Endpoint) -> Done:
        done = psql(endpoint, server, "-f", "-", input=script)
        return Done(done.code, re.sub(r"(?m)^.*\(every .*$", "TIME", done.out), done.err)

    done = same(server, proxy, watch)
    assert done.out.count("TIME") == 3
    assert "division by zero" in done.err
    assert "after" in done.out


def test_psql_watches_a_number_of_times(server: Server, proxy: Proxy) -> None:
    if server.version < 160000 or not (server.bin / "psql").exists():
        pytest.skip(r"\watch has no count before psql 16")

    def watch(endpoint: Endpoint) -> Done:
        done = psql(endpoint, server, "-f", "-", input=r"SELECT 1 AS n \watch i=0.05 c=3")
        return Done(done.code, re.sub(r"(?m)^.*\(every .*$", "TIME", done.out), done.err)

    assert same(server, proxy, watch).out.count("TIME") == 3


def test_psql_binds_and_prepares(server: Server, proxy: Proxy) -> None:
    if server.version < 160000 or not (server.bin / "psql").exists():
        pytest.skip(r"psql has \bind from 16 on")
    script = (
        "SELECT $1::int + $2::int AS sum \\bind 1 2 \\g\nSELECT $1::int \\bind x \\g\nSELECT 1;\n"
    )
    if server.version >= 180000:
        script += r"""
            SELECT $1::int AS n \parse s
            \bind_named s 5 \g
            \bind_named s 6 \g
            \close_prepared s
            \bind_named s 7 \g
            \startpipeline
            SELECT $1 \bind 1 \sendpipeline
            SELECT $1::int \bind x \sendpipeline
            SELECT $1 \bind 3 \sendpipeline
            \syncpipeline
            SELECT $1 \bind 4 \sendpipeline
            \flushrequest
            \getresults 1
            \endpipeline
            SELECT 'the end';
        """

    def bind(endpoint: Endpoint) -> Done:
        return psql(endpoint, server, "-f", "-", input=script)

    done = same(server, proxy, bind)
    assert 'invalid input syntax for type integer: "x"' in done.err


def test_psql_large_objects_and_notifications(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    given, got = tmp_path / "given", tmp_path / "got"
    given.write_bytes(bytes(range(256)) * 5000)
    script = rf"""
        \lo_import '{given}' comment
        \lo_export :LASTOID '{got}'
        \lo_list
        \lo_unlink :LASTOID
        LISTEN news;
        NOTIFY news, 'pg_background_launch(1)';
        NOTIFY news;
    """

    def talk(endpoint: Endpoint) -> tuple[Done, bytes]:
        done = psql(endpoint, server, "-f", "-", input=script)
        out = re.sub(
            r"(lo_import|lo_unlink) \d+|PID \d+|^ +\d+ +\|", "NUMBER", done.out, flags=re.MULTILINE
        )
        return Done(done.code, out, done.err), got.read_bytes()

    done, exported = same(server, proxy, talk)
    assert exported == given.read_bytes()
    assert done.out.count("Asynchronous notification") == 2


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_psql_scripts_that_fail(
    server: Server, proxy: Proxy, tmp_path: Path, stop: bool, single: bool
) -> None:
    script = tmp_path / "script.sql"
    script.write_text("CREATE TABLE a ();\nSELECT none;\nCREATE TABLE b ();\n\\dt\n")
    options = [*(["-v", "ON_ERROR_STOP=1"] if stop else []), *(["-1"] if single else [])]

    def fail(endpoint: Endpoint) -> tuple[Done, Done, Done]:
        return (
            psql(endpoint, server, *options, "-f", script),
            psql(endpoint, server, "-c", r"\dt"),
            psql(endpoint, server, *options, "-c", "SELECT 1; SELECT none", "-c", "SELECT 2"),
        )

    failed, tables, _ = same(server, proxy, fail)
    assert failed.code == (3 if stop else 0)
    assert ("| a" in tables.out) == (not single)


INTERRUPTED: Final = {
    "a query": "SELECT pg_sleep(60)",
    "a query in a transaction": "BEGIN; SELECT pg_sleep(60); COMMIT",
    "copy out": r"\copy (SELECT repeat('x', 1000) FROM generate_series(1, 9999999)) TO '/dev/null'",
    "slow copy out": "COPY (SELECT 'x', pg_sleep(0.001) FROM generate_series(1, 99999)) TO STDOUT",
}


@pytest.mark.parametrize("statement", INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_in_psql(server: Server, proxy: Proxy, statement: str) -> None:
    def interrupt(endpoint: Endpoint) -> Done:
        process = start(
            endpoint,
            program(server, "psql"),
            *("-X", "-o", "/dev/null", "-c", statement, "-c", r"\echo after"),
        )
        try:
            with server.connect() as observer:
                wait_until(
                    lambda: observer.execute(
                        "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND state = 'active'"
                        " AND query ~ 'sleep|series' AND now() - query_start > '0.2 s'",
                        [DATABASE],
                    ).fetchone()
                )
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT)
        # Where COPY was interrupted, it says how many rows it was.
        return finished(endpoint, process.returncode, out, re.sub(rb"line \d+", b"line", err))

    done = same(server, proxy, interrupt)
    assert "Cancel request sent" in done.err
    # Of a query of several statements, psql 18 drops what comes after the cancelling.
    if ";" not in statement:
        assert "canceling statement due to user request" in done.err


def test_psql_launches_a_job(server: Server, proxy: Proxy) -> None:
    with database(server, DATABASE):
        done = psql(
            proxy,
            server,
            "-At",
            *("-c", "SELECT pg_background_launch('SELECT 6 * 7') AS pid \\gset"),
            input="",
        )
        assert done.code == 1  # -c takes no backslash commands behind SQL
        done = psql(
            proxy,
            server,
            *("-At", "-f", "-"),
            input="SELECT pg_background_launch('SELECT 6 * 7') AS pid \\gset\n"
            "SELECT * FROM pg_background_result(:pid) AS (n int) \\gdesc\n"
            "SELECT * FROM pg_background_result(:pid) AS (n int);\n",
        )
    assert (done.code, done.out.splitlines()[-1]) == (0, "42"), done


# --- dump and restore ----------------------------------------------------------------------------


def dump(endpoint: Endpoint, server: Server, *args: str | Path, dbname: str = DATABASE) -> str:
    """A dump in plain text; the word that restricts psql is a random one."""
    done = succeed(endpoint, tool(server, "pg_dump"), *args, dbname=dbname)
    assert not done.err
    return re.sub(r"(?m)^(\\(?:un)?restrict) \w+$", r"\1 WORD", done.out)


@pytest.mark.parametrize("options", [[], ["--inserts", "--rows-per-insert=50"], ["-s", "-c", "-C"]])
def test_dump_as_text(server: Server, proxy: Proxy, options: list[str]) -> None:
    def act(endpoint: Endpoint) -> str:
        fill(endpoint, server)
        return dump(endpoint, server, *options)

    assert "RETURN pg_background_launch(" in same(server, proxy, act)


def test_text_dumps_are_restored_by_psql(server: Server, proxy: Proxy) -> None:
    with database(server, DATABASE):
        fill(server, server)
        before = dump(server, server)
        written = succeed(server, tool(server, "pg_dump")).out
    tool(server, "psql")

    def act(endpoint: Endpoint) -> tuple[Done, str]:
        # The schema public has ACLs of the tests in it, hence no stop at what exists.
        done = psql(endpoint, server, "-f", "-", input=written)
        return done, dump(server, server)

    done, after = same(server, proxy, act)
    assert "ERROR" not in done.err
    assert after == before


@pytest.mark.parametrize(
    ("format", "jobs"),
    [
        *(("c", 1), ("d", 3), ("t", 1)),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("c", 3), ("d", 1))),
    ],
)
def test_archives_are_dumped_and_restored(
    server: Server, proxy: Proxy, tmp_path: Path, format: str, jobs: int
) -> None:
    pg_dump, pg_restore = tool(server, "pg_dump"), tool(server, "pg_restore")

    def act(endpoint: Endpoint) -> tuple[Done, Done, str, str]:
        archive = tmp_path / f"archive-{endpoint.port}"
        fill(endpoint, server)
        parallel = [f"-j{jobs}"]
        done = run(endpoint, pg_dump, f"-F{format}", "-f", archive,
                   *(parallel if format == "d" else []))  # fmt: skip
        before = dump(server, server)
        with database(server, "restored"):
            restored = run(endpoint, pg_restore, "-d", "restored",
                           *(parallel if format != "t" else []), archive)  # fmt: skip
            after = dump(server, server, dbname="restored")
        return done, restored, before, after

    done, restored, before, after = same(server, proxy, act)
    assert (done.code, restored.code) == (0, 0), (done, restored)
    assert after == before


def test_dumpall(server: Server, proxy: Proxy) -> None:
    pg_dumpall = tool(server, "pg_dumpall")
    tool(server, "pg_dump")

    def act(endpoint: Endpoint) -> str:
        done = succeed(endpoint, pg_dumpall, "-g")
        return re.sub(r"(?m)^(\\(?:un)?restrict) \w+$", r"\1 WORD", done.out)

    assert "CREATE ROLE alice;" in same(server, proxy, act)


# --- pgbench -------------------------------------------------------------------------------------

PIPELINE: Final = r"""
\set aid random(1, 100000)
\startpipeline
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = :aid;
SELECT 1;
\endpipeline
"""

JOBS: Final = r"""
\set n random(1, 1000000)
SELECT pg_background_launch('SELECT ' || :n) AS pid \gset
SELECT * FROM pg_background_result(:pid) AS (n int) \gset
SELECT 1 / (:n::int - :n::int + 1);
"""


BENCHED: Final = "clients_benched"


@pytest.fixture(scope="module")
def benched(server: Server, proxy: Proxy) -> Iterator[str]:
    """A database that pgbench has filled through the proxy; returns the path of pgbench."""
    pgbench = tool(server, "pgbench")
    with database(server, BENCHED):
        succeed(proxy, pgbench, "-i", "-q", dbname=BENCHED)
        yield pgbench


def bench(endpoint: Endpoint, pgbench: str, *args: str | Path) -> Done:
    return run(endpoint, pgbench, "-n", "-c4", "-j2", *args, dbname=BENCHED)


def totals(server: Server) -> tuple[int, int, int]:
    """Transactions so far, the sum of what they have added, the sum of what the accounts have."""
    with server.connect(dbname=BENCHED) as conn:
        row = conn.execute(
            "SELECT count(*), coalesce(sum(delta), 0),"
            " (SELECT sum(abalance) FROM pgbench_accounts) FROM pgbench_history"
        ).fetchone()
    assert row is not None
    return row


def processed(done: Done) -> str:
    assert done.code == 0, done.err
    found = re.search(r"transactions actually processed: (\S+)", done.out)
    assert found is not None, done.out
    assert "failed transactions: " not in done.out or "failed transactions: 0 " in done.out
    return found[1]


@pytest.mark.parametrize("steps", ["dtgvpf", "dtGvpf"])
def test_pgbench_fills_its_tables(server: Server, proxy: Proxy, steps: str) -> None:
    pgbench = tool(server, "pgbench")

    def act(endpoint: Endpoint) -> tuple[int, str, str]:
        done = run(endpoint, pgbench, "-i", "-I", steps, "--partitions=2")
        tables = psql(endpoint, server, "-c", r"\d pgbench*", "-c", "SELECT count(*), sum(aid), "
                      "sum(abalance), count(DISTINCT bid) FROM pgbench_accounts")  # fmt: skip
        said = re.sub(r"[\d.]+ s\b", "TIME", done.err)
        # How often progress is told depends on the time it takes.
        return done.code, re.sub(r".*\d+ of \d+ tuples.*|\r.*\r", "", said).strip(), tables.out

    code, _, tables = same(server, proxy, act)
    assert code == 0
    assert " 100000 | 5000050000 |" in tables


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
@pytest.mark.parametrize("script", ["tpcb-like", "select-only"])
def test_pgbench_runs(server: Server, proxy: Proxy, benched: str, mode: str, script: str) -> None:
    before = totals(server)
    for options, expected in ((["-t20"], "80/80"), (["-t5", "-C"], "20/20")):
        for endpoint in (server, proxy):
            done = bench(endpoint, benched, "-M", mode, "-b", script, *options)
            assert processed(done) == expected
    count, added, held = (now - then for now, then in zip(totals(server), before, strict=True))
    assert (count, held) == (200 if script == "tpcb-like" else 0, added)


@pytest.mark.parametrize("mode", ["extended", "prepared"])
def test_pgbench_runs_pipelines(
    server: Server, proxy: Proxy, benched: str, tmp_path: Path, mode: str
) -> None:
    script = tmp_path / "pipeline.sql"
    script.write_text(PIPELINE)
    for endpoint in (server, proxy):
        done = bench(endpoint, benched, "-M", mode, "-f", script, "-t20")
        assert processed(done) == "80/80"


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
def test_pgbench_launches_jobs(proxy: Proxy, benched: str, tmp_path: Path, mode: str) -> None:
    script = tmp_path / "jobs.sql"
    script.write_text(JOBS)
    done = bench(proxy, benched, "-M", mode, "-f", script, "-t10")
    assert processed(done) == "40/40"
    assert done.err.count("ERROR") == 0, done.err


# --- replication ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["-Xstream"], ["-Xfetch"], ["-Xnone", "-r32M"]])
def test_base_backups(server: Server, proxy: Proxy, tmp_path: Path, options: list[str]) -> None:
    pg_basebackup = tool(server, "pg_basebackup")

    def act(endpoint: Endpoint) -> tuple[Done, list[str], Done | None]:
        target = tmp_path / f"backup-{endpoint.port}"
        done = run(endpoint, pg_basebackup, "-D", target, "-cfast", "-P", *options, dbname=None)
        verified = None
        if verify := find_tool(server, "pg_verifybackup") if server.version >= 130000 else None:
            # WAL is left out: reading it would need a pg_waldump of the very same version.
            verified = run(endpoint, verify, "-n", target)
        names = sorted(path.name for path in target.iterdir())
        # Sizes change with what the server has written meanwhile, paths with the endpoint.
        said = re.sub(r"\d+/\d+ kB|backup-\d+|[0-9A-F]+/[0-9A-F]{6,}|backup-PORT", "X", done.err)
        last = said.replace("\r", "\n").splitlines()[-1]
        return (
            Done(done.code, done.out, last),
            names,
            verified
            and Done(verified.code, re.sub(r"\d+/\d+ kB.*\r", "", verified.out), verified.err),
        )

    done, names, verified = same(server, proxy, act)
    assert done.code == 0
    assert "PG_VERSION" in names
    assert verified is None or verified.code == 0


def test_base_backup_to_standard_output(server: Server, proxy: Proxy) -> None:
    pg_basebackup = tool(server, "pg_basebackup")
    for endpoint in (server, proxy):
        process = start(endpoint, pg_basebackup, "-Ft", "-D-", "-Xfetch", "-cfast", dbname=None)
        listed = subprocess.run(
            ["tar", "-t"], stdin=process.stdout, capture_output=True, timeout=TIMEOUT, check=True
        ).stdout.splitlines()
        _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, err
        assert b"backup_label" in listed
        assert b"global/pg_control" in listed


def test_receivewal(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    pg_receivewal = tool(server, "pg_receivewal")
    with server.connect() as conn:
        conn.execute("SELECT pg_switch_wal()")
        conn.execute("CREATE TABLE received AS SELECT generate_series(1, 50000)")
        [(end, offset, name)] = conn.execute(
            "SELECT l::text, (l - '0/0')::bigint %% %s, pg_walfile_name(l)"
            " FROM pg_current_wal_insert_lsn() l",
            [SEGMENT],
        ).fetchall()
        conn.execute("SET synchronous_commit = on")
        conn.execute("DROP TABLE received")
    received = []
    both: tuple[Endpoint, ...] = (server, proxy)
    for endpoint in both:
        target = tmp_path / str(endpoint.port)
        target.mkdir()
        done = run(
            endpoint,
            pg_receivewal,
            *("-D", target, f"--endpos={end}", "--no-loop", "--synchronous"),
            dbname=None,
        )
        assert done.code == 0, done.err
        received.append((target / f"{name}.partial").read_bytes()[:offset])
    assert received[1] == received[0]
    assert len(received[0]) == offset > 100000


def test_receivewal_slots(server: Server, proxy: Proxy) -> None:
    pg_receivewal = tool(server, "pg_receivewal")

    def act(endpoint: Endpoint) -> list[Done]:
        slot = ["--slot", "bounded"]
        return [
            run(endpoint, pg_receivewal, *slot, *options, dbname=None)
            for options in (
                ["--create-slot"],
                ["--create-slot"],
                ["--create-slot", "--if-not-exists"],
                ["--drop-slot"],
                ["--drop-slot"],
            )
        ]

    assert [done.code for done in same(server, proxy, act)] == [0, 1, 0, 0, 1]


@pytest.fixture(scope="module")
def logical(server: Server) -> Iterator[Server]:
    """A further server like ``server``, with logical decoding."""
    logical = Server(server.bin)
    try:
        with logical.connect() as conn:
            conn.execute("ALTER SYSTEM SET wal_level = 'logical'")
        logical.restart()
        yield logical
    finally:
        logical.close()


@pytest.mark.parametrize("plugin", ["pgoutput", "test_decoding"])
def test_recvlogical(logical: Server, start_proxy: StartProxy, tmp_path: Path, plugin: str) -> None:
    pg_recvlogical = tool(logical, "pg_recvlogical")
    proxy = start_proxy(upstream=upstream_of(logical))
    options = ["-o", "proto_version=1", "-o", "publication_names=everything"]
    if plugin == "test_decoding":
        options = ["-o", "include-xids=1"]
    both: tuple[Endpoint, ...] = (logical, proxy)
    streams: list[bytes] = []
    said: list[Done] = []
    with database(logical, DATABASE), logical.connect(dbname=DATABASE) as conn:
        conn.execute("CREATE TABLE t (id int PRIMARY KEY, x text)")
        conn.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        for number, endpoint in enumerate(both):
            done = run(endpoint, pg_recvlogical, "-d", DATABASE, "--slot", f"slot_{number}",
                       "--create-slot", "-P", plugin)  # fmt: skip
            if "test_decoding" in done.err and "No such file" in done.err:
                pytest.skip("this PostgreSQL has no test_decoding")
            said.append(done)
        conn.execute(
            "INSERT INTO t SELECT i, 'pg_background_launch(1)' FROM generate_series(1, 5000) i"
        )
        conn.execute("UPDATE t SET x = repeat(x, 1000) WHERE id = 1")
        conn.execute("SET synchronous_commit = on")
        conn.execute("DELETE FROM t WHERE id = 2")
        [(end,)] = conn.execute("SELECT pg_current_wal_flush_lsn()::text").fetchall()
        conn.execute("DELETE FROM t WHERE id = 3")
        for number, endpoint in enumerate(both):
            slot = ["-d", DATABASE, "--slot", f"slot_{number}"]
            file = tmp_path / str(number)
            said.append(run(endpoint, pg_recvlogical, *slot, "--start", "--no-loop",
                            f"--endpos={end}", "-f", file, *options))  # fmt: skip
            said.append(run(endpoint, pg_recvlogical, *slot, "--drop-slot"))
            streams.append(file.read_bytes())
    assert [done.code for done in said] == [0] * 6, said
    assert streams[1] == streams[0]
    assert len(streams[0]) > 100000


def test_a_standby_by_the_proxy(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    """What walreceiver asks on its connection, asked by psql."""
    tool(server, "psql")

    def act(endpoint: Endpoint) -> Done:
        done = run(
            endpoint,
            program(server, "psql"),
            *("-X", "-At", "-d", f"dbname={DATABASE} replication=database"),
            *("-c", "IDENTIFY_SYSTEM", "-c", "SHOW wal_level", "-c", "SELECT 1"),
            *("-c", "SELECT pg_background_launch('x')", "-c", "TIMELINE_HISTORY 1"),
        )
        return Done(done.code, re.sub(r"[0-9A-F]+/[0-9A-F]{6,}", "LSN", done.out), done.err)

    done = same(server, proxy, act)
    assert "function pg_background_launch(unknown) does not exist" in done.err


# --- the rest of the box -------------------------------------------------------------------------

MAINTENANCE: Final[dict[str, list[list[str]]]] = {
    "vacuumdb": [["-e"], ["-e", "-z", "-j2"], ["-e", "-Z", "-t", "app.people"], ["-t", "none"]],
    "reindexdb": [["-e"], ["-e", "-S", "app"], ["-e", "-s"], ["-t", "none"]],
    "clusterdb": [["-e"], ["-t", "app.people"]],
    "createuser": [["-e", "clients_user"], ["-e", "clients_user"]],
    "dropuser": [["-e", "clients_user"], ["-e", "clients_user"], ["--if-exists", "clients_user"]],
    "createdb": [["-e", "clients_db", "comment"], ["-e", "clients_db"]],
    "dropdb": [["-e", "clients_db"], ["-e", "clients_db"], ["-e", "--if-exists", "clients_db"]],
    "pg_amcheck": [["--install-missing"], ["-d", "none"]],
}


def test_maintenance(server: Server, proxy: Proxy) -> None:
    programs = {
        name: calls
        for name, calls in MAINTENANCE.items()
        if (server.bin / name).exists() and (name != "pg_amcheck" or server.version >= 140000)
    }
    if not programs:
        pytest.skip("no tools of the server's version")

    def act(endpoint: Endpoint) -> list[tuple[str, list[str], Done]]:
        fill(endpoint, server)
        return [
            (name, options, in_any_order(run(endpoint, str(server.bin / name), *options)))
            for name, calls in programs.items()
            for options in calls
        ]

    def in_any_order(done: Done) -> Done:
        # Tables come by size; for those of one size it is the order that a scan finds them in.
        return replace(done, out="".join(sorted(done.out.splitlines(keepends=True))))

    for name, options, done in same(server, proxy, act):
        if name in ("vacuumdb", "reindexdb") and "none" not in options:
            assert done.code == 0, done.err


def test_isready(server: Server, proxy: Proxy) -> None:
    pg_isready = tool(server, "pg_isready")

    def act(endpoint: Endpoint) -> list[Done]:
        return [
            run(endpoint, pg_isready),
            run(endpoint, pg_isready, "-d", "no such database"),
            run(endpoint, pg_isready, user="nobody knows"),
        ]

    assert [done.code for done in same(server, proxy, act)] == [0, 0, 0]


def test_isready_says_no_when_the_server_is_away(server: Server, start_proxy: StartProxy) -> None:
    """An error of any kind but 57P03 means to libpq that there is a server."""
    pg_isready = tool(server, "pg_isready")
    away = Server(server.bin)
    try:
        proxy = start_proxy(upstream=upstream_of(away))
        assert run(proxy, pg_isready).code == 0
        away.stop()
        done = run(proxy, pg_isready, "-t", "5")
    finally:
        away.close()
    assert done.code in (1, 2), done


def test_psql_sessions_side_by_side(server: Server, proxy: Proxy) -> None:
    """Notifications from session to session, from both sides of the proxy."""
    with database(server, DATABASE):
        heard: dict[str, Done] = {}

        def listen(name: str, endpoint: Endpoint) -> None:
            heard[name] = psql(
                endpoint,
                server,
                *("-f", "-"),
                input="LISTEN side;\nSELECT pg_sleep(0.5);\nNOTIFY side, 'x';\n"
                "SELECT pg_sleep(1);\nSELECT 1;\n",
            )

        threads = [
            threading.Thread(target=listen, args=item)
            for item in (("direct", server), ("proxied", proxy))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        counts = {name: done.out.count("Asynchronous notification") for name, done in heard.items()}
        assert counts == {"direct": 2, "proxied": 2}
