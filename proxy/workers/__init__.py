"""Several processes that serve clients together."""
