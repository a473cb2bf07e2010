-- Functions of the extension as the proxy made them until November 2026: the proof in an exchange of
-- its own, the settings in the question. Databases have them until ALTER EXTENSION UPDATE.

CREATE OR REPLACE FUNCTION public._pg_background_ask(verb text, words text[])
 RETURNS text[]
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET array_nulls TO 'on'
AS $function$
DECLARE
  session text := public._pg_background_setting(CAST('pg_background_proxy.session' AS text));
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
  hint text := substring(public._pg_background_setting(CAST('pg_background_proxy.channel' AS text)),
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
      nonce := replace(CAST(gen_random_uuid() AS text), '-', '');
      number := 0;
      word := '';
      message := concat_ws(' ', token, nonce, verb, CASE WHEN owner IS NULL THEN '-' ELSE
        translate(encode(convert_to(CAST(pg_get_userbyid(owner) AS text), getdatabaseencoding()),
          'base64'), chr(10), '') END, question);
    END IF;
    hash := public._pg_background_hash(secret || nonce);
    key := concat(secret, word, nonce, ' ');
    pieces := NULL;
    known := false;
    PERFORM set_config('pg_background_proxy.message', message, true);
    PERFORM public._pg_background_say();

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
        shown := public._pg_background_seen(channel, begins);
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
        message := concat_ws(' ', token, nonce, 'proof', public._pg_background_hash(word || message));
      ELSE
        piece := CASE WHEN narrow THEN substr(state, 6) ELSE split_part(shown, '*', 1) END;
        piece := encode(decode(piece, 'base64'), 'hex');
        pieces := pieces || CASE WHEN piece = '' THEN '' ELSE
          public._pg_background_xor(piece, concat(key, number, ' ')) END;
        EXIT asking WHEN state ~ '^[aq]';
        blocks := true;
        verb := 'next';
        number := number + 1;
        message := concat_ws(' ', token, nonce, verb, number);
      END IF;
      PERFORM set_config('pg_background_proxy.message', message, true);
      PERFORM public._pg_background_say();
    END LOOP;
  END LOOP;

  answer := CAST(convert_from(decode(array_to_string(pieces, ''), 'hex'), encoding) AS text[]);
  IF answer[1] = 'e' THEN
    IF answer[4] IS NOT NULL AND answer[5] IS NOT NULL AND array_to_string(answer[6:10], '') <> '' THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], DETAIL = answer[4], HINT = answer[5], SCHEMA = coalesce(answer[6], ''), TABLE = coalesce(answer[7], ''), COLUMN = coalesce(answer[8], ''), DATATYPE = coalesce(answer[9], ''), CONSTRAINT = coalesce(answer[10], '');
    ELSIF answer[4] IS NOT NULL AND answer[5] IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], DETAIL = answer[4], HINT = answer[5];
    ELSIF answer[4] IS NOT NULL AND answer[5] IS NULL AND array_to_string(answer[6:10], '') <> '' THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], DETAIL = answer[4], SCHEMA = coalesce(answer[6], ''), TABLE = coalesce(answer[7], ''), COLUMN = coalesce(answer[8], ''), DATATYPE = coalesce(answer[9], ''), CONSTRAINT = coalesce(answer[10], '');
    ELSIF answer[4] IS NOT NULL AND answer[5] IS NULL THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], DETAIL = answer[4];
    ELSIF answer[4] IS NULL AND answer[5] IS NOT NULL AND array_to_string(answer[6:10], '') <> '' THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], HINT = answer[5], SCHEMA = coalesce(answer[6], ''), TABLE = coalesce(answer[7], ''), COLUMN = coalesce(answer[8], ''), DATATYPE = coalesce(answer[9], ''), CONSTRAINT = coalesce(answer[10], '');
    ELSIF answer[4] IS NULL AND answer[5] IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], HINT = answer[5];
    ELSIF answer[4] IS NULL AND answer[5] IS NULL AND array_to_string(answer[6:10], '') <> '' THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3], SCHEMA = coalesce(answer[6], ''), TABLE = coalesce(answer[7], ''), COLUMN = coalesce(answer[8], ''), DATATYPE = coalesce(answer[9], ''), CONSTRAINT = coalesce(answer[10], '');
    ELSIF answer[4] IS NULL AND answer[5] IS NULL THEN
      RAISE EXCEPTION USING ERRCODE = answer[2], MESSAGE = answer[3];
    END IF;
  END IF;
  RETURN answer || nonce || CAST(number + 1 AS text) || word;
END
$function$;

CREATE OR REPLACE FUNCTION public._pg_background_call(function text, arguments text[], settings text[])
 RETURNS text[]
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
  answer text[] := public._pg_background_ask(CAST('call' AS text), ARRAY[
    function, CAST(pg_client_encoding() AS text),
    public._pg_background_setting(CAST('pg_background.max_workers' AS text)), public._pg_background_setting(CAST('pg_background.default_queue_size' AS text)), public._pg_background_setting(CAST('pg_background.worker_timeout' AS text)),
    CAST(cardinality(arguments) AS text)] || arguments || settings);
