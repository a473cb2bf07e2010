"""What tests are made with: servers, clients, recorders. tests/README.md has a map."""
