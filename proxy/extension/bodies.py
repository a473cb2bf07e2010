"""The SQL objects behind calls from inside the database: what the functions' bodies say.

Invariant: a body trusts nothing of the session that runs it. In what runs with the session's own
search_path all names are schema-qualified, operators too; the others set theirs. What a body and
the proxy say to each other is written down in `conversation`, its other half.

A role that was granted one function of the API must be able to run its body, so the helpers are for
PUBLIC. That grants nothing: the proxy believes only `_pg_background_say`, which says what the
current role is, and asks the server whether that may execute the function in question.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

from proxy.api.functions import (
    BOOL,
    FLOAT8,
    INT4,
    INT8,
    LIST,
    OID,
    RECORD,
    TEXT,
    TIMESTAMPTZ,
    VOID,
    Function,
    Needs,
)
from proxy.config.gucs import GUCS
from proxy.extension.conversation import identity

_TYPES: Final = {
    BOOL: "bool",
    INT4: "int4",
    INT8: "int8",
    FLOAT8: "float8",
    TEXT: "text",
    OID: "oid",
    TIMESTAMPTZ: "timestamptz",
}
"""By their short names, which can be schema-qualified."""


@dataclass(frozen=True, slots=True)
class Body:
    """What stands in CREATE FUNCTION behind the result type, STRICT and quoting apart.

    ``source`` may hold any quote; it has no ``$body$`` in it. All functions are VOLATILE and,
    from 9.6 on, PARALLEL UNSAFE (the defaults), and SECURITY INVOKER.
    """

    language: str
    source: str


def body(function: Function, *, schema: str, server_version: int) -> Body:
    """The body of a function.

    A function whose result is a record or a `LIST` is to be declared RETURNS SETOF record. Those of
    `privileges` have their bodies there.

    Args:
        function: one of the table.
        schema: of the extension, as it is (not quoted).
        server_version: as server_version_num, e.g. 150004.
    """
    own = quoted(schema)
    if function.name in ("pg_background_progress", "pg_background_report_progress"):
        return Body("plpgsql", _PROGRESS.replace("@", own))
    arguments = ", ".join(
        parameter.name if parameter.type == TEXT else f"CAST({parameter.name} AS pg_catalog.text)"
        for parameter in function.parameters
    )
    settings = "CAST(NULL AS pg_catalog.text[])"
    if Needs.SETTINGS in function.needs:
        settings = f"{own}._pg_background_settings()"
    call = (
        f"{own}._pg_background_call(CAST('{identity(function)}' AS pg_catalog.text),"
        f" CAST(ARRAY[{arguments}] AS pg_catalog.text[]), {settings})"
    )
    result = function.result_type
    if result == RECORD:
        source = _ROWS
    elif result == LIST:
        source = _LIST
    elif function.returns_set:
        source = _TABLE
    elif result.columns:
        source = _COMPOSITE
    elif result == VOID:
        source = _VOID
    else:
        source = _SCALAR
    for word, replacement in {
        "@call": call,
        "@fields": _columns(function, "answer[{}]", first=2),
        "@columns": _columns(function, "rows[i][{}]"),
        "@but_one": _columns(function, "rows[i][{}]", last=-1),
        "@": own,
    }.items():
        source = source.replace(word, replacement)
    return Body("plpgsql", source)


def _columns(function: Function, value: str, *, first: int = 1, last: int | None = None) -> str:
    """A select list that makes a composite result of texts."""
    return ", ".join(
        f"CAST({value.format(number)} AS pg_catalog.{_TYPES[column.type]})"
        for number, column in enumerate(function.columns[:last], first)
    )


def helpers(*, schema: str, server_version: int) -> list[str]:
    """The CREATE FUNCTION statements of what the bodies call, in order.

    The bodies are not checked against them, so it does not matter which are created first. PUBLIC
    keeps EXECUTE on them. Their names begin with ``_pg_background_``.
    """
    missing_ok = server_version >= 90600
    replacements = {
        "@lang": "sql" if missing_ok else "plpgsql",
        "@setting": _SETTING if missing_ok else _SETTING_9_5,
        "@own": ", ".join(
            f"{quoted(schema)}._pg_background_setting(CAST('{name}' AS text))" for name in GUCS
        ),
        "@random": (
            "replace(CAST(gen_random_uuid() AS text), '-', '')"
            if server_version >= 130000
            else "md5(concat(secret, clock_timestamp(), random()))"
        ),
        "@hash": (
            "encode(sha256(convert_to(text, 'UTF8')), 'hex')"
            if server_version >= 110000
            else "md5(text || 'a') || md5(text || 'b')"
        ),
        "@block": (
            "encode(sha256(convert_to(key || n, 'UTF8')), 'hex')"
            if server_version >= 110000
            else "md5(key || n || 'a') || md5(key || n || 'b')"
        ),
        "@fields": _raise_error(),
        "@": quoted(schema),
    }
    statements = []
    for statement in _HELPERS:
        for key, replacement in replacements.items():
            statement = statement.replace(key, replacement)
        statements.append(statement)
    return statements


def quoted(name: str) -> str:
    """An identifier as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


