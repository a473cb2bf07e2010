-- The names of the proxy's functions where they are no calls: text, comments, names of other things.
SELECT 'pg_background_launch(''SELECT 1'')' AS text;
SELECT $$SELECT pg_background_result(1)$$ AS dollars;
SELECT 1 -- pg_background_launch('SELECT 1')
;
/* pg_background_launch('SELECT 1') /* nested pg_background_detach(1) */ */ SELECT 2;
SELECT E'pg_background_\'launch', U&'pg\005fbackground_launch', B'1' AS "pg_background_launch";
CREATE TABLE pg_background_log (pg_background_launch int, pg_background_result text);
INSERT INTO pg_background_log VALUES (1, 'pg_background_detach(1)'), (2, NULL);
SELECT pg_background_launch, pg_background_result FROM pg_background_log ORDER BY 1;
SELECT l.pg_background_launch + 1 AS pg_background_detach FROM pg_background_log l ORDER BY 1;
UPDATE pg_background_log SET pg_background_result = 'pg_background_launch' WHERE pg_background_launch = 2 RETURNING *;
SELECT pg_background_nothing FROM pg_background_log;
SELECT * FROM pg_background_nowhere;
CREATE FUNCTION pg_background_of_our_own(x int) RETURNS int LANGUAGE sql AS 'SELECT x * 2';
SELECT pg_background_of_our_own(21);
SELECT pg_background_of_our_own(i) FROM generate_series(1, 3) AS i;
SELECT pg_background_of_our_own('a');
SELECT pg_background_of_our_own();
SELECT pg_background_no_such_function(1);
SELECT 'pg_background_launch(';
SELECT "pg_background_launch";
SELEC pg_background_launch;
SELECT 'pg_background' 'launch';
SELECT 'unfinished pg_background_launch
continued', 1;
PREPARE pg_background_launch AS SELECT 'pg_background_result', $1::int;
EXECUTE pg_background_launch (5);
DEALLOCATE pg_background_launch;
BEGIN;
SAVEPOINT pg_background_launch;
DECLARE pg_background_result CURSOR FOR SELECT 'pg_background' || i FROM generate_series(1, 3) AS i;
FETCH ALL FROM pg_background_result;
ROLLBACK TO pg_background_launch;
COMMIT;
COPY pg_background_log FROM STDIN;
7	SELECT pg_background_launch('SELECT 1')
\.
COPY pg_background_log TO STDOUT;
SELECT 'pg_background_launch'\; SELECT 'pg_background_result' -- pg_background_detach(1)
;
DO $$BEGIN RAISE NOTICE 'pg_background_launch(%)', 1; END$$;
DO $$BEGIN RAISE EXCEPTION 'pg_background_launch failed' USING DETAIL = 'pg_background_result'; END$$;
LISTEN pg_background_launch;
NOTIFY pg_background_launch, 'pg_background_result';
UNLISTEN *;
SELECT 'ä pg_background_launch' AS "ö", nothing;
COMMENT ON TABLE pg_background_log IS 'pg_background_launch(''x'')';
CREATE VIEW pg_background_view AS SELECT pg_background_launch AS n FROM pg_background_log;
SELECT n FROM pg_background_view ORDER BY n;
SELECT proname FROM pg_proc WHERE proname LIKE 'pg\_background%' ORDER BY 1;
SELECT PG_BACKGROUND_OF_OUR_OWN(1), "pg_background_of_our_own"(2), public.pg_background_of_our_own(3);
DROP VIEW pg_background_view;
DROP TABLE pg_background_log;
DROP FUNCTION pg_background_of_our_own;
