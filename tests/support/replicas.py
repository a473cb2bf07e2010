"""Two proxies in front of one server, which know each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.support.servers import Connection, Proxy

SECRET: Final = "a secret of which the server's roles know nothing"


class Replicas(NamedTuple):
    """The two proxies."""

    first: Proxy
    second: Proxy

    @contextlib.contextmanager
    def sessions(self, **params: Any) -> Iterator[tuple[Connection, Connection]]:
        """A session through each of the two."""
        with self.first.connect(**params) as first, self.second.connect(**params) as second:
            yield first, second


def secret_in(path: Path, text: str = SECRET) -> Path:
    """The path of a file with a secret."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def options(secret_file: Path) -> list[str]:
    """The options that make a proxy a replica."""
    return ["--replica-secret-file", str(secret_file), "--auth-user", "postgres", "--auth-query="]


@contextlib.contextmanager
def replicas(upstream: str, *options: str) -> Iterator[Replicas]:
    """Starts two proxies, and waits until they know each other."""
    with Proxy(upstream, *options) as first, Proxy(upstream, *options) as second:
        for proxy in (first, second):
            proxy.wait_for_log("other replicas can be asked now")
        yield Replicas(first, second)
        for proxy in (first, second):
            assert "Traceback" not in proxy.log, proxy.log
