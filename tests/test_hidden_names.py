"""Prepared statements and portals with calls, by their names: the names are the client's in the
server, to the protocol and to SQL, in functions too, and nothing else has them.

Invariant: a script is run direct in a database with functions of our names in plain PL/pgSQL, and
through the proxy; the messages must be equal, but for pids. Where the server cannot have the
functions, SQL that uses a name fails in the server.
"""

# ruff: noqa: E501 (the tables of scripts are read in rows)

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

import pytest

from protocol import messages as m
from protocol.values import oids
from tests.support.in_database import with_extension
from tests.support.recorder import (
    READY,
    Frontend,
    S,
    Script,
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
from tests.test_calls_in_protocol import FIVE, LAUNCH, NATIVE, TABLE, comparable, result

pytestmark = pytest.mark.every_server

LONG: Final = "n" * 62
CALL: Final = "SELECT pg_background_launch($1, $2)"
EACH: Final = "SELECT g, pg_background_launch('SELECT 1') FROM generate_series(1, 5) g"


@pytest.fixture(scope="module")
def databases(server: Server, proxy: Proxy) -> Iterator[None]:
    """``hidden_native`` has functions of our names, ``hidden_none`` none, ``hidden_ours`` the extension."""
    with (
        database(server, "hidden_native") as native,
        database(server, "hidden_none") as none,
        database(server, "hidden_ours") as ours,
    ):
        for dbname in (native, none, ours):
            with server.connect(dbname=dbname) as conn:
                conn.execute(TABLE)
        with server.connect(dbname=native) as conn:
            conn.execute(NATIVE)
        yield from with_extension(server, proxy, ours)


def do(sql: str) -> m.Query:
    """SQL that runs in PL/pgSQL."""
    return q(f"DO $do$ BEGIN EXECUTE $sql${sql}$sql$; END $do$")


# fmt: off
NAMES: dict[str, Script] = {
    # Which names are taken.
    "prepared by SQL before": [
        q("PREPARE s AS SELECT 1"), READY, p(LAUNCH, "s"), S, READY, q("EXECUTE s"), READY, b("s"), e(), S, READY],
    "prepared by SQL in a block before": [
        do("PREPARE s AS SELECT 1"), READY, p(LAUNCH, "s"), S, READY, q("EXECUTE s"), READY],
    "prepared by SQL afterwards": [
        p(LAUNCH, "s"), S, READY, q("PREPARE s AS SELECT 1"), READY, do("PREPARE s AS SELECT 1"), READY,
        q("PREPARE s2 AS SELECT 1; PREPARE s AS SELECT 1"), READY, b("s"), e(), S, READY],
    "prepared by SQL by the extended protocol": [
        p(LAUNCH, "s"), p("PREPARE s AS SELECT 1"), b(), e(), S, READY, b("s"), e(), S, READY],
    "prepared twice": [
        p(LAUNCH, "s"), p(FIVE, "s"), S, READY, p("SELECT 1", "s"), S, READY, b("s"), d(b"P"), e(), S, READY],
    "prepared twice in a batch": [
        p(LAUNCH, "s"), b("s"), e(), p(FIVE, "s"), b("s"), e(), S, READY, b("s"), e(), S, READY],
    "a name that the server cuts off": [
        p(LAUNCH, LONG + "xyz"), S, READY, p(LAUNCH, LONG + "xxx"), S, READY, q(f"PREPARE {LONG}xab AS SELECT 1"), READY,
        b(LONG + "x"), e(), S, READY, q(f"DEALLOCATE {LONG}x"), READY, b(LONG + "xyz"), S, READY],
    "a name with a quote": [
        p(LAUNCH, 'a"$1\'b'), S, READY, p(LAUNCH, 'a"$1\'b'), S, READY, b('a"$1\'b'), e(), S, READY,
        q('DEALLOCATE "a""$1\'b"'), READY, b('a"$1\'b'), S, READY],
    "a name that is no ASCII": [
        p(LAUNCH, "ö€"), S, READY, p(LAUNCH, "ö€"), S, READY, b("ö€"), e(), S, READY, q('DEALLOCATE "ö€"'), READY,
        b("ö€"), S, READY, p("SELECT 1", "ö€"), b("ö€"), e(), S, READY],

    # How names become free.
    "deallocated": [
        p(LAUNCH, "s"), S, READY, q("DEALLOCATE s"), READY, b("s"), S, READY, d(b"S", "s"), S, READY,
        q("DEALLOCATE s"), READY, q("EXECUTE s"), READY],
    "deallocated with the other words": [
        p(LAUNCH, "S"), S, READY, q('deallocate prepare "S"'), READY, b("S"), S, READY],
    "deallocated in a block": [
        p(LAUNCH, "s"), S, READY, do("DEALLOCATE s"), READY, b("s"), S, READY, p("SELECT 1", "s"), b("s"), e(), S, READY],
    "all deallocated": [p(LAUNCH, "s"), p(FIVE, "t"), S, READY, q("DEALLOCATE ALL"), READY, b("s"), S, READY, b("t"), S, READY],
    "all deallocated in a block": [
        p(LAUNCH, "s"), S, READY, do("DEALLOCATE ALL"), READY, b("s"), S, READY, d(b"S", "s"), S, READY],
    "all discarded": [p(LAUNCH, "s"), S, READY, q("DISCARD ALL"), READY, b("s"), S, READY, p(FIVE, "s"), b("s"), e(), S, READY],
    "plans discarded": [p(LAUNCH, "s"), S, READY, q("DISCARD PLANS"), READY, b("s"), e(), S, READY],
    "deallocated in a batch": [
        p(LAUNCH, "s"), p("DEALLOCATE s"), b(), e(), b("s"), e(), S, READY, p(LAUNCH, "s"), b("s"), e(), S, READY],
    "deallocated and prepared by SQL": [
        p(LAUNCH, "s"), S, READY, q("DEALLOCATE s"), READY, q("PREPARE s AS SELECT 5"), READY, b("s"), d(b"P"), e(), S, READY,
        d(b"S", "s"), S, READY, q("EXECUTE s"), READY, p(LAUNCH, "s"), S, READY, c(b"S", "s"), p(LAUNCH, "s"), b("s"), e(), S,
        READY],
    "deallocated and prepared by SQL in a block": [
        p(FIVE, "s"), S, READY, q("DO $$ BEGIN DEALLOCATE s; PREPARE s AS SELECT 5; END $$"), READY, do("DEALLOCATE s"), READY,
        do("PREPARE s AS SELECT 5"), READY, b("s"), d(b"P"), e(), S, READY, q("DEALLOCATE s"), READY, b("s"), S, READY],
    "deallocated and prepared by SQL in a batch": [
        p(FIVE, "s"), p("DEALLOCATE s"), b(), e(), p("PREPARE s AS SELECT 5"), b(), e(), b("s"), d(b"P"), e(), S, READY],
    "deallocated in a failed transaction": [
        p(LAUNCH, "s"), S, READY, q("BEGIN; SELECT x"), READY, q("DEALLOCATE s"), READY, b("s"), S, READY, q("ROLLBACK"), READY,
        b("s"), e(), S, READY],
    "deallocated in a transaction that fails": [
        p(LAUNCH, "s"), S, READY, q("BEGIN; DEALLOCATE s; SELECT x"), READY, b("s"), S, READY, q("ROLLBACK"), READY, b("s"), S,
        READY],
    "others deallocated": [
        p(LAUNCH, "s"), p("SELECT 1", "t"), S, READY, q("DEALLOCATE t"), READY, b("s"), e(), S, READY, b("t"), S, READY],
    "deallocated when there is none": [p(LAUNCH, "s"), S, READY, q("DEALLOCATE t"), READY, b("s"), e(), S, READY],
    "closed": [
        p(LAUNCH, "s"), S, READY, c(b"S", "s"), S, READY, b("s"), S, READY, q("DEALLOCATE s"), READY, c(b"S", "s"), S, READY,
        q("PREPARE s AS SELECT 1"), READY, q("EXECUTE s"), READY],
    "closed twice in a batch": [
        p(LAUNCH, "s"), c(b"S", "s"), c(b"S", "s"), p(LAUNCH, "s"), c(b"S", "s"), p(FIVE, "s"), b("s"), e(), S, READY],

    # Errors that say a name.
    "another number of parameters": [
        p(CALL, "s"), S, READY, b("s", "", (b"x",)), S, READY, b("s", "", (b"x", b"1", b"2")), S, READY,
        b("s", "po", (b"x",)), S, READY],
    "another number of parameter formats": [p(CALL, "s"), S, READY, b("s", "", (b"x", b"1"), (0, 0, 0)), S, READY],
    "a parameter that is no number": [p(CALL, "s"), S, READY, b("s", "", (b"x", b"y")), S, READY, b("s", "po", (b"x", b"y")), S, READY],
    "errors of the statement itself": [
        p("SELECT pg_background_launch(x)", "s"), S, READY, b("s"), S, READY, p("SELECT 'ä', pg_background_launch('x') WHERE", "s"), S,
        READY, p("SELECT pg_background_launch('x', 'y', 'z', 1)", "s"), S, READY, p(LAUNCH, "s"), b("s"), e(), S, READY],
    "a parameter whose type nothing tells": [p("SELECT pg_background_launch('x'), $1", "s", (oids.INT4,)), d(b"S", "s"), S, READY],
    "parameters of great numbers": [
        p("SELECT pg_background_launch('x'), $2000::int", "s"), d(b"S", "s"), S, READY, p("SELECT pg_background_launch($99999)", "t"), S, READY,
        p("SELECT pg_background_launch($99999999999999999)", "t"), S, READY, q("EXECUTE t"), READY],
    "in a failed transaction": [
        q("BEGIN; SELECT x"), READY, p(LAUNCH, "s"), S, READY, b("s", "po"), S, READY, c(b"S", "s"), S, READY, q("ROLLBACK"), READY],

    # Portals.
    "a cursor of the portal's name": [
        q("BEGIN"), READY, p(FIVE), b("", "po"), e("po", 1), S, READY, q("SAVEPOINT a"), READY, q("DECLARE po CURSOR FOR SELECT 1"), READY,
        q("ROLLBACK TO a"), READY, e("po", 2), S, READY, do("DECLARE po CURSOR FOR SELECT 1"), READY],
    "a portal of the cursor's name": [
        q("BEGIN; DECLARE po CURSOR FOR SELECT 7; SAVEPOINT a"), READY, p(LAUNCH), b("", "po"), S, READY, q("ROLLBACK TO a"), READY,
        q("FETCH po"), READY],
    "a portal of the portal's name": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 2), S, READY, q("SAVEPOINT a"), READY, b("s", "po"), S, READY,
        q("ROLLBACK TO a"), READY, e("po", 2), S, READY, p("SELECT 1"), b("", "po"), S, READY],
    "closed by SQL": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 2), S, READY, q("CLOSE po"), READY, e("po"), S, READY],
    "closed by SQL, described": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), S, READY, q("CLOSE po"), READY, d(b"P", "po"), S, READY],
    "closed by SQL in a block": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 2), S, READY, do("CLOSE po"), READY, e("po"), S, READY],
    "closed by SQL, and bound again": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 2), S, READY, q("CLOSE po"), READY, b("s", "po"), e("po"), S, READY,
        q("CLOSE po"), READY, p("SELECT 7"), b("", "po"), d(b"P", "po"), e("po"), S, READY],
    "closed by SQL, and declared": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 2), S, READY, q("CLOSE po"), READY,
        q("DECLARE po CURSOR FOR SELECT 7"), READY, d(b"P", "po"), e("po"), S, READY, q("MOVE BACKWARD po"), READY, q("FETCH po"), READY],
    "closed by SQL, and declared, in a batch": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 2), p("CLOSE po"), b(), e(), p("DECLARE po CURSOR FOR SELECT 7"), b(), e(),
        e("po"), S, READY],
    "all closed by SQL": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), S, READY, q("CLOSE ALL"), READY, d(b"P", "po"), S, READY],
    "closed, and used": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 1), c(b"P", "po"), S, READY, q("CLOSE po"), READY],
    "ended with the transaction": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), S, READY, q("COMMIT"), READY, e("po"), S, READY, b("s", "po"), e("po"), S, READY,
        d(b"P", "po"), S, READY],
    "ended with a transaction that another follows": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), S, READY, q("COMMIT AND CHAIN"), READY, b("s", "po"), e("po", 1), S, READY, q("ROLLBACK AND CHAIN"),
        READY, e("po"), S, READY],
    "gone with a savepoint": [
        q("BEGIN; SAVEPOINT a"), READY, p(FIVE, "s"), b("s", "po"), e("po", 1), S, READY, q("ROLLBACK TO a"), READY, d(b"P", "po"), S, READY],
    "bound before a savepoint": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 1), S, READY, q("SAVEPOINT a; SELECT x"), READY, q("ROLLBACK TO a"), READY, e("po"), S, READY],
    "the statement goes before its portal": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), e("po", 1), c(b"S", "s"), e("po", 2), S, READY, q("DEALLOCATE ALL"), READY, e("po"), S, READY],
    "portals that interleave": [
        q("BEGIN"), READY, p(FIVE, "s"), b("s", "po"), b("s", "pu"), e("po", 2), e("pu", 3), e("po", 1), d(b"P", "pu"), e("pu"), e("po"), S, READY],
    "portals of calls with each row": [
        q("BEGIN"), READY, p("SELECT g, pg_background_detach(pg_background_launch('SELECT 1')) FROM generate_series(1, 4) g"), b("", "po"), e("po", 1), e("po", 2), S,
        READY, d(b"P", "po"), e("po"), S, READY],
    "a portal in binary": [p(result("SELECT 7", "AS (n int4)"), "s"), b("s", "po", (), (), (1,)), d(b"P", "po"), e("po"), S, READY],
    "a portal with parameters": [
        p("SELECT pg_background_launch($1, $2)"), b("", "po", (b"SELECT 1", b"\0\0\0\0"), (0, 1)), d(b"P", "po"), e("po"), S, READY],
    "a portal that the server cuts off": [
        q("BEGIN"), READY, p(FIVE), b("", LONG + "xyz"), e(LONG + "xzz", 2), S, READY, q(f"CLOSE {LONG}x"), READY, e(LONG + "xyz"), S, READY],
    "no portal outside a transaction": [p(FIVE, "s"), b("s", "po"), S, READY, e("po"), S, READY],

}

