SELECT n.oid INTO namespace FROM pg_catalog.pg_namespace n
  WHERE n.nspname OPERATOR(pg_catalog.=) CAST(schema_name AS pg_catalog.name);
IF namespace IS NULL THEN
  RAISE invalid_schema_name
    USING MESSAGE = pg_catalog.format('schema "%s" does not exist', schema_name);
END IF;
IF pg_catalog.strpos(schema_name, '$body$') OPERATOR(pg_catalog.>) 0 THEN
  RAISE invalid_schema_name USING MESSAGE =
    'invalid character in extension "pg_background" schema: must not contain "$body$"';
END IF;
