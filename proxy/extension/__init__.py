"""CREATE EXTENSION pg_background: its objects in the database, and calls from inside it."""
