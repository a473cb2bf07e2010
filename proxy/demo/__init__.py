"""The proxy in front of a temporary PostgreSQL, to try it out."""
