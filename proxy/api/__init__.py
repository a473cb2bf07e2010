"""The functions as users know them: their table, what each does, and the reference."""
