-- An application written for the C extension pg_background: functions, procedures, triggers and
-- views that launch, wait for and look at background jobs. It is loaded and used as it stands.

CREATE EXTENSION IF NOT EXISTS pg_background WITH SCHEMA public;
COMMENT ON EXTENSION pg_background IS 'Run SQL queries in the background';

CREATE SCHEMA app;
CREATE TABLE app.accounts (id int PRIMARY KEY, balance numeric NOT NULL CHECK (balance >= 0));
CREATE TABLE app.audit_log (at timestamptz DEFAULT now(), who text DEFAULT current_user, event text);
CREATE TABLE app.failures (sqlstate text, message text);
CREATE TABLE app.parts (n int, total bigint);
CREATE TABLE app.handles (name text PRIMARY KEY, h pg_background_handle);
INSERT INTO app.accounts SELECT i, 100 FROM generate_series(1, 5) i;

-- Autonomous transactions, with the functions of version 1.

CREATE FUNCTION app.log_event(event text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  result text;
BEGIN
  SELECT * INTO result FROM pg_background_result(pg_background_launch(
    format('INSERT INTO app.audit_log (event) VALUES (%L)', event))) AS (result text);
END $$;

CREATE FUNCTION app.autonomous(command text) RETURNS text LANGUAGE sql AS $$
  SELECT r.result FROM pg_background_result(pg_background_launch(command)) AS r(result text)
$$;

-- With a handle, forgotten at once.

CREATE FUNCTION app.log_audit(e text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  h pg_background_handle;
BEGIN
  h := pg_background_submit_v2(format('INSERT INTO app.audit_log (event) VALUES (%L)', e));
  PERFORM pg_background_wait_v2(h.pid, h.cookie);
  PERFORM pg_background_detach_v2(h.pid, h.cookie);
END $$;

CREATE FUNCTION app.accounts_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM app.log_event(format('%s %s: %s -> %s', TG_OP, NEW.id, OLD.balance, NEW.balance));
  RETURN NEW;
END $$;
CREATE TRIGGER accounts_audit BEFORE UPDATE ON app.accounts
  FOR EACH ROW EXECUTE PROCEDURE app.accounts_audit();

CREATE FUNCTION app.transfer(source int, target int, amount numeric) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE app.accounts SET balance = balance - amount WHERE id = source;
  UPDATE app.accounts SET balance = balance + amount WHERE id = target;
  RETURN true;
EXCEPTION WHEN check_violation THEN
  PERFORM app.log_audit(format('refused: %s from %s', amount, source));
  RETURN false;
END $$;

-- Errors of a job are errors of who fetches it.

CREATE FUNCTION app.try(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  result text;
BEGIN
  SELECT r.x INTO result FROM pg_background_result(pg_background_launch(command)) AS r(x text);
  RETURN result;
EXCEPTION
  WHEN undefined_object THEN RETURN 'undefined object: ' || SQLERRM;
  WHEN division_by_zero THEN RETURN SQLSTATE || ' ' || SQLERRM;
END $$;

-- Work in parallel: launch all, then collect.

CREATE FUNCTION app.fan_out(parts int) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  pids int[];
  pid int;
  part bigint;
  total bigint := 0;
BEGIN
  FOR i IN 1..parts LOOP
    pids := pids || pg_background_launch(format('SELECT sum(x) FROM generate_series(%s, %s) x',
      (i - 1) * 100 + 1, i * 100));
  END LOOP;
  FOREACH pid IN ARRAY pids LOOP
    SELECT s INTO part FROM pg_background_result(pid) AS (s bigint);
    total := total + part;
  END LOOP;
  RETURN total;
END $$;

CREATE PROCEDURE app.fan_out_and_commit(parts int) LANGUAGE plpgsql AS $$
DECLARE
  i int;
BEGIN
  FOR i IN 1..parts LOOP
    INSERT INTO app.parts SELECT i, s FROM pg_background_result(
      pg_background_launch(format('SELECT sum(x) FROM generate_series(1, %s) x', i))) AS (s bigint);
    COMMIT;
  END LOOP;
END $$;

CREATE FUNCTION app.finished(handles pg_background_handle[]) RETURNS SETOF text
LANGUAGE sql AS $$
  SELECT o.state || ' ' || coalesce(o.command_tag, '') FROM pg_background_drain_v2(handles, 60000) o
$$;

CREATE FUNCTION app.maintain(pattern text) RETURNS TABLE (relation text, done boolean)
LANGUAGE sql AS $$
  SELECT t.tablename::text, pg_background_wait_v2_timeout(l.pid, l.cookie, 60000)
  FROM pg_tables t, LATERAL pg_background_launch_v2(
    format('ANALYZE %I.%I', t.schemaname, t.tablename), 0, 'a-' || t.tablename) l
  WHERE t.schemaname = 'app' AND t.tablename LIKE pattern
  ORDER BY 1
$$;

CREATE VIEW app.jobs AS
  SELECT pid, state, label FROM pg_background_list WHERE label LIKE 'app-%';
CREATE VIEW app.busy AS
  SELECT a.pid, a.pgbg_state, a.query FROM pg_background_activity a JOIN app.jobs USING (pid);
CREATE VIEW app.counts AS SELECT workers_launched > 0 AS launched FROM pg_background_stats_v2();
CREATE VIEW app.now_there AS
  SELECT n FROM pg_background_result(pg_background_launch('SELECT count(*) FROM app.accounts'))
    AS (n bigint);

CREATE ROLE app_user;
GRANT USAGE ON SCHEMA app TO app_user;
GRANT ALL ON ALL TABLES IN SCHEMA app TO app_user;
SELECT grant_pg_background_privileges('app_user');
