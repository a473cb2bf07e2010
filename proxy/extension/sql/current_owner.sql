COALESCE(owner, (SELECT o.oid FROM pg_catalog.pg_roles o
  WHERE o.rolname OPERATOR(pg_catalog.=) current_user))
