"""Run a bfloat16 graph where no bfloat16 kernels exist. Level 3; plain onnx protobuf.

For execution only, never shipped: ONNX Runtime's CPU provider has no bfloat16 MatMul, Mul, Gather and so on.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.errors import RewriteError
from hstu_compile.rewrite._pass import Pass, PassResult
from hstu_compile.table_files import is_external

# These move values without computing new ones: rounding their result again would change nothing.
_MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Reshape",
        "ScatterND",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
        "Max",
        "Min",
        "Clip",
        "Neg",
        "Abs",
        "Relu",
    )
)
_STANDARD = ("", "ai.onnx")


class WidenBf16(Pass):
    """Hold every bfloat16 value in float32, and round it to bfloat16 wherever the graph did.

    Each value is then representable in bfloat16, so nothing but the accumulation inside one operator can differ from a
    runtime with bfloat16 kernels, and those accumulate in float32 too.

    Cases: 1. a bfloat16 constant: the same numbers in float32; 2. an operator that computes in bfloat16: float32, then
    Cast to bfloat16 and back; 3. an operator that only moves values: float32; 4. Cast to bfloat16 (and CastLike): Cast
    to bfloat16 and back; 5. bfloat16 graph inputs and outputs become float32; 6. no bfloat16: nothing, byte for byte;
    7. a table in a file stays there, in bfloat16: what is looked up in it is widened, as ONNX Runtime has that Gather.
    Local functions are inlined first, as their bodies have no types of their own.
    """

    name = "widen_bf16"

    def call(self, model: onnx.ModelProto) -> PassResult:
        if not _has_bf16(model):
            return PassResult({"constants": 0, "rounded": 0, "values": 0})
        if model.functions:
            model.CopyFrom(onnx.inliner.inline_local_functions(model))
            del model.functions[:]
        graph = model.graph
        inferred = onnx.shape_inference.infer_shapes(model).graph
        typed = [*inferred.value_info, *inferred.input, *inferred.output]
        kinds = {value.name: value.type.tensor_type.elem_type for value in typed}
        kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        tables = {tensor.name for tensor in graph.initializer if is_external(tensor)}
        constants = sum(_widen_tensor(tensor) for tensor in graph.initializer if tensor.name not in tables)
        nodes: list[onnx.NodeProto] = []
        rounded = 0
        done = _rounding_casts(graph, tables)
        for node in graph.node:
            untyped = [name for name in node.output if name and kinds.get(name, 0) == 0]
            if untyped and any(kinds.get(name) == TensorProto.BFLOAT16 for name in node.input):
                raise RewriteError(
                    "HSTU-E302",
                    f"the type of {untyped[0]} is unknown",
                    f"{node.op_type} {node.name} reads bfloat16, and shape inference does not tell what it writes",
                    "export the graph again with hstu-compile, which writes the types down",
                )
            added = [node] if node.output and node.output[0] in done else _widened(node, kinds, tables)
            rounded += len(added) > 1
            nodes += added
        del graph.node[:]
        graph.node.extend(nodes)
        values = 0
        narrow = done | tables
        for value in [*graph.input, *graph.output, *graph.value_info]:
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16 and value.name not in narrow:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
                values += 1
        return PassResult({"constants": constants, "rounded": rounded, "values": values})


def _has_bf16(model: onnx.ModelProto) -> bool:
    graph = model.graph
    typed = [*graph.input, *graph.output, *graph.value_info]
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    return (
        any(tensor.data_type == TensorProto.BFLOAT16 for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == TensorProto.BFLOAT16 for value in typed)
        or any(_makes_bf16(node) for node in nodes)
    )


def _makes_bf16(node: onnx.NodeProto) -> bool:
    """Whether the node itself names bfloat16, as a Cast's target or a constant's type."""
    kinds = {"to": lambda attribute: attribute.i, "value": lambda attribute: attribute.t.data_type}
    return any(a.name in kinds and kinds[a.name](a) == TensorProto.BFLOAT16 for a in node.attribute)


def _rounding_casts(graph: onnx.GraphProto, tables: set[str]) -> set[str]:
    """What an earlier run left in bfloat16, for nothing but a Cast to float32: roundings, and rows of tables."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}

    def casts_to(node: onnx.NodeProto, kind: int) -> bool:
        return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)

    return {
        node.output[0]
        for node in graph.node
        if (casts_to(node, TensorProto.BFLOAT16) or not tables.isdisjoint(node.input))
        and node.output[0] not in outputs
        and all(casts_to(reader, TensorProto.FLOAT) for reader in readers.get(node.output[0], []))
    }


def _widen_tensor(tensor: TensorProto) -> bool:
    """Replace a bfloat16 tensor by the same numbers in float32."""
    if tensor.data_type != TensorProto.BFLOAT16:
        return False
    wide = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    return True


def _widened(node: onnx.NodeProto, kinds: dict[str, int], tables: set[str]) -> list[onnx.NodeProto]:
    """The node on float32, followed by the rounding of each of its bfloat16 outputs."""
    for attribute in node.attribute:
        if attribute.name == "value":
            _widen_tensor(attribute.t)
    narrow = [i for i, name in enumerate(node.output) if kinds.get(name) == TensorProto.BFLOAT16]
    if narrow and not tables.isdisjoint(node.input):
        name, rows = node.output[0], f"{node.output[0]}_bf16"
        node.output[0] = rows
        return [node, helper.make_node("Cast", [rows], [name], name=f"{name}_widened", to=TensorProto.FLOAT)]
    moves = node.op_type in _MOVES or node.op_type in ("Constant", "ConstantOfShape")
    if not narrow or (moves and node.domain in _STANDARD):
        return [node]
    if node.op_type in ("Cast", "CastLike"):
        return _rounding(node.input[0], node.output[0])
    after: list[onnx.NodeProto] = []
    for index in narrow:
        name = node.output[index]
        node.output[index] = f"{name}_unrounded"
        after += _rounding(node.output[index], name)
    return [node, *after]


def _rounding(source: str, target: str) -> list[onnx.NodeProto]:
    half = f"{target}_bf16"
    return [
        helper.make_node("Cast", [source], [half], name=half, to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [half], [target], name=f"{target}_widened", to=TensorProto.FLOAT),
    ]
