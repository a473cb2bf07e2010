"""The privilege helper functions, which GRANT and REVOKE.

Invariant: with the extension's objects, a role may call the functions on which it has EXECUTE, and
granting means GRANT on each. Without them, members of `EXECUTOR_ROLE` may call the functions, and
granting means membership. A helper does the same called directly or from inside the database. It
never fails: an error is rolled back and becomes a NOTICE, and the result is false.
"""

from __future__ import annotations

from typing import Final

from proxy.api.functions import Function
from proxy.extension import installed
from proxy.extension.texts import sql
from proxy.sql.text import EXECUTOR_ROLE, do_block, literal

_GRANT: Final = ("grant_pg_background_privileges", "pg_background_grant_privileges")
_REVOKE: Final = ("revoke_pg_background_privileges", "pg_background_revoke_privileges")
_DROP: Final = "pg_background_drop_executor_role"

_DOING: Final = {
    "GRANT": "granting pg_background privileges to",
    "REVOKE": "revoking pg_background privileges from",
}

HELPERS: Final = (*_GRANT, *_REVOKE, _DROP)
"""Functions for administrators, on which no role is granted EXECUTE."""


def body(function: Function) -> str:
    """The PL/pgSQL of one of the HELPERS in the extension's schema."""
    words = {"declarations": "", "result": "RETURN true;", "failed": "RETURN false;"}
    if function.name == _DROP:
        return _drop_role(**words)
    verb = "GRANT" if function.name in _GRANT else "REVOKE"
    return _change(verb, "COALESCE(print_commands, false)", **words)


def privileges_block(verb: str, role: bytes, marker: str, *, print_commands: bool) -> bytes:
    """What a helper does, as a statement for the caller's session; on success it raises `marker`.

    Args:
        verb: GRANT or REVOKE.
        role: its name, in the client's encoding.
        marker: a random word.
        print_commands: whether to print each command as INFO.
    """
    block = _change(
        verb,
        str(print_commands).lower(),
        declarations="role_name pg_catalog.text := @role@;",
        result=f"RAISE INFO '{marker}';",
        failed="",
    )
    return do_block(block.encode().replace(b"@role@", literal(role)))


def drop_role_block(marker: str) -> bytes:
    """Drops the role that the extension has made; raises the marker on success."""
    block = _drop_role(declarations="", result=f"RAISE INFO '{marker}';", failed="")
    return do_block(block.encode())


def _change(verb: str, show: str, **words: str) -> str:
    """GRANT or REVOKE everything for role_name. ``show``: an SQL condition for printing each
    command as INFO. ``words``: placeholders of privileges.sql."""
    return sql(
        "privileges",
        find=installed.FIND,
        work=sql(
            verb.lower(),
            commands=commands(verb, "namespace"),
            executor=EXECUTOR_ROLE,
            execute=f"EXECUTE command; IF {show} THEN RAISE INFO 'Executed command: %', command;"
            " END IF;",
        ),
        doing=_DOING[verb],
        role="role_name",
        **words,
    )


def _drop_role(**words: str) -> str:
    return sql(
        "privileges",
        find=installed.FIND,
        work=f"IF namespace IS NOT NULL THEN FOR command IN {commands('REVOKE', 'namespace')} LOOP"
        f" EXECUTE pg_catalog.concat(command, ' FROM {EXECUTOR_ROLE}'); END LOOP; END IF;"
        f" EXECUTE 'DROP ROLE {EXECUTOR_ROLE}';",
        doing="dropping role",
        role=f"'{EXECUTOR_ROLE}'",
        **words,
    )


def commands(verb: str, namespace: str) -> str:
    """A query for the GRANT or REVOKE commands for all that may be called, up to TO or FROM.

    Args:
        verb: GRANT or REVOKE.
        namespace: an SQL expression, the OID of the extension's schema.
    """
    return sql(
        "privilege_commands",
        verb=verb,
        functions=installed.functions(namespace),
        is_helper=installed.IS_HELPER,
        for_administrators=",".join(HELPERS),
        types=installed.types(namespace),
        views=installed.views(namespace),
    )
