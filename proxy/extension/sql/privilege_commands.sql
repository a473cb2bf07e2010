SELECT pg_catalog.format('@{verb} EXECUTE ON FUNCTION %s', CAST(p.oid AS pg_catalog.regprocedure))
  @{functions} AND NOT @{is_helper}
  AND p.proname OPERATOR(pg_catalog.<>) ALL (CAST('{@{for_administrators}}' AS pg_catalog.name[]))
UNION ALL
SELECT pg_catalog.format('@{verb} USAGE ON TYPE %s', CAST(c.reltype AS pg_catalog.regtype))
  @{types}
UNION ALL
SELECT pg_catalog.format('@{verb} SELECT ON %s', CAST(c.oid AS pg_catalog.regclass))
  @{views}
