-- The query of a session before its first call; `m` is the marker.

SELECT m.version, @{really}, @{alike}, CAST(m.oid AS pg_catalog.text), @{types}, @{speaks},
  pg_catalog.current_setting('client_min_messages')
FROM (SELECT 1) one
LEFT JOIN (SELECT @{version} AS version, p.oid, p.pronamespace @{find}) m ON true
