-- The relation, ours excepted, that a query may mean by the name of a view.

SELECT pg_catalog.concat(@{number}, ' ', @{is_meant}) FROM pg_catalog.pg_class o
WHERE o.relname OPERATOR(pg_catalog.=) '@{called}' AND @{is_found}
  AND NOT @{has_marker} AND NOT @{is_member}
