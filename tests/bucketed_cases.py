"""Ranking and retrieval sessions over real graphs, in buckets and at exact shapes, on any runtime's fakes."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hstu_compile import build_report
from hstu_compile.compare import row_error
from hstu_compile.runtime.bucketed_session import BucketedSession
from hstu_compile.runtime.ladder import Buckets, Ladder
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.runtime.retrieval_request import RetrievalResult
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from hstu_compile.runtime.session import Session
from tests.exported_models import MAX_APPEND, MICRO_BATCH, TOP_K
from tests.segmented_cases import WIDE_FORM, Case, ranking_case, retrieval_case

RANKING, RETRIEVAL = ("packed", "prefill", "score"), ("retrieval", "prefill", "append")
MAX_BATCH, MAX_SEQ_LEN = 4, 20
# Few and far apart: nearly every request of these small models is padded.
COARSE = Buckets(events=Ladder((16, 32, 64, 128)), candidates=Ladder((3, 8, 64)), sequences=Ladder((1, 3, 8)))
#: Rows are products of the same numbers, summed in another order at most, where a BLAS splits them by their number:
#: far below what a wrong mask, divisor or row would change.
REORDERED = 32 * 2.0**-24

Open = Callable[[Case], Session]


def ranking_cases() -> dict[str, Case]:
    """The three graphs of a ranking model in bfloat16."""
    return {name: ranking_case(name, "bf16") for name in RANKING}


def retrieval_cases() -> dict[str, Case]:
    """The three graphs of a retrieval model in float16."""
    return {name: retrieval_case(name, "fp16") for name in RETRIEVAL}


def _plan(case: Case, **limits: Any) -> Any:
    return types.SimpleNamespace(
        spec=types.SimpleNamespace(config=case.served.module.model.config),
        limits=types.SimpleNamespace(max_batch=MAX_BATCH, **limits),
    )


def ranking_spec() -> RankingSpec:
    """What a bundle of `ranking_cases` would say."""
    plan = _plan(
        ranking_case("packed", "bf16"),
        max_seq_len=WIDE_FORM.max_history_len,
        max_candidates=WIDE_FORM.max_num_candidates,
        micro_batch=MICRO_BATCH,
    )
    return build_report.ranking_spec(plan, "bf16", "a" * 64)


def retrieval_spec() -> RetrievalSpec:
    """What a bundle of `retrieval_cases` would say."""
    plan = _plan(retrieval_case("append", "fp16"), max_seq_len=MAX_SEQ_LEN, max_append=MAX_APPEND, top_k=TOP_K)
    return build_report.retrieval_spec(plan, "fp16", "b" * 64)


def in_buckets(case: Case, session: Session, buckets: Buckets | None) -> Session:
    """The session itself without buckets."""
    return session if buckets is None else BucketedSession(session, case.whole.inputs, case.whole.outputs, buckets)


def ranking_session(open_: Open, buckets: Buckets | None = None, **options: Any) -> RankingSession:
    """A session over `ranking_cases` on the runtime that `open_` opens."""
    graphs = {name: in_buckets(case, open_(case), buckets) for name, case in ranking_cases().items()}
    return RankingSession(ranking_spec(), **graphs, **{"kv_budget_bytes": 1 << 18, **options})


def retrieval_session(open_: Open, buckets: Buckets | None = None, **options: Any) -> RetrievalSession:
    """A session over `retrieval_cases` on the runtime that `open_` opens."""
    graphs = [in_buckets(case, open_(case), buckets) for case in retrieval_cases().values()]
    return RetrievalSession(retrieval_spec(), *graphs, **{"kv_budget_bytes": 1 << 18, **options})


def assert_rows_equal(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], most: float = REORDERED) -> None:
    """Equal but for the order of sums."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.size:
        assert row_error(found, expected.astype(np.float64)).error <= most


def assert_same_scores(found: Sequence[RankingResult], expected: Sequence[RankingResult]) -> None:
    """Of every request."""
    for one, other in zip(found, expected, strict=True):
        assert_rows_equal(one.preds, other.preds)
        assert_rows_equal(one.logits, other.logits)


def assert_same_users(found: Sequence[RetrievalResult], expected: Sequence[RetrievalResult], most: float) -> None:
    """Of every request, from the cache in the same way."""
    for one, other in zip(found, expected, strict=True):
        assert (one.cache, one.encoded) == (other.cache, other.encoded)
        assert_rows_equal(one.user_embedding[None], other.user_embedding[None], most)


def shapes_of(feeds: Mapping[str, np.ndarray[Any, Any]]) -> tuple[tuple[int, ...], ...]:
    """What a CUDA graph is recorded for."""
    return tuple(array.shape for array in feeds.values())
