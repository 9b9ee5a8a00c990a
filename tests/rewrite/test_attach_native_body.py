from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from hstu_compile.errors import RewriteError
from hstu_compile.op_schema import is_attention
from hstu_compile.rewrite.attach_native_body import AttachNativeBody
from tests import tolerances
from tests.attention_cases import build_case
from tests.oracle import AttentionCase, ErrorBound, attention_error, check_attention, oracle_of
from tests.rewrite.attention_graphs import attention_model, attention_node, contract_attributes, feeds_of, run_onnx

CASE = build_case([7, 0, 12], seed=1)
WINDOWED = dataclasses.replace(CASE, attrs=dataclasses.replace(CASE.attrs, alpha=0.375, max_attn_len=3))

# ONNX Runtime's float32 sigmoid has an absolute error of half a unit at 0.5, which is a relative one where all scores
# of a row are far below zero: such a row is held to the type's bound on the rms scale.
BOUND = ErrorBound(tolerances.LARGEST_COMPONENTWISE, tolerances.RMS["float32"])


def two_layers(first: AttentionCase, second: AttentionCase) -> onnx.ModelProto:
    nodes = [
        attention_node(contract_attributes(first), "out_0"),
        attention_node(contract_attributes(second), "out_1"),
    ]
    return attention_model(CASE, nodes)


def attach(model: onnx.ModelProto, num_layers: int = 2) -> dict[str, int]:
    step = AttachNativeBody(num_layers)
    step.requires(model)
    result = step.call(model)
    step.ensures(model, result)
    onnx.checker.check_model(model, full_check=True)
    return result.counts


def test_layers_with_equal_attributes_share_one_function() -> None:
    model = two_layers(CASE, CASE)
    assert attach(model) == {"functions": 1}
    assert [node.overload for node in model.graph.node] == ["", ""]


def test_layers_with_different_attributes_get_one_overload_each_and_both_run_right() -> None:
    model = two_layers(CASE, WINDOWED)
    assert attach(model) == {"functions": 2}
    assert [node.overload for node in model.graph.node] == [function.overload for function in model.functions]
    outputs = run_onnx(model, feeds_of(CASE))
    right = {"out_0": oracle_of(CASE), "out_1": oracle_of(WINDOWED)}
    for name, result in right.items():
        check_attention(outputs[name], result, "float32", BOUND)
    swapped = attention_error(outputs["out_0"], right["out_1"], "float32")
    assert swapped.rms > BOUND.rms


def test_the_operator_keeps_its_name_so_that_a_plugin_can_take_it() -> None:
    model = two_layers(CASE, WINDOWED)
    attach(model)
    assert all(is_attention(node) for node in model.graph.node)


def test_a_second_run_reports_nothing() -> None:
    model = two_layers(CASE, WINDOWED)
    attach(model)
    before = model.SerializeToString(deterministic=True)
    assert not AttachNativeBody(2).call(model).modified
    assert model.SerializeToString(deterministic=True) == before


def test_tables_of_different_length_get_their_own_function() -> None:
    case = build_case([5, 9], time_bias="shared", num_buckets=24, seed=2)
    node = attention_node(contract_attributes(case), "out_0")
    other = attention_node(contract_attributes(case), "out_1", ts_table="short_table", ts_thresholds="short")
    model = attention_model(case, [node, other])
    assert case.ts_thresholds is not None
    assert case.ts_table is not None
    model.graph.initializer.append(onnx.numpy_helper.from_array(case.ts_thresholds[:3], "short"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(case.ts_table[:, :4], "short_table"))
    assert attach(model) == {"functions": 2}
    outputs = run_onnx(model, feeds_of(case))
    short = dataclasses.replace(case, ts_table=case.ts_table[:, :4], ts_thresholds=case.ts_thresholds[:3])
    check_attention(outputs["out_0"], oracle_of(case), "float32", BOUND)
    check_attention(outputs["out_1"], oracle_of(short), "float32", BOUND)


def test_fewer_attention_nodes_than_layers_are_refused() -> None:
    with pytest.raises(RewriteError, match="attach_native_body changed 2 of 3 attention") as caught:
        attach(two_layers(CASE, CASE), num_layers=3)
    assert caught.value.code == "HSTU-E301"


def alphas_in_network(model: onnx.ModelProto) -> list[float]:
    """The float constants by which TensorRT-RTX's parser makes each attention multiply its scores, in node order."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            value = np.asarray(layer.weights)
            if value.dtype == np.float32 and value.size == 1 and float(value.ravel()[0]) in (0.25, 0.375):
                found.append(float(value.ravel()[0]))
    return found


def test_inlined_overloads_reach_tensorrt_rtx_with_their_own_attributes() -> None:
    model = two_layers(CASE, WINDOWED)
    attach(model)
    assert alphas_in_network(onnx.inliner.inline_local_functions(model)) == [0.25, 0.375]


def test_tensorrt_rtx_reads_one_body_for_all_overloads_so_they_must_be_inlined_first() -> None:
    model = two_layers(CASE, WINDOWED)
    attach(model)
    assert alphas_in_network(model) == [0.25, 0.25]
