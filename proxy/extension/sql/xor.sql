-- Enciphers and deciphers: data, as hexadecimal digits, XOR a pad made of the key.

CREATE FUNCTION @{schema}._pg_background_xor(data pg_catalog.text, key pg_catalog.text)
RETURNS pg_catalog.text LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $body$
-- varbit_send() puts the length, of four bytes, before the bits.
SELECT substr(encode(varbit_send(CAST('x' || data AS varbit) # CAST('x' || left((
  SELECT string_agg(@{block}, '' ORDER BY n) FROM generate_series(0, (length(data) - 1) / 64) n
), length(data)) AS varbit)), 'hex'), 9)
$body$
