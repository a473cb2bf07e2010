"""What goes by between a client and its server, and the batches that the proxy steps into."""
