-- A role sees its own rows and those of the roles whose rights it has. The owner of the database or
-- of the extension sees all. A role must match by OID and by name: in another cluster, or after
-- DROP ROLE, one of the two may be another role's. A job is lost if its end is not written, and
-- both its backend and the one that would write it are gone.

SELECT h.pid, h.cookie, h.label, h.role, h.role_id, h.database, h.sql,
  h.queued_at, h.started_at, h.finished_at,
  CASE WHEN h.state OPERATOR(pg_catalog.=) 'running' AND a.pid IS NULL AND w.pid IS NULL
    THEN 'lost' ELSE h.state END AS state,
  h.attempts, h.row_count, h.command_tag, h.sqlstate, h.message, h.detail,
  h.progress_pct, h.progress_msg, h.proxy
FROM @{schema}.@{table} h
LEFT JOIN pg_catalog.pg_stat_get_activity(NULL) a ON a.pid OPERATOR(pg_catalog.=) h.backend_pid
  AND a.usesysid OPERATOR(pg_catalog.=) h.login_id
  AND (a.backend_start IS NULL OR a.backend_start OPERATOR(pg_catalog.<=) h.noted_at)
LEFT JOIN pg_catalog.pg_stat_get_activity(NULL) w ON w.pid OPERATOR(pg_catalog.=) h.writer_pid
  AND w.usesysid OPERATOR(pg_catalog.=) h.login_id
  AND (w.backend_start IS NULL OR w.backend_start OPERATOR(pg_catalog.<=) h.noted_at)
WHERE EXISTS(
    SELECT 1 FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) h.role_id
    AND r.rolname OPERATOR(pg_catalog.=) h.role AND pg_catalog.pg_has_role(r.oid, 'USAGE'))
  OR EXISTS(
    SELECT 1 FROM pg_catalog.pg_database d
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
    AND pg_catalog.pg_has_role(d.datdba, 'USAGE'))
  OR EXISTS(
    SELECT 1 FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) h.tableoid
    AND pg_catalog.pg_has_role(c.relowner, 'USAGE'))
