"""The number of examples of a property test: all with ``pytest -m ''``, a third by default."""

from __future__ import annotations

import pytest

_share = 3


def configure(config: pytest.Config) -> None:
    """Must be called before the test modules are imported."""
    global _share
    _share = 3 if config.getoption("markexpr") else 1


def examples(all_of_them: int) -> int:
    """The number of examples to make, of this full number."""
    return all_of_them // _share
