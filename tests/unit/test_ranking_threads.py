"""Many threads over one ranking session: every answer is the request's own, whatever happens to the cache meanwhile."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.bench.soak_ranking import SoakPlan, SoakReport, soak
from tests.ranking_cases import Served, assert_same
from tests.ranking_fakes import FakeModel, spec_of
from tests.ranking_requests import request_of

THREADS = 8
PLAN = SoakPlan(requests=300, users=40, threads=THREADS, tolerance=1e-5)


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    """Let threads take turns often, so that a race has a chance to show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def expected(spec: RankingSpec, request: RankingRequest) -> RankingResult:
    preds, logits = FakeModel(spec).answer(request.history, request.context, request.candidates)
    return RankingResult(preds.astype("float32"), logits.astype("float32"), "off", 0)


SPECS = {"meta": spec_of(scaling="batch"), "prefix": spec_of("prefix")}
MEMORY: dict[str, tuple[GraphStats | None, int | None]] = {
    "in-place": (None, None),
    "staged": (GraphStats(), None),
    "whole-cache": (GraphStats(), 10_000),
}
#: Of two of memory, room and rule, every pair; the other half is slow.
QUICK = (
    ("in-place", 1, "meta"),
    ("in-place", 6.5, "prefix"),
    ("staged", 1, "prefix"),
    ("staged", 6.5, "meta"),
    ("whole-cache", 1, "meta"),
    ("whole-cache", 6.5, "prefix"),
)


@pytest.mark.parametrize(
    ("memory", "users_in_cache", "rule"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
        for each in itertools.product(MEMORY, (1, 6.5), SPECS)
    ],
)
def test_soak_with_a_cache_smaller_than_its_users(memory: str, users_in_cache: float, rule: str) -> None:
    spec, (graphs, cache_rows) = SPECS[rule], MEMORY[memory]
    served = Served(spec, users_in_cache, cache_rows=cache_rows, graph_stats=graphs, staging_rows=30)
    report = soak(served.session, PLAN)
    assert report.failures(PLAN, max_growth_mib=32) == []
    assert report.users_seen > users_in_cache * 2
    assert report.outcomes["miss"]
    # With room for one user, whether anybody who comes back with other events is still there is a matter of timing.
    assert users_in_cache == 1 or report.outcomes["stale"]
    assert report.worst_logit < 1e-5 < 0.1 < report.rms_logit
    alone = [request_of(spec, "ann", events, 3) for events in (9, 9, 5)]
    assert [served.one(request).cache for request in alone] == ["miss", "hit", "stale"]
    cache = served.session.stats().cache
    # Nothing is held that no request holds: forgetting every user frees every byte.
    served.session.clear()
    assert cache.used_bytes > 0
    assert served.session.stats().cache.used_bytes == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"requests": 299}, "299 of 300 requests"),
        ({"rms_logit": 0.0}, "all logits are zero"),
        ({"worst_logit": 1e-4}, "answers differ by 0.0001"),
        ({"worst_pred": float("nan")}, "answers differ by"),
        ({"budget_peak_bytes": 101}, "used 101 of 100 bytes"),
        ({"outcomes": {"miss": 300}}, "did not exercise the cache"),
        ({"evictions": 0}, "did not exercise the cache"),
        ({"rss_end_mib": 43.0}, "memory grew from 10.0 to 43.0 MiB"),
    ],
)
def test_the_soak_names_what_must_not_happen(changes: dict[str, object], match: str) -> None:
    good = SoakReport(
        requests=300,
        outcomes={"hit": 1},
        rms_logit=1.0,
        budget_bytes=100,
        budget_peak_bytes=100,
        evictions=1,
        rss_warm_mib=10,
        rss_end_mib=10,
    )
    assert good.failures(PLAN, max_growth_mib=32) == []
    (failure,) = dataclasses.replace(good, **changes).failures(PLAN, max_growth_mib=32)
    assert match in failure


def test_a_soak_finds_an_entry_that_is_reused_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_compile.runtime.ranking.validity_of", lambda request, spec: b"always")
    spec = spec_of()
    # Entries are found by rows and validity, so only histories of the same length can be confused: those of a user who
    # is asked about at two times.
    report = soak(Served(spec, users_in_cache=20).session, PLAN)
    assert any("answers differ" in failure for failure in report.failures(PLAN, max_growth_mib=32))


