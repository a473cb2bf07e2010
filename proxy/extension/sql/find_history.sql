-- The schema (quoted) of the extension whose history takes the rows of this session's jobs. A
-- function that an untrusted role has put there does not count.

SELECT pg_catalog.quote_ident(n.nspname)
FROM (SELECT p.oid, p.pronamespace, p.proowner @{find}) p, pg_catalog.pg_namespace n,
  pg_catalog.pg_proc f, pg_catalog.pg_class c
WHERE n.oid OPERATOR(pg_catalog.=) p.pronamespace
AND f.pronamespace OPERATOR(pg_catalog.=) n.oid
AND f.proname OPERATOR(pg_catalog.=) '_pg_background_record'
AND f.proowner OPERATOR(pg_catalog.=) p.proowner
AND f.proargtypes OPERATOR(pg_catalog.=) CAST('1009' AS pg_catalog.oidvector)
AND c.relnamespace OPERATOR(pg_catalog.=) n.oid
AND c.relname OPERATOR(pg_catalog.=) '@{view}'
AND c.relowner OPERATOR(pg_catalog.=) p.proowner
