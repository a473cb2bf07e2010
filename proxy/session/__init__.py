"""One client: its startup, what passes between it and its server, and the calls in it."""