# What the catalogs show.
SHOWN: dict[str, Script] = {
    "in the catalog": [
        p(CALL, "s"), p(FIVE, "t"), p("SELECT $1 + 1", "u", (oids.INT4,)), p(LAUNCH), S, READY, q("PREPARE v AS SELECT 'v'"), READY,
        q("SELECT name, statement, parameter_types, from_sql FROM pg_prepared_statements ORDER BY name"), READY,
        q("SELECT count(*) FROM pg_catalog.pg_prepared_statements AS x WHERE x.name <> 'u'"), READY,
        q("DEALLOCATE s"), READY, q("SELECT * FROM pg_prepared_statements p WHERE p.name = 's'"), READY],
    "texts in the catalog": [
        p("SELECT 'ä$$ ''\\', pg_background_launch('x') -- \n /* */ ", "s"), p("  \t" + LAUNCH + " ; ", "t"), S, READY,
        p("SELECT statement FROM pg_prepared_statements ORDER BY 1"), b(), d(b"P"), e(), S, READY],
    "portals in the catalog": [
        q("BEGIN; DECLARE cu SCROLL CURSOR WITH HOLD FOR SELECT 1"), READY, p(FIVE), b("", "po"), p(LAUNCH), b(), S, READY,
        q("SELECT name, statement, is_holdable, is_binary FROM pg_cursors ORDER BY name"), READY, q("CLOSE po"), READY,
        q("SELECT name FROM pg_cursors"), READY],
}

