"""Reading SQL: what a text says, which calls it makes, and how it is changed where it must be."""
