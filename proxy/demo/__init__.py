"""The proxy in front of a PostgreSQL of its own, to try it."""
