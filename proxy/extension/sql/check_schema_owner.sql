-- The schema's owner may drop and replace what is in it, and so speak for the extension.

IF EXISTS(
  SELECT 1 FROM pg_catalog.pg_namespace n WHERE n.oid OPERATOR(pg_catalog.=) namespace
  AND NOT (@{is_trusted}
    OR pg_catalog.pg_get_userbyid(n.nspowner) OPERATOR(pg_catalog.=) current_user)) THEN
  RAISE insufficient_privilege USING MESSAGE = pg_catalog.format('schema "%s" belongs to a role'
    ' that could replace the functions of extension "pg_background"', schema_name),
    HINT = 'Create the extension in a schema of your own, of a superuser or of the owner of the'
    ' database.';
END IF;
