-- Functions, procedures, triggers, DO, notices of all levels.
CREATE FUNCTION add(a int, b int DEFAULT 10) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a + b';
SELECT add(1), add(1, 2), add(b => 5, a => 6);
SELECT add('x');
CREATE FUNCTION add(a text, b text) RETURNS text LANGUAGE sql AS $$SELECT a || '+' || b$$;
SELECT add('p', 'q'), add(1, 2);
CREATE FUNCTION fact(n int) RETURNS numeric LANGUAGE plpgsql AS $$
BEGIN
  IF n < 0 THEN RAISE EXCEPTION 'negative: %', n USING ERRCODE = '22023', HINT = 'try a positive one'; END IF;
  IF n < 2 THEN RETURN 1; END IF;
  RETURN n * fact(n - 1);
END$$;
SELECT fact(0), fact(5), fact(25);
SELECT fact(-1);
CREATE FUNCTION rows(n int) RETURNS TABLE (i int, s text) LANGUAGE plpgsql AS $$
BEGIN
  FOR i IN 1..n LOOP s := repeat('*', i); RETURN NEXT; END LOOP;
END$$;
SELECT * FROM rows(3);
SELECT * FROM rows(2) AS r (a, b) WHERE a > 1;
CREATE FUNCTION loud() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  RAISE DEBUG 'debug';
  RAISE LOG 'log';
  RAISE INFO 'info %', 1;
  RAISE NOTICE 'notice % and %', 'ä', NULL;
  RAISE WARNING 'warning' USING DETAIL = 'a detail', HINT = 'a hint', ERRCODE = '01123';
END$$;
SELECT loud();
SET client_min_messages = debug1;
SELECT loud();
SET client_min_messages = error;
SELECT loud();
RESET client_min_messages;
DO $$
DECLARE r record; total int := 0;
BEGIN
  FOR r IN SELECT i FROM generate_series(1, 3) AS i LOOP total := total + r.i; RAISE NOTICE 'at %', r.i; END LOOP;
  WHILE total > 0 LOOP total := total - 4; CONTINUE WHEN total > 1; EXIT; END LOOP;
  RAISE NOTICE 'left %', total;
END$$;
CREATE FUNCTION catch(x int) RETURNS text LANGUAGE plpgsql AS $$
DECLARE m text; d text; s text;
BEGIN
  RETURN (10 / x)::text;
EXCEPTION
  WHEN division_by_zero THEN
    GET STACKED DIAGNOSTICS m = MESSAGE_TEXT, s = RETURNED_SQLSTATE;
    RETURN s || ': ' || m;
END$$;
SELECT catch(2), catch(0), catch(NULL);
CREATE FUNCTION dyn(t text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE n bigint;
BEGIN
  EXECUTE format('SELECT count(*) FROM %I', t) INTO STRICT n;
  RETURN n;
END$$;
CREATE TABLE log (id serial, what text);
SELECT dyn('log');
SELECT dyn('no table');
CREATE TABLE acc (id int PRIMARY KEY, v int);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO log (what) VALUES (format('%s %s %s', TG_WHEN, TG_OP, coalesce(NEW.id, OLD.id)));
  IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
  IF NEW.v < 0 THEN RAISE EXCEPTION 'no debts' USING ERRCODE = 'P0042', TABLE = TG_TABLE_NAME; END IF;
  NEW.v := NEW.v * 2;
  RETURN NEW;
END$$;
CREATE TRIGGER audit BEFORE INSERT OR UPDATE OR DELETE ON acc FOR EACH ROW EXECUTE FUNCTION audit();
INSERT INTO acc VALUES (1, 10), (2, 20) RETURNING *;
UPDATE acc SET v = -1 WHERE id = 1;
UPDATE acc SET v = 7 WHERE id = 1 RETURNING v;
DELETE FROM acc WHERE id = 2;
SELECT * FROM log ORDER BY id;
CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE NOTICE 'statement % of %', TG_OP, TG_LEVEL; RETURN NULL; END$$;
CREATE TRIGGER stop AFTER TRUNCATE ON acc FOR EACH STATEMENT EXECUTE FUNCTION stop();
TRUNCATE acc;
ALTER TABLE acc DISABLE TRIGGER audit;
INSERT INTO acc VALUES (5, -5) RETURNING *;
CREATE PROCEDURE batch(INOUT n int) LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO acc VALUES (n, n); COMMIT;
  INSERT INTO acc VALUES (n + 1, n); ROLLBACK;
  n := n + 100;
END$$;
CALL batch(50);
SELECT * FROM acc ORDER BY id;
BEGIN;
CALL batch(60);
ROLLBACK;
CALL nothing();
SELECT batch(1);
CREATE FUNCTION broken() RETURNS int LANGUAGE plpgsql AS $$BEGIN RETURN nothing; END$$;
SELECT broken();
CREATE FUNCTION noreturn() RETURNS int LANGUAGE plpgsql AS $$BEGIN END$$;
SELECT noreturn();
DO $$BEGIN ASSERT 1 = 2, 'arithmetic holds'; END$$;
DO $$BEGIN RAISE; END$$;
DO $$DECLARE x int; BEGIN x := 'text'; END$$;
DO $$BEGIN CREATE TABLE acc (x int); EXCEPTION WHEN duplicate_table THEN RAISE NOTICE '% (%)', SQLERRM, SQLSTATE; END$$;
CREATE FUNCTION polym(anyelement, anyarray) RETURNS anyarray LANGUAGE sql AS 'SELECT array_prepend($1, $2)';
SELECT polym(1, ARRAY[2, 3]), polym('a'::text, ARRAY['b']);
CREATE FUNCTION vari(VARIADIC n int[]) RETURNS int LANGUAGE sql AS 'SELECT sum(i)::int FROM unnest(n) i';
SELECT vari(1, 2, 3), vari(VARIADIC ARRAY[4, 5]);
CREATE OPERATOR === (leftarg = int, rightarg = int, function = int4eq);
SELECT 1 === 1, 1 === 2;
CREATE FUNCTION refc() RETURNS refcursor LANGUAGE plpgsql AS $$DECLARE c refcursor := 'mine'; BEGIN OPEN c FOR SELECT generate_series(1, 3); RETURN c; END$$;
BEGIN;
SELECT refc();
FETCH ALL FROM mine;
COMMIT;
CREATE RULE divert AS ON INSERT TO acc WHERE NEW.id > 1000 DO INSTEAD NOTHING;
INSERT INTO acc VALUES (2000, 1);
CREATE EVENT TRIGGER on_ddl ON ddl_command_end EXECUTE FUNCTION audit();
\df
\sf add(int, int)
DROP FUNCTION add;
DROP FUNCTION add(int, int), add(text, text);
