"""Sessions over the fake ranking model, and hypothesis strategies for their requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.ranking_fakes import FakeGraph, FakeModel
from tests.ranking_requests import request_of

ROLES = ("packed", "prefill", "score")


def requests(spec: RankingSpec, *, most_candidates: int = 11, min_candidates: int = 0) -> st.SearchStrategy[Any]:
    """One request of user 0."""
    return st.builds(
        lambda events, candidates, seed: request_of(spec, 0, events, candidates, seed),
        st.integers(0, spec.max_history_len),
        st.integers(min_candidates, most_candidates),
        st.integers(0, 2**16),
    )


def replaced(request: RankingRequest, **changes: Any) -> RankingRequest:
    """The request with other fields."""
    fields = {name: getattr(request, name) for name in ("user", "history", "candidates", "context")}
    return RankingRequest(**{**fields, **changes})


def chosen(request: RankingRequest, indices: Sequence[int]) -> RankingRequest:
    """The request with these of its candidates, in this order."""
    candidates = {name: np.asarray(values)[list(indices)] for name, values in request.candidates.items()}
    return replaced(request, candidates=candidates)


class Served:
    """A session over fake graphs, and the graphs.

    Args:
        spec: of the model.
        users_in_cache: users of full length that the cache holds.
        cache_rows: most rows of a cache that `score` takes whole; None for one that takes its users' rows alone.
        graph_stats: of every graph; None without CUDA graphs.
        options: of the session.
    """

    def __init__(
        self,
        spec: RankingSpec,
        users_in_cache: float = 50,
        *,
        cache_rows: int | None = None,
        graph_stats: GraphStats | None = None,
        **options: Any,
    ) -> None:
        self.model = FakeModel(spec)
        self.graphs = {role: FakeGraph(self.model, role, cache_rows) for role in ROLES}
        for graph in self.graphs.values():
            graph.graph_stats = graph_stats
        sizing = RankingSession(spec, **self.graphs, kv_budget_bytes=1)
        self.user_bytes = sizing.entry_bytes(spec.max_history_len)
        budget = int(self.user_bytes * users_in_cache)
        self.session = RankingSession(spec, **self.graphs, kv_budget_bytes=budget, **options)

    def calls(self, role: str) -> list[tuple[int, int]]:
        """(candidates or events, sequences) of the graph's runs."""
        return self.graphs[role].calls

    def one(self, request: RankingRequest, **options: Any) -> RankingResult:
        """Score one request."""
        return self.session.score([request], **options)[0]


def assert_same(actual: RankingResult, expected: RankingResult) -> None:
    """Equal but for the rounding to float32: values are O(1), arithmetic is float64."""
    for name in ("preds", "logits"):
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def differs(one: RankingResult, other: RankingResult) -> bool:
    """Whether some logit is clearly another."""
    return bool(np.abs(one.logits - other.logits).max(initial=0) > 1e-4)
