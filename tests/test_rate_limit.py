"""The token buckets, by a clock of the test's own."""

from __future__ import annotations

import pytest

from proxy.auth import rate_limit
from proxy.auth.rate_limit import RateLimiter, client_key


def test_a_burst_then_one_at_a_time_then_none() -> None:
    limit = RateLimiter(burst=3, rate=2, max_waiting=2)
    assert [limit.take("a", 0) for _ in range(6)] == [0, 0, 0, 0.5, 1.0, None]
    assert limit.take("b", 0) == 0
    assert limit.take("a", 0.5) == 1.0
    assert [limit.take("a", 100) for _ in range(4)] == [0, 0, 0, 0.5]


def test_many_keys_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_KEYS", 10)
    limit = RateLimiter(burst=2, rate=1)
    for number in range(10):
        assert limit.take(number, 0) == 0
    # No room: the new ones share a bucket.
    assert [limit.take(f"new {number}", 0.1) for number in range(3)] == [0, 0, None]
    assert len(limit._buckets) == 11
    assert limit.take(0, 0.1) == 0  # those that are known keep theirs
    assert limit.take("late", 10) == 0
    assert len(limit._buckets) == 1


@pytest.mark.parametrize(
    ("peername", "key"),
    [
        (("127.0.0.1", 4711), "127.0.0.1"),
        (("::ffff:10.0.0.1", 4711, 0, 0), "10.0.0.1"),
        (("2001:db8:1:2:3:4:5:6", 4711, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 4711, 0, 2), "fe80::/64"),
        (("?", 1), "?"),
        ("", "local"),
        (b"", "local"),
        (None, "local"),
    ],
)
def test_whose_connection_it_is(peername: object, key: str) -> None:
    assert client_key(peername) == key
