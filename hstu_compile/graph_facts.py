"""What a graph is made of, counted from the graph itself and not from what was asked for. Level 3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from hstu_compile.artifacts import TensorSpec
from hstu_compile.table_files import tensor_bytes

_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}

# The operators whose type decides speed and accuracy.
_COUNTED = ("MatMul", "Gemm", "LayerNormalization", "HstuAttention", "HstuNorm")


def graph_facts(model: onnx.ModelProto) -> dict[str, Any]:
    """Node and operator counts, bytes of weights, and how many of the heavy operators compute in which type."""
    graph = model.graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input, *graph.output)}
    codes = _dequantized(graph, types)
    precision: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in _COUNTED:
            kind = _NAMES.get(types.get(node.output[0], 0), "unknown")
            operands = {codes.get(name) for name in node.input}
            if len(operands) == 1 and None not in operands:
                [kind] = (_NAMES.get(each or 0, "unknown") for each in operands)
            precision[f"{node.op_type} {kind}"] += 1
    return {
        "nodes": len(graph.node),
        "initializers_bytes": sum(map(tensor_bytes, graph.initializer)),
        "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "precision_counts": dict(sorted(precision.items())),
    }


def _dequantized(graph: onnx.GraphProto, types: Mapping[str, int]) -> dict[str, int]:
    """Values that DequantizeLinear makes, and the type of what it makes them of: what a runtime multiplies."""
    known = {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}
    return {node.output[0]: known.get(node.input[0], 0) for node in graph.node if node.op_type == "DequantizeLinear"}


def tensor_specs(values: Any) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of ONNX value infos; dynamic axes by name."""
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_string(tensor.elem_type).removeprefix("TensorProto.").lower()
        shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        specs.append(TensorSpec(value.name, {"float": "float32", "double": "float64"}.get(dtype, dtype), shape))
    return tuple(specs)