# In these texts @ stands for the extension's schema.

_SETTING: Final = "SELECT pg_catalog.current_setting(name, true)"

# There is no missing_ok yet.
_SETTING_9_5: Final = """
BEGIN
  RETURN pg_catalog.current_setting(name);
EXCEPTION WHEN undefined_object THEN
  RETURN NULL;
END
"""

# What the session has set. It runs with the session's own search_path, which is one of them.
_SETTINGS: Final = """
CREATE FUNCTION @._pg_background_settings() RETURNS pg_catalog.text[] LANGUAGE sql AS $body$
SELECT ARRAY(
  SELECT pg_catalog.unnest(ARRAY[s.name, s.setting])
  FROM pg_catalog.pg_settings s WHERE s.source OPERATOR(pg_catalog.=) 'session'
)
$body$"""

_HASH: Final = """
CREATE FUNCTION @._pg_background_hash(text pg_catalog.text) RETURNS pg_catalog.text LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $body$
SELECT @hash
$body$"""

_ELEMENTS: Final = """
CREATE FUNCTION @._pg_background_elements(text pg_catalog.text) RETURNS pg_catalog.text[]
LANGUAGE plpgsql SET array_nulls = on AS $body$
BEGIN
  RETURN CAST(text AS pg_catalog.text[]);
END
$body$"""

# The proxy accepts only messages that this function raises. The function adds the roles that its
# caller can run as: a role that may see all queries can read the word of a proof without being able
# to run as the channel's role.
_SAY: Final = """
CREATE FUNCTION @._pg_background_say() RETURNS pg_catalog.void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  message text := @._pg_background_setting(CAST('pg_background_proxy.message' AS text));
  roles oid[];
BEGIN
  IF split_part(message, ' ', 3) = 'proof' THEN
    roles := ARRAY(SELECT r.oid FROM pg_roles r WHERE r.rolname = current_user);
    BEGIN
      PERFORM set_config('role', 'none', true);
      roles := roles || ARRAY(SELECT r.oid FROM pg_roles r WHERE r.rolname = current_user);
      RESET SESSION AUTHORIZATION;
      roles := roles || ARRAY(SELECT r.oid FROM pg_roles r WHERE r.rolname = current_user);
      RAISE SQLSTATE 'PGBGW';
    EXCEPTION WHEN SQLSTATE 'PGBGW' OR insufficient_privilege THEN
      NULL;
    END;
    message := concat(message, ' ', array_to_string(roles, ','));
  END IF;
  RAISE INFO '%', message;
END
$body$"""

# Enciphers and deciphers: data, as hexadecimal digits, XOR a pad made of the key.
_XOR: Final = """
CREATE FUNCTION @._pg_background_xor(data pg_catalog.text, key pg_catalog.text)
RETURNS pg_catalog.text LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $body$
-- varbit_send() puts the length, of four bytes, before the bits.
SELECT substr(encode(varbit_send(CAST('x' || data AS varbit) # CAST('x' || left((
  SELECT string_agg(@block, '' ORDER BY n) FROM generate_series(0, (length(data) - 1) / 64) n
), length(data)) AS varbit)), 'hex'), 9)
$body$"""

# What a channel shows to its own login role: the query of a backend, if the calling code has the
# rights of the role that the backend has logged in as, or could have them by RESET ROLE and RESET
# SESSION AUTHORIZATION. It undoes what it sets. NULL otherwise.
_SEEN: Final = """
CREATE FUNCTION @._pg_background_seen(channel pg_catalog.int4, begins pg_catalog.text)
RETURNS pg_catalog.text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  login text;
  shown text;
BEGIN
  SELECT a.query, pg_get_userbyid(a.usesysid) INTO shown, login
    FROM pg_stat_get_activity(channel) a;
  IF left(shown, length(begins)) = begins THEN
    RETURN shown;
  END IF;
  BEGIN
    IF session_user <> login THEN
      PERFORM set_config('session_authorization', login, true);
    END IF;
    PERFORM set_config('role', 'none', true);
    SELECT a.query INTO shown FROM pg_stat_get_activity(channel) a;
    RAISE SQLSTATE 'PGBGW';
  EXCEPTION WHEN SQLSTATE 'PGBGW' OR insufficient_privilege THEN
    NULL;
  END;
  RETURN CASE WHEN left(shown, length(begins)) = begins THEN shown END;
END
$body$"""

