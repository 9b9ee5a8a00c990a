"""Lowering to TensorRT 8: the same numbers, nothing left that its parser cannot read, refusals by name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.calibration.append_batches import append_arrays
from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.compare import error_bound, row_error
from hstu_compile.errors import RewriteError
from hstu_compile.export import exported_from_served
from hstu_compile.model.time_features import distance_buckets, distance_thresholds
from hstu_compile.rewrite import apply_passes, export_passes
from hstu_compile.rewrite.lower_tensorrt8 import (
    _AXES_MOVED,
    _NEW_ATTRIBUTES,
    _UNCHANGED,
    DecomposeLayerNormalization,
    LowerToOpset17,
    NarrowInt64,
    lowered_for_tensorrt8,
)
from hstu_compile.served import GraphInput, ServedGraph, served_graphs
from tests.exported_models import NUM_LAYERS, TOP_K, exported_graph, request_batch, research_model
from tests.tolerances import COMPONENTWISE


def run(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    cast = {i.name: feeds[i.name].astype(wanted.get(i.type, feeds[i.name].dtype)) for i in session.get_inputs()}
    return list(session.run(None, cast))


def graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, NDArray[Any]] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
            [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_lowered_model_gives_the_same_numbers(precision: Any) -> None:
    model = exported_graph(precision, top_k=TOP_K)
    feeds = request_batch((5, 0, 24, 1))
    lowered, _ = lowered_for_tensorrt8(model, precision, native=True)
    for name, before, after in zip(
        [o.name for o in model.graph.output], run(model, feeds), run(lowered, feeds), strict=True
    ):
        if before.dtype.kind == "i":
            np.testing.assert_array_equal(after, before, err_msg=name)
        else:
            rms = np.sqrt(np.mean(np.square(before)))
            assert rms > 0
            # LayerNorm is float32 in both; ONNX Runtime sums it in another order, and a half sum may round differently.
            assert np.abs(after - before).max() <= COMPONENTWISE["float32" if precision == "fp32" else "float16"] * rms


# Appending has ratings, keys and values that are outputs, as prefill has, and reads cached rows besides.
@pytest.mark.parametrize("name", [pytest.param("prefill", marks=pytest.mark.slow), "append"])
def test_the_lowered_graphs_of_growing_histories_give_the_same_numbers(name: str) -> None:
    model = research_model("fp32", rated=True)
    graphs = {each.name: each for each in served_graphs(model, 5, max_append=6)}
    feeds = retrieval_batch("drawn", model.config, [9, 0, 24, 1, 7], seed=1).arrays
    if name == "append":
        rows = graphs["prefill"].run(feeds)
        rows = {each: rows[each].astype(np.float32) for each in ("k_0", "v_0", "k_1", "v_1")}
        feeds = append_arrays(model.config, feeds, rows, 6, top_k=5)
    served = graphs[name]
    passes = export_passes(served.num_attention, served.taps)
    *_, last = apply_passes(exported_from_served(served, "fp32"), passes)
    lowered, _ = lowered_for_tensorrt8(last.model, "fp32", native=True)
    names = [each.name for each in last.model.graph.output]
    for output, before, after in zip(names, run(last.model, feeds), run(lowered, feeds), strict=True):
        if before.dtype.kind == "i":
            np.testing.assert_array_equal(after, before, err_msg=output)
        else:
            error = row_error(after.astype(np.float64), before.astype(np.float64)).error
            assert error <= error_bound(0.0, "fp32"), output


@pytest.mark.parametrize("native", [True, False])
def test_nothing_remains_that_the_parser_misreads(native: bool) -> None:
    model = exported_graph("fp16", top_k=TOP_K)
    untouched = model.SerializeToString()
    lowered, records = lowered_for_tensorrt8(model, "fp16", native=native)
    assert model.SerializeToString() == untouched
    assert [(o.domain, o.version) for o in lowered.opset_import if o.domain == ""] == [("", 17)]
    assert lowered.ir_version == 8
    assert not lowered.functions
    operators = Counter(node.op_type for node in lowered.graph.node)
    assert operators["HstuAttention"] == (0 if native else NUM_LAYERS)
    assert operators["HstuNorm"] == (0 if native else 2 * NUM_LAYERS)
    assert operators["LayerNormalization"] == operators["CastLike"] == operators["Constant"] == 0
    assert not [n.name for n in lowered.graph.node if n.op_type == "Shape" and n.attribute]
    assert not [n.name for n in lowered.graph.node if n.op_type == "Squeeze" and len(n.input) < 2]
    assert {i.type.tensor_type.elem_type for i in lowered.graph.input} == {TensorProto.INT32}
    for tensor in lowered.graph.initializer:
        if tensor.data_type == TensorProto.INT64:
            values = numpy_helper.to_array(tensor)
            assert values.size == 0 or (values.min() >= -(2**31) and values.max() < 2**31), tensor.name
    counts = {record.name: record.counts for record in records}
    assert counts["decompose_layer_normalization"] == {"layer_normalization": 2 * NUM_LAYERS if native else 0}
    assert counts["narrow_int64"]["inputs"] == 2


def test_lowering_twice_changes_nothing() -> None:
    once, _ = lowered_for_tensorrt8(exported_graph("fp32", top_k=TOP_K), "fp32", native=False)
    twice, records = lowered_for_tensorrt8(once, "fp32", native=False)
    assert {r.name: r.counts for r in records if any(r.counts.values())} == {}
    assert twice == once


def test_the_plugin_reads_int32_timestamps_and_thresholds() -> None:
    lowered, _ = lowered_for_tensorrt8(exported_graph("fp32", top_k=TOP_K), "fp32", native=False)
    kinds = {t.name: t.data_type for t in lowered.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in [*lowered.graph.input, *lowered.graph.value_info]}
    nodes = [n for n in lowered.graph.node if n.op_type == "HstuAttention"]
    for node in nodes:
        assert [kinds[name] for name in (node.input[5], node.input[6], node.input[9])] == [TensorProto.INT32] * 3


class Buckets(torch.nn.Module):
    """Time buckets alone, as a graph."""

    def __init__(self, largest: int, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("thresholds", distance_thresholds(largest, function).clone())

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor]:
        return (distance_buckets(values[0], self.get_buffer("thresholds"), self.function),)


@pytest.mark.parametrize(("largest", "function"), [(2048, "sqrt"), (2048, "log"), (1, "sqrt")])
def test_time_buckets_are_exact_in_64_bits_and_lowered_to_32(largest: int, function: Any) -> None:
    thresholds = distance_thresholds(largest, function).numpy()
    near = (thresholds[:, None] + np.arange(-1, 2)).ravel()
    seconds = np.concatenate([near, 2 ** np.arange(62), -(2 ** np.arange(63)), [2**31 - 2]])
    seconds = seconds[seconds < 2**62]
    inputs = (GraphInput("seconds", "L", torch.arange(7)),)
    served = ServedGraph("packed", Buckets(largest, function), inputs, ("buckets",), (), 0, "all")
    model = exported_from_served(served, "fp32").model

    def counted(distances: NDArray[Any]) -> NDArray[Any]:
        return np.searchsorted(thresholds, distances.clip(0), side="right") - 1

    np.testing.assert_array_equal(run(model, {"seconds": seconds})[0], counted(seconds))
    lowered, _ = lowered_for_tensorrt8(model, "fp16", native=True)
    narrow = seconds[np.abs(seconds) < 2**31 - 1]
    np.testing.assert_array_equal(run(lowered, {"seconds": narrow})[0], counted(narrow))
    # The builder rounds constants of float32 layers to half in a half-precision engine.
    floats = [numpy_helper.to_array(t) for t in lowered.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert floats
    assert all(np.abs(each).max() <= 65504 for each in floats)


def test_bfloat16_is_refused_with_the_way_out() -> None:
    with pytest.raises(RewriteError, match="tensors are bfloat16") as caught:
        lowered_for_tensorrt8(exported_graph("bf16", top_k=TOP_K), "bf16", native=False)
    assert caught.value.code == "HSTU-E302"
    assert "--fp16" in caught.value.fix


def test_an_unknown_operator_is_refused_by_name() -> None:
    model = graph(
        [helper.make_node("Gelu", ["x"], ["y"], name="act")],
        {"x": (TensorProto.FLOAT, ["L"])},
        {"y": (TensorProto.FLOAT, ["L"])},
    )
    with pytest.raises(RewriteError, match="Gelu act"):
        lowered_for_tensorrt8(model, "fp32", native=False)


def test_a_newer_opset_is_refused_before_any_pass() -> None:
    model = graph(
        [helper.make_node("Abs", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, ["L"])},
        {"y": (TensorProto.FLOAT, ["L"])},
        opset=21,
    )
    with pytest.raises(RewriteError, match="it is opset 21"):
        lowered_for_tensorrt8(model, "fp32", native=False)


@pytest.mark.parametrize("k", [3841, 4000])
def test_a_top_k_beyond_the_limit_is_refused(k: int) -> None:
    model = graph(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"], name="best")],
        {"x": (TensorProto.FLOAT, ["B", 5000])},
        {"v": (TensorProto.FLOAT, ["B", k]), "i": (TensorProto.INT64, ["B", k])},
        {"k": np.array([k])},
    )
    with pytest.raises(RewriteError, match=f"K is {k}"):
        lowered_for_tensorrt8(model, "fp32", native=False)


def test_the_table_of_unchanged_operators_agrees_with_onnx() -> None:
    for name in sorted(_UNCHANGED):
        old, new = onnx.defs.get_schema(name, 17), onnx.defs.get_schema(name, 20)
        assert [i.name for i in old.inputs] == [i.name for i in new.inputs], name
        assert set(old.attributes) == set(new.attributes), name


def test_the_tables_of_changed_operators_agree_with_onnx() -> None:
    for name in sorted(_AXES_MOVED):
        assert "axes" in onnx.defs.get_schema(name, 17).attributes, name
        assert [i.name for i in onnx.defs.get_schema(name, 20).inputs] == ["data", "axes"], name
    assert set(onnx.defs.get_schema("Cast", 20).attributes) - set(onnx.defs.get_schema("Cast", 17).attributes) == {
        _NEW_ATTRIBUTES["Cast"][0]
    }


FLOATS: dict[str, tuple[int, list[Any]]] = {"x": (TensorProto.FLOAT, ["L", 4])}
X = np.arange(12, dtype=np.float32).reshape(3, 4) - 5

CASES: dict[str, tuple[onnx.ModelProto, dict[str, NDArray[Any]], str]] = {
    "reduction with axes": (
        graph(
            [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)],
            FLOATS,
            {"y": (TensorProto.FLOAT, ["L"])},
            {"axes": np.array([1])},
        ),
        {"x": X},
        "ReduceMean",
    ),
    "reduction over nothing": (
        graph(
            [helper.make_node("ReduceMax", ["x"], ["y"], noop_with_empty_axes=1)],
            FLOATS,
            {"y": (TensorProto.FLOAT, ["L", 4])},
        ),
        {"x": X},
        "ReduceMax",
    ),
    "shape from the second axis": (
        graph([helper.make_node("Shape", ["x"], ["y"], start=1)], FLOATS, {"y": (TensorProto.INT64, [1])}),
        {"x": X},
        "Shape",
    ),
    "shape up to the last axis": (
        graph([helper.make_node("Shape", ["x"], ["y"], end=-1)], FLOATS, {"y": (TensorProto.INT64, [1])}),
        {"x": X},
        "Shape",
    ),
    "squeeze without axes": (
        graph(
            [helper.make_node("Squeeze", ["x"], ["y"])],
            {"x": (TensorProto.FLOAT, [1, 4, 1])},
            {"y": (TensorProto.FLOAT, [4])},
        ),
        {"x": X[:1, :, None]},
        "Squeeze",
    ),
    "integer clip": (
        graph(
            [helper.make_node("Clip", ["x", "low", "high"], ["y"])],
            {"x": (TensorProto.INT32, ["L"])},
            {"y": (TensorProto.INT32, ["L"])},
            {"low": np.array(0, np.int32), "high": np.array(7, np.int32)},
        ),
        {"x": np.array([-3, 0, 5, 9], np.int32)},
        "Clip",
    ),
    "clip without an upper bound": (
        graph(
            [helper.make_node("Clip", ["x", "low"], ["y"])],
            {"x": (TensorProto.FLOAT, ["L"])},
            {"y": (TensorProto.FLOAT, ["L"])},
            {"low": np.array(1e-6, np.float32)},
        ),
        {"x": np.array([-3.0, 0.0, 5.0, 1e9], np.float32)},
        "Clip",
    ),
    "integer sum": (
        graph(
            [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
            {"x": (TensorProto.INT32, ["L", 3])},
            {"y": (TensorProto.INT32, ["L"])},
            {"axes": np.array([1])},
        ),
        {"x": np.array([[1, 2, 3], [4_000_000, 5, 6]], np.int32)},
        "ReduceSum",
    ),
    "split in equal parts": (
        graph(
            [helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)],
            FLOATS,
            {"y": (TensorProto.FLOAT, ["L", 2]), "z": (TensorProto.FLOAT, ["L", 2])},
        ),
        {"x": X},
        "Split",
    ),
    "cast like": (
        graph(
            [helper.make_node("CastLike", ["x", "like"], ["y"])],
            FLOATS,
            {"y": (TensorProto.INT32, ["L", 4])},
            {"like": np.array(0, np.int32)},
        ),
        {"x": X},
        "CastLike",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_operator_keeps_its_meaning(case: str) -> None:
    model, feeds, operator = CASES[case]
    lowered, records = lowered_for_tensorrt8(model, "fp32", native=False)
    assert records[-1].counts[operator] == 1
    for before, after in zip(run(model, feeds), run(lowered, feeds), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("scale", ["ones", "general", "half"])
def test_layer_normalization_in_primitives(scale: str) -> None:
    rng = np.random.default_rng(0)
    dtype = np.float16 if scale == "half" else np.float32
    kind = TensorProto.FLOAT16 if scale == "half" else TensorProto.FLOAT
    weight = np.ones(16) if scale == "ones" else rng.normal(size=16)
    model = graph(
        [helper.make_node("LayerNormalization", ["x", "w", "b"], ["y"], axis=-1, epsilon=1e-6)],
        {"x": (kind, ["L", 16])},
        {"y": (kind, ["L", 16])},
        {"w": weight.astype(dtype), "b": rng.normal(size=16).astype(dtype)},
    )
    x = (rng.normal(size=(5, 16)) * 100 + 30).astype(dtype)
    (before,) = run(model, {"x": x})
    result = DecomposeLayerNormalization().call(model)
    assert result.counts == {"layer_normalization": 1}
    assert [n.op_type for n in model.graph.node].count("Mul") == (1 if scale == "ones" else 2)
    (after,) = run(model, {"x": x})
    scaled = COMPONENTWISE["float16" if scale == "half" else "float32"]
    assert np.abs(after.astype(np.float64) - before).max() <= scaled * np.abs(before.astype(np.float64)).max()
    assert not DecomposeLayerNormalization().call(model).modified


def test_narrowing_refuses_what_it_does_not_know() -> None:
    model = graph(
        [helper.make_node("CumSum", ["t", "axis"], ["y"], name="running")],
        {"t": (TensorProto.INT64, ["L"])},
        {"y": (TensorProto.INT64, ["L"])},
        {"axis": np.array(0)},
    )
    with pytest.raises(RewriteError, match="CumSum running reads t"):
        NarrowInt64().call(model)


def test_narrowing_casts_what_is_not_a_constant_and_keeps_indices_wide() -> None:
    model = graph(
        [
            helper.make_node("Cast", ["n"], ["wide"], to=TensorProto.INT64),
            helper.make_node("Add", ["t", "wide"], ["sum"]),
            helper.make_node("GatherND", ["sum", "index"], ["y"]),
        ],
        {"t": (TensorProto.INT64, [3]), "n": (TensorProto.INT32, [3]), "index": (TensorProto.INT64, [2, 1])},
        {"y": (TensorProto.INT64, [2])},
    )
    feeds = {"t": np.array([5, 6, 7]), "n": np.array([1, 2, 3], np.int32), "index": np.array([[2], [0]])}
    (before,) = run(model, feeds)
    NarrowInt64().call(model)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.INT32
    (after,) = run(model, feeds)
    np.testing.assert_array_equal(after, before)


def test_a_norm_over_no_axis_is_refused() -> None:
    node = helper.make_node("ReduceL2", ["x"], ["y"], noop_with_empty_axes=1, name="norm")
    model = graph([node], FLOATS, {"y": (TensorProto.FLOAT, ["L", 4])})
    with pytest.raises(RewriteError, match="norm: it reduces over no axis"):
        LowerToOpset17().call(model)


def test_lowering_needs_a_size_that_divides() -> None:
    model = graph(
        [helper.make_node("Split", ["x"], ["y", "z"], axis=0, num_outputs=2, name="halves")],
        FLOATS,
        {"y": (TensorProto.FLOAT, ["M", 4]), "z": (TensorProto.FLOAT, ["N", 4])},
    )
    with pytest.raises(RewriteError, match="halves: axis 0 of size None"):
        LowerToOpset17().call(model)
