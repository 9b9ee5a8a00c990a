"""Norms in front of the first layer that kernels compute, where a graph is cut. Level 3.

Before its layers a ranking model has towers side by side: product, norm that gates its own rows, product, norm. All of
them are as deep, so that one cut serves the norms of all at the same depth. One more serves the norm of their sum,
which the first layer's projection reads.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from hstu_compile.artifacts import TensorSpec
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.op_schema import is_attention, is_norm, node_attributes, norm_contract
from hstu_compile.rewrite.norm_body import ELEMENT_TYPES

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_GATED_BY_ANOTHER = 1


def tower_norms(graph: onnx.GraphProto) -> dict[str, tuple[onnx.NodeProto, ...]]:
    """Every HstuNorm that is worth a cut, by its output: what takes its place.

    1. Its rows are what a product made: a norm of a tower. Or they are made of what such norms end in, without another
       norm or product in between, and it stores its result in their type: the norm in front of the first layer.
       TensorRT-RTX computes that one in the kernel that gathers and adds its rows. In front of the other layers a norm
       reads the residual alone, in a kernel of its own, and stays in its segment.
    2. It depends on no attention, and an attention depends on it: the tower of the candidates' own embeddings, which
       the last segment reads, stays there.
    3. Its scale, and its bias and shift if it has them, are constants, and it has no gate but its own rows.
    4. Types and widths of its rows and of the result are recorded in the graph, and the number of its rows is not
       fixed: what follows from weights alone is computed when the engine is built.
    5. No attention has a cache: where there is one, the rows are few, and three segments more cost what the norms save.

    In the place of a tower's is the norm itself, which stores its result in the type of its rows, and where the graph
    has float32 there, a Cast back. That is one rounding to the half type of each summand of the first residual, which
    is rounded to that type when it is a sum; half as many bytes cross. The rest is what the graph computes, and so is
    the norm in front of the first layer: its rows and its result are of that type in the graph.

    Args:
        graph: with initializers for constants, in topological order.
    """
    if any(is_attention(node) and node_attributes(node)["has_cache"] for node in graph.node):
        return {}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    specs = {spec.name: spec for spec in tensor_specs([*graph.value_info, *graph.input, *graph.output])}
    served = {value.name for value in graph.output}
    behind: set[str] = set()  # what depends on an attention
    products: set[str] = set()
    summed: set[str] = set()  # what is made of the towers' norms without a norm or product in between
    found: dict[str, tuple[onnx.NodeProto, ...]] = {}
    for node in graph.node:
        if is_attention(node) or not behind.isdisjoint(node.input):
            behind.update(node.output)
        elif node.op_type in _PRODUCTS:
            products.update(node.output)
        elif not is_norm(node):
            if not summed.isdisjoint(node.input):
                summed.update(node.output)
        elif (attributes := node_attributes(node))["activation"] != _GATED_BY_ANOTHER:
            names = [each.name for each in norm_contract().present_inputs(attributes)]
            read = dict(zip(names, node.input, strict=True))
            x, out = read.pop("x"), node.output[0]
            if not initializers.keys() >= set(read.values()):
                continue
            width = tuple(initializers[read["scale"]].dims)
            if not all(_has_open_rows(specs.get(name), width) for name in (x, out)):
                continue
            if x in products:
                found[out] = (node,) if out in served else _storing_its_rows_type(node)
                summed.add(out)
            elif x in summed and attributes["input_type"] == attributes["output_type"]:
                found[out] = (node,)
    read_by_attentions = _read_by_attentions(graph)
    return {name: nodes for name, nodes in found.items() if name in read_by_attentions}


def _has_open_rows(spec: TensorSpec | None, width: tuple[int, ...]) -> bool:
    """Whether a value is known to be of any number of rows of this width."""
    if spec is None or spec.dtype == "undefined" or len(spec.shape) != 2:
        return False
    return spec.shape[1:] == width and isinstance(spec.shape[0], str)


def _storing_its_rows_type(node: onnx.NodeProto) -> tuple[onnx.NodeProto, ...]:
    attributes = node_attributes(node)
    types = (attributes["input_type"], attributes["output_type"])
    if types[0] == types[1] or ELEMENT_TYPES[types[1]] != TensorProto.FLOAT:
        return (node,)
    stored = f"{node.output[0]}/stored"
    norm = onnx.NodeProto()
    norm.CopyFrom(node)
    norm.output[0] = stored
    next(each for each in norm.attribute if each.name == "output_type").i = types[0]
    widened = helper.make_node("Cast", [stored], list(node.output), name=f"{stored}/widened", to=TensorProto.FLOAT)
    return norm, widened


def _read_by_attentions(graph: onnx.GraphProto) -> set[str]:
    """Every value that an attention depends on."""
    wanted: set[str] = set()
    for node in reversed(graph.node):
        if is_attention(node) or not wanted.isdisjoint(node.output):
            wanted.update(filter(None, node.input))
    return wanted
