-- A dump has no roles, but ends with GRANTs to ours. So something before them must make the role if
-- it is missing. CREATE AGGREGATE checks the initial state; the check here is the condition of a
-- domain, which makes the role.

CREATE FUNCTION @{schema}._pg_background_make_role(pg_catalog.text) RETURNS pg_catalog.bool
LANGUAGE plpgsql AS $body$BEGIN
  IF NOT EXISTS(SELECT 1 FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) $1) THEN
    CREATE ROLE @{executor} NOLOGIN;
  END IF;
  RETURN true;
EXCEPTION WHEN OTHERS THEN RETURN true;
END @{tag}
$body$;
CREATE DOMAIN @{restored} AS pg_catalog.text CHECK (@{schema}._pg_background_make_role(VALUE));
CREATE FUNCTION @{restored}(@{restored}, @{restored}) RETURNS @{restored}
LANGUAGE sql IMMUTABLE AS $body$SELECT $1 @{tag}
$body$;
CREATE AGGREGATE @{restored}(@{restored})
  (SFUNC = @{restored}, STYPE = @{restored}, INITCOND = '@{executor}');
COMMENT ON AGGREGATE @{restored}(@{restored})
  IS 'Makes the role @{executor} where a dump is restored.'