# The conversation. Of a result's blocks, the answer to ``call`` is the first, and the
# others are asked for with ``next``: the words are then what an answer ends with.
_ASK: Final = """
CREATE FUNCTION @._pg_background_ask(verb pg_catalog.text, words pg_catalog.text[])
RETURNS pg_catalog.text[] LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET array_nulls = on AS $body$
DECLARE
  session text := @._pg_background_setting(CAST('pg_background_proxy.session' AS text));
  token text := left(session, 32);
  secret text := substr(session, 33);
  encoding name := pg_client_encoding();
  owner oid;
  nonce text;
  word text;
  key text;
  hash text;
  message text;
  question text;
  hint text := substring(@._pg_background_setting(CAST('pg_background_proxy.channel' AS text)),
    '^[0-9]{1,9}$');
  channel int4 := hint;
  seen int4;
  known boolean;
  state text;
  shown text;
  begins text;
  number int4;
  pieces text[];
  narrow boolean;
  looks int4;
  blocks boolean := false;
  pause int4;
  piece text;
  answer text[];
BEGIN
  IF session IS NULL OR length(session) <> 64 THEN
    RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
      MESSAGE = 'this session does not go through pg-background-proxy',
      HINT = 'Connect to the port of pg-background-proxy: it runs the background workers.';
  END IF;
  IF verb = 'next' THEN
    blocks := true;
  ELSE
    SELECT string_agg(
        coalesce(translate(encode(convert_to(w, encoding), 'base64'), chr(10), ''), '-'),
        ' ' ORDER BY n)
      INTO question
      FROM unnest(ARRAY[CAST(current_user AS text), session_user] || words)
      WITH ORDINALITY u(w, n);
    IF current_user <> session_user THEN
      -- Can this code RESET ROLE? If not, it speaks for its owner alone.
      BEGIN
        PERFORM set_config('role', 'none', true);
        RAISE SQLSTATE 'PGBGW';
      EXCEPTION
        WHEN SQLSTATE 'PGBGW' THEN
          NULL;
        WHEN insufficient_privilege THEN
          SELECT r.oid INTO owner FROM pg_roles r WHERE r.rolname = current_user;
      END;
    END IF;
  END IF;

  <<asking>>
  LOOP
    IF verb = 'next' THEN
      nonce := words[1];
      number := words[2];
      word := words[3];
      message := concat_ws(' ', token, nonce, verb, number);
    ELSE
      nonce := @random;
      number := 0;
      word := '';
      message := concat_ws(' ', token, nonce, verb, CASE WHEN owner IS NULL THEN '-' ELSE
        translate(encode(convert_to(CAST(pg_get_userbyid(owner) AS text), getdatabaseencoding()),
          'base64'), chr(10), '') END, question);
    END IF;
    hash := @._pg_background_hash(secret || nonce);
    key := concat(secret, word, nonce, ' ');
    pieces := NULL;
    known := false;
    PERFORM set_config('pg_background_proxy.message', message, true);
    PERFORM @._pg_background_say();

    <<answers>>
    LOOP
      looks := 0;
      pause := 50;
      LOOP
        IF blocks THEN
          -- The channel holds the lock until there is something to see. It is only a means of
          -- waking up: whatever others do with it, this looks again before long.
          BEGIN
            PERFORM set_config('lock_timeout', CAST(pause AS text), true);
            PERFORM pg_advisory_xact_lock_shared(
              CAST(CAST('x' || substr(hash, 13, 16) AS bit(64)) AS int8) # number);
            RAISE SQLSTATE 'PGBGW';
          EXCEPTION
            WHEN SQLSTATE 'PGBGW' THEN
              blocks := false;
            WHEN lock_not_available THEN
              pause := least(pause * 2, 800);
          END;
        END IF;
        PERFORM pg_stat_clear_snapshot();
        SELECT a.pid, substr(a.application_name, 13) INTO seen, state
          FROM pg_stat_get_activity(channel) a, pg_stat_get_activity(pg_backend_pid()) me
          WHERE left(a.application_name, 12) = left(hash, 12)
            AND (a.usesysid = me.usesysid OR a.usesysid = owner)
          LIMIT 1;
        looks := looks + 1;
        IF seen IS NOT NULL THEN
          known := true;
          channel := seen;
          IF hint IS NULL OR hint <> CAST(channel AS text) THEN
            hint := set_config('pg_background_proxy.channel', CAST(channel AS text), false);
          END IF;
          EXIT WHEN state ~ '^[abqr]' AND substr(state, 2, 4) = to_char(number % 10000, 'FM0000')
            OR state ~ '^p' AND word = '';
          blocks := blocks OR state = 'pw';
          IF looks > 150 AND NOT blocks THEN
            PERFORM pg_sleep(CASE WHEN looks < 250 THEN 0.001 ELSE 0.01 END);
          END IF;
        ELSIF known OR looks > 600 THEN
          RAISE EXCEPTION USING ERRCODE = 'connection_failure',
            MESSAGE = 'pg-background-proxy does not answer',
            HINT = 'Connect through pg-background-proxy; the server must have a free connection'
              ' for its answers.';
        ELSE
          -- The hint may be wrong.
          channel := CASE WHEN looks % 4 < 3 THEN CAST(hint AS int4) END;
          IF looks > 150 THEN
            PERFORM pg_sleep(CASE WHEN looks < 250 THEN 0.001 ELSE 0.05 END);
          END IF;
        END IF;
      END LOOP;

      narrow := state ~ '^[ab]';
      IF NOT narrow THEN
        begins := concat('/*', substr(hash, 29, 32), substring(state, '^[qr](....)'));
        shown := @._pg_background_seen(channel, begins);
        IF shown IS NULL THEN
          IF owner IS NULL THEN
            SELECT r.oid INTO owner FROM pg_roles r WHERE r.rolname = current_user;
            CONTINUE asking WHEN owner IS NOT NULL;
          END IF;
          RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = 'cannot prove as which role the background worker may run',
            DETAIL = format('The server does not show the query of process %s here.', channel);
        END IF;
        shown := substr(shown, length(begins) + 1);
      END IF;
      IF state ~ '^p' THEN
        -- Prove that this code has the rights of the role that the channel has logged in as.
        word := left(shown, 32);
        key := concat(secret, word, nonce, ' ');
        blocks := state = 'pw';
        message := concat_ws(' ', token, nonce, 'proof', @._pg_background_hash(word || message));
      ELSE
        piece := CASE WHEN narrow THEN substr(state, 6) ELSE split_part(shown, '*', 1) END;
        piece := encode(decode(piece, 'base64'), 'hex');
        pieces := pieces || CASE WHEN piece = '' THEN '' ELSE
          @._pg_background_xor(piece, concat(key, number, ' ')) END;
        EXIT asking WHEN state ~ '^[aq]';
        blocks := true;
        verb := 'next';
        number := number + 1;
        message := concat_ws(' ', token, nonce, verb, number);
      END IF;
      PERFORM set_config('pg_background_proxy.message', message, true);
      PERFORM @._pg_background_say();
    END LOOP;
  END LOOP;

  answer := CAST(convert_from(decode(array_to_string(pieces, ''), 'hex'), encoding) AS text[]);
  IF answer[1] = 'e' THEN
@fields
  END IF;
  RETURN answer || nonce || CAST(number + 1 AS text) || word;
END
$body$"""


