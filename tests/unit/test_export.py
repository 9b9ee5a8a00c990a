from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from hstu_compile.artifacts import OnnxGraph, Precision
from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.compare import EAGER_FACTOR, error_bound, row_error, top_items_problem
from hstu_compile.errors import ExportError
from hstu_compile.graph_facts import graph_facts
from hstu_compile.metrics import top_k_overlap
from hstu_compile.model import RetrievalModel
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.op_schema import attention_contract, is_attention, node_attributes
from hstu_compile.rewrite import export_passes
from tests.exported_models import (
    TOP_K,
    exported_retrieval,
    rewritten,
    shipped,
    small_config,
    small_model,
    text_of,
    traced_retrieval,
    with_layer,
)
from tests.rewrite.attention_graphs import run_onnx

LENGTHS = [1, 0, 20, 7, 13]
NO_TIME = {"time_bias": "none", "num_time_buckets": 0, "time_bucket_divisor": 1.0}

# Each export costs seconds: every option appears in one of these, not in all combinations.
CONFIGS: dict[str, RetrievalConfig] = {
    "research": small_config(),
    "eight layers": small_config(num_layers=8),
    "one layer, hour encoding": small_config(num_layers=1, hour_encoding="additive"),
    "hour encoding without positions, own time per head": small_config(
        num_layers=1,
        hour_encoding="additive",
        num_positions=0,
        attention={"time_bias": "own", "bias_per_head": True},
    ),
    "rated, layer norm, window, context": small_config(
        num_layers=1,
        preprocessor="rated",
        item_embedding_dim=24,
        num_ratings=5,
        postprocessor="layer_norm",
        item_l2_norm=False,
        attention={"max_attn_len": 5, "min_full_attn_seq_len": 3, "contextual_seq_len": 2, "alpha": 0.2},
    ),
    "DLRM layer without bias": with_layer(
        small_config(attention={"pos_table_len": 0, **NO_TIME, "alpha": 0.2}),
        silu_scope="u",
        uvqk_bias=True,
        input_norm_affine=True,
        output_norm="group",
        output_norm_affine=True,
        output_concat="u_attn_gated",
    ),
}


# A layer more is the same nodes once more.
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "eight layers" else ()) for name in CONFIGS]
#: Of how many items the graph lists the best, of all 40 at most.
TOP = {
    "research": TOP_K,
    "one layer, hour encoding": 1,
    "hour encoding without positions, own time per head": 40,
    "DLRM layer without bias": 10,
}


@functools.cache
def built(name: str, precision: Precision = "fp32") -> tuple[RetrievalModel, OnnxGraph]:
    return shipped(CONFIGS[name], precision, TOP.get(name, 0))


