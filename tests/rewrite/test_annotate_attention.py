from __future__ import annotations

import onnx
import pytest

from hstu_compile.errors import InternalError, RewriteError
from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.rewrite.annotate_attention import AnnotateAttention


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if is_attention(node)]


def without_annotations(model: onnx.ModelProto) -> onnx.ModelProto:
    outputs = {node.output[0] for node in attention_nodes(model)}
    kept = [info for info in model.graph.value_info if info.name not in outputs]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return model


def test_every_attention_output_gets_the_type_of_v_and_the_rows_of_q(exported: onnx.ModelProto) -> None:
    model = without_annotations(exported)
    step = AnnotateAttention(2)
    step.requires(model)
    assert step.call(model).counts == {"attention": 2}
    infos = {info.name: info.type.tensor_type for info in model.graph.value_info}
    for node in attention_nodes(model):
        out = infos[node.output[0]]
        assert out.elem_type == onnx.TensorProto.FLOAT
        assert [dim.dim_param or dim.dim_value for dim in out.shape.dim] == ["L", 2, 25]


def test_a_second_run_reports_nothing(exported: onnx.ModelProto) -> None:
    model = without_annotations(exported)
    AnnotateAttention(2).call(model)
    assert not AnnotateAttention(2).call(model).modified


def test_every_node_gets_the_silu_that_the_build_asked_for(exported: onnx.ModelProto) -> None:
    assert [node_attributes(node)["silu"] for node in attention_nodes(exported)] == [0, 0]
    assert AnnotateAttention(2, "accurate").call(exported).counts["silu"] == 2
    assert [node_attributes(node)["silu"] for node in attention_nodes(exported)] == [1, 1]
    assert not AnnotateAttention(2, "accurate").call(exported).modified
    assert AnnotateAttention(2).call(exported).counts["silu"] == 2
    assert [node_attributes(node)["silu"] for node in attention_nodes(exported)] == [0, 0]


def test_fewer_attention_nodes_than_layers_are_refused(exported: onnx.ModelProto) -> None:
    with pytest.raises(RewriteError, match="changed 2 of 3 attention") as caught:
        AnnotateAttention(3).requires(exported)
    assert caught.value.code == "HSTU-E301"


def test_an_attribute_outside_the_contract_is_refused(exported: onnx.ModelProto) -> None:
    node = attention_nodes(exported)[1]
    next(a for a in node.attribute if a.name == "scaling_seq_len").f = 0.0
    with pytest.raises(InternalError, match=r"scaling_seq_len is 0\.0; it must be greater than 0"):
        AnnotateAttention(2).requires(exported)
