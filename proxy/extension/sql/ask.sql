-- Asks a question: who calls what; with the proof, if a channel shows a word for it. Returns what
-- _pg_background_answer needs: the nonce, the number of the first piece, the word or '', the
-- question, its message, the owner's OID, the channel's PID, and whether the channel has the lock.

CREATE FUNCTION @{schema}._pg_background_ask(function pg_catalog.text, arguments pg_catalog.text[])
RETURNS pg_catalog.text[] LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET array_nulls = on AS $body$
DECLARE
  session text := @{schema}._pg_background_setting(CAST('pg_background_proxy.session' AS text));
  token text := @{token};
  secret text := @{secret};
  encoding name := pg_client_encoding();
  nonce text := @{random};
  owner oid;
  channel int4 := substring(@{schema}._pg_background_setting(
    CAST('pg_background_proxy.channel' AS text)), '^[0-9]{1,9}$');
  named text;
  shown text;
  word text;
  question text;
  message text;
BEGIN
  IF session IS NULL OR length(session) <> @{setting_size} THEN
    RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
      MESSAGE = 'this session does not go through pg-background-proxy',
      HINT = 'Connect to the port of pg-background-proxy: it runs the background workers.';
  END IF;
  SELECT string_agg(
      coalesce(translate(encode(convert_to(w, encoding), 'base64'), chr(10), ''), '-'),
      ' ' ORDER BY n)
    INTO question
    FROM unnest(ARRAY[CAST(current_user AS text), session_user, function, encoding,
      concat('@{settings}:', cardinality(arguments)), @{own}] || arguments) WITH ORDINALITY u(w, n);
  IF current_user <> session_user THEN
    -- Can this code RESET ROLE? If not, it speaks for its owner alone.
    BEGIN
      PERFORM set_config('role', 'none', true);
      RAISE SQLSTATE 'PGBGW';
    EXCEPTION
      WHEN SQLSTATE 'PGBGW' THEN
        NULL;
      WHEN insufficient_privilege THEN
        owner := CAST(quote_ident(current_user) AS regrole);
    END;
  END IF;

  -- The channel of the last call, or one that rests.
  PERFORM pg_stat_clear_snapshot();
  IF channel IS NOT NULL THEN
    SELECT a.application_name, a.query INTO named, shown
      FROM pg_stat_get_activity(channel) a, pg_stat_get_activity(pg_backend_pid()) me
      WHERE a.usesysid = coalesce(owner, me.usesysid);
  END IF;
  IF named IS NULL THEN
    SELECT a.pid, a.application_name, a.query INTO channel, named, shown
      FROM pg_stat_get_activity(NULL) a, pg_stat_get_activity(pg_backend_pid()) me
      WHERE a.application_name = '@{resting}' AND a.datid = me.datid
        AND a.usesysid = coalesce(owner, me.usesysid)
      LIMIT 1;
  END IF;
  IF owner IS NULL AND left(shown, 2) <> '@{comment}' THEN
    shown := @{schema}._pg_background_seen(channel, '@{comment}');
  END IF;
  word := coalesce(@{offer}, '');

  message := concat_ws(' ', token, nonce, 'ask', CASE WHEN owner IS NULL THEN '-' ELSE
    translate(encode(convert_to(CAST(pg_get_userbyid(owner) AS text), getdatabaseencoding()),
      'base64'), chr(10), '') END, question, coalesce(CAST(channel AS text), '-'));
  PERFORM set_config('pg_background_proxy.message',
    concat_ws(' ', message, CASE WHEN word = '' THEN '-' ELSE @{proof} END), true);
  PERFORM @{schema}._pg_background_say();
  RETURN ARRAY[nonce, '0', word, question, message, CAST(owner AS text), CAST(channel AS text),
    CAST(word <> '' AND named <> '@{resting}' AS text)];
END
$body$
