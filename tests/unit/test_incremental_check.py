"""The check of a whole retrieval session: it passes what is right, and each kind of fault fails it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hstu_compile.artifacts import Feed
from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.errors import EngineError
from hstu_compile.incremental_check import OUTPUT, check_incremental, histories_of
from hstu_compile.runtime import _retrieval_feeds, retrieval
from hstu_compile.runtime.resident import HostPool
from hstu_compile.session_check import SESSION, Reference, RuntimeCheck
from tests.retrieval_cases import ROLES, EagerGraph, Served

FILES = {"retrieval": "model.onnx", "prefill": "prefill.onnx", "append": "append.onnx"}
LENGTHS = {"mixed": [9, 7, 0, 20, 1, 2], "one": [1]}
WAYS = ("at once", "grown", "again")


class Rehearsal:
    """Runs the check over graphs of the eager model, which a test may have changed."""

    def __init__(self) -> None:
        self.served = Served()
        self.graphs = self.served.graphs
        config = self.served.model.config
        self.feeds = tuple(
            Feed(name, retrieval_batch(name, config, lengths, seed=1).arrays) for name, lengths in LENGTHS.items()
        )

    def check(self, **changes: Any) -> RuntimeCheck:
        exact = tuple(
            {OUTPUT: np.concatenate([self.served.one_pass(self.served.exact, each) for each in self.requests(feed)])}
            for feed in self.feeds
        )
        arguments: dict[str, Any] = {
            "runtime": "fake",
            "open_graph": self.graphs.__getitem__,
            "files": FILES,
            "spec": self.served.spec,
            "reference": Reference(SESSION, OUTPUT, self.feeds, exact, exact, {OUTPUT: 1e-7}, None),
            "precision": "fp32",
            "progress": lambda *_: None,
        }
        return check_incremental(**{**arguments, **changes})

    def requests(self, feed: Feed) -> Any:
        return histories_of(feed, self.served.spec)


def failing_ways(check: RuntimeCheck) -> set[str]:
    """Ways to answer, of the rows that failed."""
    return {row.feed.split(", ")[1] for row in check.tensors if row.status == "FAIL"}


def test_a_right_session_passes_in_every_way() -> None:
    rehearsal = Rehearsal()
    check = rehearsal.check()
    assert (check.status, check.reason) == ("PASS", None)
    assert check.artifact == "session of model.onnx, prefill.onnx, append.onnx"
    assert {(row.tensor, row.feed) for row in check.tensors} == {
        (OUTPUT, f"{feed}, {way}") for feed in LENGTHS for way in WAYS
    }
    assert all(row.error <= row.bound == 1e-5 for row in check.tensors)
    assert any(row.error > 0 for row in check.tensors)
    assert all(graph.closed for graph in rehearsal.graphs.values())


def test_histories_grow_by_as_many_events_as_possible_by_one_and_not_at_all() -> None:
    rehearsal = Rehearsal()
    rehearsal.check()
    # Of 9, 7, 0, 20, 1, 2 events 5, 6, 0, 16, 0, 2 are known before; the one in front of the new ones comes again.
    computed = [5, 2, 0, 5, 1, 1]
    assert (
        sum(events for events, _ in rehearsal.graphs["append"].calls) == sum(computed) + 1 + (1 + 1 + 0 + 1 + 1 + 1) + 1
    )
    assert sum(events for events, _ in rehearsal.graphs["prefill"].calls) == 5 + 6 + 16 + 2


@pytest.mark.parametrize("role", ROLES)
def test_a_corrupted_graph_fails(role: str) -> None:
    rehearsal = Rehearsal()
    broken = Served()
    graph = broken.graphs[role]
    layer = graph.served.module.model.layers[0]
    layer.uvqk_weight.data[:, :5] *= -1.0
    rehearsal.graphs[role] = graph
    expected = {"retrieval": {"at once"}, "prefill": {"grown", "again"}, "append": {"grown", "again"}}
    check = rehearsal.check()
    assert check.status == "FAIL"
    assert failing_ways(check) == expected[role]


def test_a_last_row_that_is_kept_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph is right, and what lies between them is stale: no check of a graph alone can see it."""
    for module in (_retrieval_feeds, retrieval):
        monkeypatch.setattr(module, "clean_rows", lambda num_events: max(0, num_events - (num_events < 9)))
    check = Rehearsal().check()
    assert check.status == "FAIL"
    # The history of 20 events, of which 16 were known.
    assert failing_ways(check) >= {"grown"}
    assert {row.tensor for row in check.tensors if row.status == "FAIL"} == {OUTPUT}


def test_rows_that_are_not_kept_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows that never reach the cache: what is asked next reads what was there before."""
    right, opened = retrieval._moves, HostPool.__init__

    def zeroed(self: HostPool, capacity_bytes: int) -> None:
        # Memory that is not ours yet may hold the right rows, of another test's cache.
        opened(self, capacity_bytes)
        assert self._arena is not None
        self._arena[:] = 0

    monkeypatch.setattr(HostPool, "__init__", zeroed)
    monkeypatch.setattr(retrieval, "_moves", lambda *arguments: right(*arguments)[::2])
    assert failing_ways(Rehearsal().check()) == {"again"}


def test_a_cache_that_never_finds_anybody_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers, but every history is encoded again."""
    moments = iter(range(10**6))
    monkeypatch.setattr(retrieval, "validity_of", lambda *_: next(moments).to_bytes(8, "little"))
    check = Rehearsal().check()
    assert check.status == "FAIL"
    assert {row.tensor for row in check.tensors if row.status == "FAIL"} == {"cache"}
    assert failing_ways(check) == {"grown", "again"}
    details = [row.detail for row in check.tensors if row.status == "FAIL"]
    assert details[0].startswith("user 0: stale changed, not appended, user 1: stale changed, not appended, user 2: ")


def test_a_runtime_that_is_absent_is_a_row_with_its_reason() -> None:
    rehearsal = Rehearsal()

    def open_graph(graph: str) -> EagerGraph:
        if graph == "append":
            raise EngineError("HSTU-E401", "TensorRT is not here", "no GPU", "use another")
        return rehearsal.graphs[graph]

    check = rehearsal.check(open_graph=open_graph)
    assert (check.status, check.tensors, check.reason) == ("NOT RUN", (), "TensorRT is not here: no GPU")
    assert [rehearsal.graphs[role].closed for role in ROLES] == [True, True, False]
