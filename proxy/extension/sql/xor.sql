-- Enciphers and deciphers: data, in hexadecimal digits, XOR a pad made from the key.

CREATE FUNCTION @{schema}._pg_background_xor(data pg_catalog.text, key pg_catalog.text)
RETURNS pg_catalog.text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  pad text := '';
BEGIN
  FOR n IN 0 .. (length(data) - 1) / 64 LOOP
    pad := pad || @{block};
  END LOOP;
  -- varbit_send() puts the length, of four bytes, before the bits.
  RETURN substr(encode(varbit_send(
    CAST('x' || data AS varbit) # CAST('x' || left(pad, length(data)) AS varbit)), 'hex'), 9);
END
$body$
