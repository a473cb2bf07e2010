"""Jobs: what they are, what is known of them, and the backends that run them."""