def _raise_error() -> str:
    """RAISE for an error's fields: an option that is given must have a value, so each combination
    has a statement of its own."""
    objects = ("SCHEMA", "TABLE", "COLUMN", "DATATYPE", "CONSTRAINT")
    branches: list[str] = []
    for detail, hint, about in itertools.product((True, False), repeat=3):
        conditions: list[str] = []
        options = ["ERRCODE = answer[2]", "MESSAGE = answer[3]"]
        for given, place, name in ((detail, 4, "DETAIL"), (hint, 5, "HINT")):
            conditions.append(f"answer[{place}] IS {'NOT ' if given else ''}NULL")
            if given:
                options.append(f"{name} = answer[{place}]")
        if about:
            conditions.append("array_to_string(answer[6:10], '') <> ''")
            options += [
                f"{name} = coalesce(answer[{place}], '')" for place, name in enumerate(objects, 6)
            ]
        branches.append(
            f"IF {' AND '.join(conditions)} THEN\n"
            f"      RAISE EXCEPTION USING {', '.join(options)};\n"
        )
    return "    " + "    ELS".join(branches) + "    END IF;"


_CALL: Final = """
CREATE FUNCTION @._pg_background_call(
  function pg_catalog.text, arguments pg_catalog.text[], settings pg_catalog.text[])
RETURNS pg_catalog.text[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  answer text[] := @._pg_background_ask(CAST('call' AS text), ARRAY[
    function, CAST(pg_client_encoding() AS text),
    @own,
    CAST(cardinality(arguments) AS text)] || arguments || settings);
BEGIN
  IF answer[1] = 'c' THEN
    answer := @._pg_background_ask(CAST('custom' AS text), ARRAY(
      SELECT @._pg_background_setting(s.name)
      FROM unnest(answer[2:cardinality(answer) - 3]) WITH ORDINALITY s(name, n) ORDER BY n));
  END IF;
  RETURN answer;
END
$body$"""

