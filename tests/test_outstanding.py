"""The client's requests that the server has not answered: the table in `session.outstanding`, row
by row, on the message types alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol.kinds import F
from proxy.session.outstanding import OutstandingRequests, State

Event = Callable[[OutstandingRequests], object]

answered: Event = OutstandingRequests.answered
failed: Event = OutstandingRequests.failed
copy_in: Event = OutstandingRequests.copy_in
ready: Event = OutstandingRequests.ready


def sent(*kinds: int) -> Event:
    def event(requests: OutstandingRequests) -> None:
        for kind in kinds:
            requests.add(kind)

    return event


EXECUTED = (F.PARSE, F.BIND, F.EXECUTE)

CASES: dict[str, tuple[list[Event], State, list[int]]] = {
    "a Query": ([sent(F.QUERY)], State.ANSWERING, [F.QUERY]),
    "a Query that fails": ([sent(F.QUERY), failed], State.ANSWERING, [F.QUERY]),
    "its end": ([sent(F.QUERY), failed, ready], State.ANSWERING, []),
    "a pipeline, answered in part": (
        [sent(*EXECUTED, F.SYNC), answered, answered],
        State.ANSWERING,
        [F.EXECUTE, F.SYNC],
    ),
    "a pipeline that fails, with its Sync": (
        [sent(*EXECUTED, F.SYNC, F.PARSE), answered, failed],
        State.ANSWERING,
        [F.SYNC, F.PARSE],
    ),
    "without it": ([sent(*EXECUTED), answered, failed], State.SKIPPING, []),
    "what is skipped": ([sent(F.PARSE), failed, sent(*EXECUTED, F.QUERY)], State.SKIPPING, []),
    "a Sync that is not": (
        [sent(F.PARSE), failed, sent(F.BIND, F.SYNC, F.QUERY)],
        State.ANSWERING,
        [F.SYNC, F.QUERY],
    ),
    "an interception that has failed": ([OutstandingRequests.skip], State.SKIPPING, []),
    "COPY": ([sent(F.QUERY), copy_in], State.COPYING, [F.QUERY]),
    "a Sync meanwhile": ([sent(F.QUERY), copy_in, sent(F.SYNC)], State.COPYING, [F.QUERY]),
    "its Sync ahead": (
        [sent(*EXECUTED, F.SYNC), answered, answered, copy_in],
        State.COPYING,
        [F.EXECUTE],
    ),
    "CopyDone": ([sent(F.QUERY), copy_in, sent(F.COPY_DONE)], State.ANSWERING, [F.QUERY]),
    "CopyDone ahead": ([sent(F.QUERY, F.COPY_DONE), copy_in], State.ANSWERING, [F.QUERY]),
    "a Query meanwhile": ([sent(F.QUERY), copy_in, sent(F.QUERY)], State.ANSWERING, [F.QUERY]),
    "COPY that fails": ([sent(F.QUERY), copy_in, failed], State.ANSWERING, [F.QUERY]),
    "COPY in a pipeline that fails": ([sent(F.EXECUTE), copy_in, failed], State.SKIPPING, []),
    "a stray CopyFail": ([sent(F.COPY_FAIL)], State.ANSWERING, []),
    "a stray CopyFail behind a Query": (
        [sent(F.QUERY, F.COPY_FAIL, F.QUERY), ready],
        State.ANSWERING,
        [F.QUERY],
    ),
    "ReadyForQuery": ([sent(F.PARSE), failed, ready], State.ANSWERING, []),
}


@pytest.mark.parametrize(("events", "state", "queued"), CASES.values(), ids=CASES)
def test_what_is_outstanding(events: list[Event], state: State, queued: list[int]) -> None:
    requests = OutstandingRequests()
    requests.ready()  # the login
    for event in events:
        event(requests)
    assert requests.state is state
    assert list(requests._queue) == queued


def test_the_login_is_answered_like_a_sync() -> None:
    requests = OutstandingRequests()
    assert requests.owes_ready
    assert requests.ready() == F.SYNC
    assert not requests
