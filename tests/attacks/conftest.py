"""The scene of the attacks, for each module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.attacks import scene as scenery
from tests.attacks.scene import OWNERS, Scene
from tests.support.servers import Proxy, Server


@pytest.fixture(scope="module")
def scenes(server: Server, proxy: Proxy) -> Iterator[dict[str, Scene]]:
    """A scene for each owner of the extension."""
    yield from scenery.scenes(server, proxy)


@pytest.fixture(params=OWNERS)
def scene(request: pytest.FixtureRequest, scenes: dict[str, Scene]) -> Scene:
    """One of them."""
    found: Scene = scenes[request.param]
    return found


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the further servers each place has, by default, one of its usual CASES; they take turns,
    so that each case has some places. On the first server each place has all of them."""
    turns: dict[tuple[str, str], Iterator[int]] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or item.get_closest_marker("slow"):
            continue
        callspec = getattr(item, "callspec", None)
        if callspec is None or not callspec.indices.get("server"):
            continue
        place = callspec.params.get("place") or callspec.params.get("event")
        if place and "victim" in callspec.params:
            turn = turns.setdefault((item.originalname, place), itertools.count(len(turns)))
            if next(turn) % 3:
                item.add_marker(pytest.mark.exhaustive)
