-- The settings that the session has set. It runs with the session's own search_path, which is one
-- of them. Of custom settings, it returns those whose names the proxy has told (see answer.sql).

CREATE FUNCTION @{schema}._pg_background_settings() RETURNS pg_catalog.text[] LANGUAGE plpgsql AS $body$
DECLARE
  custom pg_catalog.text := @{schema}._pg_background_setting(
    CAST('pg_background_proxy.custom' AS pg_catalog.text));
  settings pg_catalog.text[] := ARRAY(
    SELECT pg_catalog.unnest(ARRAY[s.name, s.setting])
    FROM pg_catalog.pg_settings s WHERE s.source OPERATOR(pg_catalog.=) 'session');
BEGIN
  IF custom OPERATOR(pg_catalog.<>) '' THEN
    settings := pg_catalog.array_cat(settings, ARRAY(
      SELECT pg_catalog.unnest(ARRAY[s.name, @{schema}._pg_background_setting(s.name)])
      FROM pg_catalog.unnest(pg_catalog.string_to_array(custom, pg_catalog.chr(10))) s(name)
      WHERE pg_catalog.strpos(s.name, '.') OPERATOR(pg_catalog.>) 0));
  END IF;
  RETURN settings;
END
$body$
