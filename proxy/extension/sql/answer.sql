-- Reads the answer to a question (`asked`: what _pg_background_ask returns), after it has sent the
-- settings, unless they are NULL. The answer is the first block of a result. To read the next
-- block, pass the last elements of the answer before as `asked`: nonce, number and word.

CREATE FUNCTION @{schema}._pg_background_answer(
  asked pg_catalog.text[], settings pg_catalog.text[])
RETURNS pg_catalog.text[] LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET array_nulls = on AS $body$
DECLARE
  session text := @{schema}._pg_background_setting(CAST('pg_background_proxy.session' AS text));
  token text := @{token};
  secret text := @{secret};
  encoding name := pg_client_encoding();
  nonce text := asked[1];
  number int4 := asked[2];
  word text := asked[3];
  question text := asked[4];
  message text := asked[5];
  owner oid := asked[6];
  channel int4 := asked[7];
  hint text := substring(@{schema}._pg_background_setting(
    CAST('pg_background_proxy.channel' AS text)), '^[0-9]{1,9}$');
  -- Whether the channel has the lock, so far as can be known.
  blocks boolean := coalesce(CAST(asked[8] AS boolean), true);
  proven boolean := word <> '';
  -- What is told with a word that has not been taken must be told again.
  told text[] := settings;
  first int8 := CASE WHEN word <> '' AND question IS NOT NULL THEN @{lock_of_word} END;
  key text;
  hash text;
  seen int4;
  known boolean;
  -- Whether the lock is not the word's, but the question's.
  of_question boolean := false;
  state text;
  shown text;
  begins text;
  pieces text[];
  narrow boolean;
  looks int4;
  pause int4;
  piece text;
  answer text[];
