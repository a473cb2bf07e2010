DECLARE
  @{declarations} command pg_catalog.text; namespace pg_catalog.oid; owner pg_catalog.oid;
BEGIN
  SELECT p.pronamespace, p.proowner INTO namespace, owner @{find};
  @{work} @{result}
EXCEPTION WHEN OTHERS THEN
  RAISE NOTICE 'Error @{doing} %: %', @{role}, SQLERRM; @{failed}
END;
