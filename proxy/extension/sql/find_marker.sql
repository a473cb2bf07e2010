FROM pg_catalog.pg_proc p, pg_catalog.pg_namespace n
WHERE p.proname OPERATOR(pg_catalog.=) '@{marker}' AND p.pronargs OPERATOR(pg_catalog.=) 0
  AND @{version} OPERATOR(pg_catalog.=) ANY (CAST('{@{versions}}' AS pg_catalog.text[]))
  AND n.oid OPERATOR(pg_catalog.=) p.pronamespace
  AND @{owner_is_trusted} AND @{schema_is_trusted}
ORDER BY pg_catalog.pg_has_role(p.proowner, CAST(10 AS pg_catalog.oid), 'USAGE') DESC, p.oid
LIMIT 1
