-- The statement that a channel prepares for role_query(). Before 16 every member may SET ROLE.

PREPARE pg_background_role(pg_catalog.name, pg_catalog.name, pg_catalog.name, pg_catalog.int4,
  pg_catalog.oid[], pg_catalog.name, pg_catalog.text) AS
SELECT r.oid,
  CASE WHEN session_user OPERATOR(pg_catalog.<>) $2 THEN
    (SELECT s.rolsuper FROM pg_catalog.pg_roles s
      WHERE s.rolname OPERATOR(pg_catalog.=) session_user)
  WHEN CAST(pg_catalog.current_setting('server_version_num') AS pg_catalog.int4)
    OPERATOR(pg_catalog.<) 160000 THEN pg_catalog.pg_has_role(session_user, r.oid, 'MEMBER')
  ELSE pg_catalog.pg_has_role(session_user, r.oid, 'SET') END,
  COALESCE(@{may_execute}, @{is_executor}),
  CAST(ARRAY(SELECT o FROM pg_catalog.unnest($5) o
    WHERE pg_catalog.pg_has_role(r.oid, o, 'USAGE')) AS pg_catalog.text),
  @{speaks},
  (SELECT s.oid FROM pg_catalog.pg_roles s WHERE s.rolname OPERATOR(pg_catalog.=) session_user),
  -- An error, so that nothing behind it in the same Query is done.
  CAST(CASE WHEN $7 IS NULL OR $7 OPERATOR(pg_catalog.=) @{identity} THEN '0'
    ELSE 'the login does not hold any more' END AS pg_catalog.int4)
FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) $1
