"""HTTP requests to the proxy, as a browser, a prober or Prometheus sends them."""

from __future__ import annotations

import base64
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import Any, Final, NamedTuple

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.servers import Proxy

OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"
PREFIX: Final = "pg_background_proxy_"

_SERVED: Final = r"serving metrics and the jobs page on (https?://\S+)"

Labels = tuple[tuple[str, str], ...]


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def address(proxy: Proxy) -> str:
    """The URL of the proxy's HTTP server, without a path."""
    return proxy.wait_for_log(_SERVED)[1]


def ask(
    url: str,
    *,
    user: tuple[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    context: ssl.SSLContext | None = None,
) -> Answer:
    """The answer to a request: a POST if it has a body, else a GET."""
    request = urllib.request.Request(url, body, dict(headers or {}))  # noqa: S310 - http
    if user is not None:
        basic = base64.b64encode(":".join(user).encode()).decode()
        request.add_header("Authorization", f"Basic {basic}")
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=30) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def families(proxy: Proxy) -> dict[str, Metric]:
    """The metrics as prometheus-client's own parser reads them, by name without our prefix."""
    answer = ask(f"{address(proxy)}/metrics", headers={"Accept": OPENMETRICS})
    assert answer.status == 200, answer.text
    assert re.match("application/openmetrics-text; *version=1.0.0", answer.headers["Content-Type"])
    found = read(answer.body)
    assert all(name.startswith(PREFIX) for name in found)
    return {name.removeprefix(PREFIX): family for name, family in found.items()}


def read(body: bytes) -> dict[str, Metric]:
    """The metric families of a text in OpenMetrics."""
    parsed = text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    return {family.name: family for family in parsed}


class Metrics:
    """Fetches the metrics."""

    def __init__(self, proxy: Proxy) -> None:
        self._values = {
            (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
            for family in families(proxy).values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of a sample; 0 if there is none."""
        return self._values.get((name, tuple(sorted(labels.items()))), 0.0)

    def all(self, name: str) -> dict[Labels, float]:
        """The samples of a metric, by their labels."""
        return {labels: value for (known, labels), value in self._values.items() if known == name}