USES: dict[str, Script] = {
    "executed": [
        p(LAUNCH, "s"), S, READY, q("EXECUTE s"), READY, do("EXECUTE s"), READY, b("s"), e(), S, READY, q("EXECUTE s; EXECUTE s"), READY],
    "executed with parameters": [
        p(CALL, "s"), S, READY, q("EXECUTE s('SELECT 1', 0)"), READY, q("EXECUTE s('SELECT 1')"), READY, q("EXECUTE s('SELECT 1', 'x')"), READY,
        q("EXECUTE s(1, 0)"), READY],
    "executed by the extended protocol": [p(LAUNCH, "s"), p("EXECUTE s"), b(), d(b"P"), e(), S, READY],
    "a result executed": [p(FIVE, "s"), S, READY, q("EXECUTE s"), READY, q("CREATE TEMP TABLE made AS EXECUTE s"), READY, q("TABLE made"), READY],
    "explained": [
        p(LAUNCH, "s"), p(FIVE, "t"), S, READY, q("EXPLAIN (COSTS OFF) EXECUTE s"), READY,
        q("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) EXECUTE s"), READY],
    "made a table of": [
        p(LAUNCH, "s"), S, READY, q("CREATE TEMP TABLE made AS EXECUTE s"), READY, q("SELECT count(*) FROM made"), READY,
        q("CREATE TEMP TABLE made2 AS EXECUTE s WITH NO DATA"), READY, do("CREATE TEMP TABLE made3 AS EXECUTE s"), READY,
        q("SELECT count(*) FROM made3"), READY],
    "fetched": [
        q("BEGIN"), READY, p(EACH), b("", "po"), S, READY, q("FETCH po"), READY, q("FETCH 2 FROM po"), READY, q("MOVE po"), READY, q("FETCH ALL po"), READY],
    "fetched and executed": [
        q("BEGIN"), READY, p(EACH, "s"), b("s", "po"), e("po", 1), S, READY, q("FETCH po"), READY, e("po", 2), S, READY, q("MOVE po"), READY, d(b"P", "po"),
        e("po"), S, READY],
    "fetched in a block": [
        q("BEGIN"), READY, p(EACH, "s"), b("s", "po"), e("po", 1), S, READY, q(
            "DO $$ DECLARE c refcursor := 'po'; n int; BEGIN FETCH c INTO n; RAISE NOTICE '%', n; MOVE c; FETCH c INTO n; RAISE NOTICE '%', n; END $$"),
        READY, e("po"), S, READY],
    "a launch fetched": [q("BEGIN"), READY, p(LAUNCH, "s"), b("s", "po"), S, READY, q("FETCH ALL po"), READY, q("FETCH po"), READY],
    "portals of an unnamed statement": [
        q("BEGIN"), READY, p(CALL), b("", "po", (b"SELECT 1", b"0")), b("", "pu", (b"SELECT 1", b"\0\0\0\0"), (0, 1), (1,)), b("", "", (b"SELECT 1", b"0")),
        d(b"P", "pu"), e(), e("pu"), d(b"P", "po"), S, READY, q("FETCH po"), READY, q("FETCH pu"), READY],
    "where the functions are not found": [
        q("SET search_path = pg_catalog"), READY, p(LAUNCH, "s"), S, READY, b("s"), S, READY, q("RESET search_path"), READY, p(LAUNCH, "s"), S, READY,
        q("EXECUTE s"), READY],
    "in the server's words": [
        p(EACH), b("", "po"), S, READY, e("po"), S, READY, p(EACH), b("", "po"), d(b"P", "po"), e("po", 2), e("po", 2), c(b"P", "po"), e("po"), S, READY],
    "fetched by a cursor of SQL": [
        q("BEGIN"), READY, p("DECLARE cu CURSOR FOR " + FIVE), b(), e(), S, READY, q("FETCH 2 FROM cu"), READY, p("FETCH ALL FROM cu"), b(), d(b"P"), e(), S, READY],
}
# fmt: on


