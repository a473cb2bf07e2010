"""Tests: the protocol on bytes alone, everything else against real servers and real clients."""
