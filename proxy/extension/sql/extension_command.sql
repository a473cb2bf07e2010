-- The frame of all commands for the extension.

DECLARE
  marker pg_catalog.oid; namespace pg_catalog.oid; owner pg_catalog.oid;
  schema_name pg_catalog.text; version pg_catalog.text; installed_version pg_catalog.text;
  script pg_catalog.text; item pg_catalog.text; items pg_catalog.text[];
  detail pg_catalog.text; checked pg_catalog.text; granted pg_catalog.text[];
BEGIN
  IF CAST(pg_catalog.current_setting('transaction_read_only') AS pg_catalog.bool) THEN
    RAISE read_only_sql_transaction
      USING MESSAGE = 'cannot execute @{tag} in a read-only transaction';
  END IF;
  SELECT p.oid, p.pronamespace, p.proowner, n.nspname, @{installed_version}
    INTO marker, namespace, owner, schema_name, installed_version
    @{find};
@{body}
END
