"""Sessions in buckets: the answers are those of exact shapes, and few shapes come again and again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import RequestError
from hstu_compile.runtime import _host_session
from hstu_compile.runtime.bucketed_session import BucketedSession, BucketStats
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ladder import Buckets, Ladder
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.resident import HostPool
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.runtime.session import Session
from tests.bucketed_cases import (
    COARSE,
    MAX_BATCH,
    MAX_SEQ_LEN,
    assert_rows_equal,
    assert_same_scores,
    assert_same_users,
    in_buckets,
    ranking_session,
    ranking_spec,
    retrieval_session,
    shapes_of,
)
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import open_fake
from tests.fused_fakes import fused_session, segment_engine
from tests.ranking_requests import request_of
from tests.retrieval_cases import asked, history_of
from tests.segmented_cases import Case, retrieval_case, rounding_what_kernels_make

few = settings(max_examples=12, deadline=None)


class NanPool(HostPool):
    """Memory that holds NaN, in any float type, wherever nothing was written."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        assert self._arena is not None
        self._arena[:] = 0xFF


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host_session, "HostPool", NanPool)


def on_host(case: Case) -> Session:
    return OnnxRuntimeSession(case.whole.model)


@pytest.fixture(scope="module")
def ranking() -> Iterator[tuple[RankingSession, RankingSession]]:
    """In buckets, over memory full of NaN; at exact shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host_session, "HostPool", NanPool)
        bucketed = ranking_session(on_host, COARSE)
    with bucketed, ranking_session(on_host) as exact:
        yield bucketed, exact


@pytest.fixture(scope="module")
def retrieval() -> Iterator[tuple[RetrievalSession, RetrievalSession]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host_session, "HostPool", NanPool)
        bucketed = retrieval_session(on_host, COARSE)
    with bucketed, retrieval_session(on_host) as exact:
        yield bucketed, exact


# Of a request: user, events, candidates, seed.
SIZES = st.tuples(st.integers(0, 3), st.integers(0, 34), st.integers(0, 9), st.integers(0, 99))


def batch_scores(session: RankingSession, batch: list[RankingRequest]) -> list[RankingResult]:
    """With a cache that holds nothing."""
    session.clear()
    return session.score(batch)


@few
@given(calls=st.lists(st.lists(SIZES, min_size=1, max_size=5), min_size=1, max_size=3))
def test_scores_in_buckets_are_those_at_exact_shapes(
    ranking: tuple[RankingSession, RankingSession], calls: list[list[tuple[int, int, int, int]]]
) -> None:
    bucketed, exact = ranking
    for session in ranking:
        session.clear()
    for sizes in calls:
        batch = [request_of(exact.spec, user, *each) for user, *each in sizes]
        found, expected = bucketed.score(batch), exact.score(batch)
        assert_same_scores(found, expected)
        assert [each.cache for each in found] == [each.cache for each in expected]
        assert_same_scores(bucketed.score_packed(batch), exact.score_packed(batch))


def test_every_pass_is_padded_and_counted(ranking: tuple[RankingSession, RankingSession]) -> None:
    bucketed, exact = ranking
    before = bucketed.stats().buckets
    bucketed.clear()
    batch = [request_of(exact.spec, user, 3 + user, 2, seed=7) for user in range(3)]
    assert_same_scores(bucketed.score(batch), batch_scores(exact, batch))
    bucketed.score_packed(batch)
    found = bucketed.stats().buckets
    assert set(found) == {"packed", "prefill", "score"}
    new = {name: sum(each.passes.values()) for name, each in found.items()}
    old = {name: sum(each.passes.values()) for name, each in before.items()}
    assert [new[name] - old[name] for name in ("packed", "prefill", "score")] == [1, 1, 2]
    assert all(each.exact == before[name].exact for name, each in found.items())
    assert (("B", 3), ("L", 16), ("T", 8)) in found["packed"].passes
    assert exact.stats().buckets == {}


VISITS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, MAX_SEQ_LEN)), min_size=1, max_size=4)


@few
@given(calls=st.lists(VISITS, min_size=1, max_size=4))
def test_growing_histories_in_buckets_are_those_at_exact_shapes(
    retrieval: tuple[RetrievalSession, RetrievalSession], calls: list[list[tuple[int, int]]]
) -> None:
    bucketed, exact = retrieval
    for session in retrieval:
        session.clear()
    for visits in calls:
        batch = [asked(user, history_of(user), events) for user, events in visits]
        for options in ({}, {"cache": False}):
            assert_same_users(bucketed.encode(batch, **options), exact.encode(batch, **options), 2.0**-11)
    assert exact.stats().buckets == {}


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("staging_rows", [60, 44, 41, 20])
def test_where_staging_memory_ends_before_the_rung_it_is_the_bucket(staging_rows: int) -> None:
    spec = ranking_spec()
    with (
        ranking_session(on_host, COARSE, staging_rows=staging_rows) as bucketed,
        ranking_session(on_host, staging_rows=staging_rows) as exact,
    ):
        for lengths in ((34,), (33,), (20,), (12, 13), (5, 6, 7), (1, 1, 1, 1)):
            batch = [request_of(spec, user, events, 3, seed=events) for user, events in enumerate(lengths)]
            bucketed.clear()
            assert_same_scores(bucketed.score(batch), batch_scores(exact, batch))
        assert bucketed.stats().staging_bytes == exact.stats().staging_bytes
        padded = bucketed.stats().buckets["prefill"]
        assert sum(padded.passes.values()) >= 3


# --- few graphs on a TensorRT that is played --------------------------------------------------------------------------

SUMS = (
    (
        TensorSpec("item_ids", "int32", ("L",)),
        TensorSpec("timestamps", "int64", ("L",)),
        TensorSpec("seq_offsets", "int32", ("B_plus_1",)),
    ),
    (TensorSpec("sums", "float32", ("B",)),),
)


def sums_of(*lengths: int) -> dict[str, Any]:
    return {
        "item_ids": np.arange(1, 1 + sum(lengths), dtype=np.int32),
        "timestamps": np.arange(sum(lengths)),
        "seq_offsets": np.cumsum([0, *lengths]).astype(np.int32),
    }


def ask_sums(session: Session, *lengths: int) -> None:
    ids, offsets = (sums_of(*lengths)[name] for name in ("item_ids", "seq_offsets"))
    expected = [float(ids[a:b].sum()) for a, b in itertools.pairwise(offsets)]
    assert session.run(sums_of(*lengths))["sums"].tolist() == expected


def test_many_lengths_are_few_graphs_and_nothing_is_padded_beyond_the_profile() -> None:
    cuda = FakeCuda()
    # The profile ends at 8 events and 4 sequences; the rungs do not.
    buckets = Buckets(events=Ladder((3, 16)), sequences=Ladder((2, 16)))
    with BucketedSession(open_fake(cuda, cuda_graphs=8), *SUMS, buckets) as session:
        for _ in range(3):
            for lengths in ((1,), (2,), (3,), (0, 0), (1, 1), (4,), (2, 3), (8,), (6, 0), (1, 1, 1), (2, 2, 2, 2)):
                ask_sums(session, *lengths)
        stats = session.bucket_stats
        assert dict(stats.passes) == {
            (("B", 2), ("L", 3)): 15,
            (("B", 2), ("L", 8)): 12,
            (("B", 4), ("L", 3)): 3,
            (("B", 4), ("L", 8)): 3,
        }
        assert (stats.exact, stats.rows) == (0, 3 * sum((1, 2, 3, 0, 2, 4, 5, 8, 6, 3, 8)))
        assert stats.added_rows == 3 * sum((2, 1, 0, 3, 1, 4, 3, 0, 2, 0, 0))
        graphs = session.graph_stats
        assert graphs is not None
        assert (graphs.captures, graphs.evictions, graphs.failures) == (4, 0, 0)
        assert graphs.replays == 33 - 2 * 4
    assert not cuda.memory
    assert not cuda.executables


def test_sizes_beyond_the_ladder_keep_their_own_shapes() -> None:
    buckets = Buckets(events=Ladder((2, 4)))
    with BucketedSession(open_fake(FakeCuda()), *SUMS, buckets) as session:
        ask_sums(session, 3)
        ask_sums(session, 5)
        ask_sums(session, 2, 4)
        assert session.bucket_stats == BucketStats({(("B", 1), ("L", 4)): 1}, exact=2, rows=3, added_rows=1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"item_ids": None}, "item_ids is missing"),
        ({"more": np.zeros(3)}, "more is not an input"),
        ({"item_ids": np.zeros((3, 1), np.int32)}, "item_ids has rank 2"),
        ({"item_ids": np.zeros(3)}, "int32 cannot hold it"),
        ({"item_ids": np.zeros(9, np.int32), "timestamps": np.zeros(9, np.int64)}, r"item_ids is \[9\]"),
    ],
)
def test_what_the_session_refuses_it_refuses_in_its_own_words(changes: dict[str, Any], text: str) -> None:
    feeds = {name: array for name, array in {**sums_of(1, 2), **changes}.items() if array is not None}
    with (
        BucketedSession(open_fake(FakeCuda()), *SUMS, Buckets()) as session,
        pytest.raises(RequestError, match=text),
    ):
        session.run(feeds)


def test_evicted_graphs_are_recorded_again_and_answers_stay_right() -> None:
    """A budget for two graphs, four buckets that take turns, segments and attentions in ONNX Runtime."""
    case, cuda = retrieval_case("retrieval", "fp16"), FakeCuda(2**24)
    cuda.graph_bytes = 1000
    buckets = Buckets(events=Ladder((16, 64, 128)), sequences=Ladder((2, 4)))
    rng = np.random.default_rng(0)
    lengths = [rng.integers(0, 21, rng.integers(1, 5)) for _ in range(10)]
    batches = [batch_of([int(n) for n in each], seed) for seed, each in enumerate(lengths)]
    batches = [feeds for feeds in batches for _ in range(3)]
    fused = fused_session(case.cut, cuda, cuda_graphs=9, graph_budget_bytes=2500)
    rounded = OnnxRuntimeSession(rounding_what_kernels_make(case))
    with in_buckets(case, fused, buckets) as session, rounded as whole:
        for feeds in batches:
            found, expected = session.run(feeds), whole.run(feeds)
            assert_rows_equal(found["user_embeddings"], expected["user_embeddings"], 2.0**-11)
        stats = session.graph_stats
        assert stats is not None
        assert stats.failures == 0
        assert stats.kept <= 2
        assert stats.evictions >= 1
        assert stats.replays >= 1
        assert isinstance(session, BucketedSession)
        assert len(session.bucket_stats.passes) < len({shapes_of(feeds) for feeds in batches})
    assert not cuda.executables


def batch_of(lengths: list[int], seed: int) -> dict[str, Any]:
    histories = [asked(user, history_of([seed, user]), events) for user, events in enumerate(lengths)]
    return {
        **{
            name: np.concatenate([each.events[name] for each in histories]).astype(kind)
            for name, kind in (("item_ids", np.int32), ("timestamps", np.int64))
        },
        "seq_offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "request_timestamps": np.array([each.request_timestamp for each in histories]),
    }


def on_tensorrt(cuda: FakeCuda, case: Case, most_sequences: int) -> Session:
    """With a profile of so many candidates' sequences: twice the users', and the cache is given to it whole."""
    engine = segment_engine(case.whole)
    if case.served.name == "score":
        low, high = (2,), (most_sequences + 1,)
        engine = dataclasses.replace(engine, inputs=engine.inputs | {"candidate_offsets": ("INT32", low, high)})
    return open_fake(cuda, engine, cuda_graphs=3)


def mixed_requests_equal_exact_ones(count: int, *, whole: bool) -> tuple[GraphStats, dict[str, BucketStats]]:
    """Scores of users with ever new lengths, through few graphs of which three are kept an engine."""
    most = MAX_BATCH * (2 if whole else 1)
    cuda, rng = FakeCuda(2**25), np.random.default_rng(0)
    asked_so_far = 0
    with (
        ranking_session(lambda case: on_tensorrt(cuda, case, most), COARSE, kv_budget_bytes=1 << 14) as bucketed,
        ranking_session(on_host, kv_budget_bytes=1 << 14) as exact,
    ):
        while asked_so_far < count:
            users = rng.permutation(12)[: rng.integers(1, 4)]
            batch = [request_of(exact.spec, int(u), int(rng.integers(0, 35)), int(rng.integers(0, 8))) for u in users]
            score = rng.random() < 0.6
            pair = [each.score(batch) if score else each.score_packed(batch) for each in (bucketed, exact)]
            assert_same_scores(*pair)
            asked_so_far += len(batch)
        stats = bucketed.stats()
        assert stats.cache.evictions > 0
        assert stats.scores_in_place == whole
    assert not cuda.executables
    assert not cuda.memory
    return stats.graphs, dict(stats.buckets)


@pytest.mark.parametrize("whole", [True, False], ids=["whole-cache", "staged"])
def test_mixed_requests_through_few_graphs_equal_exact_ones(whole: bool) -> None:
    graphs, buckets = mixed_requests_equal_exact_ones(45, whole=whole)
    assert graphs.failures == 0
    assert graphs.replays >= 5
    assert all(len(each.passes) <= 12 for each in buckets.values())


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole-cache", "staged"])
def test_two_thousand_mixed_requests_with_eviction_equal_exact_ones(whole: bool) -> None:
    graphs, buckets = mixed_requests_equal_exact_ones(2000, whole=whole)
    assert graphs.failures == 0
    assert graphs.evictions > 0
    assert graphs.replays > graphs.captures
    assert all(len(each.passes) <= 24 for each in buckets.values())
