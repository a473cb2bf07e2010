-- Writes rows about its caller's jobs, and no others. It runs as the owner of the table, so
-- current_user does not tell who calls. But the text that the session sends is this call and
-- nothing else, so no code of another role is running: the caller is the session's own role. The
-- caller says what became of the job; the server says which role it is. Rows of ended jobs do not
-- change. Expired rows are deleted, and the oldest of a role with too many.

CREATE FUNCTION @{schema}._pg_background_record(rows pg_catalog.text[])
RETURNS pg_catalog.void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  own regtype := pg_typeof(CAST(NULL AS @{schema}.@{table}));
  caller name := CASE current_setting('role')
    WHEN 'none' THEN session_user ELSE current_setting('role') END;
  caller_id oid;
  session_id oid;
  edge timestamptz;
  number int4 := coalesce(array_length(rows, 1), 0);
BEGIN
  SELECT r.oid INTO caller_id FROM pg_roles r WHERE r.rolname = caller;
  SELECT r.oid INTO session_id FROM pg_roles r WHERE r.rolname = session_user;
  IF current_query() IS DISTINCT FROM concat('SELECT ',
      left(CAST(own AS text), -length('@{table}')), '_pg_background_record($1)')
    OR NOT EXISTS(SELECT 1 FROM pg_proc f, pg_type t WHERE t.oid = own
      AND f.pronamespace = t.typnamespace
      AND f.proname = ANY (CAST('{@{launching}}' AS name[])) AND @{may_execute}) THEN
    RAISE insufficient_privilege
      USING MESSAGE = 'permission denied for function _pg_background_record',
      DETAIL = 'It is for the proxy, which calls it for roles that may launch jobs.';
  END IF;
  IF number > @{most_at_once} OR array_length(rows, 2) <> @{fields} THEN
    RAISE invalid_parameter_value USING MESSAGE = 'malformed rows of jobs';
  END IF;
  FOR i IN 1 .. number LOOP
    IF rows[i][10] IS NULL THEN
      DELETE FROM @{schema}.@{table} h WHERE h.role_id = caller_id
        AND h.pid = CAST(rows[i][1] AS int4) AND h.cookie = CAST(rows[i][2] AS int8)
        AND h.state = 'running';
    ELSIF rows[i][10] NOT IN ('running', 'stopped', 'canceled', 'error', 'lost') THEN
      RAISE invalid_parameter_value USING MESSAGE = 'malformed rows of jobs';
    ELSE
      INSERT INTO @{schema}.@{table} AS h VALUES (
        caller_id, caller, session_id, current_database(),
        CAST(rows[i][1] AS int4), CAST(rows[i][2] AS int8),
        coalesce(CAST(rows[i][3] AS int4), 0), pg_backend_pid(), left(rows[i][4], 1024), left(rows[i][5], 8200),
        to_timestamp(CAST(rows[i][6] AS float8)), to_timestamp(CAST(rows[i][7] AS float8)),
        to_timestamp(CAST(rows[i][8] AS float8)), rows[i][10], CAST(rows[i][11] AS int4),
        CAST(rows[i][12] AS int8), left(rows[i][13], 64), left(rows[i][14], 5),
        left(rows[i][15], 4200), left(rows[i][16], 4200), CAST(rows[i][17] AS int4),
        left(rows[i][18], 4200), left(rows[i][19], 256), clock_timestamp(),
        clock_timestamp() + make_interval(secs => least(greatest(
          CAST(rows[i][9] AS float8), 0), 315360000))
      ) ON CONFLICT (role_id, cookie, pid) DO UPDATE SET
        backend_pid = excluded.backend_pid, writer_pid = excluded.writer_pid,
        started_at = excluded.started_at,
        finished_at = excluded.finished_at, state = excluded.state, attempts = excluded.attempts,
        row_count = excluded.row_count, command_tag = excluded.command_tag,
        sqlstate = excluded.sqlstate, message = excluded.message, detail = excluded.detail,
        progress_pct = excluded.progress_pct, progress_msg = excluded.progress_msg,
        noted_at = excluded.noted_at, expires_at = excluded.expires_at
        WHERE h.state = 'running';
    END IF;
  END LOOP;
  DELETE FROM @{schema}.@{table} h WHERE h.ctid = ANY (ARRAY(
    SELECT o.ctid FROM @{schema}.@{table} o WHERE o.expires_at < clock_timestamp()
    LIMIT number + 100 FOR UPDATE SKIP LOCKED));
  SELECT o.noted_at INTO edge FROM @{schema}.@{table} o WHERE o.role_id = caller_id
    ORDER BY o.noted_at DESC OFFSET @{most_of_role} LIMIT 1;
  IF edge IS NOT NULL THEN
    DELETE FROM @{schema}.@{table} h WHERE h.ctid = ANY (ARRAY(
      SELECT o.ctid FROM @{schema}.@{table} o WHERE o.role_id = caller_id AND o.noted_at <= edge
      LIMIT number + 100 FOR UPDATE SKIP LOCKED));
  END IF;
END
$body$
