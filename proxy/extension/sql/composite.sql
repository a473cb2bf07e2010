DECLARE
  answer pg_catalog.text[] := @{call};
  result pg_catalog.record;
BEGIN
  IF answer[1] OPERATOR(pg_catalog.=) 'n' THEN
    RETURN NULL;
  END IF;
  SELECT @{fields} INTO result;
  RETURN result;
END
