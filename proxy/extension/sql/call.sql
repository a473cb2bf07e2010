CREATE FUNCTION @{schema}._pg_background_call(
  function pg_catalog.text, arguments pg_catalog.text[], settings pg_catalog.text[])
RETURNS pg_catalog.text[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  answer text[] := @{schema}._pg_background_ask(CAST('call' AS text), ARRAY[
    function, CAST(pg_client_encoding() AS text),
    @{own},
    CAST(cardinality(arguments) AS text)] || arguments || settings);
BEGIN
  IF answer[1] = 'c' THEN
    answer := @{schema}._pg_background_ask(CAST('custom' AS text), ARRAY(
      SELECT @{schema}._pg_background_setting(s.name)
      FROM unnest(answer[2:cardinality(answer) - 3]) WITH ORDINALITY s(name, n) ORDER BY n));
  END IF;
  RETURN answer;
END
$body$
