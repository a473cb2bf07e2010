SELECT pg_catalog.concat(c.relname, '/view') FROM pg_catalog.pg_class c
WHERE c.relname OPERATOR(pg_catalog.=) ANY (CAST('{@{names}}' AS pg_catalog.name[]))
AND c.relnamespace OPERATOR(pg_catalog.=) n.oid AND c.relkind OPERATOR(pg_catalog.=) 'v'
AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
