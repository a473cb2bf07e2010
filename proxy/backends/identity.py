"""The identity of a login: which role it is, and whether the server would still accept it.

Invariant: an earlier login is used only while a new one would give the same. PostgreSQL decides
some things only at login: the role (by OID, whatever its name means by now), whether it may log in,
its ALTER ROLE … SET, the effects of event triggers on login, and up to 15 whether it is a
superuser. `IDENTITY` has all of this that every role can see, so its values before the login and
now tell whether the login still holds. Asked for after the login, it may be newer than what the
login was given. It does not show a new password, nor a setting that was added and RESET between the
two looks; other changes show even if they were undone (`xmin`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from proxy.backends.route import Route
from proxy.sql.text import literal


class Login(NamedTuple):
    """A role and a database at a server."""

    route: Route
    database: bytes
    user: bytes

    def is_of(self, user: bytes | None, database: bytes | None) -> bool:
        """Whether these are its names. Non-ASCII names all match, since encodings may differ."""
        pairs = ((self.user, user), (self.database, database))
        return all(ours == theirs or not ours.isascii() for ours, theirs in pairs)


HAS_LOGIN_TRIGGERS: Final = (
    b"EXISTS (SELECT FROM pg_catalog.pg_event_trigger"
    b" WHERE evtevent OPERATOR(pg_catalog.=) 'login'"
    b" AND evtenabled OPERATOR(pg_catalog.<>) 'D')"
)
"""An SQL expression: whether the database has event triggers that a login fires."""


# The role is looked up by name: session_user is a name, and an error once the role is gone. The
# first condition covers changes between the login and the first look: `is_superuser` was decided at
# login, unless ALTER ROLE … SET role interfered. The expiry is compared with the clock, since now()
# is the start of the transaction. The current role is the one that ALTER ROLE … SET role gave at
# login: RESET ROLE goes back to it, whether the login role is still a member or not.
# A new backend has the configuration files as its parent has read them. An older one reads them
# again when they change, except pg_hba.conf and what can be set at login only.
IDENTITY: Final = b"""
    (SELECT CASE WHEN
            (current_user OPERATOR(pg_catalog.<>) session_user OR
             l.rolsuper OPERATOR(pg_catalog.=)
             CAST(pg_catalog.current_setting('is_superuser') AS pg_catalog.bool))
            AND l.rolcanlogin AND d.datallowconn
            AND pg_catalog.has_database_privilege(l.oid, d.oid, 'CONNECT')
            AND (l.rolsuper OR
                 l.rolconnlimit OPERATOR(pg_catalog.<>) 0
                 AND d.datconnlimit OPERATOR(pg_catalog.<>) 0)
            AND COALESCE(l.rolvaliduntil OPERATOR(pg_catalog.>) pg_catalog.clock_timestamp(), true)
            THEN CAST(ROW(
                l.oid, l.rolname, l.rolsuper, l.rolconnlimit,
                pg_catalog.date_part('epoch', l.rolvaliduntil),
                d.oid, d.datname, d.datconnlimit,
                pg_catalog.pg_has_role(l.oid, current_user, CASE
                    WHEN pg_catalog.current_setting('server_version_num')::pg_catalog.int4
                         OPERATOR(pg_catalog.>=) 160000 THEN 'SET' ELSE 'MEMBER' END),
                pg_catalog.date_part('epoch', pg_catalog.pg_conf_load_time()),
                ARRAY(SELECT CAST(ROW(s.xmin, s.setconfig) AS pg_catalog.text)
                      FROM pg_catalog.pg_db_role_setting s
                      WHERE s.setrole OPERATOR(pg_catalog.=) ANY (ARRAY[0, l.oid])
                      AND s.setdatabase OPERATOR(pg_catalog.=) ANY (ARRAY[0, d.oid])
                      ORDER BY s.setdatabase, s.setrole),
                ARRAY(SELECT CAST(ROW(t.oid, t.evtenabled) AS pg_catalog.text)
                      FROM pg_catalog.pg_event_trigger t
                      WHERE t.evtevent OPERATOR(pg_catalog.=) 'login'
                      ORDER BY t.oid)
            ) AS pg_catalog.text) END
     FROM pg_catalog.pg_roles l, pg_catalog.pg_database d
     WHERE l.rolname OPERATOR(pg_catalog.=) session_user
     AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())"""
"""An SQL expression, text: the identity of session_user. NULL if the role has changed since login,
or if the server would visibly refuse a new login.

Planning takes about 0.3 ms, a prepared statement 0.02 ms. Evaluate it before any change of role."""


def check_query(at_login: bytes) -> bytes:
    """A query for the login's names that fails if a new login would have another identity."""
    return (
        b"SELECT session_user, pg_catalog.current_database(), CAST(CASE WHEN %b"
        b" OPERATOR(pg_catalog.=) %b THEN '0' ELSE 'the role or the database was changed' END"
        b" AS pg_catalog.int4)" % (IDENTITY, literal(at_login))
    )


# Everybody may read it unless that was revoked, and a forbidden function is an error even if it is
# never called; so the call is in a text, which is parsed only after the check.
SYSTEM_ID: Final = b"""
    COALESCE((SELECT s.word FROM pg_catalog.ts_stat('
        SELECT pg_catalog.array_to_tsvector(ARRAY[CAST(system_identifier AS pg_catalog.text)])
        FROM pg_catalog.pg_control_system()') s
     WHERE pg_catalog.has_function_privilege(CAST(pg_catalog.to_regprocedure(
        'pg_catalog.pg_control_system()') AS pg_catalog.oid), 'EXECUTE')), '')"""
"""An SQL expression, text: the system identifier, which only a database cluster and its standbys
share; empty if the current role may not read it."""

SYSTEM_ID_QUERY: Final = b"SELECT" + SYSTEM_ID


class StaleLoginError(Exception):
    """A new login would differ from the earlier one."""
