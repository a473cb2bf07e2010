"""The scene of the attacks, for each module."""

from __future__ import annotations

from collections import Counter
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
    """On the first server each place gets, by default, the first of its usual CASES, in which a
    superuser is the victim, and one of the others; on further servers it gets one. They take turns,
    so that each case gets some places."""
    cases: dict[tuple[str, str, int], list[pytest.Function]] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or item.get_closest_marker("slow"):
            continue
        callspec = getattr(item, "callspec", None)
        if callspec is None or "victim" not in callspec.params:
            continue
        if place := callspec.params.get("place") or callspec.params.get("event"):
            case = (item.originalname, place, callspec.indices.get("server", 0))
            cases.setdefault(case, []).append(item)
    turns: Counter[int] = Counter()
    for (_, _, server), of_place in cases.items():
        first = () if server else of_place[:1]
        others = of_place[len(first) :]
        for number, item in enumerate(others):
            if number != turns[server] % len(others):
                item.add_marker(pytest.mark.exhaustive)
        turns[server] += 1
