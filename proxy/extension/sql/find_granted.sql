-- The roles that may call the functions, as GRANT takes them.

SELECT pg_catalog.array_agg(DISTINCT CASE WHEN x.grantee OPERATOR(pg_catalog.=) 0 THEN 'PUBLIC'
    ELSE pg_catalog.quote_ident(r.rolname) END) INTO granted
  FROM pg_catalog.pg_proc p CROSS JOIN pg_catalog.aclexplode(p.proacl) x
  LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) x.grantee
  WHERE p.pronamespace OPERATOR(pg_catalog.=) namespace
  AND p.proname OPERATOR(pg_catalog.=) 'pg_background_launch_v2'
  AND x.grantee OPERATOR(pg_catalog.<>) owner;
