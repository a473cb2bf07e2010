CREATE FUNCTION @{schema}._pg_background_setting(name pg_catalog.text) RETURNS pg_catalog.text
LANGUAGE sql AS $body$SELECT pg_catalog.current_setting(name, true)$body$
