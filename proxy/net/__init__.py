"""Connections to clients and to the server: TLS, listening sockets, and how they are handed
over."""
