"""Jobs, their metadata, and the backends that run them."""
