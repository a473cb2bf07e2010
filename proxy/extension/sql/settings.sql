-- What the session has set. It runs with the session's own search_path, which is one of them.

CREATE FUNCTION @{schema}._pg_background_settings() RETURNS pg_catalog.text[] LANGUAGE sql AS $body$
SELECT ARRAY(
  SELECT pg_catalog.unnest(ARRAY[s.name, s.setting])
  FROM pg_catalog.pg_settings s WHERE s.source OPERATOR(pg_catalog.=) 'session'
)
$body$