def eager(model: RetrievalModel, arrays: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        activations = model.layer_activations(**tensors)
        users = model.user_embeddings(activations[-1], tensors["seq_offsets"])
    return {"user_embeddings": users.numpy()} | {
        f"layer_{i}": activation.double().numpy() for i, activation in enumerate(activations)
    }


def exact_model(config: RetrievalConfig, model: RetrievalModel) -> RetrievalModel:
    exact = RetrievalModel(config)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return exact.eval().requires_grad_(False).cast(torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_computes_what_the_model_computes_layer_by_layer(name: str) -> None:
    config = CONFIGS[name]
    model, graph = built(name)
    arrays = retrieval_batch("mixed", config, LENGTHS, seed=11).arrays
    right, plain = eager(exact_model(config, model), arrays), eager(model, arrays)
    actual = run_onnx(graph.model, arrays, list(right))
    for tensor, expected in right.items():
        bound = error_bound(row_error(plain[tensor], expected).error, "fp32")
        assert row_error(actual[tensor], expected).error <= bound, tensor
    assert np.abs(right["layer_1"] - right["layer_0"]).max() > 0.1


@pytest.mark.parametrize("name", ["research", "DLRM layer without bias"])
def test_the_float16_graph_errs_at_most_twice_as_much_as_the_eager_float16_model(name: str) -> None:
    config = CONFIGS[name]
    model, graph = built(name, "fp16")
    arrays = retrieval_batch("mixed", config, LENGTHS, seed=11).arrays
    exact = eager(exact_model(config, small_model(config)), arrays)
    plain = eager(model, arrays)
    actual = run_onnx(graph.model, arrays, list(exact))
    for tensor, expected in exact.items():
        own = row_error(plain[tensor], expected).error
        assert 0 < own < 0.05
        assert row_error(actual[tensor], expected).error <= EAGER_FACTOR * own, tensor


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_one_attention_node_that_keeps_the_contract(name: str) -> None:
    config = CONFIGS[name]
    _, graph = built(name)
    nodes = [node for node in graph.model.graph.node if is_attention(node)]
    assert len(nodes) == config.num_layers
    contract, attention = attention_contract(), config.layer.attention
    for node in nodes:
        attributes = node_attributes(node)
        assert attributes["alpha"] == pytest.approx(attention.alpha, rel=1e-7)
        assert attributes["scaling_seq_len"] == attention.scaling_seq_len
        assert attributes["max_query_len"] == attributes["max_seq_len"] == attention.max_seq_len
        for field in ("target_group_size", "contextual_seq_len", "max_attn_len", "min_full_attn_seq_len"):
            assert attributes[field] == getattr(attention, field)
        assert attributes["pos_bias"] == int(attention.pos_table_len > 0)
        assert attributes["time_bias"] == int(attention.time_bias != "none")
        assert attributes["has_num_targets"] == attributes["has_contextual_seq_lens"] == 0
        assert len(node.input) == len(contract.present_inputs(attributes))
        assert all(node.input)
        strings = {a.name: a.s.decode() for a in node.attribute if a.type == onnx.AttributeProto.STRING}
        assert strings == {"plugin_version": contract.version, "plugin_namespace": contract.namespace}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_inputs_and_outputs_are_the_seed_interface(precision: Precision) -> None:
    _, graph = built("research", precision)
    assert [(i.name, i.dtype, i.shape) for i in graph.inputs] == [
        ("item_ids", "int32", ("L",)),
        ("timestamps", "int64", ("L",)),
        ("seq_offsets", "int32", ("B_plus_1",)),
        ("request_timestamps", "int64", ("B",)),
    ]
    outputs = {
        o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.model.graph.output
    }
    assert outputs == {"user_embeddings": ["B", 32], "top_items": ["B", TOP_K], "top_scores": ["B", TOP_K]}
    assert [i.name for i in built("rated, layer norm, window, context")[1].inputs][-1] == "ratings"


def test_versions_are_opset_20_and_ir_10() -> None:
    _, graph = built("research")
    assert graph.model.ir_version == 10
    assert {o.domain: o.version for o in graph.model.opset_import} == {"": 20, "hstu": 1}


@pytest.mark.parametrize("name", NAMES)
def test_only_the_three_axes_are_dynamic_and_paths_are_gone(name: str) -> None:
    _, graph = built(name)
    values = [*graph.model.graph.input, *graph.model.graph.output]
    axes = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    assert axes == {"L", "B", "B_plus_1"}
    assert "/" not in text_of(graph.model)
    assert ".py" not in text_of(graph.model)


@pytest.mark.parametrize("name", NAMES)
def test_output_sizes_never_depend_on_data(name: str) -> None:
    _, graph = built(name) if name != "research" else built(name, "fp16")
    nodes = [*graph.model.graph.node, *(node for f in graph.model.functions for node in f.node)]
    kinds = Counter(node.op_type for node in nodes)
    assert not kinds.keys() & {"NonZero", "Compress", "Unique", "Loop", "If", "ScatterElements"}
    scatters = [node for node in nodes if node.op_type == "ScatterND"]
    assert all(not any(a.name == "reduction" and a.s != b"none" for a in node.attribute) for node in scatters)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_graphs_norm_in_float32_and_multiply_in_half_except_the_top_k_scores(precision: Precision) -> None:
    _, graph = built("research", precision)
    assert graph_facts(graph.model)["precision_counts"] == {
        f"HstuAttention {precision}": 2,
        f"HstuNorm {precision}": 4,
        f"MatMul {precision}": 4,
        "MatMul fp32": 1,  # the top-k scores
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_bias_tables_stay_float32_and_thresholds_integers(precision: Precision) -> None:
    _, graph = built("research", precision)
    types = {tensor.name: tensor.data_type for tensor in graph.model.graph.initializer}
    for node in graph.model.graph.node:
        if is_attention(node):
            present = attention_contract().present_inputs(node_attributes(node))
            named = {each.name: value for each, value in zip(present, node.input, strict=True)}
            assert types[named["pos_table"]] == types[named["ts_table"]] == TensorProto.FLOAT
            assert types[named["ts_thresholds"]] == TensorProto.INT64


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in TOP), ("research", "fp16"), ("DLRM layer without bias", "fp16")],
)
def test_top_k_lists_the_best_unseen_items(name: str, precision: Precision) -> None:
    config, top_k = CONFIGS[name], TOP[name]
    model, graph = built(name, precision)
    arrays = retrieval_batch("mixed", config, LENGTHS, seed=12).arrays
    actual = run_onnx(graph.model, arrays)
    items = model.item_vectors().numpy().astype(np.float64)
    scores = actual["user_embeddings"].astype(np.float64) @ items.T
    seen = np.zeros((len(LENGTHS), 41), bool)
    seen[np.repeat(np.arange(len(LENGTHS)), LENGTHS), arrays["item_ids"]] = True
    seen = seen[:, 1:]
    assert actual["top_items"].shape == (len(LENGTHS), top_k)
    assert top_items_problem(actual["top_items"], actual["top_scores"], scores, seen, 1e-5) is None
    assert (actual["top_items"] == 0).sum() == np.maximum(0, top_k - (~seen).sum(axis=1)).sum()
    if top_k in (TOP_K, 10):
        filled = np.array(LENGTHS) > 0
        best = np.argsort(np.where(seen, np.inf, -scores), axis=1)[:, :top_k] + 1
        assert top_k_overlap(best[filled], actual["top_items"][filled], top_k) == 1.0


