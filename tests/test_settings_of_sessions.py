"""The settings pg_background.*: which level wins, what may be set, and how it is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.conftest import StartProxy
from tests.support.background import failure, launch, result, value
from tests.support.servers import Connection, Proxy, Server, psql

pytestmark = pytest.mark.every_server

MAX_WORKERS = "pg_background.max_workers"
WORKER_TIMEOUT = "pg_background.worker_timeout"
QUEUE_SIZE = "pg_background.default_queue_size"
NO_FRACTIONS = "the server's own integers take no fractions and exponents yet"


def shown(conn: Connection, name: str = MAX_WORKERS) -> Any:
    """As SHOW and current_setting() have it, at the top and in a function."""
    [[text]] = conn.execute(f"SHOW {name}").fetchall()
    assert conn.execute(f"SELECT current_setting('{name}')").fetchone() == (text,)
    notices: list[str | None] = []
    conn.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    conn.execute(f"DO $$ BEGIN RAISE NOTICE '%', current_setting('{name}'); END $$")
    assert notices == [text]
    return text


@pytest.fixture
def role(server: Server, scratch: str) -> Iterator[str]:
    """A superuser."""
    with server.connect(dbname=scratch) as conn:
        conn.execute("CREATE ROLE limited LOGIN SUPERUSER")
        yield "limited"
        conn.execute(f"ALTER DATABASE {scratch} RESET ALL")
        conn.execute("DROP ROLE limited")


@pytest.fixture
def configured(server: Server) -> Iterator[None]:
    """The server's configuration file has max_workers = 2."""
    file = server.cluster.data / "postgresql.conf"
    before = file.read_text()
    file.write_text(before + f"\n{MAX_WORKERS} = 2\n")
    server.cluster.reload()
    yield
    file.write_text(before)
    server.cluster.reload()


def test_each_level_outranks_the_ones_before(
    start_proxy: StartProxy, server: Server, scratch: str, role: str, request: Any
) -> None:
    proxy = start_proxy("--max-workers", "9")

    def seen(**params: Any) -> Any:
        with proxy.connect(dbname=scratch, user=role, **params) as conn:
            return shown(conn)

    assert seen() == "9"
    request.getfixturevalue("configured")
    assert seen() == "2"
    with server.connect(dbname=scratch) as conn:
        levels = (f"DATABASE {scratch}", f"ROLE {role}", f"ROLE {role} IN DATABASE {scratch}")
        for number, level in enumerate(levels, 3):
            conn.execute(f"ALTER {level} SET {MAX_WORKERS} = {number}")
            assert seen() == str(number)
    assert seen(options=f"-c {MAX_WORKERS}=6") == "6"
    with proxy.connect(dbname=scratch, user=role) as conn:
        conn.execute(f"SET {MAX_WORKERS} = 7")
        assert shown(conn) == "7"
        with conn.transaction(force_rollback=True):
            conn.execute(f"SET LOCAL {MAX_WORKERS} = 8")
            assert shown(conn) == "8"
            conn.execute(f"RESET {MAX_WORKERS}")
            assert shown(conn) == "5"
        assert shown(conn) == "7"
        conn.execute(f"SET {MAX_WORKERS} TO DEFAULT")
        assert shown(conn) == "5"


def test_settings_of_a_role_hold_at_launches(
    proxy: Proxy, server: Server, scratch: str, role: str
) -> None:
    with server.connect(dbname=scratch) as conn:
        conn.execute(f"ALTER ROLE {role} SET {MAX_WORKERS} = 1")
        conn.execute(f"ALTER DATABASE {scratch} SET {WORKER_TIMEOUT} = '300ms'")
    call = "pg_background_launch('SELECT 1 FROM pg_sleep(60)')"
    commands = (
        f"SHOW {MAX_WORKERS}",
        f"SHOW {WORKER_TIMEOUT}",
        f"SELECT * FROM pg_background_result({call}) AS (x int)",
        f"SELECT {call} FROM generate_series(1, 2)",
    )
    options = [word for command in commands for word in ("-c", command)]
    done = psql(proxy.port, "-At", *options, user=role, dbname=scratch)
    assert done.stdout == "1\n300ms\n"
    assert "canceling statement due to statement timeout" in done.stderr
    assert "too many background workers" in done.stderr


