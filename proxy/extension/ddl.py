"""CREATE EXTENSION pg_background and the other commands for it: the blocks that carry them out.

Invariant: the objects are ordinary ones, so rollbacks, privileges, dependencies and dumps are the
server's own. Each command is one DO block, in the client's transaction, whose errors and notices
are in the words of the server's own command. In which schema is decided when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from proxy.api.functions import DECLARED
from proxy.extension import installed, privileges
from proxy.extension.installed import MARKER, RENAMED, TAG, VERSIONS, api_version, is_trusted
from proxy.extension.objects import OWN, RESTORED, script, signature, types
from proxy.sql.text import EXECUTOR_ROLE, do_block, literal

DEFAULT_VERSIONS: Final = {1: "1.10", 2: "2.0"}
"""By api_version."""

_COMMENT: Final = "Run SQL queries in the background"


@dataclass(frozen=True, slots=True)
class CreateExtension:
    """CREATE EXTENSION; names are as in the catalogs, None where the command has none."""

    if_not_exists: bool
    schema: bytes | None
    version: str | None

    tag = b"CREATE EXTENSION"


@dataclass(frozen=True, slots=True)
class DropExtension:
    """DROP EXTENSION; ``others`` is the command for the other extensions that it names."""

    if_exists: bool
    cascade: bool
    others: bytes | None

    tag = b"DROP EXTENSION"


@dataclass(frozen=True, slots=True)
class UpdateExtension:
    """ALTER EXTENSION … UPDATE."""

    version: str | None

    tag = b"ALTER EXTENSION"


@dataclass(frozen=True, slots=True)
class MoveExtension:
    """ALTER EXTENSION … SET SCHEMA."""

    schema: bytes

    tag = b"ALTER EXTENSION"


@dataclass(frozen=True, slots=True)
class CommentOnExtension:
    """COMMENT ON EXTENSION; the text as it stands there, a string constant or NULL."""

    text: bytes

    tag = b"COMMENT"


Command: TypeAlias = (
    CreateExtension | DropExtension | UpdateExtension | MoveExtension | CommentOnExtension
)


def block(command: Command, sql: bytes, *, api: int, server_version: int) -> bytes:
    """The DO statement that does what a command says. If the database has the C extension and not
    ours, that is meant by all but CREATE EXTENSION.

    Args:
        command: the command, as parsed.
        sql: its text.
        api: the version of the API whose extension is made if the command names no version.
        server_version: as server_version_num, e.g. 150004.
    """
    scripts = {version: script(version, server_version) for version in (1, 2)}
    match command:
        case CreateExtension():
            body = _create(command, api, scripts)
        case DropExtension():
            body = _drop(command)
        case UpdateExtension():
            body = _update(command, api, scripts)
        case MoveExtension():
            body = _move(command, scripts)
        case CommentOnExtension():
            body = _comment(command)
    read_only = _raise(
        "read_only_sql_transaction",
        f"cannot execute {command.tag.decode()} in a read-only transaction",
    )
    declarations = (
        "DECLARE marker pg_catalog.oid; namespace pg_catalog.oid; owner pg_catalog.oid;"
        " schema_name pg_catalog.text; version pg_catalog.text; installed_version pg_catalog.text;"
        " script pg_catalog.text; item pg_catalog.text; items pg_catalog.text[];"
        " detail pg_catalog.text; checked pg_catalog.text; granted pg_catalog.text[]; "
    )
    find = (
        "SELECT p.oid, p.pronamespace, p.proowner, n.nspname,"
        f" {installed.VERSION} INTO marker, namespace, owner, schema_name, installed_version"
        f" FROM (SELECT p.* {installed.FIND}) p, pg_catalog.pg_namespace n"
        " WHERE n.oid OPERATOR(pg_catalog.=) p.pronamespace; "
    )
    theirs = b""
    if not isinstance(command, CreateExtension):
        theirs = b"IF marker IS NULL AND %b THEN EXECUTE %b; RETURN; END IF; " % (
            installed.REALLY.encode(),
            literal(sql),
        )
    return do_block(
        f"{declarations}BEGIN IF CAST(pg_catalog.current_setting('transaction_read_only')"
        f" AS pg_catalog.bool) THEN {read_only}END IF; {find}".encode()
        + theirs
        + body
        + b"END"
    )


def _raise(condition: str, message: str, *arguments: str, hint: str = "", detail: str = "") -> str:
    """RAISE; the message is a format() for the arguments, if there are any."""
    text = _string(message)
    if arguments:
        text = f"pg_catalog.format({text}, {', '.join(arguments)})"
    using = f"MESSAGE = {text}"
    using += f", DETAIL = {detail}" if detail else ""
    using += f", HINT = {_string(hint)}" if hint else ""
    return f"RAISE {condition} USING {using}; "


def _string(text: str) -> str:
    return literal(text.encode()).decode()


_IS_MINE: Final = (
    "IF NOT pg_catalog.pg_has_role(owner, 'USAGE') THEN "
    + _raise("insufficient_privilege", f"must be owner of extension {installed.NAME}")
    + "END IF; "
)
_MISSING: Final = _raise("undefined_object", f'extension "{installed.NAME}" does not exist')
_MUST_EXIST: Final = f"IF marker IS NULL THEN {_MISSING}END IF; {_IS_MINE}"


def _create(command: CreateExtension, api: int, scripts: dict[int, str]) -> bytes:
    version = command.version or DEFAULT_VERSIONS[api]
    exists = f'extension "{installed.NAME}" already exists'
    if command.if_not_exists:
        skip = "RAISE NOTICE USING ERRCODE = 'duplicate_object',"
        skip += f" MESSAGE = '{exists}, skipping'; RETURN; "
    else:
        skip = _raise("duplicate_object", exists)
    body = f"IF marker IS NOT NULL OR {installed.REALLY} THEN {skip}END IF; "
    if version not in VERSIONS:
        body += _raise(
            "invalid_parameter_value",
            f'extension "{installed.NAME}" has no installation script nor update path for version'
            f' "{version}"',
        )
        return body.encode()
    body += f"version := '{version}'; "
    start = body.encode()
    body = ""
    if command.schema is None:
        start += b"schema_name := pg_catalog.current_schema(); "
        body += (
            "IF schema_name IS NULL THEN "
            + _raise("invalid_schema_name", "no schema has been selected to create in")
            + "END IF; "
        )
    else:
        start += b"schema_name := " + literal(command.schema) + b"; "
    may_create = (
        "pg_catalog.has_database_privilege(CAST(pg_catalog.current_database()"
        " AS pg_catalog.text), 'CREATE')"
    )
    body += (
        _FIND_SCHEMA
        + f"IF NOT {may_create} THEN "
        + _raise(
            "insufficient_privilege",
            f'permission denied to create extension "{installed.NAME}"',
            hint="Must have CREATE privilege on current database to create this extension.",
        )
        + "END IF; "
        + _CHECK_SCHEMA_OWNER
        + _WARN_OF_OWNER
        + _types_loop(api_version(version), replace=False)
        + _install({api_version(version): scripts[api_version(version)]})
        + _execute(f"COMMENT ON FUNCTION {OWN}.{MARKER}() IS {_string(_COMMENT)}")
    )
    return start + body.encode()


_FIND_SCHEMA: Final = (
    "SELECT n.oid INTO namespace FROM pg_catalog.pg_namespace n"
    " WHERE n.nspname OPERATOR(pg_catalog.=) CAST(schema_name AS pg_catalog.name);"
    " IF namespace IS NULL THEN "
    + _raise("invalid_schema_name", 'schema "%s" does not exist', "schema_name")
    + "END IF; IF pg_catalog.strpos(schema_name, '$body$') OPERATOR(pg_catalog.>) 0 THEN "
    + _raise(
        "invalid_schema_name",
        f'invalid character in extension "{installed.NAME}" schema: must not contain "$body$"',
    )
    + "END IF; "
)


# Who owns the schema may drop and replace what is in there, and so speak for the extension.
_CHECK_SCHEMA_OWNER: Final = (
    "IF EXISTS(SELECT 1 FROM pg_catalog.pg_namespace n"
    f" WHERE n.oid OPERATOR(pg_catalog.=) namespace AND NOT ({is_trusted('n.nspowner')}"
    " OR pg_catalog.pg_get_userbyid(n.nspowner) OPERATOR(pg_catalog.=) current_user)) THEN "
    + _raise(
        "insufficient_privilege",
        'schema "%s" belongs to a role that could replace the functions of extension'
        f' "{installed.NAME}"',
        "schema_name",
        hint="Create the extension in a schema of your own, of a superuser or of the owner of the"
        " database.",
    )
    + "END IF; "
)

_WARN_OF_OWNER: Final = (
    "IF NOT EXISTS(SELECT 1 FROM pg_catalog.pg_roles o WHERE o.rolname OPERATOR(pg_catalog.=)"
    " current_user AND (o.rolsuper OR o.oid OPERATOR(pg_catalog.=) (SELECT d.datdba"
    " FROM pg_catalog.pg_database d WHERE d.datname OPERATOR(pg_catalog.=)"
    " pg_catalog.current_database()))) THEN RAISE WARNING USING MESSAGE ="
    f' pg_catalog.format(\'extension "{installed.NAME}" will be found only in sessions of role'
    " \"%s\"', current_user), HINT = 'Let a superuser or the owner of the database create it for"
    " all.'; END IF; "
)


def _in_schema(text: str) -> str:
    """An expression for a text with the schema's name in it."""
    return f"pg_catalog.replace({text}, {_string(OWN)}, pg_catalog.quote_ident(schema_name))"


