"""Carries out CREATE EXTENSION pg_background and the other commands about it, as DO blocks.

Invariant: the objects are ordinary ones, so rollbacks, privileges, dependencies and dumps are the
server's. Each command is one DO block in the client's transaction, with the errors and notices of
the server's own command. The schema is decided when the block runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from proxy.api.functions import DECLARED
from proxy.extension import history, installed, privileges
from proxy.extension.installed import MARKER, RENAMED, TAG, VERSIONS, api_version, is_trusted
from proxy.extension.objects import OWN, RESTORED, script, signature, types
from proxy.extension.texts import sql
from proxy.sql.text import EXECUTOR_ROLE, do_block, literal

DEFAULT_VERSIONS: Final = {1: "1.10", 2: "2.0"}
"""By api_version."""

_COMMENT: Final = "Run SQL queries in the background"


@dataclass(frozen=True, slots=True)
class CreateExtension:
    """CREATE EXTENSION. Names are as in the catalogs; None if omitted."""

    if_not_exists: bool
    schema: bytes | None
    version: str | None

    tag = b"CREATE EXTENSION"


@dataclass(frozen=True, slots=True)
class DropExtension:
    """DROP EXTENSION. ``others`` is the command for other extensions that it names."""

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
    """COMMENT ON EXTENSION. The text is as written: a string constant or NULL."""

    text: bytes

    tag = b"COMMENT"


Command: TypeAlias = (
    CreateExtension | DropExtension | UpdateExtension | MoveExtension | CommentOnExtension
)


def block(command: Command, text: bytes, *, api: int, server_version: int) -> bytes:
    """The DO statement that carries out a command. If the database has the C extension and not
    ours, all commands but CREATE EXTENSION apply to that.

    Args:
        command: the command, as parsed.
        text: as the client sent it.
        api: the version of the API for a command that names no extension version.
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
    if not isinstance(command, CreateExtension):
        theirs = f"IF marker IS NULL AND {installed.REALLY} THEN EXECUTE {_constant(text)}; RETURN;"
        body = f"{theirs} END IF;\n{body}"
    block = sql("extension_command", **_WORDS, tag=command.tag.decode(), body=body)
    return do_block(block.encode("utf-8", "surrogateescape"))


def _decode(text: bytes) -> str:
    """Text in any client encoding, decoded so that encoding it returns the same bytes."""
    return text.decode("utf-8", "surrogateescape")


def _constant(text: bytes | str) -> str:
    return _decode(literal(text if isinstance(text, bytes) else text.encode()))


_QUOTE: Final = "$pg_background_script$"


def _quoted(script: str) -> str:
    assert _QUOTE not in script
    return _QUOTE + script + _QUOTE


def _in_schema(text: str) -> str:
    """An expression for a text that contains the schema's name."""
    return f"pg_catalog.replace({text}, {_constant(OWN)}, pg_catalog.quote_ident(schema_name))"


def _execute(command: str) -> str:
    return f"EXECUTE {_in_schema(_quoted(command))}; "


_CREATE_MARKER: Final = (
    f"CREATE OR REPLACE FUNCTION {OWN}.{MARKER}() RETURNS pg_catalog.text LANGUAGE sql"
    f" AS $body$SELECT CAST('<version>' AS pg_catalog.text) {TAG}$body$"
)
_WORDS: Final = {
    "installed_version": installed.VERSION,
    "find": installed.FIND,
    "functions": installed.functions("namespace"),
    "types": installed.types("namespace"),
    "views": installed.views("namespace"),
    "tables": installed.tables("namespace"),
    "old_functions": installed.functions("old_namespace"),
    "old_types": installed.types("old_namespace"),
    "old_views": installed.views("old_namespace"),
    "old_tables": installed.tables("old_namespace"),
    "function_name": "CAST(CAST(p.oid AS pg_catalog.regprocedure) AS pg_catalog.text)",
    "type_name": "CAST(CAST(c.reltype AS pg_catalog.regtype) AS pg_catalog.text)",
    "view_name": "CAST(CAST(c.oid AS pg_catalog.regclass) AS pg_catalog.text)",
    "create_table": _execute(history.table(OWN)),
    "history": installed.HISTORY,
    "grant_history": _execute(f"GRANT SELECT ON {OWN}.{installed.HISTORY} TO PUBLIC"),
    "is_helper": installed.IS_HELPER,
    "is_trusted": is_trusted("n.nspowner"),
    "marker": MARKER,
    "executor": EXECUTOR_ROLE,
    "script": _in_schema("script"),
    "create_marker": _quoted(_CREATE_MARKER),
    "comment": _execute(f"COMMENT ON FUNCTION {OWN}.{MARKER}() IS '{_COMMENT}'"),
    "grants": privileges.commands("GRANT", "namespace"),
    "drop_restored": _execute(f"DROP DOMAIN IF EXISTS {RESTORED} CASCADE"),
}
"""Placeholders in the files of the commands, except those that a command's own function fills."""


