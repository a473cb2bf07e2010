"""Where the attacks take place: two databases, an attacker, three victims; and the hostile code.

Invariant: an attack is judged by what the attacker has afterwards, never by how it was refused.
Each job of the attacker's notes its role, and the roles that its launching code could have run as.
A job of any other role is a breach.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.support.background import wait_until
from tests.support.executors import executor_as_before
from tests.support.in_database import one
from tests.support.servers import DEFAULT_HBA, Connection, Proxy, Server, database

MALLORY: Final = "mallory"
PASSWORD: Final = "mallory's own"
OWNERS: Final = ("postgres", "dba")
"""The owners of the extension and of the database."""
VICTIMS: Final = ("postgres", "dba", "bob")
"""A superuser, an administrator without its rights, an ordinary role. The last two belong to the
attacker's role, so that they may look after its tables."""
CASES: Final = [
    pytest.param(owner, victim, marks=[] if usual else pytest.mark.slow)
    for owner, victim, usual in (
        ("postgres", "postgres", True),
        ("postgres", "dba", False),
        ("postgres", "bob", True),
        ("dba", "postgres", False),
        ("dba", "dba", True),
        ("dba", "bob", False),
    )
]
"""The owner of the extension, and the role of the session."""
FOREIGN: Final = "mallorys"
"""A database of the attacker's own, where he logs in with a password, as dblink demands."""

ROLES: Final = f"""
CREATE ROLE {MALLORY} LOGIN PASSWORD '{PASSWORD.replace("'", "''")}';
CREATE ROLE dba LOGIN CREATEROLE CREATEDB;
CREATE ROLE bob LOGIN;
GRANT {MALLORY} TO dba, bob;
"""

TABLES: Final = """
CREATE TABLE public.proof (attempt text, means text, reach text[], login text, role text);
GRANT INSERT ON public.proof TO PUBLIC;
CREATE TABLE public.parent (victim text PRIMARY KEY, n int);
GRANT ALL ON public.parent TO PUBLIC;
CREATE SCHEMA mallory AUTHORIZATION mallory;
GRANT USAGE ON SCHEMA mallory TO PUBLIC;
"""

# The roles that the calling code could run as, by what it may undo; and what a job of the
# attacker's does.
HOSTILE: Final = """
CREATE FUNCTION mallory.reach() RETURNS text[] LANGUAGE plpgsql AS $f$
DECLARE found text[] := ARRAY[CAST(current_user AS text)];
BEGIN
  BEGIN
    RESET ROLE;
    found := found || CAST(current_user AS text);
    RESET SESSION AUTHORIZATION;
    found := found || CAST(current_user AS text);
    RAISE SQLSTATE 'UNDOX';
  EXCEPTION WHEN OTHERS THEN NULL;
  END;
  RETURN found;
END $f$;

CREATE FUNCTION mallory.job(attempt text, means text) RETURNS text LANGUAGE plpgsql AS $f$
BEGIN
  RETURN format($j$DO $p$ BEGIN
    BEGIN RESET ROLE; EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN RESET SESSION AUTHORIZATION; EXCEPTION WHEN OTHERS THEN NULL; END;
    INSERT INTO public.proof VALUES (%L, %L, %L, session_user, current_user);
  END $p$$j$, attempt, means, mallory.reach());
END $f$;

CREATE FUNCTION mallory.attack(attempt text) RETURNS void LANGUAGE plpgsql AS $f$
DECLARE means text; message text;
BEGIN
  IF attempt IS NULL OR attempt = '' THEN RETURN; END IF;
  INSERT INTO public.proof VALUES (attempt, 'ran', mallory.reach(), NULL, current_user);
  message := current_setting('pg_background_proxy.message', true);
  FOREACH means IN ARRAY ARRAY['ext', 'copied', 'lying', 'through', 'over'] LOOP
    BEGIN
      IF to_regprocedure(means || '.pg_background_launch(text, int4)') IS NOT NULL THEN
        EXECUTE format('SELECT %I.pg_background_launch($1, 0)', means)
          USING mallory.job(attempt, means);
      END IF;
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
  END LOOP;
  BEGIN
    -- The last message of this transaction, again.
    IF message <> '' THEN
      RAISE INFO '%', message;
      PERFORM set_config('pg_background_proxy.message', message, true);
      PERFORM ext._pg_background_say();
      PERFORM pg_sleep(0.05);
    END IF;
  EXCEPTION WHEN OTHERS THEN NULL;
  END;
EXCEPTION WHEN OTHERS THEN NULL;
END $f$;

CREATE FUNCTION mallory.go() RETURNS void LANGUAGE sql AS
  $f$ SELECT mallory.attack(current_setting('my.attempt', true)) $f$;
CREATE FUNCTION mallory.idx(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS
  $f$ BEGIN PERFORM mallory.go(); RETURN n; END $f$;
CREATE FUNCTION mallory.volatile(n int) RETURNS int LANGUAGE plpgsql AS
  $f$ BEGIN PERFORM mallory.go(); RETURN n; END $f$;
CREATE FUNCTION mallory.definer(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql SECURITY DEFINER AS
  $f$ BEGIN PERFORM mallory.go(); RETURN n; END $f$;
"""


