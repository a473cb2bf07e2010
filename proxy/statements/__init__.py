"""Calls in SQL statements: where they are, and what the server gets in their place."""
