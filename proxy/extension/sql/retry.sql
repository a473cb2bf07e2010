-- The queries to try after one that did not fit the column definition list: the others; or the same
-- with the right type modifier, if the error's detail (in English) shows that only this differs.

CREATE FUNCTION @{schema}._pg_background_retry(queries pg_catalog.text[], detail pg_catalog.text,
  oids pg_catalog.text, modifiers pg_catalog.text)
RETURNS pg_catalog.text[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  matched text[] := regexp_matches(detail,
    '^Returned type .* does not match expected type (.*[(].*[)].*)'
    ' in column (?:".*" [(]position )?([0-9]+)[)]?[.]$');
  place int4 := matched[2];
BEGIN
  IF to_regtype(matched[1]) = (CAST(oids AS oid[]))[place]
    AND (CAST(modifiers AS int4[]))[place] IS NOT NULL THEN
    RETURN regexp_replace(queries[1], format('CAST[(]c%s AS .*?[)](, CAST[(]c| FROM )', place),
      format('CAST(c%s AS %s)', place, matched[1]) || chr(92) || '1') || queries[2:2];
  END IF;
  RETURN queries[2:cardinality(queries)];
END
$body$
