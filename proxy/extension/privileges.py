"""GRANT and REVOKE: the privilege helper functions.

Invariant: in a database with the extension's objects, a role may call the functions that it has
EXECUTE on, and granting is GRANT on each of them. Elsewhere the members of `EXECUTOR_ROLE` may call
them, and granting is membership. A helper does the same called directly or from inside the
database. It never fails: an error is undone and becomes a NOTICE, and the result is false.
"""

from __future__ import annotations

from typing import Final

from proxy.api.functions import Function
from proxy.extension import installed
from proxy.sql.text import EXECUTOR_ROLE, do_block, literal

_GRANT: Final = ("grant_pg_background_privileges", "pg_background_grant_privileges")
_REVOKE: Final = ("revoke_pg_background_privileges", "pg_background_revoke_privileges")
_DROP: Final = "pg_background_drop_executor_role"

HELPERS: Final = (*_GRANT, *_REVOKE, _DROP)
"""The functions for administrators: no role is granted EXECUTE on them."""


def body(function: Function) -> str:
    """The PL/pgSQL of one of the HELPERS in the extension's schema."""
    result = "RETURN true; "
    failed = "RETURN false; "
    if function.name == _DROP:
        return _block(_drop_role(), result, failed, "dropping role", f"'{EXECUTOR_ROLE}'")
    verb, doing = _words("GRANT" if function.name in _GRANT else "REVOKE")
    return _block(
        _change(verb, "COALESCE(print_commands, false)"), result, failed, doing, "role_name"
    )


def privileges_block(verb: str, role: bytes, marker: str, *, print_commands: bool) -> bytes:
    """What a helper does, as a statement for the caller's session.

    That it went well is said by an INFO message, the marker.

    Args:
        verb: GRANT or REVOKE.
        role: its name, in the client's encoding.
        marker: a random word.
        print_commands: whether each command is printed as INFO.
    """
    verb, doing = _words(verb)
    block = _block(
        _change(verb, str(print_commands).lower()),
        f"RAISE INFO '{marker}'; ",
        "",
        doing,
        "role_name",
        "role_name pg_catalog.text := @role@;",
    )
    return do_block(block.encode().replace(b"@role@", literal(role)))


def drop_role_block(marker: str) -> bytes:
    """Drops the role that the extension has made; says how it went as the others do."""
    block = _block(
        _drop_role(), f"RAISE INFO '{marker}'; ", "", "dropping role", f"'{EXECUTOR_ROLE}'"
    )
    return do_block(block.encode())


def _words(verb: str) -> tuple[str, str]:
    if verb == "GRANT":
        return verb, "granting pg_background privileges to"
    return verb, "revoking pg_background privileges from"


def _block(
    work: str, result: str, failed: str, doing: str, role: str, declarations: str = ""
) -> str:
    """Does the work, or says what went wrong with the role."""
    return (
        f"DECLARE {declarations} command pg_catalog.text; namespace pg_catalog.oid;"
        " owner pg_catalog.oid; BEGIN"
        f" SELECT p.pronamespace, p.proowner INTO namespace, owner {installed.FIND}; {work}{result}"
        "EXCEPTION WHEN OTHERS THEN"
        f" RAISE NOTICE 'Error {doing} %: %', {role}, SQLERRM; {failed}END;"
    )


def _change(verb: str, show: str) -> str:
    """GRANT or REVOKE what there is to role_name."""
    execute = f"EXECUTE command; IF {show} THEN RAISE INFO 'Executed command: %', command; END IF; "
    membership = _membership(verb, execute)
    preposition = "TO" if verb == "GRANT" else "FROM"
    return (
        f"IF namespace IS NULL THEN {membership}ELSE {_CHECK_OWNER}"
        f"FOR command IN {commands(verb, 'namespace')} LOOP "
        f"command := pg_catalog.format('%s {preposition} %I', command, role_name); {execute}"
        f"END LOOP; {membership if verb == 'REVOKE' else ''}END IF; "
    )


# GRANT by another only warns.
_CHECK_OWNER: Final = (
    "IF NOT pg_catalog.pg_has_role(owner, 'USAGE') THEN RAISE insufficient_privilege USING"
    f" MESSAGE = 'must be owner of extension {installed.NAME}'; END IF; "
)


def _membership(verb: str, execute: str) -> str:
    if verb == "REVOKE":
        # It may have been granted before the extension was there.
        is_member = (
            "namespace IS NULL OR EXISTS(SELECT 1 FROM pg_catalog.pg_auth_members m,"
            " pg_catalog.pg_roles r, pg_catalog.pg_roles g WHERE m.member OPERATOR(pg_catalog.=)"
            " r.oid AND m.roleid OPERATOR(pg_catalog.=) g.oid AND g.rolname"
            f" OPERATOR(pg_catalog.=) '{EXECUTOR_ROLE}' AND r.rolname OPERATOR(pg_catalog.=)"
            " role_name)"
        )
        return (
            f"IF {is_member} THEN"
            f" command := pg_catalog.format('REVOKE {EXECUTOR_ROLE} FROM %I', role_name); {execute}"
            "END IF; "
        )
    return (
        "IF NOT EXISTS(SELECT 1 FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=)"
        f" '{EXECUTOR_ROLE}') THEN command := 'CREATE ROLE {EXECUTOR_ROLE} NOLOGIN'; {execute}"
        f"END IF; command := pg_catalog.format('GRANT {EXECUTOR_ROLE} TO %I', role_name); {execute}"
    )


def commands(verb: str, namespace: str) -> str:
    """A query for the commands that GRANT or REVOKE what may be called, up to TO or FROM.

    Args:
        verb: GRANT or REVOKE.
        namespace: an SQL expression, the OID of the extension's schema.
    """
    names = ",".join(HELPERS)
    all_but_helpers = (
        f" AND p.proname OPERATOR(pg_catalog.<>) ALL (CAST('{{{names}}}' AS pg_catalog.name[]))"
    )
    return (
        f"SELECT pg_catalog.format('{verb} EXECUTE ON FUNCTION %s',"
        f" CAST(p.oid AS pg_catalog.regprocedure)) {installed.functions(namespace)}"
        f" AND NOT {installed.IS_HELPER}{all_but_helpers}"
        f" UNION ALL SELECT pg_catalog.format('{verb} USAGE ON TYPE %s',"
        f" CAST(c.reltype AS pg_catalog.regtype)) {installed.types(namespace)}"
        f" UNION ALL SELECT pg_catalog.format('{verb} SELECT ON %s',"
        f" CAST(c.oid AS pg_catalog.regclass)) {installed.views(namespace)}"
    )


def _drop_role() -> str:
    return (
        f"IF namespace IS NOT NULL THEN FOR command IN {commands('REVOKE', 'namespace')} LOOP"
        f" EXECUTE pg_catalog.concat(command, ' FROM {EXECUTOR_ROLE}'); END LOOP; END IF;"
        f" EXECUTE 'DROP ROLE {EXECUTOR_ROLE}'; "
    )
