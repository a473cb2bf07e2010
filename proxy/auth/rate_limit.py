"""Rate limits: a token bucket for each key.

Invariant: at most `MAX_KEYS` keys are remembered. A key is forgotten once its bucket is full again,
which changes nothing; while too many are not full, new keys share a bucket.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

MAX_KEYS: Final = 10_000

_OTHERS: Final = object()


@dataclass(slots=True)
class RateLimiter:
    """Buckets of `burst` tokens that gain `rate` tokens a second.

    A bucket may owe up to `max_waiting` tokens: so many callers may have to wait.
    """

    burst: float
    rate: float
    max_waiting: float = 0.0
    _buckets: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    # When to search for full buckets again.
    _look_again: float = 0.0

    def take(self, key: Hashable, now: float) -> float | None:
        """Take a token.

        Returns the seconds to wait before using it; None if the limit is exceeded.
        """
        if key not in self._buckets and len(self._buckets) >= MAX_KEYS:
            self._forget(now)
            key = key if len(self._buckets) < MAX_KEYS else _OTHERS
        tokens = self._tokens(key, now) - 1
        if tokens < -self.max_waiting:
            return None
        self._buckets[key] = tokens, now
        return max(0.0, -tokens / self.rate)

    def _tokens(self, key: Hashable, now: float) -> float:
        tokens, then = self._buckets.get(key, (self.burst, now))
        return min(self.burst, tokens + (now - then) * self.rate)

    def _forget(self, now: float) -> None:
        if now < self._look_again:
            return
        self._look_again = now + 1.0
        for key in [key for key in self._buckets if self._tokens(key, now) >= self.burst]:
            del self._buckets[key]


def client_key(peername: object) -> str:
    """The key of a connection: its IPv4 address, or its IPv6 /64 network, the least that a customer
    gets; one key for all Unix sockets.

    Args:
        peername: the socket's.
    """
    if not (isinstance(peername, tuple) and peername):
        return "local"
    try:
        address = ipaddress.ip_address(str(peername[0]).partition("%")[0])
    except ValueError:
        return str(peername[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)
