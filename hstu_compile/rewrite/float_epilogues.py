"""Products of half precision by weights in the form that TensorRT-RTX has kernels for Hopper of."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.rewrite._half_sums import HALVES
from hstu_compile.rewrite._pass import Pass, PassResult

_STANDARD = ("", "ai.onnx")
# What a result is called before the zeros are added.
_HALF = "/epilogue/half"


class FloatEpilogues(Pass):
    """A product of a half type by weights ends in an operator of float32: a row of zeros is added to its result.

    TensorRT-RTX fuses what follows a product into its kernel and chooses the kernel by that. Where everything that
    follows is of the half type, or nothing does, 1.6.1 takes one for compute capability 8.0 on an H100; where the last
    operator is float32, with nearly all shapes one for 9.0, which is up to 2.1 times as fast, in float16 and in
    bfloat16 (tests/bench/results/rtx_products.csv). Other GPUs were not tried.

    The zeros come behind additions of that type that alone read the product, a bias and a residual, which stay as they
    are, and are added between a Cast to float32 and one back. No number changes, but -0 becomes 0. TensorRT-RTX does
    not fold them: they are an operand like any row.

    Left alone: 1. products of quantised operands; 2. of float32; 3. products of two values that are computed; 4.
    products that have the zeros, so a second call changes nothing.
    Runs after narrow_adds, which would take the Casts away, and before widen_accumulators.
    """

    name = "float_epilogues"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        served = {value.name for value in graph.output}

        ends: dict[str, tuple[int, int]] = {}
        for node in graph.node:
            is_plain = node.op_type == "MatMul" and node.domain in _STANDARD and quantized.isdisjoint(node.input)
            if not is_plain or node.input[1] not in weights:
                continue
            weight, end = weights[node.input[1]], node.output[0]
            if weight.data_type not in HALVES or len(weight.dims) != 2:
                continue
            while end not in served and len(behind := readers.get(end, [])) == 1 and behind[0].op_type == "Add":
                end = behind[0].output[0]
            if end.endswith(_HALF):
                continue
            ends[end] = weight.dims[1], weight.data_type
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            if node.output and (found := ends.get(node.output[0])) is not None:
                epilogue, zeros = _epilogue(node.output[0], *found)
                nodes[-1].output[0] = epilogue[0].input[0]
                nodes += epilogue
                graph.initializer.append(zeros)
        if ends:
            del graph.node[:]
            graph.node.extend(nodes)
        return PassResult({"products": len(ends)})


def _epilogue(result: str, width: int, kind: int) -> tuple[list[onnx.NodeProto], TensorProto]:
    """Nodes that add zeros in float32 to what is `result` without them, and the zeros."""
    half, wide, total, zeros = result + _HALF, *(f"{result}/epilogue/{each}" for each in ("wide", "sum", "zeros"))
    nodes = [
        helper.make_node("Cast", [half], [wide], name=wide, to=TensorProto.FLOAT),
        helper.make_node("Add", [wide, zeros], [total], name=total),
        helper.make_node("Cast", [total], [result], name=f"{result}/epilogue", to=kind),
    ]
    return nodes, numpy_helper.from_array(np.zeros(width, np.float32), zeros)
