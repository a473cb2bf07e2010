"""Reads and quotes SQL: tokens, encodings, and SQL that the proxy writes itself."""
