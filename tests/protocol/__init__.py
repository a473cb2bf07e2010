"""The protocol package, on bytes alone."""
