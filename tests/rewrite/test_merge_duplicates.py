"""Equal work is done once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.rewrite.merge_duplicates import MergeDuplicates
from tests.exported_models import shipped, small_config


def graph_of(nodes: list[onnx.NodeProto], outputs: list[str], initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["L"])  # noqa: E731
    graph = helper.make_graph(nodes, "g", [value("x")], [value(name) for name in outputs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def test_equal_chains_collapse_to_one():
    two = [numpy_helper.from_array(np.float32([2.0]), name) for name in ("a", "b")]
    model = graph_of(
        [
            helper.make_node("Mul", ["x", "a"], ["m1"]),
            helper.make_node("Mul", ["x", "b"], ["m2"]),
            helper.make_node("Abs", ["m1"], ["n1"]),
            helper.make_node("Abs", ["m2"], ["n2"]),
            helper.make_node("Add", ["n1", "n2"], ["y"]),
        ],
        ["y"],
        two,
    )
    x = np.float32([-1.5, 2.0])
    before = run(model, {"x": x})
    result = MergeDuplicates().call(model)
    assert result.counts == {"nodes": 2, "initializers": 1}
    assert [node.op_type for node in model.graph.node] == ["Mul", "Abs", "Add"]
    np.testing.assert_array_equal(run(model, {"x": x})[0], before[0])
    assert not MergeDuplicates().call(model).modified


def test_different_attributes_outputs_and_random_draws_stay():
    nodes = [
        helper.make_node("Elu", ["x"], ["e1"], alpha=1.0),
        helper.make_node("Elu", ["x"], ["e2"], alpha=2.0),
        helper.make_node("Neg", ["x"], ["y1"]),
        helper.make_node("Neg", ["x"], ["y2"]),
        helper.make_node("RandomUniformLike", ["x"], ["r1"], seed=1.0),
        helper.make_node("RandomUniformLike", ["x"], ["r2"], seed=1.0),
        helper.make_node("Sum", ["e1", "e2", "r1", "r2"], ["y3"]),
    ]
    model = graph_of(nodes, ["y1", "y2", "y3"], [])
    assert not MergeDuplicates().call(model).modified
    assert len(model.graph.node) == len(nodes)


def test_layers_share_masks_and_buckets_and_answer_the_same():
    config = small_config(num_layers=3)
    _, graph = shipped(config)
    inlined = onnx.inliner.inline_local_functions(graph.model)
    nodes = len(inlined.graph.node)
    feeds = {
        "item_ids": np.arange(1, 12, dtype=np.int32),
        "timestamps": np.arange(11) * 50_000,
        "seq_offsets": np.array([0, 4, 4, 11], np.int32),
        "request_timestamps": np.full(3, 600_000),
    }
    before = run(inlined, feeds)
    result = MergeDuplicates().call(inlined)
    onnx.checker.check_model(inlined)
    # Two of three layers drop their masks, padding indices and bucket search: more than a quarter of the graph.
    assert result.counts["nodes"] > nodes // 4
    for ours, theirs in zip(run(inlined, feeds), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not MergeDuplicates().call(inlined).modified
