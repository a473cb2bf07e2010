IF namespace IS NULL OR EXISTS(
  SELECT 1 FROM pg_catalog.pg_auth_members m, pg_catalog.pg_roles r, pg_catalog.pg_roles g
  WHERE m.member OPERATOR(pg_catalog.=) r.oid AND m.roleid OPERATOR(pg_catalog.=) g.oid
  AND g.rolname OPERATOR(pg_catalog.=) '@{executor}'
  AND r.rolname OPERATOR(pg_catalog.=) role_name) THEN
  command := pg_catalog.format('REVOKE @{executor} FROM %I', role_name); @{execute}
END IF;