def _create(command: CreateExtension, api: int, scripts: dict[int, str]) -> str:
    version = command.version or DEFAULT_VERSIONS[api]
    exists = 'MESSAGE = \'extension "pg_background" already exists'
    if command.if_not_exists:
        exists = f"NOTICE USING ERRCODE = 'duplicate_object', {exists}, skipping'; RETURN; "
    else:
        exists = f"duplicate_object USING {exists}'; "
    check = f"IF marker IS NOT NULL OR {installed.REALLY} THEN RAISE {exists}END IF;\n"
    if version not in VERSIONS:
        message = (
            'extension "pg_background" has no installation script nor update path for version'
            f' "{version}"'
        )
        return f"{check}RAISE invalid_parameter_value USING MESSAGE = {_constant(message)}; "
    if command.schema is not None:
        schema, check_selected = _constant(command.schema), ""
    else:
        schema, check_selected = "pg_catalog.current_schema()", sql("check_selected")
    api = api_version(version)
    return check + sql(
        "create_extension",
        **_WORDS,
        version=version,
        schema=schema,
        check_selected=check_selected,
        create_types="".join(_execute(definition) for _, definition in types(api)),
        choose_script=_choose_script({api: scripts[api]}),
    )


def _choose_script(scripts: dict[int, str]) -> str:
    return "".join(
        f"IF pg_catalog.left(version, 2) OPERATOR(pg_catalog.{'=' if api == 1 else '<>'}) '1.'"
        f" THEN script := {_quoted(script)}; END IF; "
        for api, script in scripts.items()
    )


def _drop(command: DropExtension) -> str:
    absent = 'MESSAGE = \'extension "pg_background" does not exist'
    if command.if_exists:
        absent = f"NOTICE USING {absent}, skipping';"
    else:
        absent = f"undefined_object USING {absent}';"
    return sql(
        "drop_extension",
        **_WORDS,
        absent=absent,
        mode="CASCADE" if command.cascade else "RESTRICT",
        others="" if command.others is None else f"EXECUTE {_constant(command.others)};",
    )


def _update(command: UpdateExtension, api: int, scripts: dict[int, str]) -> str:
    version = command.version or DEFAULT_VERSIONS[api]
    numbers = "CAST(pg_catalog.string_to_array({}, '.') AS pg_catalog.int4[])".format
    is_older = f"{numbers('version')} OPERATOR(pg_catalog.<) {numbers('installed_version')}"
    start = f"{sql('must_exist')}version := {_constant(version)}; "
    if command.version is None:
        start += f"IF {is_older} THEN version := installed_version; END IF; "
    no_path = (
        "RAISE invalid_parameter_value USING MESSAGE = pg_catalog.format('extension"
        ' "pg_background" has no update path from version "%s" to version "%s"\','
        " installed_version, version); "
    )
    if version not in VERSIONS:
        return start + no_path
    return start + sql(
        "update_extension",
        **_WORDS,
        is_older=is_older,
        no_path=no_path,
        to_second_api=_to_second_api(),
        types_1=_missing_types(1),
        types_2=_missing_types(2),
        choose_script=_choose_script(scripts),
    )


def _missing_types(api: int) -> str:
    return "".join(
        "IF NOT EXISTS(SELECT 1 FROM pg_catalog.pg_type t WHERE t.typnamespace"
        f" OPERATOR(pg_catalog.=) namespace AND t.typname OPERATOR(pg_catalog.=) '{name}')"
        f" THEN {_execute(definition)}END IF; "
        for name, definition in types(api)
    )


def _to_second_api() -> str:
    """Drops what has another result type in API 2, and renames the types."""
    drops = (f"DROP FUNCTION IF EXISTS {signature(each)}" for each in DECLARED if each.api == 1)
    # A name must be free before another type gets it.
    renamed = sorted(RENAMED.values(), key=lambda names: names[0].endswith("_2"))
    renames = (f"ALTER TYPE {OWN}.{old} RENAME TO {new}" for old, new in renamed)
    return _execute(";\n".join([*drops, *renames]))


def _move(command: MoveExtension, scripts: dict[int, str]) -> str:
    schema, choose_script = _constant(command.schema), _choose_script(scripts)
    return sql("move_extension", **_WORDS, schema=schema, choose_script=choose_script)


def _comment(command: CommentOnExtension) -> str:
    return (
        f"{sql('must_exist')}EXECUTE pg_catalog.format('COMMENT ON FUNCTION %I.{MARKER}() IS %L',"
        f" schema_name, {_decode(command.text)}); "
    )
