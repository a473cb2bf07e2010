IF schema_name IS NULL THEN
  RAISE invalid_schema_name USING MESSAGE = 'no schema has been selected to create in';
END IF;
