"""Drawn ranking requests: legal for every graph, at the edges of the profile, and the same request in each graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile.calibration.ranking_batches import (
    prefill_arrays,
    ranking_batch,
    ranking_batches,
    score_arrays,
    single_user_arrays,
)
from hstu_compile.compare import row_error
from hstu_compile.model.ranking import RankingModel
from hstu_compile.served import packed_graph, prefill_graph, score_graph
from tests import tolerances
from tests.dlrm_reference import ACTIONS, CANDIDATE, HISTORY, QUERY_TIME, TIME, DlrmForm
from tests.exported_models import ranking_config, ranking_model

FORMS = {
    "batch divisor, least history": DlrmForm(),
    "everything": DlrmForm(
        contextual=(("user_id", 1, 20), ("genres", 3, 5)),
        additional=("movie_category",),
        item_only=("item_shop",),
        action_weights=(3, 6, 1 << 20),
        scaling_seq_len=57.0,
    ),
    "history alone counts": DlrmForm(min_history_counts="history"),
    "no context, no actions": DlrmForm(contextual=(), action_weights=(), scaling_seq_len=57.0),
}
CONFIGS = {name: ranking_config(form) for name, form in FORMS.items()}
MODELS = {name: ranking_model(form, torch.float64) for name, form in FORMS.items()}
LENGTHS, COUNTS = [7, 0, 20, 1, 0, 33], [4, 3, 0, 1, 0, 9]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_has_the_inputs_of_the_packed_graph_in_range(name: str) -> None:
    config = CONFIGS[name]
    batch = ranking_batch("drawn", config, LENGTHS, COUNTS, seed=1)
    arrays = batch.arrays
    assert batch.lengths.tolist() == LENGTHS
    assert np.diff(arrays["candidate_offsets"]).tolist() == COUNTS
    for each in packed_graph(MODELS[name]).inputs:
        assert arrays[each.name].dtype == np.dtype(str(each.example.dtype).removeprefix("torch.")), each.name
        assert arrays[each.name].ndim == 1
    assert set(arrays) == {each.name for each in packed_graph(MODELS[name]).inputs}
    for feature, table in {**config.history_ids, **config.candidate_ids}.items():
        rows = next(each.num_rows for each in config.tables if each.name == table)
        assert 0 <= arrays[feature].min() < rows // 4
        assert 3 * rows // 4 < arrays[feature].max() < rows or len(arrays[feature]) < 20
    for context in config.contextual_features:
        assert len(arrays[context.name]) == len(LENGTHS) * context.max_length
        assert arrays[context.name].min() >= -1
    if config.action_feature:
        known = int(np.bitwise_or.reduce(config.action_weights))
        assert arrays[ACTIONS].min() >= 0
        assert known // 2 < arrays[ACTIONS].max() <= known


def test_a_user_is_asked_within_an_hour_after_the_last_event() -> None:
    arrays = ranking_batch("drawn", CONFIGS["everything"], LENGTHS, COUNTS, seed=2).arrays
    events, candidates = arrays["seq_offsets"], arrays["candidate_offsets"]
    for user in range(len(LENGTHS)):
        times = arrays[TIME][events[user] : events[user + 1]]
        asked = arrays[QUERY_TIME][candidates[user] : candidates[user + 1]]
        assert (np.diff(times) >= 0).all()
        assert asked.size < 2 or len(set(asked.tolist())) > 1
        assert asked.size == 0 or asked.max() - asked.min() < 3600
        if len(times) and len(asked):
            assert asked.min() >= times[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_taken_apart_is_its_users_with_candidates(name: str) -> None:
    config = CONFIGS[name]
    packed = ranking_batch("drawn", config, LENGTHS, COUNTS, seed=3).arrays
    users = single_user_arrays(config, packed)
    sizes = [(length, count) for length, count in zip(LENGTHS, COUNTS, strict=True) if count]
    assert [(int(u["seq_offsets"][-1]), int(u["candidate_offsets"][-1])) for u in users] == sizes
    assert all(set(user) == set(packed) for user in users)
    for feature in config.candidate_features:
        np.testing.assert_array_equal(np.concatenate([user[feature] for user in users]), packed[feature])
    for context in config.contextual_features:
        rows = packed[context.name].reshape(len(LENGTHS), context.max_length)[np.array(COUNTS) > 0]
        np.testing.assert_array_equal(np.stack([user[context.name] for user in users]), rows)
    # The model agrees, where the divisor does not depend on who else is in the batch.
    if config.scaling != "batch":
        graph = packed_graph(MODELS[name])
        alone = np.concatenate([graph.run(user)["logits"] for user in users])
        np.testing.assert_allclose(alone, graph.run(packed)["logits"], rtol=1e-9, atol=1e-12)


def test_the_same_seed_gives_the_same_batch_and_another_seed_another() -> None:
    config = CONFIGS["everything"]
    first, again, other = (ranking_batch("drawn", config, LENGTHS, COUNTS, seed) for seed in (5, 5, 6))
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
        assert name.endswith("offsets") or (array != other.arrays[name]).any(), name


def test_external_tables_are_fed_with_rows() -> None:
    config = ranking_config(FORMS["everything"], external_embeddings=True)
    arrays = ranking_batch("drawn", config, [3, 2], [1, 4], seed=1).arrays
    shapes = {HISTORY: (5, 6), CANDIDATE: (5, 6), "item_shop": (5, 6), "user_id": (2, 6), "genres": (6, 6)}
    for name, shape in shapes.items():
        assert arrays[name].shape == shape
        assert arrays[name].dtype == np.float32
        assert np.abs(arrays[name]).max() > 0.1


# --- The batches of a profile -----------------------------------------------------------------------------------------


def test_the_batches_of_a_profile_reach_its_edges() -> None:
    config = CONFIGS["everything"]
    batches = {b.name: b.arrays for b in ranking_batches(config, max_batch=64, opt_batch=8, max_scores=1 << 24)}
    assert list(batches) == ["one event, one candidate", "mixed lengths", "48 events, 24 candidates", "most users"]
    events = {name: np.diff(arrays["seq_offsets"]) for name, arrays in batches.items()}
    candidates = {name: np.diff(arrays["candidate_offsets"]) for name, arrays in batches.items()}
    assert (events["one event, one candidate"].tolist(), candidates["one event, one candidate"].tolist()) == ([1], [1])
    assert events["48 events, 24 candidates"].tolist() == [48, 48]
    assert candidates["48 events, 24 candidates"].tolist() == [24, 24]
    assert len(events["most users"]) == 64
    mixed = list(zip(events["mixed lengths"], candidates["mixed lengths"], strict=True))
    assert len(mixed) == 8
    assert any(u == 0 and t > 0 for u, t in mixed)
    assert any(u == 48 and t == 0 for u, t in mixed)
    assert len({u for u, _ in mixed}) > 4


def test_a_profile_of_one_user_gets_batches_of_one_user() -> None:
    batches = ranking_batches(CONFIGS["everything"], max_batch=1, opt_batch=1, max_scores=1 << 24)
    assert {len(batch.lengths) for batch in batches} == {1}
    assert max(int(batch.lengths.max()) for batch in batches) == 48


def test_a_profile_of_millions_of_users_does_not_take_the_memory_of_them() -> None:
    config = CONFIGS["everything"].with_limits(2, 1)
    batches = ranking_batches(config, max_batch=1 << 31, opt_batch=1 << 28, max_scores=1 << 30)
    rows = [len(b.arrays["item_query_time"]) + int(b.lengths.sum()) for b in batches]
    # The model compares every row with the end of every user's rows.
    pairs = [
        len(b.lengths) * (more + config.contextual_len * len(b.lengths)) for b, more in zip(batches, rows, strict=True)
    ]
    assert max(pairs) <= 1 << 26


def scores_of(arrays: dict[str, Any], context: int, heads: int) -> int:
    """Elements of one padded tensor of attention scores."""
    events, candidates = np.diff(arrays["seq_offsets"]), np.diff(arrays["candidate_offsets"])
    return len(events) * heads * (context + int(events.max()) + int(candidates.max())) ** 2


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(200, 1 << 20),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_batch_is_within_the_profile_and_affordable(
    name: str, max_batch: int, opt_batch: int, max_scores: int, seed: int
) -> None:
    config, opt_batch = CONFIGS[name], min(opt_batch, max_batch)
    batches = ranking_batches(config, max_batch, opt_batch, max_scores, seed)
    assert len(batches) == 4
    heads = config.layer.attention.num_heads
    for batch in batches:
        users, candidates = len(batch.lengths), np.diff(batch.arrays["candidate_offsets"])
        assert 1 <= users <= max_batch
        assert 0 <= batch.lengths.min() <= batch.lengths.max() <= config.max_history_len
        assert 0 <= candidates.min() <= candidates.max() <= config.max_candidates
        assert candidates.max() >= 1
        # The mixture keeps its users without history and without candidates, whatever it costs.
        afforded = max_scores * (3 if batch.name == "mixed lengths" else 1)
        assert scores_of(batch.arrays, config.contextual_len, heads) <= max(
            afforded, scores_of(batches[0].arrays, config.contextual_len, heads)
        )


# --- The same requests in the other graphs ----------------------------------------------------------------------------


def values(model: RankingModel, packed: dict[str, Any], micro_batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of `score` for a packed batch, by way of `prefill`."""
    cached = prefill_graph(model).run(prefill_arrays(model.config, packed))
    names = [f"{part}_{layer}" for layer in range(model.config.num_layers) for part in "kv"]
    feeds = score_arrays(model.config, packed, {name: cached[name] for name in names}, micro_batch)
    return feeds, score_graph(model, micro_batch).run(feeds)


