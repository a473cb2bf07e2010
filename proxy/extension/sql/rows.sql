-- Rows whose types only the job and the caller's column definition list know. A function cannot see
-- the list, so it tries queries that return no rows: first with the job's own types, then with text
-- for types that have no binary form.

DECLARE
  answer pg_catalog.text[] := @{call};
  rows pg_catalog.text[];
  queries pg_catalog.text[];
  datestyle pg_catalog.text := pg_catalog.current_setting('datestyle');
  intervalstyle pg_catalog.text := pg_catalog.current_setting('intervalstyle');
  error pg_catalog.text;
BEGIN
  IF answer[1] OPERATOR(pg_catalog.=) 't' THEN
    BEGIN
      RETURN QUERY SELECT e FROM pg_catalog.unnest(@{schema}._pg_background_elements(answer[2])) e;
    EXCEPTION WHEN datatype_mismatch THEN
      RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE = 'remote query did not return'
        ' a result set, but result rowtype is not a single text column';
    END;
    RETURN;
  END IF;
  IF answer[1] OPERATOR(pg_catalog.<>) 'r' THEN
    RETURN;
  END IF;
  queries := @{schema}._pg_background_queries(answer[5], answer[6]);
  WHILE pg_catalog.cardinality(queries) OPERATOR(pg_catalog.>) 0 LOOP
    BEGIN
      RETURN QUERY EXECUTE pg_catalog.textcat(queries[1], ' LIMIT 0') USING rows;
      EXIT;
    EXCEPTION WHEN datatype_mismatch THEN
      GET STACKED DIAGNOSTICS error = PG_EXCEPTION_DETAIL;
      queries := @{schema}._pg_background_retry(queries, error, answer[5], answer[6]);
    END;
  END LOOP;
  IF pg_catalog.cardinality(queries) OPERATOR(pg_catalog.=) 0 THEN
    RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE =
      'remote query result rowtype does not match the specified FROM clause rowtype';
  END IF;
  LOOP
    rows := @{schema}._pg_background_elements(answer[7]);
    IF answer[3] IS NOT NULL THEN
      PERFORM pg_catalog.set_config('datestyle', answer[3], true),
        pg_catalog.set_config('intervalstyle', answer[4], true);
    END IF;
    RETURN QUERY EXECUTE queries[1] USING rows;
    IF answer[3] IS NOT NULL THEN
      PERFORM pg_catalog.set_config('datestyle', datestyle, true),
        pg_catalog.set_config('intervalstyle', intervalstyle, true);
    END IF;
    EXIT WHEN answer[2] OPERATOR(pg_catalog.=) 'f';
    answer := @{schema}._pg_background_answer(answer[8:10], CAST(NULL AS pg_catalog.text[]));
  END LOOP;
END
