"""Products of float16 matrices in the form in which TensorRT-RTX adds up in float32."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from hstu_compile.rewrite._pass import Pass, PassResult

_STANDARD = ("", "ai.onnx")


class WidenAccumulators(Pass):
    """MatMul(a, b) of float16 becomes Cast(MatMul(Cast(a), Cast(b))), by way of float32.

    A product that keeps its operands and its result in float16 may add up in whatever type is fastest. This form asks
    for float32 sums: TensorRT-RTX takes all three Casts into one product of float16 operands, whose plan says
    `accumulation_type=2` where that of the plain product says 0 (1.6.1).

    Left alone: 1. products of quantised operands, whose pattern a Cast would break; 2. bfloat16, which has no narrower
    sums than float32; 3. products that read float32 already, so a second call changes nothing.
    Runs after narrow_adds, which takes Casts away behind a product.
    """

    name = "widen_accumulators"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        # One Cast for each operand, whoever reads it.
        widened: dict[str, str] = {}
        nodes: list[onnx.NodeProto] = []
        products = 0
        for node in graph.node:
            is_plain = node.op_type == "MatMul" and node.domain in _STANDARD and quantized.isdisjoint(node.input)
            # Operands are of one type; what a segment's Gather makes may have none that can be inferred.
            if not is_plain or all(kinds.get(name) != TensorProto.FLOAT16 for name in node.input):
                nodes.append(node)
                continue
            for name in node.input:
                if name not in widened:
                    widened[name] = f"{name}/widened"
                    nodes.append(_cast(name, widened[name], TensorProto.FLOAT))
            wide = f"{node.output[0]}/float32"
            nodes.append(helper.make_node("MatMul", [widened[name] for name in node.input], [wide], name=node.name))
            nodes.append(_cast(wide, node.output[0], TensorProto.FLOAT16))
            products += 1
        if products:
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
        return PassResult({"products": products})


def _cast(source: str, result: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=kind)
