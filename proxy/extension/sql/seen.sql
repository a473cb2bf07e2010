-- The query of a channel, which the server shows to its login role. The calling code must have that
-- role's rights, or get them by RESET ROLE and RESET SESSION AUTHORIZATION; else the result is
-- NULL. The function undoes what it sets.

CREATE FUNCTION @{schema}._pg_background_seen(channel pg_catalog.int4, begins pg_catalog.text)
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
  -- Two blocks: see _pg_background_say.
  BEGIN
    IF current_setting('role') <> 'none' THEN
      PERFORM set_config('role', 'none', true);
    END IF;
    BEGIN
      IF session_user <> login THEN
        PERFORM set_config('session_authorization', login, true);
      END IF;
      SELECT a.query INTO shown FROM pg_stat_get_activity(channel) a;
      RAISE SQLSTATE 'PGBGW';
    EXCEPTION WHEN SQLSTATE 'PGBGW' OR insufficient_privilege THEN
      NULL;
    END;
    RAISE SQLSTATE 'PGBGW';
  EXCEPTION WHEN SQLSTATE 'PGBGW' OR insufficient_privilege THEN
    NULL;
  END;
  RETURN CASE WHEN left(shown, length(begins)) = begins THEN shown END;
END
$body$
