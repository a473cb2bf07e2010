"""Server connections of the proxy's own: opened, kept ready, lent."""