def test_jobs_have_the_settings_of_their_session(proxy: Proxy, conn: Connection) -> None:
    assert value(conn, f"SHOW {MAX_WORKERS}") == "16"
    conn.execute(f"SET {QUEUE_SIZE} = 131072")
    assert value(conn, f"SHOW {QUEUE_SIZE}") == "128kB"


VALUES = {
    (MAX_WORKERS, "1"): "1",
    (MAX_WORKERS, "'1000'"): "1000",
    (MAX_WORKERS, "2.4"): "2",
    (MAX_WORKERS, "010"): "10",
    (MAX_WORKERS, "'010'"): "8",
    (MAX_WORKERS, "'0x10'"): "16",
    (MAX_WORKERS, "$$5$$"): "5",
    (MAX_WORKERS, "1e2"): "100",
    (MAX_WORKERS, "+7"): "7",
    (MAX_WORKERS, "0"): None,
    (MAX_WORKERS, "-1"): None,
    (MAX_WORKERS, "1001"): None,
    (MAX_WORKERS, "'abc'"): None,
    (MAX_WORKERS, "abc"): None,
    (MAX_WORKERS, "''"): None,
    (MAX_WORKERS, "'it''s'"): None,
    (MAX_WORKERS, "on"): None,
    (MAX_WORKERS, "'4kB'"): None,
    (WORKER_TIMEOUT, "1500"): "1500ms",
    (WORKER_TIMEOUT, "'90s'"): "90s",
    (WORKER_TIMEOUT, "60000"): "1min",
    (WORKER_TIMEOUT, "'1.5h'"): "90min",
    (WORKER_TIMEOUT, "0"): "0",
    (WORKER_TIMEOUT, "'5 parsecs'"): None,
    (WORKER_TIMEOUT, "2147483648"): None,
    (QUEUE_SIZE, "131072"): "128kB",
    (QUEUE_SIZE, "'4kB'"): "4kB",
    (QUEUE_SIZE, "4095"): None,
    (QUEUE_SIZE, "'257MB'"): None,
    (QUEUE_SIZE, "'1kb'"): None,
}


@pytest.mark.parametrize("form", ["SET {} = {}", "SET SESSION {} TO {}", "prepared"])
def test_values_are_checked_and_shown_as_the_servers_own_are(conn: Connection, form: str) -> None:
    prepare = form == "prepared"
    command = "SET {} = {}" if prepare else form
    for (name, text), expected in VALUES.items():
        before = shown(conn, name)
        if expected is None:
            with pytest.raises(psycopg.errors.InvalidParameterValue, match=name):
                conn.execute(command.format(name, text), prepare=prepare)
            assert shown(conn, name) == before
        else:
            cursor = conn.execute(command.format(name, text), prepare=prepare)
            assert cursor.statusmessage == "SET"
            assert shown(conn, name) == expected
    assert value(conn, "SELECT 1") == 1


def test_words_of_the_refusals(conn: Connection) -> None:
    """Compared with those for a setting of the server's with the same unit."""
    if conn.info.server_version < 120000:
        pytest.skip(NO_FRACTIONS)
    for ours, servers, texts in (
        (MAX_WORKERS, "vacuum_cost_limit", ("'abc'", "''", "0", "'1e30'", "'4kB'")),
        (WORKER_TIMEOUT, "statement_timeout", ("'abc'", "-1", "'5 parsecs'", "'3e9'")),
    ):
        for text in texts:
            ours_said, servers_said = (
                (e.sqlstate, e.diag.message_primary, e.diag.message_hint)
                for e in (failure(conn, f"SET {name} = {text}") for name in (ours, servers))
            )
            expected = tuple(part and part.replace(servers, ours) for part in servers_said)
            if text in ("0", "-1"):  # the limits differ, and how 15 writes them
                assert ours_said[0] == expected[0]
            else:
                assert ours_said == expected


