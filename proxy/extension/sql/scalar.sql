BEGIN
  RETURN (@{call})[2];
END
