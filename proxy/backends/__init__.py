"""The proxy's own server connections: opened, kept ready, lent."""
