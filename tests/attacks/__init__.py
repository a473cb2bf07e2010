"""Attacks by code of others that runs in a session through the proxy."""
