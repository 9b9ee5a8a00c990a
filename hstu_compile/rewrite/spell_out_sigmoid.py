"""Sigmoids of float32 values spelled with an exponential, for runtimes whose own Sigmoid is less accurate."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.rewrite._pass import Pass, PassResult

_STANDARD = ("", "ai.onnx")
_ONE = "spell_out_sigmoid/one"


class SpellOutSigmoid(Pass):
    """Sigmoid(x) becomes 1 / (1 + exp(-x)), and x * Sigmoid(x), which is SiLU, becomes x / (1 + exp(-x)).

    TensorRT 8 makes 0.5 + 0.5 * tanh(0.5 * x) of a Sigmoid. Where x is far below 0 the two halves cancel, so an error
    of tanh comes out as it is however small the result: SiLU(x) errs by |x| / 2 times that error instead of by a part
    of itself. Row errors of 8 layers, measured up to 1e-4, fit a tanh that errs by 5e-6 of its value
    (docs/fp32-accuracy.md). ONNX Runtime's Sigmoid on a CPU errs by 1e-7 at any x, which far below 0 is more than the
    Sigmoid (docs/pitfalls.md). A quotient errs by a part of itself, at any x: exp overflows to infinity below -88 and
    gives -0.

    Cases: 1. Mul of x and Sigmoid(x) in either order: one Div; 2. any other reader of a Sigmoid: Div of 1; 3. a Sigmoid
    in a half type stays: rounding the result costs more than tanh does. A value of unknown type counts as float32: the
    pass is for graphs of that precision, without local functions, whose values have no types.
    """

    name = "spell_out_sigmoid"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        inferred = onnx.shape_inference.infer_shapes(model).graph
        kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
        kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        sigmoids: dict[str, str] = {}
        for node in graph.node:
            is_sigmoid = node.op_type == "Sigmoid" and node.domain in _STANDARD
            if is_sigmoid and kinds.get(node.input[0], TensorProto.FLOAT) == TensorProto.FLOAT:
                sigmoids[node.output[0]] = node.input[0]
        silus = {node.output[0]: pair for node in graph.node if (pair := self._silu_of(node, sigmoids)) is not None}
        read = {name for node in graph.node if not node.output or node.output[0] not in silus for name in node.input}
        read |= {value.name for value in graph.output}

        nodes: list[onnx.NodeProto] = []
        counts = {"silus": 0, "sigmoids": 0}
        for node in graph.node:
            output = node.output[0] if node.output else ""
            if output in sigmoids:
                nodes += self._denominator(node)
                if output in read:
                    nodes.append(self._quotient(_ONE, output, node))
                    counts["sigmoids"] += 1
            elif output in silus:
                nodes.append(self._quotient(*silus[output], node))
                counts["silus"] += 1
            else:
                nodes.append(node)
        if sigmoids:
            graph.initializer.append(numpy_helper.from_array(np.array(1.0, np.float32), _ONE))
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
        return PassResult(counts)

    @staticmethod
    def _silu_of(node: onnx.NodeProto, sigmoids: dict[str, str]) -> tuple[str, str] | None:
        """Names of x and of Sigmoid(x) if the node multiplies the two."""
        if node.op_type != "Mul" or node.domain not in _STANDARD:
            return None
        left, right = node.input
        return next(((x, s) for x, s in ((left, right), (right, left)) if sigmoids.get(s) == x), None)

    @staticmethod
    def _denominator(sigmoid: onnx.NodeProto) -> list[onnx.NodeProto]:
        """1 + exp(-x), named after the sigmoid's output."""
        prefix = sigmoid.output[0]
        steps = (
            ("Neg", [sigmoid.input[0]], f"{prefix}/negated"),
            ("Exp", [f"{prefix}/negated"], f"{prefix}/exp"),
            ("Add", [f"{prefix}/exp", _ONE], f"{prefix}/denominator"),
        )
        return [helper.make_node(op, inputs, [output], name=output) for op, inputs, output in steps]

    @staticmethod
    def _quotient(numerator: str, sigmoid: str, node: onnx.NodeProto) -> onnx.NodeProto:
        return helper.make_node("Div", [numerator, f"{sigmoid}/denominator"], node.output, name=node.name)
