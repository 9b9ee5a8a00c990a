"""Many threads over one retrieval session: every answer is the request's own, whatever the cache does meanwhile."""

from __future__ import annotations

import collections
import concurrent.futures
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hstu_compile.runtime.retrieval_request import RetrievalRequest, RetrievalResult
from tests.retrieval_cases import Served, asked, assert_right, history_of

THREADS = 6
USERS = 4
#: Threads hold 36 entries at most, three a call and those that they replace. Wherever these and the users' four lie,
#: one of the holes between them has room for another.
ROOM_FOR_ALL = 100


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    """Let threads take turns often, so that a race has a chance to show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def soak(served: Served, visits: int) -> list[tuple[RetrievalRequest, RetrievalResult]]:
    """Threads that visit users whose histories grow, now and then shrink, at any time.

    The last user's never have fewer than 16 events, so that whatever does not shrink them grows them by four at most.
    """
    histories = [history_of(user) for user in range(USERS)]

    def visit(thread: int) -> list[tuple[RetrievalRequest, RetrievalResult]]:
        rng, seen = np.random.default_rng(thread), []
        for step in range(visits):
            chosen = rng.integers(0, USERS, rng.integers(1, 4))
            fewest = [16 if user == USERS - 1 else 0 for user in chosen]
            call = [
                asked(int(user), histories[user], int(rng.integers(least, 21)), step)
                for user, least in zip(chosen, fewest, strict=True)
            ]
            seen += list(zip(call, served.session.encode(call), strict=True))
        return seen

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = [future.result(timeout=100) for future in [pool.submit(visit, thread) for thread in range(THREADS)]]
    return [each for part in found for each in part]


@pytest.mark.parametrize("users_in_cache", [1, 2.5, ROOM_FOR_ALL])
def test_soak_with_threads_that_grow_and_shrink_the_same_users(users_in_cache: float) -> None:
    served = Served(users_in_cache=users_in_cache, session_options={"staging_rows": 25})
    answers = soak(served, visits=5)
    for request, result in answers:
        assert_right(served, request, result)
    stats = served.session.stats()
    assert stats.requests == len(answers) > THREADS * 5
    assert stats.cache.used_bytes <= stats.cache.capacity_bytes
    outcomes = collections.Counter(result.cache for _, result in answers)
    assert stats.cache.misses == outcomes["miss"] >= USERS
    if users_in_cache == ROOM_FOR_ALL:
        # Whoever was there stays. In whatever order the threads come, what shrinks is stale, and of more than five
        # requests with five lengths at least one does not shrink.
        assert outcomes["miss"] == USERS
        assert sum(request.user == USERS - 1 for request, _ in answers) > 5
        assert outcomes["stale"]
        assert outcomes["hit"] + outcomes["appended"]
    # With less room, who still finds an entry is a matter of timing; one thread alone does, after all of that.
    back = [served.one(asked(0, history_of(0), 20, 0)).cache for _ in range(2)]
    assert back[1] == "hit"
    served.session.clear()
    assert served.session.stats().cache.used_bytes == 0
    alone = [asked(0, history_of(0), events, 0) for events in (16, 20, 20, 16)]
    results = [served.one(request) for request in alone]
    for request, result in zip(alone, results, strict=True):
        assert_right(served, request, result)
    # An entry that grows is another one beside the first, for which there is no room where only one fits.
    grown = "stale" if users_in_cache == 1 else "appended"
    assert [result.cache for result in results] == ["miss", grown, "hit", "stale"]


def test_growing_and_forgetting_one_user_at_once_tears_nothing() -> None:
    served, history, done = Served(), history_of(3), threading.Event()

    def forget() -> None:
        while not done.is_set():
            served.session.invalidate("ann")

    def grow(thread: int) -> None:
        for events in range(thread, 21, 2):
            request = asked("ann", history, events)
            assert_right(served, request, served.one(request))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        forgetting = pool.submit(forget)
        try:
            for future in [pool.submit(grow, thread) for thread in range(3)]:
                future.result(timeout=100)
        finally:
            done.set()
        forgetting.result()


def test_threads_that_ask_for_the_same_longer_history_encode_its_events_once() -> None:
    served, history, start = Served(), history_of(4), threading.Barrier(THREADS)
    served.one(asked("ann", history, 9))
    request = asked("ann", history, 12)

    def encode() -> RetrievalResult:
        start.wait()
        return served.one(request)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = [future.result(timeout=100) for future in [pool.submit(encode) for _ in range(THREADS)]]
    assert sorted(result.cache for result in results) == ["appended"] + ["hit"] * (THREADS - 1)
    assert sorted(served.calls("append")) == [(1, 1)] * (THREADS - 1) + [(4, 1)]
    for result in results:
        assert_right(served, request, result)


def test_closing_waits_for_a_history_that_is_being_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    prefill, request = served.graphs["prefill"], asked("ann", history_of(5), 9)
    running, go_on, run = threading.Event(), threading.Event(), prefill.run_resident

    def held(*args: Any, **options: Any) -> Any:
        running.set()
        assert go_on.wait(20)
        served.session._staging.allocate(0)  # raises if it is closed
        return run(*args, **options)

    monkeypatch.setattr(prefill, "run_resident", held)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        encoding = pool.submit(served.one, request)
        assert running.wait(20)
        closing = pool.submit(served.session.close)
        while not served.session._calls._closed:
            time.sleep(0.001)
        assert not closing.done()
        go_on.set()
        assert encoding.result(20).cache == "miss"
        closing.result(20)
    assert prefill.closed
