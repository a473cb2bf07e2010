-- The functions, ours excepted, that a call may mean by its name and the number of its arguments.

SELECT pg_catalog.concat(@{number}, ' ', @{is_meant}) FROM pg_catalog.pg_proc o
WHERE o.proname OPERATOR(pg_catalog.=) '@{called}' AND @{is_found}
  AND o.pronargs OPERATOR(pg_catalog.-) o.pronargdefaults OPERATOR(pg_catalog.<=) @{given}
  AND (o.pronargs OPERATOR(pg_catalog.>=) @{given} OR o.provariadic OPERATOR(pg_catalog.<>) 0)
  AND pg_catalog.strpos(o.prosrc, '@{tag}') OPERATOR(pg_catalog.=) 0 AND NOT @{is_member}
