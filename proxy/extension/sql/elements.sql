CREATE FUNCTION @{schema}._pg_background_elements(text pg_catalog.text) RETURNS pg_catalog.text[]
LANGUAGE plpgsql SET array_nulls = on AS $body$
BEGIN
  RETURN CAST(text AS pg_catalog.text[]);
END
$body$
