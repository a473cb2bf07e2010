DECLARE old_namespace pg_catalog.oid := namespace;
BEGIN
  @{must_exist}
  IF schema_name OPERATOR(pg_catalog.=) @{schema} THEN RETURN; END IF;
  @{drop_helpers}
  version := installed_version;
  schema_name := @{schema};
  @{find_schema}
  @{check_schema_owner}
  -- A loop would see what has moved, as the search path finds it.
  SELECT pg_catalog.array_agg(s.command) INTO items FROM (
    SELECT pg_catalog.format('ALTER FUNCTION %s SET SCHEMA %I', @{function_name}, schema_name)
      @{old_functions}
    UNION ALL
    SELECT pg_catalog.format('ALTER TYPE %s SET SCHEMA %I', @{type_name}, schema_name)
      @{old_types}
    UNION ALL
    SELECT pg_catalog.format('ALTER VIEW %s SET SCHEMA %I', @{view_name}, schema_name)
      @{old_views}
    UNION ALL
    SELECT pg_catalog.format('ALTER TABLE %s SET SCHEMA %I', @{view_name}, schema_name)
      @{old_tables}
  ) s(command);
  FOREACH item IN ARRAY items LOOP EXECUTE item; END LOOP;
  @{find_granted}
  @{install}
END;
