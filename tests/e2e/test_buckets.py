"""Bundles of Meta's checkpoints, and histories that grow, opened in buckets: the answers are those of exact shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile import Buckets, Ladder, load_bundle, open_ranking_session, open_retrieval_session
from hstu_compile.errors import UsageError
from hstu_compile.runtime.bucketed_session import BucketedSession
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.serving.answering import open_answerer
from hstu_compile.serving.settings import RuntimeSettings
from tests.bucketed_cases import REORDERED, assert_rows_equal, assert_same_scores, assert_same_users
from tests.e2e.conftest import Build
from tests.e2e.test_build_incremental import PLAIN, build, history_of, request_of
from tests.e2e.test_build_ranking import KV_BUDGET, built_golden, golden_requests
from tests.e2e.test_build_ranking import golden_feeds as ranking_feeds
from tests.ranking_requests import request_of as ranking_request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

COARSE = Buckets(events=Ladder((100, 700, 4096)), candidates=Ladder((5, 100, 700)), sequences=Ladder((3, 8)))
few = settings(max_examples=10, deadline=None)
SIZES = st.tuples(st.integers(0, 2), st.integers(0, 120), st.integers(0, 20))


@pytest.fixture(scope="module")
def ranking(build_ranking_fixture: Build) -> Iterator[tuple[RankingSession, RankingSession]]:
    """In buckets; at exact shapes."""
    bundle = built_golden(build_ranking_fixture)
    with (
        open_ranking_session(bundle, kv_budget_bytes=KV_BUDGET, buckets=COARSE) as bucketed,
        open_ranking_session(bundle, kv_budget_bytes=KV_BUDGET) as exact,
    ):
        yield bucketed, exact


@few
@given(calls=st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=1, max_size=2))
def test_metas_ranking_model_scores_as_at_exact_shapes(
    ranking: tuple[RankingSession, RankingSession], calls: list[list[tuple[int, int, int]]]
) -> None:
    bucketed, exact = ranking
    for session in ranking:
        session.clear()
    spec = exact.spec
    for seed, sizes in enumerate(calls):
        batch = [
            ranking_request(spec, user, min(events, spec.max_history_len), asked, seed) for user, events, asked in sizes
        ]
        found, expected = bucketed.score(batch), exact.score(batch)
        assert_same_scores(found, expected)
        assert [each.cache for each in found] == [each.cache for each in expected]
        assert_same_scores(bucketed.score_packed(batch), exact.score_packed(batch))
    assert all(each.exact == 0 for each in bucketed.stats().buckets.values())


def test_the_originals_users_in_buckets(build_ranking_fixture: Build, ranking_golden: dict[str, Any]) -> None:
    bundle = built_golden(build_ranking_fixture)
    requests = golden_requests(ranking_golden, "b")
    with (
        open_ranking_session(bundle, kv_budget_bytes=1 << 23, buckets=Buckets()) as bucketed,
        open_ranking_session(bundle, kv_budget_bytes=1 << 23) as exact,
    ):
        assert_same_scores(bucketed.score(requests), exact.score(requests))
        stats = bucketed.stats().buckets
        assert all(sum(stats[name].passes.values()) > 0 for name in ("prefill", "score"))
    feeds = ranking_feeds(ranking_golden, "a")
    with load_bundle(bundle, buckets=COARSE) as bucketed_bundle, load_bundle(bundle) as exact_bundle:
        found, expected = bucketed_bundle.run(feeds), exact_bundle.run(feeds)
        assert_rows_equal(found["preds"], expected["preds"])
        session = bucketed_bundle.session
        assert isinstance(session, BucketedSession)
        assert session.bucket_stats.added_rows > 0


def test_metas_retrieval_model_answers_as_at_exact_shapes(build_fixture: Build, golden_feeds: dict[str, Any]) -> None:
    bundle = build_fixture("--fp32", "--top-k", 1682, "--backend", "onnx").path
    offsets = golden_feeds["seq_offsets"]
    with load_bundle(bundle, buckets=COARSE) as bucketed, load_bundle(bundle) as exact:
        for first, last in ((0, 1), (2, 4), (3, 8), (0, 16)):
            rows = slice(offsets[first], offsets[last])
            feeds = {name: golden_feeds[name][rows] for name in ("item_ids", "timestamps")}
            feeds |= {
                "seq_offsets": offsets[first : last + 1] - offsets[first],
                "request_timestamps": golden_feeds["request_timestamps"][first:last],
            }
            found, expected = bucketed.run(feeds), exact.run(feeds)
            assert_rows_equal(found["user_embeddings"], expected["user_embeddings"])
            assert found["top_items"].shape == expected["top_items"].shape
            np.testing.assert_array_equal(found["top_items"][:, :10], expected["top_items"][:, :10])


@pytest.fixture(scope="module")
def growing(build_small: Build) -> Iterator[tuple[RetrievalSession, RetrievalSession]]:
    """In buckets; at exact shapes."""
    bundle = build(build_small, *PLAIN).path
    buckets = Buckets(events=Ladder((16, 100)), sequences=Ladder((3, 8)))
    with (
        open_retrieval_session(bundle, kv_budget_bytes=1 << 22, buckets=buckets) as bucketed,
        open_retrieval_session(bundle, kv_budget_bytes=1 << 22) as exact,
    ):
        yield bucketed, exact


@few
@given(visits=st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=4), max_size=4))
def test_growing_histories_answer_as_at_exact_shapes(
    growing: tuple[RetrievalSession, RetrievalSession], visits: list[list[tuple[int, int]]]
) -> None:
    bucketed, exact = growing
    for session in growing:
        session.clear()
    for call in visits:
        batch = [request_of(str(user), history_of(user, 20), events) for user, events in call]
        assert_same_users(bucketed.encode(batch), exact.encode(batch), REORDERED)


def served(bundle: Path, settings: RuntimeSettings, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of the Python backend to a batch, asked twice."""
    answerer = open_answerer(bundle, settings)
    try:
        answers = [*answerer.answer(requests), *answerer.answer(requests)]
    finally:
        answerer.close()
    assert all(isinstance(answer, dict) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, dict)]


