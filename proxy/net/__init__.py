"""Connections to clients and to the server: TLS, listening sockets, and their takeover."""
