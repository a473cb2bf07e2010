"""What hostile code can do with all that it may read and set in the session of a victim.

Invariant: the token, the messages, the settings, the channels and the locks are no secrets, and are
of no use to an attacker who has them.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
import threading
import time
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest
from psycopg import sql

from tests.attacks.scene import CASES, MALLORY, Scene, copy, is_well, lie, settled, through
from tests.support.background import notices, wait_until
from tests.support.clients import succeed, tool
from tests.support.in_database import one
from tests.support.servers import database, psql

pytestmark = pytest.mark.every_server

_number = itertools.count(1)

# What is said to the proxy, by whatever way; {message} is an SQL expression.
WAYS: Final = {
    "info": "RAISE INFO '%', {message};",
    "notice": "RAISE NOTICE '%', {message};",
    "warning": "RAISE WARNING '%', {message};",
    "info_with_all_fields": "RAISE INFO USING MESSAGE = {message}, DETAIL = {message},"
    " HINT = {message}, ERRCODE = '42501', SCHEMA = 'ext', TABLE = '_pg_background_say';",
    "by_the_genuine_function": "PERFORM set_config('pg_background_proxy.message', {message}, true);"
    " PERFORM ext._pg_background_say();",
    "error": "BEGIN RAISE EXCEPTION '%', {message}; EXCEPTION WHEN OTHERS THEN NULL; END;",
    "error_message": "BEGIN EXECUTE {message}; EXCEPTION WHEN OTHERS THEN"
    " RAISE INFO '%', SQLERRM; END;",
}

TOKEN: Final = "left(current_setting('pg_background_proxy.session'), 32)"
NONCE: Final = "md5(random()::text)"
_FUNCTION: Final = "pg_background_launch(sql, queue_size) integer"


def encoded(*words: str) -> str:
    """Words as a message has them."""
    return " ".join(base64.b64encode(word.encode()).decode() for word in words)


def messages(victim: str) -> dict[str, str]:
    """SQL expressions for messages that try their luck."""
    job = f"INSERT INTO public.proof VALUES ('said', 'x', '{{{MALLORY}}}', session_user, '')"
    call = encoded(_FUNCTION, "UTF8", "16", "64kB", "0", "2", job, "0")
    roles = encoded(victim, victim)
    return {
        "as_it_was": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', '{call} {roles}')",
        "roles_first": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', '-', '{roles} {call}')",
        "no_owner": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', '{roles} {call}')",
        "owner": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', '{encoded(victim)} {roles} {call}')",
        "next": f"concat_ws(' ', {TOKEN}, {NONCE}, 'next 1')",
        "narrow": f"concat_ws(' ', {TOKEN}, {NONCE}, 'narrow 0')",
        "custom": f"concat_ws(' ', {TOKEN}, {NONCE}, 'custom', '{encoded('search_path')}')",
        "proof": f"concat_ws(' ', {TOKEN}, {NONCE}, 'proof', {NONCE} || {NONCE})",
        "huge_number": f"concat_ws(' ', {TOKEN}, {NONCE}, 'next 999999999')",
        "negative": f"concat_ws(' ', {TOKEN}, {NONCE}, 'next -1')",
        "long": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', repeat('QUFB ', 50000))",
        "only_the_token": TOKEN,
        "token_twice": f"{TOKEN} || {TOKEN}",
        "no_base64": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', repeat('% ', 12))",
        "format": f"concat_ws(' ', {TOKEN}, {NONCE}, 'call', '%s %b {{}} $1 @own', '{roles}')",
        "replayed": "current_setting('pg_background_proxy.message', true)",
        "replayed_as_call": "regexp_replace(current_setting('pg_background_proxy.message', true),"
        " ' (next|proof|custom) .*', ' call x')",
    }


@pytest.mark.parametrize(("scene", "victim"), CASES, indirect=["scene"])
@pytest.mark.parametrize("way", WAYS)
def test_messages(scene: Scene, way: str, victim: str) -> None:
    """Each kind of message, in the midst of a transaction with a call that is the victim's own."""
    scene.root.execute("DELETE FROM proof WHERE attempt = 'said'")
    name = f"mallory.said{next(_number)}"
    said = " ".join(WAYS[way].format(message=text) for text in messages(victim).values())
    scene.as_mallory(
        f"CREATE FUNCTION {name}() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS"
        f" $f$ BEGIN {said} PERFORM pg_sleep(0.1); END $f$"
    )
    own = "WITH q AS (SELECT ext.pg_background_launch('SELECT 7', 0)) TABLE q"
    with scene.connect(victim) as conn:
        before = launched(conn)
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege), conn.transaction():
            pid = one(conn, own)
            conn.execute(f"SELECT {name}()".encode())
            [(answer,)] = conn.execute(
                "SELECT n FROM ext.pg_background_result(%s) AS (n int)", [pid]
            ).fetchall()
            assert answer == 7
        assert launched(conn) <= before + 1
        is_well(conn)
    settled(scene)
    assert one(scene.root, "SELECT count(*) FROM proof WHERE attempt = 'said'") == 0