@pytest.mark.parametrize("kv_budget_mib", [0, 4])
@pytest.mark.parametrize("model", ["ranking", "retrieval"])
def test_the_python_backend_pads_to_few_shapes_and_answers_alike(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, kv_budget_mib: int
) -> None:
    if model == "ranking":
        bundle = built_golden(request.getfixturevalue("build_ranking_fixture"))
        spec = request.getfixturevalue("ranking")[1].spec
        asked = [ranking_request(spec, 0, events, candidates, events) for events, candidates in ((9, 3), (80, 17))]
        given = [{**each.history, **each.candidates, **each.context} for each in asked]
    else:
        bundle = build(request.getfixturevalue("build_small"), *PLAIN).path
        grown = [request_of("", history_of(events, 20), events) for events in (3, 19)]
        given = [{**each.events, "request_timestamps": np.array([each.request_timestamp])} for each in grown]
    if kv_budget_mib:
        given = [{**each, "user_key": np.array([user])} for user, each in enumerate(given)]
    requests = [{name: np.asarray(array)[None] for name, array in each.items()} for each in given]
    exact = served(bundle, RuntimeSettings(kv_budget_mib=kv_budget_mib), requests)
    made = []
    monkeypatch.setattr(
        "hstu_compile.bundle.BucketedSession", lambda *each: made.append(each[-1]) or BucketedSession(*each)
    )
    assert_alike(served(bundle, RuntimeSettings(kv_budget_mib=kv_budget_mib), requests), exact)
    assert made == []
    assert_alike(served(bundle, RuntimeSettings(kv_budget_mib=kv_budget_mib, shapes="coarse"), requests), exact)
    assert set(made) == {Buckets.coarse()}


def assert_alike(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Of every request: the same cache outcomes, and numbers but for the order of sums."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            if array.dtype == np.float32:
                assert_rows_equal(one[name], array, REORDERED)
            else:
                np.testing.assert_array_equal(one[name], array)


@pytest.mark.parametrize("wrong", [(64, 128), Ladder((64, 128)), 8])
def test_what_are_no_buckets_is_refused(build_small: Build, wrong: Any) -> None:
    with (
        load_bundle(build(build_small, *PLAIN).path, buckets=wrong) as bundle,
        pytest.raises(UsageError, match=r"HSTU-E901[\s\S]*pass hstu_compile.Buckets\(\)"),
    ):
        _ = bundle.session
