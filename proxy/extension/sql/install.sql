-- Creates or replaces everything but the types, for `version`, in the schema schema_name with the
-- OID `namespace`. `granted`: the roles that may call the functions, as GRANT takes them.

@{choose_script}
checked := pg_catalog.set_config('check_function_bodies',
  pg_catalog.current_setting('check_function_bodies'), true);
PERFORM pg_catalog.set_config('check_function_bodies', 'off', true);
IF NOT EXISTS(SELECT 1 @{tables}) THEN
  @{create_table}
END IF;
EXECUTE @{script};
script := pg_catalog.replace(@{create_marker}, '<version>', version);
EXECUTE @{script};
PERFORM pg_catalog.set_config('check_function_bodies', checked, true);
FOR item IN
  SELECT pg_catalog.format('REVOKE ALL ON FUNCTION %s FROM PUBLIC',
      CAST(p.oid AS pg_catalog.regprocedure))
    @{functions} AND NOT @{is_helper}
  UNION ALL
  SELECT pg_catalog.format('REVOKE ALL ON TYPE %s FROM PUBLIC',
      CAST(c.reltype AS pg_catalog.regtype))
    @{types}
LOOP EXECUTE item; END LOOP;
IF NOT EXISTS(
  SELECT 1 FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) '@{executor}') THEN
  -- Two databases at once: the second waits for the first, and then the role is there.
  BEGIN
    EXECUTE 'CREATE ROLE @{executor} NOLOGIN';
  EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;
    WHEN insufficient_privilege THEN
      RAISE WARNING USING MESSAGE = 'role "@{executor}" could not be created', DETAIL = SQLERRM,
        HINT = 'Others need EXECUTE on the functions, as grant_pg_background_privileges(role) gives'
        ' it. When a role with CREATEROLE has created the role, ALTER EXTENSION pg_background'
        ' UPDATE grants to it.';
  END;
END IF;
IF EXISTS(
  SELECT 1 FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) '@{executor}') THEN
  granted := pg_catalog.array_append(granted, '@{executor}');
END IF;
-- ALTER DEFAULT PRIVILEGES may have granted what nobody is to have.
FOR item IN
  SELECT pg_catalog.format('REVOKE ALL ON %s FROM %s', CAST(c.oid AS pg_catalog.regclass),
      CASE WHEN x.grantee OPERATOR(pg_catalog.=) 0 THEN 'PUBLIC'
        ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(x.grantee)) END)
    FROM (SELECT c.oid, c.relowner, c.relacl @{tables}
      UNION ALL SELECT c.oid, c.relowner, c.relacl @{views}
        AND c.relname OPERATOR(pg_catalog.=) '@{history}') c
    CROSS JOIN pg_catalog.aclexplode(c.relacl) x
    WHERE x.grantee OPERATOR(pg_catalog.<>) c.relowner
LOOP EXECUTE item; END LOOP;
@{grant_history}
IF granted IS NOT NULL THEN
  FOR item IN @{grants} LOOP
    EXECUTE pg_catalog.concat(item, ' TO ', pg_catalog.array_to_string(granted, ', '));
  END LOOP;
END IF;
-- CREATE OR REPLACE leaves an object with the role that created it.
IF EXISTS(SELECT 1 @{functions} AND p.proowner OPERATOR(pg_catalog.<>) @{current_owner})
  OR EXISTS(SELECT 1 @{views} AND c.relowner OPERATOR(pg_catalog.<>) @{current_owner})
  OR EXISTS(SELECT 1 @{tables} AND c.relowner OPERATOR(pg_catalog.<>) @{current_owner}) THEN
  RAISE duplicate_object
    USING MESSAGE = 'an object of the extension''s name belongs to another role',
    HINT = 'Drop it, or create the extension in another schema.';
END IF;