def launched(conn: psycopg.Connection[tuple[object, ...]]) -> int:
    """How many jobs this session has launched."""
    return int(one(conn, "SELECT workers_launched FROM ext.pg_background_stats_v2()"))


def test_a_call_that_never_proves_itself_is_forgotten(scene: Scene) -> None:
    """What hostile code has begun, the victim's own call does not end."""
    attempt = f"begun{next(_number)}"
    schema = f"mallory_{attempt}"
    scene.root.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {MALLORY}".encode())
    scene.root.execute(f"GRANT USAGE ON SCHEMA {schema} TO PUBLIC".encode())
    # It says what the victim's own call says, and waits for nothing.
    copy(
        scene,
        schema,
        lambda text: re.sub(
            rf"PERFORM (?:ext|{schema})\._pg_background_say\(\);",
            r"\g<0> RETURN NULL;",
            through(lie(text)),
        ),
    )
    scene.as_mallory(
        f"CREATE FUNCTION {schema}.f() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $f$ BEGIN"
        f" PERFORM {schema}.pg_background_launch(mallory.job('{attempt}', 'begun'), 0);"
        " EXCEPTION WHEN OTHERS THEN NULL; END $f$"
    )
    for victim in ("bob", "dba"):
        with scene.connect(victim) as conn:
            before = launched(conn)
            for call in ("SELECT 1", "SELECT 2"):
                own = f"PERFORM ext.pg_background_launch('{call}', 0);"
                hostile = f"PERFORM {schema}.f();"
                conn.execute(f"DO $d$ BEGIN {hostile} {own} {hostile} END $d$".encode())
            assert launched(conn) == before + 2
            is_well(conn)
    settled(scene)
    assert scene.breaches(attempt) == []


# --- settings ------------------------------------------------------------------------------------

SETTINGS: Final = {
    "session": "repeat('0', 64)",
    "session_empty": "''",
    "session_short": "'abc'",
    "channel": "'1'",
    "channel_large": "'999999999'",
    "channel_text": "'x'' OR true --'",
    "message": "'x'",
    "job": "'x'",
}


