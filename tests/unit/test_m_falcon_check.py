"""The check of a whole ranking session: it passes what is right, and each kind of fault fails it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hstu_compile.artifacts import Feed
from hstu_compile.errors import EngineError
from hstu_compile.m_falcon_check import check_m_falcon, requests_of
from hstu_compile.runtime import ranking
from hstu_compile.runtime.ranking_request import RankingRequest
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.session_check import PREDICTIONS, SESSION, Outputs, Reference, RuntimeCheck
from tests.ranking_fakes import FakeGraph, FakeModel, Role, spec_of
from tests.ranking_requests import request_of

SIZES = {"mixed": [(5, 7), (0, 2), (12, 0), (9, 9)], "one": [(1, 1)]}
FILES = {"packed": "model.onnx", "prefill": "prefill.onnx", "score": "score.onnx"}
ROLES: tuple[Role, ...] = ("packed", "prefill", "score")
SPECS = {
    "pinned": spec_of(micro_batch=256, max_batch=4),
    "batch divisor": spec_of(micro_batch=256, max_batch=4, scaling="batch"),
    "nothing to cache of some": spec_of(micro_batch=2, max_batch=4, contextual=()),
}


def feed_of(spec: RankingSpec, name: str) -> Feed:
    """The requests as one packed batch."""
    requests = [request_of(spec, user, events, asked) for user, (events, asked) in enumerate(SIZES[name])]
    parts = {"history": spec.history_names, "context": spec.contextual_names, "candidates": spec.candidate_names}
    arrays = {
        feature: np.concatenate([np.asarray(getattr(request, part)[feature]) for request in requests])
        for part, features in parts.items()
        for feature in features
    }
    for offsets, place in (("seq_offsets", 0), ("candidate_offsets", 1)):
        arrays[offsets] = np.cumsum([0, *(sizes[place] for sizes in SIZES[name])]).astype(np.int32)
    return Feed(name, arrays)


def reference_of(spec: RankingSpec) -> Reference:
    """What the fake model answers, every request being a batch of its own."""
    model, feeds = FakeModel(spec), tuple(feed_of(spec, name) for name in SIZES)

    def answers(feed: Feed) -> Outputs:
        each = [model.answer(r.history, r.context, r.candidates) for r in requests_of(feed, spec)]
        return {name: np.concatenate([answer[place] for answer in each]) for place, name in enumerate(PREDICTIONS)}

    exact = tuple(answers(feed) for feed in feeds)
    return Reference(SESSION, "logits", feeds, exact, exact, dict.fromkeys(PREDICTIONS, 1e-7), None)


class Rehearsal:
    """Runs the check over fake graphs, which a test may have changed."""

    def __init__(self, spec: RankingSpec) -> None:
        self.spec = spec
        self.graphs = {role: FakeGraph(FakeModel(spec), role) for role in ROLES}

    def check(self, **changes: Any) -> RuntimeCheck:
        arguments: dict[str, Any] = {
            "runtime": "fake",
            "open_graph": self.graphs.__getitem__,
            "files": FILES,
            "spec": self.spec,
            "reference": reference_of(self.spec),
            "precision": "fp32",
            "progress": lambda *_: None,
        }
        return check_m_falcon(**{**arguments, **changes})


def failing_ways(check: RuntimeCheck) -> set[str]:
    """Ways to score, of the rows that failed."""
    return {row.feed.split(", ")[1] for row in check.tensors if row.status == "FAIL"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_right_session_passes_in_every_way(spec: RankingSpec) -> None:
    rehearsal = Rehearsal(spec)
    check = rehearsal.check()
    assert check.status == "PASS"
    assert check.reason is None
    assert check.artifact == "session of model.onnx, prefill.onnx, score.onnx"
    ways = {(row.tensor, *row.feed.split(", ")[:2]) for row in check.tensors}
    assert ways == {
        (tensor, feed, way)
        for tensor in PREDICTIONS
        for feed in SIZES
        for way in ("packed", "cold cache", "warm cache")
    }
    assert all(row.error <= row.bound == 1e-5 for row in check.tensors)
    assert any(row.error > 0 for row in check.tensors)
    assert all(graph.closed for graph in rehearsal.graphs.values())


def test_candidates_are_split_although_they_would_fit_one_pass() -> None:
    """9 candidates and a micro-batch of 256: passes of 4, two full ones and what the three users have left over."""
    rehearsal = Rehearsal(SPECS["pinned"])
    check = rehearsal.check()
    assert "mixed, cold cache, passes: 5" in {row.feed for row in check.tensors}
    # The user with 7, the one with 9 twice; then 3 + 1 of two users, and 1 + 1.
    mixed = rehearsal.graphs["score"].calls[:5]
    assert mixed == [(4, 1), (4, 1), (4, 1), (4, 2), (2, 2)]
    assert max(candidates for candidates, _ in mixed) == 4


def test_the_cache_is_empty_once_and_then_full() -> None:
    rehearsal = Rehearsal(SPECS["pinned"])
    rehearsal.check()
    # Of the four users one has no candidates; each is encoded once though scored twice with the cache.
    assert sum(sequences for _, sequences in rehearsal.graphs["prefill"].calls) == 3 + 1


@pytest.mark.parametrize(
    ("role", "ways"),
    [
        ("packed", {"packed"}),
        ("prefill", {"cold cache", "warm cache"}),
        ("score", {"cold cache", "warm cache"}),
    ],
)
def test_a_corrupted_graph_fails(role: Role, ways: set[str]) -> None:
    rehearsal = Rehearsal(SPECS["pinned"])
    model = FakeModel(rehearsal.spec)
    projection, _ = model.layers[0]
    projection[[0, 1]] = projection[[1, 0]]
    rehearsal.graphs[role] = FakeGraph(model, role)
    check = rehearsal.check()
    assert check.status == "FAIL"
    assert failing_ways(check) == ways


def test_a_fault_between_the_graphs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph is right, and is told the wrong moment: no check of a graph alone can see it."""
    right = ranking.score_feeds

    def an_hour_late(*arguments: Any) -> dict[str, Any]:
        feeds = right(*arguments)
        return {**feeds, "request_timestamps": feeds["request_timestamps"] + 3600}

    monkeypatch.setattr(ranking, "score_feeds", an_hour_late)
    check = Rehearsal(SPECS["pinned"]).check()
    assert check.status == "FAIL"
    assert failing_ways(check) == {"cold cache", "warm cache"}


