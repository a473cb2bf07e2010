"""Who a client is: its login, and what a side backend logs in with in its place."""