BEGIN
  IF question IS NULL THEN
    channel := hint;
    message := concat_ws(' ', token, nonce, 'next', number);
    PERFORM set_config('pg_background_proxy.message', message, true);
    PERFORM @{schema}._pg_background_say();
  END IF;

  <<asking>>
  LOOP
    IF message IS NULL THEN
      -- Once more, as the owner of this code.
      nonce := @{random};
      number := 0;
      word := '';
      blocks := false;
      proven := false;
      first := NULL;
      message := concat_ws(' ', token, nonce, 'ask', translate(encode(
        convert_to(CAST(pg_get_userbyid(owner) AS text), getdatabaseencoding()),
        'base64'), chr(10), ''), question, '-');
      PERFORM set_config('pg_background_proxy.message', message || ' -', true);
      PERFORM @{schema}._pg_background_say();
    END IF;
    hash := @{hash_of_question};
    key := concat(secret, word, nonce, ' ');
    pieces := NULL;
    known := false;

    <<answers>>
    LOOP
      IF proven AND settings IS NOT NULL THEN
        SELECT concat_ws(' ', token, nonce, 'settings', string_agg(
            coalesce(translate(encode(convert_to(w, encoding), 'base64'), chr(10), ''), '-'),
            ' ' ORDER BY n))
          INTO shown FROM unnest(settings) WITH ORDINALITY u(w, n);
        PERFORM set_config('pg_background_proxy.message',
          concat_ws(' ', shown, @{proof_of_settings}), true);
        PERFORM @{schema}._pg_background_say();
        settings := NULL;
      END IF;
      looks := 0;
      pause := 50;
      LOOP
        IF blocks THEN
          -- The channel holds the lock until there is something to see. It is only a means of
          -- waking up: whatever others do with it, this looks again before long.
          BEGIN
            PERFORM set_config('lock_timeout', CAST(pause AS text), true);
            PERFORM pg_advisory_xact_lock_shared(CASE WHEN number = 0 AND first IS NOT NULL
              AND NOT of_question THEN first ELSE CAST(CAST('x' || @{lock} AS bit(64)) AS int8) # number END);
            RAISE SQLSTATE 'PGBGW';
          EXCEPTION
            WHEN SQLSTATE 'PGBGW' THEN
              blocks := false;
            WHEN lock_not_available THEN
              pause := least(pause * 2, 800);
              looks := looks + CASE WHEN known THEN 0 ELSE 24 END;
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
          EXIT WHEN state ~ '^[abqrxy]' AND @{number_seen} = @{number_wanted}
            OR state ~ '^p' AND (word = '' OR proven AND first IS NOT NULL);
          of_question := state = 'gw';
          blocks := blocks OR state IN ('pw', 'hw', 'gw');
          IF looks > 150 AND NOT blocks THEN
            PERFORM pg_sleep(CASE WHEN looks < 250 THEN 0.001 ELSE 0.01 END);
          END IF;
        ELSIF known OR looks > 600 THEN
          RAISE EXCEPTION USING ERRCODE = 'connection_failure',
            MESSAGE = 'pg-background-proxy does not answer',
            HINT = 'Connect through pg-background-proxy; the server must have a free connection'
              ' for its answers.';
        ELSE
          IF looks % 25 = 0 AND (blocks OR looks > 150) THEN
            -- If there is nobody any more, the server notices that by the second time.
            PERFORM set_config('pg_background_proxy.message',
              concat_ws(' ', token, nonce, 'still'), true);
            PERFORM @{schema}._pg_background_say();
          END IF;
          -- The hint may be wrong.
          channel := CASE WHEN looks % 4 < 3 THEN CAST(hint AS int4) END;
          IF looks > 150 THEN
            PERFORM pg_sleep(CASE WHEN looks < 250 THEN 0.001 ELSE 0.05 END);
          END IF;
        END IF;
      END LOOP;

      IF state ~ '^[xy]' THEN
        -- It is not proven, so the proxy need not know the word: it may be another proxy's.
        key := concat(secret, nonce, ' ');
        state := translate(left(state, 1), 'xy', 'ab') || substr(state, 2);
      END IF;
      narrow := state ~ '^[ab]';
      IF NOT narrow THEN
        begins := concat('@{comment}', @{mark}, substring(state, '^[qr](@{number_pattern})'));
        shown := @{schema}._pg_background_seen(channel, begins);
        IF shown IS NULL THEN
          IF owner IS NULL AND question IS NOT NULL THEN
            owner := CAST(quote_ident(current_user) AS regrole);
            message := NULL;
            CONTINUE asking;
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
        proven := true;
        first := NULL;
        settings := told;
        PERFORM set_config('pg_background_proxy.message',
          concat_ws(' ', token, nonce, 'proof', @{proof}), true);
        PERFORM @{schema}._pg_background_say();
      ELSE
        piece := CASE WHEN narrow THEN @{narrow_data} ELSE split_part(@{data}, '*', 1) END;
        begins := concat(key, number, ' ');
        IF state ~ '^[br]' THEN
          -- The next one is on its way while this one is deciphered.
          blocks := true;
          number := number + 1;
          PERFORM set_config('pg_background_proxy.message',
            concat_ws(' ', token, nonce, 'next', number), true);
          PERFORM @{schema}._pg_background_say();
        END IF;
        piece := encode(decode(piece, 'base64'), 'hex');
        pieces := pieces || CASE WHEN piece = '' THEN '' ELSE
          @{schema}._pg_background_xor(piece, begins) END;
        EXIT answers WHEN state ~ '^[aq]';
      END IF;
    END LOOP;

    answer := CAST(convert_from(decode(array_to_string(pieces, ''), 'hex'), encoding) AS text[]);
    EXIT asking WHEN answer[1] <> 'c';
    -- The proxy wants custom settings, too; the next time they come with the others.
    PERFORM set_config('pg_background_proxy.custom', concat_ws(chr(10),
      @{schema}._pg_background_setting(CAST('pg_background_proxy.custom' AS text)),
      array_to_string(answer[2:cardinality(answer)], chr(10))), false);
    settings := ARRAY(
      SELECT unnest(ARRAY[s.name, @{schema}._pg_background_setting(s.name)])
      FROM unnest(answer[2:cardinality(answer)]) s(name));
    number := number + 1;
    blocks := true;
  END LOOP;

  IF answer[1] = 'e' THEN
@{fields}
  ELSIF answer[1] = 'l' THEN
    -- If this comes with the commit, the proxy starts the job.
    PERFORM pg_notify(answer[2], answer[3]);
    answer := answer[4:cardinality(answer)];
  END IF;
  RETURN answer || nonce || CAST(number + 1 AS text) || word;
END
$body$