_CREATE_SETTING: Final = """
CREATE FUNCTION @._pg_background_setting(name pg_catalog.text) RETURNS pg_catalog.text
LANGUAGE @lang AS $body$@setting$body$"""


# Rows whose types only the job and the caller's column definition list know. A function cannot see
# the list: a query without rows is tried, first with the job's own types, then with
# text where a type has no binary form.
_ROWS: Final = """
DECLARE
  answer pg_catalog.text[] := @call;
  rows pg_catalog.text[];
  queries pg_catalog.text[];
  datestyle pg_catalog.text := pg_catalog.current_setting('datestyle');
  intervalstyle pg_catalog.text := pg_catalog.current_setting('intervalstyle');
  error pg_catalog.text;
BEGIN
  IF answer[1] OPERATOR(pg_catalog.=) 't' THEN
    BEGIN
      RETURN QUERY SELECT e FROM pg_catalog.unnest(@._pg_background_elements(answer[2])) e;
    EXCEPTION WHEN datatype_mismatch THEN
      RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE = 'remote query did not return'
        ' a result set, but result rowtype is not a single text column';
    END;
    RETURN;
  END IF;
  IF answer[1] OPERATOR(pg_catalog.<>) 'r' THEN
    RETURN;
  END IF;
  queries := @._pg_background_queries(answer[5], answer[6]);
  WHILE pg_catalog.cardinality(queries) OPERATOR(pg_catalog.>) 0 LOOP
    BEGIN
      RETURN QUERY EXECUTE pg_catalog.textcat(queries[1], ' LIMIT 0') USING rows;
      EXIT;
    EXCEPTION WHEN datatype_mismatch THEN
      GET STACKED DIAGNOSTICS error = PG_EXCEPTION_DETAIL;
      queries := @._pg_background_retry(queries, error, answer[5], answer[6]);
    END;
  END LOOP;
  IF pg_catalog.cardinality(queries) OPERATOR(pg_catalog.=) 0 THEN
    RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE =
      'remote query result rowtype does not match the specified FROM clause rowtype';
  END IF;
  LOOP
    rows := @._pg_background_elements(answer[7]);
    IF answer[3] IS NOT NULL THEN
      PERFORM pg_catalog.set_config('datestyle', answer[3], true),
        pg_catalog.set_config('intervalstyle', answer[4], true);
    END IF;
    RETURN QUERY EXECUTE queries[1] USING rows;
    IF answer[3] IS NOT NULL THEN
      PERFORM pg_catalog.set_config('datestyle', datestyle, true),
        pg_catalog.set_config('intervalstyle', intervalstyle, true);
    END IF;
    EXIT WHEN answer[2] OPERATOR(pg_catalog.=) 'f';
    answer := @._pg_background_ask(CAST('next' AS pg_catalog.text), answer[8:10]);
  END LOOP;
END
"""

