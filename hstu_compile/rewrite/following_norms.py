"""Norms that a kernel can compute right behind an attention, where a graph is cut there. Level 3.

Such a norm waits for nothing but the attention, so its kernel runs in the attention's place between two segments.
"""

from __future__ import annotations

import dataclasses
import math

import onnx

from hstu_compile.artifacts import TensorSpec
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.op_schema import is_attention, is_norm, node_attributes, norm_contract

#: Operators that keep every element where it is in row-major order.
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity"})


@dataclasses.dataclass(frozen=True)
class FollowingNorm:
    """A norm of an attention's output.

    Attributes:
        attention: the attention's output, [rows, heads, dim].
        width: heads * dim, the columns of a row.
    """

    attention: str
    width: int


def following_norms(graph: onnx.GraphProto) -> dict[str, FollowingNorm]:
    """Every HstuNorm that follows an attention directly, by its output.

    1. Its rows are the attention's output through views that keep the rows.
    2. Its scale, and its bias and shift if it has them, are constants.
    3. Its gate, if it has one, depends on fewer attentions in a row than its rows do: it is there before that
       attention runs.
    4. Types and widths of the attention's output, of the gate and of the result are recorded in the graph.

    Args:
        graph: with initializers for constants, in topological order.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    specs = {spec.name: spec for spec in tensor_specs([*graph.value_info, *graph.input, *graph.output])}
    depth: dict[str, int] = {}
    attended: dict[str, str] = {}  # an attention's output by each of its views
    found: dict[str, FollowingNorm] = {}
    for node in graph.node:
        behind = max((depth.get(name, 0) for name in node.input if name), default=0) + is_attention(node)
        depth |= {name: behind for name in node.output if name}
        if is_attention(node):
            attended[node.output[0]] = node.output[0]
        elif node.op_type in VIEWS and node.input[0] in attended:
            attended[node.output[0]] = attended[node.input[0]]
        elif is_norm(node):
            names = [each.name for each in norm_contract().present_inputs(node_attributes(node))]
            read = dict(zip(names, node.input, strict=True))
            attention, gate = attended.get(read.pop("x")), read.pop("gate", None)
            if attention is None or not initializers.keys() >= set(read.values()):
                continue
            rows = _known(specs.get(attention), 3)
            width = math.prod(rows) if rows else 0
            is_early = gate is None or (
                depth.get(gate, 0) < depth[attention] and _known(specs.get(gate), 2) == (width,)
            )
            if [width] == list(initializers[read["scale"]].dims) and is_early and _known(specs.get(node.output[0]), 2):
                found[node.output[0]] = FollowingNorm(attention, width)
    return found


def _known(spec: TensorSpec | None, rank: int) -> tuple[int, ...]:
    """The sizes behind the rows of a tensor whose type and rank are recorded; empty where one of them is not fixed."""
    if spec is None or spec.dtype == "undefined" or len(spec.shape) != rank:
        return ()
    sizes = tuple(size for size in spec.shape[1:] if isinstance(size, int) and size > 0)
    return sizes if len(sizes) == rank - 1 else ()