@dataclass
class Scene:
    """A database with the extension in the schema ``ext``, and the attacker's code in his.

    Attributes:
        name: of the database.
        owner: of the database, the schema and the extension.
        root: a superuser's session past the proxy.
    """

    server: Server
    proxy: Proxy
    name: str
    owner: str
    root: Connection

    def connect(self, user: str, **params: Any) -> Connection:
        """A session through the proxy."""
        return self.proxy.connect(dbname=self.name, user=user, **params)

    def mallory(self) -> Connection:
        """The attacker's, past the proxy."""
        return self.server.connect(dbname=self.name, user=MALLORY)

    def as_mallory(self, script: str) -> None:
        """The attacker prepares something."""
        with self.mallory() as conn:
            conn.execute(script.encode())

    def run(self, victim: str, attempt: str, *statements: str, **params: Any) -> None:
        """The victim runs something, and may work afterwards. Statements may fail."""
        with self.connect(victim, **params) as conn:
            conn.execute(sql.SQL("SET my.attempt = {}").format(attempt))
            for statement in statements:
                with contextlib.suppress(psycopg.Error):
                    if statement.startswith("COPY"):
                        with conn.cursor().copy(statement.encode()) as copied:
                            list(copied)
                    else:
                        conn.execute(statement.encode())
            if conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                conn.execute("ROLLBACK")
            is_well(conn)

    def ran(self, attempt: str) -> list[tuple[list[str], str]]:
        """The roles that hostile code could have run as, and the role that it ran as, for each
        run."""
        self.root.execute("SET search_path TO DEFAULT")
        return self.root.execute(
            "SELECT reach, role FROM proof WHERE attempt = %s AND means = 'ran'", [attempt]
        ).fetchall()

    def breaches(self, attempt: str) -> list[tuple[Any, ...]]:
        """The jobs that ran as a role that the code that launched them could not have become."""
        member = "SET" if self.server.version >= 160000 else "MEMBER"
        return self.root.execute(
            "SELECT means, reach, login, role FROM proof WHERE attempt = %s AND means <> 'ran'"
            " AND NOT EXISTS (SELECT FROM unnest(reach) r WHERE pg_has_role(r, login, %s))",
            [attempt, member],
        ).fetchall()

    def jobs(self, attempt: str) -> list[tuple[Any, ...]]:
        """The jobs that hostile code got: by which means, and as which role."""
        return self.root.execute(
            "SELECT means, login FROM proof WHERE attempt = %s AND means <> 'ran'", [attempt]
        ).fetchall()

    def is_superuser(self, role: str = MALLORY) -> bool:
        """Whether the attacker is one."""
        return bool(one(self.root, "SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role]))


def is_well(conn: Connection) -> None:
    """The session serves its user as before."""
    query = "SELECT n FROM ext.pg_background_result(%s) AS (n int)"
    assert conn.execute("SELECT 1").fetchone() == (1,)
    pid = one(conn, "SELECT ext.pg_background_launch('SELECT 6 * 7', 0)")
    assert conn.execute(query, [pid]).fetchall() == [(42,)]
    try:
        pid = one(conn, "WITH q AS (SELECT ext.pg_background_launch('SELECT 6 * 7', 0)) TABLE q")
    except psycopg.errors.InsufficientPrivilege:
        # A superuser need not be served where another role owns the extension's functions.
        assert one(conn, TRUSTS_ANOTHER)
    else:
        assert conn.execute(query, [pid]).fetchall() == [(42,)]
    assert conn.execute("SELECT 1").fetchone() == (1,)


TRUSTS_ANOTHER: Final = """
SELECT (SELECT rolsuper FROM pg_roles WHERE rolname = session_user)
  AND NOT (SELECT rolsuper FROM pg_roles r, pg_proc p WHERE r.oid = p.proowner
    AND p.oid = 'ext.pg_background_launch(text, int4)'::regprocedure)
"""


def settled(scene: Scene) -> None:
    """Waits until whatever was launched has ended, or will never begin."""
    busy = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        " AND state <> 'idle'"
    )
    wait_until(lambda: one(scene.root, busy, [scene.name]) == 0)


# --- setting up ----------------------------------------------------------------------------------


def scenes(server: Server, proxy: Proxy) -> Iterator[dict[str, Scene]]:
    """The body of a fixture: a scene for each of OWNERS."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(executor_as_before(server))
        with server.connect() as conn:
            conn.execute(ROLES.encode())
        stack.callback(_drop_roles, server)
        stack.enter_context(database(server, FOREIGN))
        with server.connect() as conn:
            conn.execute(f"ALTER DATABASE {FOREIGN} OWNER TO {MALLORY}")
        server.set_hba([f"host {FOREIGN} {MALLORY} 127.0.0.1/32 scram-sha-256", *DEFAULT_HBA])
        stack.callback(server.set_hba)
        found: dict[str, Scene] = {}
        for owner in OWNERS:
            name = stack.enter_context(database(server, f"attacked_{owner}"))
            root = stack.enter_context(server.connect(dbname=name))
            found[owner] = scene = Scene(server, proxy, name, owner, root)
            _fill(scene)
        yield found


def _fill(scene: Scene) -> None:
    owner, root = scene.owner, scene.root
    # The default since PostgreSQL 15, which the tests' fixture undoes.
    root.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    root.execute(f'ALTER DATABASE "{scene.name}" OWNER TO {owner}'.encode())
    with scene.connect(owner) as conn:
        conn.execute("CREATE SCHEMA ext")
        conn.execute("CREATE EXTENSION pg_background SCHEMA ext")
        conn.execute("GRANT USAGE ON SCHEMA ext TO PUBLIC")
        for role in (MALLORY, *VICTIMS):
            if role != "postgres":
                granted = one(conn, "SELECT ext.grant_pg_background_privileges(%s)", [role])
                assert granted is True
    root.execute(TABLES)
    for victim in VICTIMS:
        root.execute(f"CREATE TABLE public.secret_{victim} (n int)".encode())
        root.execute(f"ALTER TABLE public.secret_{victim} OWNER TO {victim}".encode())
        root.execute("INSERT INTO public.parent VALUES (%s, 1)", [victim])
    for schema in ("copied", "lying", "through", "over"):
        root.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {MALLORY}".encode())
        root.execute(f"GRANT USAGE ON SCHEMA {schema} TO PUBLIC".encode())
    scene.as_mallory(HOSTILE)
    copy(scene, "copied")
    copy(scene, "lying", lie)
    copy(scene, "through", lambda text: through(lie(text)))
    if has_dblink(scene):
        over_dblink(scene)


def _drop_roles(server: Server) -> None:
    with server.connect() as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY(%s)",
            [[MALLORY, "dba", "bob"]],
        )
        roles = f"{MALLORY}, dba, bob"
        conn.execute(f"DROP OWNED BY {roles} CASCADE; DROP ROLE {roles}".encode())


# --- the attacker's copies of the extension ------------------------------------------------------

DEFINITIONS: Final = """
SELECT pg_get_functiondef(p.oid) FROM pg_proc p WHERE p.pronamespace = 'ext'::regnamespace
AND p.prokind = 'f' AND (p.proname LIKE '\\_pg\\_background\\_%' AND p.proname !~ 'role|restored'
  OR p.oid = 'ext.pg_background_launch(text, int4)'::regprocedure)
"""


def copy(
    scene: Scene, schema: str, edit: Callable[[str], str] = lambda text: text, *, owner: str = ""
) -> None:
    """The extension's functions once more, the attacker's own, in a schema of his.

    These say to the proxy whatever the functions say.

    Args:
        scene: where.
        schema: where to create them.
        edit: what he changes in each, after the names.
        owner: who creates them; the attacker unless told.
    """
    with scene.server.connect(dbname=scene.name, user=owner or MALLORY) as conn:
        conn.execute("SET check_function_bodies = off")
        for (definition,) in conn.execute(DEFINITIONS).fetchall():
            text = re.sub(r'(?<![\w"])"?ext"?\.', f"{schema}.", definition)
            # They give up sooner, and are less busy.
            text = re.sub(r"looks > 600", "looks > 100", text)
            text = re.sub(r"looks > 150", "looks > 20", text)
            conn.execute(edit(text).encode())


def lie(text: str) -> str:
    """Say that the current role is the session's."""
    return re.sub(r"\bcurrent_user\b", "session_user", text)


def through(text: str) -> str:
    """Have the extension's own function say it."""
    return re.sub(r"(?<!FUNCTION )\bthrough\._pg_background_say\b", "ext._pg_background_say", text)


def has_dblink(scene: Scene) -> bool:
    """Whether the server has dblink. If so, a superuser installs it, as only a superuser may."""
    available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'dblink'"
    if not one(scene.root, available):
        return False
    scene.root.execute("CREATE EXTENSION IF NOT EXISTS dblink SCHEMA public")
    return True


def over_dblink(scene: Scene) -> None:
    """C1: what the copy says comes from another database, where a function has the right name."""
    with scene.server.connect(dbname=FOREIGN, user=MALLORY, password=PASSWORD) as conn:
        conn.execute(
            "CREATE SCHEMA IF NOT EXISTS ext; CREATE OR REPLACE FUNCTION"
            " ext._pg_background_say() RETURNS void LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION '%', current_setting('my.msg'); END $$"
        )
    conninfo = psycopg.conninfo.make_conninfo(
        "",
        host=scene.server.host,
        port=scene.server.port,
        dbname=FOREIGN,
        user=MALLORY,
        password=PASSWORD,
    )
    scene.as_mallory(
        "CREATE OR REPLACE FUNCTION mallory.over(layout text, VARIADIC words text[])"
        " RETURNS void LANGUAGE plpgsql AS $f$ BEGIN PERFORM public.dblink_exec("
        + sql.Literal(conninfo).as_string(None)
        + ", format('SET my.msg = %L; SELECT ext._pg_background_say()',"
        " format(replace(layout, '%', '%s'), VARIADIC words)), false); END $f$"
    )

    def edit(text: str) -> str:
        return re.sub(
            r"RAISE INFO ('[^']*'),(.*?);",
            r"PERFORM mallory.over(\1, \2);",
            lie(text),
            flags=re.DOTALL,
        )

    copy(scene, "over", edit)


def needs(scene: Scene, extension: LiteralString) -> None:
    """Creates an extension; skips the test if the server does not have it."""
    available = "SELECT count(*) FROM pg_available_extensions WHERE name = %s"
    if not one(scene.root, available, [extension]):
        pytest.skip(f"this PostgreSQL has no {extension}")
    scene.root.execute(f"CREATE EXTENSION IF NOT EXISTS {extension} SCHEMA public".encode())


def pause(seconds: float = 0.1) -> None:
    """Waits for a while for what must not happen."""
    time.sleep(seconds)