@pytest.mark.parametrize(
    "name",
    [
        "PG_BACKGROUND.Max_Workers",
        '"pg_background"."max_workers"',
        '"PG_background.max_workers"',
        "pg_background /* */ . max_workers",
    ],
)
def test_ways_to_write_a_name(conn: Connection, name: str) -> None:
    conn.execute(f"SET {name} = 3.4")
    assert shown(conn) == "3"
    assert failure(conn, f"SET {name} = 0").sqlstate == "22023"
    conn.execute(f"RESET {name}")
    assert shown(conn) == "16"


def test_unknown_names(conn: Connection, server: Server) -> None:
    """As of a prefix that a library has reserved, which came with 15."""
    if server.version < 150000:
        conn.execute("SET pg_background.nosuch = 1")
        assert value(conn, "SHOW pg_background.nosuch") == "1"
        pytest.skip("the server takes every name")
    for command in ("SET pg_background.nosuch = 1", "RESET pg_background.nosuch"):
        error = failure(conn, command)
        assert error.sqlstate == "42602"
        assert error.diag.message_primary == (
            'invalid configuration parameter name "pg_background.nosuch"'
        )
        assert error.diag.message_detail == '"pg_background" is a reserved prefix.'
    conn.execute("SET pg_backgrounds.nosuch = 1")
    conn.execute("SET my.pg_background = 1")


def test_a_refusal_fails_the_transaction(conn: Connection) -> None:
    with contextlib.suppress(psycopg.Error), conn.transaction():
        conn.execute(f"SET {MAX_WORKERS} = 3")
        conn.execute(f"SET {MAX_WORKERS} = 0")
    assert shown(conn) == "16"
    done = failure(conn, f"SET {MAX_WORKERS} = 3; SELECT 1; SET {MAX_WORKERS} = 0")
    assert done.sqlstate == "22023"
    assert shown(conn) == "16"
    conn.execute(f"SET {MAX_WORKERS} = 3; SET {WORKER_TIMEOUT} = 1500")
    assert (shown(conn), shown(conn, WORKER_TIMEOUT)) == ("3", "1500ms")


def test_alter_set_checks_the_value_too(
    conn: Connection, proxy: Proxy, scratch: str, role: str
) -> None:
    conn.execute('CREATE ROLE "set"')
    conn.execute('CREATE ROLE "in a"')
    try:
        for target in (
            *("ROLE limited", "USER limited", 'ROLE "set"', "ROLE set", 'ROLE "in a"'),
            *(f"DATABASE {scratch}", f"ROLE limited IN DATABASE {scratch}"),
            *("SYSTEM", "ROLE CURRENT_USER", "ROLE ALL", f"ROLE ALL IN DATABASE {scratch}"),
        ):
            error = failure(conn, f"ALTER {target} SET {MAX_WORKERS} = 0")
            assert error.sqlstate == "22023", target
            if conn.info.server_version >= 150000:  # since then a prefix can be reserved
                error = failure(conn, f"ALTER {target} SET pg_background.nosuch = 1")
                assert error.sqlstate == "42602", target
        done = conn.execute(f"ALTER USER {role} SET {WORKER_TIMEOUT} TO 1500")
        assert done.statusmessage == "ALTER ROLE"
        with proxy.connect(dbname=scratch, user=role) as other:
            assert shown(other, WORKER_TIMEOUT) == "1500ms"
    finally:
        conn.execute('DROP ROLE "set", "in a"')


def test_what_reset_all_leaves_is_the_default(conn: Connection, proxy: Proxy, scratch: str) -> None:
    """It is shown empty: the server does not know the proxy's defaults."""
    for command in ("RESET ALL", "DISCARD ALL"):
        conn.execute(f"SET {MAX_WORKERS} = 1")
        conn.execute(command)
        pids = [launch(conn, "SELECT 1") for _ in range(2)]
        assert [result(conn, pid) for pid in pids] == [[(1,)], [(1,)]]
        conn.execute(f"RESET {MAX_WORKERS}")
        assert shown(conn) == "16"
    with proxy.connect(dbname=scratch, options=f"-c {MAX_WORKERS}=3") as other:
        other.execute("DISCARD ALL")
        assert shown(other) == "3"


