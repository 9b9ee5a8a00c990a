"""Ranking batches in the packed graph's own form: typed, or refused with every fault named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hstu_compile.errors import RequestError
from hstu_compile.runtime.packed_request import check_packed_request
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec

SPEC = RankingSpec(
    history_ids=(IdFeature("item", 50),),
    history_time="time",
    history_action="action",
    contextual=(ContextualFeature("user", 9, None, 2, 0),),
    candidate_ids=(IdFeature("item_candidate", 50),),
    candidate_time="query_time",
    tasks=("like",),
    max_history_len=4,
    max_candidates=3,
    max_batch=2,
    micro_batch=3,
    scaling="batch",
    counts_candidates=True,
    num_layers=1,
    num_heads=1,
    attention_dim=4,
    linear_dim=4,
    row_dtype="float32",
    kv_dtype="float32",
    cache_rule="request",
    model_version="0" * 64,
)


def batch(**changes: Any) -> dict[str, Any]:
    """Two users: three events and two candidates, one event and one candidate."""
    arrays = {
        "item": [1, 2, 3, 4],
        "time": [10, 20, 30, 5],
        "action": [1, 0, 16, 2],
        "user": [3, -1, 4, 5],
        "item_candidate": [7, 8, 9],
        "query_time": [40, 41, 6],
        "seq_offsets": [0, 3, 4],
        "candidate_offsets": [0, 2, 3],
    }
    return {name: np.array(values) for name, values in {**arrays, **changes}.items() if values is not None}


def test_a_legal_batch_gets_the_models_types() -> None:
    arrays = check_packed_request(batch(), SPEC)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        **dict.fromkeys(("item", "action", "user", "item_candidate", "seq_offsets", "candidate_offsets"), "int32"),
        **dict.fromkeys(("time", "query_time"), "int64"),
    }
    for name, given in batch().items():
        np.testing.assert_array_equal(arrays[name], given)


def test_users_without_history_or_candidates_are_legal() -> None:
    empty: dict[str, Any] = {name: [] for name in ("item", "time", "action", "item_candidate", "query_time")}
    arrays = check_packed_request(batch(**empty, seq_offsets=[0, 0, 0], candidate_offsets=[0, 0, 0]), SPEC)
    assert arrays["item"].shape == arrays["query_time"].shape == (0,)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"time": None}, "HSTU-E701", "time is missing"),
        ({"label": [1, 0, 1]}, "HSTU-E701", "'label' is not an input"),
        ({"time": [10, 20, 30]}, "HSTU-E701", "events have different lengths: item 4, time 3"),
        ({"user": [3, 4, 5]}, "HSTU-E701", "2 users need 4 values"),
        ({"query_time": [40.5, 41, 6]}, "HSTU-E701", "query_time is float64"),
        ({"seq_offsets": [[0, 3, 4]]}, "HSTU-E701", "seq_offsets is int64 of shape"),
        ({"seq_offsets": [0, 4, 3]}, "HSTU-E702", "seq_offsets descends at sequence 1"),
        ({"candidate_offsets": [0, 2, 2]}, "HSTU-E702", "candidate_offsets ends at 2, and there are 3 candidates"),
        ({"candidate_offsets": [0, 3]}, "HSTU-E702", "seq_offsets has 3 entries and candidate_offsets 2"),
        ({"item": [1, 2, 50, 4]}, "HSTU-E703", "item outside 0..49"),
        ({"item_candidate": [7, -1, 9]}, "HSTU-E703", "item_candidate outside 0..49"),
        ({"query_time": [40, 29, 6]}, "HSTU-E705", "query time before the last event"),
        ({"time": [10, 9, 30, 5]}, "HSTU-E705", "time goes back"),
    ],
)
def test_faults_are_named(changes: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        check_packed_request(batch(**changes), SPEC)
    assert caught.value.code == code


def test_a_ragged_list_is_a_fault_like_any_other() -> None:
    feeds = {**batch(), "time": [[10], [20, 30], [5]], "label": np.zeros(3)}
    with pytest.raises(RequestError, match="'label' is not an input of this model; time cannot be read as an array"):
        check_packed_request(feeds, SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "candidates", "text"),
    [
        ([5], [1], "5 events; at most 4"),
        ([1], [4], "user 0 has 4 candidates; at most 3"),
        ([1] * 3, [1] * 3, "3 users"),
    ],
)
def test_sizes_beyond_the_profile_are_refused(lengths: list[int], candidates: list[int], text: str) -> None:
    total, asked = sum(lengths), sum(candidates)
    arrays = batch(
        item=[1] * total,
        time=[5] * total,
        action=[1] * total,
        user=[1] * 2 * len(lengths),
        item_candidate=[1] * asked,
        query_time=[9] * asked,
        seq_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        candidate_offsets=np.concatenate([[0], np.cumsum(candidates)]),
    )
    with pytest.raises(RequestError, match=text) as caught:
        check_packed_request(arrays, SPEC)
    assert caught.value.code == "HSTU-E704"


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        check_packed_request(batch(item=[1, 99, 3, 4], query_time=[1, 1, 1]), SPEC)
    assert [problem["code"] for problem in caught.value.context["problems"]] == ["HSTU-E703", "HSTU-E705", "HSTU-E705"]
