"""The graphs that a model is served as: their inputs, outputs and taps, and which rows of the last layer they read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.calibration.ranking_batches import prefill_arrays, ranking_batch, score_arrays
from hstu_compile.model.layer import HstuLayer
from hstu_compile.served import (
    ServedGraph,
    packed_graph,
    prefill_graph,
    retrieval_graph,
    score_graph,
    served_graphs,
)
from tests.dlrm_reference import ACTIONS, CANDIDATE, HISTORY, QUERY_TIME, TIME, DlrmForm
from tests.exported_models import ranking_model, small_config, small_model

PLAIN = DlrmForm(num_layers=3)
FIXED = DlrmForm(
    contextual=(("user_id", 1, 0), ("genres", 3, 0)),
    additional=("movie_category",),
    item_only=("item_shop",),
    action_weights=(),
    tasks=(("like", 0), ("minutes", 1)),
    scaling_seq_len=57.0,
)
MODELS = {"plain": ranking_model(PLAIN), "fixed": ranking_model(FIXED)}
RETRIEVAL = small_model(small_config(num_layers=2))
# With an empty history first, last and in the middle.
LENGTHS, COUNTS = [0, 6, 0, 20, 1, 0], [3, 0, 2, 4, 1, 0]

EXPECTED_INPUTS = {
    ("plain", "packed"): {
        HISTORY: "L",
        TIME: "L",
        ACTIONS: "L",
        "user_id": "B",
        CANDIDATE: "T",
        QUERY_TIME: "T",
        "seq_offsets": "B_plus_1",
        "candidate_offsets": "B_plus_1",
    },
    ("plain", "prefill"): {
        HISTORY: "L",
        TIME: "L",
        ACTIONS: "L",
        "user_id": "B",
        "seq_offsets": "B_plus_1",
        "request_timestamps": "B",
        "num_candidates": "B",
        "scaling_seq_lens": "B",
    },
    ("plain", "score"): {
        CANDIDATE: "T",
        QUERY_TIME: "T",
        "candidate_offsets": "B_plus_1",
        "request_timestamps": "B",
        "scaling_seq_lens": "B",
        "cache_offsets": "B_plus_1",
        **{f"{part}_{layer}": "Lc" for layer in range(3) for part in "kv"},
    },
    ("fixed", "packed"): {
        HISTORY: "L",
        "movie_category": "L",
        TIME: "L",
        "user_id": "B",
        "genres": "B_times_3",
        CANDIDATE: "T",
        "item_movie_category": "T",
        "item_shop": "T",
        QUERY_TIME: "T",
        "seq_offsets": "B_plus_1",
        "candidate_offsets": "B_plus_1",
    },
    ("fixed", "prefill"): {
        HISTORY: "L",
        "movie_category": "L",
        TIME: "L",
        "user_id": "B",
        "genres": "B_times_3",
        "seq_offsets": "B_plus_1",
        "request_timestamps": "B",
    },
    ("fixed", "score"): {
        CANDIDATE: "T",
        "item_movie_category": "T",
        "item_shop": "T",
        QUERY_TIME: "T",
        "candidate_offsets": "B_plus_1",
        "request_timestamps": "B",
        "cache_offsets": "B_plus_1",
        **{f"{part}_{layer}": "Lc" for layer in range(2) for part in "kv"},
    },
}
WIDE = (TIME, QUERY_TIME, "request_timestamps")
REAL = ("scaling_seq_lens", *(f"{part}_{layer}" for layer in range(3) for part in "kv"))


def graph_of(form: str, name: str) -> ServedGraph:
    return {graph.name: graph for graph in served_graphs(MODELS[form], micro_batch=5)}[name]


def every_graph() -> list[ServedGraph]:
    ranking = [graph for model in MODELS.values() for graph in served_graphs(model, micro_batch=5)]
    return [*served_graphs(RETRIEVAL, max_append=4), *served_graphs(RETRIEVAL, 7, max_append=4), *ranking]


@pytest.mark.parametrize(("form", "name"), EXPECTED_INPUTS)
def test_a_ranking_graph_has_these_inputs_in_this_order(form: str, name: str) -> None:
    graph = graph_of(form, name)
    assert {each.name: each.axis for each in graph.inputs} == EXPECTED_INPUTS[form, name]
    assert [each.name for each in graph.inputs] == list(EXPECTED_INPUTS[form, name])
    for each in graph.inputs:
        wanted = torch.int64 if each.name in WIDE else torch.float32 if each.name in REAL else torch.int32
        assert each.example.dtype == wanted, each.name


@pytest.mark.parametrize("rated", [False, True])
def test_a_retrieval_graph_has_these_inputs_in_this_order(rated: bool) -> None:
    changes: dict[str, Any] = {"preprocessor": "rated", "item_embedding_dim": 24, "num_ratings": 5} if rated else {}
    model = small_model(small_config(num_layers=1, **changes))
    (graph,) = served_graphs(model, top_k=3)
    inputs = {each.name: (each.axis, each.example.dtype) for each in graph.inputs}
    assert inputs == {
        "item_ids": ("L", torch.int32),
        "timestamps": ("L", torch.int64),
        "seq_offsets": ("B_plus_1", torch.int32),
        "request_timestamps": ("B", torch.int64),
        **({"ratings": ("L", torch.int32)} if rated else {}),
    }
    assert (graph.name, graph.consumed, graph.max_candidates) == ("retrieval", "last_of_sequence", 0)
    assert graph.outputs == ("user_embeddings", "top_items", "top_scores")
    assert served_graphs(model)[0].outputs == ("user_embeddings",)


@pytest.mark.parametrize("rated", [False, True])
@pytest.mark.parametrize("time_bias", ["none", "next"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_the_graphs_of_an_incremental_retrieval_model(rated: bool, time_bias: str, top_k: int) -> None:
    changes: dict[str, Any] = {"preprocessor": "rated", "item_embedding_dim": 24, "num_ratings": 5} if rated else {}
    timeless = {} if time_bias == "next" else {"time_bias": "none", "num_time_buckets": 0, "time_bucket_divisor": 1.0}
    model = small_model(small_config(2, timeless, **changes))
    retrieval, prefill, append = served_graphs(model, top_k, max_append=4)
    answers = ("user_embeddings", "top_items", "top_scores")[: 3 if top_k else 1]
    cached = ("k_0", "v_0", "k_1", "v_1")
    assert [graph.name for graph in (retrieval, prefill, append)] == ["retrieval", "prefill", "append"]
    assert [(e.name, e.axis) for e in prefill.inputs] == [(e.name, e.axis) for e in retrieval.inputs]
    assert retrieval.outputs == answers
    assert prefill.outputs == (*answers, *cached)
    assert append.outputs == (*answers, *(f"new_{name}" for name in cached))
    assert {each.name: (each.axis, each.example.dtype) for each in append.inputs} == {
        "item_ids": ("A", torch.int32),
        "timestamps": ("A", torch.int64),
        "seq_offsets": ("B_plus_1", torch.int32),
        "request_timestamps": ("B", torch.int64),
        **({"ratings": ("A", torch.int32)} if rated else {}),
        "cache_offsets": ("B_plus_1", torch.int32),
        **({"cached_timestamps": ("Lc", torch.int64)} if time_bias == "next" else {}),
        **({"cached_item_ids": ("Lc", torch.int32)} if top_k else {}),
        **dict.fromkeys(cached, ("Lc", torch.float32)),
    }
    layers = ("layer_0", "layer_1", "layer_2")
    assert [graph.taps for graph in (prefill, append)] == [layers, layers]
    assert [graph.consumed for graph in (prefill, append)] == ["last_of_sequence", "all"]
    assert [graph.num_attention for graph in (prefill, append)] == [2, 2]


def test_the_graphs_of_a_ranking_model() -> None:
    assert [graph.name for graph in served_graphs(MODELS["plain"])] == ["packed"]
    packed, prefill, score = served_graphs(MODELS["plain"], micro_batch=5)
    assert [graph.name for graph in (packed, prefill, score)] == ["packed", "prefill", "score"]
    inside = ("candidates_user_embeddings", "candidates_item_embeddings")
    layers = ("layer_0", "layer_1", "layer_2", "layer_3")
    assert (packed.outputs, packed.taps) == (("preds", "logits"), (*inside, *layers))
    assert (score.outputs, score.taps) == (("preds", "logits"), (*inside, *layers))
    assert (prefill.outputs, prefill.taps) == (("k_0", "v_0", "k_1", "v_1", "k_2", "v_2"), layers[:3])
    # Behind the last layer's keys and values nothing of a history is read.
    assert [graph.num_attention for graph in (packed, prefill, score)] == [3, 2, 3]
    assert [graph.consumed for graph in (packed, prefill, score)] == ["candidates", "all", "all"]
    assert [graph.max_candidates for graph in (packed, prefill, score)] == [24, 0, 5]


@pytest.mark.parametrize("graph", every_graph(), ids=lambda graph: graph.name)
def test_the_examples_can_be_run_and_name_every_value(graph: ServedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not graph.module.training
    attend, calls = HstuLayer.attend, []

    def counted(self: HstuLayer, *arguments: Any) -> torch.Tensor:
        calls.append(self)
        return attend(self, *arguments)

    monkeypatch.setattr(HstuLayer, "attend", counted)
    found = graph.module(*(each.example for each in graph.inputs))
    assert len(found) == len(graph.outputs) + len(graph.taps)
    assert len(calls) == graph.num_attention
    assert len({each.name for each in graph.inputs}) == len(graph.inputs)
    # Sizes that differ wherever axes do: a tracer must not take two axes for one.
    sizes: dict[str, int] = {}
    for each in graph.inputs:
        assert sizes.setdefault(each.axis, each.example.shape[0]) == each.example.shape[0], each.name
    assert len(set(sizes.values())) == len(sizes)
    assert min(sizes.values()) > 1


@pytest.mark.parametrize("form", MODELS)
def test_external_tables_make_rows_of_the_id_inputs_alone(form: str) -> None:
    model = ranking_model(PLAIN if form == "plain" else FIXED, external_embeddings=True)
    for inside, outside in zip(served_graphs(MODELS[form], 0, 5), served_graphs(model, 0, 5), strict=True):
        assert [each.name for each in inside.inputs] == [each.name for each in outside.inputs]
        ids = {*model.config.history_ids, *model.config.candidate_ids, *model.config.contextual_names}
        for one, other in zip(inside.inputs, outside.inputs, strict=True):
            assert one.axis == other.axis
            if one.name in ids:
                assert other.example.dtype == torch.float32
                assert other.example.shape == (one.example.shape[0], 6)
            else:
                assert (one.example.dtype, one.example.shape) == (other.example.dtype, other.example.shape)


# --- Rows that are read -----------------------------------------------------------------------------------------------


def test_the_reference_of_a_retrieval_graph_has_each_sequences_last_row() -> None:
    graph = retrieval_graph(RETRIEVAL)
    feeds = retrieval_batch("drawn", small_config(num_layers=2), LENGTHS, seed=1).arrays
    whole, read = graph.run(feeds), graph.reference(feeds)
    assert whole["layer_2"].shape == (sum(LENGTHS), 32)
    assert read["layer_2"].shape == (len(LENGTHS), 32)
    offsets = feeds["seq_offsets"]
    for user, length in enumerate(LENGTHS):
        expected = whole["layer_2"][offsets[user + 1] - 1] if length else np.zeros(32)
        np.testing.assert_array_equal(read["layer_2"][user], expected)
    for name in ("user_embeddings", "layer_0", "layer_1"):
        np.testing.assert_array_equal(read[name], whole[name])


@pytest.mark.parametrize("form", [PLAIN, FIXED, dataclasses.replace(PLAIN, contextual=())], ids=["1", "4", "0"])
def test_the_reference_of_a_packed_graph_has_the_candidates_rows(form: DlrmForm) -> None:
    model = ranking_model(form)
    graph = packed_graph(model)
    feeds = ranking_batch("drawn", model.config, LENGTHS, COUNTS, seed=2).arrays
    whole, read = graph.run(feeds), graph.reference(feeds)
    last = f"layer_{form.num_layers}"
    assert len(whole[last]) == sum(LENGTHS) + sum(COUNTS) + form.context * len(LENGTHS)
    rows, start = [], 0
    for events, candidates in zip(LENGTHS, COUNTS, strict=True):
        start += form.context + events
        rows += range(start, start + candidates)
        start += candidates
    np.testing.assert_array_equal(read[last], whole[last][rows])
    assert (read[last] != 0).any(axis=1).all()
    for name in whole:
        assert name == last or np.array_equal(read[name], whole[name]), name


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 2, 0]], ids=str)
def test_users_without_anything_have_no_row(counts: list[int]) -> None:
    graph = packed_graph(MODELS["plain"])
    feeds = ranking_batch("drawn", MODELS["plain"].config, [0, 0, 0], counts, seed=2).arrays
    read = graph.reference(feeds)
    assert read["layer_3"].shape == (sum(counts), 12)
    assert read["preds"].shape == (sum(counts), 1)


def test_prefill_and_score_read_every_row() -> None:
    model = MODELS["plain"]
    packed = ranking_batch("drawn", model.config, LENGTHS, COUNTS, seed=3).arrays
    prefill, score = prefill_graph(model), score_graph(model, 24)
    feeds = prefill_arrays(model.config, packed)
    whole, read = prefill.run(feeds), prefill.reference(feeds)
    assert all(np.array_equal(read[name], whole[name]) for name in whole)
    assert len(read["layer_2"]) == len(read["k_2"]) == sum(LENGTHS) + len(LENGTHS)
    feeds = score_arrays(model.config, packed, {name: whole[name] for name in prefill.outputs}, 24)
    whole, read = score.run(feeds), score.reference(feeds)
    assert all(np.array_equal(read[name], whole[name]) for name in whole)


# --- Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_come_as_float32_unrounded(dtype: torch.dtype) -> None:
    model = ranking_model(PLAIN, dtype)
    graph = prefill_graph(model)
    feeds = prefill_arrays(model.config, ranking_batch("drawn", model.config, [4, 2], [1, 3], seed=4).arrays)
    values = graph.run(feeds)
    exact = prefill_graph(ranking_model(PLAIN, torch.float64)).run(feeds)
    assert {array.dtype.name for array in values.values()} == {"float32"}
    for name in graph.outputs:
        stored = torch.from_numpy(values[name])
        assert torch.equal(stored.to(dtype).float(), stored)
        assert exact[name].dtype == np.float64
        assert np.abs(exact[name] - values[name]).max() > 0


def test_a_float64_reference_reads_the_stored_half_cache() -> None:
    """The scoring graph is held to the numbers that its cache holds, not to those that were rounded away."""
    model = ranking_model(PLAIN, torch.float64)
    packed = ranking_batch("drawn", model.config, [9, 4], [2, 2], seed=5).arrays
    cached = prefill_graph(model).run(prefill_arrays(model.config, packed))
    halves = {f"{p}_{i}": cached[f"{p}_{i}"].astype(np.float16) for i in range(3) for p in "kv"}
    widened = {name: array.astype(np.float64) for name, array in halves.items()}
    graph = score_graph(model, 8)
    from_halves = graph.run(score_arrays(model.config, packed, halves, 8))["logits"]
    from_widened = graph.run(score_arrays(model.config, packed, widened, 8))["logits"]
    np.testing.assert_array_equal(from_halves, from_widened)
    unrounded = {name: cached[name] for name in halves}
    assert np.abs(graph.run(score_arrays(model.config, packed, unrounded, 8))["logits"] - from_halves).max() > 1e-5
