EXISTS(
  SELECT 1 FROM (SELECT p.oid @{find}) x, pg_catalog.pg_proc p, pg_catalog.pg_namespace n,
    pg_catalog.pg_proc a
  WHERE p.oid OPERATOR(pg_catalog.=) x.oid AND n.oid OPERATOR(pg_catalog.=) p.pronamespace
  AND n.nspname OPERATOR(pg_catalog.=) @{schema}
  AND a.pronamespace OPERATOR(pg_catalog.=) n.oid
  AND a.proname OPERATOR(pg_catalog.=) '@{function}' AND a.pronargs OPERATOR(pg_catalog.=) 0
  AND a.proowner OPERATOR(pg_catalog.=) p.proowner
  AND @{are_settled})
