IF marker IS NULL THEN
  RAISE undefined_object USING MESSAGE = 'extension "pg_background" does not exist';
END IF;
@{must_own}
