"""A batch with a call in it comes in whatever pieces the network makes, with pauses between.

Invariant: where a piece ends makes no difference. node-postgres' cursors send so: Close in a packet
of its own, and the Sync after it in the next.
"""

from __future__ import annotations

import time
from typing import Final

import pytest

from tests.conftest import StartProxy
from tests.support.recorder import Frontend, H, S, Sent, b, c, d, e, errors, kinds, p

PAUSE: Final = 0.05

P = p("SELECT * FROM pg_background_result($1) AS (n int)")
D, E, C = d(b"P", "c"), e("c"), c(b"P", "c")

# In a flight, None stands for the Bind, which has the job's pid.
FLIGHTS: Final[dict[str, list[list[Sent | None]]]] = {
    "PBDES": [[P, None, D, E, S]],
    "P B D E S": [[P], [None], [D], [E], [S]],
    "PBDE H S": [[P, None, D, E], [H], [S]],
    "PBDH E S": [[P, None, D, H], [E], [S]],
    "PBDHEH CS": [[P, None, D, H, E, H], [C, S]],
    "PBDEH P S": [[P, None, D, E, H], [p("SELECT 1")], [S]],
    "PBDEH C S": [[P, None, D, E, H], [C], [S]],
    "PBDH C H S": [[P, None, D, H], [C], [H], [S]],
    "PBD H S": [[P, None, D], [H], [S]],
    "PBD H EHS": [[P, None, D], [H], [E, H, S]],
    "P B D H E H S": [[P], [None], [D], [H], [E], [H], [S]],
}


@pytest.mark.parametrize("flights", FLIGHTS.values(), ids=FLIGHTS.keys())
def test_batches_in_flights(start_proxy: StartProxy, flights: list[list[Sent | None]]) -> None:
    # Of its own: a session that waits for ever would keep the others' proxy from stopping.
    proxy = start_proxy()
    with Frontend(proxy, timeout=5.0) as client:
        pid = client.value("SELECT pg_background_launch('SELECT generate_series(1, 3)')")
        for flight in flights:
            client.send(*(b("", "c", (pid.encode(),)) if sent is None else sent for sent in flight))
            time.sleep(PAUSE)
        answer = client.until_ready()
        assert not errors(answer), answer
        executed = any(E in flight for flight in flights)
        assert kinds(answer).count("D") == (3 if executed else 0)
        assert client.value("SELECT 'lives'") == "lives"
