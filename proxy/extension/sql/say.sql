-- The proxy accepts only messages that this function raises. It adds the roles that its caller can
-- run as: a role that may see all queries can read the word of a proof, yet cannot run as the
-- channel's role.

CREATE FUNCTION @{schema}._pg_background_say() RETURNS pg_catalog.void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  message text := @{schema}._pg_background_setting(CAST('pg_background_proxy.message' AS text));
  roles oid[];
BEGIN
  IF split_part(message, ' ', 3) IN ('ask', 'proof') THEN
    roles := ARRAY[CAST(CAST(quote_ident(current_user) AS regrole) AS oid)];
    -- Two blocks, and no change to a role that is none: before version 12, the end of a block that
    -- changes both restores the session's role wrongly.
    BEGIN
      IF current_setting('role') <> 'none' THEN
        PERFORM set_config('role', 'none', true);
        roles := roles || CAST(CAST(quote_ident(current_user) AS regrole) AS oid);
      END IF;
      BEGIN
        RESET SESSION AUTHORIZATION;
        roles := roles || CAST(CAST(quote_ident(current_user) AS regrole) AS oid);
        RAISE SQLSTATE 'PGBGW';
      EXCEPTION WHEN SQLSTATE 'PGBGW' OR insufficient_privilege THEN
        NULL;
      END;
      RAISE SQLSTATE 'PGBGW';
    EXCEPTION WHEN SQLSTATE 'PGBGW' OR insufficient_privilege THEN
      NULL;
    END;
    message := concat(message, ' ', array_to_string(roles, ','));
  END IF;
  RAISE INFO '%', message;
END
$body$