@pytest.mark.parametrize("rule", ["request", "prefix"])
def test_updating_and_scoring_one_user_at_once_tears_nothing(rule: str) -> None:
    """Every thread sends its own history of the same user, while another thread invalidates it."""
    spec = spec_of("prefix" if rule == "prefix" else "request")
    served = Served(spec, users_in_cache=3)
    mine = [request_of(spec, "ann", events, 6, seed=thread) for thread, events in enumerate([12, 12, 5, 0])]
    answers = [expected(spec, request) for request in mine]
    done = threading.Event()

    def invalidate() -> None:
        while not done.is_set():
            served.session.invalidate("ann")

    def score(thread: int) -> None:
        for _ in range(25):
            assert_same(served.one(mine[thread]), answers[thread])

    with concurrent.futures.ThreadPoolExecutor(len(mine) + 1) as pool:
        invalidator = pool.submit(invalidate)
        try:
            for future in [pool.submit(score, thread) for thread in range(len(mine))]:
                future.result()
        finally:
            done.set()
        invalidator.result()


def test_what_comes_after_an_update_does_not_see_what_was_before() -> None:
    spec = spec_of()
    served = Served(spec)
    request = request_of(spec, "ann", 9, 3)
    for _ in range(3):
        assert served.one(request).cache == "miss"
        assert served.one(request).cache == "hit"
        assert served.session.invalidate("ann")


def test_threads_that_ask_for_the_same_user_encode_it_once() -> None:
    spec = spec_of()
    served = Served(spec)
    request, start = request_of(spec, "ann", 12, 9), threading.Barrier(THREADS)

    def score() -> RankingResult:
        start.wait()
        return served.one(request)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = [future.result() for future in [pool.submit(score) for _ in range(THREADS)]]
    assert sorted(result.cache for result in results) == ["hit"] * (THREADS - 1) + ["miss"]
    assert served.calls("prefill") == [(12, 1)]


def test_calls_of_several_users_in_any_order_do_not_lock_one_another_out() -> None:
    """Each call wants more users than fit at once, in an order of its own."""
    spec = spec_of()
    served = Served(spec, users_in_cache=2.5)
    users = [request_of(spec, user, 12, 3, seed=user) for user in range(6)]
    answers = [expected(spec, request) for request in users]

    def score(thread: int) -> None:
        order = [(thread * 5 + step * (1 if thread % 2 else 5)) % 6 for step in range(6)]
        for _ in range(10):
            for user, result in zip(order, served.session.score([users[user] for user in order]), strict=True):
                assert_same(result, answers[user])

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(score, thread) for thread in range(THREADS)]:
            future.result(timeout=60)


@pytest.mark.parametrize(
    ("graphs", "cache_rows"),
    [(None, None), (GraphStats(), None), (None, 10_000)],
    ids=["in-place", "staged", "whole-cache"],
)
def test_closing_waits_for_a_pass_that_reads_the_memory(graphs: GraphStats | None, cache_rows: int | None) -> None:
    served = Served(spec_of(), cache_rows=cache_rows, graph_stats=graphs)
    request, score = request_of(spec_of(), "ann", 9, 3), served.graphs["score"]
    running, go_on, run = threading.Event(), threading.Event(), score.run

    def held(feeds: Mapping[str, Any]) -> dict[str, Any]:
        running.set()
        assert go_on.wait(20)
        assert not score.closed
        served.session._staging.allocate(0)  # raises if it is closed
        return run(feeds)

    score.run = held  # type: ignore[method-assign]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        scoring = pool.submit(served.one, request)
        assert running.wait(20)
        closing = [pool.submit(served.session.close) for _ in range(2)]
        while not served.session._calls._closed:
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="the session is closed"):
            served.one(request)
        assert not any(each.done() for each in closing)
        go_on.set()
        assert_same(scoring.result(20), expected(spec_of(), request))
        for each in closing:
            each.result(20)
    assert score.closed


def test_a_session_cannot_be_closed_from_inside_a_call() -> None:
    """As a signal's handler would: it would wait for itself."""
    served = Served(spec_of())
    request, score = request_of(spec_of(), "ann", 9, 3), served.graphs["score"]
    run = score.run

    def closing(feeds: Mapping[str, Any]) -> dict[str, Any]:
        with pytest.raises(RuntimeError, match="this thread is in a call of the session"):
            served.session.close()
        return run(feeds)

    score.run = closing  # type: ignore[method-assign]
    assert_same(served.one(request), expected(spec_of(), request))
    served.session.close()
    assert score.closed