# What makes rows of columns: $1 is a text[][], a row of it for each column.
_QUERIES: Final = """
CREATE FUNCTION @._pg_background_queries(oids pg_catalog.text, modifiers pg_catalog.text)
RETURNS pg_catalog.text[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  columns text;
  sources text;
  types text;
  texts text;
  list text;
  queries text[];
BEGIN
  SELECT string_agg('c' || n, ', ' ORDER BY n),
      string_agg(format('pg_catalog.unnest($1[%s:%s])', n, n), ', ' ORDER BY n),
      string_agg(format('CAST(c%s AS %s)', n, type), ', ' ORDER BY n),
      -- aclitem and gtsvector have no binary form
      string_agg(format('CAST(c%s AS %s)', n,
        CASE WHEN id IN (1033, 3642) THEN 'pg_catalog.text' ELSE type END), ', ' ORDER BY n)
    INTO columns, sources, types, texts
    FROM (
      SELECT u.n, u.id, CASE WHEN u.modifier < 0 THEN format('%I.%I', s.nspname, t.typname)
        ELSE format_type(u.id, u.modifier) END AS type
      FROM ROWS FROM (unnest(CAST(oids AS oid[])), unnest(CAST(modifiers AS int4[])))
        WITH ORDINALITY u(id, modifier, n)
      JOIN pg_type t ON t.oid = u.id JOIN pg_namespace s ON s.oid = t.typnamespace
    ) c;
  IF columns IS NULL THEN
    RETURN ARRAY['SELECT'];
  END IF;
  FOREACH list IN ARRAY CASE WHEN types = texts THEN ARRAY[types] ELSE ARRAY[types, texts] END LOOP
    queries := queries || format('SELECT %s FROM ROWS FROM (%s) AS u(%s)', list, sources, columns);
  END LOOP;
  RETURN queries;
END
$body$"""

# After a query did not fit the column definition list: the others; or if only a type modifier
# differs, as the error's detail tells (in English), the same query with that.
_RETRY: Final = """
CREATE FUNCTION @._pg_background_retry(queries pg_catalog.text[], detail pg_catalog.text,
  oids pg_catalog.text, modifiers pg_catalog.text)
RETURNS pg_catalog.text[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  matched text[] := regexp_matches(detail,
    '^Returned type .* does not match expected type (.*[(].*[)].*)'
    ' in column (?:".*" [(]position )?([0-9]+)[)]?[.]$');
  place int4 := matched[2];
BEGIN
  IF to_regtype(matched[1]) = (CAST(oids AS oid[]))[place]
    AND (CAST(modifiers AS int4[]))[place] IS NOT NULL THEN
    RETURN regexp_replace(queries[1], format('CAST[(]c%s AS .*?[)](, CAST[(]c| FROM )', place),
      format('CAST(c%s AS %s)', place, matched[1]) || chr(92) || '1') || queries[2:2];
  END IF;
  RETURN queries[2:cardinality(queries)];
END
$body$"""

_VOID: Final = """
BEGIN
  PERFORM @call;
END
"""

_SCALAR: Final = """
BEGIN
  RETURN (@call)[2];
END
"""

_COMPOSITE: Final = """
DECLARE
  answer pg_catalog.text[] := @call;
  result pg_catalog.record;
BEGIN
  IF answer[1] OPERATOR(pg_catalog.=) 'n' THEN
    RETURN NULL;
  END IF;
  SELECT @fields INTO result;
  RETURN result;
END
"""

_TABLE: Final = """
DECLARE
  answer pg_catalog.text[] := @call;
  rows pg_catalog.text[] := @._pg_background_elements(answer[2]);
BEGIN
  RETURN QUERY SELECT @columns FROM pg_catalog.generate_subscripts(rows, 1) i;
END
"""

# The label is the tenth column: who asks for nine does not get it.
_LIST: Final = """
DECLARE
  answer pg_catalog.text[] := @call;
  rows pg_catalog.text[] := @._pg_background_elements(answer[2]);
BEGIN
  BEGIN
    RETURN QUERY SELECT @columns FROM pg_catalog.generate_subscripts(rows, 1) i;
  EXCEPTION WHEN datatype_mismatch THEN
    RETURN QUERY SELECT @but_one FROM pg_catalog.generate_subscripts(rows, 1) i;
  END;
END
"""

_PROGRESS: Final = """
DECLARE
  word pg_catalog.text := @._pg_background_setting(
    CAST('pg_background_proxy.job' AS pg_catalog.text));
BEGIN
  IF word IS NULL OR word OPERATOR(pg_catalog.=) '' THEN
    RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
      MESSAGE = 'pg_background_progress can only be called from a background worker';
  END IF;
  RAISE INFO '% % %', word, coalesce(CAST(pct AS pg_catalog.text), ''),
    CASE WHEN msg IS NULL THEN '' ELSE pg_catalog.textcat('=', msg) END;
END
"""

_HELPERS: Final = (
    *(_CREATE_SETTING, _SETTINGS, _HASH, _ELEMENTS, _SAY, _XOR, _SEEN, _ASK, _CALL),
    *(_QUERIES, _RETRY),
)
