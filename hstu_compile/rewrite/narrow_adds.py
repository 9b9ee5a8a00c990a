"""Additions of half-precision values in half precision, where the graph widens them only to round the sum again."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from hstu_compile.rewrite._half_sums import HALVES, STANDARD, cast_type, narrowed, rebuild, values_of
from hstu_compile.rewrite._pass import Pass, PassResult


class NarrowAdds(Pass):
    """Cast(Cast(a) + Cast(b)) to a half type, of values a and b of that type, becomes a + b.

    Exact to the bit. The sum of two numbers of 11 bits (float16) or 8 (bfloat16), rounded to float32's 24 and then to
    as many as theirs, is what one rounding gives: 24 >= 2 * 11 + 2 (Figueroa, "When is double rounding innocuous?",
    1995). Overflow, subnormals and NaN come out alike.

    TensorRT 8 runs each Cast that it cannot fuse as a kernel, and keeps the projection in front of such an addition,
    and keys and values beside it, in float32: it converts what is cached to float32 and back in every layer.
    TensorRT-RTX widens the residual in a kernel of its own, as the product that adds it reads float32: 0.35 of 7.70 ms
    for 69,648 tokens on an H100 (tests/bench/results/timeline_fp16_B16_n4096_m256_pruned.csv).

    Cases: 1. both terms are widened values of the half type; 2. one is a float32 constant whose numbers that type has,
    such as a half-precision parameter that the exporter widened; 3. a sum that somebody else reads stays.
    Runs before project_by_convolution, which takes such an addition into the projection.
    """

    name = "narrow_adds"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        constants, kinds, producers, readers = values_of(model)
        given = set(constants)

        def half_of(name: str, half: int) -> str | None:
            """The value of a half type that has the numbers of a float32 one."""
            if name in constants:
                return narrowed(constants, name, half)
            node = producers.get(name)
            if node is None or node.op_type != "Cast" or node.domain not in STANDARD:
                return None
            source = str(node.input[0])
            return source if kinds.get(source) == half else None

        replaced: dict[str, tuple[onnx.NodeProto, ...]] = {}
        for node in graph.node:
            if node.op_type != "Cast" or node.domain not in STANDARD or cast_type(node) not in HALVES:
                continue
            add = producers.get(node.input[0])
            if add is None or add.op_type != "Add" or readers[add.output[0]] != 1:
                continue
            if any(kinds.get(name) != TensorProto.FLOAT for name in add.input):
                continue
            terms = [half for name in add.input if (half := half_of(name, cast_type(node))) is not None]
            if len(terms) != len(add.input) or all(name in given for name in add.input):
                continue
            replaced[node.output[0]] = (helper.make_node("Add", terms, node.output, name=add.name),)
        if replaced:
            used = {name for adds in replaced.values() for add in adds for name in add.input}
            graph.initializer.extend(constants[name] for name in sorted(used - given) if name in constants)
            rebuild(graph, replaced)
        return PassResult({"adds": len(replaced)})
