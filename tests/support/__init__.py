"""The tools of the tests: servers, clients, recorders. tests/README.md has a map."""
