"""How many examples a property test has: all with ``pytest -m ''``, a third of them by default."""

from __future__ import annotations

import pytest

_share = 3


def configure(config: pytest.Config) -> None:
    """To be called before the test modules are imported."""
    global _share
    _share = 3 if config.getoption("markexpr") else 1


def examples(all_of_them: int) -> int:
    """The number to make."""
    return all_of_them // _share
