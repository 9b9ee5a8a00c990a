"""Residuals added to a product with a bias in float16, where the graph widens all three and rounds their sum once."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from hstu_compile.rewrite._half_sums import STANDARD, cast_type, narrowed, rebuild, values_of
from hstu_compile.rewrite._pass import Pass, PassResult


class NarrowResiduals(Pass):
    """Cast((Cast(product) + bias) + Cast(residual)) of float16 becomes (product + bias) + residual.

    TensorRT-RTX widens the residual in a kernel of its own, since the product that adds it reads float32: 0.31 ms of
    69,648 rows instead of 0.22 (`exported` and `last` in tests/bench/results/rtx_products.csv).

    Not exact: the sum of product and bias is rounded before the residual is added, by half a unit in its last place.
    PyTorch in float16 rounds there too. So bfloat16, whose unit is eight times as large, is left alone.

    Cases: 1. the bias is a constant whose numbers float16 has; 2. sums that somebody else reads stay; 3. so does a
    residual that is float32 itself. Runs after narrow_adds, which takes sums of two, and before float_epilogues.
    """

    name = "narrow_residuals"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        constants, kinds, producers, readers = values_of(model)
        given = set(constants)

        def made_by(name: str, op_type: str) -> onnx.NodeProto | None:
            node = producers.get(name)
            return node if node is not None and node.op_type == op_type and node.domain in STANDARD else None

        def half_of(name: str) -> str | None:
            """The float16 value that a float32 one is a Cast of."""
            cast = made_by(name, "Cast")
            return str(cast.input[0]) if cast is not None and kinds.get(cast.input[0]) == TensorProto.FLOAT16 else None

        def biased(name: str) -> tuple[str, str] | None:
            """Product and bias of a float32 sum that nobody else reads, as float16 values."""
            add = made_by(name, "Add")
            if add is None or readers[name] != 1:
                return None
            for product, bias in (tuple(add.input), tuple(reversed(add.input))):
                source = half_of(product)
                if source is not None and made_by(source, "MatMul") is not None and bias in given:
                    half = narrowed(constants, bias, TensorProto.FLOAT16)
                    return None if half is None else (source, half)
            return None

        replaced: dict[str, tuple[onnx.NodeProto, ...]] = {}
        for node in graph.node:
            if node.op_type != "Cast" or node.domain not in STANDARD or cast_type(node) != TensorProto.FLOAT16:
                continue
            add = made_by(node.input[0], "Add")
            if add is None or readers[add.output[0]] != 1:
                continue
            for total, other in (tuple(add.input), tuple(reversed(add.input))):
                terms, residual = biased(total), half_of(other)
                if terms is not None and residual is not None:
                    half = f"{node.output[0]}/biased"
                    replaced[node.output[0]] = (
                        helper.make_node("Add", terms, [half], name=half),
                        helper.make_node("Add", [half, residual], node.output, name=add.name),
                    )
                    break
        if replaced:
            used = {name for adds in replaced.values() for add in adds for name in add.input}
            graph.initializer.extend(constants[name] for name in sorted(used - given) if name in constants)
            rebuild(graph, replaced)
        return PassResult({"residuals": len(replaced)})
