-- There is no missing_ok yet.

BEGIN
  RETURN pg_catalog.current_setting(name);
EXCEPTION WHEN undefined_object THEN
  RETURN NULL;
END
