version := '@{version}'; schema_name := @{schema};
@{check_selected}
@{find_schema}
IF NOT pg_catalog.has_database_privilege(
  CAST(pg_catalog.current_database() AS pg_catalog.text), 'CREATE') THEN
  RAISE insufficient_privilege
    USING MESSAGE = 'permission denied to create extension "pg_background"',
    HINT = 'Must have CREATE privilege on current database to create this extension.';
END IF;
@{check_schema_owner}
IF NOT EXISTS(
  SELECT 1 FROM pg_catalog.pg_roles o WHERE o.rolname OPERATOR(pg_catalog.=) current_user
  AND (o.rolsuper OR o.oid OPERATOR(pg_catalog.=) (SELECT d.datdba FROM pg_catalog.pg_database d
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()))) THEN
  RAISE WARNING USING MESSAGE = pg_catalog.format(
    'extension "pg_background" will be found only in sessions of role "%s"', current_user),
    HINT = 'Let a superuser or the owner of the database create it for all.';
END IF;
@{create_types}
@{install}
@{comment}
