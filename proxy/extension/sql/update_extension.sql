IF @{is_older} THEN @{no_path} END IF;
IF version OPERATOR(pg_catalog.=) installed_version THEN
  RAISE NOTICE USING MESSAGE = pg_catalog.format(
    'version "%s" of extension "pg_background" is already installed', version);
END IF;
@{find_granted}
IF pg_catalog.left(version, 2) OPERATOR(pg_catalog.<>) '1.'
  AND pg_catalog.left(installed_version, 2) OPERATOR(pg_catalog.=) '1.' THEN
  @{to_second_api}
END IF;
IF pg_catalog.left(version, 2) OPERATOR(pg_catalog.=) '1.' THEN @{types_1}
ELSE @{types_2}
END IF;
@{drop_helpers}
@{install}
