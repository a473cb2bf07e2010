"""The scene of the attacks, for each module."""

from __future__ import annotations

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
