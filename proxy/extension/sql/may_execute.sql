-- Whether a role may execute f. A function without an ACL, as after the restore of a dump without
-- privileges, is not for PUBLIC: CREATE EXTENSION has revoked that.

(pg_catalog.has_function_privilege(@{role}, f.oid, 'EXECUTE') AND (f.proacl IS NOT NULL
  OR pg_catalog.pg_has_role(@{role}, f.proowner, 'USAGE')
  OR COALESCE(pg_catalog.pg_has_role(@{role},
    CAST(pg_catalog.to_regrole('@{executor}') AS pg_catalog.oid), 'USAGE'), false)))
