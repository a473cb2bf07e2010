CREATE FUNCTION @{schema}._pg_background_setting(name pg_catalog.text) RETURNS pg_catalog.text
LANGUAGE @{lang} AS $body$@{setting}$body$
