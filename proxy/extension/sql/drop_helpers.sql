-- The bodies are replaced as well. For the server they do not depend on the helpers.

items := ARRAY[pg_catalog.current_setting('client_min_messages')];
PERFORM pg_catalog.set_config('client_min_messages', 'warning', true);
@{drop_restored}
PERFORM pg_catalog.set_config('client_min_messages', items[1], true);
FOR item IN SELECT @{function_name} @{functions}
  AND p.proname OPERATOR(pg_catalog.<>) '@{marker}' AND @{is_helper}
LOOP EXECUTE pg_catalog.concat('DROP FUNCTION ', item); END LOOP;
