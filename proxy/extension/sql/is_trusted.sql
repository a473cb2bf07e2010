-- Every superuser has the rights of the bootstrap superuser, OID 10.

(pg_catalog.pg_has_role(@{owner}, CAST(10 AS pg_catalog.oid), 'USAGE')
  OR pg_catalog.pg_get_userbyid(@{owner}) OPERATOR(pg_catalog.=)
    ANY (ARRAY[session_user, CAST('pg_database_owner' AS pg_catalog.name)])
  OR @{owner} OPERATOR(pg_catalog.=) (SELECT d.datdba FROM pg_catalog.pg_database d
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()))
