from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from hstu_compile.rewrite.attach_native_body import AttachNativeBody
from hstu_compile.rewrite.merge_duplicates import MergeDuplicates
from tests.attention_cases import build_case
from tests.oracle import check_attention, oracle_of
from tests.rewrite.attention_graphs import attention_model, attention_node, contract_attributes, feeds_of, run_onnx

CASE = build_case([7, 0, 12], time_bias="shared", pos_bias="shared", seed=1)
HALF = dataclasses.replace(CASE, attrs=dataclasses.replace(CASE.attrs, alpha=CASE.attrs.alpha / 2))


def two_layers() -> onnx.ModelProto:
    nodes = [attention_node(contract_attributes(CASE), "out_0"), attention_node(contract_attributes(HALF), "out_1")]
    model = attention_model(CASE, nodes)
    AttachNativeBody(2).call(model)
    return model


def small_graph(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", *outputs)]
    graph = helper.make_graph(list(nodes), "g", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def inlined() -> onnx.ModelProto:
    return onnx.inliner.inline_local_functions(two_layers())


def test_each_layer_keeps_its_own_attributes_when_equal_work_is_merged() -> None:
    model = inlined()
    assert MergeDuplicates().call(model).modified
    outputs = run_onnx(model, feeds_of(CASE))
    check_attention(outputs["out_0"], oracle_of(CASE), "float32")
    check_attention(outputs["out_1"], oracle_of(HALF), "float32")


def test_layers_share_what_follows_from_offsets_and_times_and_compute_the_same_as_before() -> None:
    model = inlined()
    before = run_onnx(model, feeds_of(CASE))
    count = len(model.graph.node)
    result = MergeDuplicates().call(model)
    assert result.counts == {"nodes": count - len(model.graph.node)}
    assert len(model.graph.node) < 0.65 * count
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 3  # q k^T once; alpha differs after it
    for name, value in run_onnx(model, feeds_of(CASE)).items():
        np.testing.assert_array_equal(value, before[name])


def test_merging_twice_reports_nothing() -> None:
    model = inlined()
    MergeDuplicates().call(model)
    assert not MergeDuplicates().call(model).modified


def test_equal_operators_with_other_attributes_stay() -> None:
    model = small_graph(
        helper.make_node("LeakyRelu", ["x"], ["a"], alpha=0.1),
        helper.make_node("LeakyRelu", ["x"], ["b"], alpha=0.2),
        helper.make_node("Add", ["a", "b"], ["y"]),
    )
    assert MergeDuplicates().call(model).counts == {"nodes": 0}


def test_two_graph_outputs_of_one_value_keep_their_names() -> None:
    model = small_graph(
        helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"]), outputs=("y", "z")
    )
    assert MergeDuplicates().call(model).counts == {"nodes": 0}


def test_chains_merge_from_their_start() -> None:
    model = small_graph(
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Neg", ["x"], ["b"]),
        helper.make_node("Exp", ["a"], ["c"]),
        helper.make_node("Exp", ["b"], ["d"]),
        helper.make_node("Add", ["c", "d"], ["y"]),
    )
    assert MergeDuplicates().call(model).counts == {"nodes": 2}
    assert list(model.graph.node[-1].input) == ["c", "c"]


def test_two_random_draws_stay_two() -> None:
    draws = [helper.make_node("RandomUniformLike", ["x"], [name]) for name in ("a", "b")]
    model = small_graph(*draws, helper.make_node("Sub", ["a", "b"], ["y"]))
    assert MergeDuplicates().call(model).counts == {"nodes": 0}