_QUOTE: Final = "$pg_background_script$"


def _quoted(script: str) -> str:
    assert _QUOTE not in script
    return _QUOTE + script + _QUOTE


def _execute(command: str) -> str:
    return f"EXECUTE {_in_schema(_quoted(command))}; "


def _types_loop(api: int, *, replace: bool) -> str:
    """Creates the types; `replace`: those that are not there."""
    commands: list[str] = []
    for name, definition in types(api):
        create = _execute(definition)
        if replace:
            there = (
                "EXISTS(SELECT 1 FROM pg_catalog.pg_type t WHERE t.typnamespace"
                " OPERATOR(pg_catalog.=) namespace AND t.typname OPERATOR(pg_catalog.=)"
                f" '{name}')"
            )
            create = f"IF NOT {there} THEN {create}END IF; "
        commands.append(create)
    return "".join(commands)


def _install(scripts: dict[int, str]) -> str:
    """Creates or replaces all but the types in the schema ``schema_name``, whose OID is
    ``namespace``, for the ``version``; ``granted`` are roles that may call the functions, as GRANT
    takes them."""
    chosen = "".join(
        f"IF pg_catalog.left(version, 2) OPERATOR(pg_catalog.{'=' if api == 1 else '<>'}) '1.'"
        f" THEN script := {_quoted(script)}; END IF; "
        for api, script in scripts.items()
    )
    marker = (
        f"CREATE OR REPLACE FUNCTION {OWN}.{MARKER}() RETURNS pg_catalog.text LANGUAGE sql"
        f" AS $body$SELECT CAST('<version>' AS pg_catalog.text) {TAG}$body$"
    )
    public = " UNION ALL ".join(
        (
            "SELECT pg_catalog.format('REVOKE ALL ON FUNCTION %s FROM PUBLIC',"
            f" CAST(p.oid AS pg_catalog.regprocedure)) {installed.functions('namespace')}"
            f" AND NOT {installed.IS_HELPER}",
            "SELECT pg_catalog.format('REVOKE ALL ON TYPE %s FROM PUBLIC',"
            f" CAST(c.reltype AS pg_catalog.regtype)) {installed.types('namespace')}",
        )
    )
    return (
        chosen + "checked := pg_catalog.set_config('check_function_bodies',"
        " pg_catalog.current_setting('check_function_bodies'), true);"
        " PERFORM pg_catalog.set_config('check_function_bodies', 'off', true); "
        + f"EXECUTE {_in_schema('script')}; "
        + f"script := pg_catalog.replace({_quoted(marker)}, '<version>', version); "
        + f"EXECUTE {_in_schema('script')}; "
        + "PERFORM pg_catalog.set_config('check_function_bodies', checked, true); "
        + f"FOR item IN {public} LOOP EXECUTE item; END LOOP; "
        + _ROLE
        + f"IF EXISTS(SELECT 1 FROM pg_catalog.pg_roles r WHERE {_IS_ROLE}) THEN"
        f" granted := pg_catalog.array_append(granted, '{EXECUTOR_ROLE}'); END IF; "
        + "IF granted IS NOT NULL THEN "
        + f"FOR item IN {privileges.commands('GRANT', 'namespace')} LOOP"
        " EXECUTE pg_catalog.concat(item, ' TO ', pg_catalog.array_to_string(granted, ', '));"
        " END LOOP; END IF; "
        # CREATE OR REPLACE leaves an object with the role that created it.
         + f"IF EXISTS(SELECT 1 {installed.functions('namespace')}"
        f" AND p.proowner OPERATOR(pg_catalog.<>) {_OWNER})"
        f" OR EXISTS(SELECT 1 {installed.views('namespace')}"
        f" AND c.relowner OPERATOR(pg_catalog.<>) {_OWNER}) THEN "
        + _raise(
            "duplicate_object",
            "an object of the extension's name belongs to another role",
            hint="Drop it, or create the extension in another schema.",
        )
        + "END IF; "
    )


