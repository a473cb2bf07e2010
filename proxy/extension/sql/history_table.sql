-- The outcomes of jobs. Only the owner may touch the table, whatever is granted: others write by
-- _pg_background_record, and read the view. With row security and no policy, even a GRANT ON ALL
-- TABLES shows nothing.

CREATE TABLE @{schema}.@{table} (
  role_id pg_catalog.oid NOT NULL,
  role pg_catalog.name NOT NULL,
  login_id pg_catalog.oid NOT NULL,
  database pg_catalog.name NOT NULL,
  pid pg_catalog.int4 NOT NULL,
  cookie pg_catalog.int8 NOT NULL,
  backend_pid pg_catalog.int4 NOT NULL,
  writer_pid pg_catalog.int4 NOT NULL,
  label pg_catalog.text,
  sql pg_catalog.text,
  queued_at pg_catalog.timestamptz,
  started_at pg_catalog.timestamptz,
  finished_at pg_catalog.timestamptz,
  state pg_catalog.text NOT NULL,
  attempts pg_catalog.int4,
  row_count pg_catalog.int8,
  command_tag pg_catalog.text,
  sqlstate pg_catalog.text,
  message pg_catalog.text,
  detail pg_catalog.text,
  progress_pct pg_catalog.int4,
  progress_msg pg_catalog.text,
  proxy pg_catalog.text,
  noted_at pg_catalog.timestamptz NOT NULL,
  expires_at pg_catalog.timestamptz NOT NULL,
  PRIMARY KEY (role_id, cookie, pid)
);
CREATE INDEX @{table}_of_role ON @{schema}.@{table} (role_id, noted_at);
CREATE INDEX @{table}_expires ON @{schema}.@{table} (expires_at);
ALTER TABLE @{schema}.@{table} ENABLE ROW LEVEL SECURITY;
COMMENT ON TABLE @{schema}.@{table} IS 'What became of jobs; for all to read: pg_background_history.'
