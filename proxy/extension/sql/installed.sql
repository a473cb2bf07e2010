(SELECT CAST(pg_catalog.array_cat(
    ARRAY[@{version}, CAST(p.marker AS pg_catalog.text),
      CAST(n.nspname OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true))
        AS pg_catalog.text),
      CAST(pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS pg_catalog.text),
      CAST(n.nspname AS pg_catalog.text)],
    ARRAY(
      SELECT pg_catalog.concat(f.proname, '/', f.pronargs) FROM pg_catalog.pg_proc f
      WHERE f.proname OPERATOR(pg_catalog.=) ANY (CAST('{@{names}}' AS pg_catalog.name[]))
      AND f.pronamespace OPERATOR(pg_catalog.=) n.oid AND @{may_execute}
      UNION ALL
      SELECT pg_catalog.concat(c.relname, '/view') FROM pg_catalog.pg_class c
      WHERE c.relname OPERATOR(pg_catalog.=) ANY (CAST('{@{names}}' AS pg_catalog.name[]))
      AND c.relnamespace OPERATOR(pg_catalog.=) n.oid AND c.relkind OPERATOR(pg_catalog.=) 'v'
      AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
    )) AS pg_catalog.text)
  FROM (SELECT p.oid AS marker, p.* @{find}) p, pg_catalog.pg_namespace n
  WHERE n.oid OPERATOR(pg_catalog.=) p.pronamespace)