_OWNER: Final = (
    "COALESCE(owner, (SELECT o.oid FROM pg_catalog.pg_roles o"
    " WHERE o.rolname OPERATOR(pg_catalog.=) current_user))"
)


_IS_ROLE: Final = f"r.rolname OPERATOR(pg_catalog.=) '{EXECUTOR_ROLE}'"

# Two databases at once: the second waits for the first, and then the role is there.
_ROLE: Final = (
    f"IF NOT EXISTS(SELECT 1 FROM pg_catalog.pg_roles r WHERE {_IS_ROLE}) THEN"
    f" BEGIN EXECUTE 'CREATE ROLE {EXECUTOR_ROLE} NOLOGIN';"
    " EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;"
    " WHEN insufficient_privilege THEN RAISE WARNING USING"
    f" MESSAGE = 'role \"{EXECUTOR_ROLE}\" could not be created', DETAIL = SQLERRM,"
    " HINT = 'Others need EXECUTE on the functions, as grant_pg_background_privileges(role) gives"
    " it. When a role with CREATEROLE has created the role, ALTER EXTENSION pg_background UPDATE"
    " grants to it.'; END; END IF; "
)


def _drop(command: DropExtension) -> bytes:
    absent = _MISSING.encode()
    if command.if_exists:
        absent = (
            b"RAISE NOTICE USING MESSAGE = 'extension \"pg_background\" does not exist, skipping'; "
        )
    others = b"" if command.others is None else b"EXECUTE " + literal(command.others) + b"; "
    behavior = "CASCADE" if command.cascade else "RESTRICT"
    drops = "".join(
        f"SELECT pg_catalog.string_agg({name}, ', ') INTO item {source};"
        f" IF item IS NOT NULL THEN EXECUTE pg_catalog.concat('DROP {kind} ', item, ' {behavior}');"
        " END IF; "
        for kind, name, source in (
            ("VIEW", _AS_VIEW, installed.views("namespace")),
            ("FUNCTION", _AS_FUNCTION, installed.functions("namespace")),
            ("TYPE", _AS_TYPE, installed.types("namespace")),
        )
    )
    failed = _raise(
        "dependent_objects_still_exist",
        f"cannot drop extension {installed.NAME} because other objects depend on it",
        detail="detail",
        hint="Use DROP ... CASCADE to drop the dependent objects too.",
    )
    return (
        b"IF marker IS NULL THEN "
        + absent
        + b"ELSE "
        + f"{_IS_MINE}BEGIN {_DROP_HELPERS}{drops}EXCEPTION WHEN dependent_objects_still_exist THEN"
        f" GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL; {failed}END; END IF; ".encode()
        + others
    )