def test_a_session_begins_as_a_direct_one(server: Server, proxy: Proxy, scratch: str) -> None:
    """Whatever the query that gives the defaults meets with."""
    with server.connect(dbname=scratch) as conn:
        conn.execute("CREATE ROLE odd LOGIN")
        try:
            for name, text in {
                "search_path": "nowhere",
                "default_transaction_read_only": "on",
                "default_transaction_isolation": "serializable",
                "client_encoding": "SJIS",
                "standard_conforming_strings": "off",
            }.items():
                if name == "standard_conforming_strings" and server.version >= 190000:
                    continue  # it cannot be set to off any more
                conn.execute(f"ALTER ROLE odd SET {name} = '{text}'")
            with proxy.connect(dbname=scratch, user="odd") as odd:
                assert shown(odd) == "16"
                assert odd.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            for failing in ("statement_timeout = '1ms'", f"{MAX_WORKERS} = ''"):
                conn.execute(f"ALTER ROLE odd SET {failing}")
                with proxy.connect(dbname=scratch, user="odd") as odd:
                    odd.execute("SELECT 1")
        finally:
            conn.execute("DROP ROLE odd")


# Two spaces between them.
SPELLINGS = r"""
1500  '1500'  0  -0  +0  00  010  '010'  '08'  0x10  '0x10'  '0X1f'  0b11  0o17  1_000  '1_000'
1.5  '1.5'  2.5  '2.5'  .5  '.5'  '5.'  1e3  '1e3'  1E3  '1E+3'  1e-3  '-0'  '-1'  -1  -1.5  +  -
'+5'  '+ 5'  ' 5 '  '5 s'  '5s'  '5S'  '5 sec'  '5min'  '1h'  '1d'  '1.5d'  '1us'  '500us'  '1501us'
'5 min '  ''  ' '  'abc'  abc  on  off  true  null  'NULL'  default  'default'  "5"  "5s"  "abc"
$$5$$  $a$7s$a$  $$$$  E'5'  E'5 s'  U&'5'  N'5'  B'101'  X'1F'  '1'||'2'  (5)  5::int  $1
2147483647  2147483648  '2147483647'  '2147483648'  '3e9'  '1e30'  99999999999999999999  '24d'
'25d'  '1e'  'e1'  '0x'  '0x1p3'  '1,5'  1,5  'it''s'  '5''s'  '५'  NaN  'NaN'  'inf'  infinity
'1 2'  '5ms;'  current_user  user  '5	ms'  1.e1  '1.e1'  '1..2'  '--5'  '5--'  /*c*/5  - 5  - '5'
-  5  '-5'  '-0.4'  -0.4  0.4  '0.5'  '5' '6'  FROM CURRENT  :x  '１'  5 -- comment
"""


def test_values_are_read_as_the_server_reads_its_own(conn: Connection, role: str) -> None:
    """lock_timeout has the same unit and range."""
    if conn.info.server_version < 120000:
        pytest.skip(NO_FRACTIONS)
    differences = []
    spellings = [text for line in SPELLINGS.split("\n") for text in line.split("  ") if text]
    assert len(spellings) > 120
    for text in spellings:
        for form in ("SET {} = {}", f"ALTER ROLE {role} SET {{}} TO {{}}"):
            said = []
            for name in ("lock_timeout", WORKER_TIMEOUT):
                conn.execute(f"RESET {name}")
                try:
                    conn.execute(form.format(name, text).encode())
                    [[shown]] = conn.execute(f"SHOW {name}").fetchall()
                    said.append(shown)
                except psycopg.Error as error:
                    said.append(error.sqlstate)
            if said[0] != said[1]:
                differences.append((form, text, *said))
    assert not differences, "\n".join(map(str, differences))
