-- Queries that make rows of columns: $1 is a text[][] with one row for each column.

CREATE FUNCTION @{schema}._pg_background_queries(oids pg_catalog.text, modifiers pg_catalog.text)
RETURNS pg_catalog.text[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  columns text;
  sources text;
  types text;
  texts text;
  list text;
  queries text[];
BEGIN
  SELECT string_agg('c' || n, ', ' ORDER BY n),
      string_agg(format('pg_catalog.unnest($1[%s:%s])', n, n), ', ' ORDER BY n),
      string_agg(format('CAST(c%s AS %s)', n, type), ', ' ORDER BY n),
      -- aclitem and gtsvector have no binary form
      string_agg(format('CAST(c%s AS %s)', n,
        CASE WHEN id IN (1033, 3642) THEN 'pg_catalog.text' ELSE type END), ', ' ORDER BY n)
    INTO columns, sources, types, texts
    FROM (
      SELECT u.n, u.id, CASE WHEN u.modifier < 0 THEN format('%I.%I', s.nspname, t.typname)
        ELSE format_type(u.id, u.modifier) END AS type
      FROM ROWS FROM (unnest(CAST(oids AS oid[])), unnest(CAST(modifiers AS int4[])))
        WITH ORDINALITY u(id, modifier, n)
      JOIN pg_type t ON t.oid = u.id JOIN pg_namespace s ON s.oid = t.typnamespace
    ) c;
  IF columns IS NULL THEN
    RETURN ARRAY['SELECT'];
  END IF;
  FOREACH list IN ARRAY CASE WHEN types = texts THEN ARRAY[types] ELSE ARRAY[types, texts] END LOOP
    queries := queries || format('SELECT %s FROM ROWS FROM (%s) AS u(%s)', list, sources, columns);
  END LOOP;
  RETURN queries;
END
$body$
