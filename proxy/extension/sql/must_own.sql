IF NOT pg_catalog.pg_has_role(owner, 'USAGE') THEN
  RAISE insufficient_privilege USING MESSAGE = 'must be owner of extension pg_background';
END IF;
