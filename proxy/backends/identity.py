"""Which role a login is, and whether the server would still accept it.

Invariant: a backend that logged in earlier is used only while a new login would give the same.
PostgreSQL decides some things only at login: which role it is (by OID, whatever the name means by
now), whether the role may log in, its ALTER ROLE … SET, what event triggers on login do, and up to
15 whether it is a superuser.
`IDENTITY` is all of that, as far as every role can see it. So its values at the login and now tell
whether the login still holds. It does not show a new password, nor pg_hba.conf.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from proxy.backends.route import Route
from proxy.sql.text import literal


class Login(NamedTuple):
    """Who logs in where."""

    route: Route
    database: bytes
    user: bytes

    def is_of(self, user: bytes | None, database: bytes | None) -> bool:
        """Whether these are its names. Others than ASCII are not told apart: the two may come in
        different encodings."""
        pairs = ((self.user, user), (self.database, database))
        return all(ours == theirs or not ours.isascii() for ours, theirs in pairs)


# A role is found by its name, because session_user is one, and an error once the role is gone.
# The first condition is for what changes between the login and the first look: `is_superuser` is
# what the server decided at login, unless ALTER ROLE … SET role had a say.
# The expiry is compared with the clock, not with now(), which is when the transaction began.
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
                ARRAY(SELECT CAST(s.setconfig AS pg_catalog.text)
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
"""An SQL expression, text: the identity of session_user. NULL if it is not the login's any more,
or if the server would refuse a new login for a reason that can be seen.

Planning it takes about 0.3 ms, a plan that exists 0.02 ms: who asks often prepares it. In each
backend it is to be asked before its role is changed."""


def check_query(at_login: bytes) -> bytes:
    """A query that fails if a new login would not give this identity. Its row has the names that it
    is about."""
    return (
        b"SELECT session_user, pg_catalog.current_database(), CAST(CASE WHEN %b"
        b" OPERATOR(pg_catalog.=) %b THEN '0' ELSE 'the role or the database was changed' END"
        b" AS pg_catalog.int4)" % (IDENTITY, literal(at_login))
    )


# Everybody may read it unless that was revoked, and a function that one may not call is an error
# though it is never called. So the call is in a text that is not looked at before the condition is.
SYSTEM_ID: Final = b"""
    COALESCE((SELECT s.word FROM pg_catalog.ts_stat('
        SELECT pg_catalog.array_to_tsvector(ARRAY[CAST(system_identifier AS pg_catalog.text)])
        FROM pg_catalog.pg_control_system()') s
     WHERE pg_catalog.has_function_privilege(CAST(pg_catalog.to_regprocedure(
        'pg_catalog.pg_control_system()') AS pg_catalog.oid), 'EXECUTE')), '')"""
"""An SQL expression, text: the system identifier, which a database cluster has in common with its
standbys and with no other; empty if the current role may not know it."""

SYSTEM_ID_QUERY: Final = b"SELECT" + SYSTEM_ID


class StaleLoginError(Exception):
    """A new login would give something else."""
