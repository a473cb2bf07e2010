-- Whether a role may execute f. If a dump was restored without privileges, a function has no ACL.
-- That does not open it to PUBLIC, as CREATE EXTENSION had revoked that.

(pg_catalog.has_function_privilege(@{role}, f.oid, 'EXECUTE') AND (f.proacl IS NOT NULL
  OR pg_catalog.pg_has_role(@{role}, f.proowner, 'USAGE')
  OR COALESCE(pg_catalog.pg_has_role(@{role},
    CAST(pg_catalog.to_regrole('@{executor}') AS pg_catalog.oid), 'USAGE'), false)))
