"""Connections: to clients and to the server, their TLS, and how they are found and kept."""