def test_an_empty_history_gets_zeros_and_every_item_is_open() -> None:
    name = "hour encoding without positions, own time per head"
    _, graph = built(name)
    arrays = retrieval_batch("empty", CONFIGS[name], [0, 0], seed=1).arrays
    actual = run_onnx(graph.model, arrays)
    assert (actual["user_embeddings"] == 0).all()
    assert sorted(actual["top_items"][0]) == list(range(1, 41))


def test_the_final_graph_passes_the_full_check_where_the_schema_was_never_registered(tmp_path: Path) -> None:
    onnx.save(built("research", "fp16")[1].model, tmp_path / "model.onnx")
    program = (
        "import onnx, sys; onnx.checker.check_model(sys.argv[1], full_check=True); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_building_twice_gives_identical_bytes() -> None:
    config = CONFIGS["research"]
    _, first = built("research", "fp16")
    again = rewritten(exported_retrieval(small_model(config, "fp16"), "fp16", TOP_K), config.num_layers)
    assert again.model.SerializeToString(deterministic=True) == first.model.SerializeToString(deterministic=True)


def test_the_passes_report_what_they_changed() -> None:
    _, graph = built("research")
    taps = tuple(f"layer_{i}" for i in range(3))
    assert [record.name for record in graph.passes] == [step.name for step in export_passes(2, taps)]
    counts = {record.name: record.counts for record in graph.passes}
    assert counts["detach_taps"] == {"taps": 3}
    assert counts["attach_native_body"] == {"functions": 1}


def test_rewriting_leaves_the_exported_graph_alone() -> None:
    _, _, exported = traced_retrieval(CONFIGS["research"], "fp32")
    before = exported.model.SerializeToString(deterministic=True)
    rewritten(exported, 2)
    assert exported.model.SerializeToString(deterministic=True) == before


def test_rewriting_changes_no_number() -> None:
    config = CONFIGS["research"]
    _, _, exported = traced_retrieval(config, "fp32")
    final = rewritten(exported, 2)
    bodiless = onnx.ModelProto()
    bodiless.CopyFrom(exported.model)
    bodiless.functions.extend(final.model.functions)
    arrays = retrieval_batch("mixed", config, LENGTHS, seed=13).arrays
    before = run_onnx(bodiless, arrays)
    after = run_onnx(final.model, arrays, list(before))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_a_model_that_cannot_be_traced_is_refused_with_the_exporters_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("unsupported operator aten::fancy")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match="unsupported operator aten::fancy") as caught:
        exported_retrieval(small_model(CONFIGS["one layer, hour encoding"]), "fp32")
    assert caught.value.code == "HSTU-E201"
