-- Lets role_name call the functions. GRANT only warns a role that may not grant, so must_own asks.

IF namespace IS NULL THEN
  IF NOT EXISTS(
    SELECT 1 FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) '@{executor}') THEN
    command := 'CREATE ROLE @{executor} NOLOGIN'; @{execute}
  END IF;
  command := pg_catalog.format('GRANT @{executor} TO %I', role_name); @{execute}
ELSE
  @{must_own}
  FOR command IN @{commands} LOOP
    command := pg_catalog.format('%s TO %I', command, role_name); @{execute}
  END LOOP;
END IF;
