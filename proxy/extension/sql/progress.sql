DECLARE
  word pg_catalog.text := @{schema}._pg_background_setting(
    CAST('pg_background_proxy.job' AS pg_catalog.text));
BEGIN
  IF word IS NULL OR word OPERATOR(pg_catalog.=) '' THEN
    RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
      MESSAGE = 'pg_background_progress can only be called from a background worker';
  END IF;
  RAISE INFO '% % %', word, coalesce(CAST(pct AS pg_catalog.text), ''),
    CASE WHEN msg IS NULL THEN '' ELSE pg_catalog.textcat('=', msg) END;
END
