SELECT pg_catalog.concat(f.proname, '/', f.pronargs) FROM pg_catalog.pg_proc f
WHERE f.proname OPERATOR(pg_catalog.=) ANY (CAST('{@{names}}' AS pg_catalog.name[]))
AND f.pronamespace OPERATOR(pg_catalog.=) n.oid AND @{may_execute}
