"""The functions as users know them: the table, what each does, and the reference made of it."""
