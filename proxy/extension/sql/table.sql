DECLARE
  answer pg_catalog.text[] := @{call};
  rows pg_catalog.text[] := @{schema}._pg_background_elements(answer[2]);
BEGIN
  RETURN QUERY SELECT @{columns} FROM pg_catalog.generate_subscripts(rows, 1) i;
END
