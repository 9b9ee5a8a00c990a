"""Projections become convolutions with the same sums; products of two activations stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from hstu_compile.errors import RewriteError
from hstu_compile.export import exported_from_served
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.project_by_convolution import ProjectByConvolution
from hstu_compile.served import served_graphs
from tests.dlrm_reference import DlrmForm
from tests.exported_models import TOP_K, ranking_model, shipped, small_config
from tests.rewrite.attention_graphs import run_onnx

FEEDS = {
    "item_ids": np.arange(1, 12, dtype=np.int32),
    "timestamps": np.arange(11) * 50_000,
    "seq_offsets": np.array([0, 4, 4, 11], np.int32),
    "request_timestamps": np.full(3, 600_000),
}


# Its weights are beyond what the exporter folds.
WIDE = DlrmForm(width=64, table_dim=64, contextual=(("user_id", 1, 20), ("tags", 2, 0)))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_projection_and_the_item_scores_become_convolutions(precision):
    config = small_config(num_layers=2)
    _, graph = shipped(config, precision, TOP_K)
    model = graph.model
    before = run_onnx(model, FEEDS)
    result = ProjectByConvolution().call(model)
    # In half precision the sums are float32, behind a Cast.
    layers = config.num_layers if precision == "fp32" else 0
    assert result.counts == {"projections": 2 * config.num_layers + 1, "biases": layers, "sums": layers}
    assert not [node for node in model.graph.node if node.op_type == "MatMul"]
    onnx.checker.check_model(model)
    after = run_onnx(model, FEEDS)
    tolerance = {"fp32": 2e-6, "fp16": 2e-3}[precision]
    scale = float(np.sqrt(np.mean(before["user_embeddings"] ** 2)))
    assert np.abs(after["user_embeddings"] - before["user_embeddings"]).max() <= tolerance * scale
    assert (after["top_items"][:, 0] == before["top_items"][:, 0]).all()
    assert not ProjectByConvolution().call(model).modified


def test_product_of_two_activations_stays():
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["M", 4])  # noqa: E731
    nodes = [onnx.helper.make_node("Transpose", ["b"], ["bt"]), onnx.helper.make_node("MatMul", ["a", "bt"], ["y"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value("a"), value("b")], [value("y")]))
    assert not ProjectByConvolution().call(model).modified


ROWS, IN, OUT = 7, 6, 5


def sums_model(dtype, *nodes, outputs=("y",)):
    """Rows x [R, 6] times a constant [6, 5], then `nodes`, which may add bias [5], wide [1, 5] and rows [R, 5]."""
    rng = np.random.default_rng(1)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [onnx.helper.make_tensor_value_info(n, kind, ["R", w]) for n, w in (("x", IN), ("rows", OUT))]
    values = [onnx.helper.make_tensor_value_info(name, kind, ["R", OUT]) for name in outputs]
    shapes = {"kernel": (IN, OUT), "bias": (OUT,), "wide": (1, OUT)}
    constants = [onnx.numpy_helper.from_array(rng.normal(size=s).astype(dtype), n) for n, s in shapes.items()]
    made = [onnx.helper.make_node(op, inputs_.split(), [out]) for op, inputs_, out in nodes]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "kernel"], ["m"]), *made], "g", inputs, values, constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("nodes", "outputs", "counts", "left"),
    [
        ([("Add", "bias m", "s"), ("Add", "rows s", "y")], ("y",), (1, 1, 1), 1),
        ([("Add", "m bias", "y")], ("y",), (1, 1, 0), 0),
        ([("Add", "m rows", "y")], ("y",), (1, 0, 1), 1),
        ([("Add", "m rows", "s"), ("Add", "s bias", "y")], ("y",), (1, 0, 1), 2),
        ([("Add", "m wide", "y")], ("y",), (1, 0, 0), 1),
        ([("Add", "m m", "y")], ("y",), (1, 0, 0), 1),
        ([("Add", "m bias", "s"), ("Add", "rows s", "y")], ("y", "s"), (1, 1, 0), 1),
        ([("Add", "m bias", "s"), ("Neg", "m", "y")], ("y", "s"), (1, 0, 0), 1),
        ([("MatMul", "x kernel", "n"), ("Add", "m n", "y")], ("y",), (2, 0, 1), 1),
        ([("MatMul", "x kernel", "n"), ("Add", "m bias", "s"), ("Add", "n s", "y")], ("y",), (2, 1, 1), 1),
    ],
    ids=["bias and rows", "bias", "rows", "rows before bias", "a bias of two axes", "the product twice",
         "the first sum is an output", "the product is read twice", "two products", "two products and a bias"],
)  # fmt: skip
def test_what_is_added_to_a_product_goes_into_the_convolution(dtype, nodes, outputs, counts, left):
    model = sums_model(dtype, *nodes, outputs=outputs)
    rng = np.random.default_rng(2)
    feeds = {"x": rng.normal(size=(ROWS, IN)).astype(dtype), "rows": rng.normal(size=(ROWS, OUT)).astype(dtype)}
    before = run_onnx(model, feeds)
    result = ProjectByConvolution().call(model)
    assert tuple(result.counts.values()) == counts
    assert sum(node.op_type == "Add" for node in model.graph.node) == left
    onnx.checker.check_model(model, full_check=True)
    # ONNX Runtime rounds each sum of float16 as it did before; a product is at most 3 * 6 here.
    for name, value in run_onnx(model, feeds).items():
        np.testing.assert_allclose(value, before[name], rtol=0, atol=20 * np.finfo(dtype).eps)


def test_lowering_for_a_tensorrt8_without_cublas_accepts_the_convolutions():
    _, graph = shipped(small_config(), "fp16", TOP_K)
    lowered, records = lowered_for_tensorrt8(graph.model, "fp16", native=False, has_cublas=False)
    assert {record.name: record.counts for record in records}["project_by_convolution"]["projections"] == 5
    assert "MatMul" not in {node.op_type for node in lowered.graph.node}
    kept, _ = lowered_for_tensorrt8(graph.model, "fp16", native=False, has_cublas=True)
    assert "Conv" not in {node.op_type for node in kept.graph.node}


def test_a_product_of_two_computed_tensors_is_refused_without_cublas():
    value = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)  # noqa: E731
    nodes = [onnx.helper.make_node("MatMul", ["a", "b"], ["y"], name="two_inputs")]
    graph = onnx.helper.make_graph(nodes, "g", [value("a", ["M", 4]), value("b", [4, "N"])], [value("y", ["M", "N"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(RewriteError, match="MatMul two_inputs multiplies two computed tensors") as caught:
        lowered_for_tensorrt8(model, "fp32", native=False, has_cublas=False)
    assert caught.value.code == "HSTU-E302"
    lowered_for_tensorrt8(model, "fp32", native=False, has_cublas=True)


# What the other two multiply is in the first one as well; each takes seconds to trace.
@pytest.mark.parametrize(
    "index",
    [0, *(pytest.param(index, marks=pytest.mark.slow) for index in (1, 2))],
    ids=["packed", "prefill", "score"],
)
def test_no_product_of_a_ranking_graph_is_left_to_cublas(index):
    """With wide tables the contextual weights were a slice at run time, which no builder took for a constant."""
    served = served_graphs(ranking_model(WIDE, torch.float16), micro_batch=4)[index]
    selection = RowSelection(served.max_candidates, "candidate_offsets") if served.name == "packed" else None
    passes = export_passes(served.num_attention, served.taps, selection)
    *_, graph = apply_passes(exported_from_served(served, "fp16"), passes)
    lowered, _ = lowered_for_tensorrt8(graph.model, "fp16", native=False, has_cublas=False)
    assert not {"MatMul", "Gemm"} & {node.op_type for node in lowered.graph.node}
    assert sum(node.op_type == "Conv" for node in lowered.graph.node) > 10 - 4 * index
