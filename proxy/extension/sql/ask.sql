-- The conversation. Of a result's blocks, the answer to ``call`` is the first, and the
-- others are asked for with ``next``: the words are then what an answer ends with.

CREATE FUNCTION @{schema}._pg_background_ask(verb pg_catalog.text, words pg_catalog.text[])
RETURNS pg_catalog.text[] LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET array_nulls = on AS $body$
DECLARE
  session text := @{schema}._pg_background_setting(CAST('pg_background_proxy.session' AS text));
  token text := @{token};
  secret text := @{secret};
  encoding name := pg_client_encoding();
  owner oid;
  nonce text;
  word text;
  key text;
  hash text;
  message text;
  question text;
  hint text := substring(@{schema}._pg_background_setting(CAST('pg_background_proxy.channel' AS text)),
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
  IF session IS NULL OR length(session) <> @{setting_size} THEN
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
      nonce := @{random};
      number := 0;
      word := '';
      message := concat_ws(' ', token, nonce, verb, CASE WHEN owner IS NULL THEN '-' ELSE
        translate(encode(convert_to(CAST(pg_get_userbyid(owner) AS text), getdatabaseencoding()),
          'base64'), chr(10), '') END, question);
    END IF;
    hash := @{schema}._pg_background_hash(secret || nonce);
    key := concat(secret, word, nonce, ' ');
    pieces := NULL;
    known := false;
    PERFORM set_config('pg_background_proxy.message', message, true);
    PERFORM @{schema}._pg_background_say();

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
              CAST(CAST('x' || @{lock} AS bit(64)) AS int8) # number);
            RAISE SQLSTATE 'PGBGW';
          EXCEPTION
            WHEN SQLSTATE 'PGBGW' THEN
              blocks := false;
            WHEN lock_not_available THEN
              pause := least(pause * 2, 800);
          END;
        END IF;
        PERFORM pg_stat_clear_snapshot();
        SELECT a.pid, @{state_seen} INTO seen, state
          FROM pg_stat_get_activity(channel) a, pg_stat_get_activity(pg_backend_pid()) me
          WHERE @{tag_seen} = @{tag}
            AND (a.usesysid = me.usesysid OR a.usesysid = owner)
          LIMIT 1;
        looks := looks + 1;
        IF seen IS NOT NULL THEN
          known := true;
          channel := seen;
          IF hint IS NULL OR hint <> CAST(channel AS text) THEN
            hint := set_config('pg_background_proxy.channel', CAST(channel AS text), false);
          END IF;
          EXIT WHEN state ~ '^[abqr]' AND @{number_seen} = @{number_wanted}
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
        begins := concat('@{comment}', @{mark}, substring(state, '^[qr](@{number_pattern})'));
        shown := @{schema}._pg_background_seen(channel, begins);
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
        word := @{word};
        key := concat(secret, word, nonce, ' ');
        blocks := state = 'pw';
        message := concat_ws(' ', token, nonce, 'proof', @{schema}._pg_background_hash(word || message));
      ELSE
        piece := CASE WHEN narrow THEN @{narrow_data} ELSE split_part(shown, '*', 1) END;
        piece := encode(decode(piece, 'base64'), 'hex');
        pieces := pieces || CASE WHEN piece = '' THEN '' ELSE
          @{schema}._pg_background_xor(piece, concat(key, number, ' ')) END;
        EXIT asking WHEN state ~ '^[aq]';
        blocks := true;
        verb := 'next';
        number := number + 1;
        message := concat_ws(' ', token, nonce, verb, number);
      END IF;
      PERFORM set_config('pg_background_proxy.message', message, true);
      PERFORM @{schema}._pg_background_say();
    END LOOP;
  END LOOP;

  answer := CAST(convert_from(decode(array_to_string(pieces, ''), 'hex'), encoding) AS text[]);
  IF answer[1] = 'e' THEN
@{fields}
  END IF;
  RETURN answer || nonce || CAST(number + 1 AS text) || word;
END
$body$
