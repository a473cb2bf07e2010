"""Calls in SQL statements: where they stand, and what the server gets in their place."""