@pytest.mark.parametrize("micro_batch", [1, 5, 6, 17, 100])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_score_are_fed_what_packed_derives(name: str, micro_batch: int) -> None:
    model = MODELS[name]
    packed = ranking_batch("drawn", model.config, LENGTHS, COUNTS, seed=7).arrays
    expected = packed_graph(model).run(packed)
    feeds, actual = values(model, packed, micro_batch)
    kept = np.diff(feeds["candidate_offsets"])
    assert 1 <= kept.sum() <= micro_batch
    assert (kept <= COUNTS).all()
    rows = [start + i for start, count in zip(packed["candidate_offsets"], kept, strict=False) for i in range(count)]
    for tensor in ("logits", "candidates_user_embeddings"):
        assert actual[tensor].shape == expected[tensor][rows].shape
        assert row_error(actual[tensor], expected[tensor][rows]).error <= tolerances.FLOAT64 * 1e3


@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_are_those_of_the_graphs(name: str) -> None:
    model = MODELS[name]
    packed = ranking_batch("drawn", model.config, LENGTHS, COUNTS, seed=8).arrays
    assert set(prefill_arrays(model.config, packed)) == {each.name for each in prefill_graph(model).inputs}
    feeds, _ = values(model, packed, 5)
    assert set(feeds) == {each.name for each in score_graph(model, 5).inputs}


def test_a_pass_is_shared_out_among_the_users() -> None:
    config = CONFIGS["everything"]
    packed = ranking_batch("drawn", config, [3] * 5, [9, 0, 9, 2, 9], seed=1).arrays
    kept = np.diff(score_arrays(config, packed, {}, 12)["candidate_offsets"])
    assert kept.tolist() == [3, 0, 3, 2, 3]
    # More users than places: the first ones fill the pass, and nobody's candidates are mixed up.
    kept = np.diff(score_arrays(config, packed, {}, 2)["candidate_offsets"])
    assert kept.tolist() == [1, 0, 1, 0, 0]


def test_a_request_without_candidates_is_asked_at_its_last_event() -> None:
    config = CONFIGS["everything"]
    packed = ranking_batch("drawn", config, [3, 2, 0], [2, 0, 0], seed=1).arrays
    asked = prefill_arrays(config, packed)["request_timestamps"]
    assert asked.dtype == np.int64
    assert asked.tolist() == [packed[QUERY_TIME][1], packed[TIME][4], 0]