@pytest.mark.parametrize(
    ("scene", "lasts"), [("postgres", True), ("dba", False)], indirect=["scene"]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_by_hostile_code(scene: Scene, name: str, lasts: bool) -> None:
    """The session's own settings, replaced by a trigger; the victim has no more and no less."""
    function = f"mallory.set{next(_number)}"
    setting = f"pg_background_proxy.{name.split('_')[0]}"
    scene.as_mallory(
        f"CREATE FUNCTION {function}() RETURNS void LANGUAGE plpgsql AS $f$ BEGIN"
        f" PERFORM set_config('{setting}', {SETTINGS[name]}, {not lasts}); END $f$"
    )
    with scene.connect("bob") as conn:
        with conn.transaction():
            conn.execute(f"SELECT {function}()".encode())
            with contextlib.suppress(psycopg.Error), conn.transaction():
                conn.execute("DO $$ BEGIN PERFORM ext.pg_background_launch('SELECT 1', 0); END $$")
        assert conn.execute("SELECT 1").fetchone() == (1,)
        pid = one(conn, "SELECT ext.pg_background_launch('SELECT 6 * 7', 0)")
        query = "SELECT n FROM ext.pg_background_result(%s) AS (n int)"
        assert conn.execute(query, [pid]).fetchall() == [(42,)]
        conn.execute("DISCARD ALL")
        is_well(conn)


@pytest.mark.parametrize(
    "payload", ["'=a'", "' 50 =x'", "' 1e308 '", "' NaN =' || repeat('x', 100000)", "''", "' -1'"]
)
def test_words_of_progress(scene: Scene, payload: str) -> None:
    """Only a job reports progress, and of itself alone."""
    with scene.connect("bob") as conn, scene.connect("dba") as other:
        sleeps = "SELECT pg_sleep(0.5)"
        handle = one(other, "SELECT ext.pg_background_launch_v2(%s)::text", [sleeps])
        word = one(conn, "SELECT coalesce(current_setting('pg_background_proxy.job', true), '')")
        assert word == ""
        for said in (
            f"RAISE INFO '%', coalesce(current_setting('pg_background_proxy.job', true), 'x')"
            f" || {payload};",
            "PERFORM set_config('pg_background_proxy.job', 'x', true);"
            " PERFORM ext.pg_background_progress(7);",
        ):
            conn.execute(f"DO $d$ BEGIN {said} END $d$".encode())
            # In a job the word is there, for whatever runs in it.
            job = f"DO $d$ BEGIN {said} END $d$"
            pid = one(conn, "SELECT ext.pg_background_launch(%s, 0)", [job])
            conn.execute("SELECT * FROM ext.pg_background_result(%s) AS (tag text)", [pid])
        progress = one(
            other,
            "SELECT p.progress_pct::text FROM (SELECT (%s::ext.pg_background_handle).*) h,"
            " LATERAL ext.pg_background_get_progress(h.pid, h.cookie) p",
            [handle],
        )
        assert progress is None
        is_well(conn)


# --- what looks like a channel -------------------------------------------------------------------


@pytest.fixture
def impostors(scene: Scene) -> Iterator[None]:
    """Backends of the attacker's and of the victim's role that look like channels, and say what
    somebody may want to hear; they take the locks that a function would wait for, too."""
    stop = threading.Event()

    def imitate(user: str) -> None:
        with (
            scene.server.connect(dbname=scene.name, user=user) as conn,
            scene.server.connect(dbname=scene.name) as root,
        ):
            while not stop.is_set():
                names = root.execute(
                    "SELECT application_name FROM pg_stat_activity WHERE datname = %s"
                    " AND application_name ~ '^[0-9a-f]{12}'",
                    [scene.name],
                ).fetchall()
                for (name,) in names or [("pg_background channel",)]:
                    for state in ("a0000AAAA", "q0000", "w", "t", "pw", "p", "x"):
                        conn.execute(
                            "SELECT set_config('application_name', %s, false)", [name[:12] + state]
                        )
                time.sleep(0.002)

    threads = [threading.Thread(target=imitate, args=[user]) for user in (MALLORY, "alice")]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


def test_backends_of_others_that_look_like_channels(scene: Scene, impostors: None) -> None:
    """An answer counts only from a backend of the session's own login role."""
    with scene.connect("bob") as conn:
        for number in range(30):
            call = f"SELECT ext.pg_background_launch('SELECT {number}', 0)"
            pid = one(conn, f"WITH q AS ({call}) TABLE q")
            query = "SELECT r.n FROM (SELECT %s AS pid OFFSET 0) l,"
            query += " ext.pg_background_result(l.pid) AS r(n int)"
            assert conn.execute(query, [pid]).fetchall() == [(number,)]


@pytest.mark.parametrize(
    ("scene", "kind"),
    [
        *(("postgres", "advisory_lock"), ("dba", "advisory_lock_shared")),
        pytest.param("postgres", "advisory_lock_shared", marks=pytest.mark.slow),
        pytest.param("dba", "advisory_lock", marks=pytest.mark.slow),
    ],
    indirect=["scene"],
)
def test_games_with_advisory_locks(scene: Scene, kind: str) -> None:
    """Hostile code takes and releases whatever advisory lock it sees, in the victim's session and
    in one of its own."""
    name = f"mallory.locks{next(_number)}"
    scene.as_mallory(
        f"CREATE FUNCTION {name}() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $f$"
        " DECLARE l record; key int8; BEGIN"
        " FOR l IN SELECT * FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 LOOP"
        " key := (l.classid::int8 << 32) | l.objid::int8;"
        f" PERFORM pg_try_{kind}(key); PERFORM pg_advisory_unlock(key);"
        " END LOOP; PERFORM pg_advisory_unlock_all(); END $f$"
    )
    stop = threading.Event()

    def play() -> None:
        with scene.mallory() as conn:
            while not stop.wait(0.001):
                conn.execute(f"SELECT {name}()".encode())

    player = threading.Thread(target=play)
    player.start()
    try:
        with scene.connect("bob") as conn:
            for number in range(15):
                rows = conn.execute(
                    "SELECT count(r.n), sum(length(r.t)) FROM (SELECT ext.pg_background_launch("
                    "'SELECT i, repeat(''x'', 1000) FROM generate_series(1, 60) i', 0) AS pid"
                    f" OFFSET 0) l, ext.pg_background_result(l.pid) AS r(n int, t text),"
                    f" LATERAL (SELECT {name}()) x".encode()
                ).fetchall()
                assert rows == [(60, 60_000)], number
            is_well(conn)
    finally:
        stop.set()
        player.join()


# --- who may see queries -------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["pg_read_all_stats", "pg_monitor"])
@pytest.mark.parametrize(("scene", "victim"), CASES, indirect=["scene"])
def test_an_attacker_who_sees_all_queries(scene: Scene, role: str, victim: str) -> None:
    """The attacker can read what any role's channel shows."""
    attempt = f"stats{next(_number)}"
    scene.root.execute(f"GRANT {role} TO {MALLORY}".encode())
    try:
        scene.as_mallory(
            f"CREATE TABLE mallory.{attempt} AS SELECT 1 AS a;"
            f" CREATE INDEX ON mallory.{attempt} (mallory.idx(a))"
        )
        scene.run(victim, attempt, f"REINDEX TABLE mallory.{attempt}", "SELECT mallory.definer(1)")
        settled(scene)
        assert scene.ran(attempt)
        assert scene.breaches(attempt) == []
    finally:
        scene.root.execute(f"REVOKE {role} FROM {MALLORY}".encode())


@pytest.mark.parametrize("verb", ["ask", "proof"])
def test_an_attacker_who_sees_all_queries_and_adds_roles(scene: Scene, verb: str) -> None:
    """What the extension's own function says of him comes last, behind what he likes."""
    attempt = f"adds{next(_number)}"
    says = "PERFORM ext._pg_background_say();"
    adds = (
        f"IF split_part(current_setting('pg_background_proxy.message'), ' ', 3) = '{verb}' THEN"
        " PERFORM set_config('pg_background_proxy.message', concat_ws(' ',"
        " current_setting('pg_background_proxy.message'), (SELECT string_agg(CAST(oid AS text),"
        " ',') FROM pg_roles)), true); END IF; "
    )

    def edit(text: str) -> str:
        own = r"(?<!FUNCTION )\badding\._pg_background_say\b"
        return re.sub(own, "ext._pg_background_say", lie(text)).replace(says, adds + says)

    scene.root.execute(f"GRANT pg_read_all_stats TO {MALLORY}".encode())
    try:
        scene.as_mallory(
            f"CREATE FUNCTION mallory.{attempt}() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS"
            f" $f$ BEGIN INSERT INTO public.proof VALUES ('{attempt}', 'ran', mallory.reach());"
            f" PERFORM adding.pg_background_launch(mallory.job('{attempt}', 'adding'), 0); END $f$"
        )
        scene.root.execute(f"CREATE SCHEMA adding AUTHORIZATION {MALLORY}".encode())
        copy(scene, "adding", edit)
        with scene.connect("postgres") as conn, contextlib.suppress(psycopg.Error):
            conn.execute("SET statement_timeout = '3s'")  # what is not believed is not answered
            conn.execute(f"SELECT mallory.{attempt}()".encode())
        settled(scene)
        assert scene.breaches(attempt) == []
    finally:
        scene.root.execute("DROP SCHEMA IF EXISTS adding CASCADE")
        scene.root.execute(f"REVOKE pg_read_all_stats FROM {MALLORY}".encode())


def test_a_member_that_inherits_but_may_not_set_role(scene: Scene) -> None:
    """He has the victim's own rights, but not those that the victim has by SET ROLE alone."""
    if scene.server.version < 160000:
        pytest.skip("membership has no options before 16")
    attempt = f"inherits{next(_number)}"
    root = scene.root
    root.execute(
        "CREATE ROLE vault; CREATE ROLE carol LOGIN; GRANT vault TO carol WITH INHERIT FALSE"
    )
    root.execute(f"GRANT carol TO {MALLORY} WITH INHERIT TRUE, SET FALSE".encode())
    try:
        with scene.connect(scene.owner) as conn:
            assert one(conn, "SELECT ext.grant_pg_background_privileges('carol')") is True
        scene.as_mallory(
            f"CREATE FUNCTION mallory.{attempt}() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS"
            " $f$ BEGIN PERFORM mallory.go(); END $f$"
        )
        scene.run("carol", attempt, f"SELECT mallory.{attempt}()")
        settled(scene)
        assert scene.ran(attempt)
        assert scene.breaches(attempt) == []
    finally:
        root.execute("DROP OWNED BY vault, carol; DROP ROLE vault, carol")


# --- names ---------------------------------------------------------------------------------------

NAMES: Final = (
    'qu"ote',
    "do.t",
    "per%cent%s%%",
    "apos'trophe",
    "back\\slash",
    "$body$"[:-1],
    "new\nline",
    "sp ace ext._pg_background_say() x",
    "ünïcödé",
    "x" * 63,
    "None",
    "{}",
    "$1",
    "--",
    "/*",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scene", ["postgres"], indirect=True)
def test_names(scene: Scene, name: str) -> None:
    """Roles, schemas and functions with names that could be taken for something else."""
    role = sql.Identifier(name)
    attempt = f"names{next(_number)}"
    with scene.server.connect(dbname=scene.name) as root:
        root.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        root.execute(sql.SQL("CREATE SCHEMA {0} AUTHORIZATION {0}").format(role))
        root.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO PUBLIC").format(role))
        root.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO PUBLIC").format(role))
        root.execute(sql.SQL("GRANT pgbackground_role TO {}").format(role))
        try:
            with scene.server.connect(dbname=scene.name, user=name) as conn:
                conn.execute(
                    sql.SQL(
                        "CREATE FUNCTION {0}.{0}() RETURNS void LANGUAGE plpgsql SECURITY DEFINER"
                        " AS $f$ BEGIN PERFORM mallory.go(); END $f$"
                    ).format(role)
                )
            scene.run("bob", attempt, sql.SQL("SELECT {0}.{0}()").format(role).as_string(root))
            settled(scene)
            assert scene.ran(attempt)
            assert scene.breaches(attempt) == []
        finally:
            root.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(role))
            root.execute(sql.SQL("DROP ROLE {}").format(role))


# --- shadows -------------------------------------------------------------------------------------

SHADOWS: Final = (
    "CREATE FUNCTION {s}.current_setting(text, bool) RETURNS text LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.set_config(text, text, bool) RETURNS text LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.pg_stat_get_activity(int) RETURNS int LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.concat_ws(text, VARIADIC text[]) RETURNS text LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.array_to_string(text[], text) RETURNS text LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.pg_backend_pid() RETURNS int LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.left(text, int) RETURNS text LANGUAGE plpgsql AS {b}",
    "CREATE FUNCTION {s}.shadow_text(text, text) RETURNS bool LANGUAGE plpgsql AS {b};"
    " CREATE OPERATOR {s}.= (FUNCTION = {s}.shadow_text, LEFTARG = text, RIGHTARG = text);"
    " CREATE OPERATOR {s}.<> (FUNCTION = {s}.shadow_text, LEFTARG = text, RIGHTARG = text)",
    "CREATE FUNCTION {s}.shadow_int(int, int) RETURNS bool LANGUAGE plpgsql AS {b};"
    " CREATE OPERATOR {s}.= (FUNCTION = {s}.shadow_int, LEFTARG = int, RIGHTARG = int);"
    " CREATE OPERATOR {s}.> (FUNCTION = {s}.shadow_int, LEFTARG = int, RIGHTARG = int)",
    "CREATE DOMAIN {s}.text AS pg_catalog.text CHECK (false)",
    "CREATE DOMAIN {s}.int4 AS pg_catalog.int4 CHECK (false)",
    "CREATE VIEW {s}.pg_settings AS SELECT 1 AS x; CREATE VIEW {s}.pg_roles AS SELECT 1 AS x;"
    " CREATE VIEW {s}.pg_type AS SELECT 1 AS x; CREATE VIEW {s}.pg_proc AS SELECT 1 AS x",
)


@pytest.mark.parametrize("where", ["first", "temp", "role", "database"])
def test_names_of_the_system_shadowed(scene: Scene, where: str) -> None:
    """Functions, operators, types and tables of the attacker's under names that ours use."""
    schema = "pg_temp" if where == "temp" else f"shadow{next(_number)}"
    body = "$b$ BEGIN RAISE WARNING 'shadow as %', current_user; RETURN NULL; END $b$"
    root = scene.root
    creations = [text.format(s=schema, b=body) for text in SHADOWS]
    path = f"{schema}, pg_catalog, ext"
    if where != "temp":
        root.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {MALLORY}".encode())
        root.execute(f"GRANT USAGE ON SCHEMA {schema} TO PUBLIC".encode())
        for text in creations:
            scene.as_mallory(text)
    place = {"role": "ROLE bob", "database": f"DATABASE {scene.name}"}.get(where)
    if place:
        root.execute(f"ALTER {place} SET search_path = {path}".encode())
    try:
        with scene.connect("bob") as conn, notices(conn) as heard:
            if where == "temp":
                for text in creations:
                    conn.execute(text.encode())
            if not place:
                conn.execute(f"SET search_path = {path}".encode())
            for statement in (
                "DO $d$ DECLARE h ext.pg_background_handle; r record; BEGIN"
                " h := ext.pg_background_launch_v2('SELECT 1');"
                " PERFORM ext.pg_background_wait(h.pid, h.cookie);"
                " PERFORM state FROM ext.pg_background_list;"
                " FOR r IN SELECT n FROM ext.pg_background_result(h.pid, h.cookie)"
                " AS (n pg_catalog.int4) LOOP END LOOP; END $d$",
                "SELECT ext.pg_background_launch('SELECT 1', 0)",
                "SELECT pid FROM ext.pg_background_activity",
            ):
                with contextlib.suppress(psycopg.errors.UndefinedTable):
                    conn.execute(statement.encode())
        assert [n["message_primary"] for n in heard if "shadow" in str(n["message_primary"])] == []
    finally:
        if place:
            root.execute(f"ALTER {place} RESET search_path".encode())


# --- dumps and the rest --------------------------------------------------------------------------


def test_payloads_of_notify(scene: Scene) -> None:
    """What others send by NOTIFY has no token, and with one it is a notification still."""
    with scene.connect("bob") as conn, scene.mallory() as mallory:
        conn.execute("LISTEN x")
        session = one(conn, "SHOW pg_background_proxy.session")
        before = launched(conn)
        for payload in (session, session[:32], f"{session[:32]} {'0' * 32} call x", "x" * 7000):
            mallory.execute("SELECT pg_notify('x', %s)", [payload])
        conn.execute("SELECT 1")
        assert len(list(conn.notifies(timeout=2, stop_after=4))) == 4
        assert launched(conn) == before
        is_well(conn)


def test_a_dump_restored_by_another_role(scene: Scene) -> None:
    """In a database of the attacker's, the extension is his, and speaks for him alone."""
    dump = tool(scene.server, "pg_dump")
    text = succeed(scene.server, dump, "--no-owner", "-n", "ext", dbname=scene.name).out
    with database(scene.server, "attacked_restored") as name:
        with scene.server.connect() as root:
            root.execute(f"ALTER DATABASE {name} OWNER TO {MALLORY}".encode())
        psql(scene.server.port, input=text, dbname=name, user=MALLORY)
        with scene.server.connect(dbname=name) as root:
            root.execute("CREATE TABLE public.proof (login text)")
            root.execute("GRANT INSERT ON public.proof TO PUBLIC")
        with scene.server.connect(dbname=name, user=MALLORY) as conn:
            owner = (
                "SELECT proowner::regrole::text FROM pg_proc WHERE proname = '_pg_background_say'"
            )
            assert one(conn, owner) == MALLORY
            conn.execute(
                "CREATE FUNCTION public.go() RETURNS void LANGUAGE plpgsql AS $f$ BEGIN"
                f" IF session_user <> '{MALLORY}' THEN PERFORM ext.pg_background_launch("
                "'RESET ROLE; INSERT INTO public.proof VALUES (session_user)', 0); END IF;"
                " EXCEPTION WHEN OTHERS THEN NULL; END $f$;"
                " CREATE FUNCTION public.idx(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
                " $f$ BEGIN PERFORM public.go(); RETURN 1; END $f$;"
                " CREATE TABLE public.t AS SELECT 1 AS a; CREATE INDEX ON public.t (public.idx(a))"
            )
        for victim in ("postgres", "dba", "bob"):
            with scene.proxy.connect(dbname=name, user=victim) as conn:
                conn.execute("REINDEX TABLE public.t")
                conn.execute("ANALYZE public.t")
                assert conn.execute("SELECT 1").fetchone() == (1,)
        with scene.server.connect(dbname=name) as root:
            others = "SELECT FROM pg_stat_activity WHERE datname = %s AND state <> 'idle'"
            others += " AND pid <> pg_backend_pid()"
            wait_until(lambda: not root.execute(others, [name]).fetchall())
            assert (
                root.execute("SELECT login FROM proof WHERE login <> %s", [MALLORY]).fetchall()
                == []
            )