BEGIN
  IF answer[1] = 'c' THEN
    answer := public._pg_background_ask(CAST('custom' AS text), ARRAY(
      SELECT public._pg_background_setting(s.name)
      FROM unnest(answer[2:cardinality(answer) - 3]) WITH ORDINALITY s(name, n) ORDER BY n));
  END IF;
  RETURN answer;
END
$function$;

CREATE OR REPLACE FUNCTION public._pg_background_hash(text text)
 RETURNS text
 LANGUAGE sql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
SELECT encode(sha256(convert_to(text, 'UTF8')), 'hex')
$function$;

CREATE OR REPLACE FUNCTION public._pg_background_say()
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
  message text := public._pg_background_setting(CAST('pg_background_proxy.message' AS text));
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
$function$;

CREATE OR REPLACE FUNCTION public._pg_background_seen(channel integer, begins text)
 RETURNS text
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
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
$function$;

CREATE OR REPLACE FUNCTION public._pg_background_settings()
 RETURNS text[]
 LANGUAGE sql
AS $function$
SELECT ARRAY(
  SELECT pg_catalog.unnest(ARRAY[s.name, s.setting])
  FROM pg_catalog.pg_settings s WHERE s.source OPERATOR(pg_catalog.=) 'session'
)
$function$;

CREATE OR REPLACE FUNCTION public._pg_background_xor(data text, key text)
 RETURNS text
 LANGUAGE sql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
-- varbit_send() puts the length, of four bytes, before the bits.
SELECT substr(encode(varbit_send(CAST('x' || data AS varbit) # CAST('x' || left((
  SELECT string_agg(encode(sha256(convert_to(key || n, 'UTF8')), 'hex'), '' ORDER BY n) FROM generate_series(0, (length(data) - 1) / 64) n
), length(data)) AS varbit)), 'hex'), 9)
$function$;

CREATE OR REPLACE FUNCTION public.pg_background_launch(sql text, queue_size integer DEFAULT 0)
 RETURNS integer
 LANGUAGE plpgsql
 STRICT
AS $function$
BEGIN
  RETURN (public._pg_background_call(CAST('pg_background_launch(sql, queue_size) integer' AS pg_catalog.text), CAST(ARRAY[sql, CAST(queue_size AS pg_catalog.text)] AS pg_catalog.text[]), public._pg_background_settings()))[2];
END

-- pg-background-proxy
$function$;

CREATE OR REPLACE FUNCTION public.pg_background_detach(pid integer)
 RETURNS void
 LANGUAGE plpgsql
 STRICT
AS $function$
BEGIN
  PERFORM public._pg_background_call(CAST('pg_background_detach(pid) void' AS pg_catalog.text), CAST(ARRAY[CAST(pid AS pg_catalog.text)] AS pg_catalog.text[]), CAST(NULL AS pg_catalog.text[]));
END

-- pg-background-proxy
$function$;

CREATE OR REPLACE FUNCTION public.pg_background_result(pid integer)
 RETURNS SETOF record
 LANGUAGE plpgsql
 STRICT
AS $function$
DECLARE
  answer pg_catalog.text[] := public._pg_background_call(CAST('pg_background_result(pid) record' AS pg_catalog.text), CAST(ARRAY[CAST(pid AS pg_catalog.text)] AS pg_catalog.text[]), CAST(NULL AS pg_catalog.text[]));
  rows pg_catalog.text[];
  queries pg_catalog.text[];
  datestyle pg_catalog.text := pg_catalog.current_setting('datestyle');
  intervalstyle pg_catalog.text := pg_catalog.current_setting('intervalstyle');
  error pg_catalog.text;
BEGIN
  IF answer[1] OPERATOR(pg_catalog.=) 't' THEN
    BEGIN
      RETURN QUERY SELECT e FROM pg_catalog.unnest(public._pg_background_elements(answer[2])) e;
    EXCEPTION WHEN datatype_mismatch THEN
      RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE = 'remote query did not return'
        ' a result set, but result rowtype is not a single text column';
    END;
    RETURN;
  END IF;
  IF answer[1] OPERATOR(pg_catalog.<>) 'r' THEN
    RETURN;
  END IF;
  queries := public._pg_background_queries(answer[5], answer[6]);
  WHILE pg_catalog.cardinality(queries) OPERATOR(pg_catalog.>) 0 LOOP
    BEGIN
      RETURN QUERY EXECUTE pg_catalog.textcat(queries[1], ' LIMIT 0') USING rows;
      EXIT;
    EXCEPTION WHEN datatype_mismatch THEN
      GET STACKED DIAGNOSTICS error = PG_EXCEPTION_DETAIL;
      queries := public._pg_background_retry(queries, error, answer[5], answer[6]);
    END;
  END LOOP;
  IF pg_catalog.cardinality(queries) OPERATOR(pg_catalog.=) 0 THEN
    RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE =
      'remote query result rowtype does not match the specified FROM clause rowtype';
  END IF;
  LOOP
    rows := public._pg_background_elements(answer[7]);
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
    answer := public._pg_background_ask(CAST('next' AS pg_catalog.text), answer[8:10]);
  END LOOP;
END

-- pg-background-proxy
$function$;

