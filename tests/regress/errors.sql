-- Errors of many kinds, with their positions, in all of psql's verbosities.
SELEC 1;
SELECT 1 FORM t;
SELECT nothing;
SELECT 'é', "ö", nothing FROM (SELECT 1 AS x) s;
SELECT * FROM no.such.thing.at.all;
SELECT 1 +;
SELECT (1;
SELECT 1);
SELECT nofunction(1, 'a');
SELECT length(1, 2);
SELECT upper(ARRAY[1]);
SELECT 1 + 'a'::text;
SELECT 1 || 2;
SELECT now() + 1;
SELECT $1;
SELECT 'abc
def' AS lines, nothing,
  more;
INSERT INTO nowhere VALUES (1);
UPDATE pg_class SET nothing = 1;
DELETE FROM nowhere WHERE x;
CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT nothing';
CREATE FUNCTION f() RETURNS int LANGUAGE nolang AS '';
CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$BEGIN RETURN 1 END$$;
SELECT pg_sleep('a');
SELECT set_config('nothing', 'x', false);
SET nothing = 1;
SET work_mem = 'lots';
SET statement_timeout = -5;
SHOW nothing;
SELECT current_setting('no.such'), 1;
SELECT current_setting('no.such', true) IS NULL;
EXECUTE nothing;
DEALLOCATE nothing;
FETCH nothing;
CLOSE nothing;
RELEASE SAVEPOINT nothing;
ROLLBACK TO nothing;
COMMIT;
ROLLBACK;
GRANT SELECT ON nowhere TO nobody_at_all;
CREATE DATABASE regress BOGUS 1;
CREATE EXTENSION no_such_extension;
LOAD 'no_such_library';
COPY nowhere FROM STDIN;
SELECT 1 LIMIT 'a';
SELECT 1 ORDER BY 5;
SELECT CASE WHEN 1 THEN 2 END;
SELECT 1 WHERE 'abc';
SELECT 1 IN (SELECT 1, 2);
SELECT cast('x' AS nosuchtype);
SELECT array_fill(0, ARRAY[100000, 100000, 100000]);
SELECT repeat('x', 2000000000);
SELECT generate_series(1, 3) WHERE generate_series(1, 3) > 1;
SELECT 1 AS a, 2 AS a ORDER BY a;
DO $$BEGIN PERFORM 1/0; END$$;
DO LANGUAGE nolang '';
DO $$BEGIN RAISE EXCEPTION 'own %', 'error' USING ERRCODE = 'XX123', DETAIL = 'the detail', HINT = 'the hint', TABLE = 't', COLUMN = 'c', CONSTRAINT = 'k', DATATYPE = 'd', SCHEMA = 's'; END$$;
\errverbose
\set VERBOSITY terse
SELECT nothing;
DO $$BEGIN RAISE EXCEPTION 'terse' USING DETAIL = 'unseen'; END$$;
\set VERBOSITY sqlstate
SELECT nothing;
SELECT 1 / 0;
\set VERBOSITY default
\set SHOW_CONTEXT always
SELECT nothing;
DO $$BEGIN RAISE NOTICE 'with context'; END$$;
\set SHOW_CONTEXT never
DO $$BEGIN RAISE WARNING 'without'; END$$;
SELECT length(string_agg(x::text, ',')) AS this_is_a_long_line_with_an_error_far_to_the_right, 'padding padding padding padding', nothing FROM generate_series(1, 10) AS x;
SELECT 'statement_timeout';
SET statement_timeout = '50ms';
SELECT pg_sleep(5);
SET statement_timeout = 0;
SET lock_timeout = 10;
RESET lock_timeout;
\echo :ERROR :SQLSTATE :LAST_ERROR_SQLSTATE :LAST_ERROR_MESSAGE