_AS_FUNCTION: Final = "CAST(CAST(p.oid AS pg_catalog.regprocedure) AS pg_catalog.text)"
_AS_TYPE: Final = "CAST(CAST(c.reltype AS pg_catalog.regtype) AS pg_catalog.text)"
_AS_VIEW: Final = "CAST(CAST(c.oid AS pg_catalog.regclass) AS pg_catalog.text)"

_GRANTED: Final = (
    "SELECT pg_catalog.array_agg(DISTINCT CASE WHEN x.grantee OPERATOR(pg_catalog.=) 0"
    " THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END) INTO granted"
    " FROM pg_catalog.pg_proc p CROSS JOIN pg_catalog.aclexplode(p.proacl) x"
    " LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) x.grantee"
    " WHERE p.pronamespace OPERATOR(pg_catalog.=) namespace"
    " AND p.proname OPERATOR(pg_catalog.=) 'pg_background_launch_v2'"
    " AND x.grantee OPERATOR(pg_catalog.<>) owner; "
)
# The bodies are replaced, and do not depend on the helpers as the server sees it.
_DROP_HELPERS: Final = (
    "items := ARRAY[pg_catalog.current_setting('client_min_messages')];"
    " PERFORM pg_catalog.set_config('client_min_messages', 'warning', true); "
    + _execute(f"DROP DOMAIN IF EXISTS {RESTORED} CASCADE")
    + "PERFORM pg_catalog.set_config('client_min_messages', items[1], true); "
    f"FOR item IN SELECT {_AS_FUNCTION} {installed.functions('namespace')}"
    f" AND p.proname OPERATOR(pg_catalog.<>) '{MARKER}' AND {installed.IS_HELPER}"
    " LOOP EXECUTE pg_catalog.concat('DROP FUNCTION ', item); END LOOP; "
)


