"""The proxy: listeners, sessions, jobs, and what each pg_background function does.

The wire protocol is in the package ``protocol``, which knows neither sockets nor pg_background.
"""

__version__ = "0.1.0"
"""The version is only here; pyproject.toml reads it."""
