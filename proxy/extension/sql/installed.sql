(SELECT CAST(pg_catalog.array_cat(
    ARRAY[@{version}, CAST(p.oid AS pg_catalog.text),
      CAST(n.nspname OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true))
        AS pg_catalog.text),
      CAST(pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS pg_catalog.text),
      CAST(n.nspname AS pg_catalog.text)],
    ARRAY(@{allowed})) AS pg_catalog.text)
  @{find})
