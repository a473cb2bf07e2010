-- Revokes what grant.sql grants. Membership may have been granted before the extension was there.

IF namespace IS NULL THEN @{revoke_membership}
ELSE
  @{must_own}
  FOR command IN @{commands} LOOP
    command := pg_catalog.format('%s FROM %I', command, role_name); @{execute}
  END LOOP;
  @{revoke_membership}
END IF;
