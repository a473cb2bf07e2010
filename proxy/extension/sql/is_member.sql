-- Whether the object `o` belongs to an extension of our name: the C extension.

EXISTS(SELECT 1 FROM pg_catalog.pg_depend d, pg_catalog.pg_extension e
  WHERE d.classid OPERATOR(pg_catalog.=) @{catalog} AND d.objid OPERATOR(pg_catalog.=) o.oid
  AND d.deptype OPERATOR(pg_catalog.=) 'e' AND d.refobjid OPERATOR(pg_catalog.=) e.oid
  AND e.extname OPERATOR(pg_catalog.=) 'pg_background')
