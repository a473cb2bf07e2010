-- Those of our names that other objects of the database have.

SELECT o.proname FROM pg_catalog.pg_proc o
WHERE o.proname OPERATOR(pg_catalog.=) ANY (CAST('{@{functions}}' AS pg_catalog.name[]))
  AND pg_catalog.strpos(o.prosrc, '@{tag}') OPERATOR(pg_catalog.=) 0 AND NOT @{function_is_member}
UNION SELECT o.relname FROM pg_catalog.pg_class o
WHERE o.relname OPERATOR(pg_catalog.=) ANY (CAST('{@{views}}' AS pg_catalog.name[]))
  AND NOT @{has_marker} AND NOT @{relation_is_member}