def test_a_pass_that_is_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ranking.micro_batches
    monkeypatch.setattr(ranking, "micro_batches", lambda *arguments: right(*arguments)[:-1])
    check = Rehearsal(SPECS["pinned"]).check()
    assert failing_ways(check) == {"cold cache", "warm cache"}
    assert {row.error for row in check.tensors if row.status == "FAIL"} == {np.inf}


def test_candidates_that_change_places_in_a_pass_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ranking._cut

    def turned(*arguments: Any) -> dict[str, Any]:
        return {name: values[::-1] for name, values in right(*arguments).items()}

    monkeypatch.setattr(ranking, "_cut", turned)
    assert failing_ways(Rehearsal(SPECS["pinned"]).check()) == {"cold cache", "warm cache"}


def test_a_cache_that_never_finds_anybody_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right scores, but every history is encoded again."""
    moments = iter(range(10**6))
    monkeypatch.setattr(ranking, "validity_of", lambda request, spec: next(moments).to_bytes(8, "little"))
    check = Rehearsal(SPECS["pinned"]).check()
    assert check.status == "FAIL"
    assert failing_ways(check) == {"warm cache"}
    failed = [row for row in check.tensors if row.status == "FAIL"]
    assert {row.tensor for row in failed} == {"cache"}
    assert failed[0].detail == "user 0: stale, not hit, user 1: stale, not hit, user 3: stale, not hit"


def test_a_runtime_that_is_absent_is_a_row_with_its_reason() -> None:
    rehearsal = Rehearsal(SPECS["pinned"])

    def open_graph(graph: str) -> FakeGraph:
        if graph == "score":
            raise EngineError("HSTU-E401", "TensorRT is not here", "no GPU", "use another")
        return rehearsal.graphs[graph]  # type: ignore[index]

    check = rehearsal.check(open_graph=open_graph)
    assert (check.runtime, check.status, check.tensors) == ("fake", "NOT RUN", ())
    assert check.reason == "TensorRT is not here: no GPU"
    assert [rehearsal.graphs[role].closed for role in ROLES] == [True, True, False]


def test_requests_of_a_feed_are_its_users() -> None:
    spec = SPECS["pinned"]
    requests = requests_of(feed_of(spec, "mixed"), spec)
    assert [request.user for request in requests] == [0, 1, 2, 3]
    for user, (request, (events, asked)) in enumerate(zip(requests, SIZES["mixed"], strict=True)):
        drawn: RankingRequest = request_of(spec, user, events, asked)
        for part in ("history", "context", "candidates"):
            found: Mapping[str, Any] = getattr(request, part)
            assert set(found) == set(getattr(drawn, part))
            for name, values in getattr(drawn, part).items():
                np.testing.assert_array_equal(found[name], values)
