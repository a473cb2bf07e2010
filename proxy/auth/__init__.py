"""Clients' logins, and the credentials with which side backends log in as the same roles."""
