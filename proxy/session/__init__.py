"""One client: its startup, the traffic between it and its server, and the calls in that traffic."""
