"""Reading and quoting SQL: tokens, encodings, and text that the proxy writes itself."""
