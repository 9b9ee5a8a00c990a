"""What the passes that add in half precision have in common. Level 3; private to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

STANDARD = ("", "ai.onnx")
HALVES: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


class GraphValues(NamedTuple):
    """What is known of a graph's values, by name.

    Attributes:
        constants: the initializers; a pass may add some that are not the graph's yet.
        kinds: element types, as far as they follow from the graph.
        producers: the node that makes it.
        readers: how many nodes read it; being an output of the graph counts as one.
    """

    constants: dict[str, TensorProto]
    kinds: dict[str, int]
    producers: dict[str, onnx.NodeProto]
    readers: dict[str, int]


def values_of(model: onnx.ModelProto) -> GraphValues:
    """The values of a model's graph."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    readers: dict[str, int] = {value.name: 1 for value in graph.output}
    for name in (name for node in graph.node for name in node.input):
        readers[name] = readers.get(name, 0) + 1
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return GraphValues(constants, kinds, {name: node for node in graph.node for name in node.output}, readers)


def cast_type(node: onnx.NodeProto) -> int:
    """What a Cast makes."""
    return int(next(a.i for a in node.attribute if a.name == "to"))


def narrowed(constants: dict[str, TensorProto], name: str, half: int) -> str | None:
    """Name of the same numbers in a half type, added to the constants; None where the type lacks one of them."""
    array: NDArray[Any] = numpy_helper.to_array(constants[name])
    if array.dtype != np.float32:
        return None
    with np.errstate(over="ignore"):
        numbers = array.astype(helper.tensor_dtype_to_np_dtype(half))
    if not np.array_equal(numbers.astype(np.float32), array):
        return None
    narrow = f"{name}/{HALVES[half]}"
    constants[narrow] = numpy_helper.from_array(numbers, narrow)
    return narrow


def rebuild(graph: onnx.GraphProto, replaced: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put the sums in place of their last Casts, and drop the Casts and additions that nobody reads any more."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        for made in reversed(replaced.get(node.output[0], (node,)) if node.output else (node,)):
            unread = made.op_type in ("Cast", "Add") and needed.isdisjoint(made.output)
            if not unread:
                kept.append(onnx.NodeProto.FromString(made.SerializeToString()))
                needed.update(made.input)
    written = {name for node in kept for name in node.output}
    infos = [info for info in graph.value_info if info.name in written]
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.value_info[:]
    graph.value_info.extend(infos)