def _update(command: UpdateExtension, api: int, scripts: dict[int, str]) -> bytes:
    version = command.version or DEFAULT_VERSIONS[api]
    numbers = "CAST(pg_catalog.string_to_array({}, '.') AS pg_catalog.int4[])".format
    is_older = f"{numbers('version')} OPERATOR(pg_catalog.<) {numbers('installed_version')}"
    body = _MUST_EXIST + f"version := {_string(version)}; "
    if command.version is None:
        body += f"IF {is_older} THEN version := installed_version; END IF; "
    no_path = _raise(
        "invalid_parameter_value",
        f'extension "{installed.NAME}" has no update path from version "%s" to version "%s"',
        "installed_version",
        "version",
    )
    if version not in VERSIONS:
        return (body + no_path).encode()
    already = (
        'RAISE NOTICE USING MESSAGE = pg_catalog.format(\'version "%s" of extension'
        f' "{installed.NAME}" is already installed\', version); '
    )
    body += (
        f"IF {is_older} THEN {no_path}END IF;"
        f" IF version OPERATOR(pg_catalog.=) installed_version THEN {already}END IF; "
        + _GRANTED
        + "IF pg_catalog.left(version, 2) OPERATOR(pg_catalog.<>) '1.'"
        " AND pg_catalog.left(installed_version, 2) OPERATOR(pg_catalog.=) '1.' THEN "
        + _to_second_api()
        + "END IF; "
        + "IF pg_catalog.left(version, 2) OPERATOR(pg_catalog.=) '1.' THEN "
        + _types_loop(1, replace=True)
        + "ELSE "
        + _types_loop(2, replace=True)
        + "END IF; "
        + _DROP_HELPERS
        + _install(scripts)
    )
    return body.encode()


def _to_second_api() -> str:
    """Drops what returns something else there, and gives the types their names."""
    commands = [
        f"DROP FUNCTION IF EXISTS {signature(function)}"
        for function in DECLARED
        if function.api == 1
    ]
    commands += [
        f"ALTER TYPE {OWN}.{old} RENAME TO {new}"
        for old, new in RENAMED.values()
        if not old.endswith("_2")
    ]
    commands += [
        f"ALTER TYPE {OWN}.{old} RENAME TO {new}"
        for old, new in RENAMED.values()
        if old.endswith("_2")
    ]
    return _execute(";\n".join(commands))


def _move(command: MoveExtension, scripts: dict[int, str]) -> bytes:
    moves = " UNION ALL ".join(
        f"SELECT pg_catalog.format('ALTER {kind} %s SET SCHEMA %I', {name}, schema_name) {source}"
        for kind, name, source in (
            ("FUNCTION", _AS_FUNCTION, installed.functions("old_namespace")),
            ("TYPE", _AS_TYPE, installed.types("old_namespace")),
            ("VIEW", _AS_VIEW, installed.views("old_namespace")),
        )
    )
    new_name = literal(command.schema)
    return (
        f"DECLARE old_namespace pg_catalog.oid := namespace; BEGIN {_MUST_EXIST}"
        "IF schema_name OPERATOR(pg_catalog.=) ".encode()
        + new_name
        + f" THEN RETURN; END IF; {_DROP_HELPERS}version := installed_version;"
        " schema_name := ".encode()
        + new_name
        + b"; "
        + (
            _FIND_SCHEMA
            + _CHECK_SCHEMA_OWNER
            # A loop would see what has moved, as the search path finds it.
            + f"SELECT pg_catalog.array_agg(s.command) INTO items FROM ({moves}) s(command);"
            " FOREACH item IN ARRAY items LOOP EXECUTE item; END LOOP; "
            + _GRANTED
            + _install(scripts)
            + "END; "
        ).encode()
    )


def _comment(command: CommentOnExtension) -> bytes:
    return (
        _MUST_EXIST.encode()
        + b"EXECUTE pg_catalog.format('COMMENT ON FUNCTION %I."
        + MARKER.encode()
        + b"() IS %L', schema_name, "
        + command.text
        + b"); "
    )
