-- Large results, wide rows, long statements.
SELECT i, md5(i::text) FROM generate_series(1, 3000) AS i;
SELECT repeat('x', 100000) AS long_value;
SELECT length(repeat('ö', 1000000));
SELECT md5(string_agg(i::text, ',' ORDER BY i)) FROM generate_series(1, 100000) AS i;
SELECT string_agg(format('%s AS c%s', i, i), ', ') AS columns FROM generate_series(1, 300) AS i \gset
SELECT :columns;
SELECT repeat('very long ', 20000) AS literal \gset
SELECT md5(:'literal'), length(:'literal');
SELECT repeat(' + 1', 2000) AS terms \gset
SELECT 0 :terms AS sum;
SELECT repeat('(', 20000) || '1' || repeat(')', 20000) AS parens \gset
SELECT :parens;
CREATE TABLE big (id int, t text);
INSERT INTO big SELECT i, repeat(md5(i::text), 50) FROM generate_series(1, 500) AS i;
SELECT * FROM big ORDER BY id LIMIT 100;
SELECT array_agg(id ORDER BY id) FROM big;
COPY big TO STDOUT;
SELECT id, length(t) FROM big WHERE t LIKE '%abc%' ORDER BY id;
SELECT jsonb_agg(b ORDER BY id) FROM (SELECT id, left(t, 10) AS t FROM big) b;
DO $$BEGIN FOR i IN 1..500 LOOP RAISE NOTICE 'notice number %', i; END LOOP; END$$;
DO $$BEGIN RAISE NOTICE '%', repeat('n', 50000); END$$;
DO $$BEGIN RAISE EXCEPTION '%', repeat('e', 200000); END$$;
SELECT repeat('a', 200000)::int;
SELECT 1 AS "a name that is longer than sixty-three bytes, which PostgreSQL will cut off with a notice";
SELECT NULL, '', ' ', E'\n' FROM generate_series(1, 50);
SELECT FROM generate_series(1, 3);
SELECT;
DROP TABLE big;
