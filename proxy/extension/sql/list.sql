-- The label is the tenth column. A column definition list of nine leaves it out.

DECLARE
  answer pg_catalog.text[] := @{call};
  rows pg_catalog.text[] := @{schema}._pg_background_elements(answer[2]);
BEGIN
  BEGIN
    RETURN QUERY SELECT @{columns} FROM pg_catalog.generate_subscripts(rows, 1) i;
  EXCEPTION WHEN datatype_mismatch THEN
    RETURN QUERY SELECT @{but_one} FROM pg_catalog.generate_subscripts(rows, 1) i;
  END;
END
