IF marker IS NULL THEN RAISE @{absent}
ELSE
  @{must_own}
  BEGIN
    @{drop_helpers}
    SELECT pg_catalog.string_agg(@{view_name}, ', ') INTO item @{views};
    IF item IS NOT NULL THEN EXECUTE pg_catalog.concat('DROP VIEW ', item, ' @{mode}'); END IF;
    SELECT pg_catalog.string_agg(@{view_name}, ', ') INTO item @{tables};
    IF item IS NOT NULL THEN EXECUTE pg_catalog.concat('DROP TABLE ', item, ' @{mode}'); END IF;
    SELECT pg_catalog.string_agg(@{function_name}, ', ') INTO item @{functions};
    IF item IS NOT NULL THEN EXECUTE pg_catalog.concat('DROP FUNCTION ', item, ' @{mode}'); END IF;
    SELECT pg_catalog.string_agg(@{type_name}, ', ') INTO item @{types};
    IF item IS NOT NULL THEN EXECUTE pg_catalog.concat('DROP TYPE ', item, ' @{mode}'); END IF;
  EXCEPTION WHEN dependent_objects_still_exist THEN
    GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
    RAISE dependent_objects_still_exist USING
      MESSAGE = 'cannot drop extension pg_background because other objects depend on it',
      DETAIL = detail, HINT = 'Use DROP ... CASCADE to drop the dependent objects too.';
  END;
END IF;
@{others}