@functools.cache
def expected(server: Server, script: str, *, waiting: bool) -> list[m.BackendMessage]:
    """What the server answers, asked direct."""
    return answers(server, "hidden_native", {**NAMES, **USES}[script], waiting=waiting)


def answers(
    endpoint: Server | Proxy, dbname: str, script: Script, *, waiting: bool
) -> list[m.BackendMessage]:
    with Frontend(endpoint, database=dbname) as client:
        found = comparable(record(client, script, waiting=waiting))
        if isinstance(endpoint, Proxy):
            answer = client.query(result("SELECT 42", "AS (n int)"))
            assert rows(answer) == [(b"42",)]
        return found


@pytest.mark.parametrize(
    ("dbname", "waiting"),
    [
        ("hidden_none", True),
        ("hidden_ours", False),
        pytest.param("hidden_none", False, marks=pytest.mark.slow),
        pytest.param("hidden_ours", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("databases")
def test_names_are_the_clients(
    server: Server, proxy: Proxy, name: str, dbname: str, waiting: bool
) -> None:
    found = answers(proxy, dbname, NAMES[name], waiting=waiting)
    assert found == expected(server, name, waiting=waiting)


@pytest.mark.parametrize("dbname", ["hidden_none", "hidden_ours"])
@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.usefixtures("databases")
def test_the_catalogs_show_the_clients_names_and_texts(
    server: Server, proxy: Proxy, name: str, dbname: str
) -> None:
    """The columns are those of another table, as with every catalog that the proxy replaces."""
    direct = answers(server, "hidden_native", SHOWN[name], waiting=True)
    proxied = answers(proxy, dbname, SHOWN[name], waiting=True)
    assert rows(proxied) == rows(direct)
    assert errors(proxied) == errors(direct)
    assert kinds(proxied) == kinds(direct)


@pytest.mark.parametrize("waiting", [True, False], ids=["", "all at once"])
@pytest.mark.parametrize("name", USES)
@pytest.mark.usefixtures("databases")
def test_with_the_extension_sql_uses_the_servers_functions(
    server: Server, proxy: Proxy, name: str, waiting: bool
) -> None:
    found = answers(proxy, "hidden_ours", USES[name], waiting=waiting)
    assert found == expected(server, name, waiting=waiting)


def test_stand_ins_of_deallocated_statements_do_not_pile_up(
    server: Server, proxy: Proxy, databases: None
) -> None:
    """Each with a name of its own, as psycopg has them."""
    with Frontend(proxy, database="hidden_none") as frontend:
        for number in range(200):
            frontend.send(p(CALL, f"s{number}"), S, q(f"DEALLOCATE s{number}"))
            assert not errors([*frontend.until_ready(), *frontend.until_ready()])
        frontend.send(p(CALL, "last"), S, b("last", "", (b"SELECT 1", b"1000")), e(), S)
        assert not errors([*frontend.until_ready(), *frontend.until_ready()])
        frontend.send(
            q(
                "DO $$ DECLARE n int; BEGIN SELECT count(*) INTO n FROM pg_prepared_statements;"
                " RAISE NOTICE '%', n; END $$"
            )
        )
        [notice] = [each for each in frontend.until_ready() if isinstance(each, m.NoticeResponse)]
        assert int(notice.message) <= 66
