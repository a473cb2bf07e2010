CREATE FUNCTION @{schema}._pg_background_hash(text pg_catalog.text) RETURNS pg_catalog.text LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $body$
SELECT @{hash}
$body$
